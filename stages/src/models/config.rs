//! What a model looks like: sizes and the kind of mixer of every layer. Knows no weights.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

/// The sequence mixer of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MixerKind {
    /// Causal softmax attention with rotary positions.
    Attention,
    /// Discrete Mamba-2.
    Ssm,
}

/// How the parts of a block are wired.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wiring {
    /// Llama: `m = u + mixer(norm(u))`, `out = m + mlp(norm(m))`.
    #[default]
    Sequential,
}

/// Sizes and choices of a model. Written as JSON into every model file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// The mixer of each block, first to last.
    pub layers: Vec<MixerKind>,
    /// How blocks are wired.
    #[serde(default)]
    pub wiring: Wiring,
    /// Query heads; also the heads of an `Ssm` mixer.
    pub heads: usize,
    /// Key and value heads of attention; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, in attention and in `Ssm` (its P).
    pub head_dim: usize,
    /// Hidden width of the MLP.
    pub ffn: usize,
    /// Added to the mean square in RMSNorm.
    pub norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// A token that begins a document: nothing looks or remembers across it. `None`: the whole
    /// window is one document.
    #[serde(default)]
    pub separator: Option<u32>,
    /// State size N of an `Ssm` head.
    #[serde(default = "default_state")]
    pub d_state: usize,
    /// Taps of the causal convolution of an `Ssm` mixer.
    #[serde(default = "default_conv")]
    pub d_conv: usize,
    /// Chunk length of the scan; results agree for all, bits do not.
    #[serde(default = "default_chunk")]
    pub chunk: usize,
}

fn default_state() -> usize {
    64
}

fn default_conv() -> usize {
    4
}

fn default_chunk() -> usize {
    64
}

/// Names of tensors outside mixers and MLPs.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// The embedding.
    pub embedding: &'static str,
    /// What precedes the number of a layer.
    pub layers: &'static str,
    /// The norm before the head.
    pub norm: &'static str,
}

impl Config {
    /// Width of all heads together, `heads · head_dim`: never assumed to be `d_model`.
    pub fn d_inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn d_kv(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Whether every mixer is attention (so the file uses the published Llama names).
    pub fn is_transformer(&self) -> bool {
        self.layers.iter().all(|kind| *kind == MixerKind::Attention)
    }

    /// Standard deviation with which matrices start, `1/√d_model` (0.125 at the default width).
    pub fn init_std(&self) -> f32 {
        (1.0 / (self.d_model as f64).sqrt()) as f32
    }

    /// The same for matrices that write into the residual stream, divided by `√(2 · layers)` so
    /// that its size does not grow with depth (GPT-2).
    pub fn init_std_out(&self) -> f32 {
        (f64::from(self.init_std()) / (2.0 * self.layers.len() as f64).sqrt()) as f32
    }

    /// Published names: Llama's for a transformer, else those of Llamba and Phi-Mamba.
    pub fn names(&self) -> Names {
        match self.is_transformer() {
            true => Names {
                embedding: "model.embed_tokens.weight",
                layers: "model.layers.",
                norm: "model.norm.weight",
            },
            false => Names {
                embedding: "backbone.embedding.weight",
                layers: "backbone.layers.",
                norm: "backbone.final_layernorm.weight",
            },
        }
    }

    /// What precedes the names of the mixer of `layer`.
    pub fn mixer_prefix(&self, layer: usize) -> String {
        let layers = self.names().layers;
        match (self.is_transformer(), self.layers[layer]) {
            (true, _) => format!("{layers}{layer}.self_attn."),
            (false, MixerKind::Attention) => format!("{layers}{layer}.mixer.self_attn."),
            (false, MixerKind::Ssm) => format!("{layers}{layer}.mixer."),
        }
    }

    /// Refuses sizes that no model can have.
    pub fn check(&self) -> Result<()> {
        let sizes = [
            ("vocab", self.vocab),
            ("d_model", self.d_model),
            ("layers", self.layers.len()),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("ffn", self.ffn),
            ("d_state", self.d_state),
            ("d_conv", self.d_conv),
            ("chunk", self.chunk),
        ];
        for (name, value) in sizes {
            if value == 0 {
                bail!("`{name}` must be at least 1");
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            bail!("`heads` ({}) must be a multiple of `kv_heads` ({})", self.heads, self.kv_heads);
        }
        if !self.head_dim.is_multiple_of(2) {
            bail!(
                "`head_dim` ({}) must be even, since rotary positions pair its halves",
                self.head_dim
            );
        }
        Ok(())
    }
}
