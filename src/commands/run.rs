//! `pipe run`: wires plan, cache, workers, record and console; the engine decides.

use std::collections::{BTreeSet, HashMap};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, bail};
use engine::estimate::Estimate;
use engine::event::{Event, Stamped, Summary};
use engine::executor::{self, Budget, Left, Options, Outcome, Setting, Why};
use engine::forecast::Seen;
use engine::lookup;
use engine::plan::Plan;
use engine::pool::Launcher;
use engine::price;
use engine::run::{Asked, Past, Record};
use engine::spec::Loaded;

use super::priced;
use crate::cli::Run;
use crate::console::Console;
use crate::machine;
use crate::out::{self, duration};

/// Results of a stage that times are expected from.
const RECENT: usize = 50;
/// How often the user asked to stop.
static INTERRUPTS: AtomicU32 = AtomicU32::new(0);

pub fn run(args: Run) -> Result<ExitCode> {
    let loaded = super::load(args.file.as_deref(), &args.settings)?;
    let mut options = options(&args, &loaded)?;
    let cache = super::open_cache(args.settings.cache.as_deref())?;
    let remote = super::remote::open(&args.remote)?;
    look_ahead(&loaded.plan, &cache, &mut options, args.budget, remote.is_some())?;
    let asked = Asked {
        file: args.file.as_ref().map(std::path::absolute).transpose()?.unwrap_or_default(),
        cwd: std::env::current_dir()?,
        args: std::env::args().skip(1).collect(),
    };
    let mut record = Record::create(&cache, &loaded.plan, &loaded.sources, asked, super::BUILD)?;
    let before = || expected(&loaded.plan, &cache);
    let mut console = Console::new(&loaded.plan, (args.quiet, args.json), before, &options.gpus);
    listen()?;

    let mut broken = false;
    let run_id = record.info.id.clone();
    let hub = super::hub();
    let setting = Setting {
        registry: super::REGISTRY,
        cache: &cache,
        launcher: Launcher::Processes { args: vec!["worker".into()] },
        build: super::BUILD,
        run: &run_id,
        hub: &hub,
        remote: remote.as_ref(),
        interrupts: &INTERRUPTS,
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
    if !args.json {
        tell_left(&loaded.plan, &outcome.left, args.budget);
    }
    console.last_line(&outcome.summary);
    kept?;
    match outcome.unkept {
        Some(error) => Err(error.into()),
        None => Ok(exit_code(&outcome.summary)),
    }
}

/// Before anything runs: refuses steps that cannot fit this machine, and makes a budget of `seconds`.
/// Where results may come from a remote, nobody knows yet what will run, so that nothing is refused.
fn look_ahead(
    plan: &Plan,
    cache: &cache::Cache,
    options: &mut Options,
    seconds: Option<f64>,
    remote: bool,
) -> Result<()> {
    if remote && seconds.is_none() {
        return Ok(());
    }
    let steps = options.selection(plan);
    // The hub is asked by the run itself, once.
    let seen = Seen { files: lookup::user_files(plan, &steps, cache), hub: Default::default() };
    let forced = |step: usize| options.force.contains(&step);
    let wanted = priced::Wanted { reasons: false, times: seconds.is_some() };
    let priced = priced::priced(plan, &steps, cache, &seen, &forced, wanted)?;
    let mine = |step: usize| options.only.is_none_or(|only| only == step);
    let refused: Vec<String> = priced
        .refusals
        .iter()
        .filter(|refusal| !remote && mine(refusal.step))
        .map(|refusal| priced::refused(plan, refusal))
        .collect();
    if !refused.is_empty() {
        bail!(super::Wrong(refused.join("\n\n")));
    }
    options.budget = seconds.map(|seconds| {
        let known = priced.estimates.iter();
        let known = known.filter_map(|(step, e)| Some((*step, Estimate::seconds(e)?)));
        Budget { seconds, estimates: known.collect() }
    });
    Ok(())
}

/// What was left for want of time, and why.
fn tell_left(plan: &Plan, left: &[Left], budget: Option<f64>) {
    const MOST: usize = 12;
    for Left { step, why } in left.iter().take(MOST) {
        let name = out::clean(&plan.steps[*step].name);
        let budget = budget.unwrap_or(0.0);
        out::message(match why {
            Why::Cut => {
                format!(
                    "left: `{name}` was stopped when time was up; it goes on from its checkpoint"
                )
            }
            Why::TooLong { takes, .. } if *takes > budget => format!(
                "left: `{name}` takes about {}, more than the whole budget of {}",
                duration(*takes),
                duration(budget)
            ),
            Why::TooLong { takes, left } => format!(
                "left: `{name}` takes about {}, and {} were left",
                duration(*takes),
                duration(*left)
            ),
        });
    }
    if left.len() > MOST {
        out::message(format!("left: {} more", left.len() - MOST));
    }
    if !left.is_empty() {
        out::message("the budget is used up; run again to go on with what is left");
    }
}

/// Seconds that each step takes, as far as anything like it was ever done.
fn expected(plan: &Plan, cache: &cache::Cache) -> Vec<Option<f64>> {
    let mut known: HashMap<&str, Vec<price::Past>> = HashMap::new();
    let mut all = Vec::new();
    for step in &plan.steps {
        let look = || {
            let entries = cache.recent(&step.stage, &step.name, RECENT);
            entries.into_iter().filter_map(price::Past::of).collect()
        };
        let past = known.entry(&step.stage).or_insert_with(look);
        all.push(price::price(step, past, &|_| None).map(|price| price.seconds));
    }
    all
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
        summary if summary.left > 0 => ExitCode::from(3),
        _ => ExitCode::SUCCESS,
    }
}

fn options(args: &Run, loaded: &Loaded) -> Result<Options> {
    let mut options = Options { keep_going: args.keep_going, ..Options::default() };
    options.jobs = args.jobs.unwrap_or(options.jobs);
    options.gpus = super::gpus::gpus().list.clone();
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
    options.memory = machine::memory().unwrap_or(u64::MAX);
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

/// Counts Ctrl-C and SIGTERM.
fn listen() -> Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
        signal_hook::consts::SIGHUP,
    ])
    .context("cannot listen for signals")?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            if INTERRUPTS.fetch_add(1, Ordering::Relaxed) == 0 {
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
