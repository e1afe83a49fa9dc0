//! Objects: digest → read-only bytes. Whole or absent under their name; knows no keys.

use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

use crate::crash_point;
use crate::digest::Digest;
use crate::error::{At, Error, Result};
use crate::layout::Layout;
use crate::lease::{Holds, Lock};
use crate::loss;
use crate::parts;
use crate::tree::{self, Kind};

/// What [`put`] found a path to be.
pub(crate) struct Stored {
    pub digest: Digest,
    pub kind: Kind,
    pub bytes: u64,
}

/// Moves `path`, a file or directory inside `within`, into the store. Not durable yet.
pub(crate) fn put(layout: &Layout, path: &Path, within: &Path) -> Result<Stored> {
    let (path, bytes) = &inside(path, within)?;
    let kind = tree::freeze(path, layout.access())?;
    let holds = Holds::of(layout, within);
    if kind == Kind::File
        && *bytes >= parts::LEAST
        && let Some(stored) = put_in_parts(layout, path, &holds)?
    {
        return Ok(stored);
    }
    let (digest, found, bytes) = tree::hash_with(path, &tree::hash_leaf)?;
    if found != kind {
        return Err(Error::Changed { path: path.to_path_buf() });
    }
    holds.add(&[digest])?;
    crash_point!("absorb.before-rename");
    place(layout, path, &digest, kind)?;
    crash_point!("absorb.after-rename");
    Ok(Stored { digest, kind, bytes })
}

/// Puts a file of tensors away in parts; `None` for any other file.
fn put_in_parts(layout: &Layout, path: &Path, holds: &Holds) -> Result<Option<Stored>> {
    let file = tree::open_plain(path).at("open", path)?;
    let bytes = file.metadata().at("inspect", path)?.len();
    let Some(cuts) = parts::cuts(&file, bytes) else { return Ok(None) };
    let digest = parts::put(layout, path, &file, &cuts, holds)?;
    Ok(Some(Stored { digest, kind: Kind::File, bytes }))
}

/// Gives `path` its name in the store. Bytes that are there already stay, since entries may rely
/// on their being durable; they are read again first, since after a loss of power a file can have
/// the right size and nothing in it.
pub(crate) fn place(layout: &Layout, path: &Path, digest: &Digest, kind: Kind) -> Result<()> {
    let object = layout.object(digest);
    layout.make_dir(object.parent().expect("objects are in shards"))?;
    let mode = layout.access().object_dir();
    loop {
        // So that nobody who saw damage here removes what gets the name now.
        let lock = Lock::shared(layout)?;
        let renamed = rename_new(path, &object, kind);
        drop(lock);
        match renamed {
            // What is lost again at once is found out when it is used.
            Ok(()) if kind == Kind::Dir => return protect(&object, mode).map(drop),
            Ok(()) => return Ok(()),
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                return Err(e).at("move into the store", path);
            }
            Err(_) if check(&object, digest, kind).is_ok() => {
                if kind == Kind::Dir {
                    match protect(&object, mode) {
                        Err(_) if layout.access().is_shared() => {} // another member's
                        // Somebody lost it, or saw damage in it, since it was read.
                        Ok(false) => continue,
                        result => drop(result?),
                    }
                }
                return tree::remove(path);
            }
            Err(_) => {
                layout.discard(&object)?;
                crash_point!("absorb.after-discard");
            }
        }
    }
}

/// Takes away the right to write into a directory; whether it is there.
fn protect(object: &Path, mode: u32) -> Result<bool> {
    match tree::set_mode(object, mode) {
        Err(Error::Io { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => Ok(false),
        result => result.map(|()| true),
    }
}

/// Whether the bytes at `object` are those of `digest`, by reading them all.
pub(crate) fn check(object: &Path, digest: &Digest, kind: Kind) -> Result<()> {
    let damaged = |what: String| Error::Damaged { path: object.to_path_buf(), what };
    if fs::symlink_metadata(object).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        return Err(Error::Missing { digest: *digest, path: object.to_path_buf() });
    }
    let (found, found_kind, _) = tree::hash_with(object, &tree::hash_leaf)?;
    if found_kind != kind {
        return Err(damaged(format!("expected a {kind:?}, found a {found_kind:?}").to_lowercase()));
    }
    if found != *digest {
        return Err(damaged(format!("their digest is `{found}`")));
    }
    Ok(())
}

/// The real path of `path`, which must be in `within` and no link, and its length.
fn inside(path: &Path, within: &Path) -> Result<(PathBuf, u64)> {
    let outside = || Error::Outside { path: path.to_path_buf(), within: within.to_path_buf() };
    let meta = fs::symlink_metadata(path).at("find", path)?;
    tree::kind_of(path, &meta)?;
    if directly(path, within) {
        return Ok((path.to_path_buf(), meta.len()));
    }
    let parent = fs::canonicalize(path.parent().ok_or_else(outside)?).at("find", path)?;
    let real = parent.join(path.file_name().ok_or_else(outside)?);
    let root = fs::canonicalize(within).at("find", within)?;
    if real.starts_with(&root) && real != root { Ok((real, meta.len())) } else { Err(outside()) }
}

/// Whether the names from `within` to `path` are those of directories and no links, as they mostly
/// are: told by one look at each of them.
fn directly(path: &Path, within: &Path) -> bool {
    let Ok(below) = path.strip_prefix(within) else { return false };
    let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    let is_dir = |dir: &Path| fs::symlink_metadata(dir).is_ok_and(|meta| meta.is_dir());
    let between = path.ancestors().skip(1).take_while(|dir| *dir != within);
    plain && below.file_name().is_some() && between.into_iter().all(is_dir)
}

/// `rename` that fails when the target exists, also where the file system cannot do that itself.
pub(crate) fn rename_new(from: &Path, to: &Path, kind: Kind) -> io::Result<()> {
    rename_no_replace(from, to, kind)?;
    loss::named(to, Some(from));
    loss::wrote(to);
    Ok(())
}

/// Gives a file whose bytes are durable another name, unless that is taken. `linked`: by a link, where
/// file systems may say that they rename without replacing, and do so by their own view of the name
/// only (CIFS).
pub(crate) fn name_synced(from: &Path, to: &Path, linked: bool) -> io::Result<()> {
    if linked {
        fs::hard_link(from, to)?;
        // It is named: what is left over is swept with the rest of `tmp`.
        let _ = fs::remove_file(from);
    } else {
        rename_no_replace(from, to, Kind::File)?;
    }
    loss::named(to, (!linked).then_some(from));
    Ok(())
}

fn rename_no_replace(from: &Path, to: &Path, kind: Kind) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        result => return Ok(result?),
    }
    if kind == Kind::File {
        fs::hard_link(from, to)?;
        let _ = fs::remove_file(from);
        return Ok(());
    }
    // Renaming over a directory succeeds only when that one is empty, which by its digest this
    // one is too.
    if fs::symlink_metadata(to).is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    fs::rename(from, to)
}

/// Makes all that was written to the store's file system durable; `paths` are what must be, for
/// systems that cannot do it at once.
pub(crate) fn sync_all(layout: &Layout, paths: impl Iterator<Item = PathBuf>) -> Result<()> {
    let root = File::open(layout.root()).at("open", layout.root())?;
    let mark = loss::mark();
    let synced = if loss::no_syncfs() { Err(Errno::NOSYS) } else { rustix::fs::syncfs(&root) };
    match synced {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        result => {
            result.at("sync", layout.root())?;
            loss::synced_all(mark);
            return Ok(());
        }
    }
    for path in paths {
        if fs::symlink_metadata(&path).is_ok() {
            tree::sync(&path)?;
        }
        let above = path.ancestors().skip(1).take_while(|p| p.starts_with(layout.root()));
        for dir in above {
            tree::sync_one(dir).at("sync", dir)?;
        }
    }
    Ok(())
}
