//! The facts of one cache: lists the store, the results, who uses what. Removes nothing.

use std::collections::{HashMap, HashSet};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::plan::{Blob, Facts, Holder, Keeper, Name, Product, Record, Root, Trial};
use super::watch::{Brief, Watch, list};
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
        self.entries = entries.iter().map(|entry| (entry.key, entry.stamp)).collect();
        let pins = cache.pins()?;
        self.pins = pins.iter().map(|pin| pin.key).collect();
        let evidence = divergences(&cache)?;
        self.watch.learn(digests_in(&cache, "recipes")?.into_iter().map(|(digest, _)| digest))?;
        survey.blobs(&self.watch, &mut facts)?;
        let mut roots: HashMap<Key, Vec<Root>> = HashMap::new();
        for pin in pins {
            roots.entry(pin.key).or_default().push(Root::Pin(pin.reason));
        }
        for run in runs {
            for key in &run.keys {
                roots.entry(*key).or_default().push(Root::Run(run.id.clone()));
            }
        }
        survey.products(&self.watch, entries, evidence, roots, &mut facts);
        survey.holders(&self.watch, &self.entries, &mut facts);
        survey.records(records, &mut facts);
        survey.rest(&self.watch, &mut facts)?;
        let count = |by| facts.holders.iter().filter(|h| h.by == by && !h.blobs.is_empty()).count();
        facts.keepers = vec![
            (Keeper::Pin, self.pins.len()),
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
        entries: Vec<Brief>,
        evidence: Vec<(Brief, PathBuf)>,
        mut roots: HashMap<Key, Vec<Root>>,
        facts: &mut Facts,
    ) {
        let uses: HashMap<Key, i64> =
            self.cache.uses().into_iter().map(|(key, used, _)| (key, used)).collect();
        for entry in entries {
            let roots = roots.remove(&entry.key).unwrap_or_default();
            let used = uses.get(&entry.key).map(|used| Duration::from_secs((*used).max(0) as u64));
            // Also when the index is gone the file says when the result was made.
            let used = used.unwrap_or_default().max(mtime(&entry.stamp));
            facts.products.push(self.product(watch, facts, entry, used, roots));
        }
        for (entry, path) in evidence {
            let used = mtime(&entry.stamp);
            let mut product = self.product(watch, facts, entry, used, Vec::new());
            // Nobody will make it again.
            product.seconds = 0.0;
            product.evidence = Some(path);
            facts.products.push(product);
        }
    }

    fn product(
        &self,
        watch: &Watch,
        facts: &Facts,
        entry: Brief,
        used: Duration,
        roots: Vec<Root>,
    ) -> Product {
        let artifacts: Vec<Digest> = entry.digests().collect();
        let blobs = artifacts.iter().flat_map(|digest| self.there(watch, digest));
        let mut blobs: Vec<usize> = blobs.collect();
        blobs.sort_unstable();
        blobs.dedup();
        let whole = |(digest, bytes): &&(Digest, u64)| self.is_here(watch, facts, digest, *bytes);
        // An entry may say what it likes.
        let add = |sum: u64, (_, bytes): &(Digest, u64)| sum.saturating_add(*bytes);
        Product {
            idle: self.since(used),
            bytes: entry.artifacts.iter().fold(0, add),
            here: entry.artifacts.iter().filter(whole).fold(0, add),
            blobs,
            roots,
            in_use: artifacts.iter().any(|digest| self.used.contains(digest)),
            artifacts,
            evidence: None,
            key: entry.key,
            step: entry.step,
            stage: entry.stage,
            seconds: entry.seconds,
        }
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
        let at_work = |path: &&PathBuf| !watch.left.iter().any(|left| left.dir == **path);
        let attempts = watch.users.iter().filter(|(_, user)| user.by == Keeper::Attempt);
        let works: Vec<u64> =
            attempts.map(|(path, _)| path).filter(at_work).map(|path| weigh(path).0).collect();
        facts.rest += works.iter().sum::<u64>();
        let all = works.iter().copied().chain(facts.trials.iter().map(|trial| trial.bytes));
        let attempts = (works.len() + facts.trials.len(), all.sum());
        facts.dirs.insert("attempts".into(), attempts);
        Ok(())
    }

    fn since(&self, then: Duration) -> Duration {
        self.now.saturating_sub(then)
    }
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

fn divergences(cache: &Cache) -> Result<Vec<(Brief, PathBuf)>> {
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
            Ok(entry) => found.push((Brief::of(&entry, Stamp::of(&meta)), path)),
            Err(what) => {
                let path = path.display();
                cache.report(format!("the evidence `{path}` is damaged and not used: {what}"));
            }
        }
    }
    Ok(found)
}

/// Bytes of the files at and below `path`, when the newest of all changed (since 1970), and how
/// many files there are. What cannot be read counts as nothing, of a file with several names each
/// name for its share: records of runs link their plans.
pub(crate) fn weigh(path: &Path) -> (u64, Duration, usize) {
    let Ok(meta) = fs::symlink_metadata(path) else { return (0, Duration::ZERO, 0) };
    let mut sum = (0, mtime(&Stamp::of(&meta)), 0);
    if !meta.is_dir() {
        return (meta.len() / meta.nlink().max(1), sum.1, 1);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_two_names_weighs_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        fs::write(file("a"), [0; 100]).unwrap();
        fs::hard_link(file("a"), file("b")).unwrap();
        fs::write(file("c"), [0; 10]).unwrap();
        let (bytes, _, count) = weigh(dir.path());
        assert_eq!((bytes, count), (110, 3));
        assert_eq!(weigh(&file("b")).0, 50);
    }
}
