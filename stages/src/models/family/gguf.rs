//! What a GGUF file says of its model, and llama.cpp's names for our tensors: architectures
//! `llama`, `qwen2` and `phi2`.

use anyhow::{Result, bail, ensure};

use super::Origin;
use super::hub::layers;
use crate::models::config::{Biases, Config, Family, MlpKind, NormKind, Wiring};
use crate::ops::rope::RopeScaling;

/// The metadata and the tensors of a file, as far as a configuration needs them.
pub trait Facts {
    /// An unsigned number.
    fn number(&self, key: &str) -> Option<u64>;
    /// A number with a fraction.
    fn float(&self, key: &str) -> Option<f64>;
    /// A text.
    fn text(&self, key: &str) -> Option<&str>;
    /// The shape of a tensor, outermost first.
    fn shape(&self, tensor: &str) -> Option<&[usize]>;
    /// The values of a tensor.
    fn values(&self, tensor: &str) -> Result<Vec<f32>>;
}

/// The configuration of a file.
pub fn config(facts: &dyn Facts) -> Result<Config> {
    let Some(arch) = facts.text("general.architecture") else {
        bail!("it has no `general.architecture`")
    };
    let family = match arch {
        "llama" => Family::Llama,
        "qwen2" => Family::Qwen2,
        "phi2" => Family::Phi,
        other => bail!("its architecture is `{other}`; `llama`, `qwen2` and `phi2` can be read"),
    };
    let size = |name: &str| -> Result<usize> {
        let key = format!("{arch}.{name}");
        match facts.number(&key).and_then(|n| usize::try_from(n).ok()) {
            Some(n) => Ok(n),
            None => bail!("it has no number `{key}`"),
        }
    };
    let float = |name: &str| facts.float(&format!("{arch}.{name}"));
    let phi = family == Family::Phi;
    let (d_model, heads) = (size("embedding_length")?, size("attention.head_count")?);
    let head_dim = match size("attention.key_length") {
        Ok(dim) => dim,
        Err(_) => d_model.checked_div(heads).unwrap_or(0),
    };
    let experts = size("expert_count").unwrap_or(0);
    ensure!(experts == 0, "it is a mixture of {experts} experts, which is not built");
    let Some([vocab, _]) = facts.shape("token_embd.weight") else {
        bail!("it has no matrix `token_embd.weight`")
    };
    let eps = if phi { "layer_norm_epsilon" } else { "layer_norm_rms_epsilon" };
    let rotary = size("rope.dimension_count").unwrap_or(head_dim);
    let has = |tensor: &str| facts.shape(tensor).is_some();
    let config = Config {
        family,
        vocab: *vocab,
        d_model,
        layers: layers(size("block_count")?)?,
        wiring: if phi { Wiring::Parallel } else { Wiring::Sequential },
        heads,
        kv_heads: size("attention.head_count_kv").unwrap_or(heads),
        head_dim,
        ffn: size("feed_forward_length")?,
        norm: if phi { NormKind::Layer } else { NormKind::Rms },
        norm_eps: float(&format!("attention.{eps}")).unwrap_or(1e-5),
        mlp: if phi { MlpKind::Gelu } else { MlpKind::Swiglu },
        bias: Biases {
            qkv: has("blk.0.attn_q.bias") || has("blk.0.attn_qkv.bias"),
            out: has("blk.0.attn_output.bias"),
            mlp: has("blk.0.ffn_down.bias"),
            head: has("output.bias"),
        },
        rope_theta: float("rope.freq_base").unwrap_or(10_000.0),
        rotary_dim: (rotary != head_dim).then_some(rotary),
        rope_scaling: scaling(facts, arch)?,
        positions: size("context_length").unwrap_or(2048),
        tied: !has("output.weight"),
        ..Config::default()
    };
    config.check()?;
    Ok(config)
}

fn scaling(facts: &dyn Facts, arch: &str) -> Result<Option<RopeScaling>> {
    if facts.shape("rope_freqs.weight").is_some() {
        return Ok(Some(RopeScaling::Factors { factors: facts.values("rope_freqs.weight")? }));
    }
    match facts.text(&format!("{arch}.rope.scaling.type")) {
        None | Some("none") => Ok(None),
        Some("linear") => {
            let factor = facts.float(&format!("{arch}.rope.scaling.factor")).unwrap_or(1.0);
            Ok((factor != 1.0).then_some(RopeScaling::Linear { factor }))
        }
        Some(other) => {
            bail!("rotary positions are scaled by `{other}`; `linear` and `rope_freqs` are built")
        }
    }
}

/// Where our tensor `name` (a published one of the family) comes from. `fused` says that q, k and v
/// are one tensor in the file.
pub fn origin(config: &Config, name: &str, fused: bool) -> Option<Origin> {
    let (inner, kv) = (config.d_inner(), config.d_kv());
    let outside = match name {
        "model.embed_tokens.weight" => Some("token_embd.weight"),
        "lm_head.weight" => Some("output.weight"),
        "lm_head.bias" => Some("output.bias"),
        "model.norm.weight" | "model.final_layernorm.weight" => Some("output_norm.weight"),
        "model.norm.bias" | "model.final_layernorm.bias" => Some("output_norm.bias"),
        _ => None,
    };
    if let Some(name) = outside {
        return Some(Origin::whole(name));
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    // llama.cpp rotates adjacent pairs for this architecture, and orders q and k for it.
    let paired = |heads| (config.family == Family::Llama).then_some(heads);
    let (ours, rows, paired_heads) = match part {
        "input_layernorm" => ("attn_norm", None, None),
        "post_attention_layernorm" => ("ffn_norm", None, None),
        "self_attn.q_proj" => ("attn_q", Some((0, inner)), paired(config.heads)),
        "self_attn.k_proj" => ("attn_k", Some((inner, kv)), paired(config.kv_heads)),
        "self_attn.v_proj" => ("attn_v", Some((inner + kv, kv)), None),
        "self_attn.o_proj" | "self_attn.dense" => ("attn_output", None, None),
        "mlp.gate_proj" => ("ffn_gate", None, None),
        "mlp.up_proj" | "mlp.fc1" => ("ffn_up", None, None),
        "mlp.down_proj" | "mlp.fc2" => ("ffn_down", None, None),
        _ => return None,
    };
    let (ours, rows) = match (rows, fused) {
        (Some(rows), true) => ("attn_qkv", Some(rows)),
        _ => (ours, None),
    };
    Some(Origin { name: format!("blk.{layer}.{ours}.{kind}"), rows, paired_heads })
}
