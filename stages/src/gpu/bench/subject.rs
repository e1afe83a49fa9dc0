//! Models to measure with: the published sizes, weights and tokens at random, made fast.

use std::sync::Arc;

use anyhow::Result;
use rayon::prelude::*;

use crate::models::params::Init;
use crate::models::transfer::{Sizes, student_config};
use crate::models::{
    Biases, Block, Builder, Config, Entry, Family, Layout, MixerKind, MlpKind, Model, NormKind,
    Params, Part, Wiring,
};
use crate::train::layer::{Layer, Training};

/// Clip and weight decay of all phases.
pub(super) const TRAINING: Training = Training { decay: 0.1, clip: 1.0 };

/// What is measured.
#[derive(Clone, Debug)]
pub struct Subject {
    /// What it is called.
    pub name: &'static str,
    /// The teacher.
    pub teacher: Config,
    /// Sizes of the student's mixers.
    pub sizes: Sizes,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Sequences of an update when nobody says.
    pub batch: usize,
}

/// Names that [`Subject::named`] knows.
pub const NAMES: [&str; 3] = ["smollm2", "phi", "tiny"];

impl Subject {
    /// One of [`NAMES`].
    pub fn named(name: &str) -> Option<Subject> {
        match name {
            "smollm2" => Some(smollm2()),
            "phi" => Some(phi()),
            "tiny" => Some(tiny()),
            _ => None,
        }
    }

    /// The student, all of whose mixers are Discrete Mamba-2.
    pub fn student(&self) -> Config {
        student_config(&self.teacher, self.sizes, &[])
    }

    /// The teacher with made-up weights.
    pub(super) fn make_teacher(&self) -> Result<(Model, Params)> {
        let model = Model::new(self.teacher.clone())?;
        let params = made_up(&model.layout, |_| true);
        Ok((model, params))
    }

    /// The student likewise.
    pub(super) fn make_student(&self) -> Result<(Model, Params)> {
        let model = Model::new(self.student())?;
        let params = made_up(&model.layout, |_| true);
        Ok((model, params))
    }

    /// The student's layers apart from each other, with made-up mixers that are trained where
    /// `select` says. Norms and MLPs stay zero: on a GPU they are the teacher's.
    pub(super) fn make_layers(&self, select: impl Fn(&Entry) -> bool) -> Vec<Layer> {
        let config = self.student();
        let layer = |number| {
            let mut builder = Builder::default();
            let prefix = format!("{}{number}.", config.names().layers);
            let block = Block::declare(&config, number, &prefix, &mut builder);
            let params = made_up(&builder.finish(), |part| matches!(part, Part::Mixer(_)));
            Layer::new(number, block, params, TRAINING, &select)
        };
        (0..config.layers.len()).map(layer).collect()
    }

    /// `sequences` sequences of tokens, one after the other.
    pub(super) fn make_tokens(&self, sequences: usize) -> Vec<u32> {
        tokens(sequences * self.seq, self.teacher.vocab)
    }
}

/// SmolLM2-135M.
fn smollm2() -> Subject {
    let teacher = Config {
        vocab: 49152,
        d_model: 576,
        layers: vec![MixerKind::Attention; 30],
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        ffn: 1536,
        rope_theta: 100_000.0,
        tied: true,
        ..Config::default()
    };
    let sizes = Sizes { state: 64, taps: 4, chunk: 64 };
    Subject { name: "smollm2", teacher, sizes, seq: 1024, batch: 32 }
}

/// Phi-1.5.
fn phi() -> Subject {
    let teacher = Config {
        vocab: 51200,
        d_model: 2048,
        layers: vec![MixerKind::Attention; 24],
        heads: 32,
        kv_heads: 32,
        head_dim: 64,
        ffn: 8192,
        positions: 2048,
        ..phi_like()
    };
    let sizes = Sizes { state: 64, taps: 4, chunk: 64 };
    Subject { name: "phi", teacher, sizes, seq: 2048, batch: 8 }
}

/// The choices of Phi, without sizes.
fn phi_like() -> Config {
    Config {
        family: Family::Phi,
        wiring: Wiring::Parallel,
        norm: NormKind::Layer,
        mlp: MlpKind::Gelu,
        bias: Biases { qkv: true, out: true, mlp: true, head: true },
        rotary_dim: Some(32),
        ..Config::default()
    }
}

/// Small enough for an emulator.
fn tiny() -> Subject {
    let teacher = Config {
        vocab: 256,
        d_model: 64,
        layers: vec![MixerKind::Attention; 2],
        heads: 2,
        kv_heads: 1,
        head_dim: 32,
        ffn: 96,
        tied: true,
        ..Config::default()
    };
    let sizes = Sizes { state: 16, taps: 4, chunk: 64 };
    Subject { name: "tiny", teacher, sizes, seq: 64, batch: 2 }
}

impl Subject {
    /// The same sizes with the choices of Phi.
    pub fn as_phi(self) -> Subject {
        let Config { vocab, d_model, layers, heads, head_dim, ffn, positions, .. } = self.teacher;
        let like = phi_like();
        let kv_heads = heads;
        let teacher =
            Config { vocab, d_model, layers, heads, kv_heads, head_dim, ffn, positions, ..like };
        Subject { teacher, ..self }
    }
}

/// Values of the spread that fresh weights have, of the parts that `select` picks; zero elsewhere.
/// A normal distribution is replaced by a uniform one of the same deviation.
fn made_up(layout: &Arc<Layout>, select: impl Fn(Part) -> bool) -> Params {
    let mut params = Params::zeros(layout);
    for entry in layout.entries().iter().filter(|entry| select(entry.part)) {
        let out = entry.slot.of_mut(&mut params.flat);
        match entry.init {
            Init::Constant(value) => out.fill(value),
            Init::Normal(std) => uniform(entry.slot.offset, std * 3f32.sqrt(), out),
            Init::Uniform(bound) => uniform(entry.slot.offset, bound, out),
            Init::LastTap => {
                let last = |row: &mut [f32]| row[entry.slot.cols - 1] = 1.0;
                out.chunks_exact_mut(entry.slot.cols).for_each(last);
            }
        }
    }
    params
}

/// Uniform in ±`bound`, by place.
fn uniform(first: usize, bound: f32, out: &mut [f32]) {
    const PIECE: usize = 1 << 14;
    let scale = bound / (1u32 << 31) as f32;
    out.par_chunks_mut(PIECE).enumerate().for_each(|(piece, out)| {
        let first = (first + piece * PIECE) as u64;
        for (i, out) in out.iter_mut().enumerate() {
            *out = (mix(first + i as u64) as u32 as i32) as f32 * scale;
        }
    });
}

/// The finaliser of SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators",
/// OOPSLA 2014): as random as timing needs.
fn mix(at: u64) -> u64 {
    let z = at.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// `count` tokens.
pub(super) fn tokens(count: usize, vocab: usize) -> Vec<u32> {
    let token = |at: usize| (mix(at as u64) % vocab as u64) as u32;
    (0..count).into_par_iter().map(token).collect()
}

/// `len` values uniform in ±`bound`.
pub(super) fn noise(len: usize, bound: f32) -> Vec<f32> {
    let mut values = vec![0.0; len];
    uniform(1 << 40, bound, &mut values);
    values
}
