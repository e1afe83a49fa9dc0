//! `config.json` of a transformer, as transformers 5 writes it (`rope_parameters`, `dtype`) with
//! the names of version 4 beside (`rope_theta`, `rope_scaling`, `torch_dtype`), so that both read
//! the same. What they could not know must be harmless to them, or nothing is written.

use anyhow::{Context as _, Result, bail};
use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::extension::{self, KEY};
use super::{Described, Format, dtype_name};
use crate::models::config::{Config, Family};
use crate::models::family::hub;
use crate::ops::rope::RopeScaling;

/// Fields of a configuration that mean nothing to a transformer elsewhere.
const OPEN: &[&str] = &["separator", "d_state", "d_conv", "chunk"];

/// The file of a transformer.
pub fn describe(config: &Config, dtype: Dtype) -> Result<Described> {
    // The same said in two ways.
    let rotary_dim = config.rotary_dim.filter(|rotary| *rotary != config.head_dim);
    let config = &Config { rotary_dim, ..config.clone() };
    let mut file = fields(config, dtype)?;
    let base = hub::config(&Value::Object(file.clone()).to_string())?;
    let added = extension::difference(&base, config, OPEN)?;
    if !added.is_empty() {
        file.insert(KEY.into(), Value::Object(added));
    }
    let text = serde_json::to_string_pretty(&file)? + "\n";
    let notes = config.separator.map(super::separator_note).into_iter().collect();
    Ok(Described { format: Format::Transformers, text, notes })
}

fn fields(config: &Config, dtype: Dtype) -> Result<Map<String, Value>> {
    let (kind, class) = match config.family {
        Family::Llama => ("llama", "LlamaForCausalLM"),
        Family::Phi => ("phi", "PhiForCausalLM"),
        Family::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
    };
    let (dtype, separator) = (dtype_name(dtype)?, config.separator);
    let mut file = json!({
        "architectures": [class],
        "attention_dropout": 0.0,
        "bos_token_id": separator,
        "dtype": dtype,
        "eos_token_id": separator,
        "head_dim": config.head_dim,
        "hidden_size": config.d_model,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.positions,
        "model_type": kind,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers.len(),
        "num_key_value_heads": config.kv_heads,
        "pad_token_id": null,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "torch_dtype": dtype,
        "use_cache": true,
        "vocab_size": config.vocab,
    });
    let own = match config.family {
        Family::Llama => json!({
            "attention_bias": config.bias.qkv,
            "mlp_bias": config.bias.mlp,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
        }),
        Family::Phi => json!({
            "embd_pdrop": 0.0,
            "hidden_act": "gelu_new",
            "layer_norm_eps": config.norm_eps,
            "partial_rotary_factor": partial(config),
            "qk_layernorm": false,
            "resid_pdrop": 0.0,
        }),
        Family::Qwen2 => json!({
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "use_sliding_window": false,
        }),
    };
    let mut rope = scaling(config)?;
    file["rope_scaling"] = match rope.is_empty() {
        true => Value::Null,
        false => Value::Object(rope.clone()),
    };
    rope.entry("rope_type").or_insert("default".into());
    rope.insert("rope_theta".into(), config.rope_theta.into());
    if config.family == Family::Phi {
        rope.insert("partial_rotary_factor".into(), partial(config).into());
    }
    file["rope_parameters"] = Value::Object(rope);
    match (file, own) {
        (Value::Object(mut file), Value::Object(own)) => {
            file.extend(own);
            Ok(file)
        }
        _ => unreachable!("both are objects"),
    }
}

fn partial(config: &Config) -> f64 {
    config.rotary_dim.unwrap_or(config.head_dim) as f64 / config.head_dim as f64
}

/// The scaling of rotary positions; empty without one.
fn scaling(config: &Config) -> Result<Map<String, Value>> {
    let fields = match &config.rope_scaling {
        None => return Ok(Map::new()),
        Some(RopeScaling::Linear { factor }) => json!({"rope_type": "linear", "factor": factor}),
        Some(RopeScaling::Llama3 { factor, low, high, original }) => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": *original as u64,
        }),
        Some(RopeScaling::Factors { .. }) => bail!(
            "its rotary positions are scaled by a factor for each frequency, as a GGUF file has \
             them; transformers has no such model\nhint: take the teacher from its safetensors"
        ),
    };
    match fields {
        Value::Object(fields) => Ok(fields),
        _ => unreachable!("it is an object"),
    }
}

/// The configuration of a file with words of ours.
pub fn read(text: &str) -> Result<Config> {
    let base = hub::config(text)?;
    let file: Value = serde_json::from_str(text).context("it is no JSON")?;
    let added = super::added(file.get(KEY).cloned())?;
    extension::extend(&base, &added, OPEN)
}
