//! Toy stages that die in all ways, and a bench to run them on.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Result, bail};
use cache::Cache;
use engine::early::Early;
use engine::event::{Event, Failure};
use engine::executor::{self, Options, Setting};
use engine::gpu::{Gpu, Gpus};
use engine::pool::{Crew, Launcher};
use engine::spec;
use engine::stage::{Context, DeviceFault, Entry, In, Out, Ports, Registry, Stage};
use rustix::process::{Signal, getpid, kill_process};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

pub const BUILD: &str = "test";

/// What every toy takes.
#[derive(Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Makes another step of it.
    pub text: String,
    /// Milliseconds to sleep.
    pub ms: u64,
}

macro_rules! toy {
    ($type:ident, $name:literal, $run:expr) => {
        struct $type;
        impl Stage for $type {
            const NAME: &'static str = $name;
            const VERSION: u32 = 1;
            const DOC: &'static str = "a toy";
            type Params = Params;
            fn ports() -> Ports {
                const OUTPUTS: &[Out] = &[Out::one("text", "text.txt", "a text")];
                const INPUTS: &[In] = &[In::many("parts", "texts").optional()];
                Ports { inputs: INPUTS, outputs: OUTPUTS }
            }
            fn run(params: &Params, ctx: &mut Context) -> Result<()> {
                let run: fn(&Params, &mut Context) -> Result<()> = $run;
                run(params, ctx)
            }
        }
    };
}

fn write(ctx: &mut Context, text: String) -> Result<()> {
    Ok(std::fs::write(ctx.output("text")?, text)?)
}

fn sleep(ms: u64) {
    std::thread::sleep(Duration::from_millis(ms));
}

fn kill(signal: Signal) -> ! {
    loop {
        // The first may only reset a handler.
        let _ = kill_process(getpid(), signal);
        sleep(20);
    }
}

// Which process it was, and what that was started with.
toy!(Who, "who", |params, ctx| {
    sleep(params.ms);
    let gpus = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_else(|_| "-".into());
    write(ctx, format!("{gpus} {}", std::process::id()))
});

toy!(Abort, "abort", |_, _| std::process::abort());

toy!(Segfault, "segfault", |_, _| kill(Signal::SEGV));

// Fails the first time, and then is `who`.
toy!(FaultOnce, "fault_once", |params, ctx| {
    if ctx.checkpoint_latest().is_none() {
        ctx.checkpoint_save(1, |_| Ok(()))?;
        let message = "an illegal address".to_string();
        return Err(DeviceFault { op: "ssd_scan".into(), message }.into());
    }
    Who::run(params, ctx)
});

toy!(AbortOnce, "abort_once", |params, ctx| {
    if ctx.checkpoint_latest().is_none() {
        ctx.checkpoint_save(1, |_| Ok(()))?;
        std::process::abort();
    }
    Who::run(params, ctx)
});

/// What a checkpoint holds, once there is one.
fn resumed(ctx: &mut Context) -> Option<Result<()>> {
    let latest = ctx.checkpoint_latest()?;
    let held = std::fs::read_to_string(latest.dir.join("state"));
    let text = held.map(|state| format!("from {}: {state}", latest.position));
    Some(text.map_err(Into::into).and_then(|text| write(ctx, text)))
}

// Killed while it writes its second checkpoint.
toy!(KilledWriting, "killed_writing", |_, ctx| {
    if let Some(done) = resumed(ctx) {
        return done;
    }
    ctx.checkpoint_save_in_background(1, |dir| Ok(std::fs::write(dir.join("state"), "whole")?))?;
    ctx.checkpoint_save_in_background(2, |dir| {
        std::fs::write(dir.join("state"), "ha")?;
        kill(Signal::KILL)
    })?;
    ctx.checkpoint_save_in_background(3, |_| bail!("it never came to this"))
});

// Fails while a checkpoint is being written: by an error, or by a panic.
toy!(FailsMeanwhile, "fails_meanwhile", |params, ctx| {
    if let Some(done) = resumed(ctx) {
        return done;
    }
    ctx.checkpoint_save_in_background(7, |dir| {
        sleep(200);
        Ok(std::fs::write(dir.join("state"), "late")?)
    })?;
    match params.text.as_str() {
        "panic" => panic!("no luck"),
        text => bail!("{text}"),
    }
});

// Does its work well, but its last checkpoint is not written.
toy!(BadCheckpoint, "bad_checkpoint", |_, ctx| {
    ctx.checkpoint_save_in_background(5, |_| {
        sleep(50);
        bail!("the disk is full")
    })?;
    write(ctx, "done".into())
});

pub const REGISTRY: Registry = Registry(&[
    Entry::of::<Who>(),
    Entry::of::<Abort>(),
    Entry::of::<Segfault>(),
    Entry::of::<FaultOnce>(),
    Entry::of::<AbortOnce>(),
    Entry::of::<KilledWriting>(),
    Entry::of::<FailsMeanwhile>(),
    Entry::of::<BadCheckpoint>(),
    Entry::of::<engine::command::Command>(),
]);

/// A directory with a cache. One at a time: a run ends all processes below this one.
pub struct Bench {
    dir: TempDir,
    cache: Cache,
    _alone: MutexGuard<'static, ()>,
}

/// What came of a run.
pub struct Ran {
    /// What each step made, by its name.
    pub texts: BTreeMap<String, String>,
    /// Name, kind, message, whether it was tried again.
    pub failures: Vec<(String, Failure, String, bool)>,
}

impl Bench {
    pub fn new() -> Bench {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(|e| e.into_inner());
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let cache = Cache::open(dir.path().join("cache")).unwrap();
        Bench { dir, cache, _alone: alone }
    }

    /// Runs with so many GPUs, going on after failures.
    pub fn run(&self, yaml: &str, gpus: u32) -> Ran {
        self.run_with(yaml, gpus, None)
    }

    /// A worker that has no step yet.
    pub fn early(&self) -> Early {
        Early::start(&args(), self.cache.root()).unwrap()
    }

    /// As [`Bench::run`], with a worker that was started before.
    pub fn run_with(&self, yaml: &str, gpus: u32, early: Option<Early>) -> Ran {
        let gpu = |index| Gpu {
            uuid: format!("fake-{index}"),
            index,
            name: "Fake".into(),
            capability: (9, 0),
            memory: 80 << 30,
            free: Arc::new(|| None),
        };
        let list: Vec<Gpu> = (0..gpus).map(gpu).collect();
        let options = spec::Options {
            cwd: self.dir.path().to_path_buf(),
            gpus: Gpus { list: list.clone(), ..Gpus::none("there is none") },
            ..spec::Options::default()
        };
        let plan = spec::load_text("p.yaml", yaml, &options, &REGISTRY);
        let plan = plan.unwrap_or_else(|e| panic!("{e}")).plan;
        let hub = engine::hub::Settings::new("http://127.0.0.1:1", "/nowhere");
        let setting = Setting {
            registry: REGISTRY,
            cache: &self.cache,
            crew: Crew::Local(Launcher::Processes { args: args(), early }),
            build: BUILD,
            run: "run",
            hub: &hub,
            remote: None,
            interrupts: &AtomicU32::new(0),
            leave: &AtomicBool::new(false),
        };
        let options = Options {
            jobs: 4,
            keep_going: true,
            gpus: list,
            gpu_locks: self.dir.path().to_path_buf(),
            ..Options::default()
        };
        let mut events = Vec::new();
        executor::run(&plan, setting, &options, &mut |event| events.push(event)).unwrap();
        let name = |step: usize| plan.steps[step].name.clone();
        let mut ran = Ran { texts: BTreeMap::new(), failures: Vec::new() };
        for event in events {
            match event {
                Event::Finished { step, outputs, .. } => {
                    let text = std::fs::read_to_string(self.cache.object(&outputs[0].digest));
                    ran.texts.insert(name(step), text.unwrap().trim().to_string());
                }
                Event::Failed { step, failure, message, retry, .. } => {
                    ran.failures.push((name(step), failure, message, retry));
                }
                _ => {}
            }
        }
        ran
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// What makes this binary a worker.
fn args() -> Vec<String> {
    ["serve", "--exact", "--nocapture", "--test-threads=1"].map(String::from).to_vec()
}

impl Ran {
    /// What `who` said of its process: the GPUs and the number.
    pub fn who(&self, step: &str) -> (&str, &str) {
        self.texts[step].split_once(' ').unwrap()
    }
}
