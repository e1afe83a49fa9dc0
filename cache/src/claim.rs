//! Who works on a key: a lock of the kernel's on `locks/aa/<key>`, which ends with its process, so
//! that nothing is ever left to unlock. Knows nothing of results.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::cache::Cache;
use crate::crash_point;
use crate::digest::Key;
use crate::error::{At, Result};

/// The outcome of trying to claim a key.
#[derive(Debug)]
pub enum Claimed {
    Mine(Claim),
    Busy(Holder),
}

/// Who holds a claim, to be shown; all of it can be out of date when it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// 0 in the moment in which the holder has not written its name yet.
    pub pid: u32,
    /// What the holder gave as its name.
    pub who: String,
    /// Seconds since 1970.
    pub since: u64,
}

/// The right to work on a key. Dropping it gives the right back.
#[derive(Debug)]
pub struct Claim {
    key: Key,
    path: PathBuf,
    file: File,
}

impl Cache {
    /// Tries to take `key`; never waits. `who` is shown to those who come later.
    ///
    /// Also a second claim by the same process is `Busy`.
    pub fn claim(&self, key: &Key, who: &str) -> Result<Claimed> {
        let (layout, path) = (self.layout(), self.layout().lock(key));
        loop {
            let mut file = match layout.open_file(&path, false) {
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    layout.make_dir(path.parent().expect("locks are in shards"))?;
                    layout.open_file(&path, false)
                }
                result => result,
            }
            .at("create", &path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => return Ok(Claimed::Busy(holder(&mut file))),
                result => result.at("lock", &path)?,
            }
            // The file is unlinked when a claim ends: a lock on one without its name is nothing.
            let claim = Claim { key: *key, path: path.clone(), file };
            if claim.named() {
                crash_point!("claim.before-name");
                sign(&claim.file, who).at("write", &path)?;
                return Ok(Claimed::Mine(claim));
            }
        }
    }
}

impl Claim {
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Whether the lock file still has its name.
    fn named(&self) -> bool {
        let id = |m: fs::Metadata| (m.dev(), m.ino());
        let there = fs::symlink_metadata(&self.path).map(id).ok();
        there.is_some() && there == self.file.metadata().map(id).ok()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.named() {
            let _ = fs::remove_file(&self.path);
            crash_point!("claim.after-remove");
        }
        // Explicitly, since a child between fork and exec still shares the open file.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

fn sign(mut file: &File, who: &str) -> std::io::Result<()> {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    file.set_len(0)?;
    // One write, so that a reader sees all of it or nothing.
    file.write_all(format!("{} {since}\n{who}", std::process::id()).as_bytes())
}

fn holder(file: &mut File) -> Holder {
    let mut text = String::new();
    let _ = file.rewind().and_then(|()| file.read_to_string(&mut text));
    let (line, who) = text.split_once('\n').unwrap_or_default();
    let (pid, since) = line.split_once(' ').unwrap_or_default();
    let pid = pid.parse().unwrap_or(0);
    let since = since.parse().unwrap_or_else(|_| file.metadata().map_or(0, |m| m.mtime() as u64));
    Holder { pid, who: who.to_string(), since }
}
