//! What leader and nodes tell each other: files in `job/` of an attempt's directory, each written
//! whole and once, so that neither has to reach the other by anything but the file system.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::saved::Saved;
use crate::wire::{Answer, Order};

/// Where they lie, below the attempt.
const DIR: &str = "job";
/// The frozen step.
pub(crate) const ORDER: &str = "order.json";
/// Who runs it: whoever makes this file.
pub(crate) const STARTED: &str = "started.json";
/// What the step reports while it runs, a line each.
pub(crate) const ANSWERS: &str = "answers.jsonl";
/// How it ended.
pub(crate) const EXIT: &str = "exit.json";

/// A frozen step for a node, and how it is to be run there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ordered {
    /// Of the leader's binary, which the node's must be.
    pub build: String,
    /// The order for the worker.
    pub order: Order,
    /// Where its end is announced.
    pub mail: PathBuf,
    /// Wall time of the job in seconds, if it is known.
    pub limit_s: Option<f64>,
    /// So many seconds before that end the step is to save a checkpoint and stop.
    pub margin_s: f64,
    /// Cpus of the job.
    pub cpus: u32,
    /// GPUs of the job.
    pub gpus: u32,
    /// Where there is one in a remote, what the step goes on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Saved>,
}

/// Where a step runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The cluster's name of the job: `12_3`.
    pub job: String,
    /// The node.
    pub host: String,
}

/// How an attempt ended on a node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Exit {
    /// The worker's last answer, or what its agent makes of its end.
    pub answer: Answer,
    /// Where it ran.
    pub place: Place,
    /// Wall time, in seconds.
    pub seconds: f64,
    /// Cpus it had.
    pub cpus: u32,
    /// GPUs it had.
    pub gpus: u32,
}

/// A record of the attempt at `dir`.
pub(crate) fn path(dir: &Path, name: &str) -> PathBuf {
    dir.join(DIR).join(name)
}

/// Makes the place for the records of the attempt at `dir`.
pub(crate) fn prepare(dir: &Path) -> io::Result<()> {
    match fs::create_dir(dir.join(DIR)) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

/// Writes a record that nobody has written; `false` when somebody has. Two who try see one winner,
/// also on a network's file system: a hard link is made or not.
pub(crate) fn write_new(path: &Path, record: &impl Serialize) -> io::Result<bool> {
    let staged = stage(path, record)?;
    let linked = fs::hard_link(&staged, path);
    // An answer that was lost on its way says "exists" to its own sender.
    let links = || fs::metadata(&staged).map(|meta| std::os::unix::fs::MetadataExt::nlink(&meta));
    let won = match linked {
        Ok(()) => Ok(true),
        Err(_) if links().is_ok_and(|n| n == 2) => Ok(true),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(e),
    };
    let _ = fs::remove_file(staged);
    won
}

/// Writes a record in place of what is there.
pub(crate) fn write(path: &Path, record: &impl Serialize) -> io::Result<()> {
    let staged = stage(path, record)?;
    fs::rename(&staged, path).inspect_err(|_| drop(fs::remove_file(&staged)))
}

/// Writes a text that only its user may read.
pub(crate) fn write_private(path: &Path, text: &str) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?
        .write_all(text.as_bytes())
}

fn stage(path: &Path, record: &impl Serialize) -> io::Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Beginning with a point: whoever lists the directory passes over it.
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let staged = path.with_file_name(format!(".{name}-{host}-{}-{count}", std::process::id()));
    let mut file = File::create(&staged)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    Ok(staged)
}

/// A record, if there is a whole one.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// Announces the end of the attempt at `dir`: its exit record under a name of its own in `mail`. A
/// leader that is gone for good has taken its mailbox with it, which is no harm.
pub(crate) fn announce(dir: &Path, mail: &Path) {
    let _ = fs::hard_link(path(dir, EXIT), mail.join(name_of(dir)));
}

/// Names of starts end so in a mailbox.
pub(crate) const BEGAN: &str = ".began";

/// As [`announce`], of its start.
pub(crate) fn announce_start(dir: &Path, mail: &Path) {
    let name = format!("{}{BEGAN}", name_of(dir));
    let _ = fs::hard_link(path(dir, STARTED), mail.join(name));
}

/// What the attempt at `dir` is called in mailboxes, queues and lists: `<key>.<attempt>`.
pub(crate) fn name_of(dir: &Path) -> String {
    let part = |path: Option<&Path>| {
        path.and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned()
    };
    format!("{}.{}", part(dir.parent()), part(Some(dir)))
}

/// The directory below `store` of the attempt that is called so.
pub(crate) fn dir_of(store: &Path, name: &str) -> Option<PathBuf> {
    let (key, attempt) = name.split_once('.')?;
    let plain = |part: &str| !part.is_empty() && !part.contains(['/', '.']);
    (plain(key) && plain(attempt)).then(|| store.join("attempts").join(key).join(attempt))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_record_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        assert!(write_new(&path, &1).unwrap());
        assert!(!write_new(&path, &2).unwrap());
        assert_eq!(read::<u32>(&path), Some(1));
        write(&path, &3).unwrap();
        assert_eq!(read::<u32>(&path), Some(3));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn an_attempt_has_one_name() {
        let store = Path::new("/store");
        let dir = store.join("attempts/0a1b/0000-1-2");
        assert_eq!(name_of(&dir), "0a1b.0000-1-2");
        assert_eq!(dir_of(store, "0a1b.0000-1-2"), Some(dir));
        for wrong in ["", "a", "..", "a.", ".b", "a.b.c", "../x.y", "a./b"] {
            assert_eq!(dir_of(store, wrong), None, "{wrong}");
        }
    }
}
