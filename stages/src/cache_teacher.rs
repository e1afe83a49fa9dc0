//! `cache_teacher`: what phases 1 to 3 need of the teacher, one artifact a layer, streamed to disk.
//!
//! Attention is kept as rotated q and k (16 times smaller than the matrices at 2,048 tokens, and
//! exact to the stored number type) or as packed matrices. Memory is that of one small batch.

#[cfg(any(feature = "cuda", feature = "emulate"))]
mod on_gpu;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use engine::stage::{Context, Cpu, In, Out, Ports, Stage};
use safetensors::Dtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::data::shard::TokenShard;
use crate::models::file::Writer;
use crate::models::{Keep, MixerKind, Model, Params as Weights, Pass};
use crate::ops::Dims;
use crate::ops::top_k::{self, TopK};
use crate::train::device::Device;
use crate::train::run::{SHARDS, each_shard};
use crate::train::signals::{AttentionForm, Shape, pack};
use crate::train::source::choose;

/// The stage.
pub struct CacheTeacher;

/// One kind of signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Signal {
    /// The residual stream before and after every block.
    Hidden,
    /// Attention of every layer.
    Attention,
    /// The `top_k` most likely next tokens.
    Logits,
}

/// How values are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Number {
    /// Exact: training from the cache gives the same bits as with the teacher alongside.
    #[default]
    F32,
    /// Half the size.
    Bf16,
}

/// What is kept, and of how many sequences.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// Sequences to cache; all when the shard has fewer.
    pub sequences: usize,
    /// The kinds of signal to keep.
    pub keep: Vec<Signal>,
    /// How attention is stored.
    pub attention: AttentionForm,
    /// How many of the most likely tokens to keep with their probabilities; 0 for none.
    pub top_k: usize,
    /// How hidden states and attention are stored.
    pub dtype: Number,
    /// Which sequences are taken.
    pub seed: u64,
    /// Where to compute.
    pub device: Device,
}

impl Default for Params {
    fn default() -> Params {
        Params {
            sequences: 512,
            keep: vec![Signal::Hidden, Signal::Attention],
            attention: AttentionForm::Qk,
            top_k: 0,
            dtype: Number::F32,
            seed: 17,
            device: Device::Auto,
        }
    }
}

impl Stage for CacheTeacher {
    const NAME: &'static str = "cache_teacher";
    const VERSION: u32 = 3;
    const DOC: &'static str =
        "Runs the teacher once and stores hidden states, attention and top logits by layer.";
    const CPU: Cpu = Cpu::All;
    const GPU: bool = true;
    type Params = Params;

    fn ports() -> Ports {
        const INPUTS: &[In] = &[
            In::one("model", "The teacher.").tensors(),
            In::one("tokens", "Token shard to take sequences of."),
        ];
        const OUTPUTS: &[Out] = &[
            Out::many("layer", "layer.safetensors", "Signals of each layer."),
            Out::one("logits", "logits.safetensors", "Most likely tokens; only with `top_k`.")
                .optional(),
            Out::one("tokens", "tokens.safetensors", "The sequences that were taken."),
        ];
        Ports { inputs: INPUTS, outputs: OUTPUTS }
    }

    fn check(p: &Params) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
        let mut say = |name: &str, text: &str| wrong.push((name.to_string(), text.to_string()));
        if p.sequences == 0 {
            say("sequences", "must be at least 1");
        }
        if p.keep.is_empty() {
            say("keep", "must name at least one of `hidden`, `attention` and `logits`");
        }
        if p.keep.contains(&Signal::Logits) != (p.top_k > 0) {
            say("top_k", "must be above 0 if and only if `keep` has `logits`");
        }
        wrong
    }

    fn run(params: &Params, ctx: &mut Context) -> Result<()> {
        let (model, weights) = Model::load(&ctx.tensors("model")?).context("input `model`")?;
        let shard = TokenShard::open(ctx.path("tokens")?)?;
        check_inputs(params, &model, &shard)?;
        let chosen = choose(params.seed, params.sequences, shard.len());
        #[cfg(any(feature = "cuda", feature = "emulate"))]
        if params.device == Device::Cuda {
            let gpu = crate::gpu::open()?;
            return on_gpu::run(&gpu, params, ctx, (&model, &weights), &shard, &chosen);
        }
        params.device.require_cpu(CacheTeacher::NAME)?;
        let files = Files::create(params, ctx, &model, &shard, &chosen)?;
        files.fill(params, ctx, &model, &weights, &shard, &chosen)
    }
}

fn check_inputs(params: &Params, model: &Model, shard: &TokenShard) -> Result<()> {
    let config = &model.config;
    ensure!(!shard.is_empty(), "input `tokens` holds no full sequence");
    ensure!(
        shard.vocab() == config.vocab,
        "input `tokens` has a vocabulary of {}, the model one of {}: take both from one tokenizer",
        shard.vocab(),
        config.vocab
    );
    ensure!(
        shard.seq() <= usize::from(u16::MAX),
        "sequences of {} tokens are too long",
        shard.seq()
    );
    ensure!(
        params.top_k <= config.vocab,
        "`top_k` ({}) exceeds the vocabulary of {}",
        params.top_k,
        config.vocab
    );
    let attention = params.keep.contains(&Signal::Attention);
    if let Some(layer) = config.layers.iter().position(|kind| *kind != MixerKind::Attention)
        && attention
    {
        bail!(
            "layer {layer} of the model has no attention to keep: leave `attention` out of `keep`"
        );
    }
    Ok(())
}

/// The files being written.
struct Files {
    layers: Vec<(Shape, Writer)>,
    logits: Option<Writer>,
    dtype: Dtype,
}

/// Sequences that one shard of the pass takes at a time.
const CHUNK: usize = 4;

/// One shard of the pass: its sequences are `first..first + count` of the chosen ones.
struct Part {
    pass: Pass,
    first: usize,
    count: usize,
    /// Per layer: `hidden` is in the pass; here attention and its log-sum-exp.
    attention: Vec<(Vec<f32>, Vec<f32>)>,
    top: Option<TopK>,
}

impl Files {
    fn create(
        params: &Params,
        ctx: &mut Context,
        model: &Model,
        shard: &TokenShard,
        chosen: &[usize],
    ) -> Result<Files> {
        let dtype = match params.dtype {
            Number::F32 => Dtype::F32,
            Number::Bf16 => Dtype::BF16,
        };
        let config = &model.config;
        let kept = |signal| params.keep.contains(&signal);
        let mut layers = Vec::new();
        for layer in 0..config.layers.len() {
            if !kept(Signal::Hidden) && !kept(Signal::Attention) {
                break;
            }
            let shape = Shape {
                layer,
                sequences: chosen.len(),
                seq: shard.seq(),
                d_model: config.d_model,
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                hidden: kept(Signal::Hidden),
                attention: kept(Signal::Attention).then_some(params.attention),
            };
            let metadata =
                BTreeMap::from([("signals".to_string(), serde_json::to_string(&shape)?)]);
            let path = ctx.output_item("layer", layer as u32)?;
            layers.push((shape.clone(), Writer::create(&path, &shape.specs(dtype), &metadata)?));
        }
        let logits = match kept(Signal::Logits) {
            true => Some(create_logits(params, ctx, config.vocab, shard, chosen)?),
            false => None,
        };
        write_tokens(ctx, shard, chosen)?;
        Ok(Files { layers, logits, dtype })
    }

    fn fill(
        mut self,
        params: &Params,
        ctx: &mut Context,
        model: &Model,
        weights: &Weights,
        shard: &TokenShard,
        chosen: &[usize],
    ) -> Result<()> {
        let seq = shard.seq();
        let mut parts: Vec<Part> =
            (0..SHARDS).map(|_| Part::new(params, model, seq, self.layers.len())).collect();
        for first in (0..chosen.len()).step_by(CHUNK * SHARDS) {
            ctx.check_cancelled()?;
            for (i, part) in parts.iter_mut().enumerate() {
                part.first = chosen.len().min(first + i * CHUNK);
                part.count = CHUNK.min(chosen.len() - part.first);
                let tokens = part.pass.tokens_n.chunks_exact_mut(seq);
                for (to, from) in tokens.zip(&chosen[part.first..][..part.count]) {
                    shard.copy_to(*from, to);
                }
            }
            each_shard(ctx.threads(), &mut parts, |_, part| part.run(params, model, weights));
            for part in &parts {
                self.write(part)?;
            }
            let done = chosen.len().min(first + CHUNK * SHARDS);
            ctx.progress((done * seq) as u64, (chosen.len() * seq) as u64, "tokens");
        }
        self.layers.into_iter().try_for_each(|(_, writer)| writer.finish())?;
        self.logits.map_or(Ok(()), Writer::finish)
    }

    fn write(&mut self, part: &Part) -> Result<()> {
        let Files { layers, logits, dtype } = self;
        for (layer, (shape, writer)) in layers.iter_mut().enumerate() {
            let tokens = part.count * shape.seq;
            let starts: Vec<u16> = part.pass.starts_n[..tokens].iter().map(|s| *s as u16).collect();
            writer.append("starts", bytemuck::cast_slice(&starts))?;
            if shape.hidden {
                let values = tokens * shape.d_model;
                append(writer, "hidden", *dtype, &part.pass.hidden[layer][..values])?;
                append(writer, "next", *dtype, &part.pass.hidden[layer + 1][..values])?;
            }
            let (values, lse) = &part.attention[layer];
            let name = match shape.attention {
                Some(AttentionForm::Qk) => "qk",
                Some(AttentionForm::Matrix) => "matrix",
                None => continue,
            };
            let per: usize = shape.per_sequence(name).iter().product();
            append(writer, name, *dtype, &values[..part.count * per])?;
            append(writer, "lse", Dtype::F32, &lse[..tokens * shape.heads])?;
        }
        if let (Some(writer), Some(top)) = (logits, &part.top) {
            let n = part.count * part.pass.dims().seq;
            writer.append("ids", &top.id_bytes(n))?;
            writer.append("log_p", bytemuck::cast_slice(&top.log_p_nk[..n * top.k]))?;
            writer.append("tail", bytemuck::cast_slice(&top.tail_n[..n]))?;
        }
        Ok(())
    }
}

fn append(writer: &mut Writer, name: &str, dtype: Dtype, values: &[f32]) -> Result<()> {
    match dtype {
        Dtype::BF16 => {
            let halves: Vec<half::bf16> = values.iter().map(|v| half::bf16::from_f32(*v)).collect();
            writer.append(name, bytemuck::cast_slice(&halves))
        }
        _ => writer.append(name, bytemuck::cast_slice(values)),
    }
}

fn create_logits(
    params: &Params,
    ctx: &mut Context,
    vocab: usize,
    shard: &TokenShard,
    chosen: &[usize],
) -> Result<Writer> {
    let ids = if vocab > 1 << 16 { Dtype::U32 } else { Dtype::U16 };
    let shape = vec![chosen.len(), shard.seq(), params.top_k];
    let specs = [
        ("ids".to_string(), ids, shape.clone()),
        ("log_p".to_string(), Dtype::F16, shape),
        ("tail".to_string(), Dtype::F32, vec![chosen.len(), shard.seq()]),
    ];
    let about = json!({ "sequences": chosen.len(), "seq": shard.seq(), "top_k": params.top_k, "vocab": vocab });
    let metadata = BTreeMap::from([("top_logits".to_string(), about.to_string())]);
    Writer::create(&ctx.output("logits")?, &specs, &metadata)
}

fn write_tokens(ctx: &mut Context, shard: &TokenShard, chosen: &[usize]) -> Result<()> {
    let (count, seq) = (chosen.len(), shard.seq());
    let specs = [
        ("sequence".to_string(), Dtype::U32, vec![count]),
        ("tokens".to_string(), Dtype::U32, vec![count, seq]),
    ];
    let mut writer = Writer::create(&ctx.output("tokens")?, &specs, &BTreeMap::new())?;
    let mut tokens = vec![0u32; seq];
    for i in chosen {
        shard.copy_to(*i, &mut tokens);
        writer.append("sequence", &(*i as u32).to_le_bytes())?;
        writer.append("tokens", bytemuck::cast_slice(&tokens))?;
    }
    writer.finish()
}

impl Part {
    fn new(params: &Params, model: &Model, seq: usize, layers: usize) -> Part {
        let dims = Dims { batch: CHUNK, seq };
        let logits = params.keep.contains(&Signal::Logits);
        let matrices =
            params.keep.contains(&Signal::Attention) && params.attention == AttentionForm::Matrix;
        Part {
            pass: model.pass(dims, if matrices { Keep::Matrices } else { Keep::Nothing }),
            first: 0,
            count: 0,
            attention: vec![(Vec::new(), Vec::new()); layers],
            top: logits.then(|| TopK::new(dims.tokens(), model.config.vocab, params.top_k)),
        }
    }

    fn run(&mut self, params: &Params, model: &Model, weights: &Weights) {
        if self.count == 0 {
            return;
        }
        let Part { pass, attention, top, .. } = self;
        let seq = pass.dims().seq;
        let kept = params.keep.contains(&Signal::Attention);
        model.forward(&weights.flat, pass, |layer, _, saved| {
            let Some(mixer) = saved.mixer.attention().filter(|_| kept) else { return };
            let (values, lse) = &mut attention[layer];
            lse.clone_from(&mixer.lse_bhl);
            match params.attention {
                AttentionForm::Matrix => pack(seq, &mixer.probs_bhll, values),
                AttentionForm::Qk => {
                    values.clear();
                    let heads = mixer.heads();
                    let qk = (heads.query + heads.kv) * heads.dim;
                    let rows = mixer.qkv_nr.chunks_exact(heads.row());
                    rows.for_each(|row| values.extend_from_slice(&row[..qk]));
                }
            }
        });
        if let Some(top) = top {
            let n = pass.dims().tokens();
            top_k::fill(top, n, |rows, logits| model.logits(&weights.flat, pass, rows, logits));
        }
    }
}
