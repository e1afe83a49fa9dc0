//! What a run found of files and entries, in one file for the next run that asks the same. Knows no
//! steps.
//!
//! A copy like the index, to be deleted at will: whatever is taken from it is first compared with
//! `stat`. An entry is named, removed or replaced only by a change of its directory, so while a
//! directory of entries says what it said before any of them was looked up, all of them are what
//! they were; else each is asked itself. An entry's file that is edited in place is not noticed here
//! (it is read-only and sealed, and what was read of it was right): `scrub` finds such damage.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

use rayon::prelude::*;

use crate::bytes_of::{Reader, put, put_text};
use crate::cache::Cache;
use crate::digest::{Digest, Key};
use crate::entry::{Entry, Output};
use crate::error::Result;
use crate::layout::Layout;
use crate::stat::Stamp;
use crate::tree::Kind;

const MAGIC: &[u8] = b"pipe memo 1\n";
/// Directories of entries.
const SHARDS: usize = 256;
const STAMP: usize = 40;
/// Key, stamp, place of the rest.
const ROW: usize = 32 + STAMP + 4;
/// So many disposable files of a kind are kept.
const MOST: usize = 256;
/// Files that one thread looks at before another is asked to help.
const CHUNK: usize = 512;

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
    files: Vec<(Vec<u8>, Vec<u8>)>,
    /// With the place of the rest in `made`.
    hits: Vec<(Key, Stamp, u32)>,
    made: Vec<u8>,
}

/// What an earlier run found.
#[derive(Debug)]
pub struct Recalled {
    layout: Layout,
    bytes: Vec<u8>,
    parts: Parts,
    stands: Vec<OnceLock<bool>>,
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
    /// Begins to collect.
    pub fn memo(&self) -> Memo {
        let began = SystemTime::now();
        let shards = (0..SHARDS).map(|n| shard(self.layout(), n)).collect();
        Memo { began, shards, files: Vec::new(), hits: Vec::new(), made: Vec::new() }
    }

    /// The memo called `name`, if there is a whole one.
    pub fn recall(&self, name: &str) -> Option<Recalled> {
        let bytes = fs::read(self.kept_file(name)).ok()?;
        let parts = Parts::of(&bytes)?;
        let stands = vec![OnceLock::new(); SHARDS];
        Some(Recalled { layout: self.layout().clone(), bytes, parts, stands })
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
        forget(&self.index_dir(), name.split_inclusive('-').next().unwrap_or(name));
        self.write(&self.kept_file(name), bytes)
    }
}

/// The stamp of a directory of entries; one that is not there has none.
fn shard(layout: &Layout, n: usize) -> Option<Stamp> {
    let path = layout.dir("entries").join(format!("{n:02x}"));
    fs::symlink_metadata(path).ok().map(|meta| Stamp::of(&meta))
}

impl Memo {
    /// Notes a file that had `digest` when `stat` said `stamp`, asked before it was read; `false`
    /// when it is so young that this proves nothing, and is not noted.
    pub fn file(&mut self, path: &Path, stamp: &Stamp, digest: &Digest) -> bool {
        let settled = stamp.settled(self.began);
        if settled {
            let record = [&[0][..], &stamp.bytes(), digest.as_bytes()].concat();
            self.files.push((path.as_os_str().as_bytes().to_vec(), record));
        }
        settled
    }

    /// Notes what was found under `pattern` as a whole, by stamps that were all settled.
    pub fn files(&mut self, pattern: &Path, seal: &Digest) {
        let record = [&[1][..], seal.as_bytes()].concat();
        self.files.push((pattern.as_os_str().as_bytes().to_vec(), record));
    }

    /// Whether `stamp` proves something when the file was read after this memo began.
    pub fn settles(&self, stamp: &Stamp) -> bool {
        stamp.settled(self.began)
    }

    /// Notes the entry of `key`, whose file had `stamp` when it was read.
    pub fn hit(&mut self, key: Key, stamp: Stamp, hit: &Hit) {
        // Beyond 4 GiB of results nothing is noted.
        let Ok(place) = u32::try_from(self.made.len()) else { return };
        self.hits.push((key, stamp, place));
        render(hit, &mut self.made);
    }

    /// The keys of the entries noted so far.
    pub fn keys(&self) -> HashSet<Key> {
        self.hits.iter().map(|(key, ..)| *key).collect()
    }

    /// Writes all of it under `name`, with `head`, which is the caller's, and the keys in an order
    /// of its own.
    ///
    /// # Errors
    /// When it cannot be written; then what was there is there.
    pub fn write(mut self, cache: &Cache, name: &str, head: &[u8], order: &[Key]) -> Result<()> {
        self.files.sort_unstable();
        self.files.dedup_by(|a, b| a.0 == b.0);
        self.hits.sort_unstable_by_key(|(key, ..)| *key);
        self.hits.dedup_by_key(|(key, ..)| *key);
        let mut body = Vec::new();
        put(&mut body, head.len() as u32);
        body.extend_from_slice(head);
        for stamp in &self.shards {
            let settled = stamp.filter(|stamp| stamp.settled(self.began));
            body.extend_from_slice(&settled.map_or([0; STAMP], |stamp| stamp.bytes()));
        }
        let mut records = Vec::new();
        put(&mut body, self.files.len() as u32);
        for (path, record) in &self.files {
            put(&mut body, records.len() as u32);
            put(&mut records, path.len() as u32);
            records.extend_from_slice(path);
            records.extend_from_slice(record);
        }
        put(&mut body, records.len() as u32);
        body.append(&mut records);
        let row = |key: &Key| self.hits.binary_search_by_key(key, |(key, ..)| *key);
        put(&mut body, order.len() as u32);
        order.iter().for_each(|key| put(&mut body, row(key).map_or(u32::MAX, |at| at as u32)));
        put(&mut body, self.hits.len() as u32);
        for (key, stamp, place) in &self.hits {
            body.extend_from_slice(key.as_bytes());
            body.extend_from_slice(&stamp.bytes());
            put(&mut body, *place);
        }
        body.append(&mut self.made);
        let sum = Digest::of(&body);
        cache.keep_file(name, &[MAGIC, sum.as_bytes(), &body].concat())
    }
}

/// Removes the files called `kind…` that were not written for longest, where there are too many.
fn forget(dir: &Path, kind: &str) {
    let items = fs::read_dir(dir).into_iter().flatten().flatten();
    let kept = items.filter(|item| item.file_name().as_bytes().starts_with(kind.as_bytes()));
    let paths: Vec<PathBuf> = kept.map(|item| item.path()).collect();
    if paths.len() <= MOST {
        return;
    }
    let written = |path: &PathBuf| fs::metadata(path).and_then(|meta| meta.modified()).ok();
    let mut paths: Vec<_> = paths.into_iter().map(|path| (written(&path), path)).collect();
    paths.sort();
    let surplus = paths.len() - MOST;
    for (_, path) in &paths[..surplus] {
        let _ = fs::remove_file(path);
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
        let (start, count) = self.parts.order;
        let row = (at < count).then(|| word(&self.bytes, start + 4 * at))?;
        (row < self.parts.rows.1).then(|| self.row_key(row))
    }

    /// The digest and the stamp of the file at `path`, if it has not changed.
    pub fn file(&self, path: &Path) -> Option<(Digest, Stamp)> {
        let wanted = path.as_os_str().as_bytes();
        let at = search(self.parts.places.1, |at| Some(self.record(at)?.0.cmp(wanted)))?;
        unchanged(path, self.record(at)?.1)
    }

    /// Whether no file has changed; `seal` gives what was noted by [`Memo::files`].
    pub fn files_stand(&self, seal: &(dyn Fn(&Path) -> Option<Digest> + Sync)) -> bool {
        let count = self.parts.places.1;
        let stands = |at: usize| {
            let Some((path, record)) = self.record(at) else { return false };
            let path = Path::new(std::ffi::OsStr::from_bytes(path));
            match record[0] {
                0 => unchanged(path, record).is_some(),
                _ => seal(path).is_some_and(|now| record.get(1..33) == Some(now.as_bytes())),
            }
        };
        if count <= CHUNK {
            return (0..count).all(stands);
        }
        let chunks = (0..count.div_ceil(CHUNK)).into_par_iter();
        chunks.all(|n| (n * CHUNK..count.min((n + 1) * CHUNK)).all(stands))
    }

    /// Whether every entry is there and what it was.
    pub fn entries_stand(&self) -> bool {
        let count = self.parts.rows.1;
        let mut at = 0;
        while at < count {
            let n = usize::from(self.row_key(at).as_bytes()[0]);
            let end = (at..count).find(|&i| usize::from(self.row_key(i).as_bytes()[0]) != n);
            let end = end.unwrap_or(count);
            if !self.shard_stands(n) && !(at..end).all(|row| self.entry_stands(row)) {
                return false;
            }
            at = end;
        }
        true
    }

    /// The result of `key` and the stamp of its entry, if that was noted and is what it was.
    pub fn hit(&self, key: &Key) -> Option<(Hit, Stamp)> {
        let row = search(self.parts.rows.1, |row| Some(self.row_key(row).cmp(key)))?;
        let stands = self.shard_stands(usize::from(key.as_bytes()[0])) || self.entry_stands(row);
        stands.then(|| Some((self.read(row)?, self.row_stamp(row))))?
    }

    fn shard_stands(&self, n: usize) -> bool {
        *self.stands[n].get_or_init(|| {
            let at = self.parts.shards + n * STAMP;
            let noted = &self.bytes[at..at + STAMP];
            shard(&self.layout, n).is_some_and(|now| now.bytes() == noted)
        })
    }

    fn entry_stands(&self, row: usize) -> bool {
        let path = self.layout.entry(&self.row_key(row));
        let meta = fs::symlink_metadata(path);
        meta.is_ok_and(|meta| Stamp::of(&meta) == self.row_stamp(row))
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
        let at = self.parts.rows.0 + row * ROW + 32 + STAMP;
        let from = self.parts.hits + word(&self.bytes, at);
        parse(&mut Reader(self.bytes.get(from..)?))
    }

    /// Path and record of a file.
    fn record(&self, at: usize) -> Option<(&[u8], &[u8])> {
        let from = self.parts.files + word(&self.bytes, self.parts.places.0 + 4 * at);
        let mut reader = Reader(self.bytes.get(from..)?);
        let len = reader.word()? as usize;
        let path = reader.take(len)?;
        (!reader.0.is_empty()).then_some((path, reader.0))
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
fn unchanged(path: &Path, record: &[u8]) -> Option<(Digest, Stamp)> {
    if record[0] != 0 {
        return None;
    }
    let noted = Stamp::from_bytes(record.get(1..1 + STAMP)?.try_into().ok()?);
    let digest = record.get(1 + STAMP..1 + STAMP + 32)?.try_into().ok()?;
    let now = Stamp::of(&fs::metadata(path).ok()?);
    (now == noted).then(|| (Digest::from_bytes(digest), noted))
}

impl Parts {
    /// Checks the whole and finds its parts.
    fn of(bytes: &[u8]) -> Option<Parts> {
        let start = MAGIC.len() + 32;
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

fn parse(from: &mut Reader<'_>) -> Option<Hit> {
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
mod tests {
    use super::*;
    use crate::commit::Publication;

    fn made(text: &str) -> Entry {
        let output = Output {
            port: "model".into(),
            index: Some(3),
            name: "a b.bin".into(),
            kind: Kind::Dir,
            digest: Digest::of(text.as_bytes()),
            bytes: u64::MAX,
        };
        Entry::new(text.into(), vec![output], None, serde_json::json!({ "seconds": 2.5 }))
    }

    fn cache() -> (tempfile::TempDir, Cache, Vec<Entry>) {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("c")).unwrap();
        let entries: Vec<Entry> = (0..40).map(|i| made(&format!("pre-image {i}"))).collect();
        let committer = cache.committer(|_| {});
        for entry in &entries {
            committer.publish(Publication::imported(entry.clone())).unwrap();
        }
        committer.flush().unwrap();
        (dir, cache, entries)
    }

    fn noted(cache: &Cache, entries: &[Entry]) -> Recalled {
        let mut memo = cache.memo();
        for entry in entries {
            let (entry, stamp) = cache.lookup_stamped(&entry.key).unwrap().unwrap();
            memo.hit(entry.key, stamp.unwrap(), &Hit::of(&entry));
        }
        let keys: Vec<Key> = entries.iter().map(|entry| entry.key).collect();
        memo.write(cache, "memo-x", b"head", &keys).unwrap();
        cache.recall("memo-x").unwrap()
    }

    #[test]
    fn what_was_noted_comes_back_in_order() {
        let (_dir, cache, entries) = cache();
        let recalled = noted(&cache, &entries);
        assert_eq!((recalled.head(), recalled.len()), (&b"head"[..], entries.len()));
        for (at, entry) in entries.iter().enumerate() {
            assert_eq!(recalled.key(at), Some(entry.key));
            assert_eq!(recalled.hit(&entry.key).unwrap().0, Hit::of(entry));
        }
        assert!(recalled.hit(&Key::of(b"another")).is_none());
        assert!(recalled.key(entries.len()).is_none());
        assert!(recalled.entries_stand());
    }

    #[test]
    fn an_entry_that_is_gone_replaced_or_damaged_is_not_what_it_was() {
        let (_dir, cache, entries) = cache();
        noted(&cache, &entries);
        // Beyond the tick of the file system's clock.
        std::thread::sleep(std::time::Duration::from_millis(30));
        let path = |n: usize| cache.layout().entry(&entries[n].key);
        fs::remove_file(path(0)).unwrap();
        let text = fs::read(path(1)).unwrap();
        fs::remove_file(path(1)).unwrap();
        fs::write(path(1), text).unwrap();
        let mut permissions = fs::metadata(path(2)).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o600);
        fs::set_permissions(path(2), permissions).unwrap();
        fs::write(path(2), "x").unwrap();
        let recalled = cache.recall("memo-x").unwrap();
        assert!(!recalled.entries_stand());
        for (n, entry) in entries.iter().enumerate() {
            assert_eq!(recalled.hit(&entry.key).is_some(), n > 2, "{n}");
        }
    }

    #[test]
    fn a_young_file_is_not_noted_and_a_changed_one_not_known() {
        let (dir, cache, _) = cache();
        let (young, old) = (dir.path().join("young"), dir.path().join("old"));
        fs::write(&old, "old").unwrap();
        std::thread::sleep(crate::stat::RACY + std::time::Duration::from_millis(100));
        fs::write(&young, "young").unwrap();
        let mut memo = cache.memo();
        let stamp = |path: &Path| Stamp::of(&fs::metadata(path).unwrap());
        assert!(!memo.file(&young, &stamp(&young), &Digest::of(b"young")));
        assert!(memo.file(&old, &stamp(&old), &Digest::of(b"old")));
        memo.write(&cache, "memo-x", b"", &[]).unwrap();
        let recalled = cache.recall("memo-x").unwrap();
        assert!(recalled.file(&young).is_none());
        assert_eq!(recalled.file(&old).unwrap().0, Digest::of(b"old"));
        assert!(recalled.files_stand(&|_| None));
        fs::write(&old, "new").unwrap();
        let times = fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH);
        fs::File::options().write(true).open(&old).unwrap().set_times(times).unwrap();
        assert!(recalled.file(&old).is_none());
        assert!(!recalled.files_stand(&|_| None));
    }

    #[test]
    fn nothing_but_the_whole_is_read() {
        let (_dir, cache, entries) = cache();
        noted(&cache, &entries[..2]);
        let path = cache.kept_file("memo-x");
        let bytes = fs::read(&path).unwrap();
        for at in (0..bytes.len()).step_by(97).chain([bytes.len() - 1]) {
            fs::write(&path, &bytes[..at]).unwrap();
            assert!(cache.recall("memo-x").is_none(), "cut at {at}");
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            fs::write(&path, flipped).unwrap();
            assert!(cache.recall("memo-x").is_none(), "flip at {at}");
        }
    }
}
