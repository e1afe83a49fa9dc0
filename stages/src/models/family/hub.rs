//! `config.json` of Hugging Face transformers, versions 4 and 5: Llama, Phi and Qwen2. What would
//! compute something else is refused by name.

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::models::config::{Biases, Config, Family, MixerKind, MlpKind, NormKind, Wiring};
use crate::ops::rope::RopeScaling;

/// The fields that matter; the others are about training or generation.
#[derive(Deserialize)]
struct Fields {
    model_type: String,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    layer_norm_eps: Option<f64>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    qk_layernorm: Option<bool>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    partial_rotary_factor: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Map<String, Value>>,
    rope_parameters: Option<Map<String, Value>>,
    quantization_config: Option<Value>,
}

/// What `model_type` may be here.
pub const KNOWN: &str = "`llama`, `phi` and `qwen2`";

/// The configuration that the text of a `config.json` describes.
pub fn config(text: &str) -> Result<Config> {
    let value: Value = serde_json::from_str(text).context("it is no JSON")?;
    let kind = value.get("model_type").and_then(Value::as_str).unwrap_or("");
    if !matches!(kind, "llama" | "phi" | "qwen2") {
        let name = value.pointer("/architectures/0").and_then(Value::as_str);
        let what = match (kind, name) {
            ("", None) => "it says neither `model_type` nor `architectures`".to_string(),
            ("", Some(name)) => format!("its architecture is `{name}`"),
            (kind, _) => format!("its `model_type` is `{kind}`"),
        };
        bail!("{what}; teachers of {KNOWN} can be read");
    }
    // From the text again, so that a field given twice is an error.
    let fields: Fields = serde_json::from_str(text)?;
    refuse(&fields)?;
    let rope = fields.rope_parameters.clone().unwrap_or_default();
    let number = |name: &str| rope.get(name).and_then(Value::as_f64);
    let head_dim = match fields.head_dim {
        Some(dim) => dim,
        None => fields.hidden_size.checked_div(fields.num_attention_heads).unwrap_or(0),
    };
    let phi = fields.model_type == "phi";
    let partial = number("partial_rotary_factor").or(fields.partial_rotary_factor);
    let partial = partial.unwrap_or(if phi { 0.5 } else { 1.0 });
    ensure!(partial > 0.0 && partial <= 1.0, "`partial_rotary_factor` is {partial}, not in 0..1");
    let rotary = (head_dim as f64 * partial) as usize;
    let config = Config {
        family: match &fields.model_type[..] {
            "phi" => Family::Phi,
            "qwen2" => Family::Qwen2,
            _ => Family::Llama,
        },
        vocab: fields.vocab_size,
        d_model: fields.hidden_size,
        layers: layers(fields.num_hidden_layers)?,
        wiring: if phi { Wiring::Parallel } else { Wiring::Sequential },
        heads: fields.num_attention_heads,
        kv_heads: fields.num_key_value_heads.unwrap_or(fields.num_attention_heads),
        head_dim,
        ffn: fields.intermediate_size,
        norm: if phi { NormKind::Layer } else { NormKind::Rms },
        norm_eps: match phi {
            true => fields.layer_norm_eps.unwrap_or(1e-5),
            false => fields.rms_norm_eps.unwrap_or(1e-6),
        },
        mlp: if phi { MlpKind::Gelu } else { MlpKind::Swiglu },
        bias: biases(&fields),
        rope_theta: number("rope_theta").or(fields.rope_theta).unwrap_or(10_000.0),
        rotary_dim: (rotary != head_dim).then_some(rotary),
        rope_scaling: scaling(&fields)?,
        positions: fields.max_position_embeddings.unwrap_or(2048),
        tied: fields.tie_word_embeddings.unwrap_or(false),
        ..Config::default()
    };
    config.check()?;
    Ok(config)
}

/// One attention layer after the other; bounded, since the number comes from a file.
pub fn layers(count: usize) -> Result<Vec<MixerKind>> {
    ensure!(count <= 4096, "{count} layers are more than any model has");
    Ok(vec![MixerKind::Attention; count])
}

fn biases(fields: &Fields) -> Biases {
    match &fields.model_type[..] {
        "phi" => Biases { qkv: true, out: true, mlp: true, head: true },
        "qwen2" => Biases { qkv: true, ..Biases::default() },
        _ => {
            let attention = fields.attention_bias == Some(true);
            let mlp = fields.mlp_bias == Some(true);
            Biases { qkv: attention, out: attention, mlp, head: false }
        }
    }
}

/// Refuses what is computed otherwise here.
fn refuse(fields: &Fields) -> Result<()> {
    let act = if fields.model_type == "phi" { "gelu_new" } else { "silu" };
    let given = fields.hidden_act.as_deref().unwrap_or(act);
    ensure!(given == act, "its `hidden_act` is `{given}`; only `{act}` is built for this family");
    ensure!(fields.qk_layernorm != Some(true), "`qk_layernorm` is not built");
    let other = fields.layer_types.iter().flatten().find(|kind| *kind != "full_attention");
    if fields.use_sliding_window == Some(true) || other.is_some() {
        bail!("it attends through a sliding window, which is not built");
    }
    ensure!(
        fields.quantization_config.is_none(),
        "its weights are quantised; take the unquantised checkpoint, or a GGUF file"
    );
    Ok(())
}

/// `rope_scaling` (version 4) or `rope_parameters` (version 5).
fn scaling(fields: &Fields) -> Result<Option<RopeScaling>> {
    let Some(rope) = fields.rope_parameters.as_ref().or(fields.rope_scaling.as_ref()) else {
        return Ok(None);
    };
    let kind = ["rope_type", "type"].iter().find_map(|name| rope.get(*name)?.as_str());
    let number = |name: &str| {
        let value = rope.get(name).and_then(Value::as_f64);
        value.with_context(|| format!("the scaling of rotary positions has no number `{name}`"))
    };
    Ok(match kind.unwrap_or("default") {
        "default" => None,
        "linear" => Some(RopeScaling::Linear { factor: number("factor")? }),
        "llama3" => Some(RopeScaling::Llama3 {
            factor: number("factor")?,
            low: number("low_freq_factor")?,
            high: number("high_freq_factor")?,
            original: number("original_max_position_embeddings")?,
        }),
        other => {
            bail!("rotary positions are scaled by `{other}`; only `linear` and `llama3` are built")
        }
    })
}
