//! The facts of one cache: lists the store, the results, who uses what. Removes nothing.

use std::collections::{HashMap, HashSet};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::plan::{Blob, Facts, Holder, Keeper, Name, Product, Record, Root, Trial};
use super::watch::{Watch, list};
use super::{Collector, KeptRun};
use crate::cache::Cache;
use crate::digest::{Digest, Key};
use crate::entry::Entry;
use crate::error::{At, Error, Result};
use crate::stat::Stamp;
use crate::tree;

impl Collector {
    /// What there is and what is in use. `runs` are roots; `records` are directories of runs that
    /// are none. Damaged entries and recipes are reported by the cache.
    ///
    /// # Errors
    /// When something cannot be listed or read: then it is not known what is needed.
    pub fn survey(&mut self, runs: &[KeptRun], records: &[PathBuf]) -> Result<Facts> {
        let cache = self.cache.clone();
        let mut facts = Facts::default();
        // Uses before entries: what an attempt made is named by its entry before it is not by it.
        let used = self.watch.read()?.into_iter().collect();
        let mut survey = Survey { cache: &cache, now: now(), places: HashMap::new(), used };
        let entries = self.watch.entries()?;
        self.entries = entries.iter().map(|(entry, stamp)| (entry.key, *stamp)).collect();
        let evidence = divergences(&cache)?;
        self.watch.learn(digests_in(&cache, "recipes")?.into_iter().map(|(digest, _)| digest))?;
        survey.blobs(&self.watch, &mut facts)?;
        survey.products(&self.watch, entries, evidence, runs, &mut facts)?;
        survey.holders(&self.watch, &self.entries, &mut facts);
        survey.records(records, &mut facts);
        survey.rest(&self.watch, &mut facts)?;
        let count = |by| facts.holders.iter().filter(|h| h.by == by && !h.blobs.is_empty()).count();
        facts.keepers = vec![
            (Keeper::Pin, cache.pins()?.len()),
            (Keeper::Run, runs.len()),
            (Keeper::Lease, count(Keeper::Lease)),
            (Keeper::Attempt, count(Keeper::Attempt)),
        ];
        Ok(facts)
    }
}

struct Survey<'a> {
    cache: &'a Cache,
    /// Since 1970.
    now: Duration,
    places: HashMap<Name, usize>,
    used: HashSet<Digest>,
}

impl Survey<'_> {
    fn blobs(&mut self, watch: &Watch, facts: &mut Facts) -> Result<()> {
        let parts = watch.all_parts();
        for (dir, name) in
            [("recipes", Name::Recipe as fn(Digest) -> Name), ("objects", Name::Object)]
        {
            for (digest, path) in digests_in(self.cache, dir)? {
                let (Ok(meta), Some((_, bytes))) =
                    (fs::symlink_metadata(&path), tree::measure(&path))
                else {
                    continue; // it has just gone
                };
                let name = name(digest);
                let part = parts.contains(&digest) && matches!(name, Name::Object(_));
                self.places.insert(name, facts.blobs.len());
                facts.blobs.push(Blob { name, bytes, age: self.since(ctime(&meta)), part });
            }
        }
        Ok(())
    }

    fn products(
        &self,
        watch: &Watch,
        entries: Vec<(Entry, Stamp)>,
        evidence: Vec<(Entry, Stamp, PathBuf)>,
        runs: &[KeptRun],
        facts: &mut Facts,
    ) -> Result<()> {
        let mut roots: HashMap<Key, Vec<Root>> = HashMap::new();
        for pin in self.cache.pins()? {
            roots.entry(pin.key).or_default().push(Root::Pin(pin.reason));
        }
        for run in runs {
            for key in &run.keys {
                roots.entry(*key).or_default().push(Root::Run(run.id.clone()));
            }
        }
        let uses: HashMap<Key, i64> =
            self.cache.uses().into_iter().map(|(key, used, _)| (key, used)).collect();
        for (entry, stamp) in entries {
            let roots = roots.remove(&entry.key).unwrap_or_default();
            let used = uses.get(&entry.key).map(|used| Duration::from_secs((*used).max(0) as u64));
            // Also when the index is gone the file says when the result was made.
            let used = used.unwrap_or_default().max(mtime(&stamp));
            facts.products.push(self.product(watch, facts, &entry, used, roots, None));
        }
        for (entry, stamp, path) in evidence {
            let product = self.product(watch, facts, &entry, mtime(&stamp), Vec::new(), Some(path));
            facts.products.push(product);
        }
        Ok(())
    }

    fn product(
        &self,
        watch: &Watch,
        facts: &Facts,
        entry: &Entry,
        used: Duration,
        roots: Vec<Root>,
        evidence: Option<PathBuf>,
    ) -> Product {
        let words = |name: &str| entry.provenance[name].as_str().unwrap_or_default().to_string();
        let seconds = entry.provenance["seconds"].as_f64().unwrap_or(0.0);
        let mut product = Product {
            key: entry.key,
            step: words("step"),
            stage: words("stage"),
            seconds: if evidence.is_some() { 0.0 } else { seconds },
            idle: self.since(used),
            bytes: 0,
            here: 0,
            blobs: Vec::new(),
            roots,
            artifacts: Vec::new(),
            in_use: false,
            evidence,
        };
        for (digest, bytes) in digests_of(entry) {
            if product.artifacts.contains(&digest) {
                continue;
            }
            product.artifacts.push(digest);
            product.in_use |= self.used.contains(&digest);
            // An entry may say what it likes.
            product.bytes = product.bytes.saturating_add(bytes);
            product.blobs.extend(self.there(watch, &digest));
            if self.is_here(watch, facts, &digest, bytes) {
                product.here = product.here.saturating_add(bytes);
            }
        }
        product.blobs.sort_unstable();
        product.blobs.dedup();
        product
    }

    /// The places of the blobs of `digest` that are there.
    fn there(&self, watch: &Watch, digest: &Digest) -> Vec<usize> {
        watch.names(digest).filter_map(|name| self.places.get(&name).copied()).collect()
    }

    /// Whether every byte of an artifact is there, by names and sizes.
    fn is_here(&self, watch: &Watch, facts: &Facts, digest: &Digest, bytes: u64) -> bool {
        let whole = self.places.get(&Name::Object(*digest));
        if whole.is_some_and(|&i| facts.blobs[i].bytes == bytes) {
            return true;
        }
        let in_parts = watch.is_in_parts(digest);
        let mut names = watch.names(digest).filter(|name| *name != Name::Object(*digest));
        in_parts && names.all(|name| self.places.contains_key(&name))
    }

    fn holders(&self, watch: &Watch, entries: &HashMap<Key, Stamp>, facts: &mut Facts) {
        for left in &watch.left {
            let (bytes, newest, _) = weigh(&left.dir);
            let entry = entries.get(&left.key).map(mtime);
            facts.trials.push(Trial {
                key: left.key,
                dir: left.dir.clone(),
                bytes,
                idle: self.since(newest),
                finished: left.finished,
                superseded: entry.is_some_and(|made| made > newest),
            });
        }
        for (path, user) in &watch.users {
            let blobs = user.digests.iter().flat_map(|digest| self.there(watch, digest));
            let mut blobs: Vec<usize> = blobs.collect();
            blobs.sort_unstable();
            blobs.dedup();
            let trial = watch.left.iter().position(|left| left.dir == *path);
            facts.holders.push(Holder { by: user.by, trial, who: user.who.clone(), blobs });
        }
        facts.holders.sort_by(|a, b| (a.by, &a.who).cmp(&(b.by, &b.who)));
    }

    fn records(&self, records: &[PathBuf], facts: &mut Facts) {
        for dir in records.iter().filter(|dir| dir.starts_with(self.cache.runs_dir())) {
            let (bytes, newest, _) = weigh(dir);
            facts.records.push(Record { dir: dir.clone(), bytes, idle: self.since(newest) });
        }
    }

    /// What is beside objects and recipes.
    fn rest(&self, watch: &Watch, facts: &mut Facts) -> Result<()> {
        for path in list(self.cache.root())? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if matches!(name.as_str(), "objects" | "recipes" | "attempts") {
                continue;
            }
            let (bytes, _, items) = weigh(&path);
            facts.rest += bytes;
            let items = if name == "runs" { list(&path)?.len() } else { items };
            facts.dirs.insert(name, (items, bytes));
        }
        let records: u64 = facts.records.iter().map(|record| record.bytes).sum();
        facts.rest = facts.rest.saturating_sub(records);
        for path in watch.users.iter().filter(|(_, u)| u.by == Keeper::Attempt).map(|(p, _)| p) {
            if !watch.left.iter().any(|left| left.dir == *path) {
                facts.rest += weigh(path).0;
            }
        }
        Ok(())
    }

    fn since(&self, then: Duration) -> Duration {
        self.now.saturating_sub(then)
    }
}

/// Outputs and log of an entry.
pub(crate) fn digests_of(entry: &Entry) -> impl Iterator<Item = (Digest, u64)> + '_ {
    entry.outputs.iter().map(|output| (output.digest, output.bytes)).chain(entry.log)
}

/// Every file of a sharded directory whose name is a digest.
pub(crate) fn digests_in(cache: &Cache, dir: &'static str) -> Result<Vec<(Digest, PathBuf)>> {
    let mut found = Vec::new();
    for shard in list(&cache.layout().dir(dir))? {
        for path in list(&shard)? {
            let name = path.file_name().and_then(|name| name.to_str());
            found.extend(name.and_then(|name| Some((name.parse().ok()?, path.clone()))));
        }
    }
    Ok(found)
}

/// Files of recorded results that differ from their entries.
pub(crate) fn divergence_files(cache: &Cache) -> Result<Vec<(Key, PathBuf)>> {
    let mut found = Vec::new();
    for dir in list(&cache.layout().dir("divergences"))? {
        let name = dir.file_name().and_then(|name| name.to_str());
        if let Some(key) = name.and_then(|name| name.parse::<Key>().ok()) {
            found.extend(list(&dir)?.into_iter().map(|path| (key, path)));
        }
    }
    Ok(found)
}

fn divergences(cache: &Cache) -> Result<Vec<(Entry, Stamp, PathBuf)>> {
    let mut found = Vec::new();
    for (key, path) in divergence_files(cache)? {
        let meta = fs::symlink_metadata(&path).at("inspect", &path)?;
        let parsed = match tree::read_plain(&path) {
            Ok(None) => continue,
            Ok(Some((bytes, _))) => {
                Entry::parse(&String::from_utf8(bytes).unwrap_or_default(), &key)
            }
            Err(Error::Damaged { what, .. }) => Err(what),
            Err(error) => return Err(error),
        };
        match parsed {
            Ok(entry) => found.push((entry, Stamp::of(&meta), path)),
            Err(what) => {
                let path = path.display();
                cache.report(format!("the evidence `{path}` is damaged and not used: {what}"));
            }
        }
    }
    Ok(found)
}

/// Bytes of the files at and below `path`, when the newest of all changed (since 1970), and how
/// many files there are. What cannot be read counts as nothing.
pub(crate) fn weigh(path: &Path) -> (u64, Duration, usize) {
    let Ok(meta) = fs::symlink_metadata(path) else { return (0, Duration::ZERO, 0) };
    let mut sum = (0, mtime(&Stamp::of(&meta)), 0);
    if !meta.is_dir() {
        return (meta.len(), sum.1, 1);
    }
    for item in fs::read_dir(path).into_iter().flatten().flatten() {
        let (bytes, newest, count) = weigh(&item.path());
        sum = (sum.0 + bytes, sum.1.max(newest), sum.2 + count);
    }
    sum
}

fn mtime(stamp: &Stamp) -> Duration {
    Duration::from_nanos(stamp.mtime_ns.max(0) as u64)
}

fn ctime(meta: &Metadata) -> Duration {
    Duration::new(meta.ctime().max(0) as u64, meta.ctime_nsec() as u32)
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
