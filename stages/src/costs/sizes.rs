//! Parameters, operations and buffers of models, counted from their configuration.
//!
//! Operations are of one token; a multiplication with an addition is two. Products with matrices are
//! exact, elementwise work is left out (below 1 % at every size that matters).

use std::sync::Arc;

use crate::models::{Block, Builder, Config, Layout, MixerKind, Model, Part};
use crate::train::device::Device;

/// Bytes of a number in the host's memory.
pub const F32: u64 = 4;

/// Bytes of memory that a program takes for itself, about.
pub const PROGRAM: u64 = 16 << 20;

/// What a model consists of.
pub struct Sizes {
    /// Its configuration.
    pub config: Config,
    /// Its parameters.
    pub layout: Arc<Layout>,
}

impl Sizes {
    /// Of a model that can be; `None` otherwise.
    pub fn of(config: &Config) -> Option<Sizes> {
        let model = Model::new(config.clone()).ok()?;
        Some(Sizes { layout: model.layout.clone(), config: model.config })
    }

    /// Parameters.
    pub fn parameters(&self) -> u64 {
        self.layout.len() as u64
    }

    /// Elements of matrices that tokens are multiplied with, of the parts that `select` picks.
    pub fn matrices(&self, select: impl Fn(Part) -> bool) -> f64 {
        matrices(&self.layout, select)
    }

    /// Parameters of the mixers that replaced attention.
    pub fn mixers(&self) -> u64 {
        let ours = |part| matches!(part, Part::Mixer(l) if self.config.layers[l] == MixerKind::Ssm);
        let entries = self.layout.entries().iter().filter(|entry| ours(entry.part));
        entries.map(|entry| entry.slot.len() as u64).sum()
    }

    /// Operations of one token of a sequence of `seq` through the first `depth` blocks.
    pub fn blocks(&self, depth: usize, seq: usize) -> f64 {
        let within = |part: Part| matches!(part, Part::Mixer(l) | Part::Mlp(l) if l < depth);
        let mixing = self.config.layers.iter().take(depth);
        let mixing: f64 = mixing.map(|kind| mixing_of(&self.config, *kind, seq)).sum();
        2.0 * self.matrices(within) + mixing
    }

    /// Operations of the head for one token.
    pub fn head(&self) -> f64 {
        2.0 * self.config.vocab as f64 * self.config.d_model as f64
    }

    /// Operations of one token of a sequence of `seq` through the whole model.
    pub fn forward(&self, seq: usize) -> f64 {
        self.blocks(self.config.layers.len(), seq) + self.head()
    }

    /// Numbers that a pass on the host keeps of each token; `back` if gradients are wanted.
    pub fn pass(&self, seq: usize, back: bool) -> u64 {
        let config = &self.config;
        let layers = &config.layers;
        let hidden = (layers.len() as u64 + 1) * config.d_model as u64;
        let first = |(at, kind): &(usize, &MixerKind)| {
            back || layers.iter().position(|k| k == *kind) == Some(*at)
        };
        let saved = layers.iter().enumerate().filter(first);
        hidden + saved.map(|(_, kind)| saved_of(config, *kind, seq, back)).sum::<u64>()
    }
}

/// Elements of matrices in `layout`, of the parts that `select` picks.
pub fn matrices(layout: &Layout, select: impl Fn(Part) -> bool) -> f64 {
    let entries = layout.entries().iter().filter(|entry| entry.decay && select(entry.part));
    entries.map(|entry| entry.slot.len() as f64).sum()
}

/// A block of a student and its parameters.
pub fn block(config: &Config, number: usize) -> Option<(Block, Arc<Layout>)> {
    config.check().ok()?;
    if number >= config.layers.len() {
        return None;
    }
    let mut builder = Builder::default();
    let prefix = format!("{}{number}.", config.names().layers);
    let block = Block::declare(config, number, &prefix, &mut builder);
    Some((block, builder.finish()))
}

/// Operations with which a mixer mixes one token with those before it: half the matrix, since it is
/// causal; of the scan, chunks and what goes from one to the next.
pub fn mixing_of(config: &Config, kind: MixerKind, seq: usize) -> f64 {
    let (heads, dim) = (config.heads as f64, config.head_dim as f64);
    match kind {
        MixerKind::Attention => 2.0 * seq as f64 * heads * dim,
        MixerKind::Ssm => {
            let (state, chunk) = (config.d_state as f64, config.chunk.min(seq) as f64);
            heads * (chunk * (state + dim) + 4.0 * state * dim)
        }
    }
}

/// Numbers that a block keeps of each token.
fn saved_of(config: &Config, kind: MixerKind, seq: usize, back: bool) -> u64 {
    let (d, inner, heads) = (config.d_model as u64, config.d_inner() as u64, config.heads as u64);
    let mlp = 3 * config.ffn as u64 + 3 * d;
    mlp + match kind {
        MixerKind::Attention => {
            let whole = if back { heads * seq as u64 } else { 0 };
            2 * inner + 2 * config.d_kv() as u64 + heads + whole
        }
        MixerKind::Ssm => {
            let projected = 2 * inner + 2 * heads * config.d_state as u64 + heads;
            2 * projected + heads * config.chunk.min(seq) as u64
        }
    }
}

/// Tokens that a device works on at a time, and bytes of the activations of one, for a model that
/// trains; `None` where no device can be used.
pub fn on_device(
    config: &Config,
    device: Device,
    (tokens, batch, seq): (usize, usize, usize),
) -> Option<u64> {
    if device != Device::Cuda {
        return None;
    }
    Some((at_a_time(config, tokens, batch, seq)? * seq) as u64)
}

/// Sequences that a device works on at a time.
#[cfg(any(feature = "cuda", feature = "emulate"))]
fn at_a_time(config: &Config, tokens: usize, batch: usize, seq: usize) -> Option<usize> {
    crate::gpu::phases::micro_batch(config, tokens, batch, seq).ok()
}

#[cfg(not(any(feature = "cuda", feature = "emulate")))]
fn at_a_time(_: &Config, _: usize, _: usize, _: usize) -> Option<usize> {
    None
}
