//! What is known of an upload in parts that is not done: a file in `uploads/`, so that a push which
//! was broken off or killed goes on, also in another process. Knows no store.
//!
//! The first line says of what and in which parts; each further one, of which a part was sent,
//! under which hash, and what the store calls it. Lines that are cut off count for nothing.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

/// What is uploaded, and in which parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    /// The object's name in the remote.
    pub name: String,
    pub bytes: u64,
    /// Of each part but the last.
    pub part: u64,
    /// The store's name of the upload.
    pub id: String,
}

/// A part that was sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sent {
    pub index: usize,
    /// Of the bytes that were sent.
    pub hash: String,
    /// What the store calls it.
    pub content: String,
}

/// The file, locked. Dropping it leaves it for the next.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    pub head: Option<Head>,
    pub sent: BTreeMap<usize, Sent>,
}

impl Journal {
    /// Opens the journal at `path`; none when another process is at it.
    pub fn open(path: PathBuf) -> io::Result<Option<Journal>> {
        loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let mut file = options.open(&path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                result => result?,
            }
            let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
            if fs::symlink_metadata(&path).map(id).ok() != Some(id(file.metadata()?)) {
                continue;
            }
            let mut text = Vec::new();
            file.read_to_end(&mut text)?;
            let (head, sent) = parse(&text);
            return Ok(Some(Journal { path, file, head, sent }));
        }
    }

    /// Begins anew.
    pub fn start(&mut self, head: Head) -> io::Result<()> {
        self.sent.clear();
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.line(&head)?;
        self.head = Some(head);
        Ok(())
    }

    pub fn add(&mut self, sent: Sent) -> io::Result<()> {
        self.line(&sent)?;
        self.sent.insert(sent.index, sent);
        Ok(())
    }

    /// The upload is done, or is not worth going on with.
    pub fn remove(self) {
        let _ = fs::remove_file(&self.path);
    }

    fn line(&mut self, value: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_string(value).expect("plain values");
        self.file.seek(io::SeekFrom::End(0))?;
        self.file.write_all(format!("{text}\n").as_bytes())
    }
}

fn parse(text: &[u8]) -> (Option<Head>, BTreeMap<usize, Sent>) {
    let mut lines = text.split_inclusive(|b| *b == b'\n').filter(|line| line.ends_with(b"\n"));
    let head = lines.next().and_then(|line| serde_json::from_slice(line).ok());
    let sent = lines.map_while(|line| serde_json::from_slice::<Sent>(line).ok());
    let sent: BTreeMap<usize, Sent> = sent.map(|sent| (sent.index, sent)).collect();
    if head.is_some() { (head, sent) } else { (None, BTreeMap::new()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_on_after_any_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("j");
        let mut journal = Journal::open(path.clone()).unwrap().unwrap();
        assert!(Journal::open(path.clone()).unwrap().is_none(), "it is locked");
        let head = Head { name: "objects/aa/x".into(), bytes: 30, part: 10, id: "u\"1".into() };
        journal.start(head.clone()).unwrap();
        for index in [1, 0] {
            let sent = Sent { index, hash: "h".into(), content: "<e>".into() };
            journal.add(sent).unwrap();
        }
        drop(journal);
        let text = fs::read(&path).unwrap();
        let lines: Vec<usize> =
            text.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(i, _)| i + 1).collect();
        for cut in 0..=text.len() {
            fs::write(&path, &text[..cut]).unwrap();
            let journal = Journal::open(path.clone()).unwrap().unwrap();
            let whole = lines.iter().filter(|end| **end <= cut).count();
            assert_eq!(journal.head.is_some(), whole > 0, "{cut}");
            assert_eq!(journal.sent.len(), whole.saturating_sub(1), "{cut}");
        }
        let journal = Journal::open(path.clone()).unwrap().unwrap();
        assert_eq!(journal.head, Some(head));
        journal.remove();
        assert!(!path.exists());
    }
}
