//! What a shell completes: flags and commands as the parser knows them, and steps, profiles and runs
//! of the pipeline at hand. Answers whatever it can read, and says nothing of what it cannot.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Arg, Command, CommandFactory as _};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use clap_complete::env::{CompleteEnv, Shells};
use engine::plan::Plan;
use engine::run::Past;

use crate::cli::{Cli, Settings};
use crate::commands;

/// Set by the scripts of `pipe completions`.
const ASKED: &str = "PIPE_COMPLETE";

/// Answers a shell and ends, if it was one that asked.
pub fn answer() {
    CompleteEnv::with_factory(command).var(ASKED).complete();
}

/// The script that makes `shell` ask us.
pub fn script(shell: &str) -> std::io::Result<String> {
    let shells = Shells::builtins();
    let mut script = Vec::new();
    if let Some(completer) = shells.completer(shell) {
        completer.write_registration(ASKED, "pipe", "pipe", "pipe", &mut script)?;
    }
    Ok(String::from_utf8_lossy(&script).into_owned())
}

fn command() -> Command {
    known(Cli::command())
}

fn known(command: Command) -> Command {
    command.mut_args(arg).mut_subcommands(known)
}

/// What values an argument takes, by its name.
fn arg(arg: Arg) -> Arg {
    let candidates: fn() -> Vec<CompletionCandidate> = match arg.get_id().as_str() {
        "step" | "steps" | "until" | "only" | "from" | "force" | "fresh" => steps,
        "profiles" => profiles,
        "run" | "a" | "b" => runs,
        "name" => stages,
        "port" => ports,
        _ => return arg,
    };
    arg.add(ArgValueCandidates::new(candidates))
}

fn candidates(names: impl IntoIterator<Item = String>) -> Vec<CompletionCandidate> {
    names.into_iter().map(CompletionCandidate::new).collect()
}

/// The pipeline file in the line that is being written.
fn file() -> Option<PathBuf> {
    let yaml = |path: &Path| path.extension().is_some_and(|e| e == "yaml" || e == "yml");
    std::env::args_os().map(PathBuf::from).find(|path| yaml(path) && path.is_file())
}

/// The plan at hand: of the file that is named, else of the newest run here, else the embedded one.
fn plan() -> Option<Arc<Plan>> {
    let load = |file: Option<&Path>| Some(commands::load(file, &Settings::default()).ok()?.plan);
    if let Some(file) = file() {
        return load(Some(&file));
    }
    let newest = || {
        let cache = commands::open_cache(None).ok()?;
        Some(Past::load(&commands::newest_run(&cache).ok()??).ok()?.plan)
    };
    newest().or_else(|| load(None))
}

/// Steps in the form that no shell has to quote, where there is one; and those with a matrix whole.
fn steps() -> Vec<CompletionCandidate> {
    let Some(plan) = plan() else { return Vec::new() };
    let mut names: Vec<String> = Vec::new();
    for step in &plan.steps {
        if !step.coords.is_empty()
            && names.last().is_none_or(|last| *last != step.group)
            && !names.iter().any(|name| *name == step.group)
        {
            names.push(step.group.to_string());
        }
        let one = step.name.strip_suffix(']').filter(|_| step.coords.len() == 1);
        let plain =
            one.and_then(|name| name.split_once('[')).map(|(group, at)| format!("{group}@{at}"));
        names.push(plain.unwrap_or_else(|| step.name.clone()));
    }
    candidates(names)
}

/// Output ports of the step that stands in the line; of all steps, if none does.
fn ports() -> Vec<CompletionCandidate> {
    let Some(plan) = plan() else { return Vec::new() };
    let words: Vec<String> = std::env::args().collect();
    let named = |step: &&engine::plan::Step| {
        let short = step.name.replace('[', "@").replace(']', "");
        words.iter().any(|word| [&*step.name, &*step.group, &*short].contains(&word.as_str()))
    };
    let mut steps: Vec<_> = plan.steps.iter().filter(named).collect();
    if steps.is_empty() {
        steps = plan.steps.iter().collect();
    }
    let names: BTreeSet<&String> =
        steps.iter().flat_map(|step| step.ports.iter()).map(|(name, ..)| name).collect();
    candidates(names.into_iter().cloned())
}

fn profiles() -> Vec<CompletionCandidate> {
    let loaded = commands::load(file().as_deref(), &Settings::default());
    candidates(loaded.map(|loaded| loaded.profiles).unwrap_or_default())
}

/// Runs of this directory by their short names, and all by their ids.
fn runs() -> Vec<CompletionCandidate> {
    let (Ok(cache), Ok(cwd)) = (commands::open_cache(None), std::env::current_dir()) else {
        return Vec::new();
    };
    let here = engine::history::here(&cache, &cwd).len().min(20);
    let ids = engine::run::all(&cache);
    let ids = ids.iter().filter_map(|dir| Some(dir.file_name()?.to_string_lossy().into_owned()));
    candidates((1..=here).map(|number| format!("@{number}")).chain(ids))
}

fn stages() -> Vec<CompletionCandidate> {
    candidates(::stages::ALL.iter().map(|stage| stage.name.to_string()))
}
