//! `cache_teacher` on the device against the CPU.

use std::path::{Path, PathBuf};

use engine::stage::{Context, Stage};
use engine::tensors::Tensors;
use stages::cache_teacher::{CacheTeacher, Number, Params, Signal};
use stages::models::{Biases, Config, Family, MixerKind, Model};
use stages::train::device::Device;
use stages::train::logits::{Targets, TopLogits};
use stages::train::signals::{AttentionForm, Signals};

use crate::pretrain::shard;
use crate::support::close;

const SEQ: usize = 40;
const COUNT: usize = 5;
const TOP: usize = 6;

fn teacher(dir: &Path) -> PathBuf {
    let config = Config {
        family: Family::Phi,
        bias: Biases { qkv: true, out: true, mlp: true, head: true },
        vocab: 64,
        d_model: 64,
        layers: vec![MixerKind::Attention; 2],
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        ffn: 96,
        rope_theta: 100.0,
        tied: false,
        separator: Some(0),
        ..Config::default()
    };
    let model = Model::new(config).unwrap();
    let mut weights = model.init(3);
    let wide = |(i, w): (usize, &mut f32)| {
        let bias = if *w == 0.0 { 0.02 * (i % 3) as f32 } else { 0.0 };
        *w = half::bf16::from_f32(*w + bias).to_f32();
    };
    weights.flat.iter_mut().enumerate().for_each(wide);
    let path = dir.join("teacher.safetensors");
    model.save(&path, &weights).unwrap();
    path
}

fn run(dir: &Path, name: &str, params: &Params) -> anyhow::Result<PathBuf> {
    let (model, tokens, place) = (teacher(dir), shard(dir), dir.join(name));
    std::fs::create_dir_all(&place)?;
    let inputs: [(&str, &[&Path]); 2] = [("model", &[&model]), ("tokens", &[&tokens])];
    let mut ctx = Context::local::<CacheTeacher>(&place, &inputs);
    ctx.set_threads(3);
    CacheTeacher::run(params, &mut ctx)?;
    Ok(place.join("out"))
}

fn params(device: Device, dtype: Number) -> Params {
    let keep = vec![Signal::Hidden, Signal::Attention, Signal::Logits];
    Params { sequences: COUNT, keep, top_k: TOP, dtype, device, ..Params::default() }
}

fn values(out: &Path, layer: usize, name: &str) -> Vec<f32> {
    let path = out.join(format!("layer/layer-{layer}.safetensors"));
    let signals = Signals::open(Tensors::open(&path).unwrap()).unwrap();
    let len: usize = signals.shape.per_sequence(name).iter().product();
    let read = |sequence| {
        let mut values = vec![f32::NAN; len];
        if name == "starts" {
            let mut starts = vec![0; len];
            signals.starts(sequence, &mut starts).unwrap();
            return starts.iter().map(|start| *start as f32).collect();
        }
        signals.values(name, sequence, &mut values).unwrap();
        values
    };
    (0..COUNT).flat_map(read).collect()
}

fn top(out: &Path) -> Vec<Targets> {
    let open = |name: &str| Tensors::open(&out.join(name)).unwrap();
    let (logits, tokens) = (open("logits/logits.safetensors"), open("tokens/tokens.safetensors"));
    let top = TopLogits::open(logits, tokens, 64).unwrap();
    let one = |sequence| {
        let mut targets = Targets::default();
        top.targets(sequence, &mut targets);
        targets
    };
    (0..COUNT).map(one).collect()
}

#[test]
fn signals_are_those_of_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    let cpu = run(dir.path(), "cpu", &params(Device::Cpu, Number::F32)).unwrap();
    let full = run(dir.path(), "f32", &params(Device::Cuda, Number::F32)).unwrap();
    let half = run(dir.path(), "bf16", &params(Device::Cuda, Number::Bf16)).unwrap();
    for layer in 0..2 {
        assert_eq!(values(&full, layer, "starts"), values(&cpu, layer, "starts"));
        for name in ["hidden", "next", "qk", "lse"] {
            let (got, wanted) = (values(&full, layer, name), values(&cpu, layer, name));
            let rms = |v: &[f32]| (v.iter().map(|x| x * x).sum::<f32>() / v.len() as f32).sqrt();
            let off: Vec<f32> = got.iter().zip(&wanted).map(|(a, b)| a - b).collect();
            assert!(
                rms(&off) <= 1e-2 * rms(&wanted),
                "{name} of layer {layer} is {} off",
                rms(&off)
            );
            close(&format!("{name} of layer {layer}"), &got, &wanted, 5e-2);
            assert!(got == values(&half, layer, name), "{name}: bf16 holds what the device has");
        }
    }
    let read = |out: &Path| std::fs::read(out.join("tokens/tokens.safetensors")).unwrap();
    assert!(read(&cpu) == read(&full), "other sequences were taken");
    let (mut equal, mut all) = (0, 0);
    for (got, wanted) in top(&full).iter().zip(top(&cpu)) {
        close("tail", &got.tail_l, &wanted.tail_l, 2e-2);
        let p = |of: &Targets| of.log_p_lk.iter().map(|p| p.to_f32()).collect::<Vec<_>>();
        close("log-probabilities", &p(got), &p(&wanted), 2e-2);
        equal += got.ids_lk.iter().zip(&wanted.ids_lk).filter(|(a, b)| a == b).count();
        all += got.ids_lk.len();
    }
    assert!(all == COUNT * SEQ * TOP && equal * 10 > all * 8, "{equal} of {all} tokens are equal");
}

#[test]
fn logits_alone_need_no_layer_files_and_matrices_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let both = params(Device::Cuda, Number::F32);
    let alone = Params { keep: vec![Signal::Logits], ..both.clone() };
    let (alone, all) =
        (run(dir.path(), "a", &alone).unwrap(), run(dir.path(), "b", &both).unwrap());
    assert!(!alone.join("layer").exists());
    let read = |out: &Path| std::fs::read(out.join("logits/logits.safetensors")).unwrap();
    assert!(read(&alone) == read(&all));
    let matrices = Params { attention: AttentionForm::Matrix, ..both };
    let error = run(dir.path(), "c", &matrices).unwrap_err().to_string();
    assert!(error.contains("`attention: qk`") && error.contains("`device: cpu`"), "{error}");
}
