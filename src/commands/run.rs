//! `pipe run`: wires plan, cache, workers, record and console; the engine decides.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail};
use engine::event::{Event, Stamped, Summary};
use engine::executor::{self, Options, Outcome, Setting};
use engine::pool::{Crew, Launcher};
use engine::run::{Asked, Past, Record};
use engine::spec::Loaded;

use super::slurm::Slurmed;
use crate::cli::{Place, Run};
use crate::console::Console;
use crate::out;

/// How often the user asked to stop.
static INTERRUPTS: AtomicU32 = AtomicU32::new(0);

/// Whether jobs of a cluster go on when the run is stopped.
static LEAVE: AtomicBool = AtomicBool::new(false);

pub fn run(args: Run) -> Result<ExitCode> {
    if args.detach {
        return detach(&args);
    }
    let slurm = super::slurm::prepare(&args)?;
    let gpus = slurm.as_ref().map_or_else(|| super::gpus::gpus().clone(), Slurmed::gpus);
    let loaded = super::load_for(args.file.as_deref(), &args.settings, gpus)?;
    let mut options = options(&args, &loaded)?;
    let cache = super::open_cache(args.settings.cache.as_deref())?;
    options.cluster = slurm.as_ref().map(|slurm| slurm.options(&args, &loaded, &cache));
    let asked = Asked {
        file: args.file.as_ref().map(std::path::absolute).transpose()?.unwrap_or_default(),
        cwd: std::env::current_dir()?,
        args: std::env::args().skip(1).collect(),
    };
    let mut record = Record::create(&cache, &loaded.plan, &loaded.sources, asked, super::BUILD)?;
    let mut console = Console::new(&loaded.plan, args.quiet, args.json);
    let mut broken = false;
    let run_id = record.info.id.clone();
    listen(slurm.is_some().then(|| run_id.clone()))?;
    let crew = match slurm {
        Some(slurm) => slurm.crew(&record, &cache)?,
        None => Crew::Local(Launcher::Processes { args: vec!["worker".into()] }),
    };
    let hub = super::hub();
    let remote = super::remote::open(&args.remote)?;
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
    let outcome = executor::run(&loaded.plan, setting, &options, &mut |event: Event| {
        let t = record.write(&event).unwrap_or_else(|error| {
            if !std::mem::replace(&mut broken, true) {
                console.note(&format!("the record of this run is incomplete: {error}"));
            }
            0.0
        });
        console.show(&Stamped { t, event });
    })?;
    let dir = record.dir.clone();
    drop(record);
    if outcome.summary.ran + outcome.summary.failed > 0 {
        draw(&dir, &cache, &mut console);
    }
    let kept = deliver(&loaded, &cache, &outcome, &mut console);
    if (outcome.summary.failed > 0 || outcome.unkept.is_some())
        && let Some(full) = cache::disk::trouble(cache.root())
    {
        out::message(full);
    }
    console.last_line(&outcome.summary);
    kept?;
    match outcome.unkept {
        Some(error) => Err(error.into()),
        None => Ok(exit_code(&outcome.summary)),
    }
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

/// Draws the report beside the record. Its failure is told and ends nothing.
fn draw(dir: &std::path::Path, cache: &cache::Cache, console: &mut Console) {
    let drawn = Past::load(dir).and_then(|past| {
        let path = dir.join("report.html");
        cache.write(&path, engine::report::html(&past, cache).as_bytes())?;
        Ok(path)
    });
    match drawn {
        Ok(path) => console.note(&format!("the report is at {}", path.display())),
        Err(error) => console.note(&format!("the report could not be drawn: {error:#}")),
    }
}

fn exit_code(summary: &Summary) -> ExitCode {
    match summary {
        summary if summary.interrupted => ExitCode::from(130),
        summary if summary.failed > 0 => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}

fn options(args: &Run, loaded: &Loaded) -> Result<Options> {
    let mut options = Options { keep_going: args.keep_going, ..Options::default() };
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
    options.memory = memory().unwrap_or(u64::MAX);
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

/// Bytes of memory of this machine.
fn memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
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
    console: &mut Console,
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
