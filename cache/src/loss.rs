//! What a loss of power would take: the names given and the bytes written in a store since the last
//! sync that covers them. Kept only where a test asks for it, and never in release builds.
//!
//! With `PIPE_CRASH_LOSE=<seed>` a process that ends at a crash point first does to each of them, by
//! that seed, one of what a file system may do: keeps it, empties it, fills it with zeros, cuts it in
//! half, takes the name away. With `PIPE_CRASH_SYNC=each` there is no sync of a whole file system, as
//! on systems that cannot do that.
//!
//! Names of one thing are lost from the last one back, as journals do; those of different things in
//! any combination. Who writes without saying so here is not simulated: locks, notes of uses, the
//! engine's records.

use std::path::Path;

/// The bytes at `path`, and of all that is below it, are not durable.
pub(crate) fn wrote(_path: &Path) {
    #[cfg(debug_assertions)]
    journal::change(|journal| journal.wrote(_path));
}

/// `path` has just got its name, and lost the name `from`.
pub(crate) fn named(_path: &Path, _from: Option<&Path>) {
    #[cfg(debug_assertions)]
    journal::change(|journal| journal.named(_path, _from));
}

/// What is at `path` is about to be replaced by a rename.
pub(crate) fn replacing(_path: &Path) {
    #[cfg(debug_assertions)]
    journal::change(|journal| journal.replacing(_path));
}

/// The file at `path` is about to be removed.
pub(crate) fn removing(_path: &Path) {
    #[cfg(debug_assertions)]
    journal::change(|journal| journal.removing(_path));
}

/// The bytes of the file `path`, or the names in the directory `path`, are durable.
pub(crate) fn synced(_path: &Path) {
    #[cfg(debug_assertions)]
    journal::change(|journal| journal.synced(_path));
}

/// To be asked before a sync of everything.
pub(crate) fn mark() -> u64 {
    let mut _at = 0;
    #[cfg(debug_assertions)]
    journal::change(|journal| _at = journal.at);
    _at
}

/// All that was noted before `mark` is durable.
pub(crate) fn synced_all(_mark: u64) {
    #[cfg(debug_assertions)]
    journal::change(|journal| journal.synced_all(_mark));
}

/// Whether this system cannot sync everything at once.
pub(crate) fn no_syncfs() -> bool {
    cfg!(debug_assertions) && std::env::var_os("PIPE_CRASH_SYNC").is_some()
}

#[cfg(debug_assertions)]
pub(crate) use journal::lose;

#[cfg(debug_assertions)]
mod journal {
    use std::collections::{BTreeMap, HashMap};
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::path::{Path, PathBuf};
    use std::sync::{LazyLock, Mutex, PoisonError};

    use crate::tree;

    static SEED: LazyLock<Option<u64>> =
        LazyLock::new(|| std::env::var("PIPE_CRASH_LOSE").ok()?.parse().ok());
    static JOURNAL: LazyLock<Mutex<Journal>> = LazyLock::new(Mutex::default);

    /// A change of names in a directory, and how to undo it.
    struct Change {
        at: u64,
        path: PathBuf,
        how: How,
    }

    enum How {
        /// It is this inode, was called `from` before, and there was a file with `before` in it.
        Named { ino: u64, from: Option<PathBuf>, before: Option<Vec<u8>> },
        /// There was a file with this in it.
        Removed(Vec<u8>),
    }

    #[derive(Default)]
    pub struct Journal {
        pub at: u64,
        /// Files whose bytes are not durable, and since when.
        bytes: BTreeMap<PathBuf, u64>,
        changes: Vec<Change>,
        replaced: HashMap<PathBuf, Vec<u8>>,
    }

    pub fn change(f: impl FnOnce(&mut Journal)) {
        if SEED.is_some() {
            let mut journal = JOURNAL.lock().unwrap_or_else(PoisonError::into_inner);
            journal.at += 1;
            f(&mut journal);
        }
    }

    impl Journal {
        pub fn wrote(&mut self, path: &Path) {
            self.bytes.extend(files(path).into_iter().map(|file| (file, self.at)));
        }

        pub fn named(&mut self, path: &Path, from: Option<&Path>) {
            let Ok(meta) = fs::symlink_metadata(path) else { return };
            if let Some(from) = from {
                self.moved(from, path);
            }
            let (from, before) = (from.map(Path::to_path_buf), self.replaced.remove(path));
            let how = How::Named { ino: meta.ino(), from, before };
            self.changes.push(Change { at: self.at, path: path.to_path_buf(), how });
        }

        fn moved(&mut self, from: &Path, to: &Path) {
            for (path, at) in std::mem::take(&mut self.bytes) {
                let path = match path.strip_prefix(from) {
                    Ok(below) if below.as_os_str().is_empty() => to.to_path_buf(),
                    Ok(below) => to.join(below),
                    Err(_) => path,
                };
                self.bytes.insert(path, at);
            }
        }

        pub fn replacing(&mut self, path: &Path) {
            if let Ok(bytes) = fs::read(path) {
                self.replaced.insert(path.to_path_buf(), bytes);
            }
        }

        pub fn removing(&mut self, path: &Path) {
            if let Ok(bytes) = fs::read(path) {
                let how = How::Removed(bytes);
                self.changes.push(Change { at: self.at, path: path.to_path_buf(), how });
            }
        }

        pub fn synced(&mut self, path: &Path) {
            self.changes.retain(|change| change.path.parent() != Some(path));
            self.bytes.remove(path);
        }

        pub fn synced_all(&mut self, mark: u64) {
            self.changes.retain(|change| change.at > mark);
            self.bytes.retain(|_, at| *at > mark);
        }

        fn undo(&mut self, change: &Change) {
            let path = &change.path;
            match &change.how {
                How::Removed(bytes) => {
                    if fs::symlink_metadata(path).is_err() {
                        restore(path, bytes);
                    }
                }
                How::Named { ino, from, before } => {
                    if !fs::symlink_metadata(path).is_ok_and(|meta| meta.ino() == *ino) {
                        return; // it has another name or is gone
                    }
                    if path.is_dir() {
                        let _ = tree::set_mode(path, 0o700);
                    }
                    let back = from.as_ref().filter(|from| fs::symlink_metadata(from).is_err());
                    if back.is_none_or(|from| fs::rename(path, from).is_err()) {
                        let _ = tree::remove(path);
                    } else {
                        self.moved(path, from.as_ref().expect("it went there"));
                    }
                    if let Some(bytes) = before {
                        restore(path, bytes);
                    }
                }
            }
        }
    }

    fn restore(path: &Path, bytes: &[u8]) {
        let _ = fs::write(path, bytes);
        let _ = tree::set_mode(path, 0o400);
    }

    /// Takes away what was never synced.
    pub fn lose() {
        let Some(seed) = *SEED else { return };
        let mut journal = JOURNAL.lock().unwrap_or_else(PoisonError::into_inner);
        let mut dice = Dice(seed);
        // All, most or some of it.
        let share = [100, 70, 30][dice.below(3) as usize];
        let changes = std::mem::take(&mut journal.changes);
        for change in changes.iter().rev() {
            if dice.below(100) < share {
                journal.undo(change);
            }
        }
        let paths: Vec<PathBuf> = journal.bytes.keys().cloned().collect();
        for file in paths {
            if dice.below(100) < share {
                spoil(&file, dice.below(3));
            }
        }
        // Nobody notes anything any more.
        std::mem::forget(journal);
    }

    fn files(path: &Path) -> Vec<PathBuf> {
        match fs::read_dir(path) {
            Ok(items) => items.flatten().flat_map(|item| files(&item.path())).collect(),
            Err(_) => vec![path.to_path_buf()],
        }
    }

    fn spoil(path: &Path, how: u64) {
        let Ok(meta) = fs::symlink_metadata(path) else { return };
        let _ = tree::set_mode(path, 0o600);
        if let Ok(file) = fs::File::options().write(true).open(path) {
            let _ = match how {
                0 => file.set_len(0),
                1 => file.set_len(meta.len() / 2),
                _ => file.set_len(0).and_then(|()| file.set_len(meta.len())),
            };
        }
        let _ = tree::set_mode(path, meta.permissions().mode() & 0o777);
    }

    /// Splitmix64.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, n: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)) % n
        }
    }
}
