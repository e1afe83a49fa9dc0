//! Sealed checkpoints: a directory `<position>` that exists whole or not at all, and beside it
//! `<position>.seal`, which says what it holds.
//!
//! An attempt writes `<position>.tmp`, syncs all of it, seals and renames it. Nobody writes to it
//! afterwards, so an orphan that goes on working can harm no later attempt; and what is not as it
//! was sealed is not gone on from.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::bytes::look_inside;
use crate::crash_point;
use crate::digest::Digest;
use crate::error::Error;
use crate::loss;
use crate::{sealed, tree};

const KIND: &str = "pipe-checkpoint";
const VERSION: u32 = 1;

/// Directories above a first checkpoint that may be as new as it: attempt, key, all attempts.
const ABOVE: usize = 3;

/// What a checkpoint is.
#[derive(Debug, Serialize, Deserialize)]
struct Seal {
    /// So that it is nobody else's: the directory it lies in, by its name (a key's), and its own.
    of: (String, String),
    digest: Digest,
    /// What `stat` said of its files: while it says so still, they need not be read.
    seen: Digest,
}

/// Fills a fresh directory by `write`, makes it durable, seals it as `<dir>/<position>` and drops
/// the older checkpoints of the same attempt. Returns the sealed directory.
pub fn save<E: From<io::Error>>(
    dir: &Path,
    position: u64,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<PathBuf, E> {
    let tmp = dir.join(format!("{position}.tmp"));
    let sealed = dir.join(position.to_string());
    if check(&sealed, false).is_ok() {
        return Ok(sealed);
    }
    let _ = tree::remove(&sealed);
    let _ = tree::remove(&tmp);
    let first = !dir.exists();
    let make = || -> Result<(), E> {
        fs::create_dir_all(&tmp)?;
        if first {
            loss::named(dir, None);
        }
        loss::named(&tmp, None);
        write(&tmp)?;
        loss::wrote(&tmp);
        crash_point!("checkpoint.before-sync");
        Ok(seal(&tmp, &beside(&sealed))?)
    };
    // Half a checkpoint is of no use, and on a full disk in the way.
    make().inspect_err(|_| drop(tree::remove(&tmp)))?;
    crash_point!("checkpoint.before-seal");
    fs::rename(&tmp, &sealed)?;
    loss::named(&sealed, Some(&tmp));
    crash_point!("checkpoint.after-seal");
    tree::sync_one(dir)?;
    if first {
        // The names of the directory, of its attempt and of its key: what is sealed is to be found.
        dir.ancestors().skip(1).take(ABOVE).try_for_each(tree::sync_one)?;
    }
    crash_point!("checkpoint.durable");
    for (older, path) in sealed_in(dir) {
        if older < position {
            // Its name goes first, so that a crash leaves no half-removed checkpoint under it.
            let old = path.with_extension("old");
            if fs::rename(&path, &old).is_ok() {
                loss::named(&old, Some(&path));
                crash_point!("checkpoint.before-drop");
                let _ = tree::remove(&old);
                let _ = fs::remove_file(beside(&path));
            }
        }
    }
    Ok(sealed)
}

/// Makes all that is in `path` durable, however deep.
fn sync_below(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        fs::read_dir(path)?.try_for_each(|item| sync_below(&item?.path()))?;
    }
    tree::sync_one(path)
}

/// Makes the directory durable and says in the file `to` what is in it.
fn seal(dir: &Path, to: &Path) -> io::Result<()> {
    let of_ours = |error: Error| match error {
        Error::Io { cause, .. } => cause,
        error => io::Error::other(error.to_string()),
    };
    sync_below(dir)?;
    let (digest, ..) = tree::hash_with(dir, &tree::hash_leaf).map_err(of_ours)?;
    let seal = Seal { of: place(to), digest, seen: Digest::from_bytes(look_inside(dir)?) };
    let body = serde_json::to_string(&seal).expect("texts only");
    let staged = to.with_extension("seal.tmp");
    let _ = fs::remove_file(&staged);
    let mut file = File::create_new(&staged)?;
    file.write_all(sealed::seal(KIND, VERSION, &(body + "\n")).as_bytes())?;
    loss::wrote(&staged);
    tree::sync_one(&staged)?;
    fs::rename(&staged, to)?;
    loss::named(to, Some(&staged));
    Ok(())
}

/// Whether a sealed checkpoint is what it was; what is wrong with it. Its bytes are read when
/// `stat` says something new of them, or always if `thorough`.
fn check(sealed: &Path, thorough: bool) -> Result<(), String> {
    let seal = read(&beside(sealed))?;
    let known = |seen| Digest::from_bytes(seen) == seal.seen;
    if !thorough
        && sealed.symlink_metadata().is_ok_and(|m| m.is_dir())
        && look_inside(sealed).is_ok_and(known)
    {
        return Ok(());
    }
    let hashed = tree::hash_with(sealed, &tree::hash_leaf).map_err(|e| e.to_string())?;
    match hashed.0 == seal.digest {
        true => Ok(()),
        false => Err(format!("its digest is `{}`", hashed.0)),
    }
}

fn read(path: &Path) -> Result<Seal, String> {
    let wrong = |what: &str| format!("its seal is damaged: {what}");
    let read = tree::read_plain(path).map_err(|e| wrong(&e.to_string()))?;
    let (bytes, _) = read.ok_or("its seal is missing")?;
    let text = std::str::from_utf8(&bytes).map_err(|e| wrong(&e.to_string()))?;
    let body = sealed::open(KIND, VERSION, text).map_err(|e| wrong(&e))?;
    let seal: Seal = serde_json::from_str(body).map_err(|e| wrong(&e.to_string()))?;
    match seal.of == place(path) {
        true => Ok(seal),
        false => Err(format!("its seal is that of `{}` of `{}`", seal.of.1, seal.of.0)),
    }
}

/// `<key>` and `<position>` of `<key>/<attempt>/checkpoints/<position>.seal`.
fn place(seal: &Path) -> (String, String) {
    let name = |path: Option<&Path>| {
        let name = path.and_then(Path::file_stem).unwrap_or_default();
        name.to_string_lossy().into_owned()
    };
    (name(seal.ancestors().nth(3)), name(Some(seal)))
}

fn beside(sealed: &Path) -> PathBuf {
    sealed.with_extension("seal")
}

/// The newest sealed checkpoint in any of `dirs` (one an attempt) that is what it was.
pub fn latest(dirs: impl IntoIterator<Item = PathBuf>) -> Option<(u64, PathBuf)> {
    let mut all: Vec<_> = dirs.into_iter().flat_map(|dir| sealed_in(&dir)).collect();
    all.sort();
    all.into_iter().rev().find(|(_, path)| check(path, false).is_ok())
}

/// Those in `dir` that are not what they were, and what is wrong with them, by reading all bytes.
pub(crate) fn damaged(dir: &Path) -> Vec<(PathBuf, String)> {
    let all = sealed_in(dir).into_iter();
    all.filter_map(|(_, path)| Some((path.clone(), check(&path, true).err()?))).collect()
}

fn sealed_in(dir: &Path) -> Vec<(u64, PathBuf)> {
    let Ok(items) = fs::read_dir(dir) else { return Vec::new() };
    items
        .flatten()
        .filter_map(|item| Some((item.file_name().to_str()?.parse().ok()?, item.path())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_sealed_wins_and_half_written_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let fill = |d: &Path| fs::write(d.join("w"), "x");
        save(dir.path(), 9, fill).unwrap();
        save(dir.path(), 10, fill).unwrap();
        fs::create_dir(dir.path().join("11.tmp")).unwrap();
        let (position, path) = latest([dir.path().to_path_buf()]).unwrap();
        assert_eq!((position, path.file_name().unwrap().to_str()), (10, Some("10")));
        assert!(!dir.path().join("9").exists());
        assert!(!dir.path().join("9.old").exists());
    }

    #[test]
    fn what_is_not_as_it_was_sealed_is_passed_over() {
        let fill = |d: &Path| {
            fs::create_dir(d.join("deep"))?;
            fs::write(d.join("deep/x"), "x")?;
            fs::write(d.join("w"), "weights")
        };
        type Harm = (&'static str, fn(&Path));
        let harms: [Harm; 8] = [
            ("flip", |d| fs::write(d.join("10/w"), "weighTs").unwrap()),
            ("cut", |d| fs::write(d.join("10/w"), "weight").unwrap()),
            ("remove", |d| fs::remove_file(d.join("10/deep/x")).unwrap()),
            ("add", |d| fs::write(d.join("10/more"), "").unwrap()),
            ("link", |d| {
                fs::remove_dir_all(d.join("10/deep")).unwrap();
                std::os::unix::fs::symlink("/etc", d.join("10/deep")).unwrap();
            }),
            ("file", |d| {
                fs::remove_dir_all(d.join("10")).unwrap();
                fs::write(d.join("10"), "").unwrap();
            }),
            ("seal", |d| fs::write(d.join("10.seal"), "pipe-checkpoint 1 x\n{}").unwrap()),
            ("no seal", |d| fs::remove_file(d.join("10.seal")).unwrap()),
        ];
        for (name, harm) in harms {
            let dir = tempfile::tempdir().unwrap();
            let [old, new] = ["old", "new"].map(|name| dir.path().join(name));
            save(&old, 9, fill).unwrap();
            save(&new, 10, fill).unwrap();
            let newest = || latest([old.clone(), new.clone()]).map(|(position, _)| position);
            assert_eq!((newest(), damaged(&new)), (Some(10), Vec::new()), "{name}");
            harm(&new);
            assert_eq!(newest(), Some(9), "{name}");
            assert_eq!(damaged(&new).len(), 1, "{name}");
            save(&new, 10, fill).unwrap();
            assert_eq!((newest(), damaged(&new)), (Some(10), Vec::new()), "{name}");
        }
    }

    #[test]
    fn a_copy_whose_times_are_others_is_as_good() {
        let dir = tempfile::tempdir().unwrap();
        save(dir.path(), 3, |d| fs::write(d.join("w"), "x")).unwrap();
        fs::write(dir.path().join("3/w"), "x").unwrap();
        assert_eq!(latest([dir.path().to_path_buf()]).unwrap().0, 3);
    }
}
