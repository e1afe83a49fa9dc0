//! `stat` of many files, most of them beside the one before: relative to their directory, which spares
//! the walk along the path. Knows no memo.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags};

use crate::stat::Stamp;

/// Asks for one file after another.
#[derive(Debug, Default)]
pub(crate) struct Nearby {
    /// Whether a link stands for itself.
    links: bool,
    dir: Vec<u8>,
    /// Open from the second file in it on.
    open: Option<OwnedFd>,
}

impl Nearby {
    /// As a default one, but a link stands for itself and not for what it names.
    pub fn of_links() -> Nearby {
        Nearby { links: true, ..Nearby::default() }
    }

    /// What `stat` says of the file at `path`, which is absolute.
    pub fn stamp(&mut self, path: &Path) -> io::Result<Stamp> {
        let text = path.as_os_str().as_bytes();
        let cut = text.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        let (dir, name) = (&text[..cut], &text[(cut + 1).min(text.len())..]);
        if dir.is_empty() || name.is_empty() || self.dir != dir {
            self.dir.clear();
            self.dir.extend_from_slice(dir);
            self.open = None;
            return self.alone(path);
        }
        if self.open.is_none() {
            let how = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            self.open = Some(rustix::fs::open(dir, how, Mode::empty())?);
        }
        let links = if self.links { AtFlags::SYMLINK_NOFOLLOW } else { AtFlags::empty() };
        let dir = self.open.as_ref().expect("just opened");
        Ok(Stamp::of_stat(&rustix::fs::statat(dir, name, links)?))
    }

    fn alone(&self, path: &Path) -> io::Result<Stamp> {
        let meta = if self.links { fs::symlink_metadata(path) } else { fs::metadata(path) };
        Ok(Stamp::of(&meta?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_what_they_are_by_their_whole_path() {
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (root.path().join("a"), root.path().join("b"));
        for dir in [&a, &b] {
            fs::create_dir(dir).unwrap();
            for name in ["x", "y", "z"] {
                fs::write(dir.join(name), name).unwrap();
            }
            std::os::unix::fs::symlink("x", dir.join("link")).unwrap();
            std::os::unix::fs::symlink("nothing", dir.join("dangling")).unwrap();
        }
        let names = ["x", "y", "link", "none", "dangling", "z"];
        let paths = [&a, &b, &a].into_iter().flat_map(|dir| names.map(|name| dir.join(name)));
        let (mut followed, mut links) = (Nearby::default(), Nearby::of_links());
        for path in paths {
            let plain = fs::metadata(&path).ok().map(|meta| Stamp::of(&meta));
            assert_eq!(followed.stamp(&path).ok(), plain, "{}", path.display());
            let plain = fs::symlink_metadata(&path).ok().map(|meta| Stamp::of(&meta));
            assert_eq!(links.stamp(&path).ok(), plain, "{}", path.display());
        }
        for path in ["/", "/proc", "/proc/", "/proc/.", "/proc/..", "/proc/stat", "/proc/version"] {
            let plain = fs::metadata(path).ok().map(|meta| Stamp::of(&meta).ino);
            let stamp = followed.stamp(Path::new(path)).ok();
            assert_eq!(stamp.map(|stamp| stamp.ino), plain, "{path}");
        }
        let gone = root.path().join("gone");
        assert!(["x", "y"].iter().all(|name| links.stamp(&gone.join(name)).is_err()));
    }
}
