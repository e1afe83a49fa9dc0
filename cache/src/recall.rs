//! What an earlier run found, read back and compared with what is there now. See `memo.rs`.

use std::cmp::Ordering;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::SystemTime;

use rayon::prelude::*;

use crate::bytes_of::Reader;
use crate::cache::Cache;
use crate::digest::{Digest, Key};
use crate::layout::Layout;
use crate::memo::{Carried, FILE, Hit, MAGIC, Memo, ROW, SEAL, SHARDS, STAMP, SUM};
use crate::memo::{one_of, parse, seal, shards};
use crate::nearby::Nearby;
use crate::stat::Stamp;

/// Files that one thread looks at before another is asked to help.
const CHUNK: usize = 512;

/// What an earlier run found.
#[derive(Debug)]
pub struct Recalled {
    layout: Layout,
    bytes: Vec<u8>,
    parts: Parts,
    /// When it was read back, and the stamps of the directories of entries then.
    began: SystemTime,
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
        // Where none of its entries lie, none can change.
        let mut wanted = [false; SHARDS];
        let (start, rows) = parts.rows;
        (0..rows).for_each(|row| wanted[usize::from(bytes[start + row * ROW])] = true);
        let (began, shards) = (SystemTime::now(), shards(self.layout(), |n| wanted[n]));
        let layout = self.layout().clone();
        Some(Recalled { layout, bytes, parts, began, shards, files: OnceLock::new() })
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
        let mut wanted = vec![false; from.parts.rows.1];
        for (at, _) in self.keys.iter().enumerate().filter(|(_, carried)| **carried) {
            from.row(at).into_iter().for_each(|row| wanted[row] = true);
        }
        let rows = wanted.into_iter().enumerate().filter(|(_, wanted)| *wanted);
        rows.map(|(row, _)| {
            (from.row_key(row), (from.row_stamp(row), from.text(row).and_then(one_of)))
        })
    }
}

impl Recalled {
    /// What the writer put in front.
    pub fn head(&self) -> &[u8] {
        let (at, len) = self.parts.head;
        &self.bytes[at..at + len]
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

    /// Whether the entry at `at` of the writer's order was noted and is what it was.
    pub fn stands_at(&self, at: usize) -> bool {
        self.row(at).is_some_and(|row| self.row_stands(row))
    }

    fn row(&self, at: usize) -> Option<usize> {
        let (start, count) = self.parts.order;
        let row = (at < count).then(|| word(&self.bytes, start + 4 * at))?;
        (row < self.parts.rows.1).then_some(row)
    }

    /// The digest and the stamp of the file at `path`, if it has not changed.
    pub fn file(&self, path: &Path) -> Option<(Digest, Stamp)> {
        let wanted = path.as_os_str().as_bytes();
        let at = search(self.parts.places.1, |at| Some(self.record(at)?.0.cmp(wanted)))?;
        unchanged(&mut Nearby::default(), path, self.record(at)?.1)
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
            let count = self.parts.places.1;
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
        paths.sort_unstable(); // they are, as they are written
        paths
    }

    /// Whether every entry is there and what it was. If so, how many were looked at one by one, since
    /// nothing was noted of their directories or something else in there has changed.
    pub fn entries_stand(&self) -> Option<usize> {
        let (count, mut at, mut looked) = (self.parts.rows.1, 0, 0);
        let mut nearby = Nearby::of_links();
        while at < count {
            let n = usize::from(self.row_key(at).as_bytes()[0]);
            let end = (at..count).find(|&i| usize::from(self.row_key(i).as_bytes()[0]) != n);
            let end = end.unwrap_or(count);
            if !self.shard_stands(n) {
                looked += end - at;
                if !(at..end).all(|row| self.entry_stands(&mut nearby, row)) {
                    return None;
                }
            }
            at = end;
        }
        Some(looked)
    }

    /// The memo with the stamps that the directories of entries have now, if any is another one and
    /// old enough to prove something. To be kept in its place where every entry stands, so that the
    /// next run need not look at them one by one.
    pub fn renewed(&self) -> Option<Vec<u8>> {
        let mut bytes = self.bytes.clone();
        for (n, now) in self.shards.iter().enumerate() {
            if let Some(now) = now.filter(|now| now.settled(self.began)) {
                bytes[self.parts.shards + n * STAMP..][..STAMP].copy_from_slice(&now.bytes());
            }
        }
        (bytes != self.bytes).then(|| {
            seal(&mut bytes);
            bytes
        })
    }

    /// The result of `key` and the stamp of its entry, if that was noted and is what it was.
    pub fn hit(&self, key: &Key) -> Option<(Hit, Stamp)> {
        let row = search(self.parts.rows.1, |row| Some(self.row_key(row).cmp(key)))?;
        self.row_stands(row).then(|| Some((self.read(row)?, self.row_stamp(row))))?
    }

    fn row_stands(&self, row: usize) -> bool {
        let at = self.parts.rows.0 + row * ROW;
        let stands = || self.entry_stands(&mut Nearby::of_links(), row);
        self.shard_stands(usize::from(self.bytes[at])) || stands()
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
        let at = self.parts.rows.0 + row * ROW;
        Key::from_bytes(self.bytes[at..at + 32].try_into().expect("32 bytes"))
    }

    fn row_stamp(&self, row: usize) -> Stamp {
        let at = self.parts.rows.0 + row * ROW + 32;
        Stamp::from_bytes(self.bytes[at..at + STAMP].try_into().expect("40 bytes"))
    }

    fn read(&self, row: usize) -> Option<Hit> {
        parse(&mut Reader(self.text(row)?))
    }

    /// The text of a row's hit, and what follows it.
    fn text(&self, row: usize) -> Option<&[u8]> {
        let at = self.parts.rows.0 + row * ROW + 32 + STAMP;
        self.bytes.get(self.parts.hits + word(&self.bytes, at)..)
    }

    /// Path and record of a file.
    fn record(&self, at: usize) -> Option<(&[u8], &[u8])> {
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
