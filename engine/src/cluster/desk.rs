//! The notes of a run in a remote, where its leader and its jobs share no file system. Each is
//! sealed with a word that only they know: it travels in the batch script. So whoever else can
//! write to the remote can neither give orders to nodes nor results to the leader.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use cache::Digest;
use cache::remote::{Notes, Remote, Trouble, nonce};
use serde::{Deserialize, Serialize};

use super::journal;
use super::records;

/// The frozen step.
pub(super) const ORDER: &str = "order";
/// Who runs it.
pub(super) const STARTED: &str = "started";
/// A piece of the log, from so many bytes on.
pub(super) const LOG: &str = "log";
/// A piece of what it reports, likewise.
pub(super) const ANSWERS: &str = "answers";
/// A checkpoint that it has sealed, by its position.
pub(super) const CHECKPOINT: &str = "checkpoint";
/// How it ended.
pub(super) const EXIT: &str = "exit";
/// Where a run keeps its address, below its dealings with the cluster.
const FILE: &str = "desk.json";

/// Where the notes of a run are, and their word. Whoever has it can lead the run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The remote, as nodes name it too.
    pub remote: String,
    /// What the run is called there.
    pub run: String,
    /// The word.
    pub word: String,
}

impl Address {
    /// A new one for the run `id`.
    pub fn new(remote: &Remote, id: &str) -> Address {
        // Two machines may call two runs the same.
        let run = format!("{id}-{}", &nonce()[..8]);
        Address { remote: url(remote), run, word: nonce() }
    }

    /// Keeps it with the record of the run, for whoever leads it next.
    pub fn keep(&self, run: &Path) -> io::Result<()> {
        let path = run.join(journal::DIR).join(FILE);
        let mut options = File::options();
        let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()
    }

    /// That of the run recorded in `run`, if it has one.
    pub fn of(run: &Path) -> Option<Address> {
        records::read(&run.join(journal::DIR).join(FILE))
    }

    /// The run's notes, if they are in `remote`.
    pub fn desk(&self, remote: &Remote) -> Option<Desk> {
        (url(remote) == self.remote).then(|| Desk::new(remote, &self.run, &self.word))
    }
}

/// The remote's name for other machines.
fn url(remote: &Remote) -> String {
    let name = remote.name();
    match name.contains("://") {
        true => name.to_string(),
        false => std::path::absolute(name).map_or(name.into(), |path| path.display().to_string()),
    }
}

/// A run's notes.
#[derive(Clone, Debug)]
pub struct Desk {
    notes: Notes,
    run: String,
    word: String,
}

impl Desk {
    /// The notes of `run` that are sealed with `word`.
    pub fn new(remote: &Remote, run: &str, word: &str) -> Desk {
        Desk { notes: remote.notes(run), run: run.into(), word: word.into() }
    }

    /// Writes a note, in place of one that is there.
    pub fn put(&self, name: &str, body: &[u8]) -> Result<(), Trouble> {
        self.notes.put(name, self.seal(name, body))
    }

    /// Writes a note that nobody has written; `false` when somebody has.
    pub fn put_new(&self, name: &str, body: &[u8]) -> Result<bool, Trouble> {
        self.notes.put_new(name, self.seal(name, body))
    }

    /// Those of `names` that are there and sealed, in that order.
    pub fn read(&self, names: &[String]) -> Result<Vec<(String, Vec<u8>)>, Trouble> {
        let all = self.notes.read(names)?.into_iter();
        Ok(all.filter_map(|(name, text)| Some((name.clone(), self.open(&name, text)?))).collect())
    }

    /// The place in the remote for checkpoints of an attempt.
    pub fn place(&self, attempt: &str) -> String {
        format!("{}/{attempt}", self.run)
    }

    /// Names of all that are there.
    pub fn list(&self) -> Result<Vec<String>, Trouble> {
        self.notes.list()
    }

    /// Removes notes.
    pub fn remove(&self, names: &[String]) -> Result<(), Trouble> {
        match names.is_empty() {
            true => Ok(()),
            false => self.notes.remove(names),
        }
    }

    /// Removes all notes of the run.
    pub fn clear(&self) -> Result<(), Trouble> {
        self.remove(&self.list()?)
    }

    fn seal(&self, name: &str, body: &[u8]) -> Vec<u8> {
        [format!("{}\n", self.mark(name, body)).as_bytes(), body].concat()
    }

    fn open(&self, name: &str, text: Vec<u8>) -> Option<Vec<u8>> {
        let at = text.iter().position(|b| *b == b'\n')?;
        let (mark, body) = (&text[..at], &text[at + 1..]);
        (mark == self.mark(name, body).to_string().as_bytes()).then(|| body.to_vec())
    }

    /// What only who knows the word can write under a note. Blake3 may be used so: nothing can be
    /// added to what is hashed.
    fn mark(&self, name: &str, body: &[u8]) -> Digest {
        let head = format!("{}\n{}\n{name}\n", self.word, self.run);
        Digest::of(&[head.as_bytes(), body].concat())
    }
}

/// What the note of an attempt is called.
pub(super) fn note(attempt: &str, record: &str) -> String {
    format!("{attempt}.{record}")
}

/// Of which attempt a note is, and which.
pub(super) fn parts(note: &str) -> Option<(&str, &str)> {
    note.rsplit_once('.')
}

/// Of a piece, what it is of, and from where on.
pub(super) fn piece(record: &str) -> Option<(&str, u64)> {
    let (what, offset) = record.split_once('-')?;
    Some((what, offset.parse().ok()?))
}

/// Removes what runs left so long ago that nobody asks for it, told by their names: they begin with
/// a time.
pub(super) fn sweep(remote: &Remote, before: &str) {
    let runs = remote.noted_runs().unwrap_or_default();
    for run in runs.into_iter().filter(|run| &run[..] < before) {
        let notes = remote.notes(&run);
        let _ = notes.list().and_then(|names| notes.remove(&names));
    }
    let runs = remote.checkpointed().unwrap_or_default();
    for run in runs.into_iter().filter(|run| &run[..] < before) {
        let _ = remote.checkpoints_drop(&run);
    }
}

/// Takes the address of a run's notes away: nothing of them is left.
pub(super) fn forget(run: &Path) {
    let _ = fs::remove_file(run.join(journal::DIR).join(FILE));
}

#[cfg(test)]
mod tests {
    use super::*;
    use cache::remote::Settings;

    #[test]
    fn only_who_knows_the_word_writes_what_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings::new(dir.path().display().to_string());
        let remote = Remote::open(settings, &|_| None).unwrap();
        let desk = Desk::new(&remote, "run", "word");
        desk.put("a.b.log-0", b"x\ny").unwrap();
        assert!(desk.put_new("a.b.exit", b"1").unwrap());
        assert!(!desk.put_new("a.b.exit", b"2").unwrap());
        let read = |desk: &Desk, names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
            let all = desk.read(&names).unwrap().into_iter();
            all.map(|(name, body)| (name, String::from_utf8(body).unwrap())).collect::<Vec<_>>()
        };
        let names = ["a.b.exit", "a.b.none", "a.b.log-0"];
        let both = [("a.b.exit".into(), "1".into()), ("a.b.log-0".into(), "x\ny".into())];
        assert_eq!(read(&desk, &names), both);
        let stranger = Desk::new(&remote, "run", "guess");
        assert!(read(&stranger, &names).is_empty());
        stranger.put("a.b.log-0", b"forged").unwrap();
        // Nor is a note good under another name, or of another run.
        let path = dir.path().join("jobs/run/a.b.exit");
        fs::copy(&path, dir.path().join("jobs/run/a.c.exit")).unwrap();
        fs::create_dir(dir.path().join("jobs/other")).unwrap();
        fs::copy(&path, dir.path().join("jobs/other/a.b.exit")).unwrap();
        assert_eq!(read(&desk, &["a.b.exit", "a.c.exit", "a.b.log-0"]), both[..1]);
        assert!(read(&Desk::new(&remote, "other", "word"), &["a.b.exit"]).is_empty());
        sweep(&remote, "run");
        assert_eq!(remote.noted_runs().unwrap(), ["run"]);
        desk.clear().unwrap();
        assert!(desk.list().unwrap().is_empty());
    }

    #[test]
    fn an_address_is_kept_for_its_user_alone() {
        use std::os::unix::fs::PermissionsExt;
        let (dir, run) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(run.path().join(journal::DIR)).unwrap();
        let open = |path: &Path| {
            Remote::open(Settings::new(path.display().to_string()), &|_| None).unwrap()
        };
        let remote = open(dir.path());
        let address = Address::new(&remote, "20260101-000000-abcd");
        address.keep(run.path()).unwrap();
        let mode = fs::metadata(run.path().join("cluster/desk.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(Address::of(run.path()), Some(address.clone()));
        assert!(address.desk(&remote).is_some());
        assert!(address.desk(&open(run.path())).is_none(), "another remote");
        forget(run.path());
        assert_eq!(Address::of(run.path()), None);
    }
}
