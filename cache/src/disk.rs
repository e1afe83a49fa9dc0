//! What is to be said when a disk is full. Knows no cache.

use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// With less room than this a disk counts as full: programs fail before the last byte is used.
const LEAST: u64 = 256 << 10;

/// What helps.
const HINT: &str = "make room there, by `pipe cache gc` if the cache is on it, and run again: what \
                    is done stays done";

/// In words and with a hint, when `error` says that the disk at `path` has no room.
pub(crate) fn of_error(error: &io::Error, path: &Path) -> Option<String> {
    let (full, quota) = (ErrorKind::StorageFull, ErrorKind::QuotaExceeded);
    let kind = error.kind();
    (kind == full || kind == quota).then(|| describe(path, kind == quota))
}

/// The same for what happened at `path`, whatever it was, if the disk has next to no room now.
pub fn trouble(path: &Path) -> Option<String> {
    let room = Room::at(path)?;
    (room.free < LEAST || room.no_inodes()).then(|| describe(path, false))
}

fn describe(path: &Path, quota: bool) -> String {
    let mount = mount_of(path);
    let disk = format!("the disk at `{}`", mount.display());
    let room = Room::at(&mount);
    let what = match room {
        _ if quota => format!("{disk} gives this user no more room (quota)"),
        Some(room) if room.no_inodes() && room.free >= LEAST => {
            format!("{disk} has room for no more files: all of its {} inodes are used", room.inodes)
        }
        Some(room) => {
            let megabytes = |bytes: u64| bytes as f64 / 1e6;
            let (free, all) = (megabytes(room.free), megabytes(room.all));
            format!("{disk} is full: {free:.1} of {all:.1} MB are free")
        }
        None => format!("{disk} is full"),
    };
    format!("{what}\nhint: {HINT}")
}

struct Room {
    free: u64,
    all: u64,
    inodes: u64,
    free_inodes: u64,
}

impl Room {
    /// Of what is at `path`, or above it.
    fn at(path: &Path) -> Option<Room> {
        let there = path.ancestors().find(|above| above.exists())?;
        let told = rustix::fs::statvfs(there).ok()?;
        Some(Room {
            free: told.f_bavail.saturating_mul(told.f_frsize),
            all: told.f_blocks.saturating_mul(told.f_frsize),
            inodes: told.f_files,
            free_inodes: told.f_favail,
        })
    }

    /// File systems that make inodes as they are needed say that they have none at all.
    fn no_inodes(&self) -> bool {
        self.inodes > 0 && self.free_inodes < 2
    }
}

/// Where the file system of `path` begins.
fn mount_of(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let there = path.ancestors().find(|above| above.exists()).unwrap_or(Path::new("/"));
    let there = there.canonicalize().unwrap_or_else(|_| there.to_path_buf());
    let device = |path: &Path| path.metadata().map(|meta| meta.dev()).ok();
    let mine = device(&there);
    let inside = there.ancestors().take_while(|above| device(above) == mine);
    inside.last().unwrap_or(&there).to_path_buf()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_named_by_where_it_begins_and_is_not_full() {
        assert_eq!(mount_of(Path::new("/proc/self/no/such/file")), Path::new("/proc"));
        let dir = tempfile::tempdir().unwrap();
        let full = io::Error::from(ErrorKind::StorageFull);
        let text = of_error(&full, &dir.path().join("not/there")).unwrap();
        let mount = mount_of(dir.path());
        assert!(text.contains(&format!("the disk at `{}`", mount.display())), "{text}");
        assert!(text.contains("\nhint: make room there"), "{text}");
        assert_eq!(of_error(&ErrorKind::NotFound.into(), dir.path()), None);
        assert_eq!(trouble(dir.path()), None);
    }
}
