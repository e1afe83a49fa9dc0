//! Garbage collection: what goes is decided from facts alone (`plan.rs`), the facts are read
//! without a lock (`survey.rs`), and what has come into use meanwhile is spared (`watch.rs`).
//!
//! One batch after the other is moved to `trash/` while this process has `gc.lock` to itself and
//! has just read every note of use; it is removed after that. A collection killed anywhere leaves
//! only what the next one, or the next start, removes. Evicting a result leaves its entry: a hit
//! needs no bytes, and a step that needs them sends their step back.

mod plan;
mod survey;
mod usage;
mod watch;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

pub use plan::{
    Blob, Eviction, Facts, Holder, Keeper, Keeping, Name, Plan, Policy, Product, Record, Root,
    Trial, Why,
};
pub(crate) use survey::{digests_in, divergence_files};
pub use usage::{Sum, Usage};
use watch::{Watch, is_free, list};
pub(crate) use watch::{attempts_in, digests_of};

use crate::attempt::LOCK;
use crate::cache::{Cache, Found};
use crate::crash_point;
use crate::digest::{Digest, Key};
use crate::error::{At, Result};
use crate::lease::Lock;
use crate::loss;
use crate::stat::Stamp;

/// After what was noted of a use has reached a server, and before what was moved is removed.
const GRACE: Duration = Duration::from_secs(1);
/// So many things are moved while everybody else waits.
const BATCH: usize = 64;

/// The keys of a run whose results are to stay.
#[derive(Debug, Clone)]
pub struct KeptRun {
    pub id: String,
    pub keys: Vec<Key>,
}

/// One collection, from the look at who works to its end.
#[derive(Debug)]
pub struct Collector {
    cache: Cache,
    watch: Watch,
    /// Entry files when they were read.
    entries: HashMap<Key, Stamp>,
    /// Those that were read with them.
    pins: HashSet<Key>,
    /// None of one that only looks.
    turn: Option<Lock>,
}

/// What a collection did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collected {
    /// Bytes removed.
    pub bytes: u64,
    /// Objects and recipes removed.
    pub blobs: usize,
    /// Of what was to go, bytes that had come into use or were gone already.
    pub spared: u64,
    /// Entries removed.
    pub entries: usize,
    /// Attempts removed.
    pub trials: usize,
    /// Records of runs removed.
    pub records: usize,
}

impl Cache {
    /// Begins a collection. Roots are to be computed after this call: whatever a process makes
    /// from now on stays. Another collection is waited for; `on_wait` tells it.
    ///
    /// # Errors
    /// When leases or attempts cannot be read.
    pub fn collector(&self, on_wait: impl FnOnce()) -> Result<Collector> {
        let turn = Lock::turn(self.layout(), on_wait)?;
        crash_point!("gc.begin");
        self.layout().sweep();
        let watch = Watch::begin(self, true)?;
        crash_point!("gc.after-leases");
        Ok(Collector::new(self, watch, Some(turn)))
    }

    /// As [`Cache::collector`], to look only: it waits for nobody and cannot remove anything.
    ///
    /// # Errors
    /// As [`Cache::collector`].
    pub fn inspector(&self) -> Result<Collector> {
        let watch = Watch::begin(self, false)?;
        Ok(Collector::new(self, watch, None))
    }
}

impl Collector {
    fn new(cache: &Cache, watch: Watch, turn: Option<Lock>) -> Collector {
        let (entries, pins) = (HashMap::new(), HashSet::new());
        Collector { cache: cache.clone(), watch, entries, pins, turn }
    }

    /// Does what was planned on facts of this collection, but for what has come into use;
    /// `on_progress` gets the bytes removed so far after each batch.
    ///
    /// # Errors
    /// When something cannot be removed. What is done until then is right and stays done.
    ///
    /// # Panics
    /// When this only looks ([`Cache::inspector`]).
    pub fn carry_out(
        &mut self,
        facts: &Facts,
        plan: &Plan,
        on_progress: &mut dyn FnMut(u64),
    ) -> Result<Collected> {
        assert!(self.turn.is_some(), "a collection that only looks removes nothing");
        let mut done = Collected::default();
        for &trial in &plan.trials {
            self.remove_trial(&facts.trials[trial], &mut done)?;
        }
        let mut blobs: Vec<&Blob> = plan.blobs.iter().map(|&(i, _)| &facts.blobs[i]).collect();
        // Recipes first: without its recipe an artifact is absent, and never half there.
        blobs.sort_by_key(|blob| blob.name);
        let mut used = Used { pins: self.pins.clone(), ..Used::default() };
        for batch in blobs.chunks(BATCH) {
            self.remove_blobs(batch, &mut used, &mut done)?;
            on_progress(done.bytes);
        }
        for batch in plan.forget.chunks(BATCH) {
            let batch: Vec<&Product> = batch.iter().map(|&i| &facts.products[i]).collect();
            self.forget(&batch, &mut used, &mut done)?;
        }
        for &record in &plan.records {
            let record = &facts.records[record];
            if let Some(moved) = self.cache.layout().to_trash(&record.dir)? {
                crash_point!("gc.after-records");
                self.cache.layout().unlink(&moved)?;
                done.records += 1;
                done.bytes += record.bytes;
            }
        }
        if done.entries > 0 {
            self.cache.rebuild();
        }
        Ok(done)
    }

    fn remove_blobs(
        &mut self,
        batch: &[&Blob],
        used: &mut Used,
        done: &mut Collected,
    ) -> Result<()> {
        crash_point!("gc.before-batch");
        let layout = self.cache.layout().clone();
        let lock = Lock::exclusive(&layout)?;
        self.refresh(used)?;
        let mut moved = Vec::new();
        for blob in batch {
            let path = match blob.name {
                Name::Object(digest) => layout.object(&digest),
                Name::Recipe(digest) => layout.recipe(&digest),
            };
            match used.names.contains(&blob.name) {
                false => match layout.to_trash(&path)? {
                    Some(aside) => moved.push((aside, path, *blob)),
                    None => done.spared += blob.bytes,
                },
                true => done.spared += blob.bytes,
            }
            crash_point!("gc.after-rename");
        }
        drop(lock);
        if layout.lives().is_some() && !moved.is_empty() {
            // Nobody was kept from noting a use meanwhile: what was, goes back.
            std::thread::sleep(GRACE);
            self.refresh(used)?;
            moved.retain(|(aside, path, blob)| {
                let back = used.names.contains(&blob.name) && fs::rename(aside, path).is_ok();
                done.spared += if back { blob.bytes } else { 0 };
                !back
            });
        }
        crash_point!("gc.before-unlink");
        for (path, _, blob) in moved {
            layout.unlink(&path)?;
            done.blobs += 1;
            done.bytes += blob.bytes;
            crash_point!("gc.after-unlink");
        }
        Ok(())
    }

    /// Learns what has come into use. Only while nobody can note anything.
    fn refresh(&mut self, used: &mut Used) -> Result<()> {
        let mut digests = self.watch.read()?;
        // After the notes: what an attempt made is named by its entry before it is not by it.
        for entry in self.watch.entries()? {
            digests.extend(entry.digests());
        }
        for pin in self.cache.pins()? {
            if used.pins.insert(pin.key)
                && let Found::Whole(entry, ..) = self.cache.read_entry(&pin.key)?
            {
                digests.extend(digests_of(&entry).map(|(digest, _)| digest));
            }
        }
        self.watch.learn(digests.iter().copied())?;
        used.digests.extend(&digests);
        used.names.extend(digests.iter().flat_map(|digest| self.watch.names(digest)));
        Ok(())
    }

    /// Removes an attempt, unless somebody works on its key now and may go on from it.
    fn remove_trial(&mut self, trial: &Trial, done: &mut Collected) -> Result<()> {
        let layout = self.cache.layout().clone();
        let lock = Lock::exclusive(&layout)?;
        let parent = layout.attempts(&trial.key);
        for dir in list(&parent)? {
            if !is_free(&layout, &dir.join(LOCK))? {
                return Ok(());
            }
        }
        self.watch.dead.insert(trial.dir.clone());
        let moved = layout.to_trash(&trial.dir)?;
        drop(lock);
        crash_point!("gc.after-trial");
        if let Some(moved) = moved {
            layout.unlink(&moved)?;
            done.trials += 1;
            done.bytes += trial.bytes;
        }
        let _ = fs::remove_dir(parent);
        Ok(())
    }

    /// Removes entries and evidence, if they are what they were and nobody uses their bytes.
    fn forget(&mut self, batch: &[&Product], used: &mut Used, done: &mut Collected) -> Result<()> {
        let _lock = Lock::exclusive(self.cache.layout())?;
        self.refresh(used)?;
        for product in batch {
            let in_use = product.artifacts.iter().any(|digest| used.digests.contains(digest));
            if in_use || (product.evidence.is_none() && used.pins.contains(&product.key)) {
                continue;
            }
            let path = match &product.evidence {
                Some(path) => path.clone(),
                None => self.cache.layout().entry(&product.key),
            };
            let there = fs::symlink_metadata(&path).ok().map(|meta| Stamp::of(&meta));
            let known = self.entries.get(&product.key).copied();
            if there.is_some() && (product.evidence.is_some() || there == known) {
                loss::removing(&path);
                remove_file(&path)?;
                done.entries += 1;
                crash_point!("gc.after-forget");
            }
            if product.evidence.is_some() {
                let _ = path.parent().map(fs::remove_dir);
            }
        }
        Ok(())
    }
}

/// What has come into use since the survey.
#[derive(Default)]
struct Used {
    digests: HashSet<Digest>,
    names: HashSet<Name>,
    /// Also those of before.
    pins: HashSet<Key>,
}

fn remove_file(path: &PathBuf) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        result => result.at("remove", path),
    }
}
