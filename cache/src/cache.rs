//! The cache as others see it: entries by key, objects by digest, digests of user files. Knows no
//! attempts and no claims (`attempt.rs`, `claim.rs`), publishes nothing (`commit.rs`).

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use rusqlite::Connection;

use crate::bytes::Seen;
use crate::digest::{Digest, Key};
use crate::entry::Entry;
use crate::error::{At, Error, Result};
use crate::index::{self, Index, Row};
use crate::layout::Layout;
use crate::spares::Spares;
use crate::stat::Stamp;
use crate::tree::{self, Kind};

/// Last uses are told apart by days.
const DAY: i64 = 86_400;
/// So many file digests are written to the index at once.
const BATCH: usize = 512;

/// A store of bytes and the results that name them, on one directory. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Cache {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    layout: Layout,
    pub(crate) spares: Arc<Spares>,
    index: OnceLock<Option<Index>>,
    /// Published by this process, not yet durable; true when it is to replace what is there.
    pending: Mutex<HashMap<Key, (Entry, bool)>>,
    /// Damage found, to be told.
    reports: Mutex<Vec<String>>,
    /// For the index, with the next batch.
    files: Mutex<Vec<(Vec<u8>, Stamp, Digest)>>,
    rows: Mutex<Vec<Row>>,
    used: Mutex<HashSet<Key>>,
    /// Of objects whose bytes are known to be right.
    pub(crate) seen: Mutex<HashMap<Digest, Seen>>,
    /// Those of them that the index is to learn.
    pub(crate) looked: Mutex<Vec<(Digest, Seen)>>,
}

/// What is under an entry's name.
pub(crate) enum Found {
    Absent,
    /// And what is wrong with it.
    Damaged(String),
    Whole(Box<Entry>, Stamp, String),
}

impl Cache {
    /// Opens the cache at `root`, making it when there is none.
    ///
    /// # Errors
    /// When `root` holds something else, or a cache of a layout this build does not know.
    pub fn open(root: impl AsRef<Path>) -> Result<Cache> {
        Cache::of(Layout::create(root.as_ref(), false)?)
    }

    /// As [`Cache::open`], and a cache made by this is for everybody of a group: that of the
    /// directory it is made in, where that hands its group on (setgid), else the user's. Each
    /// member trusts all others, who can change what they will. Afterwards [`Cache::open`] will do.
    ///
    /// # Errors
    /// As [`Cache::open`], and for a cache that is private: it is not opened to others by the way.
    pub fn open_shared(root: impl AsRef<Path>) -> Result<Cache> {
        Cache::of(Layout::create(root.as_ref(), true)?)
    }

    fn of(layout: Layout) -> Result<Cache> {
        layout.sweep();
        let inner = Inner {
            spares: Arc::new(Spares::new(&layout)),
            layout,
            index: OnceLock::new(),
            pending: Mutex::default(),
            reports: Mutex::default(),
            files: Mutex::default(),
            rows: Mutex::default(),
            used: Mutex::default(),
            seen: Mutex::default(),
            looked: Mutex::default(),
        };
        Ok(Cache { inner: Arc::new(inner) })
    }

    pub fn root(&self) -> &Path {
        self.inner.layout.root()
    }

    /// Whether it is a group's.
    pub fn is_shared(&self) -> bool {
        self.inner.layout.access().is_shared()
    }

    /// Makes a directory below the root for whomever the cache is; `false` when it is there.
    ///
    /// # Errors
    /// When there is none and it cannot be made.
    pub fn make_dir(&self, dir: &Path) -> Result<bool> {
        self.inner.layout.make_dir(dir)
    }

    /// Writes a file below the root, whole or not at all, for whomever the cache is.
    ///
    /// # Errors
    /// When it cannot be written; then what was there is there.
    pub fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        self.inner.layout.write(path, bytes)
    }

    /// Where runs keep their records.
    pub fn runs_dir(&self) -> PathBuf {
        self.inner.layout.dir("runs")
    }

    /// Where marks of files outside of the cache are kept.
    pub fn marks_dir(&self) -> PathBuf {
        self.inner.layout.dir("delivered")
    }

    /// The directory of the index, which may be deleted whenever no process is running.
    pub fn index_dir(&self) -> PathBuf {
        self.inner.layout.dir("index")
    }

    /// The result of `key`, if there is one. Takes no lock and needs no bytes of it.
    pub fn lookup(&self, key: &Key) -> Result<Option<Entry>> {
        Ok(self.lookup_stamped(key)?.map(|(entry, _)| entry))
    }

    /// As [`Cache::lookup`], with the stamp of the entry's file, if it is from there.
    pub fn lookup_stamped(&self, key: &Key) -> Result<Option<(Entry, Option<Stamp>)>> {
        let pending = locked(&self.inner.pending).get(key).cloned();
        if let Some((entry, true)) = pending {
            return Ok(Some((entry, None)));
        }
        let pending = pending.map(|(entry, _)| entry);
        let found = self.peek(key)?.map(|(entry, stamp, _)| (entry, Some(stamp)));
        // A result of this run stands in for one whose bytes are lost, as it will on disk.
        let lost = |e: &Entry| pending.is_some() && !e.outputs.iter().all(|o| self.present(o));
        let found = found.filter(|(entry, _)| !lost(entry));
        let entry = found.or(pending.map(|entry| (entry, None)));
        if entry.is_some() {
            self.used(key);
        }
        Ok(entry)
    }

    /// Notes for the index that the result of `key` was used.
    pub fn used(&self, key: &Key) {
        locked(&self.inner.used).insert(*key);
    }

    /// Whether this process has published a result of `key` that is not durable yet.
    pub fn is_pending(&self, key: &Key) -> bool {
        locked(&self.inner.pending).contains_key(key)
    }

    /// The entry file of `key`, if there is a whole one; a damaged one is reported.
    fn peek(&self, key: &Key) -> Result<Option<(Entry, Stamp, String)>> {
        Ok(match self.read_entry(key)? {
            Found::Absent => None,
            Found::Whole(entry, stamp, text) => Some((*entry, stamp, text)),
            Found::Damaged(what) => {
                let path = self.inner.layout.entry(key);
                self.report(format!(
                    "the entry `{}` is damaged and not used: {what}",
                    path.display()
                ));
                None
            }
        })
    }

    /// For many lookups at once: what is in the index is not read from the entry files.
    pub fn reader(&self) -> Reader {
        let view = self.inner.index().and_then(Index::snapshot);
        Reader { cache: self.clone(), view, missed: RefCell::default() }
    }

    /// Every whole entry, in the order of keys.
    pub fn entries(&self) -> Result<impl Iterator<Item = Entry> + use<>> {
        let cache = self.clone();
        let keys = self.keys()?;
        Ok(keys.into_iter().filter_map(move |key| Some(cache.peek(&key).ok()??.0)))
    }

    /// Entries whose provenance says `stage`: those of `step` first, then the newest first.
    pub fn recent(&self, stage: &str, step: &str, limit: usize) -> Vec<Entry> {
        self.rebuild();
        let keys = self.inner.index().and_then(|index| index.recent(stage, step, limit));
        if let Some(keys) = keys {
            return keys.iter().filter_map(|key| Some(self.peek(key).ok()??.0)).collect();
        }
        let mut rows: Vec<Row> = self
            .keys()
            .unwrap_or_default()
            .iter()
            .filter_map(|key| self.row(key))
            .filter(|row| row.stage == stage)
            .collect();
        rows.sort_by_key(|row| (row.step != step, std::cmp::Reverse(row.created)));
        rows.truncate(limit);
        rows.iter().filter_map(|row| Entry::parse(&row.text, &row.key).ok()).collect()
    }

    /// Keys of all entries whose provenance says `stage`, each with its step, the newest first: for
    /// whoever asks [`Cache::recent`] more than once.
    pub fn keys_of(&self, stage: &str) -> Vec<(String, Key)> {
        self.rebuild();
        if let Some(keys) = self.inner.index().and_then(|index| index.keys_of(stage)) {
            return keys;
        }
        let rows = self.keys().unwrap_or_default();
        let rows = rows.iter().filter_map(|key| self.row(key)).filter(|row| row.stage == stage);
        let mut rows: Vec<(i64, String, Key)> = rows.map(|r| (r.created, r.step, r.key)).collect();
        rows.sort_by_key(|(created, ..)| std::cmp::Reverse(*created));
        rows.into_iter().map(|(_, step, key)| (step, key)).collect()
    }

    /// The entry of `key` as its file says, if there is a whole one; its use is not noted.
    pub fn entry_of(&self, key: &Key) -> Option<Entry> {
        Some(self.peek(key).ok()??.0)
    }

    /// Makes the index agree with the entry files; only what differs is read.
    pub fn rebuild(&self) {
        self.flush_index();
        let Some(index) = self.inner.index() else { return };
        let (Some(known), Ok(keys)) = (index.keys(), self.keys()) else { return };
        let known: HashSet<Key> = known.into_iter().collect();
        let there: HashSet<Key> = keys.iter().copied().collect();
        let gone: Vec<Key> = known.difference(&there).copied().collect();
        if !gone.is_empty() {
            index.delete(&gone);
        }
        let new: Vec<Key> = keys.into_iter().filter(|key| !known.contains(key)).collect();
        for part in new.chunks(BATCH) {
            // That they were used at all is known from their files only.
            let made = |row: Row| Row { last_used: row.created / 1_000_000_000, ..row };
            let rows: Vec<Row> = part.iter().filter_map(|key| self.row(key).map(made)).collect();
            index.put(&rows);
        }
    }

    /// The recorded results of `key` that differ from its entry.
    pub fn divergences(&self, key: &Key) -> Vec<Entry> {
        let dir = self.inner.layout.divergences(key);
        let items = fs::read_dir(dir).into_iter().flatten().flatten();
        items
            .filter_map(|item| tree::read_plain(&item.path()).ok()?)
            .filter_map(|(bytes, _)| Entry::parse(std::str::from_utf8(&bytes).ok()?, key).ok())
            .collect()
    }

    /// Digest, kind and bytes of a user's file or directory. A file is read only when `stat` says
    /// something new of it, or when it is so young that an edit could go unseen.
    ///
    /// # Errors
    /// As [`crate::hash_path`].
    pub fn digest_of(&self, path: impl AsRef<Path>) -> Result<(Digest, Kind, u64)> {
        let path = path.as_ref();
        let real = fs::canonicalize(path).at("find", path)?;
        tree::hash_with(&real, &|path, meta| self.file_digest(path, meta))
    }

    /// Digest and bytes of the directory that `files` would make under their names; links are
    /// followed. As [`Cache::digest_of`] each file is read only when it may have changed.
    ///
    /// # Errors
    /// As [`crate::hash_path`].
    pub fn digest_of_files(&self, files: &[(String, PathBuf)]) -> Result<(Digest, u64)> {
        tree::hash_files(files, &|path, meta| self.file_digest(path, meta))
    }

    fn file_digest(&self, path: &Path, meta: &Metadata) -> Result<Digest> {
        let name = path.as_os_str().as_bytes();
        let stamp = Stamp::of(meta);
        // Taken before the bytes are read: an edit after it changes the stamp.
        let settled = stamp.settled(SystemTime::now());
        if settled {
            let known = self.inner.index().and_then(|index| index.file(name, &stamp));
            if let Some(digest) = known {
                return Ok(digest);
            }
        }
        let digest = tree::hash_leaf(path, meta)?;
        let after = fs::symlink_metadata(path).at("inspect", path)?;
        if Stamp::of(&after) != stamp {
            return Err(Error::Changed { path: path.to_path_buf() });
        }
        if settled {
            let mut files = locked(&self.inner.files);
            files.push((name.to_vec(), stamp, digest));
            let full = files.len() >= BATCH;
            drop(files);
            if full {
                self.inner.flush();
            }
        }
        Ok(digest)
    }

    /// When each key was last used (seconds since 1970, to a day) and the seconds its making took.
    pub fn uses(&self) -> Vec<(Key, i64, f64)> {
        self.rebuild();
        self.inner.index().and_then(Index::uses).unwrap_or_default()
    }

    /// Damage found since the last call, as messages.
    pub fn take_reports(&self) -> Vec<String> {
        std::mem::take(&mut *locked(&self.inner.reports))
    }

    /// Writes what the index is to learn. Also done at the end.
    pub fn flush_index(&self) {
        self.inner.flush();
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.inner.layout
    }

    pub(crate) fn report(&self, what: String) {
        let mut reports = locked(&self.inner.reports);
        if !reports.contains(&what) {
            reports.push(what);
        }
    }

    pub(crate) fn set_pending(&self, entry: Entry, replace: bool) {
        locked(&self.inner.pending).insert(entry.key, (entry, replace));
    }

    pub(crate) fn clear_pending(&self, entry: &Entry) {
        let mut pending = locked(&self.inner.pending);
        if pending.get(&entry.key).is_some_and(|(e, _)| e == entry) {
            pending.remove(&entry.key);
        }
    }

    /// So that nobody waits for it later.
    pub(crate) fn open_index(&self) {
        self.inner.index();
    }

    /// Rows of entries just published.
    pub(crate) fn index_rows(&self, rows: Vec<Row>) {
        locked(&self.inner.rows).extend(rows);
        self.inner.flush();
    }

    /// Reads an entry file. Its stamp is that of the open file, so it belongs to the text.
    pub(crate) fn read_entry(&self, key: &Key) -> Result<Found> {
        let path = self.inner.layout.entry(key);
        let (bytes, meta) = match tree::read_plain(&path) {
            Err(Error::Damaged { what, .. }) => return Ok(Found::Damaged(what)),
            Ok(None) => return Ok(Found::Absent),
            Ok(Some(read)) => read,
            Err(error) => return Err(error),
        };
        let parsed = String::from_utf8(bytes)
            .map_err(|_| "it is not UTF-8".to_string())
            .and_then(|text| Ok((Entry::parse(&text, key)?, text)));
        Ok(match parsed {
            Ok((entry, text)) => Found::Whole(Box::new(entry), Stamp::of(&meta), text),
            Err(what) => Found::Damaged(what),
        })
    }

    /// The keys that have an entry file, sorted.
    pub(crate) fn keys(&self) -> Result<Vec<Key>> {
        let dir = self.inner.layout.dir("entries");
        let mut keys = Vec::new();
        for shard in fs::read_dir(&dir).at("list", &dir)? {
            let shard = shard.at("list", &dir)?.path();
            let items = match fs::read_dir(&shard) {
                Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                    continue;
                }
                result => result.at("list", &shard)?,
            };
            for item in items {
                let name = item.at("list", &shard)?.file_name();
                keys.extend(name.to_str().and_then(|n| n.parse::<Key>().ok()));
            }
        }
        keys.sort();
        Ok(keys)
    }

    pub(crate) fn row(&self, key: &Key) -> Option<Row> {
        let (entry, stamp, text) = self.peek(key).ok()??;
        Some(row_of(&entry, stamp, text))
    }
}

impl Inner {
    pub(crate) fn index(&self) -> Option<&Index> {
        self.index.get_or_init(|| Index::open(&self.layout)).as_ref()
    }

    fn flush(&self) {
        let files = std::mem::take(&mut *locked(&self.files));
        let rows = std::mem::take(&mut *locked(&self.rows));
        let used: Vec<Key> = locked(&self.used).drain().collect();
        let looked = std::mem::take(&mut *locked(&self.looked));
        if files.is_empty() && rows.is_empty() && used.is_empty() && looked.is_empty() {
            return;
        }
        let Some(index) = self.index() else { return };
        if !files.is_empty() {
            index.put_files(&files);
        }
        if !rows.is_empty() {
            index.put(&rows);
        }
        if !looked.is_empty() {
            index.put_objects(&looked);
        }
        if !used.is_empty() {
            index.touch(&used, now(), now() - DAY);
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Many lookups in one view of the index. Not shared between threads.
#[derive(Debug)]
pub struct Reader {
    cache: Cache,
    view: Option<Connection>,
    /// Keys with an entry and no good row: they get one at the end.
    missed: RefCell<Vec<Key>>,
}

impl Reader {
    /// As [`Cache::lookup`].
    pub fn lookup(&self, key: &Key) -> Result<Option<Entry>> {
        match self.indexed(key) {
            Some(entry) => Ok(Some(entry)),
            None => {
                let entry = self.cache.lookup(key)?;
                if entry.is_some() && self.view.is_some() {
                    self.missed.borrow_mut().push(*key);
                }
                Ok(entry)
            }
        }
    }

    fn indexed(&self, key: &Key) -> Option<Entry> {
        let row = index::row(self.view.as_ref()?, key).ok()??;
        let path = self.cache.inner.layout.entry(key);
        let stamp = Stamp::of(&fs::symlink_metadata(path).ok()?);
        if stamp.bytes() != row.stamp || locked(&self.cache.inner.pending).contains_key(key) {
            return None;
        }
        let entry = Entry::parse(&row.text, key).ok()?;
        if row.last_used < now() - DAY {
            locked(&self.cache.inner.used).insert(*key);
        }
        Some(entry)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.view = None;
        let missed = self.missed.take();
        for part in missed.chunks(BATCH) {
            self.cache.index_rows(part.iter().filter_map(|key| self.cache.row(key)).collect());
        }
    }
}

pub(crate) fn row_of(entry: &Entry, stamp: Stamp, text: String) -> Row {
    let words = |name: &str| entry.provenance[name].as_str().unwrap_or_default().to_string();
    Row {
        key: entry.key,
        stage: words("stage"),
        step: words("step"),
        created: stamp.mtime_ns,
        seconds: entry.provenance["seconds"].as_f64().unwrap_or(0.0),
        last_used: now(),
        stamp,
        text,
    }
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() as i64
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stat::RACY;

    #[test]
    fn a_row_stands_for_a_settled_file_and_for_no_young_one() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("c")).unwrap();
        let path = fs::canonicalize(dir.path()).unwrap().join("data");
        fs::write(&path, "text").unwrap();
        let stamp = Stamp::of(&fs::metadata(&path).unwrap());
        let planted = Digest::of(b"planted");
        let row = (path.as_os_str().as_bytes().to_vec(), stamp, planted);
        cache.inner.index().unwrap().put_files(&[row]).unwrap();
        assert_eq!(cache.digest_of(&path).unwrap().0, Digest::of(b"text"));
        std::thread::sleep(RACY + std::time::Duration::from_millis(100));
        assert_eq!(cache.digest_of(&path).unwrap().0, planted, "it is not read");
    }
}
