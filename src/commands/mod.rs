//! One file a verb. Here: what they share, from arguments to a checked plan and an open cache.

mod ahead;
mod bench;
mod cache;
mod cancel;
mod chat;
mod check;
mod compare;
mod completions;
mod diff;
mod drawing;
mod export;
mod export_jobs;
mod export_run;
mod forecast;
mod generate;
mod gpus;
mod graph;
mod init;
mod log;
mod man;
mod model_of;
mod plan;
mod priced;
mod push;
mod reference;
mod remote;
mod report;
mod run;
mod runs;
mod schema;
mod show;
mod slurm;
mod speech;
mod stages;
mod status;
mod top;
mod unchanged;
mod why;
mod worker;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ::cache::Cache;
use anyhow::{Context as _, Result, bail};
use clap::Parser as _;
use engine::gpu::Gpus;
use engine::spec::{self, Loaded};
use engine::stage::Registry;

pub use status::at_work;

use crate::cli::{Bench, Cli, Settings, Verb};

/// All stages of this binary.
pub const REGISTRY: Registry = Registry(::stages::ALL);
/// What is run when no file is named.
const EMBEDDED: (&str, &str) = ("mohawk.yaml", include_str!("../../pipelines/mohawk.yaml"));
/// Build of this binary: what leader and worker compare.
pub const BUILD: &str = concat!("pipe ", env!("CARGO_PKG_VERSION"));

/// Whether the cache is to be a group's.
static SHARED: AtomicBool = AtomicBool::new(false);

/// An error of what the user wrote (exit code 2): pipeline, arguments.
#[derive(Debug)]
pub struct Wrong(pub String);

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Wrong {}

/// Runs the verb.
pub fn dispatch(cli: Cli) -> Result<ExitCode> {
    SHARED.store(cli.shared_cache, Ordering::Relaxed);
    choose_locks()?;
    match cli.verb {
        Verb::Init(args) => init::init(args),
        Verb::Run(args) => run::run(args),
        Verb::Plan(args) => plan::plan(args),
        Verb::Push(args) => push::push(args),
        Verb::Pull(args) => push::pull(args),
        Verb::Check(args) => check::check(args),
        Verb::Graph(args) => graph::graph(args),
        Verb::Why(args) => why::why(args),
        Verb::Show(args) => show::show(args),
        Verb::Log(args) => log::log(args),
        Verb::Runs(args) => runs::runs(args),
        Verb::Diff(args) => diff::diff(args),
        Verb::Compare(args) => compare::compare(args),
        Verb::Status(args) => status::status(args),
        Verb::Cancel(args) => cancel::cancel(args),
        Verb::Top(args) => top::top(args),
        Verb::Report(args) => report::report(args),
        Verb::Export(args) => export::export(args),
        Verb::ExportRun(args) => export_run::export_run(args),
        Verb::ExportJobs(args) => export_jobs::export_jobs(args),
        Verb::Generate(args) => generate::generate(args),
        Verb::Chat(args) => chat::chat(args),
        Verb::Bench(Bench::Decode(args)) => bench::decode(*args),
        Verb::Bench(Bench::Gpu(args)) => bench::gpu(args),
        Verb::Cache(verb) => cache::dispatch(verb),
        Verb::Stages(args) => stages::stages(args),
        Verb::Completions(args) => completions::completions(args),
        Verb::Man(args) => man::man(args),
        Verb::Schema => schema::schema(),
        Verb::Worker(args) => worker::worker(args),
    }
}

/// Reads and checks a pipeline; all its errors at once.
pub fn load(file: Option<&Path>, settings: &Settings) -> Result<Loaded> {
    load_for(file, settings, gpus::gpus().clone())
}

/// What the command line says about a pipeline.
fn spec_options(settings: &Settings, gpus: Gpus) -> Result<spec::Options> {
    Ok(spec::Options {
        profiles: settings.profiles.clone(),
        params_files: settings.params.clone(),
        sets: settings.sets.clone(),
        cwd: std::env::current_dir().context("the current directory is gone")?,
        gpus,
    })
}

/// As [`load`], for whoever has these GPUs.
fn load_for(file: Option<&Path>, settings: &Settings, gpus: Gpus) -> Result<Loaded> {
    let options = spec_options(settings, gpus)?;
    let loaded = match file {
        Some(file) => spec::load(file, &options, &REGISTRY),
        None => spec::load_text(EMBEDDED.0, EMBEDDED.1, &options, &REGISTRY),
    };
    let mut loaded =
        loaded.map_err(|errors| Wrong(errors.render(crate::out::Paint::stderr().0)))?;
    // So that `why` finds it again, whatever the directory; the embedded one has none.
    Arc::make_mut(&mut loaded.plan).file =
        file.map(std::path::absolute).transpose()?.unwrap_or_default();
    Ok(loaded)
}

/// Which locks a cache gets, by `$PIPE_CACHE_LOCKS`, and where this machine keeps indexes of those on
/// a network's file system.
fn choose_locks() -> Result<()> {
    use ::cache::Locks;
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
    let locks = match var("PIPE_CACHE_LOCKS").as_deref().map(|v| v.to_string_lossy().into_owned()) {
        None => Locks::Auto,
        Some(text) => match &text[..] {
            "kernel" => Locks::Kernel,
            "leases" => Locks::Leases,
            _ => bail!(Wrong(format!(
                "PIPE_CACHE_LOCKS={text} is no kind of locks\nhint: `kernel` or `leases`; without it the file system decides"
            ))),
        },
    };
    ::cache::set_locks(locks);
    let user = rustix::process::getuid().as_raw();
    let home = var("TMPDIR").map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
    ::cache::set_index_home(home.join(format!("pipe-index-{user}")));
    Ok(())
}

/// Opens the store: `--cache`, else `$PIPE_CACHE`, else the user's cache directory.
pub fn open_cache(wanted: Option<&Path>) -> Result<Cache> {
    let root = cache_root(wanted)?;
    let opened = match SHARED.load(Ordering::Relaxed) {
        true => Cache::open_shared(&root),
        false => Cache::open(&root),
    };
    opened.map_err(|error| Wrong(format!("cannot open the cache: {error}")).into())
}

/// Where the store is, or would be; absolute.
fn cache_root(wanted: Option<&Path>) -> Result<PathBuf> {
    let root = match wanted {
        Some(dir) => dir.to_path_buf(),
        None => default_cache()?,
    };
    Ok(std::path::absolute(&root)?)
}

fn default_cache() -> Result<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(dir) = var("PIPE_CACHE") {
        return Ok(dir);
    }
    if let Some(dir) = var("XDG_CACHE_HOME").filter(|dir| dir.is_absolute()) {
        return Ok(dir.join("pipe"));
    }
    match var("HOME") {
        Some(home) => Ok(home.join(".cache/pipe")),
        None => bail!(Wrong(
            "there is no place for the cache\nhint: set PIPE_CACHE or give --cache DIR".into()
        )),
    }
}

/// Where models come from, by the variables that all tools of the hub know.
fn hub() -> engine::hub::Settings {
    engine::hub::Settings::from_env(&|name| std::env::var_os(name))
}

/// The newest recorded run that was started in this directory. Ids tell the second only, so runs of
/// one second are told apart by their records.
pub fn newest_run(cache: &Cache) -> Result<Option<PathBuf>> {
    let here = std::env::current_dir()?;
    let second = |dir: &Path| {
        dir.file_name().map(|id| id.to_string_lossy().chars().take(15).collect::<String>())
    };
    let mut newest: Option<(f64, PathBuf)> = None;
    for dir in engine::run::all(cache) {
        if newest.as_ref().is_some_and(|(_, found)| second(found) != second(&dir)) {
            break;
        }
        let Ok(info) = engine::run::info(&dir) else { continue };
        let later = newest.as_ref().is_none_or(|(started, _)| info.started_s > *started);
        if info.cwd == here && later {
            newest = Some((info.started_s, dir));
        }
    }
    Ok(newest.map(|(_, dir)| dir))
}

/// The record that is meant: a run's id or its beginning, `@2`, or the newest run here.
fn run_dir(cache: &Cache, run: Option<&str>) -> Result<PathBuf> {
    if let Some(text) = run {
        return engine::history::find(cache, &std::env::current_dir()?, text)
            .map_err(|message| Wrong(message).into());
    }
    newest_run(cache)?.ok_or_else(|| {
        let hint = "hint: run one first, or name a run by its id: `pipe runs --all`";
        Wrong(format!("no pipeline was run in this directory\n{hint}")).into()
    })
}

/// The pipeline a command about a step means: `-f`, else that of the newest run here with the
/// settings it was run with, and those given now on top.
fn load_for_step(file: Option<&Path>, settings: &Settings, cache: &Cache) -> Result<Loaded> {
    if let Some(file) = file {
        return load(Some(file), settings);
    }
    let Some(dir) = newest_run(cache)? else {
        bail!(Wrong("no pipeline was run in this directory\nhint: name one with `-f FILE`".into()));
    };
    let info = engine::run::info(&dir)?;
    let mut all = settings_of(&info.args);
    all.profiles.extend_from_slice(&settings.profiles);
    all.params.extend_from_slice(&settings.params);
    all.sets.extend_from_slice(&settings.sets);
    load(info.file.is_absolute().then_some(info.file.as_path()), &all)
}

/// The settings in the command line of a run.
fn settings_of(args: &[String]) -> Settings {
    let line = std::iter::once("pipe").chain(args.iter().map(String::as_str));
    match Cli::try_parse_from(line) {
        Ok(Cli { verb: Verb::Run(run), .. }) => run.settings,
        _ => Settings::default(),
    }
}

/// The one step that `name` means.
fn one_step(loaded: &Loaded, name: &str) -> Result<usize> {
    match &select(loaded, name)?[..] {
        [step] => Ok(*step),
        many => {
            let names: Vec<String> =
                many.iter().take(4).map(|&s| format!("`{}`", loaded.plan.steps[s].name)).collect();
            bail!(Wrong(format!(
                "`{name}` means {} steps: {}{}\nhint: name one of them",
                many.len(),
                names.join(", "),
                if many.len() > names.len() { ", …" } else { "" }
            )))
        }
    }
}

/// A step has no output of that name.
fn no_port(step: &engine::plan::Step, port: &str) -> Wrong {
    let names: Vec<&str> = step.ports.iter().map(|(name, ..)| name.as_str()).collect();
    let meant = engine::diagnostic::closest(port, names.iter().copied());
    let hint = match meant {
        Some(name) => format!("did you mean `{name}`?"),
        None => {
            let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
            format!("it has {}; choose a model with `--port`, or another step", names.join(", "))
        }
    };
    Wrong(format!("step `{}` has no output `{port}`\nhint: {hint}", step.name))
}

/// All steps that `name` means.
fn select(loaded: &Loaded, name: &str) -> Result<Vec<usize>> {
    loaded.plan.select(name).map_err(|message| Wrong(message).into())
}
