//! `pipe worker`: what leaders, and jobs of a cluster, start. Not for people.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use anyhow::Result;
use engine::cluster::agent::{self, Setting};
use engine::cluster::pilot;
use engine::cluster::records::Place;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

use super::{BUILD, REGISTRY};
use crate::cli::Worker;

/// How often an agent was asked to go.
static SIGNALS: AtomicU32 = AtomicU32::new(0);

pub fn worker(args: Worker) -> Result<ExitCode> {
    match (&args.list, &args.pilot) {
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
