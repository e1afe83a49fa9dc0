//! What a run found of files and entries, in one file for the next run that asks the same. Knows no
//! steps.
//!
//! A copy like the index, to be deleted at will: whatever is taken from it is first compared with
//! `stat`. An entry is named, removed or replaced only by a change of its directory, so while a
//! directory of entries says what it said before any of them was looked up, all of them are what
//! they were; else each is asked itself. An entry's file that is edited in place is not noticed here
//! (it is read-only and sealed, and what was read of it was right): `scrub` finds such damage.
//!
//! Written here, read back in `recall.rs`.

use std::collections::HashSet;
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
use crate::recall::Recalled;
use crate::stat::Stamp;
use crate::sums::Summed;
use crate::tree::Kind;

pub(crate) const MAGIC: &[u8] = b"pipe memo 2\n";
/// Directories of entries.
pub(crate) const SHARDS: usize = 256;
pub(crate) const STAMP: usize = 40;
/// Digest of all that follows it.
pub(crate) const SUM: usize = 32;
/// Key, stamp, place of the rest.
pub(crate) const ROW: usize = 32 + STAMP + 4;
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

/// Puts the digest of a memo's rest into its place.
pub(crate) fn seal(body: &mut [u8]) {
    let (start, rest) = body.split_at_mut(MAGIC.len() + SUM);
    start[MAGIC.len()..].copy_from_slice(Digest::of(rest).as_bytes());
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

    /// Notes that nothing is known of `pattern`, for whoever asks what has changed.
    pub fn unproved(&mut self, pattern: &Path) {
        self.record(pattern, &[&[UNPROVED]]);
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

    /// Writes all of it under `name`, with `head`, which is the caller's, and the keys in an order
    /// of its own; of what is `carried`, only what this memo does not know itself.
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
        cache.keep_file_by(name, |file| {
            let mut body = Summed::begin(file, MAGIC)?;
            body.put(head.len() as u32);
            body.extend_from_slice(head);
            for stamp in &self.shards {
                let settled = stamp.filter(|stamp| stamp.settled(self.began));
                body.extend_from_slice(&settled.map_or([0; STAMP], |stamp| stamp.bytes()));
            }
            self.write_files(&mut body, carried);
            self.write_hits(&mut body, order, carried);
            body.end()
        })
    }

    fn write_files(&mut self, body: &mut Summed<'_>, carried: Option<&Carried<'_>>) {
        let (mut files, texts) = (std::mem::take(&mut self.files), std::mem::take(&mut self.texts));
        let of = |file: &FileAt| {
            let (path, rest) = texts[file.start..].split_at(file.path as usize);
            (path, &rest[..file.record as usize])
        };
        files.sort_unstable_by(|a, b| of(a).cmp(&of(b)));
        files.dedup_by(|a, b| of(a).0 == of(b).0);
        let new = files.iter().map(of);
        let old = carried.into_iter().flat_map(Carried::records);
        let all = merged(old, new);
        body.put(all.len() as u32);
        let mut place = 0;
        for (path, record) in &all {
            body.put(place as u32);
            place += 4 + path.len() + record.len();
        }
        body.put(place as u32);
        for (path, record) in all {
            body.put(path.len() as u32);
            body.extend_from_slice(path);
            body.extend_from_slice(record);
        }
    }

    fn write_hits(&mut self, body: &mut Summed<'_>, order: &[Key], carried: Option<&Carried<'_>>) {
        self.hits.sort_unstable_by_key(|(key, ..)| *key);
        self.hits.dedup_by_key(|(key, ..)| *key);
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
        memo.write(cache, "memo-x", b"head", &keys, None).unwrap();
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
        assert_eq!(recalled.entries_stand(), Some(entries.len()));
    }

    #[test]
    fn an_entry_that_is_gone_replaced_or_damaged_is_not_what_it_was() {
        let (_dir, cache, entries) = cache();
        noted(&cache, &entries);
        // Beyond the tick of the file system's clock.
        std::thread::sleep(Duration::from_millis(30));
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
        assert_eq!(recalled.entries_stand(), None);
        for (n, entry) in entries.iter().enumerate() {
            assert_eq!(recalled.hit(&entry.key).is_some(), n > 2, "{n}");
        }
    }

    #[test]
    fn entries_are_looked_at_one_by_one_until_their_directories_are_old() {
        let (_dir, cache, entries) = cache();
        assert_eq!(noted(&cache, &entries).renewed(), None, "too young to prove anything");
        std::thread::sleep(crate::stat::RACY + Duration::from_millis(100));
        let recalled = cache.recall("memo-x").unwrap();
        assert_eq!(recalled.entries_stand(), Some(entries.len()));
        cache.keep_file("memo-x", &recalled.renewed().unwrap()).unwrap();
        let recalled = cache.recall("memo-x").unwrap();
        assert_eq!((recalled.entries_stand(), recalled.renewed()), (Some(0), None));
        assert_eq!(recalled.hit(&entries[3].key).unwrap().0, Hit::of(&entries[3]));
        fs::remove_file(cache.layout().entry(&entries[3].key)).unwrap();
        let recalled = cache.recall("memo-x").unwrap();
        assert_eq!(recalled.entries_stand(), None);
        assert!(recalled.hit(&entries[3].key).is_none());
    }

    #[test]
    fn a_young_file_is_not_noted_and_a_changed_one_not_known() {
        let (dir, cache, _) = cache();
        let (young, old) = (dir.path().join("young"), dir.path().join("old"));
        fs::write(&old, "old").unwrap();
        std::thread::sleep(crate::stat::RACY + Duration::from_millis(100));
        fs::write(&young, "young").unwrap();
        let mut memo = cache.memo();
        let stamp = |path: &Path| Stamp::of(&fs::metadata(path).unwrap());
        assert!(!memo.file(&young, &stamp(&young), &Digest::of(b"young")));
        assert!(memo.file(&old, &stamp(&old), &Digest::of(b"old")));
        memo.write(&cache, "memo-x", b"", &[], None).unwrap();
        let recalled = cache.recall("memo-x").unwrap();
        assert!(recalled.file(&young).is_none());
        assert_eq!(recalled.file(&old).unwrap().0, Digest::of(b"old"));
        assert!(recalled.files_stand(&|_| None));
        fs::write(&old, "new").unwrap();
        let times = fs::FileTimes::new().set_modified(SystemTime::UNIX_EPOCH);
        File::options().write(true).open(&old).unwrap().set_times(times).unwrap();
        assert!(recalled.file(&old).is_none());
        assert!(recalled.files_stand(&|_| None), "it asks once");
        let recalled = cache.recall("memo-x").unwrap();
        assert!(!recalled.files_stand(&|_| None));
        assert_eq!(recalled.changed(&|_| None), [old.as_os_str()]);
    }

    #[test]
    fn what_was_left_half_written_a_day_ago_goes() {
        let (_dir, cache, _) = cache();
        let file = |name: &str| cache.index_dir().join(name);
        let old = SystemTime::now() - ABANDONED - Duration::from_secs(60);
        let names = [".1-2-3.tmp", ".4-5-6.tmp", "memo-old", "other.tmp"];
        for name in names {
            fs::write(file(name), "half").unwrap();
            if name != names[1] {
                let times = fs::FileTimes::new().set_modified(old);
                File::options().write(true).open(file(name)).unwrap().set_times(times).unwrap();
            }
        }
        cache.keep_file("memo-x", b"whole").unwrap();
        assert_eq!(names.map(|name| file(name).exists()), [false, true, true, true]);
    }

    #[test]
    fn what_is_carried_is_as_if_it_were_noted_again() {
        let (dir, cache, entries) = cache();
        let path = |n: usize| dir.path().join(format!("file {n}"));
        (0..9).for_each(|n| fs::write(path(n), "x").unwrap());
        std::thread::sleep(crate::stat::RACY + Duration::from_millis(100));
        let stamp = |n: usize| Stamp::of(&fs::metadata(path(n)).unwrap());
        let keys: Vec<Key> = entries.iter().map(|entry| entry.key).collect();
        // Of the first 30 steps and 6 files in the first run; of all but the first 10 and 3 then.
        let note =
            |memo: &mut Memo, steps: std::ops::Range<usize>, files: std::ops::Range<usize>| {
                for entry in &entries[steps] {
                    let (entry, stamp) = cache.lookup_stamped(&entry.key).unwrap().unwrap();
                    memo.hit(entry.key, stamp.unwrap(), &Hit::of(&entry));
                }
                files.for_each(|n| assert!(memo.file(&path(n), &stamp(n), &Digest::of(b"x"))));
            };
        let mut first = cache.memo();
        note(&mut first, 0..30, 0..6);
        first.write(&cache, "memo-x", b"", &keys[..30], None).unwrap();
        let earlier = cache.recall("memo-x").unwrap();
        let mut second = Memo::after(&earlier);
        note(&mut second, 20..40, 5..9);
        let steps: Vec<bool> = (0..30).map(|n| n >= 10).collect();
        let mut files = earlier.verdicts(&|_| None).to_vec();
        assert_eq!(files, [true; 6]);
        files[..3].fill(false);
        let carried = Carried { from: &earlier, files: &files, keys: &steps };
        second.write(&cache, "memo-y", b"", &keys[10..], Some(&carried)).unwrap();
        let mut anew = Memo::after(&earlier);
        note(&mut anew, 10..40, 3..9);
        anew.write(&cache, "memo-z", b"", &keys[10..], None).unwrap();
        let bytes = |name: &str| fs::read(cache.kept_file(name)).unwrap();
        assert!(bytes("memo-y") == bytes("memo-z"));
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
