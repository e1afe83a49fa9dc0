//! What a model looks like: sizes and the kind of mixer of every layer. Knows no weights.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::ops::rope::{Rope, RopeScaling};

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
    /// Phi: one norm for both, `out = u + mixer(norm(u)) + mlp(norm(u))`.
    Parallel,
}

/// Whose published names a checkpoint bears. What a model computes is said by the other fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Llama, SmolLM2, TinyLlama; students as Llamba.
    #[default]
    Llama,
    /// Phi 1, 1.5 and 2; students as Phi-Mamba.
    Phi,
    /// Qwen 2 and 2.5.
    Qwen2,
}

/// The kind of all norms of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// `x · rsqrt(mean(x²) + eps) · w`.
    #[default]
    Rms,
    /// `(x − mean) · rsqrt(var + eps) · w + b`.
    Layer,
}

/// The kind of all MLPs of a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MlpKind {
    /// `down(silu(gate x) · up x)`.
    #[default]
    Swiglu,
    /// `fc2(gelu(fc1 x))`, GELU by its tanh approximation ("gelu_new").
    Gelu,
}

/// Which linear maps add a bias. Those of a student's mixers never do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Biases {
    /// Projections to q, k and v.
    pub qkv: bool,
    /// The output projection of attention.
    pub out: bool,
    /// Both maps of the MLP.
    pub mlp: bool,
    /// The head.
    pub head: bool,
}

/// Sizes and choices of a model. Written as JSON into every model file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Whose names the file bears.
    pub family: Family,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// The mixer of each block, first to last.
    pub layers: Vec<MixerKind>,
    /// How blocks are wired.
    pub wiring: Wiring,
    /// Query heads; also the heads of an `Ssm` mixer.
    pub heads: usize,
    /// Key and value heads of attention; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head, in attention and in `Ssm` (its P).
    pub head_dim: usize,
    /// Hidden width of the MLP.
    pub ffn: usize,
    /// The kind of norms.
    pub norm: NormKind,
    /// Added to the mean square (or the variance) in norms.
    pub norm_eps: f64,
    /// The kind of MLPs.
    pub mlp: MlpKind,
    /// Which linear maps have a bias.
    pub bias: Biases,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Width of the part of a head that is rotated, from its first dimension; `None`: all of it.
    pub rotary_dim: Option<usize>,
    /// What long contexts do to the rotary frequencies.
    pub rope_scaling: Option<RopeScaling>,
    /// Longest text that the model was trained for, in tokens.
    pub positions: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// A token that begins a document: nothing looks or remembers across it. `None`: the whole
    /// window is one document.
    pub separator: Option<u32>,
    /// State size N of an `Ssm` head.
    pub d_state: usize,
    /// Taps of the causal convolution of an `Ssm` mixer.
    pub d_conv: usize,
    /// Chunk length of the scan; results agree for all, bits do not.
    pub chunk: usize,
}

impl Default for Config {
    /// A Llama without sizes: everything that is 0 has to be given.
    fn default() -> Config {
        Config {
            family: Family::Llama,
            vocab: 0,
            d_model: 0,
            layers: Vec::new(),
            wiring: Wiring::Sequential,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            ffn: 0,
            norm: NormKind::Rms,
            norm_eps: 1e-5,
            mlp: MlpKind::Swiglu,
            bias: Biases::default(),
            rope_theta: 10_000.0,
            rotary_dim: None,
            rope_scaling: None,
            positions: 8192,
            tied: false,
            separator: None,
            d_state: 64,
            d_conv: 4,
            chunk: 64,
        }
    }
}

/// Names of tensors outside mixers and MLPs.
#[derive(Clone, Copy, Debug)]
pub struct Names {
    /// The embedding.
    pub embedding: &'static str,
    /// What precedes the number of a layer.
    pub layers: &'static str,
    /// What precedes `weight` and `bias` of the norm before the head.
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

    /// Whether every mixer is attention (so the file uses the family's published names).
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

    /// Published names: the family's for a transformer, else those of Llamba and Phi-Mamba.
    pub fn names(&self) -> Names {
        let (embedding, layers) = match self.is_transformer() {
            true => ("model.embed_tokens.weight", "model.layers."),
            false => ("backbone.embedding.weight", "backbone.layers."),
        };
        let norm = match (self.is_transformer(), self.family) {
            (true, Family::Phi) => "model.final_layernorm.",
            (true, _) => "model.norm.",
            (false, _) => "backbone.final_layernorm.",
        };
        Names { embedding, layers, norm }
    }

    /// What the output projection of attention is called.
    pub fn out_name(&self) -> &'static str {
        if self.family == Family::Phi { "dense" } else { "o_proj" }
    }

    /// How much of a head is rotated, and by which angles.
    pub fn rope(&self) -> Rope {
        Rope {
            dim: self.head_dim,
            rotary: self.rotary_dim.unwrap_or(self.head_dim),
            theta: self.rope_theta,
            scaling: self.rope_scaling.clone(),
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
        let rotary = self.rotary_dim.unwrap_or(self.head_dim);
        if !rotary.is_multiple_of(2) || rotary > self.head_dim || rotary == 0 {
            bail!(
                "{rotary} of the {} dimensions of a head are rotated; it must be an even number, \
                 at most all of them",
                self.head_dim
            );
        }
        if let Some(scaling) = &self.rope_scaling {
            scaling.check(rotary)?;
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            bail!("`rope_theta` is {}, not a positive number", self.rope_theta);
        }
        if !(self.norm_eps.is_finite() && self.norm_eps >= 0.0) {
            bail!("`norm_eps` is {}, not a small positive number", self.norm_eps);
        }
        if let Some(token) = self.separator.filter(|token| *token as usize >= self.vocab) {
            bail!("`separator` is token {token}, but there are only {} tokens", self.vocab);
        }
        self.check_size()
    }

    /// Refuses sizes whose products do not fit a machine, so that a hostile file is an error.
    fn check_size(&self) -> Result<()> {
        let most = 1usize << 24;
        let widths = [
            ("vocab", self.vocab),
            ("d_model", self.d_model),
            ("ffn", self.ffn),
            ("d_inner", self.heads.saturating_mul(self.head_dim)),
            ("state", self.heads.saturating_mul(self.d_state)),
            ("d_conv", self.d_conv),
            ("layers", self.layers.len() << 10),
        ];
        match widths.iter().find(|(_, value)| *value > most) {
            Some((name, _)) => bail!("`{name}` is larger than any model's"),
            None => Ok(()),
        }
    }
}
