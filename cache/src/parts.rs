//! Files of tensors, kept in parts: equal tensors of any two artifacts are one object. Where a file
//! is cut, how it is put away, and how its bytes are had again. Knows no keys.
//!
//! A part is a tensor of some size, or a run of what lies between such tensors (the header, small
//! tensors). All parts together, in order, are the file: nothing is derived, so what is exported is
//! what was made.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use safetensors::tensor::Metadata as Header;

use crate::crash_point;
use crate::digest::{Digest, PIECE};
use crate::error::{At, Error, Result};
use crate::layout::Layout;
use crate::lease::{Holds, Lock};
use crate::recipe::{Part, Recipe};
use crate::stat::Stamp;
use crate::store;
use crate::tree::{self, Kind};

/// A tensor smaller than this is not worth a file of its own.
pub(crate) const LEAST: u64 = 16 << 10;
/// A file of more parts is kept whole: it is not made of weights.
const MOST: usize = 20_000;
/// A header larger than this is none (the format's own limit).
const HEADER: u64 = 100_000_000;

/// Sizes of the parts of `file`, in order; `None` when it is to stay whole.
pub(crate) fn cuts(file: &File, size: u64) -> Option<Vec<u64>> {
    let (start, header) = header(file, size)?;
    let mut ranges: Vec<(u64, u64)> = header
        .tensors()
        .values()
        .map(|info| (start + info.data_offsets.0 as u64, start + info.data_offsets.1 as u64))
        .collect();
    ranges.sort_unstable();
    let (mut cuts, mut rest, mut at) = (Vec::new(), start, start);
    for (from, to) in ranges {
        if from != at || to < from {
            return None;
        }
        if to - from >= LEAST {
            if rest > 0 {
                cuts.push(rest);
            }
            cuts.push(to - from);
            rest = 0;
        } else {
            rest += to - from;
        }
        at = to;
    }
    if rest > 0 {
        cuts.push(rest);
    }
    (at == size && cuts.len() > 1 && cuts.len() <= MOST).then_some(cuts)
}

/// Where the tensors begin, and what the file says of them; `None` when it is no such file.
fn header(file: &File, size: u64) -> Option<(u64, Header)> {
    let mut word = [0; 8];
    if size < LEAST || file.read_exact_at(&mut word, 0).is_err() {
        return None;
    }
    let bytes = u64::from_le_bytes(word);
    if bytes > HEADER || bytes + 8 > size {
        return None;
    }
    let mut text = vec![0; bytes as usize];
    file.read_exact_at(&mut text, 8).ok()?;
    Some((bytes + 8, serde_json::from_slice(&text).ok()?))
}

/// Puts a frozen file away in parts of these sizes; gives the digest of the whole.
pub(crate) fn put(
    layout: &Layout,
    path: &Path,
    file: &File,
    cuts: &[u64],
    holds: &Holds,
) -> Result<Digest> {
    let before = Stamp::of(&file.metadata().at("inspect", path)?);
    let mut whole = blake3::Hasher::new();
    let (mut parts, mut at) = (Vec::with_capacity(cuts.len()), 0);
    for &bytes in cuts {
        parts.push(put_part(layout, path, file, (at, bytes), &mut whole, holds)?);
        at += bytes;
    }
    if Stamp::of(&file.metadata().at("inspect", path)?) != before {
        return Err(Error::Changed { path: path.to_path_buf() });
    }
    let digest = Digest::from_bytes(*whole.finalize().as_bytes());
    holds.add(&[digest])?;
    crash_point!("absorb.before-recipe");
    put_recipe(layout, &Recipe::of_file(digest, parts))?;
    crash_point!("absorb.after-recipe");
    fs::remove_file(path).at("remove", path)?;
    Ok(digest)
}

/// Gives a range of `file` its own name in the store, unless the bytes are there already. What is
/// hashed is what is written, whoever else may still have the file open.
fn put_part(
    layout: &Layout,
    path: &Path,
    file: &File,
    (at, bytes): (u64, u64),
    whole: &mut blake3::Hasher,
    holds: &Holds,
) -> Result<Part> {
    let mut first = vec![0; PIECE.min(bytes as usize)];
    file.read_exact_at(&mut first, at).at("read", path)?;
    whole.update_rayon(&first);
    let mut own = blake3::Hasher::new();
    own.update_rayon(&first);
    let known = |own: &blake3::Hasher| Digest::from_bytes(*own.finalize().as_bytes());
    let there = |digest| store::check(&layout.object(digest), digest, Kind::File).is_ok();
    let small = first.len() as u64 == bytes;
    if small {
        holds.add(&[known(&own)])?;
        if there(&known(&own)) {
            return Ok(Part { digest: known(&own), bytes });
        }
    }
    let staged = layout.staging();
    let mut write = || -> io::Result<()> {
        let to = File::create_new(&staged)?;
        to.write_all_at(&first, 0)?;
        let (mut done, mut buffer) = (first.len() as u64, std::mem::take(&mut first));
        while done < bytes {
            let piece = &mut buffer[..PIECE.min((bytes - done) as usize)];
            file.read_exact_at(piece, at + done)?;
            to.write_all_at(piece, done)?;
            whole.update_rayon(piece);
            own.update_rayon(piece);
            done += piece.len() as u64;
        }
        to.set_permissions(fs::Permissions::from_mode(0o444))
    };
    write().inspect_err(|_| drop(fs::remove_file(&staged))).at("write", &staged)?;
    crash_point!("absorb.part");
    let digest = known(&own);
    if !small {
        holds.add(&[digest])?;
    }
    store::place(layout, &staged, &digest, Kind::File)?;
    Ok(Part { digest, bytes })
}

/// The digest of a range, which is fed to `whole` too.
fn hash_range(file: &File, at: u64, bytes: u64, whole: &mut blake3::Hasher) -> io::Result<Digest> {
    let mut own = blake3::Hasher::new();
    let mut buffer = vec![0; PIECE.min(bytes as usize)];
    let (mut at, end) = (at, at + bytes);
    while at < end {
        let piece = &mut buffer[..PIECE.min((end - at) as usize)];
        file.read_exact_at(piece, at)?;
        whole.update_rayon(piece);
        own.update_rayon(piece);
        at += piece.len() as u64;
    }
    Ok(Digest::from_bytes(*own.finalize().as_bytes()))
}

/// Writes a recipe under its name; one that is there and right stays.
pub(crate) fn put_recipe(layout: &Layout, recipe: &Recipe) -> Result<()> {
    let target = layout.recipe(&recipe.digest);
    layout.make_dir(target.parent().expect("recipes are in shards"))?;
    let staged = layout.staging();
    fs::write(&staged, recipe.render())
        .and_then(|()| fs::set_permissions(&staged, fs::Permissions::from_mode(0o444)))
        .inspect_err(|_| drop(fs::remove_file(&staged)))
        .at("write", &staged)?;
    loop {
        let lock = Lock::shared(layout)?;
        let renamed = store::rename_new(&staged, &target, Kind::File);
        drop(lock);
        match renamed {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() != ErrorKind::AlreadyExists => {
                let _ = fs::remove_file(&staged);
                return Err(e).at("create", &target);
            }
            // Another cut of the same bytes is as good, if it can be read and its parts are there.
            Err(_) if complete(layout, &recipe.digest) => {
                return fs::remove_file(&staged).at("remove", &staged);
            }
            Err(_) => {
                layout.discard(&target)?;
                crash_point!("absorb.after-discarded-recipe");
            }
        }
    }
}

fn complete(layout: &Layout, digest: &Digest) -> bool {
    let Ok(Some(recipe)) = read(layout, digest) else { return false };
    recipe.parts().all(|part| present(layout, part))
}

pub(crate) fn present(layout: &Layout, part: &Part) -> bool {
    tree::measure(&layout.object(&part.digest)) == Some((Kind::File, part.bytes))
}

/// The recipe of `digest`, or what is wrong with it; `None` when there is none.
pub(crate) fn read(layout: &Layout, digest: &Digest) -> Result<Option<Recipe>> {
    let path = layout.recipe(digest);
    let Some((text, _)) = tree::read_plain(&path)? else { return Ok(None) };
    let damaged = |what: String| Error::Damaged { path: path.clone(), what };
    let text = String::from_utf8(text).map_err(|_| damaged("it is not UTF-8".into()))?;
    Recipe::parse(&text, digest).map(Some).map_err(damaged)
}

/// Whether the parts are there, each has its digest, and all together have that of the recipe.
pub(crate) fn check(layout: &Layout, recipe: &Recipe) -> Result<()> {
    let mut whole = blake3::Hasher::new();
    for part in recipe.parts() {
        let path = layout.object(&part.digest);
        let file = match tree::open_plain(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(Error::Missing { digest: part.digest, path });
            }
            result => result.at("open", &path)?,
        };
        let meta = file.metadata().at("inspect", &path)?;
        let size = meta.len();
        if !meta.is_file() {
            return Err(Error::Damaged { path, what: "it is no file".into() });
        }
        let found = hash_range(&file, 0, size, &mut whole).at("read", &path)?;
        if (found, size) != (part.digest, part.bytes) {
            let what = format!("their digest is `{found}`");
            return Err(Error::Damaged { path, what });
        }
    }
    let found = Digest::from_bytes(*whole.finalize().as_bytes());
    if found != recipe.digest {
        let what = format!("its parts make `{found}`");
        return Err(Error::Damaged { path: layout.recipe(&recipe.digest), what });
    }
    Ok(())
}

/// Writes the file that the parts make to the new file `to`.
pub(crate) fn assemble(layout: &Layout, recipe: &Recipe, to: &Path) -> Result<()> {
    let out = File::create_new(to).at("create", to)?;
    let mut at = 0;
    let mut copy = || -> Result<()> {
        for part in recipe.parts() {
            let path = layout.object(&part.digest);
            let file = tree::open_plain(&path).at("open", &path)?;
            copy_range(&file, 0, &out, at, part.bytes).at("copy into", to)?;
            at += part.bytes;
        }
        Ok(())
    };
    // Half a file is of no use, and on a full disk in the way.
    copy().inspect_err(|_| drop(fs::remove_file(to)))
}

/// Copies without passing through this process where the kernel can, sharing blocks where the file
/// system can.
pub(crate) fn copy_range(
    from: &File,
    at: u64,
    to: &File,
    to_at: u64,
    bytes: u64,
) -> io::Result<()> {
    let (mut off_in, mut off_out) = (at, to_at);
    while off_in < at + bytes {
        let left = (at + bytes - off_in).min(1 << 30) as usize;
        match rustix::fs::copy_file_range(from, Some(&mut off_in), to, Some(&mut off_out), left) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => {}
            Err(error) if off_in == at => match error {
                rustix::io::Errno::NOSPC | rustix::io::Errno::IO => return Err(error.into()),
                _ => return copy_by_hand(from, at, to, to_at, bytes),
            },
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &File, at: u64, to: &File, to_at: u64, bytes: u64) -> io::Result<()> {
    let mut buffer = vec![0; PIECE.min(bytes as usize)];
    let mut done = 0;
    while done < bytes {
        let piece = &mut buffer[..PIECE.min((bytes - done) as usize)];
        from.read_exact_at(piece, at + done)?;
        to.write_all_at(piece, to_at + done)?;
        done += piece.len() as u64;
    }
    Ok(())
}

/// Where the bytes of a file that is kept in parts are: for mapping them.
#[derive(Debug)]
pub struct Pieces {
    /// Each part's file and length, in order.
    pub parts: Vec<(PathBuf, u64)>,
}

impl Pieces {
    /// Reads `path` as the recipe of a store; `None` when it is an ordinary file.
    ///
    /// # Errors
    /// When it is a damaged recipe, or cannot be read.
    pub fn open(path: &Path) -> Result<Option<Pieces>> {
        let mut start = [0; crate::recipe::KIND.len()];
        let mut file = File::open(path).at("open", path)?;
        if file.read_exact(&mut start).is_err() || start != *crate::recipe::KIND.as_bytes() {
            return Ok(None);
        }
        let damaged = |what: &str| Error::Damaged { path: path.to_path_buf(), what: what.into() };
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|n| n.parse().ok());
        let digest: Digest = name.ok_or_else(|| damaged("its name is no digest"))?;
        let root = path.ancestors().nth(3).ok_or_else(|| damaged("it is in no cache"))?;
        let layout = Layout::open(root)?;
        let recipe = read(&layout, &digest)?.ok_or_else(|| damaged("it has gone"))?;
        let place = |part: &Part| (layout.object(&part.digest), part.bytes);
        Ok(Some(Pieces { parts: recipe.parts().map(place).collect() }))
    }
}
