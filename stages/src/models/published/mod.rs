//! Models in published formats: `config.json` of Phi-Mamba, Hybrid-Phi-Mamba, Llamba and of
//! transformers, both ways, and directories that hold such a model. Knows no steps and no caches.
//!
//! Tensor names need no translation: a [`Config`] already names them as published. What a format
//! cannot say of a model (the separator of documents, the attention of a Llamba hybrid, …) stands
//! under one more key, `pipe`, in the words of [`Config`]; the published classes ignore it, and
//! [`Described::notes`] tells what that means. A model that needs no such word has no such key.
//!
//! Sources: goombalab/phi-mamba at b2e405f (`modules/backbone.py`, `phi_block.py`, `lm_head.py`),
//! cartesia-ai/edge at 95d8276 (`cartesia_pytorch/Llamba`), huggingface_hub's `hub_mixin.py`.

mod card;
mod directory;
mod extension;
mod llamba;
mod mixer;
mod ordered;
mod phi_mamba;
mod transformer;
mod weights;

use anyhow::{Context as _, Result, bail, ensure};
use safetensors::Dtype;
use serde_json::Value;

pub use card::{Evaluation, Evaluations, Provenance, StepFact, escape};
pub use directory::{Bundle, MADE_BY, PROVENANCE, Written, write};
pub use extension::KEY;
pub use weights::{Interrupted, Shard, Wanted, dtype_name, open, parse_dtype, parse_size, shards};

use super::config::{Config, Family};

/// The formats that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// goombalab/Phi-Mamba: every mixer is Discrete Mamba-2.
    PhiMamba,
    /// goombalab/Hybrid-Phi-Mamba: some layers keep attention.
    HybridPhiMamba,
    /// cartesia-ai/Llamba.
    Llamba,
    /// Llamba's layout for a model that its class cannot build: layers that keep attention.
    LlambaHybrid,
    /// A transformer, as Hugging Face transformers has it.
    Transformers,
}

impl Format {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Format::PhiMamba => "Phi-Mamba",
            Format::HybridPhiMamba => "Hybrid-Phi-Mamba",
            Format::Llamba => "Llamba",
            Format::LlambaHybrid => "Llamba, extended by layers with attention",
            Format::Transformers => "Hugging Face transformers",
        }
    }

    /// The size of one weights file when none is asked for. The classes of the students read one
    /// `model.safetensors` from a directory and know no index.
    pub fn default_shard_bytes(self) -> u64 {
        if self == Format::Transformers { 5_000_000_000 } else { u64::MAX }
    }
}

/// A model's `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct Described {
    /// Whose format it is.
    pub format: Format,
    /// The text of the file.
    pub text: String,
    /// Where the published classes would do otherwise, in sentences.
    pub notes: Vec<String>,
}

/// The `config.json` of a model whose weights are stored as `dtype`, or why no format says it.
pub fn describe(config: &Config, dtype: Dtype) -> Result<Described> {
    config.check()?;
    match (config.is_transformer(), config.family) {
        (true, _) => transformer::describe(config, dtype),
        (false, Family::Phi) => phi_mamba::describe(config),
        (false, Family::Llama | Family::Qwen2) => llamba::describe(config),
    }
}

/// The configuration that the text of a `config.json` describes, if it is one of a student or one
/// that [`describe`] wrote with words of ours; `None` for all others. What would compute something
/// else is refused by name.
pub fn config(text: &str) -> Result<Option<Config>> {
    let value: Value = serde_json::from_str(text).context("it is no JSON")?;
    let has = |name: &str| value.get(name).is_some();
    let llamba = value.get("model_type").and_then(Value::as_str) == Some("llamba");
    let config = if has("LanguageModel") && has("MixerModel") {
        phi_mamba::read(text).context("it is a configuration of Phi-Mamba")?
    } else if llamba || (has("ssm_cfg") && has("mlp_cfg")) {
        llamba::read(text).context("it is a configuration of Llamba")?
    } else if has(KEY) {
        transformer::read(text)?
    } else {
        return Ok(None);
    };
    Ok(Some(config))
}

/// The words of ours in a file, none when it has no `pipe`.
fn added(value: Option<Value>) -> Result<extension::Fields> {
    match value {
        None | Some(Value::Null) => Ok(extension::Fields::new()),
        Some(Value::Object(fields)) => Ok(fields),
        Some(other) => bail!("`{KEY}` is {other}, not an object"),
    }
}

/// Rows of the embedding: the vocabulary up to a multiple, as the published classes pad it.
fn padded(vocab: usize, multiple: usize) -> Result<usize> {
    ensure!(multiple > 0, "`pad_vocab_size_multiple` is 0");
    vocab.checked_next_multiple_of(multiple).context("`vocab_size` is too large")
}

fn separator_note(token: u32) -> String {
    format!(
        "a document begins at token {token}, and nothing here is remembered across it; elsewhere \
         one document must be given at a time"
    )
}

/// Refuses the names of the MLX port, whose convolution has no middle dimension, with a hint; to be
/// asked when tensors are missing.
pub fn check_names<'a>(mut names: impl Iterator<Item = &'a str>) -> Result<()> {
    let port = |name: &&str| name.ends_with(".conv_weight") || name.ends_with(".conv_bias");
    if let Some(name) = names.find(port) {
        bail!(
            "tensor `{name}` is one of the MLX port of Llamba\nhint: take the PyTorch checkpoint, \
             which has `conv1d.weight` of channels × 1 × taps"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests;
