//! The phases as stages, on the device and on the CPU, from equal weights and data: losses agree
//! within bf16, artifacts are the same bits every time, also after an interruption.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use engine::stage::{Cancelled, Context, Report, Reporter, Stage};
use serde_json::Value;
use stages::align::{self, Align, Target};
use stages::assemble::Assemble;
use stages::cache_teacher::{self, CacheTeacher};
use stages::data::shard::ShardWriter;
use stages::distill::{self, Distill, Train};
use stages::models::{Biases, Config, Family, MixerKind, MlpKind, Model, NormKind, Wiring};
use stages::orient::{self, Orient};
use stages::train::device::Device;
use stages::train::philox::Philox;

const VOCAB: usize = 72;
const SEQ: usize = 40;

/// A place with a random teacher and tokens.
struct Place {
    dir: tempfile::TempDir,
}

fn llama() -> Config {
    Config {
        vocab: VOCAB,
        d_model: 64,
        layers: vec![MixerKind::Attention; 2],
        heads: 2,
        kv_heads: 1,
        head_dim: 32,
        ffn: 96,
        rope_theta: 1e4,
        tied: true,
        separator: Some(0),
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
        rotary_dim: Some(16),
        kv_heads: 2,
        tied: false,
        ..llama()
    }
}

impl Place {
    fn new(config: Config) -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        let teacher = Model::new(config).unwrap();
        let mut weights = teacher.init(5);
        // Weights of a trained size, so that attention is not flat.
        weights.flat.iter_mut().for_each(|w| *w *= 2.0);
        teacher.save(&place.path("teacher.safetensors"), &weights).unwrap();
        let mut writer = ShardWriter::create(&place.path("train.bin"), VOCAB, SEQ, 0).unwrap();
        let random = Philox::new(9, "tokens");
        for document in 0..60u64 {
            let word = |i| random.block(document * 100 + i)[0] % (VOCAB as u32 - 1) + 1;
            let tokens: Vec<u32> = (0..30).map(|i| word(i / 2 % 7)).collect();
            writer.document(&tokens).unwrap();
        }
        writer.finish().unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run<S: Stage>(
        &self,
        name: &str,
        params: &S::Params,
        inputs: &[(&str, &[&Path])],
        edit: impl FnOnce(&mut Context),
    ) -> anyhow::Result<Vec<PathBuf>> {
        let mut ctx = Context::local::<S>(&self.path(name), inputs);
        edit(&mut ctx);
        S::run(params, &mut ctx)?;
        Ok(ctx.made().iter().map(|made| made.path.clone()).collect())
    }
}

struct StopAfter(u64, Arc<AtomicBool>);

impl Reporter for StopAfter {
    fn report(&mut self, report: Report) {
        if let Report::Progress { .. } = report {
            self.0 = self.0.saturating_sub(1);
            self.1.store(self.0 == 0, Ordering::Relaxed);
        }
    }
}

fn bytes(paths: &[PathBuf]) -> Vec<Vec<u8>> {
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

fn metrics(paths: &[PathBuf]) -> Value {
    let path = paths.iter().find(|path| path.ends_with("metrics.json")).unwrap();
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn items<'a>(paths: &'a [PathBuf], port: &str) -> Vec<&'a Path> {
    let of_port = |path: &&PathBuf| path.parent().is_some_and(|folder| folder.ends_with(port));
    paths.iter().filter(of_port).map(PathBuf::as_path).collect()
}

/// Every number of both documents, under equal paths, within `tolerance` of the other.
#[track_caller]
fn agree(what: &str, a: &Value, b: &Value, tolerance: f64) {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>(), "{what}");
            // A norm of the gradient differs more than the loss that it is of.
            let most = |k: &str| if k == "gradient" { 5.0 * tolerance } else { tolerance };
            a.iter().for_each(|(k, v)| agree(&format!("{what}.{k}"), v, &b[k], most(k)));
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{what}");
            let each = a.iter().zip(b).enumerate();
            each.for_each(|(i, (a, b))| agree(&format!("{what}[{i}]"), a, b, tolerance));
        }
        (Value::Number(x), Value::Number(y)) => {
            let (x, y) = (x.as_f64().unwrap(), y.as_f64().unwrap());
            assert!((x - y).abs() <= tolerance * (x.abs() + y.abs() + 1e-3), "{what}: {x} and {y}");
        }
        _ => assert_eq!(a, b, "{what}"),
    }
}

/// Runs `params(device, micro_batch)` on both devices; gives what the GPU made.
fn both<S: Stage>(
    place: &Place,
    name: &str,
    params: impl Fn(Device, usize) -> S::Params,
    inputs: &[(&str, &[&Path])],
    tolerance: f64,
) -> Vec<PathBuf> {
    let run = |suffix: &str, params: &S::Params| {
        place.run::<S>(&format!("{name}-{suffix}"), params, inputs, |_| {}).unwrap()
    };
    let cpu = run("cpu", &params(Device::Cpu, 0));
    let gpu = run("gpu", &params(Device::Cuda, 0));
    agree(name, &metrics(&gpu), &metrics(&cpu), tolerance);
    // The same bits again, and when stopped twice on the way.
    let again = run("again", &params(Device::Cuda, 0));
    assert!(bytes(&gpu) == bytes(&again), "{name}: a second run gave other bits");
    let parts = format!("{name}-parts");
    for updates in [3, 4] {
        let stop = |ctx: &mut Context| {
            let flag = ctx.cancel_flag();
            ctx.set_reporter(Box::new(StopAfter(updates + 1, flag)));
        };
        let stopped = place.run::<S>(&parts, &params(Device::Cuda, 0), inputs, stop);
        assert!(stopped.unwrap_err().is::<Cancelled>());
    }
    let resumed = run("parts", &params(Device::Cuda, 0));
    assert!(bytes(&gpu) == bytes(&resumed), "{name}: an interruption changed the bits");
    // Gradients added up over smaller micro-batches.
    let parts = run("micro", &params(Device::Cuda, 2 * SEQ));
    agree(&format!("{name} in micro-batches"), &metrics(&parts), &metrics(&gpu), tolerance);
    gpu
}

fn all_phases(config: Config, tolerance: f64) {
    let place = Place::new(config);
    let (teacher, tokens) = (place.path("teacher.safetensors"), place.path("train.bin"));
    let common = [("teacher", &[&*teacher][..]), ("tokens", &[&*tokens][..])];
    // Long on a device, short on the emulator.
    let (batch, updates, held_out) = (4 * SEQ, if cfg!(feature = "cuda") { 50 } else { 12 }, 8);

    let params = |device, micro_batch| orient::Params {
        device,
        micro_batch,
        batch,
        updates,
        held_out,
        d_state: 16,
        metrics_every: 4,
        checkpoint_every: 5,
        ..Default::default()
    };
    let oriented = both::<Orient>(&place, "orient", params, &common, tolerance);
    let mixers = items(&oriented, "mixer");
    assert_eq!(mixers.len(), 2);

    let inputs = [common[0], common[1], ("mixers", &mixers[..])];
    let params = |device, micro_batch| align::Params {
        device,
        micro_batch,
        batch,
        updates,
        held_out,
        metrics_every: 4,
        checkpoint_every: 5,
        ..Default::default()
    };
    let aligned = both::<Align>(&place, "align", params, &inputs, tolerance);
    let params = |device, micro_batch| align::Params {
        target: Target::Both,
        train_mlp: true,
        ..params(device, micro_batch)
    };
    both::<Align>(&place, "align-both", params, &inputs, tolerance);

    let blocks = items(&aligned, "block");
    let inputs = [common[0], ("blocks", &blocks[..])];
    let student = place.run::<Assemble>("assemble", &Default::default(), &inputs, |_| {}).unwrap();
    let inputs = [common[0], common[1], ("student", &[&*student[0]][..])];
    let params = |device, micro_batch| distill::Params {
        device,
        micro_batch,
        batch,
        updates,
        held_out,
        metrics_every: 4,
        checkpoint_every: 5,
        ..Default::default()
    };
    both::<Distill>(&place, "distill", params, &inputs, tolerance);
    let params = |device, micro_batch| distill::Params {
        train: Train::Mixers,
        ..params(device, micro_batch)
    };
    both::<Distill>(&place, "distill-mixers", params, &inputs, tolerance);
    let params = |device, micro_batch| distill::Params {
        labels: 0.4,
        train: Train::All,
        ..params(device, micro_batch)
    };
    both::<Distill>(&place, "distill-labels", params, &inputs, tolerance);
}

#[test]
fn phases_of_a_llama_agree_with_the_cpu_and_repeat_to_the_bit() {
    all_phases(llama(), 0.04);
}

#[test]
fn phases_of_a_phi_agree_with_the_cpu_and_repeat_to_the_bit() {
    all_phases(phi(), 0.04);
}

#[test]
fn cached_signals_serve_the_gpu_too() {
    let place = Place::new(llama());
    let (teacher, tokens) = (place.path("teacher.safetensors"), place.path("train.bin"));
    let common = [("teacher", &[&*teacher][..]), ("tokens", &[&*tokens][..])];
    let params = cache_teacher::Params { sequences: 24, ..Default::default() };
    let inputs = [("model", &[&*teacher][..]), common[1]];
    let cached = place.run::<CacheTeacher>("cache", &params, &inputs, |_| {}).unwrap();
    let signals = items(&cached, "layer");
    let (batch, updates, held_out) = (4 * SEQ, 6, 8);
    let params = orient::Params {
        device: Device::Cuda,
        sequences: 24,
        batch,
        updates,
        held_out,
        d_state: 16,
        ..Default::default()
    };
    let streamed = place.run::<Orient>("streamed", &params, &common, |_| {}).unwrap();
    let inputs = [common[0], ("signals", &signals[..])];
    let orient = place.run::<Orient>("cached", &params, &inputs, |_| {}).unwrap();
    agree("orient", &metrics(&orient), &metrics(&streamed), 0.02);
    let params =
        align::Params { device: Device::Cuda, batch, updates, held_out, ..Default::default() };
    let aligned = place.run::<Align>("aligned", &params, &inputs, |_| {}).unwrap();
    let params = align::Params { sequences: 24, ..params };
    let streamed = place.run::<Align>("aligned-streamed", &params, &common, |_| {}).unwrap();
    agree("align", &metrics(&aligned), &metrics(&streamed), 0.02);
}
