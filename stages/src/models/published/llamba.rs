//! `config.json` of cartesia-ai/Llamba, for students of the Llama and Qwen2 families.
//!
//! There is no published layout for layers that keep attention, nor for Qwen2: such a model has
//! Llamba's, and under `pipe` which layers attend (`layers`), the sizes of their attention and the
//! family. The published class has 1e-5 in the norms of its blocks, whatever `norm_epsilon` says.

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::extension::{self, Fields};
use super::mixer::Core;
use super::{Described, Format};
use crate::models::config::{Biases, Config, Family, MixerKind, MlpKind, NormKind, Wiring};
use crate::models::family::hub::layers as checked_layers;

/// Fields of a configuration that the format leaves open.
const OPEN: &[&str] = &[
    "family",
    "layers",
    "kv_heads",
    "head_dim",
    "norm_eps",
    "bias",
    "rope_theta",
    "rotary_dim",
    "rope_scaling",
    "positions",
    "separator",
];

/// The file, with the defaults of the published class.
#[derive(Serialize, Deserialize)]
struct File {
    #[serde(default)]
    model_type: String,
    vocab_size: usize,
    #[serde(default)]
    tie_embeddings: bool,
    #[serde(default = "eight")]
    pad_vocab_size_multiple: usize,
    #[serde(default)]
    lm_head_bias: bool,
    d_model: usize,
    #[serde(skip_serializing)]
    lm_head_prenorm: Option<String>,
    #[serde(default = "thirty_two")]
    n_layer: usize,
    #[serde(default)]
    resid_dropout: f64,
    #[serde(default = "epsilon")]
    norm_epsilon: f64,
    #[serde(default)]
    mlp_cfg: Mlp,
    #[serde(default)]
    ssm_cfg: Core,
    #[serde(skip_serializing_if = "Option::is_none")]
    pipe: Option<Value>,
}

fn eight() -> usize {
    8
}

fn thirty_two() -> usize {
    32
}

fn epsilon() -> f64 {
    1e-5
}

#[derive(Serialize, Deserialize)]
struct Mlp {
    intermediate_size: usize,
    bias: bool,
    act_fn: String,
}

impl Default for Mlp {
    fn default() -> Mlp {
        Mlp { intermediate_size: 14336, bias: false, act_fn: "silu".into() }
    }
}

/// The file of a student.
pub fn describe(config: &Config) -> Result<Described> {
    let multiple = if config.vocab.is_multiple_of(8) { 8 } else { 1 };
    let mut file = File {
        model_type: "llamba".into(),
        vocab_size: config.vocab,
        tie_embeddings: config.tied,
        pad_vocab_size_multiple: multiple,
        lm_head_bias: config.bias.head && !config.tied,
        d_model: config.d_model,
        lm_head_prenorm: None,
        n_layer: config.layers.len(),
        resid_dropout: 0.0,
        norm_epsilon: config.norm_eps,
        mlp_cfg: Mlp {
            intermediate_size: config.ffn,
            bias: config.bias.mlp,
            act_fn: "silu".into(),
        },
        ssm_cfg: Core::of(config, false),
        pipe: None,
    };
    let open = |name: &str| name == "norm_eps" || name == "head_dim";
    let added = extension::difference(&base(&file, &open)?, config, OPEN)?;
    let hybrid = config.layers.contains(&MixerKind::Attention);
    let notes = notes(config, &added, hybrid);
    if !added.is_empty() {
        file.pipe = Some(Value::Object(added));
    }
    let text = serde_json::to_string_pretty(&file)? + "\n";
    let format = if hybrid { Format::LlambaHybrid } else { Format::Llamba };
    Ok(Described { format, text, notes })
}

fn notes(config: &Config, added: &Fields, hybrid: bool) -> Vec<String> {
    let mut notes = Vec::new();
    let mut cannot =
        |what: String| notes.push(format!("the published class cannot load it: {what}"));
    if hybrid {
        cannot("it has no layers with attention (`layers` under `pipe` lists them)".into());
    }
    if config.tied && config.bias.head {
        cannot("a head that is the embedding has no bias there".into());
    }
    if added.contains_key("head_dim") {
        cannot(format!("its heads together are a multiple of {} wide", config.d_model));
    }
    if config.norm_eps != 1e-5 {
        let eps = config.norm_eps;
        notes.push(format!("the published class adds 1e-5 in the norms of blocks, not {eps}"));
    }
    if let Some(token) = config.separator {
        notes.push(super::separator_note(token));
    }
    notes
}

/// The configuration that a file describes.
pub fn read(text: &str) -> Result<Config> {
    let mut file: File = serde_json::from_str(text)?;
    let added = super::added(file.pipe.take())?;
    let config = extension::extend(&base(&file, &|name| added.contains_key(name))?, &added, OPEN)?;
    ensure!(
        config.layers.len() == file.n_layer,
        "`pipe` lists {} layers, but `n_layer` is {}",
        config.layers.len(),
        file.n_layer
    );
    Ok(config)
}

/// The configuration without words of ours; `said` tells which there are.
fn base(file: &File, said: &dyn Fn(&str) -> bool) -> Result<Config> {
    let prenorm = file.lm_head_prenorm.as_deref().unwrap_or("rms");
    ensure!(prenorm == "rms", "`lm_head_prenorm` is `{prenorm}`, not `rms`");
    let act = &file.mlp_cfg.act_fn;
    ensure!(act == "silu", "`act_fn` of the MLP is `{act}`; only `silu` is built");
    ensure!(
        file.norm_epsilon == 1e-5 || said("norm_eps"),
        "`norm_epsilon` is {}, but the blocks of Llamba have 1e-5; one for all norms is built",
        file.norm_epsilon
    );
    checked_layers(file.n_layer)?;
    let head = file.lm_head_bias && !file.tie_embeddings;
    let mut config = Config {
        family: Family::Llama,
        vocab: super::padded(file.vocab_size, file.pad_vocab_size_multiple)?,
        d_model: file.d_model,
        layers: vec![MixerKind::Ssm; file.n_layer],
        wiring: Wiring::Sequential,
        ffn: file.mlp_cfg.intermediate_size,
        norm: NormKind::Rms,
        norm_eps: 1e-5,
        mlp: MlpKind::Swiglu,
        bias: Biases { mlp: file.mlp_cfg.bias, head, ..Biases::default() },
        tied: file.tie_embeddings,
        ..Config::default()
    };
    file.ssm_cfg.apply(&mut config, said("head_dim")).context("`ssm_cfg`")?;
    Ok(config)
}
