//! What a leader has submitted, a line each, written before it is: so that whoever comes after it
//! knows by name what to ask for.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Where all of a run's dealings with a cluster lie, below its record.
pub(crate) const DIR: &str = "cluster";
const FILE: &str = "journal.jsonl";
/// Its name once nothing is left to look for.
const OVER: &str = "journal.over.jsonl";
/// Whoever makes this file wants the run and its jobs to end.
const CANCEL: &str = "cancel";
/// After so long what was about to be submitted was, or was not.
const SETTLED: Duration = Duration::from_secs(600);

/// A line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "did")]
pub enum Line {
    /// About to submit an array.
    Submits {
        /// Its name.
        name: String,
        /// The attempts that its tasks run; none of pilots.
        attempts: Vec<String>,
    },
    /// It has this id.
    Submitted {
        /// Its name.
        name: String,
        /// As the batch system calls it.
        id: String,
    },
    /// Goes on with a task that another leader submitted.
    Attached {
        /// The array's name.
        name: String,
        /// Its id.
        id: String,
        /// The task.
        task: usize,
        /// The attempt.
        attempt: String,
    },
}

/// A journal being written.
#[derive(Debug)]
pub struct Journal(File);

impl Journal {
    /// Starts the journal of the run recorded in `run`.
    pub fn create(run: &Path) -> io::Result<Journal> {
        let dir = run.join(DIR);
        let file = File::options().create(true).append(true).open(dir.join(FILE))?;
        file.sync_all()?;
        File::open(dir)?.sync_all()?;
        Ok(Journal(file))
    }

    /// Writes a line; it is on the disk when this returns.
    pub fn write(&mut self, line: &Line) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.0.write_all(&text)?;
        self.0.sync_data()
    }

    /// Nothing of it is left to look for.
    pub fn close(run: &Path) {
        let dir = run.join(DIR);
        let _ = fs::rename(dir.join(FILE), dir.join(OVER));
    }
}

/// Whether the run of this record may have left jobs.
pub fn is_open(run: &Path) -> bool {
    run.join(DIR).join(FILE).exists()
}

/// The lines of a run's journal, over or not; a torn last one is none.
pub fn read(run: &Path) -> Vec<Line> {
    let dir = run.join(DIR);
    let text = fs::read_to_string(dir.join(FILE)).or_else(|_| fs::read_to_string(dir.join(OVER)));
    let text = text.unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Whether an array may still come into the batch system: its leader died while it was submitted, a
/// short while ago.
pub(super) fn is_unsettled(run: &Path, lines: &[Line]) -> bool {
    let written = fs::metadata(run.join(DIR).join(FILE)).and_then(|meta| meta.modified());
    let fresh = written.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < SETTLED));
    fresh && arrays(lines).iter().any(|(_, id)| id.is_none())
}

/// Ids by array, of what a journal knows them of, and the names of all.
pub fn arrays(lines: &[Line]) -> Vec<(String, Option<String>)> {
    let mut arrays: Vec<(String, Option<String>)> = Vec::new();
    for line in lines {
        let (name, id) = match line {
            Line::Submits { name, .. } => (name, None),
            Line::Submitted { name, id } | Line::Attached { name, id, .. } => (name, Some(id)),
        };
        match arrays.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => *known = known.take().or_else(|| id.cloned()),
            None => arrays.push((name.clone(), id.cloned())),
        }
    }
    arrays
}

/// Asks the leader of a run, wherever it is, and its jobs to end.
pub fn ask_to_end(run: &Path) -> io::Result<()> {
    fs::write(run.join(DIR).join(CANCEL), "")
}

/// Tells pilots of a run that no more steps will come.
pub fn end_pilots(run: &Path) {
    let pilots = run.join(DIR).join("pilots");
    for one in fs::read_dir(pilots).into_iter().flatten().flatten() {
        let _ = fs::write(one.path().join("end"), "");
    }
}

/// Whether somebody did.
pub(crate) fn is_to_end(run: &Path) -> bool {
    run.join(DIR).join(CANCEL).exists()
}

/// Directories of a run's dealings.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// `cluster/` of the record.
    pub root: PathBuf,
}

impl Places {
    pub fn of(run: &Path) -> Places {
        Places { root: run.join(DIR) }
    }

    /// Ends are announced here.
    pub fn mail(&self) -> PathBuf {
        self.root.join("mail")
    }

    /// Scripts, lists of attempts, what jobs print.
    pub fn jobs(&self) -> PathBuf {
        self.root.join("jobs")
    }

    /// Of the pilots of one shape.
    pub fn pilots(&self, number: usize) -> PathBuf {
        self.root.join("pilots").join(number.to_string())
    }

    /// Counts up while the leader lives.
    pub fn beat(&self) -> PathBuf {
        self.root.join("beat")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_tells_names_and_ids() {
        let run = tempfile::tempdir().unwrap();
        fs::create_dir(run.path().join(DIR)).unwrap();
        let mut journal = Journal::create(run.path()).unwrap();
        let submits =
            |name: &str| Line::Submits { name: name.into(), attempts: vec!["a.b".into()] };
        journal.write(&submits("one")).unwrap();
        journal.write(&Line::Submitted { name: "one".into(), id: "7".into() }).unwrap();
        journal.write(&submits("two")).unwrap();
        journal.0.write_all(b"{\"did\":\"submi").unwrap();
        let lines = read(run.path());
        assert_eq!(lines.len(), 3);
        assert_eq!(arrays(&lines), [("one".into(), Some("7".into())), ("two".into(), None)]);
        assert!(is_open(run.path()) && !is_to_end(run.path()));
        Journal::close(run.path());
        assert!(!is_open(run.path()));
        assert_eq!(read(run.path()).len(), 3);
    }
}
