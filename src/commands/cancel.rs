//! `pipe cancel`: ends a run and its jobs, also one whose leader is gone or on another machine.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use engine::cluster::batch::{Batch, Cancel, State, Status};
use engine::cluster::journal::{self, Journal};
use engine::history;

use super::Wrong;
use crate::cli::look;
use crate::out;

/// A leader that is asked to end may take so long.
const PATIENCE: Duration = Duration::from_secs(40);

pub fn cancel(args: look::Cancel) -> Result<ExitCode> {
    let cache = super::open_cache(args.cache.as_deref())?;
    let dir = super::run_dir(&cache, args.run.as_deref())?;
    let arrays = || journal::arrays(&journal::read(&dir));
    let alive = history::alive(&dir);
    if arrays().is_empty() && !journal::is_open(&dir) {
        let what =
            if alive { "runs on one machine: end it by Ctrl-C there" } else { "has no jobs" };
        return Err(anyhow!(Wrong(format!("this run {what}"))));
    }
    journal::ask_to_end(&dir)?;
    let started = Instant::now();
    while history::alive(&dir) && started.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(200));
    }
    // What the leader, if there was one, has not ended itself.
    journal::end_pilots(&dir);
    // Read now, since it may have submitted some meanwhile.
    let names: Vec<String> = arrays().into_iter().map(|(name, _)| name).collect();
    let mut slurm = super::slurm::of_jobs();
    let all = slurm.poll(&names).map_err(|why| anyhow!("the jobs were not ended: {why}"))?;
    let live = |s: &&Status| matches!(s.state, State::Pending | State::Running);
    let ids: Vec<String> = all.iter().filter(live).map(|status| status.id.clone()).collect();
    if !ids.is_empty() {
        slurm
            .cancel(&ids, Cancel::Now)
            .map_err(|why| anyhow!("some jobs were not ended: {why}"))?;
    }
    Journal::close(&dir);
    let told = if alive { "the run was stopped" } else { "the run had ended" };
    out::line(format!("{told}; {} of its jobs cancelled", ids.len()));
    Ok(ExitCode::SUCCESS)
}
