//! A directory that appears whole or not at all: written beside its place under a hidden name, then
//! renamed. Replaces only what an earlier export wrote; leftovers of killed exports are swept.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;
use stages::models::published::{PROVENANCE, Provenance};

use crate::commands::Wrong;

/// Where a directory is to be.
pub struct Place {
    dir: PathBuf,
    parent: PathBuf,
    name: String,
}

/// The hidden directory, removed when dropped.
pub struct Temporary {
    place: Place,
    path: PathBuf,
    /// Held, so that nobody takes it for a leftover.
    _lock: File,
}

/// What is where the directory should be.
#[derive(Debug, PartialEq)]
enum There {
    Nothing,
    /// An empty directory or an earlier export.
    Replaceable,
    /// Not to be touched, because.
    Foreign(String),
}

impl Place {
    /// Refuses at once what could not be replaced later.
    pub fn new(dir: &Path) -> Result<Place> {
        let mut dir = std::path::absolute(dir)?;
        // What a link leads to is replaced, not the link.
        if let Ok(real) = fs::canonicalize(&dir) {
            dir = real;
        }
        let wrong = || Wrong(format!("{} is no name for a directory", dir.display()));
        let name = dir.file_name().with_context(wrong)?.to_string_lossy().into_owned();
        let parent = dir.parent().with_context(wrong)?.to_path_buf();
        let place = Place { dir, parent, name };
        place.check()?;
        Ok(place)
    }

    fn check(&self) -> Result<There> {
        match there(&self.dir)? {
            There::Foreign(why) => bail!(Wrong(format!(
                "{} is there already and is no earlier export: {why}\nhint: name a new directory",
                self.dir.display()
            ))),
            other => Ok(other),
        }
    }

    /// A hidden directory beside.
    pub fn begin(self) -> Result<Temporary> {
        let parent = &self.parent;
        let wrong = || format!("cannot write into {}", parent.display());
        fs::create_dir_all(parent).with_context(wrong)?;
        // Nobody sweeps between the making and the locking of a directory.
        let guard = File::open(parent).with_context(wrong)?;
        if flock(&guard, FlockOperation::LockExclusive).is_ok() {
            self.sweep();
        }
        let path = (0..)
            .map(|i| parent.join(format!("{}{}-{i}", self.prefix(), std::process::id())))
            .find(|path| fs::symlink_metadata(path).is_err())
            .expect("some name is free");
        fs::create_dir(&path).with_context(wrong)?;
        let lock = File::open(&path).with_context(wrong)?;
        let _ = flock(&lock, FlockOperation::LockExclusive);
        Ok(Temporary { path, place: self, _lock: lock })
    }

    fn prefix(&self) -> String {
        format!(".{}.export-", self.name)
    }

    /// Removes what killed exports to the same place left.
    fn sweep(&self) {
        let prefix = self.prefix();
        for item in fs::read_dir(&self.parent).into_iter().flatten().flatten() {
            if !item.file_name().to_string_lossy().starts_with(&prefix) {
                continue;
            }
            let Ok(dir) = File::open(item.path()) else { continue };
            if flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok() {
                let _ = fs::remove_dir_all(item.path());
            }
        }
    }
}

impl Temporary {
    /// Where to write.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives the directory its name; gives that back.
    pub fn publish(self) -> Result<PathBuf> {
        let dir = self.place.dir.clone();
        let wrong = || format!("cannot write {}", dir.display());
        // Another export may come in between, each time.
        for _ in 0..100 {
            let flags = match self.place.check()? {
                There::Nothing => RenameFlags::NOREPLACE,
                _ => RenameFlags::EXCHANGE,
            };
            match renameat_with(CWD, &self.path, CWD, &dir, flags) {
                Ok(()) if flags == RenameFlags::NOREPLACE => {}
                Ok(()) => self.check_replaced()?,
                Err(Errno::EXIST | Errno::NOENT) => continue,
                // A file system that has neither.
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                    self.replace_in_steps().with_context(wrong)?;
                }
                Err(error) => return Err(error).with_context(wrong),
            }
            File::open(&self.place.parent).and_then(|f| f.sync_all()).with_context(wrong)?;
            return Ok(dir);
        }
        bail!("{} changes all the time", dir.display())
    }

    /// What we swapped out was looked at a moment before; if it is something else by now, it goes
    /// back.
    fn check_replaced(&self) -> Result<()> {
        let There::Foreign(why) = there(&self.path)? else { return Ok(()) };
        let dir = &self.place.dir;
        renameat_with(CWD, &self.path, CWD, dir, RenameFlags::EXCHANGE)?;
        bail!(Wrong(format!("{} changed meanwhile: {why}", dir.display())))
    }

    fn replace_in_steps(&self) -> std::io::Result<()> {
        let dir = &self.place.dir;
        let old =
            self.path.with_file_name(format!("{}{}-old", self.place.prefix(), std::process::id()));
        let moved = fs::symlink_metadata(dir).is_ok();
        if moved {
            fs::rename(dir, &old)?;
        }
        let done = fs::rename(&self.path, dir);
        if done.is_ok() {
            let _ = fs::remove_dir_all(&old);
        } else if moved {
            fs::rename(&old, dir)?;
        }
        done
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After an exchange this is what was there before.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// What is at `dir`.
fn there(dir: &Path) -> Result<There> {
    let Ok(meta) = fs::symlink_metadata(dir) else { return Ok(There::Nothing) };
    if !meta.is_dir() {
        return Ok(There::Foreign("it is no directory".into()));
    }
    let list = || -> std::io::Result<Vec<String>> {
        fs::read_dir(dir)?.map(|item| Ok(item?.file_name().to_string_lossy().into())).collect()
    };
    let names = list().with_context(|| format!("cannot look into {}", dir.display()))?;
    if names.is_empty() {
        return Ok(There::Replaceable);
    }
    let text = fs::read_to_string(dir.join(PROVENANCE)).unwrap_or_default();
    let Some(ours) = Provenance::files_of(&text) else {
        return Ok(There::Foreign(format!("it has no `{PROVENANCE}` of `pipe export`")));
    };
    Ok(match names.iter().find(|name| !ours.contains(name)) {
        Some(other) => There::Foreign(format!("`{other}` in it was not written by it")),
        None => There::Replaceable,
    })
}
