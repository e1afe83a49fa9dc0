//! What is in use, read again and again while gc works: only what was added since the last time is
//! read. Decides nothing.
//!
//! Leases and attempts that nobody had when the collection began count for nothing; all others
//! count to its end, even if their process ends meanwhile. So what a process made while gc was at
//! work stays, although gc read earlier which runs and entries there are.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::plan::{Keeper, Name};
use crate::attempt::{self, LOCK};
use crate::cache::{Cache, Found};
use crate::digest::{Digest, Key};
use crate::entry::Entry;
use crate::error::{At, Error, Result};
use crate::layout::Layout;
use crate::lease::{self, HOLDS, Lock};
use crate::leased;
use crate::parts;
use crate::stat::Stamp;
use crate::tree;

/// What matters here of an entry, which is much less than all.
#[derive(Debug, Clone)]
pub(crate) struct Brief {
    pub key: Key,
    pub step: String,
    pub stage: String,
    pub seconds: f64,
    /// Outputs and log, each once, with their bytes.
    pub artifacts: Vec<(Digest, u64)>,
    /// Of the entry's file.
    pub stamp: Stamp,
}

impl Brief {
    pub fn of(entry: &Entry, stamp: Stamp) -> Brief {
        let words = |name: &str| entry.provenance[name].as_str().unwrap_or_default().to_string();
        let mut artifacts: Vec<(Digest, u64)> = digests_of(entry).collect();
        artifacts.sort_unstable();
        artifacts.dedup_by_key(|(digest, _)| *digest);
        Brief {
            key: entry.key,
            step: words("step"),
            stage: words("stage"),
            seconds: entry.provenance["seconds"].as_f64().unwrap_or(0.0),
            artifacts,
            stamp,
        }
    }

    pub fn digests(&self) -> impl Iterator<Item = Digest> + '_ {
        self.artifacts.iter().map(|(digest, _)| *digest)
    }
}

/// Outputs and log of an entry.
pub(crate) fn digests_of(entry: &Entry) -> impl Iterator<Item = (Digest, u64)> + '_ {
    entry.outputs.iter().map(|output| (output.digest, output.bytes)).chain(entry.log)
}

/// Who notes uses: a lease's file or an attempt's directory.
#[derive(Debug, Clone)]
pub(crate) struct User {
    pub by: Keeper,
    pub who: String,
    pub digests: HashSet<Digest>,
}

/// An attempt that nobody worked on when the collection began.
#[derive(Debug, Clone)]
pub(crate) struct Left {
    pub key: Key,
    pub dir: PathBuf,
    pub finished: bool,
}

#[derive(Debug)]
pub(crate) struct Watch {
    cache: Cache,
    /// Those whose notes count.
    pub users: HashMap<PathBuf, User>,
    /// Those whose notes do not.
    pub dead: HashSet<PathBuf>,
    pub left: Vec<Left>,
    /// How much of each file of notes was read.
    offsets: HashMap<PathBuf, u64>,
    finished: HashSet<PathBuf>,
    shards: HashMap<PathBuf, Shard>,
    recipes: HashMap<Digest, Vec<Digest>>,
}

/// A directory of entries when it was last listed.
#[derive(Debug, Default)]
struct Shard {
    stamp: Option<Stamp>,
    entries: HashMap<Key, Stamp>,
}

impl Watch {
    /// Looks who works. Dead leases are removed if `clean`.
    pub fn begin(cache: &Cache, clean: bool) -> Result<Watch> {
        let mut watch = Watch {
            cache: cache.clone(),
            users: HashMap::new(),
            dead: HashSet::new(),
            left: Vec::new(),
            offsets: HashMap::new(),
            finished: HashSet::new(),
            shards: HashMap::new(),
            recipes: HashMap::new(),
        };
        // Whoever comes later is seen when notes are read again.
        let _lock = Lock::exclusive(cache.layout())?;
        for path in list(&cache.layout().dir("leases"))? {
            if is_free(cache.layout(), &path)? {
                if clean {
                    let _ = fs::remove_file(&path);
                }
                watch.dead.insert(path);
            }
        }
        if clean {
            // Of those that have no attempts any more.
            for dir in list(&cache.layout().dir("attempts"))? {
                let _ = fs::remove_dir(dir);
            }
        }
        for (key, dir) in watch.attempts()? {
            if !is_free(cache.layout(), &dir.join(LOCK))? {
                continue;
            }
            let finished = attempt::left(&dir).is_some();
            if !finished {
                watch.dead.insert(dir.clone());
            }
            watch.left.push(Left { key, dir, finished });
        }
        Ok(watch)
    }

    /// Reads what was noted since the last time; gives it.
    pub fn read(&mut self) -> Result<Vec<Digest>> {
        let mut fresh = Vec::new();
        for path in list(&self.cache.layout().dir("leases"))? {
            if !self.dead.contains(&path) {
                let (line, digests) = self.read_notes(&path)?;
                fresh.extend_from_slice(&digests);
                self.add(path, Keeper::Lease, line, digests);
            }
        }
        for (_, dir) in self.attempts()? {
            if self.dead.contains(&dir) {
                continue;
            }
            let (_, mut digests) = self.read_notes(&dir.join(HOLDS))?;
            if !self.finished.contains(&dir)
                && let Some(made) = attempt::left(&dir)
            {
                digests.extend(made.outputs.iter().map(|output| output.digest));
                digests.extend(made.log.iter().map(|(digest, _)| *digest));
                self.finished.insert(dir.clone());
            }
            let name = dir.strip_prefix(self.cache.root()).unwrap_or(&dir);
            let who = Some(name.display().to_string());
            fresh.extend_from_slice(&digests);
            self.add(dir, Keeper::Attempt, who, digests);
        }
        Ok(fresh)
    }

    fn add(&mut self, path: PathBuf, by: Keeper, who: Option<String>, digests: Vec<Digest>) {
        let new = || User { by, who: String::new(), digests: HashSet::new() };
        let user = self.users.entry(path).or_insert_with(new);
        if let Some(who) = who {
            user.who = who;
        }
        user.digests.extend(digests);
    }

    /// The whole lines that were appended to a file of notes, and its first line the first time.
    fn read_notes(&mut self, path: &Path) -> Result<(Option<String>, Vec<Digest>)> {
        let mut file = match tree::open_plain(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok((None, Vec::new())),
            result => result.at("open", path)?,
        };
        let offset = self.offsets.entry(path.to_path_buf()).or_default();
        file.seek(SeekFrom::Start(*offset)).at("read", path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).at("read", path)?;
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        let text = String::from_utf8_lossy(&bytes[..whole]);
        let starts = *offset == 0 && whole > 0;
        let first = starts.then(|| text.lines().next().unwrap_or_default().to_string());
        *offset += whole as u64;
        Ok((first, lease::noted(&text).collect()))
    }

    fn attempts(&self) -> Result<Vec<(Key, PathBuf)>> {
        attempts_in(&self.cache)
    }

    /// Entries that appeared or changed since the last time; the first time all. Damaged ones are
    /// reported and name nothing.
    pub fn entries(&mut self) -> Result<Vec<Brief>> {
        let mut fresh = Vec::new();
        for path in list(&self.cache.layout().dir("entries"))? {
            let before = match fs::metadata(&path) {
                Err(e) if e.kind() == ErrorKind::NotFound => continue,
                result => Stamp::of(&result.at("inspect", &path)?),
            };
            let shard = self.shards.entry(path.clone()).or_default();
            if shard.stamp == Some(before) {
                continue;
            }
            // What changes within one tick of the clock looks the same: then it is listed again.
            shard.stamp = before.settled(SystemTime::now()).then_some(before);
            let known = std::mem::take(&mut shard.entries);
            for file in list(&path)? {
                let name = file.file_name().and_then(|name| name.to_str());
                let Some(key) = name.and_then(|name| name.parse::<Key>().ok()) else { continue };
                let Ok(meta) = fs::symlink_metadata(&file) else { continue };
                if let Some(stamp) = known.get(&key).filter(|stamp| **stamp == Stamp::of(&meta)) {
                    shard.entries.insert(key, *stamp);
                    continue;
                }
                match self.cache.read_entry(&key)? {
                    Found::Absent => {}
                    Found::Damaged(what) => self.cache.report(format!(
                        "the entry `{}` is damaged and not used: {what}",
                        file.display()
                    )),
                    Found::Whole(entry, stamp, _) => {
                        shard.entries.insert(key, stamp);
                        fresh.push(Brief::of(&entry, stamp));
                    }
                }
            }
        }
        Ok(fresh)
    }

    /// Learns of which parts these artifacts consist, if they are kept in parts now. A damaged
    /// recipe is reported and names nothing.
    pub fn learn(&mut self, digests: impl IntoIterator<Item = Digest>) -> Result<()> {
        for digest in digests {
            if !self.recipes.contains_key(&digest)
                && let Some(parts) = read_recipe(&self.cache, &digest)?
            {
                self.recipes.insert(digest, parts);
            }
        }
        Ok(())
    }

    /// Under which names the bytes of `digest` lie, if they are there.
    pub fn names(&self, digest: &Digest) -> impl Iterator<Item = Name> + '_ {
        let parts = self.recipes.get(digest).into_iter().flatten();
        let own = [Name::Recipe(*digest), Name::Object(*digest)];
        own.into_iter().chain(parts.map(|part| Name::Object(*part)))
    }

    /// The parts of all artifacts that are kept so.
    pub fn all_parts(&self) -> HashSet<Digest> {
        self.recipes.values().flatten().copied().collect()
    }

    pub fn is_in_parts(&self, digest: &Digest) -> bool {
        self.recipes.contains_key(digest)
    }
}

/// Directories of all attempts, with their keys.
pub(crate) fn attempts_in(cache: &Cache) -> Result<Vec<(Key, PathBuf)>> {
    let mut found = Vec::new();
    for dir in list(&cache.layout().dir("attempts"))? {
        let name = dir.file_name().and_then(|name| name.to_str());
        if let Some(key) = name.and_then(|name| name.parse::<Key>().ok()) {
            found.extend(list(&dir)?.into_iter().map(|dir| (key, dir)));
        }
    }
    Ok(found)
}

fn read_recipe(cache: &Cache, digest: &Digest) -> Result<Option<Vec<Digest>>> {
    match parts::read(cache.layout(), digest) {
        Ok(recipe) => Ok(recipe.map(|recipe| recipe.parts().map(|part| part.digest).collect())),
        Err(error @ Error::Damaged { .. }) => {
            cache.report(error.to_string());
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Whether nobody has the lock of this file; a file that is not there is nobody's.
pub(crate) fn is_free(layout: &Layout, path: &Path) -> Result<bool> {
    if let Some(lives) = layout.lives() {
        return Ok(leased::is_free(lives, path));
    }
    let file = match tree::open_plain(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(true),
        // A plain file where an attempt's directory should be.
        Err(e) if e.kind() == ErrorKind::NotADirectory => return Ok(true),
        result => result.at("open", path)?,
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Ok(false),
        Ok(()) => {
            let _ = flock(&file, FlockOperation::Unlock);
            Ok(true)
        }
        result => result.map(|()| true).at("lock", path),
    }
}

/// What is in a directory, in any order; nothing when it has just gone.
pub(crate) fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    let items = match fs::read_dir(dir) {
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        result => result.at("list", dir)?,
    };
    items.map(|item| Ok(item.at("list", dir)?.path())).collect()
}
