//! What every step wants and throws away, kept for the next one: files of claims and bare attempts.
//! To make and remove them is most of what a small step costs; to give them another name is cheap.
//!
//! A spare is a name in `spares/` that its process has locked. What a process leaves there at its end,
//! however it ended, another one takes. Only in caches of one user with locks of the kernel's.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{CWD, FlockOperation, OFlags, RenameFlags, flock, renameat_with};
use rustix::process::{Resource, getrlimit};

use crate::attempt::{self, LOCK};
use crate::cache::locked;
use crate::layout::{Layout, unique};

/// So many of each kind a process keeps, a few hundred of them locked: each takes a file of those
/// that it may have open.
const MOST: usize = 1024;
const LOCKED: usize = 256;
/// Both kinds together take no more than an eighth of them.
const FILES: usize = 16;

/// What a spare is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// A file.
    Claim,
    /// The directory of a key, with one bare attempt in it.
    Attempt,
}

impl Use {
    fn prefix(self) -> &'static str {
        match self {
            Use::Claim => "claim-",
            Use::Attempt => "attempt-",
        }
    }

    /// Whether a spare is for it, by its name.
    fn fits(self, item: &fs::DirEntry) -> bool {
        item.file_name().as_encoded_bytes().starts_with(self.prefix().as_bytes())
    }
}

/// One of them, ours alone.
#[derive(Debug)]
pub(crate) struct Spare {
    /// What is to be moved.
    pub path: PathBuf,
    /// Of an attempt, its directory in `path`; of a claim, `path`.
    pub inner: PathBuf,
    /// Locked exclusively.
    pub lock: File,
}

/// Those of one process and cache.
#[derive(Debug)]
pub(crate) struct Spares {
    /// `None` where nothing is kept.
    dir: Option<PathBuf>,
    /// The mode of an attempt's directory.
    mode: u32,
    /// How many of each kind are kept locked.
    locked: usize,
    claims: Mutex<Pool>,
    attempts: Mutex<Pool>,
}

#[derive(Debug, Default)]
struct Pool {
    ours: Vec<Spare>,
    /// Of ours what is not locked.
    left: Vec<PathBuf>,
    others: Others,
    /// How many of others' were met.
    met: usize,
}

/// What others left: most runs want few of very many.
#[derive(Debug, Default)]
enum Others {
    #[default]
    Unknown,
    Rest(fs::ReadDir),
    Nothing,
}

impl Others {
    /// The next name in `dir` for this use, each once.
    fn next(&mut self, dir: &Path, what: Use) -> Option<PathBuf> {
        if let Others::Unknown = self {
            *self = fs::read_dir(dir).map_or(Others::Nothing, Others::Rest);
        }
        let Others::Rest(items) = self else { return None };
        let next = items.flatten().find(|item| what.fits(item)).map(|item| item.path());
        if next.is_none() {
            *self = Others::Nothing;
        }
        next
    }
}

impl Spares {
    pub fn new(layout: &Layout) -> Spares {
        let keeps = layout.lives().is_none() && !layout.access().is_shared();
        let dir = keeps.then(|| layout.dir("spares"));
        let files = getrlimit(Resource::Nofile).current;
        let locked = files.map_or(LOCKED, |files| (files as usize / FILES).min(LOCKED));
        let mode = layout.access().dir();
        Spares { dir, mode, locked, claims: Mutex::default(), attempts: Mutex::default() }
    }

    fn pool(&self, what: Use) -> &Mutex<Pool> {
        match what {
            Use::Claim => &self.claims,
            Use::Attempt => &self.attempts,
        }
    }

    /// One that may be used, if there is any.
    pub fn take(&self, what: Use) -> Option<Spare> {
        let dir = self.dir.as_ref()?;
        let mut pool = locked(self.pool(what));
        if let Some(spare) = pool.ours.pop() {
            return Some(spare);
        }
        let Pool { left, others, met, .. } = &mut *pool;
        let mut other = || others.next(dir, what).inspect(|_| *met += 1);
        let names = std::iter::from_fn(|| left.pop().or_else(&mut other));
        // After a loss of power there may be more in it than when it was parked.
        let bare = |s: &Spare| what == Use::Claim || attempt::is_bare(&s.inner, self.mode);
        names.into_iter().find_map(|path| open(path, what).filter(bare))
    }

    /// A name for one more, if one more is wanted: there may be too many when several runs end.
    pub fn room(&self, what: Use) -> Option<PathBuf> {
        let room = {
            let pool = locked(self.pool(what));
            pool.ours.len() + pool.left.len() < MOST && pool.met <= MOST
        };
        Some(self.dir.as_ref().filter(|_| room)?.join(format!("{}{}", what.prefix(), unique())))
    }

    /// Keeps one that has got its name; what is too many to be kept locked, anybody may take.
    pub fn keep(&self, what: Use, spare: Spare) {
        let mut pool = locked(self.pool(what));
        if pool.ours.len() < self.locked {
            return pool.ours.push(spare);
        }
        // Explicitly, since a child between fork and exec still shares the open file.
        let _ = flock(&spare.lock, FlockOperation::Unlock);
        pool.left.push(spare.path);
    }
}

/// Removes what no process has.
pub(crate) fn clear(layout: &Layout) {
    for what in [Use::Claim, Use::Attempt] {
        for path in left(&layout.dir("spares"), what) {
            // Held until it is gone, so that nobody takes it meanwhile.
            let held = open(path.clone(), what);
            let broken =
                what == Use::Attempt && sole(&path).is_none_or(|dir| !dir.join(LOCK).exists());
            if held.is_some() || broken {
                let _ = layout.discard(&path);
            }
        }
    }
}

/// Names in `dir` for this use.
fn left(dir: &Path, what: Use) -> Vec<PathBuf> {
    let items = fs::read_dir(dir).into_iter().flatten().flatten();
    items.filter(|item| what.fits(item)).map(|item| item.path()).collect()
}

/// What another process left at `path`, if it is whole and nobody's.
fn open(path: PathBuf, what: Use) -> Option<Spare> {
    let inner = match what {
        Use::Claim => path.clone(),
        Use::Attempt => sole(&path)?,
    };
    let file = match what {
        Use::Claim => inner.clone(),
        Use::Attempt => inner.join(LOCK),
    };
    let lock = lock(&file)?;
    Some(Spare { path, inner, lock })
}

/// The only item of a directory.
pub(crate) fn sole(dir: &Path) -> Option<PathBuf> {
    let mut items = fs::read_dir(dir).ok()?;
    let first = items.next()?.ok()?;
    items.next().is_none().then(|| first.path())
}

/// The plain file at `path`, which has no other name, locked exclusively.
pub(crate) fn lock(path: &Path) -> Option<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path).ok()?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
    let (ours, there) = (file.metadata().ok()?, fs::symlink_metadata(path).ok()?);
    let plain = ours.is_file() && ours.nlink() == 1;
    (plain && (ours.dev(), ours.ino()) == (there.dev(), there.ino())).then_some(file)
}

/// Gives `from` the name `to`, which nobody has.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    Ok(renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)?)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::{Cache, Claimed, Key};

    fn key(i: u32) -> Key {
        Key::of(i.to_string().as_bytes())
    }

    fn names(cache: &Cache, what: Use) -> HashSet<PathBuf> {
        left(&cache.layout().dir("spares"), what).into_iter().collect()
    }

    fn claim(cache: &Cache, i: u32, who: &str) -> crate::Claim {
        match cache.claim(&key(i), who).unwrap() {
            Claimed::Mine(claim) => claim,
            Claimed::Busy(holder) => panic!("{holder:?}"),
        }
    }

    #[test]
    fn the_file_of_a_claim_is_used_again_and_says_who_has_it_now() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("c")).unwrap();
        drop(claim(&cache, 1, "somebody with a long name"));
        let left = names(&cache, Use::Claim);
        assert_eq!(left.len(), 1);
        let mine = claim(&cache, 2, "me");
        assert_eq!(names(&cache, Use::Claim).len(), 0);
        let other = Cache::open(cache.root()).unwrap();
        match other.claim(&key(2), "another").unwrap() {
            Claimed::Busy(holder) => assert_eq!(holder.who, "me"),
            Claimed::Mine(_) => panic!("it is not free"),
        }
        // The one who held it before keeps nobody from its key.
        drop(claim(&other, 1, "another"));
        drop(mine);
        drop(claim(&other, 2, "another"));
    }

    #[test]
    fn a_process_takes_what_another_left_and_nothing_that_another_has() {
        let dir = tempfile::tempdir().unwrap();
        let one = Cache::open(dir.path().join("c")).unwrap();
        drop(claim(&one, 1, "one"));
        let two = Cache::open(one.root()).unwrap();
        drop(claim(&two, 2, "two"));
        assert_eq!(names(&one, Use::Claim).len(), 2, "each has its own");
        drop((one, two));
        let three = Cache::open(dir.path().join("c")).unwrap();
        let claims = [claim(&three, 3, "three"), claim(&three, 4, "three")];
        assert_eq!(names(&three, Use::Claim).len(), 0, "both are used");
        drop(claims);
        clear(three.layout());
        assert_eq!(names(&three, Use::Claim).len(), 2, "they are kept for it");
        let root = three.root().to_path_buf();
        drop(three);
        clear(Cache::open(root).unwrap().layout());
        assert_eq!(left(&dir.path().join("c/spares"), Use::Claim).len(), 0);
    }

    #[test]
    fn an_attempt_is_used_again_only_when_it_is_bare() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("c")).unwrap();
        let finished = crate::Finished { outputs: vec![], log: None, provenance: "".into() };
        let first = cache.attempt(&key(1)).unwrap();
        let id = fs::metadata(&first.dir).unwrap().ino();
        first.finish(&finished).unwrap();
        cache.attempts_park(&key(1));
        assert!(first.dir.exists(), "it is in use");
        let path = first.dir.clone();
        drop(first);
        cache.attempts_park(&key(1));
        assert!(!path.exists() && cache.finished(&key(1)).is_none());
        let second = cache.attempt(&key(2)).unwrap();
        assert_eq!(fs::metadata(&second.dir).unwrap().ino(), id, "it is the first one");
        assert_ne!(second.dir.file_name(), path.file_name());
        assert_eq!(cache.finished(&key(2)), None, "what it made is forgotten");
        second.finish(&finished).unwrap();
        assert_eq!(cache.finished(&key(2)), Some(finished));
        fs::write(second.dir.join("more"), "left by a program").unwrap();
        drop(second);
        cache.attempts_park(&key(2));
        assert!(!cache.layout().attempts(&key(2)).exists(), "it is removed");
        let third = cache.attempt(&key(3)).unwrap();
        assert!(!third.dir.join("more").exists());
    }

    #[test]
    fn a_spare_with_something_in_it_is_not_used_and_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let one = Cache::open(dir.path().join("c")).unwrap();
        drop(one.attempt(&key(1)).unwrap());
        one.attempts_park(&key(1));
        let spare = names(&one, Use::Attempt).into_iter().next().unwrap();
        fs::write(sole(&spare).unwrap().join("made"), "before a loss of power").unwrap();
        drop(one);
        let two = Cache::open(dir.path().join("c")).unwrap();
        let attempt = two.attempt(&key(2)).unwrap();
        assert!(!attempt.dir.join("made").exists());
        assert!(spare.exists());
        clear(two.layout());
        assert!(!spare.exists());
    }

    #[test]
    fn two_attempts_at_a_key_are_two() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("c")).unwrap();
        drop(cache.attempt(&key(1)).unwrap());
        cache.attempts_park(&key(1));
        let held = cache.attempt(&key(2)).unwrap();
        let free = cache.attempt(&key(2)).unwrap();
        assert_ne!(held.dir, free.dir);
        let gone = free.dir.clone();
        drop(free);
        cache.attempts_park(&key(2));
        assert!(held.dir.exists() && !gone.exists());
    }
}
