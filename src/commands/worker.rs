//! `pipe worker`: what leaders, and jobs of a cluster, start. Not for people.

use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use anyhow::{Context as _, Result, anyhow};
use cache::remote::{Remote, Settings};
use engine::cluster::agent::{self, Setting};
use engine::cluster::node::{self, NO_CACHE};
use engine::cluster::pilot;
use engine::cluster::records::Place;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

use super::{BUILD, REGISTRY};
use crate::cli::Worker;

/// How often an agent was asked to go.
static SIGNALS: AtomicU32 = AtomicU32::new(0);

pub fn worker(args: Worker) -> Result<ExitCode> {
    match (&args.list, &args.pilot) {
        (Some(list), _) if args.remote.is_some() => far(&args, list)?,
        (Some(list), _) => agent::job(setting(&args)?, list, task())?,
        (None, Some(queue)) => pilot::pilot(setting(&args)?, queue)?,
        (None, None) => {
            if args.patient {
                // Its agent knows better than a signal to all of the job when to stop.
                signal_hook::flag::register(SIGTERM, Arc::new(AtomicBool::new(false)))?;
            }
            engine::worker::main(&args.store, REGISTRY, BUILD)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A job that shares no file system with its leader.
fn far(args: &Worker, list: &Path) -> Result<()> {
    let url = args.remote.clone().unwrap_or_default();
    let run = args.run.clone().unwrap_or_default();
    let told = std::fs::read_to_string(list).context("cannot read what the job's script says")?;
    let mut settings = Settings::new(url);
    settings.timeouts.longest_pause = node::ASKED_AGAIN;
    let remote = Remote::open(settings, &|name| std::env::var_os(name))?;
    let store = node_cache(&args.store.to_string_lossy())?;
    let setting = Setting { store, ..setting(args)? };
    node::job(setting, &remote, &run, &told, task())?;
    tidy_output();
    Ok(())
}

/// Where this node's cache is: `text` with the job's variables, or a directory of the user's own on
/// a disk of the node.
fn node_cache(text: &str) -> Result<PathBuf> {
    if text != NO_CACHE {
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        return node::expand(text, &var).map(PathBuf::from).map_err(|why| anyhow!(why));
    }
    let user = rustix::process::getuid().as_raw();
    let dir = std::env::temp_dir().join(format!("pipe-{user}"));
    // Others can write beside it.
    match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => Err(e),
        _ => std::fs::symlink_metadata(&dir),
    }
    .map_err(anyhow::Error::from)
    .and_then(|meta| match meta.is_dir() && meta.uid() == user {
        true => Ok(dir.clone()),
        false => Err(anyhow!("it is somebody else's")),
    })
    .with_context(|| {
        format!("the node's cache cannot be {}: name one under `node_cache:`", dir.display())
    })
}

/// Removes the file that this job's output goes to, if nothing was printed.
fn tidy_output() {
    let Ok(path) = std::fs::read_link("/proc/self/fd/1") else { return };
    let ours = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pipe-"));
    let empty = std::fs::symlink_metadata(&path).is_ok_and(|m| m.is_file() && m.len() == 0);
    if ours && empty {
        let _ = std::fs::remove_file(path);
    }
}

/// What this job is, by the variables that Slurm sets.
fn setting(args: &Worker) -> Result<Setting> {
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGUSR1, SIGINT])?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            SIGNALS.fetch_add(1, Ordering::Relaxed);
        }
    });
    let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let job = match (var("SLURM_ARRAY_JOB_ID"), var("SLURM_ARRAY_TASK_ID")) {
        (Some(array), Some(task)) => format!("{array}_{task}"),
        _ => var("SLURM_JOB_ID").unwrap_or_else(|| format!("process-{}", std::process::id())),
    };
    let own = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    let host = var("SLURMD_NODENAME").unwrap_or_else(own);
    Ok(Setting {
        store: args.store.clone(),
        build: BUILD.into(),
        place: Place { job, host },
        worker: vec!["worker".into(), "--patient".into()],
        signals: &SIGNALS,
    })
}

/// Its number in the array; a job that is no array is its only task.
fn task() -> usize {
    let text = std::env::var("SLURM_ARRAY_TASK_ID").unwrap_or_default();
    text.parse().unwrap_or(0)
}
