//! Round trips of configurations and weights, published sizes, refusals.

use std::collections::BTreeMap;

use engine::tensors::Tensors;
use safetensors::Dtype;
use serde_json::{Value, json};

use super::config as published;
use super::*;
use crate::models::config::{Biases, MixerKind, MlpKind, NormKind, Wiring};
use crate::models::family::hub;
use crate::models::file;
use crate::models::transfer::{Sizes, student_config};
use crate::models::{Model, Params};
use crate::ops::rope::RopeScaling;

fn llama(tied: bool) -> Config {
    Config {
        vocab: 24,
        d_model: 16,
        layers: vec![MixerKind::Attention; 3],
        heads: 4,
        kv_heads: 2,
        head_dim: 4,
        ffn: 12,
        tied,
        rope_theta: 500_000.0,
        positions: 77,
        separator: Some(3),
        ..Config::default()
    }
}

fn phi() -> Config {
    Config {
        family: Family::Phi,
        wiring: Wiring::Parallel,
        norm: NormKind::Layer,
        mlp: MlpKind::Gelu,
        bias: Biases { qkv: true, out: true, mlp: true, head: true },
        kv_heads: 4,
        rotary_dim: Some(2),
        rope_theta: 10_000.0,
        ffn: 64,
        positions: 2048,
        separator: None,
        ..llama(false)
    }
}

fn qwen2() -> Config {
    let bias = Biases { qkv: true, ..Biases::default() };
    Config { family: Family::Qwen2, bias, norm_eps: 1e-6, ..llama(true) }
}

fn student(teacher: &Config, keep: &[usize]) -> Config {
    student_config(teacher, Sizes { state: 8, taps: 4, chunk: 128 }, keep)
}

fn described(config: &Config) -> Described {
    describe(config, Dtype::F32).unwrap()
}

/// Every kind of model with what its format is called and how often the published class objects.
fn all() -> Vec<(Config, Format, usize)> {
    let scaled = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 };
    let factors = RopeScaling::Factors { factors: vec![1.0, 0.3] };
    let wide = Config { head_dim: 6, ..llama(true) };
    vec![
        (student(&phi(), &[]), Format::PhiMamba, 0),
        (student(&phi(), &[1]), Format::HybridPhiMamba, 1),
        (Config { ffn: 20, tied: true, ..student(&phi(), &[]) }, Format::PhiMamba, 2),
        (student(&llama(true), &[]), Format::Llamba, 1),
        (student(&llama(false), &[]), Format::Llamba, 1),
        (student(&llama(true), &[0, 2]), Format::LlambaHybrid, 2),
        (student(&wide, &[]), Format::Llamba, 2),
        (student(&qwen2(), &[]), Format::Llamba, 2),
        (student(&qwen2(), &[1]), Format::LlambaHybrid, 3),
        (
            Config { rope_scaling: Some(factors), ..student(&llama(true), &[1]) },
            Format::LlambaHybrid,
            2,
        ),
        (llama(true), Format::Transformers, 1),
        (Config { rope_scaling: Some(scaled), ..llama(false) }, Format::Transformers, 1),
        (phi(), Format::Transformers, 0),
        (qwen2(), Format::Transformers, 1),
    ]
}

#[test]
fn every_configuration_comes_back_equal() {
    for (config, format, notes) in all() {
        let file = described(&config);
        assert_eq!((file.format, file.notes.len()), (format, notes), "{config:?}\n{file:?}");
        let back = published(&file.text).unwrap();
        let back = back.unwrap_or_else(|| hub::config(&file.text).unwrap());
        assert_eq!(back, config, "{}", file.text);
        // `dtype` in a student's file would be handed to the published class as a text.
        let value: Value = serde_json::from_str(&file.text).unwrap();
        assert_eq!(value.get("dtype").is_some(), format == Format::Transformers);
    }
}

/// Writes `config`'s model to a directory in `dtype`, cut at `shard_bytes`; gives what it was.
fn exported(
    config: &Config,
    dtype: Option<Dtype>,
    shard_bytes: Option<u64>,
) -> (tempfile::TempDir, Written, Params) {
    let model = Model::new(config.clone()).unwrap();
    let params = model.init(5);
    let dir = tempfile::tempdir().unwrap();
    let artifact = dir.path().join("artifact");
    model.save(&artifact, &params).unwrap();
    let tensors = Tensors::open(&artifact).unwrap();
    let target = dir.path().join("out");
    std::fs::create_dir(&target).unwrap();
    let provenance = Provenance::default();
    let bundle = Bundle { tensors: &tensors, tokenizer: None, dtype, shard_bytes, provenance };
    let written = write(&target, bundle, &|| false).unwrap();
    (dir, written, params)
}

/// Reads a directory back.
fn imported(dir: &std::path::Path) -> (Config, Params) {
    let text = std::fs::read_to_string(dir.join("config.json")).unwrap();
    let config = published(&text).unwrap().unwrap_or_else(|| hub::config(&text).unwrap());
    let model = Model::new(config.clone()).unwrap();
    let mut params = Params::zeros(&model.layout);
    params.flat.fill(f32::NAN);
    let mut seen = 0;
    for item in std::fs::read_dir(dir).unwrap().flatten() {
        if item.path().extension().is_some_and(|e| e == "safetensors") {
            let tensors = Tensors::open(&item.path()).unwrap();
            assert_eq!(tensors.metadata("format"), Some("pt"));
            let here = |f: &crate::models::params::FileTensor| tensors.get(&f.name).is_some();
            file::load(&mut params, &tensors, here).unwrap();
            seen += tensors.names().count();
        }
    }
    assert_eq!(seen, model.layout.files().len(), "no tensor is missing, none is there twice");
    (config, params)
}

fn bits(params: &Params) -> Vec<u32> {
    params.flat.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_model_comes_back_with_the_same_bits() {
    for (config, format, _) in all() {
        let (dir, written, params) = exported(&config, None, None);
        assert_eq!((written.format, written.parameters), (format, params.flat.len()));
        let (back, read) = imported(&dir.path().join("out"));
        assert_eq!(back, config);
        assert_eq!(bits(&read), bits(&params));
        let names: Vec<&str> = written.files.iter().map(|(name, _)| &name[..]).collect();
        assert_eq!(names, ["README.md", "config.json", "model.safetensors", "provenance.json"]);
    }
}

#[test]
fn shards_and_halves_come_back() {
    let config = student(&phi(), &[1]);
    let (dir, written, params) = exported(&config, None, Some(3000));
    let out = dir.path().join("out");
    let shards = written.files.iter().filter(|(name, _)| name.ends_with(".safetensors")).count();
    assert!(shards > 3, "{:?}", written.files);
    assert!(written.notes.iter().any(|note| note.contains("one `model.safetensors` only")));
    assert_eq!(bits(&imported(&out).1), bits(&params));
    let index = std::fs::read_to_string(out.join("model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_str(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], params.flat.len() * 4);
    for (name, file) in index["weight_map"].as_object().unwrap() {
        let tensors = Tensors::open(&out.join(file.as_str().unwrap())).unwrap();
        assert!(tensors.get(name).is_some());
    }

    let (dir, written, params) = exported(&config, Some(Dtype::BF16), None);
    assert_eq!(written.dtype, "bfloat16");
    let rounded = |v: &f32| half::bf16::from_f32(*v).to_f32().to_bits();
    let expected: Vec<u32> = params.flat.iter().map(rounded).collect();
    assert_eq!(bits(&imported(&dir.path().join("out")).1), expected);
}

#[test]
fn an_interrupted_export_says_so() {
    let model = Model::new(student(&llama(true), &[])).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let artifact = dir.path().join("artifact");
    model.save(&artifact, &model.init(1)).unwrap();
    let tensors = Tensors::open(&artifact).unwrap();
    let provenance = Provenance::default();
    let bundle =
        Bundle { tensors: &tensors, tokenizer: None, dtype: None, shard_bytes: None, provenance };
    let error = write(dir.path(), bundle, &|| true).unwrap_err();
    assert!(error.is::<Interrupted>());
}

/// `config.json` of microsoft/phi-1_5, the fields that matter.
fn phi_1_5() -> Config {
    let text = json!({
        "model_type": "phi", "vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 24, "num_attention_heads": 32, "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "tie_word_embeddings": false,
    });
    hub::config(&text.to_string()).unwrap()
}

fn published_core() -> Value {
    json!({
        "d_state": 64, "n_v_heads": 32, "n_qk_heads": 32, "d_conv": 4, "conv_bias": true,
        "expand": 1, "chunk_size": 128, "activation": "identity", "bias": false,
    })
}

/// `config.json` of goombalab/Phi-Mamba for such runs of layers.
fn published_phi(runs: &[(usize, bool)]) -> Value {
    let mut file = json!({
        "LanguageModel": {"input": {"vocab_size": 51200, "pad_vocab_size_multiple": 8}},
        "MixerModel": {"input": {"d_model": 2048, "n_layer": 24, "lm_head_prenorm": "layer"}},
    });
    for (i, (layers, attention)) in runs.iter().enumerate() {
        let (core, input) = match attention {
            true => ("phi_attention", json!({})),
            false => ("discrete_mamba2", published_core()),
        };
        file[format!("Block{}", i + 1)] = json!({
            "n_layers": layers,
            "BlockType": "modules.phi_block",
            "block_input": {"resid_dropout": 0.0},
            "CoreType": format!("modules.mixers.{core}"),
            "core_input": input,
        });
    }
    file
}

fn shapes(config: &Config) -> BTreeMap<String, Vec<usize>> {
    let model = Model::new(config.clone()).unwrap();
    model.layout.files().iter().map(|f| (f.name.clone(), f.shape.clone())).collect()
}

fn parameters(config: &Config) -> usize {
    Model::new(config.clone()).unwrap().layout.len()
}

#[test]
fn phi_mamba_has_the_published_file_names_and_size() {
    let sizes = Sizes { state: 64, taps: 4, chunk: 128 };
    let config = student_config(&phi_1_5(), sizes, &[]);
    let file = described(&config);
    assert_eq!(file.notes, [""; 0]);
    assert_eq!(serde_json::from_str::<Value>(&file.text).unwrap(), published_phi(&[(24, false)]));
    assert_eq!(published(&file.text).unwrap().unwrap(), config);
    assert_eq!(parameters(&config), 1_521_097_472);
    let shapes = shapes(&config);
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let mut add = |name: String, shape: &[usize]| expected.insert(name, shape.to_vec());
    for i in 0..24 {
        let layer = format!("backbone.layers.{i}.");
        add(format!("{layer}mixer.in_proj.weight"), &[8224, 2048]);
        add(format!("{layer}mixer.z_bias"), &[2048]);
        add(format!("{layer}mixer.conv1d.weight"), &[6144, 1, 4]);
        add(format!("{layer}mixer.conv1d.bias"), &[6144]);
        add(format!("{layer}mixer.D"), &[32]);
        add(format!("{layer}mixer.out_proj.weight"), &[2048, 2048]);
        add(format!("{layer}mlp.fc1.weight"), &[8192, 2048]);
        add(format!("{layer}mlp.fc1.bias"), &[8192]);
        add(format!("{layer}mlp.fc2.weight"), &[2048, 8192]);
        add(format!("{layer}mlp.fc2.bias"), &[2048]);
        add(format!("{layer}input_layernorm.weight"), &[2048]);
        add(format!("{layer}input_layernorm.bias"), &[2048]);
    }
    add("backbone.embedding.weight".into(), &[51200, 2048]);
    add("backbone.final_layernorm.weight".into(), &[2048]);
    add("backbone.final_layernorm.bias".into(), &[2048]);
    add("lm_head.weight".into(), &[51200, 2048]);
    add("lm_head.bias".into(), &[51200]);
    assert_eq!(shapes, expected);
}

#[test]
fn hybrid_phi_mamba_has_the_published_sections_names_and_size() {
    let sizes = Sizes { state: 64, taps: 4, chunk: 128 };
    let config = student_config(&phi_1_5(), sizes, &[4, 10, 16, 22]);
    let file = described(&config);
    assert_eq!((file.format, file.notes.len()), (Format::HybridPhiMamba, 0));
    let runs = [4, 1, 5, 1, 5, 1, 5, 1, 1].map(|n| n);
    let runs: Vec<(usize, bool)> = runs.iter().enumerate().map(|(i, n)| (*n, i % 2 == 1)).collect();
    assert_eq!(serde_json::from_str::<Value>(&file.text).unwrap(), published_phi(&runs));
    assert_eq!(published(&file.text).unwrap().unwrap(), config);
    assert_eq!(parameters(&config), 1_503_959_680);
    let shapes = shapes(&config);
    for name in ["q_proj", "k_proj", "v_proj", "dense"] {
        let name = format!("backbone.layers.22.mixer.self_attn.{name}");
        assert_eq!(shapes[&format!("{name}.weight")], [2048, 2048]);
        assert_eq!(shapes[&format!("{name}.bias")], [2048]);
    }
    assert!(!shapes.contains_key("backbone.layers.22.mixer.in_proj.weight"));
}

#[test]
fn blocks_are_taken_in_the_order_of_the_file() {
    let teacher = Config { layers: vec![MixerKind::Attention; 12], ..phi() };
    let config = student(&teacher, &[1, 3, 5, 7, 9, 11]);
    let text = described(&config).text;
    let at = |name: &str| text.find(&format!("\"{name}\"")).unwrap();
    assert!(at("Block2") < at("Block9") && at("Block9") < at("Block10"), "{text}");
    assert_eq!(published(&text).unwrap().unwrap(), config);
}

fn published_llamba(d_model: usize, layers: usize, ffn: usize, tied: bool) -> Value {
    json!({
        "model_type": "llamba", "vocab_size": 128256, "tie_embeddings": tied,
        "pad_vocab_size_multiple": 8, "lm_head_bias": false, "d_model": d_model,
        "n_layer": layers, "resid_dropout": 0.0, "norm_epsilon": 1e-5,
        "mlp_cfg": {"intermediate_size": ffn, "bias": false, "act_fn": "silu"},
        "ssm_cfg": {
            "d_state": 64, "n_v_heads": 32, "n_qk_heads": 32, "expand": 1, "chunk_size": 128,
            "activation": "identity", "bias": false,
        },
    })
}

#[test]
fn llamba_is_read_at_all_published_sizes() {
    for (d_model, layers, ffn, tied, head_dim, size) in [
        (2048, 16, 8192, true, 64, 1.405),
        (3072, 28, 8192, true, 96, 3.657),
        (4096, 32, 14336, true, 128, 8.316),
        (4096, 32, 14336, false, 128, 8.841),
    ] {
        let file = published_llamba(d_model, layers, ffn, tied);
        let config = published(&file.to_string()).unwrap().unwrap();
        assert_eq!((config.head_dim, config.heads), (head_dim, 32));
        assert_eq!(format!("{:.3}", parameters(&config) as f64 / 1e9), format!("{size:.3}"));
        let shapes = shapes(&config);
        assert_eq!(shapes.contains_key("lm_head.weight"), !tied);
        let layer = "backbone.layers.3.";
        let rows = 2 * d_model + 2 * 32 * 64 + 32;
        assert_eq!(shapes[&format!("{layer}mixer.in_proj.weight")], [rows, d_model]);
        assert_eq!(shapes[&format!("{layer}mixer.conv1d.weight")], [d_model + 4096, 1, 4]);
        for name in ["gate_proj", "up_proj"] {
            assert_eq!(shapes[&format!("{layer}mlp.{name}.weight")], [ffn, d_model]);
        }
        assert_eq!(shapes[&format!("{layer}mlp.down_proj.weight")], [d_model, ffn]);
        for name in ["input_layernorm", "post_attention_layernorm"] {
            assert_eq!(shapes[&format!("{layer}{name}.weight")], [d_model]);
        }
        assert_eq!(shapes["backbone.final_layernorm.weight"], [d_model]);
        assert_eq!(shapes.len(), 2 + usize::from(!tied) + layers * 11);
        // What was read is written again as it was.
        let again = described(&config);
        assert_eq!(serde_json::from_str::<Value>(&again.text).unwrap(), file);
        assert_eq!(again.notes, [""; 0]);
    }
}

/// Sets `path` in `file` to `value` and expects an error with `words`.
fn refused(mut file: Value, path: &str, value: Value, words: &str) {
    let (parent, name) = path.rsplit_once('/').unwrap();
    let parent = file.pointer_mut(parent).unwrap();
    parent[name] = value;
    let error = format!("{:#}", published(&file.to_string()).unwrap_err());
    assert!(error.contains(words), "{path}: {error}");
}

#[test]
fn what_is_computed_otherwise_is_refused_by_name() {
    let llamba = || published_llamba(2048, 16, 8192, true);
    let ssm = |name: &str| format!("/ssm_cfg/{name}");
    refused(llamba(), &ssm("bias"), json!(true), "`bias` is true");
    refused(llamba(), &ssm("conv_bias"), json!(false), "`conv_bias`");
    refused(llamba(), &ssm("activation"), json!("silu"), "`activation` is `silu`");
    refused(llamba(), &ssm("n_qk_heads"), json!(16), "`n_qk_heads` is 16");
    refused(llamba(), &ssm("n_v_heads"), json!(0), "`n_qk_heads` is 32");
    refused(llamba(), &ssm("expand"), json!(u64::MAX), "too large");
    refused(llamba(), &ssm("d_state"), json!(1u64 << 40), "`state`");
    refused(llamba(), "/d_model", json!(2050), "no multiple of `n_v_heads` 32");
    refused(llamba(), "/norm_epsilon", json!(1e-6), "`norm_epsilon`");
    refused(llamba(), "/lm_head_prenorm", json!("layer"), "`lm_head_prenorm` is `layer`");
    refused(llamba(), "/mlp_cfg/act_fn", json!("gelu"), "`act_fn`");
    refused(llamba(), "/n_layer", json!(1u64 << 50), "layers are more than");
    refused(llamba(), "/pad_vocab_size_multiple", json!(0), "`pad_vocab_size_multiple`");
    refused(llamba(), "/pipe", json!({"d_model": 7}), "`pipe` says `d_model`");
    refused(llamba(), "/pipe", json!({"layers": ["attention"]}), "`pipe` lists 1 layers");
    refused(llamba(), "/pipe", json!({"layers": ["other"]}), "`pipe` cannot be read");
    refused(llamba(), "/pipe", json!([]), "not an object");

    let phi = || published_phi(&[(20, false), (4, true)]);
    let layers = "/Block1/n_layers";
    refused(phi(), layers, json!(3), "have 7 layers, but `n_layer` is 24");
    refused(phi(), layers, json!(u64::MAX), "more than the 24 layers");
    refused(phi(), "/Block1/BlockType", json!("modules.other"), "`BlockType` of `Block1`");
    refused(phi(), "/Block2/CoreType", json!("modules.mixers.rotary"), "`CoreType` of `Block2`");
    refused(phi(), "/Block1/core_input/activation", json!("silu"), "`activation`");
    refused(phi(), "/MixerModel/input/lm_head_prenorm", json!("rms"), "`lm_head_prenorm`");
    refused(phi(), "/LanguageModel/input/tie_embeddings", json!(true), "tied");
    let mut core = published_core();
    core["d_state"] = json!(32);
    let mut two = published_phi(&[(20, false), (4, false)]);
    two["Block2"]["core_input"] = core;
    refused(two, "/ignored", json!(0), "`Block1` and `Block2`");
    let attention = published_phi(&[(24, true)]);
    refused(attention, "/ignored", json!(0), "no layer of it is Discrete Mamba-2");
}

#[test]
fn other_files_are_nobodys_and_the_mlx_port_is_known() {
    for text in [r#"{"model_type": "llama"}"#, r#"{"model_type": "mamba2"}"#, "{}", "[]"] {
        assert_eq!(published(text).unwrap(), None);
    }
    assert!(published("{").is_err());
    let names = ["backbone.layers.0.mixer.in_proj.weight", "backbone.layers.0.mixer.conv_weight"];
    assert!(check_names(names[..1].iter().copied()).is_ok());
    let error = check_names(names.iter().copied()).unwrap_err().to_string();
    assert!(error.contains("conv_weight") && error.contains("hint"), "{error}");
}

#[test]
fn what_no_format_says_is_not_written() {
    let refused = |config: Config, words: &str| {
        let error = describe(&config, Dtype::F32).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    refused(Config { wiring: Wiring::Parallel, ..llama(true) }, "`wiring`");
    refused(Config { wiring: Wiring::Parallel, ..student(&llama(true), &[]) }, "`wiring`");
    refused(Config { norm: NormKind::Rms, ..student(&phi(), &[]) }, "`norm`");
    let bias = Biases { qkv: true, ..Biases::default() };
    refused(Config { bias, ..llama(true) }, "`bias`");
    let factors = RopeScaling::Factors { factors: vec![1.0, 2.0] };
    refused(Config { rope_scaling: Some(factors), ..llama(true) }, "GGUF");
}
