//! The one error type of the crate. Knows paths and digests, not steps.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::{Digest, Key};
use crate::disk;

/// What can go wrong with bytes on a disk.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {doing} `{}`: {cause}", path.display())]
    Io { doing: &'static str, path: PathBuf, cause: io::Error },
    /// `what` names the disk and has a hint.
    #[error("cannot {doing} `{}`: {what}", path.display())]
    Full { doing: &'static str, path: PathBuf, what: String },
    #[error(
        "`{path}` is a private cache, and stays one unless it is opened to a group by hand\nhint: \
         give another directory; or, while nothing runs, `chgrp -R GROUP {path} && chmod -R g=u \
         {path} && find {path} -type d -exec chmod 2770 {{}} +`",
        path = path.display()
    )]
    Private { path: PathBuf },
    #[error(
        "`{}` is not a cache and not empty: give an empty or a new directory",
        path.display()
    )]
    NotACache { path: PathBuf },
    #[error(
        "the cache `{}` has layout `{found}`, this build knows `{known}`: use a newer build, or \
         another directory",
        path.display()
    )]
    Layout { path: PathBuf, found: String, known: String },
    #[error(
        "`{}` is a symbolic link: its target is not part of the bytes; put a copy of the target \
         in its place",
        path.display()
    )]
    Symlink { path: PathBuf },
    #[error("`{}` is neither a file nor a directory", path.display())]
    Special { path: PathBuf },
    #[error("`{}` changed while it was read: keep it still and run again", path.display())]
    Changed { path: PathBuf },
    #[error(
        "`{}` is not inside `{}`: an attempt gives only files of its own directory",
        path.display(), within.display()
    )]
    Outside { path: PathBuf, within: PathBuf },
    #[error("`{name}` is no name of a file: it must be one path component")]
    BadName { name: String },
    #[error("the entry of `{key}` names a pre-image whose digest is `{found}`")]
    WrongKey { key: Key, found: Key },
    #[error("the bytes of `{digest}` are missing: expected at `{}`", path.display())]
    Missing { digest: Digest, path: PathBuf },
    #[error("the bytes at `{}` are damaged: {what}", path.display())]
    Damaged { path: PathBuf, what: String },
    #[error("`{text}` is no {what}: expected 64 hexadecimal digits")]
    BadHex { what: &'static str, text: String },
    #[error("could not publish {count} result(s), the first, `{key}`: {reason}")]
    Publish { count: usize, key: Key, reason: String },
    #[error("the thread that publishes results has ended: {what}")]
    Committer { what: String },
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Says what was being done where, for errors of the operating system.
pub(crate) trait At<T> {
    fn at(self, doing: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> At<T> for std::result::Result<T, E> {
    fn at(self, doing: &'static str, path: &Path) -> Result<T> {
        self.map_err(|e| {
            let (cause, path) = (e.into(), path.to_path_buf());
            match disk::of_error(&cause, &path) {
                Some(what) => Error::Full { doing, path, what },
                None => Error::Io { doing, path, cause },
            }
        })
    }
}
