//! Whose a GPU is: a lock of the kernel's on a file that all processes of the machine agree on, which
//! ends with its process, so that nothing is ever left to unlock.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

/// Where everybody may make files that nobody else can remove, the same for all users.
const PLACES: [&str; 3] = ["/run/lock", "/dev/shm", "/tmp"];
/// World-writable and sticky.
const SHARED: u32 = 0o1777;

/// The directory of the locks.
pub fn place() -> PathBuf {
    let shared = |dir: &&&str| {
        fs::metadata(dir).is_ok_and(|meta| meta.is_dir() && meta.mode() & SHARED == SHARED)
    };
    PLACES.iter().find(shared).map_or_else(std::env::temp_dir, PathBuf::from)
}

/// The outcome of trying to lock a GPU.
#[derive(Debug)]
pub enum Locked {
    /// It is ours until the lock is dropped.
    Mine(Lock),
    /// Somebody has it; who, as far as that can be read.
    Busy(String),
}

/// The right to use a GPU.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    file: File,
}

/// The file that is locked for the GPU `uuid`.
pub(crate) fn file(dir: &Path, uuid: &str) -> PathBuf {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' };
    dir.join(format!("pipe-{}.lock", uuid.chars().map(plain).collect::<String>()))
}

/// Tries to lock the GPU `uuid` in `dir`; never waits. `who` is shown to those who come later.
pub fn lock(dir: &Path, uuid: &str, who: &str) -> io::Result<Locked> {
    let path = file(dir, uuid);
    loop {
        let mut file = open(&path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Ok(Locked::Busy(holder(&mut file))),
            result => result?,
        }
        // The file is unlinked when a lock ends: a lock on one without its name is nothing.
        let lock = Lock { path: path.clone(), file };
        if lock.named() {
            lock.sign(who);
            return Ok(Locked::Mine(lock));
        }
    }
}

impl Lock {
    /// Whether the file still has its name.
    fn named(&self) -> bool {
        let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
        let there = fs::symlink_metadata(&self.path).map(id).ok();
        there.is_some() && there == self.file.metadata().map(id).ok()
    }

    /// Leaves a name; where another user made the file, that may not be allowed.
    fn sign(&self, who: &str) {
        let _ = self.file.set_len(0).and_then(|()| (&self.file).write_all(who.as_bytes()));
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A file that another user made stays; it is locked again as it is.
        if self.named() {
            let _ = fs::remove_file(&self.path);
        }
        // Explicitly, since a child between fork and exec still shares the open file.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

/// Opens the lock file, and makes it for all users where there is none. In a directory that everybody
/// writes to, a link could lead anywhere: it is refused.
fn open(path: &Path) -> io::Result<File> {
    let mut tries = 0;
    loop {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(OFlags::NOFOLLOW.bits() as i32);
        // Without `create`, which the kernel forbids there for files of others.
        let opened = match options.clone().write(true).open(path) {
            Err(error) if error.kind() == ErrorKind::PermissionDenied => options.open(path),
            opened => opened,
        };
        match opened {
            Ok(file) => return checked(file),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                match options.write(true).create_new(true).mode(0o666).open(path) {
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                    Err(error) => return Err(error),
                    Ok(file) => {
                        file.set_permissions(fs::Permissions::from_mode(0o666))?;
                        return Ok(file);
                    }
                }
            }
            // Between the two calls above it may be closed to others.
            Err(error) if error.kind() == ErrorKind::PermissionDenied && tries < 20 => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error),
        }
    }
}

fn checked(file: File) -> io::Result<File> {
    let meta = file.metadata()?;
    // None: it was unlinked just now.
    if meta.is_file() && meta.nlink() <= 1 {
        return Ok(file);
    }
    Err(io::Error::other("the lock file is no plain file"))
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    let _ = file.rewind().and_then(|()| file.take(400).read_to_string(&mut text));
    match text.is_empty() {
        true => "another process".into(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy(dir: &Path) -> Option<String> {
        match lock(dir, "GPU-1", "another").unwrap() {
            Locked::Busy(who) => Some(who),
            Locked::Mine(_) => None,
        }
    }

    #[test]
    fn one_at_a_time_and_nothing_stays() {
        let dir = tempfile::tempdir().unwrap();
        let Locked::Mine(held) = lock(dir.path(), "GPU-1", "run 7").unwrap() else { panic!() };
        assert_eq!(busy(dir.path()).as_deref(), Some("run 7"));
        assert!(matches!(lock(dir.path(), "GPU-2", "x").unwrap(), Locked::Mine(_)));
        drop(held);
        assert_eq!(busy(dir.path()), None);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_that_its_owner_left_is_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("pipe-GPU-1.lock"), "killed long ago").unwrap();
        assert_eq!(busy(dir.path()), None);
    }

    #[test]
    fn everybody_may_lock_it() {
        let dir = tempfile::tempdir().unwrap();
        let Locked::Mine(held) = lock(dir.path(), "../GPU 1", "x").unwrap() else { panic!() };
        assert_eq!(held.path, dir.path().join("pipe-___GPU_1.lock"));
        assert_eq!(fs::metadata(&held.path).unwrap().mode() & 0o777, 0o666);
    }

    #[test]
    fn links_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("precious");
        fs::write(&target, "bytes").unwrap();
        let name = dir.path().join("pipe-GPU-1.lock");
        std::os::unix::fs::symlink(&target, &name).unwrap();
        assert!(lock(dir.path(), "GPU-1", "x").is_err());
        fs::remove_file(&name).unwrap();
        fs::hard_link(&target, &name).unwrap();
        assert!(lock(dir.path(), "GPU-1", "x").is_err());
        assert_eq!(fs::read_to_string(&target).unwrap(), "bytes");
    }
}
