//! What a run found of files and entries, in one file for the next run that asks the same. Knows no
//! steps.
//!
//! A copy like the index, to be deleted at will: whatever is taken from it is first compared with
//! `stat`. An entry is named, removed or replaced only by a change of its directory, so while a
//! directory of entries says what it said before any of them was looked up, all of them are what
//! they were; else each is asked itself. An entry's file that is edited in place is not noticed here
//! (it is read-only and sealed, and what was read of it was right): `scrub` finds such damage.
//!
//! Written here, read back in `recall.rs`. Where little differs from the memo that a run started from,
//! that is written beside it (`patch.rs`).

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::bytes_of::{Reader, put, put_text};
use crate::cache::Cache;
use crate::digest::{Digest, Key};
use crate::entry::{Entry, Output};
use crate::error::Result;
use crate::layout::Layout;
use crate::nearby::Nearby;
use crate::patch::{Patch, Row};
use crate::recall::Recalled;
use crate::stat::Stamp;
use crate::sums::Summed;
use crate::tree::Kind;

pub(crate) const MAGIC: &[u8] = b"pipe memo 3\n";
/// Directories of entries.
pub(crate) const SHARDS: usize = 256;
pub(crate) const STAMP: usize = 40;
/// Digest of all that follows it.
pub(crate) const SUM: usize = 32;
/// Key, stamp, place of the rest.
pub(crate) const ROW: usize = 32 + STAMP + 4;
/// Room for what is known of a file, whatever that is: a patch may say something else.
const ROOM: usize = 1 + STAMP + 32;
/// So many disposable files of a kind are kept.
const MOST: usize = 256;
/// Nobody still writes one that was not touched for so long.
const ABANDONED: Duration = Duration::from_secs(86_400);
/// What the record of a file begins with: one file, all that a pattern stands for, or nothing known.
pub(crate) const FILE: u8 = 0;
pub(crate) const SEAL: u8 = 1;
const UNPROVED: u8 = 2;

/// What a hit needs of an entry.
#[derive(Debug, Clone, PartialEq)]
pub struct Hit {
    /// As in the entry.
    pub outputs: Vec<Output>,
    /// What its making took.
    pub seconds: f64,
}

impl Hit {
    /// What `entry` says.
    pub fn of(entry: &Entry) -> Hit {
        let seconds = entry.provenance.get("seconds").and_then(|s| s.as_f64()).unwrap_or(0.0);
        Hit { outputs: entry.outputs.clone(), seconds }
    }
}

/// Collects what a run finds. To be made before anything is looked up.
#[derive(Debug)]
pub struct Memo {
    began: SystemTime,
    shards: Vec<Option<Stamp>>,
    files: Vec<FileAt>,
    /// What they are, one after the other.
    texts: Vec<u8>,
    /// With the place of the rest in `made`.
    hits: Vec<(Key, Stamp, u32)>,
    made: Vec<u8>,
}

/// Where in [`Memo::texts`] the path of a file is, and its record right behind it.
#[derive(Debug, Clone, Copy)]
struct FileAt {
    start: usize,
    path: u32,
    record: u32,
}

impl FileAt {
    fn of(self, texts: &[u8]) -> (&[u8], &[u8]) {
        let (path, rest) = texts[self.start..].split_at(self.path as usize);
        (path, &rest[..self.record as usize])
    }
}

/// What an earlier run found and is noted again, as it stands there.
#[derive(Debug)]
pub struct Carried<'a> {
    /// The earlier run's.
    pub from: &'a Recalled,
    /// Whether each of its files is, in its order.
    pub files: &'a [bool],
    /// Whether each of its keys is, in the order of [`Recalled::key`].
    pub keys: &'a [bool],
}

impl Cache {
    /// Begins to collect.
    pub fn memo(&self) -> Memo {
        Memo::begun(SystemTime::now(), shards(self.layout(), |_| true))
    }

    /// Where the disposable file `name` is, or would be: a memo, or what else can be found again.
    pub fn kept_file(&self, name: &str) -> PathBuf {
        self.index_dir().join(name)
    }

    /// Writes the disposable file `name`, `KIND-…`. Of each kind the newest are kept.
    ///
    /// # Errors
    /// When it cannot be written; then what was there is there.
    pub fn keep_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.keep_file_by(name, |mut file| file.write_all(bytes))
    }

    fn keep_file_by(&self, name: &str, fill: impl FnOnce(&File) -> io::Result<()>) -> Result<()> {
        forget(&self.index_dir(), name.split_inclusive('-').next().unwrap_or(name));
        self.layout().write_by(&self.kept_file(name), fill)
    }
}

/// The stamps of those directories of entries that are `wanted`; one that is not there has none.
pub(crate) fn shards(layout: &Layout, wanted: impl Fn(usize) -> bool) -> Vec<Option<Stamp>> {
    let dir = layout.dir("entries");
    let mut nearby = Nearby::of_links();
    let stamp =
        |n: usize| wanted(n).then(|| nearby.stamp(&dir.join(format!("{n:02x}"))).ok()).flatten();
    (0..SHARDS).map(stamp).collect()
}

impl Memo {
    /// One that began when the directories of entries had these stamps.
    pub(crate) fn begun(began: SystemTime, shards: Vec<Option<Stamp>>) -> Memo {
        Memo {
            began,
            shards,
            files: Vec::new(),
            texts: Vec::new(),
            hits: Vec::new(),
            made: Vec::new(),
        }
    }

    /// Notes a file that had `digest` when `stat` said `stamp`, asked before it was read; `false`
    /// when it is so young that this proves nothing, and is not noted.
    pub fn file(&mut self, path: &Path, stamp: &Stamp, digest: &Digest) -> bool {
        let settled = stamp.settled(self.began);
        if settled {
            self.record(path, &[&[FILE], &stamp.bytes(), digest.as_bytes()]);
        }
        settled
    }

    /// Notes that nothing is known of `path`, a file or a pattern, for whoever asks what has changed.
    pub fn unproved(&mut self, path: &Path) {
        self.record(path, &[&[UNPROVED]]);
    }

    /// Notes what was found under `pattern` as a whole, by stamps that were all settled.
    pub fn files(&mut self, pattern: &Path, seal: &Digest) {
        self.record(pattern, &[&[SEAL], seal.as_bytes()]);
    }

    fn record(&mut self, path: &Path, record: &[&[u8]]) {
        let (path, start) = (path.as_os_str().as_bytes(), self.texts.len());
        self.texts.extend_from_slice(path);
        record.iter().for_each(|part| self.texts.extend_from_slice(part));
        let record = self.texts.len() - start - path.len();
        self.files.push(FileAt { start, path: path.len() as u32, record: record as u32 });
    }

    /// Whether `stamp` proves something when the file was read after this memo began.
    pub fn settles(&self, stamp: &Stamp) -> bool {
        stamp.settled(self.began)
    }

    /// Notes the entry of `key`, whose file had `stamp` when it was read.
    pub fn hit(&mut self, key: Key, stamp: Stamp, hit: &Hit) {
        let Ok(place) = u32::try_from(self.made.len()) else { return };
        self.hits.push((key, stamp, place));
        render(hit, &mut self.made);
    }

    /// The keys of the entries noted so far.
    pub fn keys(&self) -> HashSet<Key> {
        self.hits.iter().map(|(key, ..)| *key).collect()
    }

    /// Writes all of it under `name`, or what differs beside the memo of that name, with `head`, which
    /// is the caller's, and the keys in an order of its own; of what is `carried` from the memo of that
    /// name, only what this one does not know itself.
    ///
    /// # Errors
    /// When it cannot be written; then what was there is there.
    pub fn write(
        mut self,
        cache: &Cache,
        name: &str,
        head: &[u8],
        order: &[Key],
        carried: Option<&Carried<'_>>,
    ) -> Result<()> {
        self.sort();
        carried.into_iter().for_each(|carried| self.doubt(carried));
        if let Some(carried) = carried
            && let Some(patch) = self.patch(head, order, carried)
        {
            return patch.keep(cache, name, carried.from.sum());
        }
        cache.keep_file_by(name, |file| {
            let mut body = Summed::begin(file, MAGIC)?;
            body.put(head.len() as u32);
            body.extend_from_slice(head);
            body.extend_from_slice(&proving(&self.shards, self.began));
            self.write_files(&mut body, carried);
            self.write_hits(&mut body, order, carried);
            body.end()
        })?;
        Patch::forget(cache, name);
        Ok(())
    }

    /// Brings files and entries into order, each once. Of a file of which nothing is certain, that.
    fn sort(&mut self) {
        let (mut files, texts) = (std::mem::take(&mut self.files), &self.texts);
        let place = |file: &FileAt| {
            let (path, record) = file.of(texts);
            (path, record[0] != UNPROVED, record)
        };
        files.sort_unstable_by(|a, b| place(a).cmp(&place(b)));
        files.dedup_by(|a, b| a.of(texts).0 == b.of(texts).0);
        self.files = files;
        self.hits.sort_unstable_by_key(|(key, ..)| *key);
        self.hits.dedup_by_key(|(key, ..)| *key);
    }

    /// Files that stood when they were compared and were something else when they were read again: what
    /// is carried of who reads them was found of the one, and the other must not vouch for it.
    fn doubt(&mut self, carried: &Carried<'_>) {
        for file in &mut self.files {
            let (path, record) = file.of(&self.texts);
            let Some(at) = carried.from.place(path) else { continue };
            let stood = carried.files.get(at) == Some(&true);
            if stood && carried.from.record(at).is_some_and(|(_, earlier)| earlier != record) {
                let path = path.to_vec();
                file.start = self.texts.len();
                file.record = 1;
                self.texts.extend_from_slice(&path);
                self.texts.push(UNPROVED);
            }
        }
    }

    /// All that differs from the memo that things are carried from; `None` where that one is better
    /// written anew. This one is in order.
    fn patch(&self, head: &[u8], order: &[Key], carried: &Carried<'_>) -> Option<Patch> {
        let from = carried.from;
        let (files, rows) = (self.patched_files(carried)?, self.patched_rows(order, carried)?);
        let (head, shards) = (head.to_vec(), proving(&self.shards, self.began));
        let patch = Patch { head, shards, files, rows };
        (patch.size() < from.size() / 4).then_some(patch)
    }

    /// `None` where it forgets a file, or something else is known of one that takes more room.
    fn patched_files(&self, carried: &Carried<'_>) -> Option<BTreeMap<u32, Vec<u8>>> {
        let from = carried.from;
        let mut files = from.patch().map_or_else(BTreeMap::new, |patch| patch.files.clone());
        let mut stale: HashSet<usize> =
            (0..from.files()).filter(|at| carried.files.get(*at) != Some(&true)).collect();
        for (path, record) in self.files.iter().map(|file| file.of(&self.texts)) {
            let at = from.place(path)?;
            stale.remove(&at);
            if from.record(at)?.1 != record {
                (record.len() <= from.slot(at))
                    .then(|| files.insert(at as u32, record.to_vec()))?;
            }
        }
        stale.is_empty().then_some(files)
    }

    /// `None` where the steps are others.
    fn patched_rows(
        &self,
        order: &[Key],
        carried: &Carried<'_>,
    ) -> Option<Vec<(u32, Option<Row>)>> {
        let Carried { from, keys, .. } = carried;
        if order.len() != from.len() || order.len() != keys.len() {
            return None;
        }
        let earlier = from.patch().into_iter().flat_map(|patch| patch.rows.iter().cloned());
        let mut rows: BTreeMap<u32, Option<Row>> = earlier.collect();
        for (at, key) in order.iter().enumerate() {
            if !keys[at] {
                let hit = self.hits.binary_search_by_key(key, |(key, ..)| *key);
                rows.insert(at as u32, hit.ok().and_then(|hit| self.row(hit)));
            } else if from.key(at).as_ref() != Some(key) {
                return None;
            }
        }
        Some(rows.into_iter().collect())
    }

    fn row(&self, hit: usize) -> Option<Row> {
        let (key, stamp, place) = self.hits[hit];
        Some(Row { key, stamp, text: one_of(&self.made[place as usize..])?.to_vec() })
    }

    fn write_files(&self, body: &mut Summed<'_>, carried: Option<&Carried<'_>>) {
        let new = self.files.iter().map(|file| file.of(&self.texts));
        let old = carried.into_iter().flat_map(Carried::records);
        let all = merged(old, new);
        body.put(all.len() as u32);
        let mut place = 0;
        for (path, _) in &all {
            body.put(place as u32);
            place += 4 + path.len() + ROOM;
        }
        body.put(place as u32);
        for (path, record) in all {
            body.put(path.len() as u32);
            body.extend_from_slice(path);
            body.extend_from_slice(record);
            body.extend_from_slice(&[0; ROOM][record.len().min(ROOM)..]);
        }
    }

    fn write_hits(&self, body: &mut Summed<'_>, order: &[Key], carried: Option<&Carried<'_>>) {
        let made = |place: u32| one_of(&self.made[place as usize..]);
        let new = self.hits.iter().map(|(key, stamp, place)| (*key, (*stamp, made(*place))));
        let old = carried.into_iter().flat_map(Carried::rows);
        let mut all = merged(old, new);
        // Beyond 4 GiB of results nothing is noted.
        let mut room = u32::MAX as usize;
        all.retain(|(_, (_, text))| {
            let left = text.and_then(|text| room.checked_sub(text.len()));
            room = left.unwrap_or(room);
            left.is_some()
        });
        let row = |key: &Key| all.binary_search_by_key(key, |(key, _)| *key);
        body.put(order.len() as u32);
        order.iter().for_each(|key| body.put(row(key).map_or(u32::MAX, |at| at as u32)));
        body.put(all.len() as u32);
        let mut place = 0;
        for (key, (stamp, text)) in &all {
            body.extend_from_slice(key.as_bytes());
            body.extend_from_slice(&stamp.bytes());
            body.put(place);
            place += text.unwrap_or_default().len() as u32;
        }
        all.iter().for_each(|(_, (_, text))| body.extend_from_slice(text.unwrap_or_default()));
    }
}

/// Stamps of the directories of entries, of those that prove something to whom began at `began`.
pub(crate) fn proving(shards: &[Option<Stamp>], began: SystemTime) -> Vec<u8> {
    let settled = shards.iter().map(|stamp| stamp.filter(|stamp| stamp.settled(began)));
    settled.flat_map(|stamp| stamp.map_or([0; STAMP], |stamp| stamp.bytes())).collect()
}

/// Two sorted lists as one; of what is in both, that of the second.
fn merged<K: Ord, V>(
    old: impl Iterator<Item = (K, V)>,
    new: impl Iterator<Item = (K, V)>,
) -> Vec<(K, V)> {
    let (mut old, mut new, mut all) = (old.peekable(), new.peekable(), Vec::new());
    while let Some((key, _)) = new.peek() {
        match old.next_if(|(earlier, _)| earlier < key) {
            Some(earlier) => all.push(earlier),
            None => {
                old.next_if(|(earlier, _)| earlier == key);
                all.extend(new.next());
            }
        }
    }
    all.extend(old);
    all
}

/// Removes the files called `kind…` that were not written for longest, where there are too many.
/// And what somebody who was killed left half written.
fn forget(dir: &Path, kind: &str) {
    let written = |path: &PathBuf| fs::metadata(path).and_then(|meta| meta.modified()).ok();
    let mut paths = Vec::new();
    for item in fs::read_dir(dir).into_iter().flatten().flatten() {
        let (name, path) = (item.file_name(), item.path());
        if name.as_bytes().starts_with(kind.as_bytes()) {
            paths.push(path);
        } else if name.as_bytes().starts_with(b".") && name.as_bytes().ends_with(b".tmp") {
            let age = written(&path).and_then(|at| at.elapsed().ok());
            if age.is_some_and(|age| age > ABANDONED) {
                let _ = fs::remove_file(path);
            }
        }
    }
    if paths.len() <= MOST {
        return;
    }
    let mut paths: Vec<_> = paths.into_iter().map(|path| (written(&path), path)).collect();
    paths.sort();
    let surplus = paths.len() - MOST;
    for (_, path) in &paths[..surplus] {
        let _ = fs::remove_file(path);
    }
}

/// The first of `texts`, as [`render`] made them.
pub(crate) fn one_of(texts: &[u8]) -> Option<&[u8]> {
    let mut rest = Reader(texts);
    skip(&mut rest)?;
    Some(&texts[..texts.len() - rest.0.len()])
}

fn skip(from: &mut Reader<'_>) -> Option<()> {
    from.take(8)?;
    for _ in 0..from.word()? {
        for _ in 0..2 {
            let len = from.word()? as usize;
            from.take(len)?;
        }
        from.take(1 + 4 + 1 + 32 + 8)?;
    }
    Some(())
}

fn render(hit: &Hit, to: &mut Vec<u8>) {
    to.extend_from_slice(&hit.seconds.to_le_bytes());
    put(to, hit.outputs.len() as u32);
    for output in &hit.outputs {
        put_text(to, &output.port);
        put_text(to, &output.name);
        to.push(u8::from(output.index.is_some()));
        put(to, output.index.unwrap_or_default());
        to.push(u8::from(output.kind == Kind::Dir));
        to.extend_from_slice(output.digest.as_bytes());
        to.extend_from_slice(&output.bytes.to_le_bytes());
    }
}

pub(crate) fn parse(from: &mut Reader<'_>) -> Option<Hit> {
    let seconds = f64::from_le_bytes(from.take(8)?.try_into().ok()?);
    let count = from.word()?;
    let mut outputs = Vec::new();
    for _ in 0..count {
        let (port, name) = (from.text()?.to_string(), from.text()?.to_string());
        let index = (from.take(1)? == [1], from.word()?);
        let kind = if from.take(1)? == [1] { Kind::Dir } else { Kind::File };
        let digest = Digest::from_bytes(from.take(32)?.try_into().ok()?);
        let bytes = u64::from_le_bytes(from.take(8)?.try_into().ok()?);
        let index = index.0.then_some(index.1);
        outputs.push(Output { port, index, name, kind, digest, bytes });
    }
    Some(Hit { outputs, seconds })
}

#[cfg(test)]
mod tests;
