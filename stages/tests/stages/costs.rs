//! What stages foretell, beside what they then do.

use std::collections::BTreeMap;
use std::path::Path;

use engine::stage::cost::{Artifact, Cost, Costed, Known};
use engine::stage::{Context, Stage};
use stages::cache_teacher::{CacheTeacher, Number, Params, Signal};
use stages::costs::{About, describe};
use stages::data::shard::ShardWriter;
use stages::distill::Distill;
use stages::models::{Config, MixerKind, Model};
use stages::pretrain::Pretrain;
use stages::train::device::Device;
use stages::train::signals::AttentionForm;

fn config() -> Config {
    Config {
        vocab: 40,
        d_model: 12,
        layers: vec![MixerKind::Attention; 2],
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        ffn: 20,
        tied: true,
        separator: Some(0),
        ..Config::default()
    }
}

fn shard(path: &Path, sequences: u32) {
    let mut writer = ShardWriter::create(path, 40, 16, 0).unwrap();
    writer.document(&(0..sequences * 16).map(|i| 1 + i % 39).collect::<Vec<u32>>()).unwrap();
    writer.finish().unwrap();
}

fn there(path: &Path) -> Artifact {
    let name = path.file_name().unwrap().to_str().unwrap();
    let about = describe(name, path).unwrap_or_else(|| panic!("{name} tells nothing"));
    let bytes = path.metadata().unwrap().len();
    Artifact { index: None, bytes: Some(bytes), about: about.value(), sure: true }
}

fn known(ports: &[(&str, Artifact)]) -> Known {
    let port = |(name, artifact): &(&str, Artifact)| (name.to_string(), vec![artifact.clone()]);
    Known { ports: ports.iter().map(port).collect() }
}

/// Bytes of everything below `dir`.
fn size(dir: &Path) -> u64 {
    let items = std::fs::read_dir(dir).unwrap().map(|item| item.unwrap().path());
    items.map(|path| if path.is_dir() { size(&path) } else { path.metadata().unwrap().len() }).sum()
}

#[test]
fn bytes_of_cached_signals_are_foretold_to_the_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (teacher, tokens) = (dir.path().join("teacher.safetensors"), dir.path().join("tokens.bin"));
    let model = Model::new(config()).unwrap();
    model.save(&teacher, &model.init(1)).unwrap();
    shard(&tokens, 20);
    let known = known(&[("model", there(&teacher)), ("tokens", there(&tokens))]);
    use Signal::{Attention, Hidden, Logits};
    let (qk, matrix) = (AttentionForm::Qk, AttentionForm::Matrix);
    let cases: [(usize, &[Signal], AttentionForm, usize, Number); 6] = [
        (7, &[Hidden, Attention], qk, 0, Number::F32),
        (7, &[Hidden, Attention], qk, 0, Number::Bf16),
        (7, &[Attention], matrix, 0, Number::F32),
        (3, &[Hidden], qk, 0, Number::F32),
        (5, &[Logits], qk, 3, Number::F32),
        (500, &[Hidden, Attention, Logits], matrix, 2, Number::Bf16), // more than there are
    ];
    for (i, (sequences, keep, attention, top_k, dtype)) in cases.into_iter().enumerate() {
        let params = Params {
            sequences,
            keep: keep.to_vec(),
            attention,
            top_k,
            dtype,
            device: Device::Cpu,
            ..Params::default()
        };
        let place = dir.path().join(format!("case-{i}"));
        std::fs::create_dir(&place).unwrap();
        let inputs: [(&str, &[&Path]); 2] = [("model", &[&teacher]), ("tokens", &[&tokens])];
        let mut ctx = Context::local::<CacheTeacher>(&place, &inputs);
        CacheTeacher::run(&params, &mut ctx).unwrap();
        let cost = CacheTeacher::cost(&params, &known).unwrap();
        let (written, foretold) = (size(&place.join("out")), cost.written.unwrap());
        assert_eq!((foretold, cost.disk.least), (written, written), "case {i}");
        // What follows is told the same that it will find.
        for made in cost.makes.get("layer").into_iter().flatten() {
            let path = place.join(format!("out/layer/layer-{}.safetensors", made.index.unwrap()));
            assert_eq!(made.about, describe("", &path).unwrap().value());
            assert_eq!(made.bytes, Some(path.metadata().unwrap().len()));
        }
    }
}

/// A teacher and a shard that nobody made.
fn imagined(config: Config, sequences: Option<usize>, seq: usize, sure: bool) -> Known {
    let about = About::Tokens { vocab: Some(config.vocab), seq, sequences };
    known(&[
        ("model", About::Model(config).made(Some(1), sure)),
        ("tokens", about.made(Some(1), sure)),
    ])
}

#[test]
fn whole_matrices_take_memory_and_disk_that_q_and_k_do_not() {
    let large = Config { d_model: 2048, heads: 32, kv_heads: 32, head_dim: 64, ..config() };
    let long = imagined(large, Some(1000), 2048, true);
    let cost = |attention| {
        let params = Params { attention, sequences: 512, device: Device::Cpu, ..Params::default() };
        CacheTeacher::cost(&params, &long).unwrap()
    };
    let (qk, matrix) = (cost(AttentionForm::Qk), cost(AttentionForm::Matrix));
    assert!(matrix.disk.least > 4 * qk.disk.least, "{matrix:?} {qk:?}");
    assert!(matrix.memory.least > 5 * qk.memory.least, "{matrix:?} {qk:?}");
    assert!(matrix.disk.lower.contains("`attention: qk`"), "{}", matrix.disk.lower);
    assert!(matrix.memory.lower.contains("`attention: qk`"), "{}", matrix.memory.lower);
}

#[test]
fn nothing_is_certain_of_inputs_that_are_not_there_yet() {
    let params = Params { device: Device::Cpu, ..Params::default() };
    let of = |count, sure| CacheTeacher::cost(&params, &imagined(config(), count, 16, sure));
    let certain = |cost: Option<Cost>| {
        let cost = cost.unwrap();
        cost.disk.least > 0 && cost.memory.least > 0
    };
    assert!(certain(of(Some(100), true)));
    assert!(!certain(of(Some(100), false)));
    assert!(!certain(of(None, true)), "there may be one sequence only");
    assert_eq!(CacheTeacher::cost(&params, &Known::default()), None, "and nothing is invented");
}

#[test]
fn operations_of_training_are_six_a_parameter_and_token() {
    let shard = About::Tokens { vocab: Some(512), seq: 32, sequences: Some(100) };
    let known = known(&[("tokens", shard.made(Some(1), true))]);
    let params = |updates| stages::pretrain::Params {
        d_model: 512,
        ffn: 1408,
        layers: 4,
        heads: 8,
        updates,
        batch: 8,
        device: Device::Cpu,
        ..stages::pretrain::Params::default()
    };
    let cost = |updates| Pretrain::cost(&params(updates), &known).unwrap();
    let (once, twice) = (cost(100), cost(200));
    let tokens = 100.0 * 8.0 * 32.0;
    let bytes = once.written.unwrap() as f64;
    let rule = 6.0 * (bytes / 4.0) * tokens;
    let ratio = once.flops.unwrap() / rule;
    assert!((0.97..1.06).contains(&ratio), "{ratio}: attention adds a little");
    assert_eq!(twice.flops.unwrap(), 2.0 * once.flops.unwrap());
    // Weights, two moments and the gradients of two halves of a batch.
    let weights = 4 * (once.memory.least / 20);
    assert!((bytes - weights as f64).abs() < 20_000.0, "{bytes} {weights}: but for the header");
}

#[test]
fn distill_goes_by_both_models_and_by_what_is_trained() {
    let student = Config { layers: vec![MixerKind::Ssm; 2], ..config() };
    let tokens = About::Tokens { vocab: Some(40), seq: 16, sequences: None };
    let known = known(&[
        ("teacher", About::Model(config()).made(Some(10), true)),
        ("student", About::Model(student).made(Some(10), true)),
        ("tokens", tokens.made(None, true)),
    ]);
    let cost = |text: &str| {
        let params: stages::distill::Params = serde_json::from_str(text).unwrap();
        Distill::cost(&params, &known).unwrap()
    };
    let all = cost(r#"{ "device": "cpu", "updates": 10 }"#);
    let mixers = cost(r#"{ "device": "cpu", "updates": 10, "train": "mixers" }"#);
    assert!(mixers.flops.unwrap() < all.flops.unwrap());
    assert!(mixers.memory.least < all.memory.least);
    assert!(all.memory.lower.contains("`train: mixers`"));
    let device = cost(r#"{ "device": "cuda", "updates": 10 }"#);
    let makes: BTreeMap<_, _> = all.makes.clone();
    let parameters = makes["model"][0].bytes.unwrap() / 4;
    assert!(device.device.least > 18 * (parameters - 2000), "{device:?}");
    assert_eq!(all.device.least, 0, "nothing of a device that is not used");
}
