//! What an earlier run found, read back and compared with what is there now. See `memo.rs`.

use std::cmp::Ordering;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

use rayon::prelude::*;

use crate::bytes_of::Reader;
use crate::cache::Cache;
use crate::digest::{Digest, Key};
use crate::error::Result;
use crate::layout::Layout;
use crate::memo::{Carried, FILE, Hit, MAGIC, Memo, ROW, SEAL, SHARDS, STAMP, SUM};
use crate::memo::{one_of, parse, proving, shards};
use crate::nearby::Nearby;
use crate::patch::{Patch, Row};
use crate::stat::Stamp;

/// Files that one thread looks at before another is asked to help.
const CHUNK: usize = 512;
/// For so long what directories of entries say tells of the entries in them.
const FRESH: Duration = Duration::from_secs(10);

/// What an earlier run found.
#[derive(Debug)]
pub struct Recalled {
    layout: Layout,
    bytes: Vec<u8>,
    parts: Parts,
    /// What later runs found otherwise. In the bytes, too, are its stamps and records, and in the
    /// order its rows, by numbers from that of the memo's own rows on.
    patch: Option<Patch>,
    /// Of each row of the memo whether a step has it. Empty where none was replaced.
    alive: Vec<bool>,
    /// The rows of the patch, sorted by their keys.
    sorted: Vec<usize>,
    /// When it was read back, and the stamps of the directories of entries then.
    began: SystemTime,
    read_back: Instant,
    shards: Vec<Option<Stamp>>,
    files: OnceLock<Vec<bool>>,
}

/// Where in the bytes things are.
#[derive(Debug, Clone, Copy, Default)]
struct Parts {
    head: (usize, usize),
    shards: usize,
    places: (usize, usize),
    files: usize,
    order: (usize, usize),
    rows: (usize, usize),
    hits: usize,
}

impl Cache {
    /// The memo called `name`, if there is a whole one.
    pub fn recall(&self, name: &str) -> Option<Recalled> {
        let bytes = fs::read(self.kept_file(name)).ok()?;
        let parts = Parts::of(&bytes)?;
        let mut recalled = Recalled {
            layout: self.layout().clone(),
            bytes,
            parts,
            patch: None,
            alive: Vec::new(),
            sorted: Vec::new(),
            began: SystemTime::now(),
            read_back: Instant::now(),
            shards: Vec::new(),
            files: OnceLock::new(),
        };
        if let Some(patch) = Patch::read(self, name, recalled.sum()) {
            recalled.apply(patch);
        }
        // Where none of its entries lie, none can change.
        let mut wanted = [false; SHARDS];
        recalled.rows().for_each(|row| wanted[recalled.shard(row)] = true);
        recalled.began = SystemTime::now();
        recalled.shards = shards(self.layout(), |n| wanted[n]);
        Some(recalled)
    }
}

impl Memo {
    /// Begins to collect for a run that takes from what an earlier one found, when that was read back.
    pub fn after(earlier: &Recalled) -> Memo {
        Memo::begun(earlier.began, earlier.shards.clone())
    }
}

impl<'a> Carried<'a> {
    /// Paths and records of the files that are carried, sorted.
    pub(crate) fn records(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
        let (from, files) = (self.from, self.files);
        (0..from.parts.places.1)
            .filter(|at| files.get(*at) == Some(&true))
            .filter_map(|at| from.record(at))
    }

    /// Keys of the entries that are carried, sorted, with their stamps and the texts of their hits.
    pub(crate) fn rows(&self) -> impl Iterator<Item = (Key, (Stamp, Option<&'a [u8]>))> {
        let from = self.from;
        let mut wanted = vec![false; from.parts.rows.1 + from.patched_rows().len()];
        for (at, _) in self.keys.iter().enumerate().filter(|(_, carried)| **carried) {
            from.row(at).into_iter().for_each(|row| wanted[row] = true);
        }
        let mut rows: Vec<usize> = (0..wanted.len()).filter(|row| wanted[*row]).collect();
        if from.patch.is_some() {
            rows.sort_by_key(|row| from.row_key(*row));
            rows.dedup_by_key(|row| from.row_key(*row));
        }
        rows.into_iter()
            .map(|row| (from.row_key(row), (from.row_stamp(row), from.text(row).and_then(one_of))))
    }
}

impl Recalled {
    /// What the writer put in front.
    pub fn head(&self) -> &[u8] {
        let (at, len) = self.parts.head;
        self.patch.as_ref().map_or_else(|| &self.bytes[at..at + len], |patch| &patch.head)
    }

    /// The digest of the memo's file.
    pub(crate) fn sum(&self) -> &[u8] {
        &self.bytes[MAGIC.len()..MAGIC.len() + SUM]
    }

    /// The bytes of the memo's file.
    pub(crate) fn size(&self) -> usize {
        self.bytes.len()
    }

    /// What later runs found otherwise.
    pub(crate) fn patch(&self) -> Option<&Patch> {
        self.patch.as_ref()
    }

    /// Puts a patch over the memo, if it fits.
    fn apply(&mut self, patch: Patch) {
        let (order, own) = (self.parts.order, self.parts.rows.1);
        let fits = |at: usize, record: &[u8]| at < self.files() && record.len() <= self.slot(at);
        if !patch.files.iter().all(|(at, record)| fits(*at as usize, record))
            || patch.rows.iter().any(|(at, _)| *at as usize >= order.1)
        {
            return;
        }
        self.bytes[self.parts.shards..][..SHARDS * STAMP].copy_from_slice(&patch.shards);
        for (at, record) in &patch.files {
            if let Some((start, _)) = self.place_of(*at as usize) {
                self.bytes[start..start + record.len()].copy_from_slice(record);
            }
        }
        for (row, (at, known)) in patch.rows.iter().enumerate() {
            let row = if known.is_some() { (own + row) as u32 } else { u32::MAX };
            self.bytes[order.0 + 4 * *at as usize..][..4].copy_from_slice(&row.to_le_bytes());
        }
        let mut alive = vec![false; own];
        for row in (0..order.1).map(|at| word(&self.bytes, order.0 + 4 * at)) {
            if row < own {
                alive[row] = true;
            }
        }
        (self.alive, self.patch) = (alive, Some(patch));
        let mut sorted: Vec<usize> = self.rows().filter(|row| *row >= own).collect();
        sorted.sort_by_key(|row| self.row_key(*row));
        self.sorted = sorted;
    }

    /// How many keys the writer's order has.
    pub fn len(&self) -> usize {
        self.parts.order.1
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The key at `at` of the writer's order, if its entry was noted.
    pub fn key(&self, at: usize) -> Option<Key> {
        Some(self.row_key(self.row(at)?))
    }

    /// The key at `at` of the writer's order and its result, if the entry was noted.
    pub fn hit_at(&self, at: usize) -> Option<(Key, Hit)> {
        let row = self.row(at)?;
        Some((self.row_key(row), self.read(row)?))
    }

    /// What the making of the result at `at` of the writer's order took, in seconds, if it was noted.
    pub fn seconds_at(&self, at: usize) -> Option<f64> {
        let text = self.text(self.row(at)?)?;
        Some(f64::from_le_bytes(text.first_chunk::<8>().copied()?))
    }

    /// Whether the entry at `at` of the writer's order was noted and is what it was.
    pub fn stands_at(&self, at: usize) -> bool {
        self.row(at).is_some_and(|row| self.row_stands(row))
    }

    fn row(&self, at: usize) -> Option<usize> {
        let (start, count) = self.parts.order;
        let row = (at < count).then(|| word(&self.bytes, start + 4 * at))?;
        (row < self.parts.rows.1 || self.patched(row).is_some()).then_some(row)
    }

    fn patched_rows(&self) -> &[(u32, Option<Row>)] {
        self.patch.as_ref().map_or(&[], |patch| &patch.rows)
    }

    /// The row, if it is one of the patch.
    fn patched(&self, row: usize) -> Option<&Row> {
        let at = row.checked_sub(self.parts.rows.1)?;
        self.patched_rows().get(at)?.1.as_ref()
    }

    /// All rows that count: those of the memo that no patch replaced, and those of the patch.
    fn rows(&self) -> impl Iterator<Item = usize> {
        let (own, patched) = (self.parts.rows.1, self.patched_rows().len());
        let alive = move |row: &usize| self.alive.get(*row).is_none_or(|alive| *alive);
        let patched = (own..own + patched).filter(|row| self.patched(*row).is_some());
        (0..own).filter(alive).chain(patched)
    }

    /// The digest and the stamp of the file at `path`, if it has not changed.
    pub fn file(&self, path: &Path) -> Option<(Digest, Stamp)> {
        let at = self.place(path.as_os_str().as_bytes())?;
        unchanged(&mut Nearby::default(), path, self.record(at)?.1)
    }

    /// Where the file at `path` is among all.
    pub(crate) fn place(&self, path: &[u8]) -> Option<usize> {
        search(self.files(), |at| Some(self.record(at)?.0.cmp(path)))
    }

    /// How many files are noted.
    pub(crate) fn files(&self) -> usize {
        self.parts.places.1
    }

    /// Whether no file has changed; `seal` gives what was noted by [`Memo::files`].
    pub fn files_stand(&self, seal: &(dyn Fn(&Path) -> Option<Digest> + Sync)) -> bool {
        self.verdicts(seal).iter().all(|stands| *stands)
    }

    /// Of each file whether it is what it was, asked once; `seal` as in [`Recalled::files_stand`].
    pub fn verdicts(&self, seal: &(dyn Fn(&Path) -> Option<Digest> + Sync)) -> &[bool] {
        let stands = |nearby: &mut Nearby, at: usize| {
            let Some((path, record)) = self.record(at) else { return false };
            let path = Path::new(OsStr::from_bytes(path));
            match record[0] {
                FILE => unchanged(nearby, path, record).is_some(),
                SEAL => seal(path).is_some_and(|now| record.get(1..33) == Some(now.as_bytes())),
                _ => false,
            }
        };
        self.files.get_or_init(|| {
            let count = self.files();
            if count <= CHUNK {
                let mut nearby = Nearby::default();
                return (0..count).map(|at| stands(&mut nearby, at)).collect();
            }
            let pieces = (0..count).into_par_iter().with_min_len(CHUNK);
            pieces.map_init(Nearby::default, stands).collect()
        })
    }

    /// Files and patterns that are not what they were, or of which nothing was known, sorted.
    pub fn changed(&self, seal: &(dyn Fn(&Path) -> Option<Digest> + Sync)) -> Vec<&OsStr> {
        let verdicts = self.verdicts(seal).iter().enumerate();
        let changed = verdicts.filter(|(_, stands)| !**stands);
        let mut paths: Vec<&OsStr> =
            changed.filter_map(|(at, _)| Some(OsStr::from_bytes(self.record(at)?.0))).collect();
        // As they are written; whoever searches relies on it.
        paths.sort_unstable();
        paths
    }

    /// Whether every entry is noted, there, and what it was. If so, how many were looked at one by one,
    /// since nothing was noted of their directories or something else in there has changed.
    pub fn entries_stand(&self) -> Option<usize> {
        if !(0..self.len()).all(|at| self.row(at).is_some()) {
            return None;
        }
        let stand: Vec<bool> = (0..SHARDS).map(|n| self.shard_stands(n)).collect();
        let (mut nearby, mut looked) = (Nearby::of_links(), 0);
        for row in self.rows().filter(|row| !stand[self.shard(*row)]) {
            looked += 1;
            if !self.entry_stands(&mut nearby, row) {
                return None;
            }
        }
        Some(looked)
    }

    /// Notes in the memo, which is `name`, the stamps that the directories of entries have now, if any
    /// is another one and old enough to prove something. To be done where every entry stands, so that
    /// the next run need not look at them one by one. Tells whether there was anything to note.
    ///
    /// # Errors
    /// When it cannot be written; then what was there is there.
    pub fn renew(&self, cache: &Cache, name: &str) -> Result<bool> {
        let before = &self.bytes[self.parts.shards..][..SHARDS * STAMP];
        let mut shards = proving(&self.shards, self.began);
        for (now, before) in shards.chunks_exact_mut(STAMP).zip(before.chunks_exact(STAMP)) {
            if now.iter().all(|byte| *byte == 0) {
                now.copy_from_slice(before);
            }
        }
        if shards == before {
            return Ok(false);
        }
        let patch = self.patch.clone().unwrap_or_default();
        let patch = Patch { head: self.head().to_vec(), shards, ..patch };
        patch.keep(cache, name, self.sum())?;
        Ok(true)
    }

    /// The result of `key` and the stamp of its entry, if that was noted and is what it was.
    pub fn hit(&self, key: &Key) -> Option<(Hit, Stamp)> {
        let patched = self.sorted.binary_search_by_key(key, |row| self.row_key(*row)).ok();
        let alive = |row: &usize| self.alive.get(*row).is_none_or(|alive| *alive);
        let own = || search(self.parts.rows.1, |row| Some(self.row_key(row).cmp(key)));
        let row = patched.map(|at| self.sorted[at]).or_else(|| own().filter(alive))?;
        // What was there at first may be gone from under a run that takes hours.
        let stands = match self.read_back.elapsed() < FRESH {
            true => self.row_stands(row),
            false => self.entry_stands(&mut Nearby::of_links(), row),
        };
        stands.then(|| Some((self.read(row)?, self.row_stamp(row))))?
    }

    /// As if it had been read back a while ago.
    #[cfg(test)]
    pub(crate) fn age(&mut self) {
        self.read_back = Instant::now().checked_sub(FRESH).expect("the clock runs for longer");
    }

    fn row_stands(&self, row: usize) -> bool {
        self.shard_stands(self.shard(row)) || self.entry_stands(&mut Nearby::of_links(), row)
    }

    /// The directory of a row's entry.
    fn shard(&self, row: usize) -> usize {
        match self.patched(row) {
            Some(row) => usize::from(row.key.as_bytes()[0]),
            None => usize::from(self.bytes[self.parts.rows.0 + row * ROW]),
        }
    }

    fn shard_stands(&self, n: usize) -> bool {
        let at = self.parts.shards + n * STAMP;
        self.shards[n].is_some_and(|now| self.bytes[at..at + STAMP] == now.bytes())
    }

    fn entry_stands(&self, nearby: &mut Nearby, row: usize) -> bool {
        let path = self.layout.entry(&self.row_key(row));
        nearby.stamp(&path).is_ok_and(|now| now == self.row_stamp(row))
    }

    fn row_key(&self, row: usize) -> Key {
        if let Some(row) = self.patched(row) {
            return row.key;
        }
        let at = self.parts.rows.0 + row * ROW;
        Key::from_bytes(self.bytes[at..at + 32].try_into().expect("32 bytes"))
    }

    fn row_stamp(&self, row: usize) -> Stamp {
        if let Some(row) = self.patched(row) {
            return row.stamp;
        }
        let at = self.parts.rows.0 + row * ROW + 32;
        Stamp::from_bytes(self.bytes[at..at + STAMP].try_into().expect("40 bytes"))
    }

    fn read(&self, row: usize) -> Option<Hit> {
        parse(&mut Reader(self.text(row)?))
    }

    /// The text of a row's hit, and what follows it.
    fn text(&self, row: usize) -> Option<&[u8]> {
        if let Some(row) = self.patched(row) {
            return Some(&row.text);
        }
        let at = self.parts.rows.0 + row * ROW + 32 + STAMP;
        self.bytes.get(self.parts.hits + word(&self.bytes, at)..)
    }

    /// Where a file's record begins, and where its room ends.
    fn place_of(&self, at: usize) -> Option<(usize, usize)> {
        let place = |at: usize| self.parts.files + word(&self.bytes, self.parts.places.0 + 4 * at);
        let path = Reader(self.bytes.get(place(at)..)?).word()? as usize;
        let (start, end) = (place(at) + 4 + path, place(at + 1));
        (start <= end && end <= self.bytes.len()).then_some((start, end))
    }

    /// The room for a file's record.
    pub(crate) fn slot(&self, at: usize) -> usize {
        self.place_of(at).map_or(0, |(start, end)| end - start)
    }

    /// Path and record of a file.
    pub(crate) fn record(&self, at: usize) -> Option<(&[u8], &[u8])> {
        let from = self.parts.files + word(&self.bytes, self.parts.places.0 + 4 * at);
        let mut reader = Reader(self.bytes.get(from..)?);
        let len = reader.word()? as usize;
        let path = reader.take(len)?;
        let len = match *reader.0.first()? {
            FILE => 1 + STAMP + 32,
            SEAL => 1 + 32,
            _ => 1,
        };
        Some((path, reader.take(len)?))
    }
}

/// The place of `count` sorted ones that `compare` calls equal.
fn search(count: usize, compare: impl Fn(usize) -> Option<Ordering>) -> Option<usize> {
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low.midpoint(high);
        match compare(middle)? {
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
            Ordering::Equal => return Some(middle),
        }
    }
    None
}

/// What a record says of the file at `path`, if `stat` says the same now.
fn unchanged(nearby: &mut Nearby, path: &Path, record: &[u8]) -> Option<(Digest, Stamp)> {
    if record[0] != FILE {
        return None;
    }
    let noted = Stamp::from_bytes(record.get(1..1 + STAMP)?.try_into().ok()?);
    let digest = record.get(1 + STAMP..1 + STAMP + 32)?.try_into().ok()?;
    let now = nearby.stamp(path).ok()?;
    (now == noted).then(|| (Digest::from_bytes(digest), noted))
}

impl Parts {
    /// Checks the whole and finds its parts.
    fn of(bytes: &[u8]) -> Option<Parts> {
        let start = MAGIC.len() + SUM;
        let mut reader = Reader(bytes.strip_prefix(MAGIC)?);
        let sum: [u8; 32] = reader.take(32)?.try_into().ok()?;
        let hash = match reader.0.len() {
            0..1_000_000 => blake3::hash(reader.0),
            _ => blake3::Hasher::new().update_rayon(reader.0).finalize(),
        };
        if *hash.as_bytes() != sum {
            return None;
        }
        let len = reader.0.len();
        let at = |reader: &Reader<'_>| start + len - reader.0.len();
        let mut parts = Parts::default();
        let head = reader.word()? as usize;
        parts.head = (at(&reader), head);
        reader.take(head)?;
        parts.shards = at(&reader);
        reader.take(SHARDS * STAMP)?;
        let files = reader.word()? as usize;
        parts.places = (at(&reader), files);
        reader.take(4 * files)?;
        let records = reader.word()? as usize;
        parts.files = at(&reader);
        reader.take(records)?;
        let order = reader.word()? as usize;
        parts.order = (at(&reader), order);
        reader.take(4 * order)?;
        let rows = reader.word()? as usize;
        parts.rows = (at(&reader), rows);
        reader.take(ROW * rows)?;
        parts.hits = at(&reader);
        Some(parts)
    }
}

fn word(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize
}
