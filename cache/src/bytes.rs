//! The bytes of artifacts: where they are, whether they are there, whether they are right. Knows no
//! keys.
//!
//! "There" is asked of `stat` and costs nothing. "Right" is known of an object whose `stat` still
//! says what it said when its bytes were last hashed; others are hashed before they are used. So
//! whoever changes, cuts, replaces or swaps objects is found out before a step sees them. What a
//! disk changes by itself, without a write, only [`Cache::verify`] finds.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::cache::{Cache, locked};
use crate::digest::Digest;
use crate::entry::Output;
use crate::error::{At, Error, Result};
use crate::parts;
use crate::recipe::{Part, Recipe};
use crate::stat::Stamp;
use crate::store;
use crate::tree::{self, Kind};

/// What `stat` said of an object, folded; of a directory, of everything in it.
pub(crate) type Seen = [u8; 32];

impl Cache {
    /// Where the bytes of `digest` are, or would be, if they are one object.
    pub fn object(&self, digest: &Digest) -> PathBuf {
        self.layout().object(digest)
    }

    /// What to open for the bytes of `digest`: the object itself, or the recipe of a file that is
    /// kept in parts, for [`crate::Pieces`].
    pub fn path(&self, digest: &Digest) -> PathBuf {
        let object = self.object(digest);
        let recipe = self.layout().recipe(digest);
        if !object.exists() && recipe.exists() { recipe } else { object }
    }

    /// The recipe of an artifact that is kept in parts; a damaged one is reported and counts for
    /// nothing.
    pub fn recipe(&self, digest: &Digest) -> Option<Recipe> {
        parts::read(self.layout(), digest).unwrap_or_else(|error| {
            self.report(format!("{error}"));
            None
        })
    }

    /// The paths of everything that the bytes of `digest` consist of.
    pub fn objects(&self, digest: &Digest) -> Vec<PathBuf> {
        let object = self.object(digest);
        match fs::symlink_metadata(&object) {
            Ok(_) => vec![object],
            Err(_) => match self.recipe(digest) {
                Some(recipe) => {
                    let of_part = |part: &Part| self.object(&part.digest);
                    let parts: HashSet<PathBuf> = recipe.parts().map(of_part).collect();
                    parts.into_iter().chain([self.layout().recipe(digest)]).collect()
                }
                None => Vec::new(),
            },
        }
    }

    /// Whether bytes of the right kind and size are there (they are not read).
    pub fn present(&self, output: &Output) -> bool {
        let whole = tree::measure(&self.object(&output.digest));
        whole == Some((output.kind, output.bytes))
            || (whole.is_none() && output.kind == Kind::File)
                && self.recipe(&output.digest).is_some_and(|recipe| {
                    recipe.bytes == output.bytes
                        && recipe.parts().all(|part| parts::present(self.layout(), part))
                })
    }

    /// Reads all bytes of `output`.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Damaged`].
    pub fn verify(&self, output: &Output) -> Result<()> {
        let object = self.object(&output.digest);
        if output.kind == Kind::File
            && fs::symlink_metadata(&object).is_err()
            && let Some(recipe) = parts::read(self.layout(), &output.digest)?
        {
            return parts::check(self.layout(), &recipe);
        }
        store::check(&object, &output.digest, output.kind)
    }

    /// The check before use: reads only those bytes of `output` of which it is not known that they
    /// are right.
    ///
    /// # Errors
    /// As [`Cache::verify`].
    pub fn check(&self, output: &Output) -> Result<()> {
        let object = self.object(&output.digest);
        if output.kind == Kind::File
            && fs::symlink_metadata(&object).is_err()
            && let Some(recipe) = parts::read(self.layout(), &output.digest)?
        {
            let mut seen = HashSet::new();
            let new = recipe.parts().filter(|part| seen.insert(part.digest));
            return new
                .into_iter()
                .try_for_each(|part| self.check_object(&part.digest, Kind::File));
        }
        self.check_object(&output.digest, output.kind)
    }

    fn check_object(&self, digest: &Digest, kind: Kind) -> Result<()> {
        let path = self.object(digest);
        let seen = match look(&path) {
            Ok(looked) => looked,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(Error::Missing { digest: *digest, path });
            }
            Err(e) => return Err(e).at("inspect", &path),
        };
        if self.known(digest) == Some(seen.fold) {
            return Ok(());
        }
        store::check(&path, digest, kind)?;
        self.know(*digest, seen);
        Ok(())
    }

    /// Takes the bytes of what a worker of this process just made for right, as they are now.
    pub fn trust(&self, output: &Output) {
        self.seen_now(output).for_each(|(digest, seen)| self.know(digest, seen));
    }

    /// As [`Cache::trust`], for this process alone: of bytes that were hashed as they came and may
    /// not be durable. After a loss of power nobody remembers having seen them.
    pub(crate) fn believe(&self, output: &Output) {
        let mut known = locked(&self.inner.seen);
        known.extend(self.seen_now(output).map(|(digest, seen)| (digest, seen.fold)));
    }

    fn seen_now(&self, output: &Output) -> impl Iterator<Item = (Digest, Looked)> {
        let recipe = match output.kind {
            Kind::File if !self.object(&output.digest).exists() => self.recipe(&output.digest),
            _ => None,
        };
        let digests = match recipe {
            Some(recipe) => recipe.parts().map(|part| part.digest).collect(),
            None => vec![output.digest],
        };
        let digests: Vec<Digest> = digests;
        digests.into_iter().filter_map(|digest| Some((digest, look(&self.object(&digest)).ok()?)))
    }

    fn known(&self, digest: &Digest) -> Option<Seen> {
        let here = locked(&self.inner.seen).get(digest).copied();
        here.or_else(|| self.inner.index()?.object(digest))
    }

    fn know(&self, digest: Digest, looked: Looked) {
        locked(&self.inner.seen).insert(digest, looked.fold);
        if looked.settled {
            locked(&self.inner.looked).push((digest, looked.fold));
        }
    }

    /// Removes what is missing or wrong of the bytes of `output`, so that they are made again. What
    /// is right stays: other artifacts may share it.
    ///
    /// # Errors
    /// When something cannot be moved away.
    pub fn discard(&self, output: &Output) -> Result<()> {
        let (layout, digest) = (self.layout(), &output.digest);
        match parts::read(layout, digest) {
            Err(_) => layout.discard(&layout.recipe(digest))?,
            Ok(None) => {}
            Ok(Some(recipe)) => {
                let wrong = |part: &&Part| {
                    store::check(&self.object(&part.digest), &part.digest, Kind::File).is_err()
                };
                let wrong: Vec<&Part> = recipe.parts().filter(wrong).collect();
                wrong.iter().try_for_each(|part| layout.discard(&self.object(&part.digest)))?;
                if wrong.is_empty() && parts::check(layout, &recipe).is_err() {
                    layout.discard(&layout.recipe(digest))?;
                }
            }
        }
        let object = self.object(digest);
        match store::check(&object, digest, output.kind) {
            Ok(()) | Err(Error::Missing { .. }) => Ok(()),
            Err(_) => layout.discard(&object),
        }
    }

    /// The bytes of `output` as one file or directory: its own, or assembled as the new file
    /// `make()` gives, which is the caller's.
    ///
    /// # Errors
    /// When they are not there, or the file cannot be written.
    pub fn whole(&self, output: &Output, make: impl FnOnce() -> PathBuf) -> Result<PathBuf> {
        let object = self.object(&output.digest);
        if output.kind == Kind::File
            && fs::symlink_metadata(&object).is_err()
            && let Some(recipe) = parts::read(self.layout(), &output.digest)?
        {
            let to = make();
            parts::assemble(self.layout(), &recipe, &to)?;
            fs::set_permissions(&to, fs::Permissions::from_mode(0o444))
                .at("set the mode of", &to)?;
            return Ok(to);
        }
        Ok(object)
    }

    /// All bytes of a small file artifact, checked.
    ///
    /// # Errors
    /// As [`Cache::verify`].
    pub fn read(&self, digest: &Digest) -> Result<Vec<u8>> {
        let path = self.object(digest);
        let Some((bytes, _)) = tree::read_plain(&path)? else {
            return Err(Error::Missing { digest: *digest, path });
        };
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(Error::Damaged { path, what: format!("their digest is `{found}`") });
        }
        Ok(bytes)
    }
}

/// What `stat` says of an object.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Looked {
    pub fold: Seen,
    /// Whether any later change would show.
    pub settled: bool,
}

pub(crate) fn look(path: &Path) -> io::Result<Looked> {
    let mut hasher = blake3::Hasher::new();
    let settled = fold(path, SystemTime::now(), &mut hasher)?;
    Ok(Looked { fold: *hasher.finalize().as_bytes(), settled })
}

/// As [`look`] for what is in a directory, whatever becomes of the directory itself.
pub(crate) fn look_inside(dir: &Path) -> io::Result<Seen> {
    let mut hasher = blake3::Hasher::new();
    for name in sorted(dir)? {
        fold(&name, SystemTime::now(), &mut hasher)?;
    }
    Ok(*hasher.finalize().as_bytes())
}

fn sorted(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut names: Vec<PathBuf> =
        fs::read_dir(dir)?.map(|item| Ok(item?.path())).collect::<io::Result<_>>()?;
    names.sort_unstable();
    Ok(names)
}

fn fold(path: &Path, now: SystemTime, hasher: &mut blake3::Hasher) -> io::Result<bool> {
    let meta = fs::symlink_metadata(path)?;
    let stamp = Stamp::of(&meta);
    hasher.update(&stamp.bytes());
    let mut settled = stamp.settled(now);
    if meta.is_dir() {
        for name in sorted(path)? {
            settled &= fold(&name, now, hasher)?;
        }
    }
    Ok(settled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stat::RACY;

    #[test]
    fn what_is_believed_is_hashed_by_the_next_process() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("c");
        let cache = Cache::open(&root).unwrap();
        let attempt = cache.attempt(&crate::Key::of(b"{}")).unwrap();
        let path = attempt.dir.join("f");
        fs::write(&path, "text").unwrap();
        let output = attempt.absorb("f", None, "f", &path).unwrap();
        std::thread::sleep(RACY + std::time::Duration::from_millis(100));
        let known = |cache: &Cache| cache.known(&output.digest).is_some();
        cache.believe(&output);
        cache.flush_index();
        assert!(known(&cache) && !known(&Cache::open(&root).unwrap()));
        cache.trust(&output);
        cache.flush_index();
        assert!(known(&Cache::open(&root).unwrap()));
    }
}
