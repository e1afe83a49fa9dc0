//! Who works on a key: a lock of the kernel's on `locks/aa/<key>`, which ends with its process, so
//! that nothing is ever left to unlock; on a network's file system a lease. Knows nothing of results.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::cache::Cache;
use crate::crash_point;
use crate::digest::Key;
use crate::error::{At, Result};
use crate::leased::{Exclusive, Tried};
use crate::spares::{self, Spare, Spares, Use};

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
    hold: Hold,
    spares: Arc<Spares>,
}

#[derive(Debug)]
enum Hold {
    Kernel(File),
    Leased(Exclusive),
    /// Given back.
    Over,
}

impl Cache {
    /// Tries to take `key`; never waits. `who` is shown to those who come later.
    ///
    /// Also a second claim by the same process is `Busy`.
    pub fn claim(&self, key: &Key, who: &str) -> Result<Claimed> {
        let (layout, path) = (self.layout(), self.layout().lock(key));
        if let Some(lives) = layout.lives() {
            return Ok(match Exclusive::attempt(layout, lives, &path, &signature(who))? {
                Tried::Busy(about) => Claimed::Busy(read_holder(&about, 0)),
                Tried::Mine(lock) => Claimed::Mine(self.claimed(key, path, Hold::Leased(lock))),
            });
        }
        if let Some(file) = self.by_spare(&path, who)? {
            return Ok(Claimed::Mine(self.claimed(key, path, Hold::Kernel(file))));
        }
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
            if named(&path, &file) {
                crash_point!("claim.before-name");
                sign(&file, who).at("write", &path)?;
                return Ok(Claimed::Mine(self.claimed(key, path, Hold::Kernel(file))));
            }
        }
    }

    fn claimed(&self, key: &Key, path: PathBuf, hold: Hold) -> Claim {
        Claim { key: *key, path, hold, spares: self.inner.spares.clone() }
    }

    /// The file of an earlier claim, locked all the time, under this name if nobody has it.
    fn by_spare(&self, path: &Path, who: &str) -> Result<Option<File>> {
        let Some(spare) = self.inner.spares.take(Use::Claim) else { return Ok(None) };
        sign(&spare.lock, who).at("write", &spare.path)?;
        let named = match spares::rename(&spare.path, path) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                self.layout().make_dir(path.parent().expect("locks are in shards"))?;
                spares::rename(&spare.path, path)
            }
            result => result,
        };
        match named {
            Ok(()) => Ok(Some(spare.lock)),
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {
                self.inner.spares.keep(Use::Claim, spare);
                Ok(None)
            }
            // It is the file system's to refuse; another file will do.
            Err(_) => Ok(None),
        }
    }
}

impl Claim {
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// Whether nobody has taken it since, as they do of a holder that was silent for long.
    pub fn is_mine(&self) -> bool {
        match &self.hold {
            Hold::Kernel(_) | Hold::Over => true,
            Hold::Leased(lock) => lock.is_mine(),
        }
    }
}

/// Whether the lock file still has its name.
fn named(path: &Path, file: &File) -> bool {
    let id = |m: fs::Metadata| (m.dev(), m.ino());
    let there = fs::symlink_metadata(path).map(id).ok();
    there.is_some() && there == file.metadata().map(id).ok()
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Hold::Kernel(file) = std::mem::replace(&mut self.hold, Hold::Over) else { return };
        if named(&self.path, &file) {
            let spare = self.spares.room(Use::Claim);
            let kept = spare.filter(|spare| spares::rename(&self.path, spare).is_ok());
            if kept.is_none() {
                let _ = fs::remove_file(&self.path);
            }
            crash_point!("claim.after-remove");
            if let Some(path) = kept {
                // Whoever opened it by its old name finds it locked, and then without that name.
                let spare = Spare { inner: path.clone(), path, lock: file };
                return self.spares.keep(Use::Claim, spare);
            }
        }
        // Explicitly, since a child between fork and exec still shares the open file.
        let _ = flock(&file, FlockOperation::Unlock);
    }
}

/// What a holder writes of itself.
fn signature(who: &str) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    format!("{} {since}\n{who}", std::process::id())
}

fn sign(file: &File, who: &str) -> std::io::Result<()> {
    let text = signature(who);
    // One write, so that a reader sees all of it or nothing; over what is there, which costs less
    // than to remove that first.
    file.write_all_at(text.as_bytes(), 0)?;
    file.set_len(text.len() as u64)
}

fn holder(file: &mut File) -> Holder {
    let mut text = String::new();
    let _ = file.rewind().and_then(|()| file.read_to_string(&mut text));
    let written = file.metadata().map_or(0, |m| m.mtime() as u64);
    read_holder(&text, written)
}

fn read_holder(text: &str, written: u64) -> Holder {
    let (line, who) = text.split_once('\n').unwrap_or_default();
    let (pid, since) = line.split_once(' ').unwrap_or_default();
    let pid = pid.parse().unwrap_or(0);
    let since = since.parse().unwrap_or(written);
    Holder { pid, who: who.to_string(), since }
}
