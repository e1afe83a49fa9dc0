//! `config.json` of goombalab/Phi-Mamba and goombalab/Hybrid-Phi-Mamba: sections `LanguageModel`,
//! `MixerModel` and one `Block…` for every run of equal layers, in the order of the layers.
//!
//! The published class pads the vocabulary, builds an MLP of 4 · d_model, LayerNorms with ε 1e-5
//! and a head with a bias that is never the embedding. Its attention takes no sizes at all: 32
//! heads of 64, half of each rotated with base 10000.

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::extension::{self, Fields, KEY};
use super::mixer::Core;
use super::ordered::Ordered;
use super::{Described, Format};
use crate::models::config::{Biases, Config, Family, MixerKind, MlpKind, NormKind, Wiring};
use crate::models::family::hub::layers as checked_layers;

/// Fields of a configuration that the format leaves open.
const OPEN: &[&str] = &[
    "kv_heads",
    "head_dim",
    "ffn",
    "norm_eps",
    "bias",
    "rope_theta",
    "rotary_dim",
    "rope_scaling",
    "positions",
    "tied",
    "separator",
];

#[derive(Serialize, Deserialize)]
struct Section<T> {
    input: T,
}

#[derive(Serialize, Deserialize)]
struct LanguageModel {
    vocab_size: usize,
    pad_vocab_size_multiple: usize,
    #[serde(skip_serializing)]
    tie_embeddings: Option<bool>,
    #[serde(skip_serializing)]
    lm_head_bias: Option<bool>,
}

#[derive(Serialize, Deserialize)]
struct MixerModel {
    d_model: usize,
    n_layer: usize,
    lm_head_prenorm: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Block {
    #[serde(rename = "n_layers")]
    n_layers: usize,
    block_type: String,
    #[serde(rename = "block_input")]
    block_input: Value,
    core_type: String,
    #[serde(rename = "core_input")]
    core_input: Value,
}

/// The file of a student of the Phi family.
pub fn describe(config: &Config) -> Result<Described> {
    let multiple = if config.vocab.is_multiple_of(8) { 8 } else { 1 };
    let language = LanguageModel {
        vocab_size: config.vocab,
        pad_vocab_size_multiple: multiple,
        tie_embeddings: None,
        lm_head_bias: None,
    };
    let mixer = MixerModel {
        d_model: config.d_model,
        n_layer: config.layers.len(),
        lm_head_prenorm: "layer".into(),
    };
    let mut file = Sections::default();
    file.push("LanguageModel", &Section { input: language })?;
    file.push("MixerModel", &Section { input: mixer })?;
    for (i, run) in config.layers.chunk_by(|a, b| a == b).enumerate() {
        let (core, input) = match run[0] {
            MixerKind::Ssm => ("discrete_mamba2", serde_json::to_value(Core::of(config, true))?),
            MixerKind::Attention => ("phi_attention", json!({})),
        };
        let block = Block {
            n_layers: run.len(),
            block_type: "modules.phi_block".into(),
            block_input: json!({"resid_dropout": 0.0}),
            core_type: format!("modules.mixers.{core}"),
            core_input: input,
        };
        file.push(&format!("Block{}", i + 1), &block)?;
    }
    let base = base(&file.text()?, &Fields::new(), true)?;
    let added = extension::difference(&base, config, OPEN)?;
    if !added.is_empty() {
        file.push(KEY, &added)?;
    }
    let hybrid = config.layers.contains(&MixerKind::Attention);
    let format = if hybrid { Format::HybridPhiMamba } else { Format::PhiMamba };
    Ok(Described { format, text: file.text()?, notes: notes(config, &added, hybrid) })
}

/// Sections as text, so that fields keep their order too.
#[derive(Default)]
struct Sections(Vec<(String, String)>);

impl Sections {
    fn push(&mut self, name: &str, section: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(section)?;
        self.0.push((name.into(), text.replace('\n', "\n  ")));
        Ok(())
    }

    fn text(&self) -> Result<String> {
        let line = |(name, text): &(String, String)| format!("  {}: {text}", json!(name));
        let lines: Vec<String> = self.0.iter().map(line).collect();
        Ok(format!("{{\n{}\n}}\n", lines.join(",\n")))
    }
}

fn notes(config: &Config, added: &Fields, hybrid: bool) -> Vec<String> {
    let mut notes = Vec::new();
    let mut cannot =
        |what: String| notes.push(format!("the published class cannot load it: {what}"));
    if config.ffn != 4 * config.d_model {
        cannot(format!("it builds an MLP of 4 · {}, not of {}", config.d_model, config.ffn));
    }
    if config.tied {
        cannot("its head is never the embedding".into());
    }
    if !config.tied && !config.bias.head || !config.bias.mlp {
        cannot("its head and its MLP have biases".into());
    }
    if added.contains_key("head_dim") {
        cannot(format!("its heads together are a multiple of {} wide", config.d_model));
    }
    if hybrid && (config.d_model, config.heads, config.kv_heads) != (2048, 32, 32) {
        cannot("its attention always has 32 heads of 64".into());
    }
    if config.norm_eps != 1e-5 {
        notes.push(format!("the published class adds 1e-5 in norms, not {}", config.norm_eps));
    }
    let rope = ["rope_theta", "rope_scaling", "rotary_dim"];
    if hybrid && rope.iter().any(|name| added.contains_key(*name)) {
        notes.push("the published class rotates half of a head with base 10000, unscaled".into());
    }
    if let Some(token) = config.separator {
        notes.push(super::separator_note(token));
    }
    notes
}

/// The configuration that a file describes.
pub fn read(text: &str) -> Result<Config> {
    let mut sections: Ordered = serde_json::from_str(text)?;
    let added = super::added(sections.take(KEY))?;
    extension::extend(&base(text, &added, false)?, &added, OPEN)
}

/// The configuration without words of ours, which `added` names. `any_width` lets heads of any
/// width pass.
fn base(text: &str, added: &Fields, any_width: bool) -> Result<Config> {
    let mut sections: Ordered = serde_json::from_str(text)?;
    let language: Section<LanguageModel> = section(&mut sections, "LanguageModel")?;
    let model: Section<MixerModel> = section(&mut sections, "MixerModel")?;
    let (language, model) = (language.input, model.input);
    ensure!(
        model.lm_head_prenorm == "layer",
        "`lm_head_prenorm` is `{}`, not `layer`",
        model.lm_head_prenorm
    );
    let our_words = added.contains_key("tied") || added.contains_key("bias");
    if !our_words && (language.tie_embeddings == Some(true) || language.lm_head_bias == Some(false))
    {
        bail!("its head is tied or has no bias, which the published class never builds");
    }
    let d_model = model.d_model;
    let mut config = Config {
        family: Family::Phi,
        vocab: super::padded(language.vocab_size, language.pad_vocab_size_multiple)?,
        d_model,
        wiring: Wiring::Parallel,
        ffn: d_model.checked_mul(4).context("`d_model` is too large")?,
        norm: NormKind::Layer,
        norm_eps: 1e-5,
        mlp: MlpKind::Gelu,
        bias: Biases { qkv: true, out: true, mlp: true, head: true },
        rope_theta: 10_000.0,
        positions: 2048,
        ..Config::default()
    };
    let core = blocks(sections, model.n_layer, &mut config.layers)?;
    core.apply(&mut config, any_width || added.contains_key("head_dim"))?;
    config.rotary_dim = Some(config.head_dim / 2);
    Ok(config)
}

fn section<T: for<'a> Deserialize<'a>>(sections: &mut Ordered, name: &str) -> Result<T> {
    let value = sections.take(name).with_context(|| format!("it has no section `{name}`"))?;
    serde_json::from_value(value).with_context(|| format!("section `{name}` cannot be read"))
}

/// Appends the kinds of all layers; gives what all Discrete Mamba-2 mixers are built with.
fn blocks(sections: Ordered, count: usize, layers: &mut Vec<MixerKind>) -> Result<Core> {
    checked_layers(count)?;
    let mut core: Option<(String, Core)> = None;
    for (name, value) in sections.0.into_iter().filter(|(name, _)| name.starts_with("Block")) {
        let wrong = || format!("section `{name}` cannot be read");
        let block: Block = serde_json::from_value(value).with_context(wrong)?;
        let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_string();
        ensure!(
            last(&block.block_type) == "phi_block",
            "`BlockType` of `{name}` is `{}`; only `phi_block` is built",
            block.block_type
        );
        let kind = match &last(&block.core_type)[..] {
            "discrete_mamba2" => MixerKind::Ssm,
            "phi_attention" => MixerKind::Attention,
            _ => bail!(
                "`CoreType` of `{name}` is `{}`; only `discrete_mamba2` and `phi_attention` are built",
                block.core_type
            ),
        };
        if kind == MixerKind::Ssm {
            let this: Core = serde_json::from_value(block.core_input).with_context(wrong)?;
            match &core {
                Some((first, core)) if *core != this => {
                    bail!("`{first}` and `{name}` have mixers of other sizes, which is not built")
                }
                Some(_) => {}
                None => core = Some((name.clone(), this)),
            }
        }
        ensure!(
            block.n_layers <= count - layers.len(),
            "its blocks have more than the {count} layers of `n_layer`"
        );
        layers.resize(layers.len() + block.n_layers, kind);
    }
    ensure!(
        layers.len() == count,
        "its blocks have {} layers, but `n_layer` is {count}",
        layers.len()
    );
    Ok(core.context("no layer of it is Discrete Mamba-2")?.1)
}
