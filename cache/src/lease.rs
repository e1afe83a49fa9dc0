//! Who uses which bytes, so that garbage collection leaves them: the lock that puts both in order,
//! leases of running processes, holds of attempts. Knows neither keys nor what is collected.
//!
//! `gc.lock` is shared by whoever notes a use, and is gc's alone while it reads all notes and moves
//! what nobody needs out of the way. So a use is noted before gc looks, and is honoured; or after
//! gc moved, and the check for presence that follows the note tells it. Nobody has the lock for
//! long. Every lock here is the kernel's and ends with its process. Where those cannot be relied on,
//! notes are on the server before the check, and gc reads them again after it has moved something,
//! puts back what is in use, and only then removes.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::cache::Cache;
use crate::crash_point;
use crate::digest::Digest;
use crate::error::{At, Result};
use crate::layout::{Layout, unique};
use crate::leased::{self, Exclusive, Shared, Tried};
use crate::lives::Lives;

/// How often another's turn to collect is looked at, on a network's file system.
const AGAIN: Duration = Duration::from_millis(200);

/// File of an attempt's notes.
pub(crate) const HOLDS: &str = "holds";

/// A lock of the whole cache, until it is dropped.
#[derive(Debug)]
pub(crate) struct Lock(Hold);

#[derive(Debug)]
enum Hold {
    Kernel(File),
    /// Of `gc.lock`, whose open file is kept for the next one.
    Kept(Option<File>, Arc<Mutex<Vec<File>>>),
    Leased {
        _lock: Exclusive,
    },
    /// On a network's file system nobody is kept waiting.
    Nothing,
}

impl Lock {
    /// Keeps gc from deciding. For moments, and never two at once by one thread.
    pub fn shared(layout: &Layout) -> Result<Lock> {
        Lock::all(layout, FlockOperation::LockShared)
    }

    /// Keeps everybody from noting a use.
    pub fn exclusive(layout: &Layout) -> Result<Lock> {
        Lock::all(layout, FlockOperation::LockExclusive)
    }

    fn all(layout: &Layout, operation: FlockOperation) -> Result<Lock> {
        if layout.lives().is_some() {
            return Ok(Lock(Hold::Nothing));
        }
        let (path, idle) = (layout.gc_lock(), &layout.idle_locks);
        let kept = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        // One that went stale is let go.
        let kept = kept.filter(|file| flock_now(file, operation).is_ok());
        let file = match kept {
            Some(file) => file,
            None => {
                let file = layout.open_file(&path, false).at("open", &path)?;
                flock_now(&file, operation).at("lock", &path)?;
                file
            }
        };
        Ok(Lock(Hold::Kept(Some(file), idle.clone())))
    }

    /// The right to collect, which one process has at a time. `on_wait` is called when another
    /// has it.
    pub fn turn(layout: &Layout, on_wait: impl FnOnce()) -> Result<Lock> {
        let path = layout.gc_turn();
        if let Some(lives) = layout.lives() {
            return Lock::leased_turn(layout, lives, &path.with_extension("leased"), on_wait);
        }
        match Lock::attempt(layout, &path, FlockOperation::NonBlockingLockExclusive)? {
            Some(lock) => Ok(lock),
            None => {
                on_wait();
                Lock::wait(layout, &path, FlockOperation::LockExclusive)
            }
        }
    }

    /// Keeps a gc from starting; `None` while one is at work.
    fn no_turn(layout: &Layout) -> Result<Option<Lock>> {
        if let Some(lives) = layout.lives() {
            let path = layout.gc_turn().with_extension("leased");
            return Ok((!leased::is_locked(lives, &path)).then_some(Lock(Hold::Nothing)));
        }
        Lock::attempt(layout, &layout.gc_turn(), FlockOperation::NonBlockingLockShared)
    }

    fn leased_turn(
        layout: &Layout,
        lives: &Lives,
        path: &Path,
        on_wait: impl FnOnce(),
    ) -> Result<Lock> {
        let mut on_wait = Some(on_wait);
        loop {
            match Exclusive::attempt(layout, lives, path, "")? {
                Tried::Mine(lock) => return Ok(Lock(Hold::Leased { _lock: lock })),
                Tried::Busy(_) => {
                    if let Some(on_wait) = on_wait.take() {
                        on_wait();
                    }
                    std::thread::sleep(AGAIN);
                }
            }
        }
    }

    fn wait(layout: &Layout, path: &Path, operation: FlockOperation) -> Result<Lock> {
        if layout.lives().is_some() {
            return Ok(Lock(Hold::Nothing));
        }
        let file = layout.open_file(path, false).at("open", path)?;
        flock_now(&file, operation).map(|()| Lock(Hold::Kernel(file))).at("lock", path)
    }

    fn attempt(layout: &Layout, path: &Path, operation: FlockOperation) -> Result<Option<Lock>> {
        let file = layout.open_file(path, false).at("open", path)?;
        match flock(&file, operation) {
            Err(Errno::WOULDBLOCK) => Ok(None),
            result => result.map(|()| Some(Lock(Hold::Kernel(file)))).at("lock", path),
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Explicitly, since a child between fork and exec still shares the open file.
        match &mut self.0 {
            Hold::Kernel(file) => drop(flock(&*file, FlockOperation::Unlock)),
            Hold::Kept(file, idle) => {
                let free = file.take().filter(|file| flock(file, FlockOperation::Unlock).is_ok());
                idle.lock().unwrap_or_else(PoisonError::into_inner).extend(free);
            }
            Hold::Leased { .. } | Hold::Nothing => {}
        }
    }
}

/// Waits for a lock, through signals.
fn flock_now(file: &File, operation: FlockOperation) -> std::result::Result<(), Errno> {
    loop {
        match flock(file, operation) {
            Err(Errno::INTR) => {}
            result => return result,
        }
    }
}

/// That a process is at something, told by the file `path` for as long as this lives, where locks of
/// the kernel's cannot be relied on.
#[derive(Debug)]
pub struct Presence {
    _lock: Shared,
}

impl Cache {
    /// Says that this process is at the file `path`; `None` where a lock of the kernel's tells it.
    ///
    /// # Errors
    /// When that cannot be written.
    pub fn presence(&self, path: &Path) -> Result<Option<Presence>> {
        let Some(lives) = self.layout().lives() else { return Ok(None) };
        let lock = Shared::take(lives, path).at("lock", path)?;
        Ok(Some(Presence { _lock: lock }))
    }
}

impl Presence {
    /// Whether somebody living is at `path`, of the cache at `root`; `None` where a lock of the
    /// kernel's tells it.
    pub fn there(root: &Path, path: &Path) -> Option<bool> {
        let layout = Layout::open(root).ok()?;
        layout.lives().map(|lives| !leased::is_free(lives, path))
    }
}

/// What a process uses: no gc removes it before the lease is dropped or the process ends.
#[derive(Debug)]
pub struct Lease {
    layout: Layout,
    path: PathBuf,
    file: File,
    held: Mutex<HashSet<Digest>>,
}

impl Cache {
    /// Begins a lease; `who` is told to those who ask what keeps bytes from being removed.
    ///
    /// # Errors
    /// When its file cannot be written.
    pub fn lease(&self, who: &str) -> Result<Lease> {
        let layout = self.layout().clone();
        let life = layout.lives().map(Lives::own).transpose();
        let name =
            life.at("lock", &layout.dir("leases"))?.map_or_else(unique, |l| leased::named(&l));
        let path = layout.dir("leases").join(name);
        let who: String = who.chars().filter(|c| !c.is_control()).collect();
        // Under the lock, so that gc never sees the file without its owner's lock on it.
        let lock = Lock::shared(&layout)?;
        let mut options = OpenOptions::new();
        options.read(true).append(true).create_new(true).mode(0o600);
        let mut file = options.open(&path).at("create", &path)?;
        crash_point!("lease.before-lock");
        if layout.lives().is_none() {
            flock(&file, FlockOperation::NonBlockingLockExclusive).at("lock", &path)?;
        }
        layout.access().admit(&file).at("set the mode of", &path)?;
        let line = format!("{} {who}\n", std::process::id());
        file.write_all(line.as_bytes()).at("write", &path)?;
        drop(lock);
        Ok(Lease { layout, path, file, held: Mutex::default() })
    }
}

impl Lease {
    /// Notes that these artifacts are used, whether they are there or not: only afterwards tell
    /// `present` and its like something that stays true.
    ///
    /// # Errors
    /// When the note cannot be written (a full disk); then nothing is sure.
    pub fn hold(&self, digests: &[Digest]) -> Result<()> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let mut new: Vec<Digest> = digests.iter().filter(|d| !held.contains(d)).copied().collect();
        new.sort_unstable();
        new.dedup();
        if !new.is_empty() {
            note(&self.layout, &self.file, &self.path, &new)?;
            held.extend(new);
        }
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // A gc at work goes on honouring the file, since it may have read what else keeps this
        // process' results before they were made. The next one removes it.
        if let Ok(Some(_idle)) = Lock::no_turn(&self.layout) {
            let _ = fs::remove_file(&self.path);
        }
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

/// What an attempt puts into the store, before it is named by a result.
pub(crate) struct Holds<'a> {
    layout: &'a Layout,
    path: PathBuf,
}

impl Holds<'_> {
    /// Those of the attempt at `dir`.
    pub fn of<'a>(layout: &'a Layout, dir: &Path) -> Holds<'a> {
        Holds { layout, path: dir.join(HOLDS) }
    }

    /// Notes digests, to be called before their objects get their names or are found to be there.
    pub fn add(&self, digests: &[Digest]) -> Result<()> {
        let file = self.layout.open_file(&self.path, true).at("open", &self.path)?;
        note(self.layout, &file, &self.path, digests)
    }
}

/// Appends a line for each digest. A first line break ends what a killed process left of a line.
fn note(layout: &Layout, mut file: &File, path: &Path, digests: &[Digest]) -> Result<()> {
    let mut text = String::with_capacity(1 + 65 * digests.len());
    text.push('\n');
    for digest in digests {
        text.push_str(&digest.to_string());
        text.push('\n');
    }
    let _lock = Lock::shared(layout)?;
    file.write_all(text.as_bytes()).at("write", path)?;
    if layout.lives().is_some() {
        // On the server, for gc on another machine to read.
        file.sync_data().at("write", path)?;
    }
    crash_point!("holds.after-note");
    Ok(())
}

/// The digests in a text of notes; what is no whole line is none.
pub(crate) fn noted(text: &str) -> impl Iterator<Item = Digest> + '_ {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().filter_map(|line| line.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("c")).unwrap();
        (dir, cache)
    }

    #[test]
    fn the_open_file_of_a_lock_is_used_again_and_locks_as_before() {
        let (_dir, cache) = cache();
        let (ours, other) = (cache.layout(), Layout::open(cache.root()).unwrap());
        let open = || ours.idle_locks.lock().unwrap().len();
        drop((Lock::shared(ours).unwrap(), Lock::shared(&other).unwrap()));
        let first = open();
        let free = || {
            let now = FlockOperation::NonBlockingLockShared;
            Lock::attempt(&other, &other.gc_lock(), now).unwrap().is_some()
        };
        let held = Lock::exclusive(ours).unwrap();
        assert_eq!((first, open(), free()), (1, 0, false));
        drop(held);
        assert_eq!((open(), free()), (1, true));
        // Two threads at once have one each.
        drop((Lock::shared(ours).unwrap(), Lock::shared(ours).unwrap()));
        assert_eq!((open(), free()), (2, true));
    }

    #[test]
    fn a_torn_line_is_no_note_and_spoils_none_after_it() {
        let (_dir, cache) = cache();
        let layout = cache.layout();
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        let holds = Holds::of(layout, layout.root());
        fs::write(&holds.path, &one.to_string()[..20]).unwrap();
        holds.add(&[two]).unwrap();
        let text = fs::read_to_string(&holds.path).unwrap();
        assert_eq!(noted(&text).collect::<Vec<_>>(), [two]);
        let cut = &text[..text.len() - 1];
        assert_eq!(noted(cut).count(), 0, "its line has no end yet");
    }

    #[test]
    fn a_lease_leaves_its_file_only_while_a_gc_is_at_work() {
        let (_dir, cache) = cache();
        let there = || fs::read_dir(cache.layout().dir("leases")).unwrap().count();
        let lease = cache.lease("a\ntest").unwrap();
        lease.hold(&[Digest::of(b"1"), Digest::of(b"1")]).unwrap();
        lease.hold(&[Digest::of(b"1")]).unwrap();
        let text = fs::read_to_string(&lease.path).unwrap();
        assert_eq!(text.lines().next().unwrap(), format!("{} atest", std::process::id()));
        assert_eq!(noted(&text).collect::<Vec<_>>(), [Digest::of(b"1")], "noted once");
        drop(lease);
        assert_eq!(there(), 0);
        let lease = cache.lease("a test").unwrap();
        let turn = Lock::turn(cache.layout(), || panic!("nobody else collects")).unwrap();
        drop(lease);
        assert_eq!(there(), 1);
        drop(turn);
    }
}
