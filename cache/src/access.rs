//! Who may read and write a cache: its user alone, or everybody of a group. Knows no paths.
//!
//! The mode of the root says which of the two it is, and everything below takes after it: so nobody
//! has to say it twice, and nobody says something else by mistake.

use std::fs::{self, File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

/// Setgid, so that what is made in a directory belongs to the directory's group.
const SHARED: u32 = 0o2770;
const PRIVATE: u32 = 0o700;

/// For whom the cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Private,
    /// The members of this group, each of whom all others trust.
    Group(u32),
}

impl Access {
    /// What the root's own mode says.
    pub fn of(root: &Metadata) -> Access {
        match root.mode() & SHARED == SHARED {
            true => Access::Group(root.gid()),
            false => Access::Private,
        }
    }

    pub fn is_shared(self) -> bool {
        self != Access::Private
    }

    /// Of directories.
    pub fn dir(self) -> u32 {
        if self.is_shared() { SHARED } else { PRIVATE }
    }

    /// Of directories that are artifacts. Removing one takes the right to write to it, and only
    /// its owner could give that: so a group's are not read-only.
    pub fn object_dir(self) -> u32 {
        if self.is_shared() { SHARED } else { 0o555 }
    }

    /// Of locks, notes and whatever else is written to.
    pub fn file(self) -> u32 {
        if self.is_shared() { 0o660 } else { 0o600 }
    }

    /// Of entries.
    pub fn entry(self) -> u32 {
        if self.is_shared() { 0o440 } else { 0o400 }
    }

    /// Gives a file just made its mode, whatever the umask.
    pub fn admit(self, file: &File) -> io::Result<()> {
        match self.is_shared() {
            true => file.set_permissions(Permissions::from_mode(self.file())),
            false => Ok(()),
        }
    }

    /// Gives what was made elsewhere and moved here the group of the cache.
    pub fn regroup(self, path: &Path, meta: &Metadata) -> io::Result<()> {
        match self {
            Access::Group(gid) if meta.gid() != gid => {
                std::os::unix::fs::lchown(path, None, Some(gid))
            }
            _ => Ok(()),
        }
    }
}

/// What a new root gets.
pub(crate) fn begin(root: &Path, shared: bool) -> io::Result<()> {
    let mode = if shared { SHARED } else { PRIVATE };
    fs::set_permissions(root, Permissions::from_mode(mode))
}
