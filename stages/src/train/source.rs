//! What a layer in training sees of the teacher, whether it runs alongside or was cached.
//!
//! A visitor gets, for one shard of a batch, each wanted layer's input with its attention (phase 1)
//! or its output (phase 2). From signals stored as f32 the bits are those of the teacher running
//! alongside on the same sequences. Knows no student.

use anyhow::{Context as _, Result, bail, ensure};
use engine::stage::Context;

use crate::data::shard::TokenShard;
use crate::models::model::document_starts;
use crate::models::{Keep, MixerKind, Model, Params, Pass};
use crate::ops::Dims;
use crate::ops::orient::Teacher;
use crate::train::philox::Philox;
use crate::train::signals::{AttentionForm, Signals};

/// Which sequences of a shard stand for all: `count` of them by `seed`, in their order. All when
/// `count` is 0 or no less than `len`.
pub fn choose(seed: u64, count: usize, len: usize) -> Vec<usize> {
    if count == 0 || count >= len {
        return (0..len).collect();
    }
    let order = Philox::new(seed, "signals").permutation(len);
    let mut chosen: Vec<usize> = order.iter().take(count).map(|i| *i as usize).collect();
    chosen.sort_unstable();
    chosen
}

/// What is read of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Input and attention.
    Attention,
    /// Input and output.
    Hidden,
}

/// The teacher, and where its signals come from.
pub struct Source {
    /// The teacher.
    pub model: Model,
    /// Its weights.
    pub params: Params,
    kind: Kind,
    seq: usize,
    /// Blocks that the teacher runs: none beyond the last that is wanted.
    depth: usize,
}

enum Kind {
    /// Every visit is a forward pass, shared by all layers, over these sequences.
    Streamed(Tokens),
    /// One file for each layer.
    Cached(Vec<Signals>),
}

enum Tokens {
    /// These sequences of a shard.
    Shard(TokenShard, Vec<usize>),
    /// One sequence after the other.
    Held(Vec<u32>),
}

impl Tokens {
    fn copy_to(&self, sequence: usize, out: &mut [u32]) {
        match self {
            Tokens::Shard(shard, chosen) => shard.copy_to(chosen[sequence], out),
            Tokens::Held(all) => out.copy_from_slice(&all[sequence * out.len()..][..out.len()]),
        }
    }

    fn sequences(&self, seq: usize) -> usize {
        match self {
            Tokens::Shard(_, chosen) => chosen.len(),
            Tokens::Held(all) => all.len() / seq,
        }
    }
}

/// Buffers of one shard of a batch.
pub struct Feed {
    starts_n: Vec<u32>,
    kind: Buffers,
}

enum Buffers {
    Streamed(Box<Pass>),
    Cached { u_nd: Vec<f32>, next_nd: Vec<f32>, attention: Vec<f32>, lse_bhl: Vec<f32> },
}

/// One layer of one shard.
#[derive(Clone, Copy)]
pub struct Seen<'a> {
    /// Its number.
    pub layer: usize,
    /// Where documents start, see [`crate::ops`].
    pub starts_n: &'a [u32],
    /// Residual stream before the block.
    pub u_nd: &'a [f32],
}

/// What is cached of one layer for some sequences; what is not wanted is empty.
pub struct Layer {
    /// Its number.
    pub layer: usize,
    /// Where documents start.
    pub starts_n: Vec<u32>,
    /// Residual stream before the block.
    pub u_nd: Vec<f32>,
    /// Residual stream after it.
    pub next_nd: Vec<f32>,
    /// Rotated queries, then keys.
    pub qk_nr: Vec<f32>,
    /// Log-sum-exp of the scaled scores.
    pub lse_bhl: Vec<f32>,
}

impl Layer {
    fn read(signals: &Signals, sequences: &[usize], want: Want) -> Result<Layer> {
        let shape = &signals.shape;
        ensure!(
            want == Want::Hidden || shape.attention == Some(AttentionForm::Qk),
            "on a GPU phase 1 reads queries and keys, but layer {} was cached as matrices; cache \
             it with `attention: qk`, or set `device: cpu`",
            shape.layer
        );
        let values = |name: &str, wanted: bool| {
            let len: usize = shape.per_sequence(name).iter().product();
            let mut out = vec![0.0; if wanted { len * sequences.len() } else { 0 }];
            if wanted {
                read(signals, sequences, name, &mut out);
            }
            out
        };
        let (hidden, attention) = (want == Want::Hidden, want == Want::Attention);
        let mut starts_n = vec![0; shape.seq * sequences.len()];
        read_starts(signals, sequences, &mut starts_n);
        Ok(Layer {
            layer: shape.layer,
            starts_n,
            u_nd: values("hidden", true),
            next_nd: values("next", hidden),
            qk_nr: values("qk", attention),
            lse_bhl: values("lse", attention),
        })
    }
}

impl Source {
    /// From the ports `teacher`, `signals` and `tokens`; `sequences` and `seed` choose as
    /// [`choose`] does when the teacher runs alongside. Every signal that will be wanted is there.
    pub fn open(ctx: &Context, want: Want, sequences: usize, seed: u64) -> Result<Source> {
        let (model, params) = Model::load(&ctx.tensors("teacher")?).context("input `teacher`")?;
        if ctx.has("signals") {
            let mut layers = Vec::new();
            for (_, tensors) in ctx.tensors_list("signals")? {
                let signals = Signals::open(tensors).context("input `signals`")?;
                check(&signals, &model, want).context("input `signals`")?;
                layers.push(signals);
            }
            let seq = layers[0].shape.seq;
            let same =
                |s: &Signals| s.shape.seq == seq && s.shape.sequences == layers[0].shape.sequences;
            ensure!(layers.iter().all(same), "input `signals` holds layers of different sequences");
            let depth = model.blocks.len();
            return Ok(Source { model, params, kind: Kind::Cached(layers), seq, depth });
        }
        ensure!(
            ctx.has("tokens"),
            "connect `tokens` for a teacher that runs alongside, or `signals` for a cached one"
        );
        let shard = TokenShard::open(ctx.path("tokens")?)?;
        let (needs, has) = (shard.vocab(), model.config.vocab);
        ensure!(
            needs <= has,
            "the tokens are of a vocabulary of {needs}, but the teacher's has {has}; take both \
             from one tokenizer"
        );
        let (seq, chosen) = (shard.seq(), choose(seed, sequences, shard.len()));
        let depth = model.blocks.len();
        let kind = Kind::Streamed(Tokens::Shard(shard, chosen));
        Ok(Source { model, params, kind, seq, depth })
    }

    /// A teacher alongside on these tokens, one sequence of `seq` after the other.
    pub fn held(model: Model, params: Params, tokens: Vec<u32>, seq: usize) -> Source {
        let depth = model.blocks.len();
        Source { model, params, kind: Kind::Streamed(Tokens::Held(tokens)), seq, depth }
    }

    /// Says that only `layers` are wanted: a teacher alongside stops after the last of them.
    pub fn only(&mut self, layers: impl Iterator<Item = usize>) {
        self.depth = layers.max().map_or(0, |last| last + 1);
    }

    /// Tokens of a sequence.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// How many sequences there are.
    pub fn sequences(&self) -> usize {
        match &self.kind {
            Kind::Streamed(tokens) => tokens.sequences(self.seq),
            Kind::Cached(layers) => layers[0].shape.sequences,
        }
    }

    /// Refuses layers that cached signals are not of.
    pub fn ensure_layer(&self, layer: usize) -> Result<()> {
        match &self.kind {
            Kind::Cached(layers) if layers.iter().all(|s| s.shape.layer != layer) => bail!(
                "input `signals` holds nothing of layer {layer}; connect \
                 `signals.layer[{layer}]` of the same `cache_teacher` too"
            ),
            _ => Ok(()),
        }
    }

    /// Buffers for shards of `batch` sequences.
    pub fn feed(&self, batch: usize) -> Feed {
        let dims = Dims { batch, seq: self.seq };
        let config = &self.model.config;
        let wide = || vec![0.0; dims.tokens() * config.d_model];
        let kind = match &self.kind {
            Kind::Streamed(..) => Buffers::Streamed(Box::new(self.model.pass(dims, Keep::Nothing))),
            Kind::Cached(layers) => {
                let attention = layers[0].attention_len() * batch;
                let lse_bhl = vec![0.0; dims.tokens() * config.heads];
                let attention = vec![0.0; attention];
                Buffers::Cached { u_nd: wide(), next_nd: wide(), attention, lse_bhl }
            }
        };
        Feed { starts_n: vec![0; dims.tokens()], kind }
    }

    /// Shows every layer's input and attention of `sequences`, in order of layers.
    pub fn attention(
        &self,
        feed: &mut Feed,
        sequences: &[usize],
        mut visit: impl FnMut(Seen, Teacher),
    ) {
        let Feed { starts_n, kind } = feed;
        match (&self.kind, kind) {
            (Kind::Streamed(tokens), Buffers::Streamed(pass)) => {
                self.load(tokens, sequences, pass, starts_n);
                self.model.forward_blocks(
                    &self.params.flat,
                    pass,
                    self.depth,
                    |layer, u_nd, saved| {
                        let Some(saved) = saved.mixer.attention() else { return };
                        let (heads, rows) = (saved.heads(), &saved.qkv_nr);
                        let teacher = Teacher::Qk {
                            q: rows,
                            q_stride: heads.row(),
                            k: &rows[heads.query * heads.dim..],
                            k_stride: heads.row(),
                            lse_bhl: &saved.lse_bhl,
                            kv_heads: heads.kv,
                            dim: heads.dim,
                        };
                        visit(Seen { layer, starts_n, u_nd }, teacher);
                    },
                );
            }
            (Kind::Cached(layers), Buffers::Cached { u_nd, attention, lse_bhl, .. }) => {
                for signals in layers {
                    read(signals, sequences, "hidden", u_nd);
                    read_starts(signals, sequences, starts_n);
                    let shape = &signals.shape;
                    let row = (shape.heads + shape.kv_heads) * shape.head_dim;
                    let teacher = match shape.attention {
                        Some(AttentionForm::Matrix) => {
                            read(signals, sequences, "matrix", attention);
                            Teacher::Packed(attention)
                        }
                        _ => {
                            read(signals, sequences, "qk", attention);
                            read(signals, sequences, "lse", lse_bhl);
                            Teacher::Qk {
                                q: attention,
                                q_stride: row,
                                k: &attention[shape.heads * shape.head_dim..],
                                k_stride: row,
                                lse_bhl,
                                kv_heads: shape.kv_heads,
                                dim: shape.head_dim,
                            }
                        }
                    };
                    visit(Seen { layer: shape.layer, starts_n, u_nd }, teacher);
                }
            }
            _ => unreachable!("a feed is used with the source that made it"),
        }
    }

    /// Shows every layer's input and output (un-normed, also of the last layer) of `sequences`.
    pub fn hidden(
        &self,
        feed: &mut Feed,
        sequences: &[usize],
        mut visit: impl FnMut(Seen, &[f32]),
    ) {
        let Feed { starts_n, kind } = feed;
        match (&self.kind, kind) {
            (Kind::Streamed(tokens), Buffers::Streamed(pass)) => {
                self.load(tokens, sequences, pass, starts_n);
                self.model.forward_blocks(&self.params.flat, pass, self.depth, |_, _, _| {});
                for (layer, pair) in pass.hidden.windows(2).enumerate().take(self.depth) {
                    visit(Seen { layer, starts_n, u_nd: &pair[0] }, &pair[1]);
                }
            }
            (Kind::Cached(layers), Buffers::Cached { u_nd, next_nd, .. }) => {
                for signals in layers {
                    read(signals, sequences, "hidden", u_nd);
                    read(signals, sequences, "next", next_nd);
                    read_starts(signals, sequences, starts_n);
                    visit(Seen { layer: signals.shape.layer, starts_n, u_nd }, next_nd);
                }
            }
            _ => unreachable!("a feed is used with the source that made it"),
        }
    }

    /// Whether signals are cached.
    pub fn cached(&self) -> bool {
        matches!(self.kind, Kind::Cached(_))
    }

    /// The tokens of `sequence`, of a teacher alongside.
    pub fn tokens(&self, sequence: usize, out: &mut [u32]) {
        match &self.kind {
            Kind::Streamed(tokens) => tokens.copy_to(sequence, out),
            Kind::Cached(_) => unreachable!("cached signals have no tokens"),
        }
    }

    /// Cached signals of `sequences`, of the wanted layers.
    pub fn signals(
        &self,
        sequences: &[usize],
        want: Want,
        layers: impl Iterator<Item = usize>,
    ) -> Result<Vec<Layer>> {
        let Kind::Cached(all) = &self.kind else {
            unreachable!("a teacher alongside has no signals")
        };
        let of = |number: usize| {
            let found = all.iter().find(|signals| signals.shape.layer == number);
            Layer::read(found.expect("checked when it was opened"), sequences, want)
        };
        layers.map(of).collect()
    }

    fn load(&self, tokens: &Tokens, sequences: &[usize], pass: &mut Pass, starts_n: &mut [u32]) {
        for (i, out) in sequences.iter().zip(pass.tokens_n.chunks_exact_mut(self.seq)) {
            tokens.copy_to(*i, out);
        }
        document_starts(self.model.config.separator, self.seq, &pass.tokens_n, starts_n);
    }
}

/// Whether `signals` are of `model` and hold what is wanted, in a readable form.
fn check(signals: &Signals, model: &Model, want: Want) -> Result<()> {
    let (shape, config) = (&signals.shape, &model.config);
    let layer = shape.layer;
    let same = (shape.d_model, shape.heads, shape.kv_heads, shape.head_dim)
        == (config.d_model, config.heads, config.kv_heads, config.head_dim);
    ensure!(
        same && config.layers.get(layer) == Some(&MixerKind::Attention),
        "the signals of layer {layer} are of another teacher"
    );
    ensure!(shape.sequences > 0, "the signals of layer {layer} hold no sequence");
    ensure!(
        shape.hidden,
        "the signals of layer {layer} lack hidden states; add `hidden` to `keep`"
    );
    let names: &[&str] = match (want, shape.attention) {
        (Want::Hidden, _) => &["hidden", "next"],
        (Want::Attention, Some(AttentionForm::Qk)) => &["hidden", "qk", "lse"],
        (Want::Attention, Some(AttentionForm::Matrix)) => &["hidden", "matrix"],
        (Want::Attention, None) => {
            bail!("the signals of layer {layer} lack attention; add `attention` to `keep`")
        }
    };
    for name in names {
        let len: usize = shape.per_sequence(name).iter().product();
        signals.values(name, 0, &mut vec![0.0; len])?;
    }
    signals.starts(0, &mut vec![0; shape.seq])
}

/// Reads `name` of each of `sequences`; [`check`] made sure that it can be read.
fn read(signals: &Signals, sequences: &[usize], name: &str, out: &mut [f32]) {
    let len: usize = signals.shape.per_sequence(name).iter().product();
    for (sequence, out) in sequences.iter().zip(out.chunks_exact_mut(len)) {
        signals.values(name, *sequence, out).expect("checked when it was opened");
    }
}

fn read_starts(signals: &Signals, sequences: &[usize], starts_n: &mut [u32]) {
    for (sequence, out) in sequences.iter().zip(starts_n.chunks_exact_mut(signals.shape.seq)) {
        signals.starts(*sequence, out).expect("checked when it was opened");
    }
}
