//! Reads everything in the store and names what is damaged, which `stat` alone does not show. Also
//! the repair: what is damaged is moved away, so that it is made again when it is needed.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::cache::{Cache, Found};
use crate::crash_point;
use crate::digest::{Digest, Key};
use crate::entry::Entry;
use crate::error::{Error, Result};
use crate::gc::{digests_in, digests_of, divergence_files};
use crate::lease::Lock;
use crate::parts;
use crate::recipe::Part;
use crate::stat::Stamp;
use crate::tree;

/// Something damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    pub path: PathBuf,
    /// In words.
    pub what: String,
    /// Key and step of the results that need it; of a damaged entry its key and no step.
    pub needed_by: Vec<(Key, String)>,
    /// Whether it was moved away.
    pub repaired: bool,
}

/// What was read, and what is wrong with it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Whole ones.
    pub entries: usize,
    pub recipes: usize,
    pub objects: usize,
    /// Of the objects.
    pub bytes: u64,
    pub damage: Vec<Damage>,
}

/// Who needs what.
type Needs = HashMap<Digest, Vec<(Key, String)>>;

impl Cache {
    /// Reads every entry, recipe, object, pin and attempt; `on_progress` gets the bytes read and to be read, from
    /// any thread. What appears or goes meanwhile counts for nothing.
    ///
    /// # Errors
    /// When a directory cannot be listed or a file may not be read.
    pub fn scrub(&self, repair: bool, on_progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Scrubbed> {
        let mut scrub = Scrub { cache: self, repair, done: Scrubbed::default() };
        let mut needs = Needs::new();
        scrub.entries(&mut needs)?;
        scrub.recipes(&mut needs)?;
        scrub.objects(&needs, on_progress)?;
        scrub.incomplete(&needs)?;
        scrub.pins()?;
        scrub.attempts()?;
        scrub.done.damage.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(scrub.done)
    }
}

pub(crate) struct Scrub<'a> {
    pub cache: &'a Cache,
    pub repair: bool,
    pub done: Scrubbed,
}

impl Scrub<'_> {
    fn entries(&mut self, needs: &mut Needs) -> Result<()> {
        for key in self.cache.keys()? {
            let path = self.cache.layout().entry(&key);
            let before = stamp(&path);
            match judged(self.cache.read_entry(&key))? {
                Ok(Found::Absent) => {}
                Ok(Found::Whole(entry, ..)) => {
                    self.done.entries += 1;
                    let step = entry.provenance["step"].as_str().unwrap_or("?").to_string();
                    for (digest, _) in digests_of(&entry) {
                        needs.entry(digest).or_default().push((key, step.clone()));
                    }
                }
                Ok(Found::Damaged(what)) | Err(what) => {
                    self.found(path, before, what, vec![(key, String::new())])?;
                }
            }
        }
        for (key, path) in divergence_files(self.cache)? {
            let before = stamp(&path);
            let parsed = match judged(tree::read_plain(&path))? {
                Ok(None) => continue,
                Ok(Some((bytes, _))) => {
                    Entry::parse(&String::from_utf8(bytes).unwrap_or_default(), &key).map(|_| ())
                }
                Err(what) => Err(what),
            };
            if let Err(what) = parsed {
                self.found(path, before, what, vec![(key, String::new())])?;
            }
        }
        Ok(())
    }

    fn recipes(&mut self, needs: &mut Needs) -> Result<()> {
        for (digest, path) in digests_in(self.cache, "recipes")? {
            let before = stamp(&path);
            let needed = needs.get(&digest).cloned().unwrap_or_default();
            let recipe = match judged(parts::read(self.cache.layout(), &digest))? {
                Ok(None) => continue,
                Ok(Some(recipe)) => recipe,
                Err(what) => {
                    self.found(path, before, what, needed)?;
                    continue;
                }
            };
            self.done.recipes += 1;
            for part in recipe.parts() {
                let of_part = needs.entry(part.digest).or_default();
                let new = needed.iter().filter(|need| !of_part.contains(need));
                let new: Vec<_> = new.cloned().collect();
                of_part.extend(new);
            }
        }
        Ok(())
    }

    /// Recipes some of whose parts are not there, or have just been moved away.
    fn incomplete(&mut self, needs: &Needs) -> Result<()> {
        for (digest, path) in digests_in(self.cache, "recipes")? {
            let before = stamp(&path);
            let Ok(Ok(Some(recipe))) = judged(parts::read(self.cache.layout(), &digest)) else {
                continue;
            };
            let gone = |part: &&Part| !parts::present(self.cache.layout(), part);
            if let Some(part) = recipe.parts().find(gone) {
                let what = format!("its part `{}` is missing or cut off", part.digest);
                let needed = needs.get(&digest).cloned().unwrap_or_default();
                self.found(path, before, what, needed)?;
            }
        }
        Ok(())
    }

    fn objects(&mut self, needs: &Needs, on_progress: &(dyn Fn(u64, u64) + Sync)) -> Result<()> {
        let measured = |(digest, path): (Digest, PathBuf)| {
            let bytes = tree::measure(&path).map_or(0, |(_, bytes)| bytes);
            (bytes, digest, path)
        };
        let mut all: Vec<(u64, Digest, PathBuf)> =
            digests_in(self.cache, "objects")?.into_iter().map(measured).collect();
        // The large ones first, so that no thread is left with one at the end.
        all.sort_unstable_by(|a, b| b.cmp(a));
        let total = all.iter().map(|(bytes, ..)| bytes).sum();
        let (next, read) = (AtomicUsize::new(0), AtomicU64::new(0));
        let wrong = Mutex::new(Vec::new());
        let work = || -> Result<()> {
            while let Some((bytes, digest, path)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                let before = stamp(path);
                if let Some(what) = examine(path, digest)? {
                    wrong
                        .lock()
                        .unwrap_or_else(|e| e.into_inner())
                        .push((digest, path, before, what));
                }
                on_progress(read.fetch_add(*bytes, Ordering::Relaxed) + bytes, total);
            }
            Ok(())
        };
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("no panic in a thread"))
        })?;
        self.done.objects = all.len();
        self.done.bytes = total;
        for (digest, path, before, what) in wrong.into_inner().unwrap_or_else(|e| e.into_inner()) {
            let needed = needs.get(digest).cloned().unwrap_or_default();
            self.found(path.clone(), before, what, needed)?;
        }
        Ok(())
    }

    pub fn found(
        &mut self,
        path: PathBuf,
        before: Option<Stamp>,
        what: String,
        needed_by: Vec<(Key, String)>,
    ) -> Result<()> {
        if before.is_none() || stamp(&path) != before {
            return Ok(()); // it went, or something else has taken its place
        }
        let repaired = self.repair && self.remove(&path, before)?;
        self.done.damage.push(Damage { path, what, needed_by, repaired });
        Ok(())
    }

    /// Moves away what is damaged and still what it was.
    fn remove(&self, path: &Path, before: Option<Stamp>) -> Result<bool> {
        let layout = self.cache.layout();
        // Nobody gives anything a name meanwhile.
        let lock = Lock::exclusive(layout)?;
        if stamp(path) != before {
            return Ok(false);
        }
        let moved = layout.to_trash(path)?;
        crash_point!("repair.after-move");
        drop(lock);
        moved.iter().try_for_each(|moved| layout.unlink(moved))?;
        Ok(true)
    }
}

pub(crate) fn stamp(path: &Path) -> Option<Stamp> {
    Some(Stamp::of(&fs::symlink_metadata(path).ok()?))
}

/// What is wrong with an object; what has just gone is not wrong.
fn examine(path: &Path, digest: &Digest) -> Result<Option<String>> {
    Ok(match judged(tree::hash_with(path, &tree::hash_leaf))? {
        Ok((found, ..)) if found == *digest => None,
        Ok((found, ..)) => Some(format!("its digest is `{found}`")),
        Err(what) => Some(what),
    })
}

/// An error of the bytes in words: a disk that cannot give them has lost them. One of permission is
/// an error of the caller's.
fn judged<T>(result: Result<T>) -> Result<Result<T, String>> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(Error::Io { cause, doing, path }) if cause.kind() == ErrorKind::PermissionDenied => {
            Err(Error::Io { cause, doing, path })
        }
        Err(Error::Damaged { what, .. }) => Ok(Err(what)),
        Err(error) => Ok(Err(error.to_string())),
    }
}
