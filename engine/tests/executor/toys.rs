//! Toy stages, a bench to run them on, and what must hold of every run's events.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use anyhow::{Result, bail};
use cache::Cache;
use engine::event::{Event, Summary};
use engine::executor::{self, Options, Setting};
use engine::gpu::{Gpu, Gpus};
use engine::lookup;
use engine::plan::Plan;
use engine::pool::{Crew, Launcher};
use engine::spec;
use engine::stage::{
    Context, Cpu, DeviceFault, Diverged, Entry, In, Out, OutOfDeviceMemory, Ports, Registry, Stage,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

/// What every toy takes.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Put after the inputs; the message of what fails.
    pub text: String,
    /// So many characters of the result are kept.
    pub take: usize,
    /// Milliseconds to sleep first.
    pub ms: u64,
    /// Numbers of a list.
    pub layers: Vec<u32>,
}

impl Default for Params {
    fn default() -> Params {
        Params { text: String::new(), take: 1 << 20, ms: 0, layers: Vec::new() }
    }
}

const PARTS: &[In] = &[In::many("parts", "texts").optional()];
const TEXT: &[Out] = &[Out::one("text", "text.txt", "a text")];

fn joined(params: &Params, ctx: &Context) -> Result<String> {
    let mut all = String::new();
    for input in ctx.inputs("parts") {
        all += &std::fs::read_to_string(&input.path)?;
    }
    all += &params.text;
    Ok(all.chars().take(params.take).collect())
}

macro_rules! toy {
    ($type:ident, $name:literal, $outputs:expr, $run:expr) => {
        struct $type;
        impl Stage for $type {
            const NAME: &'static str = $name;
            const VERSION: u32 = 1;
            const DOC: &'static str = "a toy";
            type Params = Params;
            fn ports() -> Ports {
                Ports { inputs: PARTS, outputs: $outputs }
            }
            fn run(params: &Params, ctx: &mut Context) -> Result<()> {
                let run: fn(&Params, &mut Context) -> Result<()> = $run;
                run(params, ctx)
            }
        }
    };
}

toy!(Concat, "concat", TEXT, |params, ctx| {
    std::thread::sleep(std::time::Duration::from_millis(params.ms));
    let text = joined(params, ctx)?;
    Ok(std::fs::write(ctx.output("text")?, text)?)
});

toy!(Fail, "fail", TEXT, |params, _| bail!("{}", params.text));

toy!(Panic, "panic", TEXT, |params, _| panic!("{}", params.text));

toy!(Diverge, "diverge", TEXT, |params, _| Err(Diverged(params.text.clone()).into()));

toy!(Fault, "fault", TEXT, |params, _| {
    let fault = DeviceFault { op: "ssd_scan".into(), message: params.text.clone() };
    Err(anyhow::Error::from(fault).context("in update 3"))
});

toy!(Memory, "memory", TEXT, |params, _| { Err(OutOfDeviceMemory(params.text.clone()).into()) });

toy!(Lazy, "lazy", TEXT, |_, _| Ok(()));

// Never the same bytes twice.
toy!(Noise, "noise", TEXT, |_, ctx| {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    Ok(std::fs::write(ctx.output("text")?, count.to_string())?)
});

// What a user does who saves the file while the step reads it.
toy!(Meddle, "meddle", TEXT, |params, ctx| {
    let text = joined(params, ctx)?;
    std::fs::write(ctx.path("parts")?, format!("{text} and more"))?;
    Ok(std::fs::write(ctx.output("text")?, text)?)
});

/// Says how many threads it may keep busy; by default all.
struct Threads;

impl Stage for Threads {
    const NAME: &'static str = "threads";
    const VERSION: u32 = 1;
    const DOC: &'static str = "a toy";
    const CPU: Cpu = Cpu::All;
    type Params = Params;
    fn ports() -> Ports {
        Ports { inputs: PARTS, outputs: TEXT }
    }
    fn run(_: &Params, ctx: &mut Context) -> Result<()> {
        let threads = ctx.threads().to_string();
        Ok(std::fs::write(ctx.output("text")?, threads)?)
    }
}

const LAYERS: &[Out] = &[Out::many("layer", "layer.txt", "one text a layer")];
toy!(Layers, "layers", LAYERS, |params, ctx| {
    for &layer in &params.layers {
        std::fs::write(ctx.output_item("layer", layer)?, format!("{}{layer}", params.text))?;
    }
    Ok(())
});

pub const REGISTRY: Registry = Registry(&[
    Entry::of::<Concat>(),
    Entry::of::<Fail>(),
    Entry::of::<Panic>(),
    Entry::of::<Diverge>(),
    Entry::of::<Fault>(),
    Entry::of::<Memory>(),
    Entry::of::<Lazy>(),
    Entry::of::<Noise>(),
    Entry::of::<Meddle>(),
    Entry::of::<Threads>(),
    Entry::of::<Layers>(),
]);

/// A directory with a cache.
pub struct Bench {
    dir: TempDir,
    pub cache: Cache,
}

/// One run: its plan, its events in order, its totals.
pub struct Ran {
    pub plan: Arc<Plan>,
    pub events: Vec<Event>,
    pub summary: Summary,
}

impl Bench {
    pub fn new() -> Bench {
        // In memory where there is such a place: what a disk makes of a sync is the cache's to test.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let cache = Cache::open(dir.path().join("cache")).unwrap();
        Bench { dir, cache }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn plan(&self, yaml: &str) -> Arc<Plan> {
        self.plan_for(yaml, &[])
    }

    /// The plan for an executor that has these GPUs.
    pub fn plan_for(&self, yaml: &str, gpus: &[Gpu]) -> Arc<Plan> {
        let cwd = self.path().to_path_buf();
        let gpus = Gpus { list: gpus.to_vec(), ..Gpus::none("there is none") };
        let options = spec::Options { cwd, gpus, ..spec::Options::default() };
        spec::load_text("p.yaml", yaml, &options, &REGISTRY).unwrap_or_else(|e| panic!("{e}")).plan
    }

    pub fn run(&self, yaml: &str) -> Ran {
        self.run_with(yaml, |_, _| {})
    }

    /// Runs and checks what must hold of every run.
    pub fn run_with(&self, yaml: &str, change: impl FnOnce(&Plan, &mut Options)) -> Ran {
        run_on(self.plan(yaml), &self.cache, change)
    }
}

/// Runs `plan` on `cache` and checks what must hold of every run.
pub fn run_on(plan: Arc<Plan>, cache: &Cache, change: impl FnOnce(&Plan, &mut Options)) -> Ran {
    let mut options = Options { jobs: 4, ..Options::default() };
    change(&plan, &mut options);
    let interrupts = AtomicU32::new(0);
    let hub = engine::hub::Settings::new("http://127.0.0.1:1", "/nowhere");
    let setting = Setting {
        registry: REGISTRY,
        cache,
        crew: Crew::Local(Launcher::Threads(REGISTRY)),
        build: "test",
        run: "run",
        hub: &hub,
        remote: None,
        interrupts: &interrupts,
        leave: &AtomicBool::new(false),
    };
    let mut events = Vec::new();
    let outcome = executor::run(&plan, setting, &options, &mut |event| events.push(event)).unwrap();
    let ran = Ran { plan, events, summary: outcome.summary };
    ran.check(&options);
    ran
}

impl Ran {
    fn names(&self, wanted: impl Fn(&Event) -> Option<usize>) -> Vec<&str> {
        let steps = self.events.iter().filter_map(wanted);
        steps.map(|step| self.plan.steps[step].name.as_str()).collect()
    }

    /// Steps in the order in which they were launched.
    pub fn launched(&self) -> Vec<&str> {
        self.names(|e| match e {
            Event::Launched { step, .. } => Some(*step),
            _ => None,
        })
    }

    /// Steps that were skipped, each with the one that failed.
    pub fn skipped(&self) -> Vec<&str> {
        self.names(|e| match e {
            Event::Skipped { step, .. } => Some(*step),
            _ => None,
        })
    }

    /// Whom steps waited for.
    pub fn waited(&self) -> Vec<(&str, &str)> {
        let waits = |e| match e {
            &Event::Waiting { step, ref holder } => {
                Some((self.plan.steps[step].name.as_str(), holder.as_str()))
            }
            _ => None,
        };
        self.events.iter().filter_map(waits).collect()
    }

    /// The failures: name, kind, message, whether it was tried again.
    pub fn failures(&self) -> Vec<(&str, engine::event::Failure, &str, bool)> {
        let failed = |e| match e {
            &Event::Failed { step, failure, ref message, retry, .. } => {
                Some((self.plan.steps[step].name.as_str(), failure, message.as_str(), retry))
            }
            _ => None,
        };
        self.events.iter().filter_map(failed).collect()
    }

    /// Digests of what there is in the end, by step, port and index.
    pub fn digests(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        for event in &self.events {
            if let Event::Cached { step, outputs, .. } | Event::Finished { step, outputs, .. } =
                event
            {
                for o in outputs {
                    let name = &self.plan.steps[*step].name;
                    all.insert(format!("{name} {} {:?}", o.port, o.index), o.digest.to_string());
                }
            }
        }
        all
    }

    /// The text that `step` made.
    pub fn text(&self, cache: &Cache, step: &str) -> String {
        let digest = &self.digests()[&format!("{step} text None")];
        std::fs::read_to_string(cache.object(&digest.parse().unwrap())).unwrap()
    }

    /// One end for every step, nothing before what it needs, totals as counted, all durable.
    fn check(&self, options: &Options) {
        let steps = options.selection(&self.plan);
        assert!(matches!(self.events[0], Event::Started { steps: n, .. } if n == steps.len()));
        assert!(matches!(self.events.last(), Some(Event::Ended { .. })));
        let (mut ends, mut running) = (HashMap::new(), HashSet::new());
        let (mut durable, mut counted) = (HashSet::new(), Summary::default());
        for event in &self.events {
            let (step, good) = match event {
                Event::Launched { step, .. } => {
                    for needed in lookup::upstream(&self.plan, *step) {
                        assert_eq!(ends.get(&needed), Some(&true), "{event:?}");
                    }
                    assert!(running.insert(*step) && !ends.contains_key(step), "{event:?}");
                    continue;
                }
                Event::Failed { step, retry: true, .. } => {
                    assert!(running.remove(step));
                    continue;
                }
                Event::Durable { step } => {
                    assert!(durable.insert(*step) && ends.get(step) == Some(&true));
                    continue;
                }
                Event::Finished { step, .. } => {
                    counted.ran += 1;
                    assert!(running.remove(step), "{event:?}");
                    (*step, true)
                }
                Event::Cached { step, .. } => {
                    counted.cached += 1;
                    (*step, true)
                }
                Event::Failed { step, .. } => {
                    counted.failed += 1;
                    running.remove(step);
                    (*step, false)
                }
                Event::Skipped { step, .. } => {
                    counted.skipped += 1;
                    (*step, false)
                }
                _ => continue,
            };
            assert_eq!(ends.insert(step, good), None, "a second end: {event:?}");
        }
        assert!(running.is_empty() && ends.len() == steps.len());
        let kept =
            |e: &&Event| matches!(e, Event::Finished { step, .. } if self.plan.steps[*step].cache);
        assert_eq!(durable.len(), self.events.iter().filter(kept).count());
        let totals = |s: &Summary| (s.cached, s.ran, s.failed, s.skipped);
        assert_eq!(totals(&counted), totals(&self.summary));
    }
}
