//! `pretrain`: a small Llama-style teacher from token shards, by AdamW with a WSD schedule.
//!
//! About 1.3 MFLOP a token at the default sizes: 2.9M tokens take about a minute on two cores.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use engine::stage::{Context, Cpu, In, Out, Ports, Stage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::data::shard::TokenShard;
use crate::models::{Config, Keep, MixerKind, Model, Params as Weights, Trained};
use crate::train::adamw::{AdamW, Group, Rule};
use crate::train::device::Device;
use crate::train::language::Language;
use crate::train::run::{Batches, Curve, Guard, rounded};
use crate::train::schedule::Wsd;
use crate::train::{checkpoint, clip};

/// The stage.
pub struct Pretrain;

/// Sizes of the teacher and how it is trained.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// Number of blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Query heads; each is `d_model / heads` wide.
    pub heads: usize,
    /// Key and value heads; divides `heads`. As many as `heads` when left out.
    pub kv_heads: Option<usize>,
    /// Hidden width of the MLP.
    pub ffn: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Added to the mean square in RMSNorm.
    pub norm_eps: f64,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Whether tokens see their own document only, not those packed before it.
    pub mask_documents: bool,
    /// Sequences an update.
    pub batch: usize,
    /// Updates in all.
    pub updates: u64,
    /// Learning rate of the stable part.
    pub lr: f64,
    /// Share of the updates in which the rate rises from zero.
    pub warmup: f64,
    /// Share of the updates in which the rate falls to zero.
    pub decay: f64,
    /// Decay of AdamW's first moment.
    pub beta1: f64,
    /// Decay of AdamW's second moment.
    pub beta2: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Largest norm of the gradient.
    pub clip: f64,
    /// Held-out sequences that the final loss is taken over; fewer when there are no more.
    pub holdout_sequences: usize,
    /// Updates between two checkpoints.
    pub checkpoint_every: u64,
    /// What the start and the order of the data depend on.
    pub seed: u64,
    /// Where to train.
    pub device: Device,
}

impl Default for Params {
    fn default() -> Params {
        Params {
            layers: 3,
            d_model: 64,
            heads: 4,
            kv_heads: None,
            ffn: 160,
            rope_theta: 10_000.0,
            norm_eps: 1e-5,
            tied: true,
            mask_documents: true,
            batch: 8,
            updates: 2800,
            lr: 4e-3,
            warmup: 0.05,
            decay: 0.2,
            beta1: 0.9,
            beta2: 0.95,
            weight_decay: 0.1,
            clip: 1.0,
            holdout_sequences: 256,
            checkpoint_every: 200,
            seed: 17,
            device: Device::Auto,
        }
    }
}

/// Updates between two points of the loss curve.
const RECORD_EVERY: u64 = 20;

impl Stage for Pretrain {
    const NAME: &'static str = "pretrain";
    const VERSION: u32 = 3;
    const DOC: &'static str = "Trains a small Llama-style Transformer on token shards.";
    const CPU: Cpu = Cpu::All;
    const GPU: bool = true;
    type Params = Params;

    fn ports() -> Ports {
        const INPUTS: &[In] = &[
            In::one("tokens", "Token shard to train on."),
            In::one("holdout", "Held-out token shard for the final loss.").optional(),
        ];
        const OUTPUTS: &[Out] = &[
            Out::one("model", "model.safetensors", "The teacher, under Llama's tensor names."),
            Out::one("metrics", "metrics.json", "Loss curve and final held-out loss."),
        ];
        Ports { inputs: INPUTS, outputs: OUTPUTS }
    }

    fn check(p: &Params) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
        let mut need = |ok: bool, name: &str, text: &str| {
            if !ok {
                wrong.push((name.to_string(), text.to_string()));
            }
        };
        let sizes =
            [("layers", p.layers), ("d_model", p.d_model), ("ffn", p.ffn), ("batch", p.batch)];
        for (name, value) in sizes {
            need(value > 0, name, "must be at least 1");
        }
        let heads = p.heads > 0 && p.d_model.is_multiple_of(p.heads);
        need(heads, "heads", "must divide `d_model`");
        need(
            !heads || (p.d_model / p.heads).is_multiple_of(2),
            "heads",
            "must leave heads of even width",
        );
        let kv = p.kv_heads.is_none_or(|kv| kv > 0 && p.heads.is_multiple_of(kv));
        need(kv, "kv_heads", "must divide `heads`");
        need(p.lr > 0.0 && p.lr.is_finite(), "lr", "must be above 0");
        need(p.clip > 0.0, "clip", "must be above 0");
        let share = |value: f64| (0.0..=1.0).contains(&value);
        need(share(p.warmup) && share(p.decay), "warmup", "and `decay` are shares between 0 and 1");
        need(p.warmup + p.decay <= 1.0, "decay", "and `warmup` add up to more than 1");
        need(p.checkpoint_every > 0, "checkpoint_every", "must be at least 1");
        wrong
    }

    fn run(params: &Params, ctx: &mut Context) -> Result<()> {
        let tokens = TokenShard::open(ctx.path("tokens")?)?;
        ensure!(
            !tokens.is_empty(),
            "input `tokens` holds no full sequence: give more text, or a smaller `seq`"
        );
        ensure!(tokens.seq() > 1, "input `tokens` has sequences of one token: nothing follows it");
        let model = Model::new(config(params, &tokens))?;
        #[cfg(any(feature = "cuda", feature = "emulate"))]
        if params.device == Device::Cuda {
            return on_gpu(&crate::gpu::open()?, params, ctx, &model, tokens);
        }
        params.device.require_cpu(Pretrain::NAME)?;
        let mut training = Training::start(params, &model, tokens.len());
        if let Some(checkpoint) = ctx.checkpoint_latest() {
            training.restore(&checkpoint.dir.clone())?;
        }
        let mut language = Language::new(&model, params.batch, tokens.seq(), Keep::Backward);
        training.run(ctx, &model, &mut language, &tokens)?;
        let (threads, weights) = (ctx.threads(), &training.weights);
        let holdout = holdout(params, ctx, &model, tokens.seq())?;
        let losses = holdout.map(|(shard, count)| {
            let (mut sum, mut scored) = (0.0, 0);
            for first in (0..count).step_by(language.batch()) {
                let size = language.batch().min(count - first);
                language.load(size, |i, out| shard.copy_to(first + i, out));
                let (mean, tokens) = language.loss(&model, weights, threads);
                sum += mean * tokens as f64;
                scored += tokens;
            }
            (sum, scored)
        });
        let Facts { done, guard, curve, .. } = &training.facts;
        finish(ctx, &model, weights, curve, (*done, guard.skipped, losses))
    }
}

/// Writes the model and the curve with the figures after the last update: updates made, updates
/// skipped, and the sum of losses on held-out sequences with how many tokens it is of.
fn finish(
    ctx: &mut Context,
    model: &Model,
    weights: &Weights,
    curve: &Curve,
    (updates, skipped, losses): (u64, u64, Option<(f64, usize)>),
) -> Result<()> {
    let last = match losses {
        None => json!({ "updates": updates, "skipped": skipped }),
        Some((sum, scored)) => {
            let loss = if scored > 0 { sum / scored as f64 } else { f64::NAN };
            ctx.metric(updates, &[("holdout_loss", loss)]);
            json!({
                "updates": updates,
                "skipped": skipped,
                "holdout_loss": rounded(loss),
                "holdout_perplexity": rounded(loss.exp()),
                "holdout_tokens": scored,
            })
        }
    };
    model.save(&ctx.output("model")?, weights)?;
    let metrics = serde_json::to_string(&curve.to_json(last))?;
    let path = ctx.output("metrics")?;
    std::fs::write(&path, metrics).with_context(|| format!("cannot write {}", path.display()))
}

/// The held-out shard and how many of its sequences are taken, if there is one.
fn holdout(
    params: &Params,
    ctx: &Context,
    model: &Model,
    length: usize,
) -> Result<Option<(TokenShard, usize)>> {
    if !ctx.has("holdout") {
        return Ok(None);
    }
    let shard = TokenShard::open(ctx.path("holdout")?)?;
    let (seq, vocab) = (shard.seq(), shard.vocab());
    ensure!(
        vocab == model.config.vocab && seq == length,
        "input `holdout` has a vocabulary of {vocab} and sequences of {seq} tokens, `tokens` has \
         {} and {length}: take both from one step",
        model.config.vocab,
    );
    let count = shard.len().min(params.holdout_sequences);
    Ok(Some((shard, count)))
}

/// The whole step on a GPU.
#[cfg(any(feature = "cuda", feature = "emulate"))]
fn on_gpu(
    gpu: &crate::gpu::launch::Gpu,
    params: &Params,
    ctx: &mut Context,
    model: &Model,
    tokens: TokenShard,
) -> Result<()> {
    use crate::gpu::phases::{micro_batch, pretrain};
    use crate::ops::Dims;
    use crate::train::run::{Course, drive};

    let (sequences, seq, batch) = (tokens.len(), tokens.seq(), params.batch);
    let holdout = holdout(params, ctx, model, seq)?;
    let start = pretrain::Start {
        name: "the teacher".into(),
        params: model.init(params.seed).flat,
        groups: groups(params, model),
        rule: rule(params),
        clip: params.clip,
    };
    let dims = Dims { batch: micro_batch(&model.config, 0, batch, seq)?, seq };
    let read = Box::new(move |i: usize, out: &mut [u32]| tokens.copy_to(i, out));
    let mut driver = pretrain::driver(gpu, model, start, read, (batch, dims))?;
    let course = Course {
        rate: schedule(params),
        sequences,
        batch,
        seq,
        seed: params.seed,
        checkpoint_every: params.checkpoint_every,
        metrics_every: RECORD_EVERY,
    };
    let curve = drive(ctx, &course, &mut driver)?;
    let losses = match &holdout {
        None => None,
        Some((shard, count)) => {
            let read = |i: usize, out: &mut [u32]| shard.copy_to(i, out);
            Some(driver.work.held_out(&mut driver.batch, *count, read)?)
        }
    };
    let mut weights = Weights::zeros(&model.layout);
    weights.flat = driver.learners.params(0)?;
    let skipped = driver.learners.guard(0).skipped;
    finish(ctx, model, &weights, &curve, (params.updates, skipped, losses))
}

fn config(p: &Params, tokens: &TokenShard) -> Config {
    Config {
        vocab: tokens.vocab(),
        d_model: p.d_model,
        layers: vec![MixerKind::Attention; p.layers],
        heads: p.heads,
        kv_heads: p.kv_heads.unwrap_or(p.heads),
        head_dim: p.d_model / p.heads,
        ffn: p.ffn,
        norm_eps: p.norm_eps,
        rope_theta: p.rope_theta,
        tied: p.tied,
        separator: p.mask_documents.then(|| tokens.separator()),
        d_state: 64,
        d_conv: 4,
        chunk: 64,
        ..Config::default()
    }
}

/// All parameters, with decay where it applies.
fn groups(params: &Params, model: &Model) -> Vec<Group> {
    let group = |span: &crate::models::Span| {
        let decay = if span.decay { params.weight_decay as f32 } else { 0.0 };
        Group { range: span.range.clone(), decay, scale: 1.0 }
    };
    model.layout.spans(|_| true).iter().map(group).collect()
}

fn rule(params: &Params) -> Rule {
    Rule { beta1: params.beta1 as f32, beta2: params.beta2 as f32, ..Rule::default() }
}

fn schedule(params: &Params) -> Wsd {
    Wsd::new(params.lr, params.updates, params.warmup, params.decay)
}

/// All that changes while the model is trained.
struct Training<'a> {
    params: &'a Params,
    weights: Weights,
    optimiser: AdamW,
    groups: Vec<Group>,
    schedule: Wsd,
    batches: Batches,
    facts: Facts,
}

/// What a checkpoint says besides weights and moments.
#[derive(Default, Serialize, Deserialize)]
struct Facts {
    /// Updates done, skipped ones included.
    done: u64,
    /// Updates that moved the weights.
    moved: u64,
    guard: Guard,
    curve: Curve,
    /// Bits of the sum of losses since the last point of the curve.
    sum_bits: u64,
    /// Losses in that sum.
    summed: u64,
}

impl<'a> Training<'a> {
    fn start(params: &'a Params, model: &Model, sequences: usize) -> Training<'a> {
        Training {
            params,
            weights: model.init(params.seed),
            optimiser: AdamW::new(model.layout.len(), rule(params)),
            groups: groups(params, model),
            schedule: schedule(params),
            batches: Batches::new(params.seed, sequences, params.batch),
            facts: Facts::default(),
        }
    }

    fn restore(&mut self, dir: &Path) -> Result<()> {
        let saved = checkpoint::Saved::open(dir)?;
        self.facts = saved.facts()?;
        self.optimiser.updates = self.facts.moved;
        saved.read("weights", &mut self.weights.flat)?;
        saved.read("m", &mut self.optimiser.m)?;
        saved.read("v", &mut self.optimiser.v)
    }

    fn save(&mut self, ctx: &mut Context) -> Result<()> {
        self.facts.moved = self.optimiser.updates;
        let buffers = [
            ("weights".to_string(), &self.weights.flat[..]),
            ("m".to_string(), &self.optimiser.m[..]),
            ("v".to_string(), &self.optimiser.v[..]),
        ];
        let facts = &self.facts;
        ctx.checkpoint_save(facts.done, |dir| checkpoint::write(dir, &buffers, facts))
    }

    fn run(
        &mut self,
        ctx: &mut Context,
        model: &Model,
        language: &mut Language,
        tokens: &TokenShard,
    ) -> Result<()> {
        let updates = self.params.updates;
        let per_update = (self.params.batch * tokens.seq()) as u64;
        while self.facts.done < updates {
            let picked = self.batches.at(self.facts.done);
            language.load(picked.len(), |i, out| tokens.copy_to(picked[i], out));
            let norm = self.update(ctx, model, language)?;
            let done = self.facts.done;
            if done.is_multiple_of(RECORD_EVERY) || done == updates {
                self.record(ctx, norm);
                ctx.progress(done * per_update, updates * per_update, "tokens");
            }
            if done.is_multiple_of(self.params.checkpoint_every) && done < updates {
                self.save(ctx)?;
            }
            if ctx.cancelled() {
                self.save(ctx)?;
                ctx.check_cancelled()?;
            }
        }
        Ok(())
    }

    /// One update; gives the norm of its gradient.
    fn update(&mut self, ctx: &Context, model: &Model, language: &mut Language) -> Result<f64> {
        let threads = ctx.threads();
        let (loss, _) = language.step(model, &self.weights, Trained::ALL, threads);
        let grads = &language.grads().flat;
        let norm = clip::norm([&grads[..]]);
        let factor = clip::factor(norm, self.params.clip).filter(|_| loss.is_finite());
        if let Some(factor) = factor {
            let lr = self.schedule.at(self.facts.done);
            self.optimiser.update(&mut self.weights.flat, grads, &self.groups, lr, factor);
            self.facts.sum_bits = (f64::from_bits(self.facts.sum_bits) + loss).to_bits();
            self.facts.summed += 1;
        }
        self.facts.done += 1;
        self.facts.guard.note(ctx, "the teacher", self.facts.done, factor.is_some())?;
        Ok(norm)
    }

    fn record(&mut self, ctx: &mut Context, norm: f64) {
        let facts = &mut self.facts;
        let loss = f64::from_bits(facts.sum_bits) / facts.summed as f64;
        let lr = f64::from(self.schedule.at(facts.done.saturating_sub(1)));
        facts.curve.record(ctx, facts.done, &[("loss", loss), ("grad_norm", norm), ("lr", lr)]);
        (facts.sum_bits, facts.summed) = (0, 0);
    }
}
