//! One try at a key: a private directory, from which outputs move into the store. Knows nothing of
//! who works in it.
//!
//! A handle holds a shared lock on `<attempt>/lock`, so that a directory in use is never cleaned.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::crash_point;
use crate::digest::{Digest, Key};
use crate::entry::{Output, check_name};
use crate::error::{At, Error, Result};
use crate::layout::{Layout, unique};
use crate::lease::{HOLDS, Lock};
use crate::leased::{self, Shared};
use crate::lives::Lives;
use crate::loss;
use crate::spares::{Spare, Spares, Use};
use crate::stat::Stamp;
use crate::tree::Kind;
use crate::{checkpoint, sealed, spares, store, tree};

const KIND: &str = "pipe-attempt";
const VERSION: u32 = 1;
pub(crate) const CHECKPOINTS: &str = "checkpoints";
/// What whoever works in an attempt holds.
pub(crate) const LOCK: &str = "lock";
/// What a finished attempt leaves.
pub(crate) const JSON: &str = "attempt.json";
/// That, while it is written.
const JSON_TMP: &str = "attempt.json.tmp";
/// An attempt with more notes than so many bytes is not used again.
const NOTES: u64 = 4096;

/// What a successful attempt leaves behind in `attempt.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Finished {
    pub outputs: Vec<Output>,
    #[serde(default)]
    pub log: Option<(Digest, u64)>,
    pub provenance: serde_json::Value,
}

/// The file's content.
#[derive(Serialize, Deserialize)]
struct Left {
    key: Key,
    finished: Finished,
}

/// A handle on `attempts/<key>/<attempt>/`; several processes may hold one.
#[derive(Debug)]
pub struct Attempt {
    /// Where the attempt may write. Checkpoints are in `checkpoints/` below it.
    pub dir: PathBuf,
    /// Whether it is known that its key had no other attempt when it was made.
    pub first: bool,
    layout: Layout,
    _lock: Hold,
}

#[derive(Debug)]
enum Hold {
    Kernel(File),
    Leased { _lock: Shared },
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Explicitly, since a child between fork and exec still shares the open file, and who cleans
        // up meanwhile would take the attempt for one in use.
        if let Hold::Kernel(lock) = self {
            let _ = flock(lock, FlockOperation::Unlock);
        }
    }
}

impl Attempt {
    pub(crate) fn create(layout: &Layout, spares: &Spares, key: &Key) -> Result<Attempt> {
        let parent = layout.attempts(key);
        if let Some(lives) = layout.lives() {
            return Attempt::create_leased(layout, lives, &parent);
        }
        // So that gc never sees an attempt that is not locked yet, nor removes a checkpoint which
        // this one will find.
        let _lock = Lock::shared(layout)?;
        if let Some(attempt) = Attempt::by_spare(layout, spares, &parent) {
            return Ok(attempt);
        }
        loop {
            let first = layout.make_dir(&parent)?;
            let dir = parent.join(unique());
            match DirBuilder::new().mode(0o700).create(&dir) {
                Err(e) if matches!(e.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound) => {
                    continue;
                }
                result => result.at("create", &dir)?,
            }
            loss::named(&dir, None);
            crash_point!("attempt.before-lock");
            // A cleaner may come between the directory and its lock: then another one is made.
            let _ = tree::set_mode(&dir, layout.access().dir());
            if let Some(lock) = lock_shared(layout, &dir)? {
                return Ok(Attempt { dir, first, layout: layout.clone(), _lock: lock });
            }
        }
    }

    /// A bare attempt of an earlier key, under a name that was never used, if `parent` has none.
    fn by_spare(layout: &Layout, spares: &Spares, parent: &Path) -> Option<Attempt> {
        if fs::symlink_metadata(parent).is_ok() {
            return None;
        }
        let Spare { path, inner, lock } = spares.take(Use::Attempt)?;
        let name = unique();
        spares::rename(&inner, &path.join(&name)).ok()?;
        // For a moment it has no lock, in which another process may take the spare.
        flock(&lock, FlockOperation::NonBlockingLockShared).ok()?;
        spares::rename(&path, parent).ok()?;
        loss::named(parent, Some(&path));
        let dir = parent.join(name);
        let _lock = Hold::Kernel(lock);
        Some(Attempt { dir, first: true, layout: layout.clone(), _lock })
    }

    /// Made elsewhere, so that under its name it is never without its lock.
    fn create_leased(layout: &Layout, lives: &Lives, parent: &Path) -> Result<Attempt> {
        let staged = layout.staging();
        DirBuilder::new().mode(0o700).create(&staged).at("create", &staged)?;
        let _ = tree::set_mode(&staged, layout.access().dir());
        let lock = staged.join(LOCK);
        layout.open_file(&lock, true).at("create", &lock)?;
        let lock = Shared::take(lives, &lock).at("lock", &lock)?;
        let dir = parent.join(unique());
        for _ in 0..20 {
            let first = layout.make_dir(parent)?;
            match fs::rename(&staged, &dir) {
                // Its key's directory was empty, and somebody removed it.
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                result => {
                    result.at("create", &dir)?;
                    let lock = Hold::Leased { _lock: lock.moved(&dir) };
                    return Ok(Attempt { dir, first, layout: layout.clone(), _lock: lock });
                }
            }
        }
        Err(io::Error::from(ErrorKind::NotFound)).at("create", &dir)
    }

    /// Another handle on an attempt, for the process that does the work.
    ///
    /// # Errors
    /// When the directory is gone or is not an attempt of a cache.
    pub fn reopen(dir: impl AsRef<Path>) -> Result<Attempt> {
        let dir = fs::canonicalize(dir.as_ref()).at("find", dir.as_ref())?;
        let outside = |within: &Path| Error::Outside { path: dir.clone(), within: within.into() };
        let root = dir.ancestors().nth(3).ok_or_else(|| outside(Path::new("attempts")))?;
        if dir.strip_prefix(root).is_ok_and(|rest| !rest.starts_with("attempts")) {
            return Err(outside(&root.join("attempts")));
        }
        Attempt::locked(Layout::open(root)?, dir)
    }

    fn locked(layout: Layout, dir: PathBuf) -> Result<Attempt> {
        let gone = || Err(io::Error::from(ErrorKind::NotFound)).at("lock", &dir);
        let lock = lock_shared(&layout, &dir)?.map_or_else(gone, Ok)?;
        Ok(Attempt { dir, first: false, layout, _lock: lock })
    }

    /// Where [`checkpoint::save`] seals this attempt's checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.dir.join(CHECKPOINTS)
    }

    /// Takes a file or directory of this attempt into the store: hashed, made read-only, moved.
    /// It is durable only after its entry is published.
    ///
    /// # Errors
    /// Links and devices, a path outside the attempt, a name that is no file name.
    pub fn absorb(
        &self,
        port: &str,
        index: Option<u32>,
        name: &str,
        path: impl AsRef<Path>,
    ) -> Result<Output> {
        check_name(port)?;
        check_name(name)?;
        let stored = store::put(&self.layout, path.as_ref(), &self.dir)?;
        Ok(Output {
            port: port.to_string(),
            index,
            name: name.to_string(),
            kind: stored.kind,
            digest: stored.digest,
            bytes: stored.bytes,
        })
    }

    /// As [`Attempt::absorb`], for the log.
    pub fn absorb_log(&self, path: impl AsRef<Path>) -> Result<(Digest, u64)> {
        let stored = store::put(&self.layout, path.as_ref(), &self.dir)?;
        Ok((stored.digest, stored.bytes))
    }

    /// Writes `attempt.json`: from now on the attempt can be published, by whoever holds the claim.
    pub fn finish(&self, finished: &Finished) -> Result<()> {
        let key = key_of(&self.dir).expect("attempts lie below their key");
        let left = Left { key, finished: finished.clone() };
        let body = serde_json::to_string(&left).expect("texts and numbers only");
        let path = self.dir.join(JSON);
        let tmp = self.dir.join(JSON_TMP);
        let mut there = overwritable(&tmp);
        if there.is_none() {
            // Whatever the program has put there goes, and no link is written through.
            tree::remove(&tmp)?;
        }
        let write = || {
            let text = sealed::seal(KIND, VERSION, &(body + "\n"));
            let mut file = there.take().map_or_else(|| File::create_new(&tmp), Ok)?;
            self.layout.access().admit(&file)?;
            file.write_all(text.as_bytes())?;
            file.set_len(text.len() as u64)
        };
        write().at("write", &tmp)?;
        loss::wrote(&tmp);
        crash_point!("attempt.before-json");
        fs::rename(&tmp, &path).at("create", &path)?;
        loss::named(&path, Some(&tmp));
        crash_point!("attempt.after-json");
        Ok(())
    }
}

impl Cache {
    /// A new private directory for one try at `key`.
    pub fn attempt(&self, key: &Key) -> Result<Attempt> {
        Attempt::create(self.layout(), &self.inner.spares, key)
    }

    /// The newest sealed checkpoint of any attempt at `key`: its position and its directory.
    pub fn checkpoint_latest(&self, key: &Key) -> Option<(u64, PathBuf)> {
        checkpoint::latest(attempts(self.layout(), key).map(|dir| dir.join(CHECKPOINTS)))
    }

    /// Removes every checkpoint of `key`.
    pub fn checkpoints_drop(&self, key: &Key) -> Result<()> {
        attempts(self.layout(), key)
            .map(|dir| dir.join(CHECKPOINTS))
            .filter(|dir| dir.exists())
            .try_for_each(|dir| self.layout().discard(&dir))
    }

    /// As [`Attempt::reopen`], for an attempt of this cache.
    ///
    /// # Errors
    /// As there.
    pub fn attempt_at(&self, dir: &Path) -> Result<Attempt> {
        match dir.ancestors().nth(2) == Some(&*self.layout().root().join("attempts")) {
            true => Attempt::locked(self.layout().clone(), dir.to_path_buf()),
            false => Attempt::reopen(dir),
        }
    }

    /// What the newest finished, never published attempt at `key` made, when every byte of it is
    /// there: a leader killed just before publication loses nothing. All bytes are read. A log that
    /// is not whole is left out.
    pub fn finished(&self, key: &Key) -> Option<Finished> {
        let mut dirs: Vec<PathBuf> = attempts(self.layout(), key).collect();
        dirs.sort();
        dirs.into_iter().rev().find_map(|dir| {
            let mut finished = left(&dir)?;
            let whole = |o: &Output| o.check().and_then(|()| self.verify(o)).is_ok();
            let right = |log: &(Digest, u64)| {
                store::check(&self.object(&log.0), &log.0, Kind::File).is_ok()
            };
            finished.log = finished.log.filter(right);
            finished.outputs.iter().all(whole).then_some(finished)
        })
    }

    /// As [`Cache::attempts_clean`], and what is left of one that left nothing is kept for the
    /// attempts of other keys: only where no process of it can be at work any more.
    pub fn attempts_park(&self, key: &Key) {
        if !self.park(key).unwrap_or(false) {
            let _ = self.attempts_clean(key);
        }
    }

    /// Makes the only attempt at `key` a spare, if there is nothing in it but what we put there.
    fn park(&self, key: &Key) -> Result<bool> {
        let (layout, spares) = (self.layout(), &self.inner.spares);
        let (parent, Some(path)) = (layout.attempts(key), spares.room(Use::Attempt)) else {
            return Ok(false);
        };
        // While nobody makes another one beside it.
        let _lock = Lock::exclusive(layout)?;
        let Some(dir) = spares::sole(&parent) else { return Ok(false) };
        let Some(lock) = spares::lock(&dir.join(LOCK)) else { return Ok(false) };
        if !is_bare(&dir, layout.access().dir()) || spares::rename(&parent, &path).is_err() {
            return Ok(false);
        }
        loss::named(&path, Some(&parent));
        let inner = path.join(dir.file_name().unwrap_or_default());
        spares.keep(Use::Attempt, Spare { path, inner, lock });
        Ok(true)
    }

    /// Removes the attempts at `key` that nobody holds, with their checkpoints. For the holder of
    /// the claim, after publication.
    pub fn attempts_clean(&self, key: &Key) -> Result<()> {
        for dir in attempts(self.layout(), key) {
            // A link or a file is no attempt, and nothing is made behind it.
            if !fs::symlink_metadata(&dir).is_ok_and(|meta| meta.is_dir()) {
                self.layout().discard(&dir)?;
                continue;
            }
            let path = dir.join(LOCK);
            // Made where there is none and held until the directory is gone, so that whoever makes
            // an attempt there just now sees that it goes.
            let kernel = match self.layout().lives() {
                None => Some(self.layout().open_file(&path, true)),
                Some(_) => None,
            };
            let free = match (&kernel, self.layout().lives()) {
                (Some(Ok(lock)), _) => {
                    flock(lock, FlockOperation::NonBlockingLockExclusive).is_ok()
                }
                (Some(Err(e)), _) => e.kind() == ErrorKind::NotFound,
                (None, lives) => lives.is_none_or(|lives| leased::is_free(lives, &path)),
            };
            if free {
                self.layout().discard(&dir)?;
            }
        }
        let _ = fs::remove_dir(self.layout().attempts(key));
        Ok(())
    }
}

/// What the attempt at `dir` made, if it came to an end.
pub(crate) fn left(dir: &Path) -> Option<Finished> {
    judge(dir).ok()?
}

/// As [`left`], or what is wrong with what it says.
pub(crate) fn judge(dir: &Path) -> Result<Option<Finished>, String> {
    let read = tree::read_plain(&dir.join(JSON)).map_err(|error| match error {
        Error::Damaged { what, .. } => what,
        error => error.to_string(),
    });
    let Some((bytes, _)) = read? else { return Ok(None) };
    let text = String::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_string())?;
    let body = sealed::open(KIND, VERSION, &text)?;
    let left: Left = serde_json::from_str(body).map_err(|e| e.to_string())?;
    match key_of(dir) == Some(left.key) {
        true => Ok(Some(left.finished)),
        false => Err(format!("it is of an attempt at another key, `{}`", left.key)),
    }
}

/// The file at `path`, to be written anew in its place, if it is a plain file with one name.
fn overwritable(path: &Path) -> Option<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let file = OpenOptions::new().write(true).custom_flags(flags).open(path).ok()?;
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.nlink() == 1).then_some(file)
}

/// Whether an attempt's directory is as a new one, but for notes and for what it made, which is
/// forgotten here.
pub(crate) fn is_bare(dir: &Path, mode: u32) -> bool {
    let as_made = fs::symlink_metadata(dir).is_ok_and(|m| m.is_dir() && m.mode() & 0o7777 == mode);
    let Ok(items) = fs::read_dir(dir) else { return false };
    as_made
        && items.into_iter().all(|item| {
            let Ok(item) = item else { return false };
            let plain = |most: u64| item.metadata().is_ok_and(|m| m.is_file() && m.len() <= most);
            match item.file_name().to_str() {
                Some(LOCK) => plain(0),
                Some(HOLDS | JSON_TMP) => plain(NOTES),
                // Its file is written over by the next one.
                Some(JSON) => fs::rename(item.path(), dir.join(JSON_TMP)).is_ok(),
                _ => false,
            }
        })
}

/// The key that the directory of an attempt belongs to.
fn key_of(dir: &Path) -> Option<Key> {
    dir.parent()?.file_name()?.to_str()?.parse().ok()
}

fn attempts(layout: &Layout, key: &Key) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(layout.attempts(key)).into_iter().flatten().flatten().map(|item| item.path())
}

/// A shared lock on `<dir>/lock`, or `None` when a cleaner was faster.
fn lock_shared(layout: &Layout, dir: &Path) -> Result<Option<Hold>> {
    let path = dir.join(LOCK);
    if let Some(lives) = layout.lives() {
        return match Shared::take(lives, &path) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            result => Ok(Some(Hold::Leased { _lock: result.at("lock", &path)? })),
        };
    }
    let lock = match layout.open_file(&path, true) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        result => result.at("create", &path)?,
    };
    match flock(&lock, FlockOperation::NonBlockingLockShared) {
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        result => result.at("lock", &path)?,
    }
    let ours = Stamp::of(&lock.metadata().at("inspect", &path)?);
    let there = fs::symlink_metadata(&path).map(|m| Stamp::of(&m));
    let same = there.is_ok_and(|s| (s.dev, s.ino) == (ours.dev, ours.ino));
    Ok(same.then_some(Hold::Kernel(lock)))
}
