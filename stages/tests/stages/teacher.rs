//! Checkpoints of every family and format against what transformers computes with them (fixtures
//! and how they were made: `stages/tests/fixtures/make_models.py`).

use std::path::{Path, PathBuf};

use engine::stage::{Context, Stage};
use engine::tensors::Tensors;
use safetensors::Dtype;
use stages::models::{Config, Keep, Model, Params as Weights};
use stages::ops::Dims;
use stages::teacher::{Params, Teacher};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
}

/// Where the stage put what.
struct Made {
    dir: tempfile::TempDir,
}

impl Made {
    fn path(&self, port: &str, file: &str) -> PathBuf {
        self.dir.path().join("out").join(port).join(file)
    }

    fn tensors(&self) -> Tensors {
        Tensors::open(&self.path("model", "model.safetensors")).unwrap()
    }

    fn load(&self) -> (Model, Weights) {
        Model::load(&self.tensors()).unwrap()
    }
}

fn read(model: &Path, tokenizer: Option<&Path>, params: &Params) -> anyhow::Result<Made> {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer: Vec<&Path> = tokenizer.into_iter().collect();
    let mut ctx =
        Context::local::<Teacher>(dir.path(), &[("model", &[model]), ("tokenizer", &tokenizer)]);
    Teacher::run(params, &mut ctx)?;
    Ok(Made { dir })
}

/// Largest |a − b| over the root mean square of b.
fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let size = (b.iter().map(|b| b * b).sum::<f32>() / b.len() as f32).sqrt();
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) / size
}

/// Compares logits and un-normed hidden states with those of `expected.safetensors`.
fn computes_what_transformers_does(name: &str, made: &Made) {
    let (model, weights) = made.load();
    let expected = Tensors::open(&fixture(name).join("expected.safetensors")).unwrap();
    let tokens = expected.get("tokens").unwrap();
    let (batch, seq) = (tokens.shape[0], tokens.shape[1]);
    let mut pass = model.pass(Dims { batch, seq }, Keep::Nothing);
    for (to, b) in pass.tokens_n.iter_mut().zip(tokens.bytes.chunks_exact(4)) {
        *to = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    }
    model.forward(&weights.flat, &mut pass, |_, _, _| {});
    let (n, d, v) = (batch * seq, model.config.d_model, model.config.vocab);
    for (layer, hidden) in pass.hidden.iter().enumerate() {
        let want = expected.f32(&format!("hidden.{layer}"), &[batch, seq, d]).unwrap();
        let gap = apart(hidden, &want);
        assert!(gap < 1e-4, "{name}: h_{layer} is off by {gap:e}");
    }
    let mut logits = vec![0.0; n * v];
    model.logits(&weights.flat, &pass, 0..n, &mut logits);
    let gap = apart(&logits, &expected.f32("logits", &[batch, seq, v]).unwrap());
    assert!(gap < 1e-4, "{name}: logits are off by {gap:e}");
}

#[test]
fn every_family_computes_what_transformers_does() {
    for name in ["llama", "llama4x", "llama_sharded", "phi", "phi4x", "qwen2"] {
        let made = read(&fixture(name), None, &Params::default()).unwrap();
        computes_what_transformers_does(name, &made);
    }
    let made = read(&fixture("llama_bin"), None, &Params::default()).unwrap();
    computes_what_transformers_does("llama", &made);
}

#[test]
fn a_gguf_file_computes_what_transformers_does_with_its_values_and_brings_its_tokenizer() {
    let params = Params { mask_documents: false, ..Params::default() };
    let made = read(&fixture("gguf/tiny.gguf"), None, &params).unwrap();
    computes_what_transformers_does("gguf", &made);
    let tokenizer = made.path("tokenizer", "tokenizer.json");
    let tokenizer = stages::tokenize::load(&tokenizer).unwrap();
    let (model, _) = made.load();
    assert_eq!(tokenizer.get_vocab_size(true), model.config.vocab);
}

#[test]
fn weights_keep_the_bits_they_were_stored_in() {
    let made = read(&fixture("llama_sharded"), None, &Params::default()).unwrap();
    let tensors = made.tensors();
    let name = "model.layers.1.self_attn.k_proj.weight";
    let view = tensors.get(name).unwrap();
    assert_eq!(view.dtype, Dtype::BF16);
    let shard = fixture("llama_sharded").join("model-00002-of-00003.safetensors");
    assert_eq!(view.bytes, Tensors::open(&shard).unwrap().get(name).unwrap().bytes);
}

#[test]
fn exported_students_are_read_back_bit_for_bit() {
    use stages::models::MixerKind::{Attention, Ssm};
    use stages::models::published::{Bundle, Provenance, write};
    for (base, layers) in [
        (crate::model::phi(Some(0)), [Ssm, Ssm]),
        (crate::model::phi(None), [Attention, Ssm]),
        (crate::model::config(true, Some(0)), [Ssm, Ssm]),
        (crate::model::config(false, None), [Ssm, Ssm]),
        (crate::model::config(true, None), [Ssm, Attention]),
    ] {
        let model = Model::new(Config { layers: layers.to_vec(), ..base }).unwrap();
        let params = crate::model::weights(&model);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        model.save(&file, &params).unwrap();
        let tensors = Tensors::open(&file).unwrap();
        let to = dir.path().join("exported");
        std::fs::create_dir(&to).unwrap();
        let provenance = Provenance::default();
        let bundle = Bundle {
            tensors: &tensors,
            tokenizer: None,
            dtype: None,
            shard_bytes: None,
            provenance,
        };
        write(&to, bundle, &|| false).unwrap();
        let (back, read) = read(&to, None, &Params::default()).unwrap().load();
        assert_eq!((&back.config, &read.flat), (&model.config, &params.flat));
    }
}

/// The directory `name` with its `config.json` changed by `change`.
fn changed(name: &str, change: impl Fn(&mut serde_json::Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for item in std::fs::read_dir(fixture(name)).unwrap() {
        let path = item.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = dir.path().join("config.json");
    let mut config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
    let _ = std::fs::remove_file(dir.path().join("expected.safetensors"));
    dir
}

#[test]
fn what_would_be_a_wrong_model_is_refused_by_name() {
    type Change = fn(&mut serde_json::Value);
    let cases: [(&str, Change, &str); 9] = [
        ("llama", |c| c["model_type"] = "gemma3".into(), "its `model_type` is `gemma3`"),
        ("llama", |c| c["hidden_act"] = "gelu".into(), "`hidden_act` is `gelu`"),
        ("llama", |c| c["rope_parameters"]["rope_type"] = "yarn".into(), "scaled by `yarn`"),
        (
            "llama",
            |c| c["num_hidden_layers"] = 3.into(),
            "`model.layers.2.input_layernorm.weight` is missing",
        ),
        (
            "llama",
            |c| c["num_hidden_layers"] = 1.into(),
            "no place for 9 of its tensors: `model.layers.1.",
        ),
        (
            "llama",
            |c| c["intermediate_size"] = 20.into(),
            "by its configuration the model needs [20, 32]",
        ),
        ("qwen2", |c| c["use_sliding_window"] = true.into(), "sliding window"),
        ("phi", |c| c["qk_layernorm"] = true.into(), "`qk_layernorm` is not built"),
        ("llama", |c| c["vocab_size"] = u64::MAX.into(), "`vocab` is larger than any model's"),
    ];
    for (name, change, want) in cases {
        let dir = changed(name, change);
        let error = read(dir.path(), None, &Params::default()).err().expect(want);
        let text = format!("{error:#}");
        assert!(text.contains(want), "{want}: {text}");
    }
    let dir = changed("llama", |_| {});
    std::fs::write(
        dir.path().join("config.json"),
        r#"{"model_type":"llama","vocab_size":1,"vocab_size":2}"#,
    )
    .unwrap();
    let text = format!("{:#}", read(dir.path(), None, &Params::default()).err().unwrap());
    assert!(text.contains("duplicate field `vocab_size`"), "{text}");
}

#[test]
fn a_tokenizer_with_more_tokens_than_the_model_is_refused() {
    let dir = changed("llama", |_| {});
    let tokenizer = read(
        &fixture("gguf/tiny.gguf"),
        None,
        &Params { mask_documents: false, ..Params::default() },
    )
    .unwrap();
    let from = tokenizer.path("tokenizer", "tokenizer.json");
    let result = read(dir.path(), Some(&from), &Params::default());
    let text = format!("{:#}", result.err().unwrap());
    assert!(text.contains("they do not belong together"), "{text}");
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { failure_persistence: None, ..Default::default() })]

    /// Whatever a `config.json` says, it is read or refused; no size overflows or is allocated.
    #[test]
    fn no_configuration_is_too_strange(
        name in proptest::sample::select(vec!["llama", "llama4x", "phi", "phi4x", "qwen2"]),
        edits in proptest::collection::vec((0usize..40, 0usize..14), 1..6),
    ) {
        let text = std::fs::read_to_string(fixture(name).join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        let values = serde_json::json!([
            0, 1, -1, 3, 7, 1e300, 1e-300, u64::MAX, i64::MIN, null, "llama3", [], {}, true
        ]);
        for (field, value) in edits {
            let object = config.as_object_mut().unwrap();
            let key = object.keys().nth(field % object.len()).unwrap().clone();
            let inner = object[&key].as_object().map(|inner| inner.len());
            match inner.filter(|_| value % 2 == 0) {
                Some(len) if len > 0 => {
                    let inner = object[&key].as_object_mut().unwrap();
                    let own = inner.keys().nth(value % len).unwrap().clone();
                    inner[&own] = values[value].clone();
                }
                _ => object[&key] = values[value].clone(),
            }
        }
        if let Ok(config) = stages::models::family::hub::config(&config.to_string()) {
            let model = Model::new(config).unwrap();
            proptest::prop_assert!(!model.layout.is_empty());
        }
    }
}

#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn the_story_teller_tells_its_story() {
    let Some(data) = std::env::var_os("PIPE_TEST_DATA").map(PathBuf::from) else {
        return eprintln!("skipped: PIPE_TEST_DATA is not set");
    };
    let dir = data.join("teacher-tiny");
    let (bin, tok) = (dir.join("stories260K.bin"), dir.join("tok512.bin"));
    let made = read(&bin, Some(&tok), &Params::default()).unwrap();
    let (model, weights) = made.load();
    assert_eq!(model.config.separator, Some(1));
    let tokenizer = stages::tokenize::load(&made.path("tokenizer", "tokenizer.json")).unwrap();
    let mut decoder = stages::models::decode::Decoder::new(&model, &weights.flat);
    let (mut tokens, mut last) = (Vec::new(), 1);
    while tokens.len() < 80 {
        let logits = decoder.read(&[last]);
        last = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32;
        tokens.push(last);
    }
    let text = tokenizer.decode(&tokens, true).unwrap();
    let want = "Once upon a time, there was a little girl named Lily. She loved to play outside in \
                the park. One day, she saw a big, red ball. She wanted to play with it, but it was \
                too high.\n";
    assert!(text.starts_with(want), "{text:?}");
}
