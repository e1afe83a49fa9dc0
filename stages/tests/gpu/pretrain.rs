//! Pretraining on the device against the CPU: losses of a few updates, and the whole step.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use engine::stage::{Cancelled, Context, Report, Reporter, Stage};
use serde_json::Value;
use stages::data::shard::{ShardWriter, TokenShard};
use stages::gpu::launch::Gpu;
use stages::gpu::phases::pretrain::{self, Start};
use stages::models::{Config, Keep, MixerKind, Model, Trained};
use stages::ops::Dims;
use stages::pretrain::{Params, Pretrain};
use stages::train::adamw::{AdamW, Group, Rule};
use stages::train::clip;
use stages::train::device::Device;
use stages::train::language::Language;
use stages::train::run::{Batches, Trainer};

use crate::support::{close, devices, same};

const VOCAB: usize = 64;
const SEQ: usize = 40;

/// Documents of many lengths in which each token tells the next.
pub fn shard(dir: &Path) -> PathBuf {
    let path = dir.join("tokens.bin");
    let mut writer = ShardWriter::create(&path, VOCAB, SEQ, 0).unwrap();
    for start in 0..23u32 {
        let word = |i: u32| 1 + (start * 5 + i * 3) % 63;
        writer.document(&(0..9 + start * 7 % 31).map(word).collect::<Vec<_>>()).unwrap();
    }
    writer.finish().unwrap();
    path
}

fn config(layers: Vec<MixerKind>) -> Config {
    Config {
        vocab: VOCAB,
        d_model: 64,
        layers,
        heads: 2,
        kv_heads: 1,
        head_dim: 32,
        ffn: 96,
        rope_theta: 100.0,
        tied: true,
        separator: Some(0),
        d_state: 16,
        d_conv: 4,
        chunk: 16,
        ..Config::default()
    }
}

const UPDATES: u64 = 3;
const BATCH: usize = 4;
const RATE: f32 = 4e-3;

fn groups(model: &Model) -> Vec<Group> {
    let spans = model.layout.spans(|_| true);
    let decay = |decays: bool| if decays { 0.1 } else { 0.0 };
    spans
        .iter()
        .map(|s| Group { range: s.range.clone(), decay: decay(s.decay), scale: 1.0 })
        .collect()
}

/// Losses and norms of some updates, then the loss on five held-out sequences.
fn on_cpu(model: &Model, shard: &TokenShard) -> Vec<f32> {
    let mut weights = model.init(5);
    let mut optimiser = AdamW::new(model.layout.len(), Rule::default());
    let mut language = Language::new(model, BATCH, SEQ, Keep::Backward);
    let (mut batches, groups) = (Batches::new(9, shard.len(), BATCH), groups(model));
    let mut found = Vec::new();
    for update in 0..UPDATES {
        let picked = batches.at(update);
        language.load(BATCH, |i, out| shard.copy_to(picked[i], out));
        let (loss, _) = language.step(model, &weights, Trained::ALL, 1);
        let grads = &language.grads().flat;
        let norm = clip::norm([&grads[..]]);
        let factor = clip::factor(norm, 1.0).unwrap();
        optimiser.update(&mut weights.flat, grads, &groups, RATE, factor);
        found.extend([loss as f32, norm as f32]);
    }
    let mut sum = 0.0;
    for first in [0, BATCH] {
        language.load(BATCH.min(5 - first), |i, out| shard.copy_to(first + i, out));
        let (mean, count) = language.loss(model, &weights, 1);
        sum += mean * count as f64;
    }
    found.push(sum as f32 / (5.0 * (SEQ - 1) as f32));
    found
}

fn on(gpu: &Gpu, model: &Model, path: &Path, ctx: &Context) -> Vec<f32> {
    let [shard, held] = [(); 2].map(|()| TokenShard::open(path).unwrap());
    let sequences = shard.len();
    let start = Start {
        name: "the model".into(),
        params: model.init(5).flat,
        groups: groups(model),
        rule: Rule::default(),
        clip: 1.0,
    };
    let read = Box::new(move |i: usize, out: &mut [u32]| shard.copy_to(i, out));
    let dims = Dims { batch: BATCH / 2, seq: SEQ };
    let mut driver = pretrain::driver(gpu, model, start, read, (BATCH, dims)).unwrap();
    let mut batches = Batches::new(9, sequences, BATCH);
    for update in 0..UPDATES {
        driver.queue_update(RATE, &batches.at(update)).unwrap();
    }
    let rows = driver.settle(ctx, UPDATES).unwrap();
    let mut found: Vec<f32> = rows.iter().flatten().map(|(_, value)| *value as f32).collect();
    let read = |i: usize, out: &mut [u32]| held.copy_to(i, out);
    let (sum, count) = driver.work.held_out(&mut driver.batch, 5, read).unwrap();
    assert_eq!(count, 5 * (SEQ - 1));
    found.push((sum / count as f64) as f32);
    found
}

#[test]
fn losses_are_those_of_the_cpu() {
    use MixerKind::{Attention, Ssm};
    let dir = tempfile::tempdir().unwrap();
    let path = shard(dir.path());
    let ctx = Context::local::<Pretrain>(dir.path(), &[("tokens", &[&path])]);
    for layers in [vec![Attention, Attention], vec![Ssm, Attention]] {
        let model = Model::new(config(layers)).unwrap();
        let wanted = on_cpu(&model, &TokenShard::open(&path).unwrap());
        let results: Vec<_> = devices().iter().map(|gpu| on(gpu, &model, &path, &ctx)).collect();
        close("losses and norms", &results[0], &wanted, 1e-2);
        assert!(wanted[wanted.len() - 1] < wanted[0], "{wanted:?}");
        same("pretraining", &results);
    }
}

fn params(device: Device) -> Params {
    Params {
        layers: 2,
        d_model: 64,
        heads: 2,
        kv_heads: Some(1),
        ffn: 96,
        batch: 3,
        updates: 6,
        lr: 4e-3,
        checkpoint_every: 4,
        holdout_sequences: 4,
        device,
        ..Params::default()
    }
}

fn context(dir: &Path, tokens: &Path) -> Context {
    std::fs::create_dir_all(dir).unwrap();
    Context::local::<Pretrain>(dir, &[("tokens", &[tokens]), ("holdout", &[tokens])])
}

fn bytes(dir: &Path) -> [Vec<u8>; 2] {
    ["model/model.safetensors", "metrics/metrics.json"]
        .map(|name| std::fs::read(dir.join("out").join(name)).unwrap())
}

/// Calls its function at the first metric, after update 1.
struct AtFirst<F>(bool, F);

impl<F: FnMut() + Send> Reporter for AtFirst<F> {
    fn report(&mut self, report: Report) {
        if matches!(report, Report::Metric { .. }) && !std::mem::replace(&mut self.0, true) {
            (self.1)();
        }
    }
}

#[test]
fn the_step_gives_the_figures_of_the_cpu_and_goes_on_where_it_was_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = shard(dir.path());
    let run = |name: &str, device| {
        let place = dir.path().join(name);
        Pretrain::run(&params(device), &mut context(&place, &tokens)).unwrap();
        bytes(&place)
    };
    let (cpu, gpu) = (run("cpu", Device::Cpu), run("gpu", Device::Cuda));
    let [cpu, found]: [Value; 2] =
        [&cpu[1], &gpu[1]].map(|bytes| serde_json::from_slice(bytes).unwrap());
    let last = |name: &str| [&cpu, &found].map(|m| m["final"][name].as_f64().unwrap());
    for name in ["updates", "skipped", "holdout_tokens"] {
        assert_eq!(last(name)[0], last(name)[1], "{name}");
    }
    let [own, other] = last("holdout_loss");
    assert!((own - other).abs() < 1e-2 * own, "{own} {other}");
    for name in ["loss", "grad_norm", "lr"] {
        let point = found["curve"].as_array().unwrap().last().unwrap();
        assert!(point[1][name].as_f64().unwrap() > 0.0, "{point}");
    }

    let stopped = dir.path().join("stopped");
    let mut ctx = context(&stopped, &tokens);
    let flag = ctx.cancel_flag();
    ctx.set_reporter(Box::new(AtFirst(false, move || flag.store(true, Ordering::Relaxed))));
    let error = Pretrain::run(&params(Device::Cuda), &mut ctx).unwrap_err();
    assert!(error.is::<Cancelled>(), "{error:#}");
    ctx.checkpoint_wait().unwrap();
    assert!(ctx.checkpoint_latest().unwrap().position < 4);
    Pretrain::run(&params(Device::Cuda), &mut context(&stopped, &tokens)).unwrap();
    assert!(gpu == bytes(&stopped), "a stopped run went on differently");
}

#[test]
fn sizes_that_kernels_are_not_made_for_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = shard(dir.path());
    let odd = Params { heads: 4, ..params(Device::Cuda) };
    let error = Pretrain::run(&odd, &mut context(dir.path(), &tokens)).unwrap_err().to_string();
    assert!(error.contains("heads are 16 wide") && error.contains("`device: cpu`"), "{error}");
}
