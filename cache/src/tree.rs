//! A file or a directory as one thing: its digest, its size, made read-only, removed. Knows no
//! store.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::access::Access;
use crate::digest::{self, Digest};
use crate::error::{At, Error, Result};
use crate::recipe::{Item, Recipe};

/// What an artifact is on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    File,
    Dir,
}

/// Gives a file's digest. Those of a directory are asked for on several threads at once.
pub(crate) type Leaf<'a> = dyn Fn(&Path, &Metadata) -> Result<Digest> + Sync + 'a;

/// Directories are hashed in a domain of their own, so that no file has a directory's digest.
const DOMAIN: &str = "pipe cache: directory listing, version 1";

/// Digest, kind and size in bytes of a file or a directory. A symbolic link is followed when it is
/// `path` itself.
///
/// # Errors
/// A symbolic link or a device inside a directory, what cannot be read, what changes meanwhile.
pub fn hash_path(path: impl AsRef<Path>) -> Result<(Digest, Kind, u64)> {
    let path = path.as_ref();
    let real = fs::canonicalize(path).at("find", path)?;
    hash_with(&real, &hash_leaf)
}

/// As [`hash_path`] for a path that is itself no link; `leaf` gives a file's digest.
pub(crate) fn hash_with(path: &Path, leaf: &Leaf<'_>) -> Result<(Digest, Kind, u64)> {
    let meta = fs::symlink_metadata(path).at("inspect", path)?;
    match kind_of(path, &meta)? {
        Kind::File => Ok((leaf(path, &meta)?, Kind::File, meta.len())),
        Kind::Dir => {
            let (digest, bytes) = hash_dir(path, leaf)?;
            Ok((digest, Kind::Dir, bytes))
        }
    }
}

/// A directory's digest: per entry, sorted by name: kind, length and bytes of the name, digest.
///
/// Found by one thread, since a tree may be as deep as a path is long; then the files are hashed by all.
fn hash_dir(dir: &Path, leaf: &Leaf<'_>) -> Result<(Digest, u64)> {
    let mut files = Vec::new();
    let items = walk(dir, &mut files)?;
    // All of them, so that of several errors always the same is told.
    let hashed: Vec<Result<Digest>> =
        files.par_iter().map(|(path, meta)| leaf(path, meta)).collect();
    let digests: Vec<Digest> = hashed.into_iter().collect::<Result<_>>()?;
    let bytes = files.iter().map(|(_, meta)| meta.len()).sum();
    Ok((fold(items, &mut digests.into_iter()), bytes))
}

/// What is in a directory, by name.
enum Found {
    /// A file with its tag; the next one of those in order.
    File(u8),
    Dir(Vec<(Vec<u8>, Found)>),
}

/// What is in `dir`, sorted; its files, in that order, are added to `files`.
fn walk(dir: &Path, files: &mut Vec<(PathBuf, Metadata)>) -> Result<Vec<(Vec<u8>, Found)>> {
    let item = |(path, meta): (PathBuf, Metadata)| -> Result<_> {
        let name = path.file_name().unwrap_or_default().as_bytes().to_vec();
        let found = match kind_of(&path, &meta)? {
            Kind::Dir => Found::Dir(walk(&path, files)?),
            Kind::File => {
                let tag = if executable(&meta) { b'x' } else { b'f' };
                files.push((path, meta));
                Found::File(tag)
            }
        };
        Ok((name, found))
    };
    list(dir)?.into_iter().map(item).collect()
}

fn fold(items: Vec<(Vec<u8>, Found)>, digests: &mut dyn Iterator<Item = Digest>) -> Digest {
    let mut item = |(name, found)| match found {
        Found::File(tag) => (tag, name, digests.next().expect("one for each file")),
        Found::Dir(items) => (b'd', name, fold(items, digests)),
    };
    let listing: Vec<_> = items.into_iter().map(&mut item).collect();
    hash_listing(&listing)
}

/// The digest of the directory that has these items, sorted by name.
fn hash_listing(items: &[(u8, Vec<u8>, Digest)]) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key(DOMAIN);
    hasher.update(&(items.len() as u64).to_le_bytes());
    for (tag, name, digest) in items {
        hasher.update(&[*tag]);
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name);
        hasher.update(digest.as_bytes());
    }
    Digest::from_bytes(*hasher.finalize().as_bytes())
}

/// The digest of the directory that a recipe makes, or of its file, when that can be told without
/// the bytes: each file is one part.
pub(crate) fn listing_digest(recipe: &Recipe) -> Option<Digest> {
    if recipe.kind == Kind::File {
        let [item] = &recipe.items[..] else { return None };
        return digest_of_item(item);
    }
    let mut root = Branch::default();
    for item in &recipe.items {
        let tag = if item.executable { b'x' } else { b'f' };
        root.add(&item.path, Some((tag, digest_of_item(item)?)));
    }
    recipe.empty_dirs.iter().for_each(|path| root.add(path, None));
    Some(root.digest())
}

fn digest_of_item(item: &Item) -> Option<Digest> {
    match &item.parts[..] {
        [one] => Some(one.digest),
        _ => None,
    }
}

/// A directory that is not there yet.
#[derive(Default)]
struct Branch {
    files: Vec<(u8, Vec<u8>, Digest)>,
    below: BTreeMap<Vec<u8>, Branch>,
}

impl Branch {
    /// Adds a file, or an empty directory when `leaf` is none.
    fn add(&mut self, path: &str, leaf: Option<(u8, Digest)>) {
        let name = |name: &str| name.as_bytes().to_vec();
        match (path.split_once('/'), leaf) {
            (Some((dir, rest)), _) => self.below.entry(name(dir)).or_default().add(rest, leaf),
            (None, Some((tag, digest))) => self.files.push((tag, name(path), digest)),
            (None, None) => drop(self.below.entry(name(path)).or_default()),
        }
    }

    fn digest(self) -> Digest {
        let dirs = self.below.into_iter().map(|(name, branch)| (b'd', name, branch.digest()));
        let mut items: Vec<_> = self.files.into_iter().chain(dirs).collect();
        items.sort_by(|a, b| a.1.cmp(&b.1));
        hash_listing(&items)
    }
}

/// Digest and bytes of the directory that these files, not executable, would make under these
/// names; `leaf` gives a file's digest.
pub(crate) fn hash_files(files: &[(String, PathBuf)], leaf: &Leaf<'_>) -> Result<(Digest, u64)> {
    let hash = |(name, path): &(String, PathBuf)| -> Result<_> {
        let real = fs::canonicalize(path).at("find", path)?;
        let meta = fs::symlink_metadata(&real).at("inspect", &real)?;
        if kind_of(&real, &meta)? != Kind::File {
            return Err(Error::Special { path: real });
        }
        Ok(((b'f', name.as_bytes().to_vec(), leaf(&real, &meta)?), meta.len()))
    };
    let hashed: Vec<Result<_>> = files.par_iter().map(hash).collect();
    let hashed: Vec<_> = hashed.into_iter().collect::<Result<_>>()?;
    let bytes = hashed.iter().map(|(_, bytes)| bytes).sum();
    let mut listing: Vec<_> = hashed.into_iter().map(|(item, _)| item).collect();
    listing.sort_by(|a, b| a.1.cmp(&b.1));
    Ok((hash_listing(&listing), bytes))
}

/// Hashes one file by reading it; `meta` is what the caller decided by.
pub(crate) fn hash_leaf(path: &Path, meta: &Metadata) -> Result<Digest> {
    let file = open_plain(path).at("open", path)?;
    let (digest, bytes) = digest::hash_open(&file, path)?;
    if bytes != meta.len() {
        return Err(Error::Changed { path: path.to_path_buf() });
    }
    Ok(digest)
}

/// Opens for reading what may be anything by now: no link is followed, and nothing is waited for.
pub(crate) fn open_plain(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)
}

/// Bytes and `stat` of a small file of the cache; `None` when nothing is there.
///
/// # Errors
/// [`Error::Damaged`] for what is no plain file.
pub(crate) fn read_plain(path: &Path) -> Result<Option<(Vec<u8>, Metadata)>> {
    let damaged = |what: &str| Error::Damaged { path: path.to_path_buf(), what: what.into() };
    let mut file = match open_plain(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        // Of a link, and of a socket.
        Err(e) if matches!(e.raw_os_error().map(Errno::from_raw_os_error), Some(Errno::LOOP)) => {
            return Err(damaged("it is a symbolic link"));
        }
        Err(e) if matches!(e.raw_os_error().map(Errno::from_raw_os_error), Some(Errno::NXIO)) => {
            return Err(damaged("it is no file"));
        }
        result => result.at("open", path)?,
    };
    let meta = file.metadata().at("inspect", path)?;
    if !meta.is_file() {
        return Err(damaged("it is no file"));
    }
    let mut bytes = Vec::with_capacity(meta.len() as usize + 1);
    file.read_to_end(&mut bytes).at("read", path)?;
    Ok(Some((bytes, meta)))
}

/// The kind and the bytes of what is at `path`, without reading it; `None` when nothing is there.
pub(crate) fn measure(path: &Path) -> Option<(Kind, u64)> {
    let meta = fs::symlink_metadata(path).ok()?;
    let kind = kind_of(path, &meta).ok()?;
    if kind == Kind::File {
        return Some((kind, meta.len()));
    }
    let mut bytes = 0;
    for (path, _) in list(path).ok()? {
        bytes += measure(&path)?.1;
    }
    Some((kind, bytes))
}

/// Directories below `dir` that hold nothing.
pub(crate) fn empty_dirs(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for (path, meta) in list(dir)? {
        if meta.is_dir() {
            let inner = empty_dirs(&path)?;
            if inner.is_empty() && list(&path)?.is_empty() {
                found.push(path);
            } else {
                found.extend(inner);
            }
        }
    }
    Ok(found)
}

/// Makes files 0444 (0555 with an executable bit) and directories below the top read-only, as far
/// as `access` lets it. The top one stays writable, since a read-only directory cannot be moved to
/// another parent. A file with a second name is replaced by a copy: the other name is somebody
/// else's.
pub(crate) fn freeze(path: &Path, access: Access) -> Result<Kind> {
    let meta = fs::symlink_metadata(path).at("inspect", path)?;
    let kind = kind_of(path, &meta)?;
    match kind {
        Kind::File => {
            if meta.nlink() > 1 {
                unshare(path)?;
            }
            set_mode(path, 0o444)?;
        }
        Kind::Dir => freeze_below(path, &meta, access)?,
    }
    Ok(kind)
}

fn freeze_below(dir: &Path, meta: &Metadata, access: Access) -> Result<()> {
    access.regroup(dir, meta).at("set the group of", dir)?;
    if meta.mode() & 0o7777 != access.dir() {
        set_mode(dir, access.dir())?;
    }
    for (path, meta) in list(dir)? {
        match kind_of(&path, &meta)? {
            Kind::Dir => {
                freeze_below(&path, &meta, access)?;
                set_mode(&path, access.object_dir())?;
            }
            Kind::File => {
                if meta.nlink() > 1 {
                    unshare(&path)?;
                }
                set_mode(&path, if executable(&meta) { 0o555 } else { 0o444 })?;
            }
        }
    }
    Ok(())
}

fn unshare(path: &Path) -> Result<()> {
    let copy = path.with_file_name(format!(".unshared-{}", crate::layout::unique()));
    fs::copy(path, &copy).at("copy", path)?;
    fs::rename(&copy, path).at("replace", path)
}

/// A path longer than this is near the system's limit of 4096.
const LONG: usize = 2000;

/// Removes a file or a directory, read-only ones too; what is not there, or goes meanwhile because
/// another process removes it too, is no error.
pub(crate) fn remove(path: &Path) -> Result<()> {
    // Programs can nest directories deeper than a path can say: such are first moved up, beside
    // `path`, where the next one to remove it would find them too.
    let mut tops = vec![path.to_path_buf()];
    while let Some(top) = tops.pop() {
        let up = || path.with_file_name(crate::layout::unique());
        remove_below(&top, &mut |deep| {
            let to = up();
            fs::rename(deep, &to).at("move up", deep)?;
            tops.push(to);
            Ok(())
        })?;
    }
    Ok(())
}

fn remove_below(path: &Path, move_up: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
    let Ok(meta) = fs::symlink_metadata(path) else { return Ok(()) };
    if !meta.is_dir() {
        return gone(fs::remove_file(path)).at("remove", path);
    }
    if meta.mode() & 0o700 != 0o700 {
        // Another's is removed if its group may.
        let _ = fs::set_permissions(path, Permissions::from_mode(meta.mode() & 0o7777 | 0o700));
    }
    if path.as_os_str().len() > LONG {
        return move_up(path);
    }
    let items = match fs::read_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        result => result.at("list", path)?,
    };
    for item in items {
        remove_below(&item.at("list", path)?.path(), move_up)?;
    }
    gone(fs::remove_dir(path)).at("remove", path)
}

/// Makes the bytes of a file, or the names in a directory, durable.
pub(crate) fn sync_one(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()?;
    crate::loss::synced(path);
    Ok(())
}

/// Makes a file or a whole directory durable, name by name: for file systems without `syncfs`.
pub(crate) fn sync(path: &Path) -> Result<()> {
    let meta = fs::symlink_metadata(path).at("inspect", path)?;
    if meta.is_dir() {
        for (path, _) in list(path)? {
            sync(&path)?;
        }
    }
    sync_one(path).at("sync", path)
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) })
}

pub(crate) fn kind_of(path: &Path, meta: &Metadata) -> Result<Kind> {
    if meta.is_file() {
        Ok(Kind::File)
    } else if meta.is_dir() {
        Ok(Kind::Dir)
    } else if meta.is_symlink() {
        Err(Error::Symlink { path: path.to_path_buf() })
    } else {
        Err(Error::Special { path: path.to_path_buf() })
    }
}

/// Whether its owner may execute it.
pub(crate) fn executable(meta: &Metadata) -> bool {
    meta.mode() & 0o100 != 0
}

pub(crate) fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode)).at("set the mode of", path)
}

/// The items of a directory sorted by the bytes of their names.
fn list(dir: &Path) -> Result<Vec<(PathBuf, Metadata)>> {
    let paths = fs::read_dir(dir).at("list", dir)?.map(|item| item.map(|item| item.path()));
    let mut paths: Vec<PathBuf> = paths.collect::<io::Result<_>>().at("list", dir)?;
    paths.sort_unstable_by(|a, b| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
    let inspected = |path: PathBuf| {
        let meta = fs::symlink_metadata(&path).at("inspect", &path)?;
        Ok((path, meta))
    };
    // Fewer are looked at faster than threads are woken.
    if paths.len() < 64 {
        return paths.into_iter().map(inspected).collect();
    }
    let items: Vec<Result<_>> = paths.into_par_iter().map(inspected).collect();
    items.into_iter().collect()
}
