//! Who works on a key: a lock of the kernel's on `locks/aa/<key>`, which ends with its process, so
//! that nothing is ever left to unlock; on a network's file system a lease. Knows nothing of results.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::cache::Cache;
use crate::crash_point;
use crate::digest::Key;
use crate::error::{At, Result};
use crate::leased::{Exclusive, Tried};

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
}

#[derive(Debug)]
enum Hold {
    Kernel(File),
    Leased(Exclusive),
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
                Tried::Mine(lock) => {
                    Claimed::Mine(Claim { key: *key, path, hold: Hold::Leased(lock) })
                }
            });
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
                return Ok(Claimed::Mine(Claim { key: *key, path, hold: Hold::Kernel(file) }));
            }
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
            Hold::Kernel(_) => true,
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
        let Hold::Kernel(file) = &self.hold else { return };
        if named(&self.path, file) {
            let _ = fs::remove_file(&self.path);
            crash_point!("claim.after-remove");
        }
        // Explicitly, since a child between fork and exec still shares the open file.
        let _ = flock(file, FlockOperation::Unlock);
    }
}

/// What a holder writes of itself.
fn signature(who: &str) -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    format!("{} {since}\n{who}", std::process::id())
}

fn sign(mut file: &File, who: &str) -> std::io::Result<()> {
    file.set_len(0)?;
    // One write, so that a reader sees all of it or nothing.
    file.write_all(signature(who).as_bytes())
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
