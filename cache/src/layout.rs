//! Where things lie below the root of a cache, and who may read them. Knows no content.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::OFlags;

use crate::access::{self, Access};
use crate::crash_point;
use crate::digest::{Digest, Key};
use crate::error::{At, Error, Result};
use crate::lives::Lives;
use crate::loss;
use crate::place;
use crate::store;
use crate::tree::{self, Kind};

const VERSION: u32 = 1;
const WORDS: &str = "pipe cache layout ";
const DIRS: [&str; 15] = [
    "entries",
    "objects",
    "recipes",
    "attempts",
    "locks",
    "leases",
    "lives",
    "pins",
    "divergences",
    "runs",
    "delivered",
    "index",
    "staging",
    "spares",
    "trash",
];

/// The paths of one cache.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
    access: Access,
    /// Where no lock of the kernel's can be relied on.
    lives: Option<Arc<Lives>>,
    /// Open files of `gc.lock` that nobody uses just now: it is locked several times a step.
    pub(crate) idle_locks: Arc<Mutex<Vec<File>>>,
}

impl Layout {
    /// Opens the cache at `root`, making it when there is none: for the user alone, unless it is to
    /// be `shared`.
    pub fn create(root: &Path, shared: bool) -> Result<Layout> {
        if let Some(parent) = root.parent() {
            fs::create_dir_all(parent).at("create", parent)?;
        }
        match DirBuilder::new().mode(0o700).create(root) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            result => result.at("create", root)?,
        }
        if !root.is_dir() {
            return Err(Error::NotACache { path: root.to_path_buf() });
        }
        let layout = Layout::begin(root, shared)?;
        if shared && !layout.access.is_shared() {
            return Err(Error::Private { path: layout.root });
        }
        // One look is cheaper than to make each in vain.
        let items = fs::read_dir(&layout.root).at("read", &layout.root)?;
        let there: HashSet<PathBuf> = items.flatten().map(|item| item.path()).collect();
        let missing = |path: &PathBuf| !there.contains(path);
        let mut new = false;
        for dir in DIRS.map(|name| layout.root.join(name)).iter().filter(|dir| missing(dir)) {
            layout.make_dir(dir)?;
            new = true;
        }
        // Now, since a full disk can still be collected on.
        for path in [layout.gc_lock(), layout.gc_turn()].iter().filter(|path| missing(path)) {
            layout.open_file(path, false).at("create", path)?;
        }
        if new {
            crash_point!("open.before-sync");
            tree::sync_one(&layout.root).at("sync", &layout.root)?;
        }
        Ok(layout)
    }

    /// Opens the directory `root`, which must be a cache of a known layout or empty.
    pub fn open(root: &Path) -> Result<Layout> {
        Layout::begin(root, false)
    }

    fn begin(root: &Path, shared: bool) -> Result<Layout> {
        let root = fs::canonicalize(root).at("find", root)?;
        let path = root.join("version");
        match fs::read_to_string(&path) {
            Ok(text) => check_version(&root, &text)?,
            Err(e) if e.kind() == ErrorKind::NotFound => start(&root, &path, shared)?,
            Err(e) => return Err(e).at("read", &path),
        }
        let access = Access::of(&fs::metadata(&root).at("inspect", &root)?);
        let lives = place::leases(&root, &access)?.then(|| Lives::of(&root.join("lives")));
        Ok(Layout { root, access, lives, idle_locks: Arc::default() })
    }

    /// Who lives, where locks are files that name a living process.
    pub fn lives(&self) -> Option<&Lives> {
        self.lives.as_deref()
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn access(&self) -> Access {
        self.access
    }

    /// Makes one directory, whatever the umask; one that is there stays as it is,
    /// which gives `false`.
    pub fn make_dir(&self, dir: &Path) -> Result<bool> {
        loop {
            match DirBuilder::new().mode(0o700).create(dir) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists => return Ok(false),
                result => result.at("create", dir)?,
            }
            loss::named(dir, None);
            let made = fs::symlink_metadata(dir).map(|meta| meta.mode() & 0o7777);
            // Mostly it is right, and to look is cheaper than to set it.
            if made.is_ok_and(|mode| mode == self.access.dir()) {
                return Ok(true);
            }
            match tree::set_mode(dir, self.access.dir()) {
                // Others remove directories that are empty.
                Err(Error::Io { cause, .. }) if cause.kind() == ErrorKind::NotFound => {}
                result => return result.map(|()| true),
            }
        }
    }

    /// Opens a file for reading and writing, or appending, by everybody whose cache this is; makes
    /// it when there is none. A link is not followed.
    pub fn open_file(&self, path: &Path, append: bool) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(!append).append(append).mode(self.access.file());
        options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32);
        if !self.access.is_shared() {
            return options.create(true).open(path);
        }
        loop {
            match options.open(path) {
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                result => return result,
            }
            // Under its name it has its mode from the beginning, so that others can open it.
            let staged = self.staging();
            let file = options.clone().create_new(true).open(&staged)?;
            let named = self.access.admit(&file);
            let named = named.and_then(|()| store::rename_new(&staged, path, Kind::File));
            match named {
                Ok(()) => return Ok(file),
                Err(e) => {
                    let _ = fs::remove_file(&staged);
                    if e.kind() != ErrorKind::AlreadyExists {
                        return Err(e);
                    }
                }
            }
        }
    }

    /// Writes a small file whole or not at all, in place of what is there.
    pub fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        self.write_by(path, |mut file| file.write_all(bytes))
    }

    /// As [`Layout::write`], by what fills the new file.
    pub fn write_by(&self, path: &Path, fill: impl FnOnce(&File) -> io::Result<()>) -> Result<()> {
        // Beside it, which is the same disk whatever is mounted where.
        let staged = path.with_file_name(format!(".{}.tmp", unique()));
        let write = || {
            let file = File::create_new(&staged)?;
            self.access.admit(&file)?;
            fill(&file)
        };
        let clean = |_: &io::Error| drop(fs::remove_file(&staged));
        write().inspect_err(clean).at("write", path)?;
        fs::rename(&staged, path).inspect_err(clean).at("create", path)
    }

    pub fn dir(&self, name: &str) -> PathBuf {
        debug_assert!(DIRS.contains(&name));
        self.root.join(name)
    }

    pub fn entry(&self, key: &Key) -> PathBuf {
        self.sharded("entries", &key.to_string())
    }

    pub fn object(&self, digest: &Digest) -> PathBuf {
        self.sharded("objects", &digest.to_string())
    }

    pub fn recipe(&self, digest: &Digest) -> PathBuf {
        self.sharded("recipes", &digest.to_string())
    }

    pub fn lock(&self, key: &Key) -> PathBuf {
        self.sharded("locks", &key.to_string())
    }

    pub fn attempts(&self, key: &Key) -> PathBuf {
        self.root.join("attempts").join(key.to_string())
    }

    pub fn pin(&self, key: &Key) -> PathBuf {
        self.root.join("pins").join(key.to_string())
    }

    /// What notes of uses and their collection share.
    pub fn gc_lock(&self) -> PathBuf {
        self.root.join("gc.lock")
    }

    /// Which process collects.
    pub fn gc_turn(&self) -> PathBuf {
        self.root.join("gc.turn")
    }

    pub fn divergences(&self, key: &Key) -> PathBuf {
        self.root.join("divergences").join(key.to_string())
    }

    /// A new name for something that is not whole yet.
    pub fn staging(&self) -> PathBuf {
        self.root.join("staging").join(unique())
    }

    /// Moves what is at `path` out of the way at once, then removes it; a crash between the two
    /// leaves garbage in `trash/` and never half a thing under its name.
    pub fn discard(&self, path: &Path) -> Result<()> {
        let Some(moved) = self.to_trash(path)? else { return Ok(()) };
        crash_point!("discard.after-move");
        self.unlink(&moved)
    }

    /// Removes something from the trash. Others empty it too, so parts of it may go meanwhile. What
    /// only another member of the group may remove stays there until that one starts the next time.
    pub fn unlink(&self, moved: &Path) -> Result<()> {
        for _ in 0..20 {
            if tree::remove(moved).is_ok() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        match tree::remove(moved) {
            Err(_) if !moved.exists() => Ok(()),
            Err(Error::Io { cause, .. })
                if self.access.is_shared() && cause.kind() == ErrorKind::PermissionDenied =>
            {
                Ok(())
            }
            result => result,
        }
    }

    /// Moves what is at `path` out of the way; gives where it is now, to be removed, or `None`
    /// when nothing was there.
    pub fn to_trash(&self, path: &Path) -> Result<Option<PathBuf>> {
        let to = self.root.join("trash").join(unique());
        if path.is_dir() && !path.is_symlink() {
            // A read-only directory cannot be moved to another parent.
            match tree::set_mode(path, self.access.dir()) {
                Err(_) if !path.exists() => return Ok(None),
                // Another member's; it is writable by its mode.
                Err(_) if self.access.is_shared() => {}
                result => result?,
            }
        }
        match fs::rename(path, &to) {
            Ok(()) => {
                loss::named(&to, Some(path));
                Ok(Some(to))
            }
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e).at("move to the trash", path),
        }
    }

    /// Removes what a crash left in `trash/`, and in `staging/` when it is older than a day.
    pub fn sweep(&self) {
        if let Some(lives) = self.lives() {
            lives.sweep(Duration::from_secs(86_400));
        }
        for item in fs::read_dir(self.dir("trash")).into_iter().flatten().flatten() {
            let _ = tree::remove(&item.path());
        }
        for item in fs::read_dir(self.dir("staging")).into_iter().flatten().flatten() {
            let age = item.metadata().and_then(|m| m.modified()).map(|t| t.elapsed());
            if age.is_ok_and(|age| age.is_ok_and(|age| age.as_secs() > 86_400)) {
                let _ = tree::remove(&item.path());
            }
        }
    }

    fn sharded(&self, dir: &str, name: &str) -> PathBuf {
        let mut path = PathBuf::with_capacity(self.root.as_os_str().len() + 80);
        path.push(&self.root);
        path.push(dir);
        path.push(&name[..2]);
        path.push(name);
        path
    }
}

/// A name nobody else uses: process, time, count.
pub(crate) fn unique() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    format!("{now:016x}-{:x}-{:x}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

fn check_version(root: &Path, text: &str) -> Result<()> {
    let found = text.strip_prefix(WORDS).and_then(|v| v.trim_end().parse::<u32>().ok());
    if found == Some(VERSION) {
        return Ok(());
    }
    Err(Error::Layout {
        path: root.to_path_buf(),
        found: found.map_or_else(|| text.trim().chars().take(40).collect(), |v| v.to_string()),
        known: VERSION.to_string(),
    })
}

/// Makes an empty directory a cache. Another process may be doing the same.
fn start(root: &Path, version: &Path, shared: bool) -> Result<()> {
    let mut names = Vec::new();
    for item in fs::read_dir(root).at("list", root)? {
        names.push(item.at("list", root)?.file_name().to_string_lossy().into_owned());
    }
    let started = names.iter().any(|n| n == "version");
    if !started && names.iter().any(|n| !n.starts_with(".version-")) {
        return Err(Error::NotACache { path: root.to_path_buf() });
    }
    access::begin(root, shared).at("set the mode of", root)?;
    let tmp = root.join(format!(".version-{}", unique()));
    let write = || {
        let mut file = File::create_new(&tmp)?;
        file.write_all(format!("{WORDS}{VERSION}\n").as_bytes())?;
        Access::of(&fs::metadata(root)?).admit(&file)
    };
    write().inspect_err(|_| drop(fs::remove_file(&tmp))).at("write", &tmp)?;
    loss::wrote(&tmp);
    // Before anything else is in the directory: a cache whose version is lost or empty would be
    // opened by nobody.
    tree::sync_one(&tmp).at("sync", &tmp)?;
    crash_point!("open.before-version");
    fs::rename(&tmp, version).at("create", version)?;
    loss::named(version, Some(&tmp));
    crash_point!("open.after-version");
    tree::sync_one(root).at("sync", root)?;
    // Its own name too, where we may.
    let _ = root.parent().map(tree::sync_one);
    Ok(())
}
