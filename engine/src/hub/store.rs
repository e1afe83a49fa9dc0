//! One repository in the cache that Hugging Face's tools share, in their layout:
//!
//! ```text
//! models--owner--name/
//!   blobs/<etag>                bytes, whole; `<etag>.pipe-incomplete` while we fetch them
//!   refs/<revision>             the commit it was, as text
//!   snapshots/<commit>/<file>   → ../../blobs/<etag>
//!   .pipe/<commit>              ours: the files of a model, one a line, written when all are here
//! .locks/models--owner--name/<etag>.lock
//! ```
//!
//! Knows no hub. Everything appears by rename or link, so that it is whole or absent.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::FlockOperation;

use super::Error;
use super::select::plain_path;

/// An index of weights is read whole; no true one is near this.
const INDEX: u64 = 64 << 20;

/// A repository's part of the cache.
pub struct Store {
    dir: PathBuf,
    locks: PathBuf,
}

impl Store {
    /// Touches nothing.
    pub fn new(cache: &Path, repository: &str) -> Store {
        let name = format!("models--{}", repository.replace('/', "--"));
        Store { dir: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// The commit that `revision` was when it was last fetched.
    pub fn get_ref(&self, revision: &str) -> Option<String> {
        let text = fs::read_to_string(self.dir.join("refs").join(revision)).ok()?;
        Some(text.trim().to_string()).filter(|text| super::is_commit(text))
    }

    /// Remembers what `revision` is. Only a help for later: a failure is none of the fetch.
    pub fn set_ref(&self, revision: &str, commit: &str) {
        if revision != commit && self.get_ref(revision).as_deref() != Some(commit) {
            let _ = write(&self.dir.join("refs").join(revision), commit);
        }
    }

    /// The files of a commit, if we saw all of them here.
    pub fn marked(&self, commit: &str) -> Option<Vec<String>> {
        let text = fs::read_to_string(self.dir.join(".pipe").join(commit)).ok()?;
        let names: Vec<String> = text.lines().map(Into::into).collect();
        names.iter().all(|name| plain_path(name)).then_some(names)
    }

    /// Notes that these files are all of a commit and here. As little a duty as [`Store::set_ref`].
    pub fn mark(&self, commit: &str, names: &[String]) {
        if self.marked(commit).is_none_or(|known| known != names) {
            let text: String = names.iter().map(|name| format!("{name}\n")).collect();
            let _ = write(&self.dir.join(".pipe").join(commit), &text);
        }
    }

    /// Where a file of a commit is, whether it is there or not.
    fn place(&self, commit: &str, name: &str) -> PathBuf {
        self.dir.join("snapshots").join(commit).join(name)
    }

    /// Where the bytes of a file are, links followed; `None` when they are not here.
    pub fn bytes_of(&self, commit: &str, name: &str) -> Option<PathBuf> {
        fs::canonicalize(self.place(commit, name)).ok().filter(|path| path.is_file())
    }

    /// The files at the top of what is here of a commit.
    pub fn names(&self, commit: &str) -> Vec<String> {
        let items = fs::read_dir(self.dir.join("snapshots").join(commit));
        let items = items.into_iter().flatten().flatten().filter(|item| item.path().is_file());
        let mut names: Vec<String> =
            items.filter_map(|item| item.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// A small file of a commit.
    pub fn read(&self, commit: &str, name: &str) -> Result<Vec<u8>, String> {
        let path = self.bytes_of(commit, name).ok_or_else(|| format!("no `{name}` is here"))?;
        let big = fs::metadata(&path).is_ok_and(|meta| meta.len() > INDEX);
        if big {
            return Err(format!("`{name}` is too big for an index"));
        }
        fs::read(&path).map_err(|e| format!("cannot read `{}`: {e}", path.display()))
    }

    /// Whole bytes by their name.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.dir.join("blobs").join(etag)
    }

    /// What there is of bytes being fetched. The name is ours alone: other tools have theirs.
    pub fn partial(&self, etag: &str) -> PathBuf {
        self.dir.join("blobs").join(format!("{etag}.pipe-incomplete"))
    }

    /// Makes the folder of the bytes.
    pub fn prepare(&self) -> Result<(), Error> {
        let blobs = self.dir.join("blobs");
        fs::create_dir_all(&blobs).map_err(|e| cannot("create", &blobs, &e))
    }

    /// Waits until no other process fetches the same bytes; Hugging Face's tools take the same
    /// lock. It ends with the returned file.
    pub fn lock(&self, etag: &str, stopped: &dyn Fn() -> bool) -> Result<File, Error> {
        let path = self.locks.join(format!("{etag}.lock"));
        fs::create_dir_all(&self.locks).map_err(|e| cannot("create", &self.locks, &e))?;
        let file = File::options().create(true).append(true).open(&path);
        let file = file.map_err(|e| cannot("open", &path, &e))?;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(e) if e == rustix::io::Errno::WOULDBLOCK => {}
                Err(e) if e == rustix::io::Errno::INTR => {}
                Err(e) => return Err(cannot("lock", &path, &e.into())),
            }
            if stopped() {
                return Err(Error::stopped());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Names whole bytes as a file of a commit.
    pub fn link(&self, commit: &str, name: &str, etag: &str) -> Result<(), Error> {
        let place = self.place(commit, name);
        let up = "../".repeat(name.split('/').count() + 1);
        let parent = place.parent().unwrap_or(&self.dir);
        fs::create_dir_all(parent).map_err(|e| cannot("create", parent, &e))?;
        let tmp = beside(&place);
        std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), &tmp)
            .and_then(|()| fs::rename(&tmp, &place))
            .map_err(|e| cannot("link", &place, &e))
    }
}

/// An error of the disk here.
pub fn cannot(what: &str, path: &Path, error: &std::io::Error) -> Error {
    let hint = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "\nhint: make room, or set HF_HUB_CACHE to another disk; what is here is kept"
        }
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            "\nhint: set HF_HUB_CACHE to a directory of your own"
        }
        _ => "",
    };
    Error::here(format!("cannot {what} `{}`: {error}{hint}", path.display()))
}

/// Writes a small file whole or not at all.
fn write(path: &Path, text: &str) -> std::io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
    let tmp = beside(path);
    fs::write(&tmp, text)?;
    fs::rename(&tmp, path)
}

/// A name of the same folder that nobody else uses.
fn beside(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".pipe-{}-{count}.tmp", std::process::id()))
}
