//! What leaders that are gone have left: jobs in the queue or at work, by the names in their
//! journals. Whoever wants their keys goes on with them.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use cache::{Cache, Key};

use super::agent::waiting;
use super::batch::{Batch, State, Status};
use super::courier::Carrier;
use super::desk::{self, Address};
use super::journal::{self, Line, Places};
use super::pilot::Queue;
use super::records::{self, EXIT, Exit};
use crate::wire::Answer;

/// How long an answer of the batch system is waited for: without it work may be done twice.
const PATIENCE: Duration = Duration::from_secs(40);

/// An attempt of a leader that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Orphan {
    /// Its name.
    pub attempt: String,
    /// The record of the run it was of.
    pub run: PathBuf,
    /// Where its end is announced.
    pub mail: PathBuf,
    /// Whether its node shares no directory with this machine.
    pub far: bool,
    /// Who has it.
    pub by: By,
}

/// Who has an attempt of another leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// A task of an array.
    Task { name: String, array: String, task: usize, single: bool },
    /// A pilot that took it, in the same words.
    Pilot { name: String, array: String, task: usize, single: bool },
    /// Nobody yet: it waits in the queue of pilots.
    Queue { file: PathBuf },
    /// Nobody any more: it is over, and its results are in a remote.
    Nobody,
}

impl Orphan {
    /// Whether it is still to be waited for. What only waits in a queue is taken out of it, to be
    /// done anew; when a pilot is faster, it is done by that one, and once more here. Where a common
    /// directory has the results of what is over, they are adopted without this.
    pub fn goes_on(&self, dir: &Path) -> bool {
        if let By::Queue { file } = &self.by {
            let _ = fs::remove_file(file);
            return false;
        }
        dir.exists() && (self.far || !records::path(dir, EXIT).exists())
    }
}

/// Attempts of the runs recorded in `runs` that are not over, by key.
pub(super) fn find(
    runs: &[PathBuf],
    cache: &Cache,
    carrier: Option<&Carrier>,
    batch: &mut dyn Batch,
) -> HashMap<Key, Orphan> {
    let runs: Vec<(&PathBuf, Vec<Line>)> = runs
        .iter()
        .filter(|run| !crate::history::alive(run))
        .map(|run| (run, journal::read(run)))
        .collect();
    let arrays = |lines: &Vec<Line>| journal::arrays(lines).into_iter().map(|(name, _)| name);
    let names: HashSet<String> = runs.iter().flat_map(|(_, lines)| arrays(lines)).collect();
    if names.is_empty() {
        return HashMap::new();
    }
    let names: Vec<String> = names.into_iter().collect();
    let Some(all) = ask(batch, &names) else { return HashMap::new() };
    let alive: Vec<Status> =
        all.into_iter().filter(|s| matches!(s.state, State::Pending | State::Running)).collect();
    let mut found = HashMap::new();
    for (run, lines) in &runs {
        let (places, address) = (Places::of(run), Address::of(run));
        // Now, when it is known who lives: what ended before has left its record.
        if address.as_ref().is_some_and(|address| !reached(address, run, carrier)) {
            continue;
        }
        let mut theirs = of_run(&places, lines, &alive);
        if address.is_some() {
            theirs.iter_mut().for_each(|orphan| orphan.far = true);
            theirs.extend(finished(&places, lines, cache));
        }
        if theirs.is_empty() && !journal::is_unsettled(run, lines) {
            journal::Journal::close(run);
            let desk = address.zip(carrier).and_then(|(a, carrier)| a.desk(&carrier.remote));
            if desk.is_some_and(|desk| desk.clear().is_ok()) {
                desk::forget(run);
            }
        }
        for orphan in theirs {
            let key = orphan.attempt.split('.').next().and_then(|key| key.parse::<Key>().ok());
            let dir = records::dir_of(cache.root(), &orphan.attempt);
            if let (Some(key), Some(_)) = (key, dir.filter(|dir| dir.exists())) {
                found.insert(key, orphan);
            }
        }
    }
    found
}

/// Whether what is at the desk of a run could be brought: without, nothing is known of its jobs.
fn reached(address: &Address, run: &Path, carrier: Option<&Carrier>) -> bool {
    let desk = carrier.and_then(|carrier| Some((carrier, address.desk(&carrier.remote)?)));
    let Some((carrier, desk)) = desk else { return false };
    let (mail, started) = (Places::of(run).mail(), Instant::now());
    loop {
        match carrier.take(&desk, &mail) {
            Ok(_) => return true,
            Err(_) if started.elapsed() < PATIENCE => std::thread::sleep(Duration::from_secs(1)),
            Err(_) => return false,
        }
    }
}

/// Attempts of a run that ended well on their nodes, and whose leader was gone before it knew.
fn finished(places: &Places, lines: &[Line], cache: &Cache) -> Vec<Orphan> {
    let attempts = lines.iter().flat_map(|line| match line {
        Line::Submits { attempts, .. } => attempts.clone(),
        Line::Attached { attempt, .. } => vec![attempt.clone()],
        Line::Submitted { .. } => Vec::new(),
    });
    let well = |attempt: &String| {
        let exit = records::dir_of(cache.root(), attempt).map(|dir| records::path(&dir, EXIT));
        let exit = exit.and_then(|path| records::read::<Exit>(&path));
        exit.is_some_and(|exit| matches!(exit.answer, Answer::Done { .. }))
    };
    let orphan = |attempt| {
        let (run, mail) = (run_of(places), places.mail());
        Orphan { attempt, run, mail, far: true, by: By::Nobody }
    };
    attempts.filter(well).map(orphan).collect()
}

/// The record of a run.
fn run_of(places: &Places) -> PathBuf {
    places.root.parent().unwrap_or(&places.root).to_path_buf()
}

/// What is known of the arrays; `None` when nobody says.
fn ask(batch: &mut dyn Batch, names: &[String]) -> Option<Vec<Status>> {
    let started = Instant::now();
    loop {
        match batch.poll(names) {
            Ok(all) => return Some(all),
            Err(_) if started.elapsed() < PATIENCE => std::thread::sleep(Duration::from_secs(1)),
            Err(_) => return None,
        }
    }
}

/// The attempts of one run that go on.
fn of_run(places: &Places, lines: &[Line], alive: &[Status]) -> Vec<Orphan> {
    let mut orphans = Vec::new();
    for line in lines {
        let tasks: Vec<(&String, usize, &String)> = match line {
            Line::Submits { name, attempts } => {
                attempts.iter().enumerate().map(|(task, attempt)| (name, task, attempt)).collect()
            }
            Line::Attached { name, task, attempt, .. } => vec![(name, *task, attempt)],
            Line::Submitted { .. } => continue,
        };
        for (name, task, attempt) in tasks {
            let of = alive.iter().find(|s| s.name == *name && s.task == task);
            orphans.extend(of.map(|status| Orphan {
                attempt: attempt.clone(),
                run: run_of(places),
                mail: places.mail(),
                far: false,
                by: By::Task {
                    name: name.clone(),
                    array: status.array.clone(),
                    task,
                    single: !status.id.contains('_'),
                },
            }));
        }
    }
    for pilots in fs::read_dir(places.root.join("pilots")).into_iter().flatten().flatten() {
        let queue = Queue(pilots.path());
        let names: HashSet<String> = journal::arrays(lines).into_iter().map(|(n, _)| n).collect();
        let any = alive.iter().any(|status| names.contains(&status.name));
        // What nobody is left to take is no reason to ask for the others once more.
        for file in waiting(&queue.queue()).into_iter().filter(|_| any) {
            let attempt = attempt_of(&file);
            let by = By::Queue { file: queue.queue().join(&file) };
            let (run, mail) = (run_of(places), places.mail());
            orphans.push(Orphan { attempt, run, mail, far: false, by });
        }
        for file in waiting(&queue.taken()) {
            let Some((order, job)) = file.split_once('@') else { continue };
            let job = job.split('@').next().unwrap_or_default();
            let Some(status) = alive.iter().find(|s| s.id == job) else { continue };
            let by = By::Pilot {
                name: status.name.clone(),
                array: status.array.clone(),
                task: status.task,
                single: !status.id.contains('_'),
            };
            let (attempt, run) = (attempt_of(order), run_of(places));
            orphans.push(Orphan { attempt, run, mail: places.mail(), far: false, by });
        }
    }
    orphans
}

/// `<number>-<attempt>` of an order's file.
pub(super) fn attempt_of(file: &str) -> String {
    file.split_once('-').map_or(file, |(_, attempt)| attempt).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ended_meanwhile_is_taken_from_its_record_where_nothing_else_tells_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let task = || By::Task { name: "a".into(), array: "7".into(), task: 0, single: true };
        let orphan = |far, by| {
            let (run, mail) = (dir.path().to_path_buf(), dir.path().join("mail"));
            Orphan { attempt: "k.a".into(), run, mail, far, by }
        };
        let goes_on = |dir: &Path| {
            [orphan(false, task()), orphan(true, task())].map(|orphan| orphan.goes_on(dir))
        };
        assert_eq!(goes_on(dir.path()), [true, true]);
        records::prepare(dir.path()).unwrap();
        fs::write(records::path(dir.path(), EXIT), "").unwrap();
        assert_eq!(goes_on(dir.path()), [false, true]);
        assert!(orphan(true, By::Nobody).goes_on(dir.path()));
        assert_eq!(goes_on(&dir.path().join("gone")), [false, false]);
    }
}
