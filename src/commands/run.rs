//! `pipe run`: wires plan, cache, workers, record and console; the engine decides.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail};
use engine::early::Early;
use engine::event::{Event, Stamped, Summary};
use engine::executor::{self, Options, Outcome, Setting};
use engine::plan::Plan;
use engine::pool::{Crew, Launcher};
use engine::repeat::Earlier;
use engine::run::{Asked, Record};
use engine::spec::Loaded;

use super::drawing::Drawing;
use super::slurm::Slurmed;
use super::{ahead, unchanged};
use crate::cli::{Place, Run};
use crate::console::Console;
use crate::machine;
use crate::out;

/// What this binary is told to be a worker of a run.
const WORKER: &str = "worker";

/// How often the user asked to stop.
static INTERRUPTS: AtomicU32 = AtomicU32::new(0);

/// Whether jobs of a cluster go on when the run is stopped.
static LEAVE: AtomicBool = AtomicBool::new(false);

pub fn run(args: Run) -> Result<ExitCode> {
    if args.detach {
        return detach(&args);
    }
    let (memo, early) = (unchanged::memo(&args)?, unchanged::cache(&args)?);
    let earlier = unchanged::earlier(&args, early.as_ref(), memo.as_deref()).map(Arc::new);
    if repeated(&args, early.as_ref(), earlier.as_deref())? {
        return Ok(ExitCode::SUCCESS);
    }
    // Something has changed, so somebody will be needed.
    let worker = earlier.as_ref().zip(early.as_ref()).and_then(|(_, cache)| worker(cache));
    let slurm = super::slurm::prepare(&args)?;
    let (loaded, like) = match &slurm {
        Some(slurm) => (super::load_for(args.file.as_deref(), &args.settings, slurm.gpus())?, None),
        None => unchanged::load(&args, early.as_ref(), memo.as_deref(), earlier.as_deref())?,
    };
    let mut options = options(&args, memo.clone(), &loaded)?;
    (options.plan_of, options.earlier) = (like.clone(), earlier);
    let open = || super::open_cache(args.settings.cache.as_deref());
    let cache = early.map_or_else(open, Ok)?;
    options.cluster = slurm.as_ref().map(|slurm| slurm.options(&args, &loaded, &cache));
    let remote = super::remote::open(&args.remote)?;
    slurm.iter().try_for_each(|slurm| slurm.check(remote.as_ref()))?;
    let elsewhere = remote.is_some() || slurm.is_some();
    ahead::look(&loaded.plan, &cache, &mut options, args.budget, elsewhere)?;
    let made = (&loaded, like.as_deref());
    let mut record = unchanged::record(&cache, made, asked(&args)?, memo.as_deref())?;
    let before = || ahead::expected(&loaded.plan, &cache);
    let mut console = Console::new(&loaded.plan, (args.quiet, args.json), before, &options.gpus);
    let mut broken = false;
    let run_id = record.info.id.clone();
    listen(slurm.is_some().then(|| run_id.clone()))?;
    let crew = crew(slurm, worker, &record, &cache, remote.as_ref())?;
    let hub = super::hub();
    let setting = Setting {
        registry: super::REGISTRY,
        cache: &cache,
        crew,
        build: super::BUILD,
        run: &run_id,
        hub: &hub,
        remote: remote.as_ref(),
        interrupts: &INTERRUPTS,
        leave: &LEAVE,
    };
    let mut drawing = Drawing::of(&record.dir, loaded.plan.clone());
    let mut outcome = executor::run(&loaded.plan, setting, &options, &mut |event: Event| {
        drawing.hear(&event);
        let t = record.write(&event).unwrap_or_else(|error| {
            if !std::mem::replace(&mut broken, true) {
                console.note(&format!("the record of this run is incomplete: {error}"));
            }
            0.0
        });
        console.show(&Stamped { t, event });
    })?;
    drop(record);
    drawing.draw(&outcome.summary, &cache, &mut console);
    let kept = deliver(&loaded, &cache, &outcome, &mut console);
    if let Some(found) = outcome.found.take().filter(|_| kept.is_ok()) {
        let (plan, ids) = (&loaded.plan, (&*run_id, like.as_deref().unwrap_or(&run_id)));
        found.keep(&cache, plan, ids, &loaded.sources, &|| unchanged::gpus_of(plan));
    }
    last_words(&args, &loaded.plan, &cache, &outcome, &mut console);
    drop(console);
    // A great plan takes longer to take apart than the process has left.
    std::mem::forget((std::mem::take(&mut outcome.steps), loaded));
    kept?;
    let code = exit_code(&outcome.summary);
    outcome.unkept.map_or(Ok(code), |error| Err(error.into()))
}

/// What is said at the end of a run.
fn last_words(
    args: &Run,
    plan: &Plan,
    cache: &cache::Cache,
    outcome: &Outcome,
    console: &mut Console<'_>,
) {
    if (outcome.summary.failed > 0 || outcome.unkept.is_some())
        && let Some(full) = cache::disk::trouble(cache.root())
    {
        out::message(full);
    }
    if !args.json {
        ahead::tell_left(plan, &outcome.left, args.budget);
    }
    console.last_line(&outcome.summary);
}

/// Whether there was nothing to do, which then is told and recorded.
fn repeated(args: &Run, cache: Option<&cache::Cache>, earlier: Option<&Earlier>) -> Result<bool> {
    let Some((cache, earlier)) = cache.zip(earlier) else { return Ok(false) };
    let Some(summary) = unchanged::repeat(args, cache, earlier)? else { return Ok(false) };
    let none = Plan::default();
    let mut console = Console::new(&none, (args.quiet, args.json), Vec::new, &[]);
    console.last_line(&summary);
    Ok(true)
}

/// Who runs the steps.
fn crew(
    slurm: Option<Slurmed>,
    early: Option<Early>,
    record: &Record,
    cache: &cache::Cache,
    remote: Option<&cache::remote::Remote>,
) -> Result<Crew> {
    match slurm {
        Some(slurm) => slurm.crew(record, cache, remote),
        None => Ok(Crew::Local(Launcher::Processes { args: vec![WORKER.into()], early })),
    }
}

/// A worker that starts while the plan is read. Without it, one is started when it is needed.
fn worker(cache: &cache::Cache) -> Option<Early> {
    Early::start(&[WORKER.into()], cache.root()).ok()
}

/// Lets a job lead the run.
fn detach(args: &Run) -> Result<ExitCode> {
    if args.on != Place::Slurm {
        let hint = "hint: without a cluster, `nohup pipe run … &` leaves a run to itself";
        bail!(super::Wrong(format!("`--detach` goes with `--on slurm`\n{hint}")));
    }
    // What is wrong with the pipeline is told here, not in a log.
    let gpus = match super::slurm::prepare(args)? {
        Some(slurm) => slurm.gpus(),
        None => super::gpus::gpus().clone(),
    };
    super::load_for(args.file.as_deref(), &args.settings, gpus)?;
    super::slurm::detach(args)
}

fn exit_code(summary: &Summary) -> ExitCode {
    match summary {
        summary if summary.interrupted => ExitCode::from(130),
        summary if summary.failed > 0 => ExitCode::FAILURE,
        summary if summary.left > 0 => ExitCode::from(3),
        _ => ExitCode::SUCCESS,
    }
}

/// What is to be recorded of the question.
pub(super) fn asked(args: &Run) -> Result<Asked> {
    Ok(Asked {
        file: args.file.as_ref().map(std::path::absolute).transpose()?.unwrap_or_default(),
        cwd: std::env::current_dir()?,
        args: std::env::args().skip(1).collect(),
    })
}

fn options(args: &Run, memo: Option<String>, loaded: &Loaded) -> Result<Options> {
    let mut options = Options { keep_going: args.keep_going, memo, ..Options::default() };
    options.paranoid = args.paranoid;
    options.jobs = args.jobs.unwrap_or(options.jobs);
    if args.on == Place::Local {
        options.gpus = super::gpus::gpus().list.clone();
    }
    for name in &args.until {
        options.until.extend(super::select(loaded, name)?);
    }
    let all = |names: &[String]| -> Result<BTreeSet<usize>> {
        let mut found = BTreeSet::new();
        for name in names {
            found.extend(super::select(loaded, name)?);
        }
        Ok(found)
    };
    options.force = all(&args.force)?;
    options.fresh = &all(&args.fresh)? | &options.force;
    options.force.extend(all(&args.from)?);
    if let Some(name) = &args.only {
        options.only = Some(super::one_step(loaded, name)?);
    }
    options.remote_required = args.remote_required;
    if args.on != Place::Local {
        return Ok(options);
    }
    options.memory = machine::memory();
    for step in &loaded.plan.steps {
        if step.resources.memory > options.memory {
            bail!(super::Wrong(format!(
                "`{}` wants {} of memory and this machine has {}\nhint: lower `resources.memory` of the step",
                step.name,
                out::bytes(step.resources.memory),
                out::bytes(options.memory)
            )));
        }
    }
    Ok(options)
}

/// Counts Ctrl-C and SIGTERM. Of the run `on_cluster`, jobs may go on.
fn listen(on_cluster: Option<String>) -> Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
    ])
    .context("cannot listen for signals")?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            if let Some(run) = &on_cluster {
                super::slurm::interrupted(run, &INTERRUPTS, &LEAVE);
            } else if INTERRUPTS.fetch_add(1, Ordering::Relaxed) == 0 {
                out::message("stopping after a checkpoint; once more stops at once");
            }
        }
    });
    Ok(())
}

/// Copies what `outputs:` names, where its step is done.
fn deliver(
    loaded: &Loaded,
    cache: &cache::Cache,
    outcome: &Outcome,
    console: &mut Console<'_>,
) -> Result<()> {
    for output in &loaded.plan.outputs {
        let given = engine::outputs::deliver(output, &loaded.plan, &outcome.steps, cache)
            .with_context(|| format!("output `{}`", output.name))?;
        if given {
            console.note(&format!("`{}` is at {}", output.name, output.to.display()));
        }
    }
    Ok(())
}
