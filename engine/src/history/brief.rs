//! A run by its first and last lines, so that a thousand of them are listed at once.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::Result;
use cache::Presence;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::event::{Event, Stamped, Summary};
use crate::run::{self, EVENTS, Info};

/// Enough for the last line of any record that has an end.
const TAIL: u64 = 64 << 10;

/// How a run stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It ended, and nothing failed.
    Done,
    /// It ended, and something failed.
    Failed,
    /// It was stopped by its user, or its process is gone and left no end.
    Interrupted,
    /// Its process is at work.
    Running,
}

impl State {
    /// For people.
    pub fn word(self) -> &'static str {
        match self {
            State::Done => "done",
            State::Failed => "failed",
            State::Interrupted => "interrupted",
            State::Running => "running",
        }
    }
}

/// A run in short.
#[derive(Clone, Debug)]
pub struct Brief {
    /// What was asked.
    pub info: Info,
    /// How it stands.
    pub state: State,
    /// Totals, if it came to its end.
    pub summary: Option<Summary>,
    /// Wall time; of a run without an end, until the last that is known of it.
    pub seconds: f64,
    /// Its directory.
    pub dir: PathBuf,
}

/// Reads the run in `dir`.
pub fn brief(info: Info, dir: PathBuf) -> Result<Brief> {
    // Before the end is read: a run that ends in between has its end on disk.
    let running = alive(&dir);
    let last = last(&dir.join(EVENTS));
    let summary = match &last {
        Some(Stamped { event: Event::Ended { summary }, .. }) => Some(summary.clone()),
        _ => None,
    };
    let state = match &summary {
        None if running => State::Running,
        None => State::Interrupted,
        Some(summary) if summary.failed > 0 => State::Failed,
        Some(summary) if summary.interrupted || summary.left > 0 => State::Interrupted,
        Some(_) => State::Done,
    };
    let seconds = match (&summary, state) {
        (Some(summary), _) => summary.seconds,
        (None, State::Running) => (run::now() - info.started_s).max(0.0),
        (None, _) => last.map_or(0.0, |last| last.t),
    };
    Ok(Brief { info, state, summary, seconds, dir })
}

/// Whether the process that records into `dir` is there: it holds a lock of the kernel's on its
/// events, which ends with it, or, on a network's file system, a lease.
pub fn alive(dir: &Path) -> bool {
    let leased = |root: &Path| Presence::there(root, &dir.join(EVENTS));
    if let Some(there) = dir.ancestors().nth(2).and_then(leased) {
        return there;
    }
    let Ok(file) = File::open(dir.join(EVENTS)) else { return false };
    matches!(flock(&file, FlockOperation::NonBlockingLockShared), Err(Errno::WOULDBLOCK))
}

/// The last whole event.
fn last(path: &Path) -> Option<Stamped> {
    let mut file = File::open(path).ok()?;
    let start = file.metadata().ok()?.len().saturating_sub(TAIL);
    file.seek(SeekFrom::Start(start)).ok()?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).ok()?;
    bytes.split(|b| *b == b'\n').rev().find_map(|line| serde_json::from_slice(line).ok())
}
