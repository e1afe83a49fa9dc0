//! `pretrain` from outside: it learns, it resumes bit for bit, threads change nothing, NaN stops it.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use engine::stage::{Cancelled, Context, Diverged, Report, Reporter, Stage};
use serde_json::Value;
use stages::data::shard::ShardWriter;
use stages::pretrain::{Params, Pretrain};

fn params() -> Params {
    Params {
        layers: 2,
        d_model: 16,
        heads: 2,
        kv_heads: Some(1),
        ffn: 24,
        batch: 3,
        updates: 50,
        lr: 1e-2,
        checkpoint_every: 15,
        ..Params::default()
    }
}

/// Sequences of 17 tokens in which each token tells the next.
fn shard(dir: &Path) -> PathBuf {
    let path = dir.join("tokens.bin");
    let mut writer = ShardWriter::create(&path, 23, 17, 0).unwrap();
    for start in 0..60 {
        let document: Vec<u32> = (0..16).map(|i| 1 + (start * 5 + i * 3) % 22).collect();
        writer.document(&document).unwrap();
    }
    writer.finish().unwrap();
    path
}

fn context(dir: &Path, tokens: &Path) -> Context {
    std::fs::create_dir_all(dir).unwrap();
    Context::local::<Pretrain>(dir, &[("tokens", &[tokens]), ("holdout", &[tokens])])
}

fn bytes(dir: &Path) -> (Vec<u8>, Vec<u8>) {
    let read = |name: &str| std::fs::read(dir.join("out").join(name)).unwrap();
    (read("model/model.safetensors"), read("metrics/metrics.json"))
}

/// Calls its function at the second metric, at update 40.
struct AtSecond<F>(usize, F);

impl<F: FnMut() + Send> Reporter for AtSecond<F> {
    fn report(&mut self, report: Report) {
        self.0 += usize::from(matches!(report, Report::Metric { .. }));
        if self.0 == 2 {
            (self.1)();
        }
    }
}

#[test]
fn resumed_equals_uninterrupted_and_threads_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = shard(dir.path());
    let whole = dir.path().join("whole");
    Pretrain::run(&params(), &mut context(&whole, &tokens)).unwrap();

    let stopped = dir.path().join("stopped");
    let mut ctx = context(&stopped, &tokens);
    let flag = ctx.cancel_flag();
    ctx.set_reporter(Box::new(AtSecond(0, move || flag.store(true, Ordering::Relaxed))));
    let error = Pretrain::run(&params(), &mut ctx).unwrap_err();
    assert!(error.is::<Cancelled>(), "{error:#}");
    assert_eq!(ctx.checkpoint_latest().unwrap().position, 40);
    let mut ctx = context(&stopped, &tokens);
    ctx.set_threads(1);
    Pretrain::run(&params(), &mut ctx).unwrap();
    assert!(bytes(&whole) == bytes(&stopped), "a cancelled run went on differently");

    // A crash at update 40 falls back to the checkpoint of update 30, within a point's window.
    let crashed = dir.path().join("crashed");
    let mut ctx = context(&crashed, &tokens);
    ctx.set_reporter(Box::new(AtSecond(0, || std::panic::resume_unwind(Box::new("crash")))));
    let run = std::panic::AssertUnwindSafe(|| Pretrain::run(&params(), &mut ctx));
    assert!(std::panic::catch_unwind(run).is_err());
    let mut ctx = context(&crashed, &tokens);
    assert_eq!(ctx.checkpoint_latest().unwrap().position, 30);
    Pretrain::run(&params(), &mut ctx).unwrap();
    assert!(bytes(&whole) == bytes(&crashed), "a crashed run went on differently");

    let single = dir.path().join("single");
    let mut ctx = context(&single, &tokens);
    ctx.set_threads(1);
    Pretrain::run(&params(), &mut ctx).unwrap();
    assert!(bytes(&whole) == bytes(&single), "one thread gives other bytes than two");
}

#[test]
fn the_loss_falls_and_metrics_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = shard(dir.path());
    let mut ctx = context(dir.path(), &tokens);
    Pretrain::run(&Params { updates: 150, ..params() }, &mut ctx).unwrap();
    let metrics: Value = serde_json::from_slice(&bytes(dir.path()).1).unwrap();
    assert_eq!(metrics["kind"], "training");
    let curve = metrics["curve"].as_array().unwrap();
    let loss = |point: &Value| point[1]["loss"].as_f64().unwrap();
    assert!(loss(&curve[0]) > 2.0, "{}", curve[0]);
    assert!(loss(curve.last().unwrap()) < 0.9, "{}", curve.last().unwrap());
    assert_eq!(curve.last().unwrap()[0], 150);
    assert!(metrics["final"]["holdout_loss"].as_f64().unwrap() < 0.9);
}

#[test]
fn a_rate_that_explodes_stops_the_step_with_its_cause() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = shard(dir.path());
    let mut ctx = context(dir.path(), &tokens);
    let wild = Params { lr: 1e30, warmup: 0.0, checkpoint_every: 1, ..params() };
    let error = Pretrain::run(&wild, &mut ctx).unwrap_err();
    assert!(error.is::<Diverged>(), "{error:#}");
    let text = error.to_string();
    for part in ["the teacher", "diverged at update", "last good checkpoint", "`lr`"] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn wrong_sizes_are_complaints_by_name() {
    let wrong = Params { heads: 3, lr: -1.0, ..params() };
    let names: Vec<String> = Pretrain::check(&wrong).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["heads", "lr"]);
}
