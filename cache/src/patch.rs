//! What a run found that the memo it started from does not say, in a file beside that one: after a
//! small change, to write the memo of a long pipeline anew takes longer than the step that ran.
//!
//! Names the memo it belongs to by its digest, so that it is nothing once that is another. Each one
//! has all that differs, and takes the place of the one before. See `memo.rs` and `recall.rs`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::time::SystemTime;

use crate::bytes_of::{Reader, put};
use crate::cache::Cache;
use crate::digest::{Digest, Key};
use crate::error::Result;
use crate::memo::{SHARDS, STAMP};
use crate::stat::Stamp;

const MAGIC: &[u8] = b"pipe patch 1\n";

/// All that differs.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Patch {
    /// What the writer put in front.
    pub head: Vec<u8>,
    /// Stamps of the directories of entries.
    pub shards: Vec<u8>,
    /// Records of files, by their place in the memo.
    pub files: BTreeMap<u32, Vec<u8>>,
    /// Places of the writer's order, and the entries there; none where nothing is known. Sorted.
    pub rows: Vec<(u32, Option<Row>)>,
}

/// An entry.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Row {
    pub key: Key,
    pub stamp: Stamp,
    /// What a hit needs of it.
    pub text: Vec<u8>,
}

/// The file of the patch of the memo `name`.
fn file(name: &str) -> String {
    format!("patch-{name}")
}

impl Patch {
    /// That of the memo `name` with the digest `sum`, if there is a whole one.
    pub fn read(cache: &Cache, name: &str, sum: &[u8]) -> Option<Patch> {
        Patch::parse(&fs::read(cache.kept_file(&file(name))).ok()?, sum)
    }

    /// Keeps it for the next run.
    ///
    /// # Errors
    /// When it cannot be written; then what was there is there.
    pub fn keep(&self, cache: &Cache, name: &str, sum: &[u8]) -> Result<()> {
        cache.keep_file(&file(name), &self.render(sum))?;
        // Of memos those go that were not written for longest.
        if let Ok(memo) = File::open(cache.kept_file(name)) {
            let _ = memo.set_modified(SystemTime::now());
        }
        Ok(())
    }

    /// Removes that of the memo `name`, which is nothing any more.
    pub fn forget(cache: &Cache, name: &str) {
        let _ = fs::remove_file(cache.kept_file(&file(name)));
    }

    /// How many bytes it takes, about.
    pub fn size(&self) -> usize {
        let files: usize = self.files.values().map(|record| 8 + record.len()).sum();
        let rows = self.rows.iter().flat_map(|(_, row)| row).map(|row| 80 + row.text.len());
        self.head.len() + self.shards.len() + files + rows.sum::<usize>() + 5 * self.rows.len()
    }

    fn render(&self, sum: &[u8]) -> Vec<u8> {
        let mut body = sum.to_vec();
        put_bytes(&mut body, &self.head);
        body.extend_from_slice(&self.shards);
        put(&mut body, self.files.len() as u32);
        for (at, record) in &self.files {
            put(&mut body, *at);
            put_bytes(&mut body, record);
        }
        put(&mut body, self.rows.len() as u32);
        for (at, row) in &self.rows {
            put(&mut body, *at);
            body.push(u8::from(row.is_some()));
            if let Some(row) = row {
                body.extend_from_slice(row.key.as_bytes());
                body.extend_from_slice(&row.stamp.bytes());
                put_bytes(&mut body, &row.text);
            }
        }
        [MAGIC, Digest::of(&body).as_bytes(), &body].concat()
    }

    fn parse(bytes: &[u8], sum: &[u8]) -> Option<Patch> {
        let mut from = Reader(bytes.strip_prefix(MAGIC)?);
        let own = from.take(32)?;
        if Digest::of(from.0).as_bytes() != own || from.take(sum.len())? != sum {
            return None;
        }
        let (head, shards) = (take_bytes(&mut from)?, from.take(SHARDS * STAMP)?.to_vec());
        let mut patch = Patch { head, shards, ..Patch::default() };
        for _ in 0..from.word()? {
            let at = from.word()?;
            patch.files.insert(at, take_bytes(&mut from)?);
        }
        for _ in 0..from.word()? {
            let (at, known) = (from.word()?, from.take(1)? == [1]);
            let row = if known { Some(Row::parse(&mut from)?) } else { None };
            patch.rows.push((at, row));
        }
        from.0.is_empty().then_some(patch)
    }
}

impl Row {
    fn parse(from: &mut Reader<'_>) -> Option<Row> {
        let key = Key::from_bytes(from.take(32)?.try_into().ok()?);
        let stamp = Stamp::from_bytes(from.take(STAMP)?.try_into().ok()?);
        Some(Row { key, stamp, text: take_bytes(from)? })
    }
}

fn put_bytes(to: &mut Vec<u8>, bytes: &[u8]) {
    put(to, bytes.len() as u32);
    to.extend_from_slice(bytes);
}

fn take_bytes(from: &mut Reader<'_>) -> Option<Vec<u8>> {
    let len = from.word()? as usize;
    Some(from.take(len)?.to_vec())
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::time::Duration;

    use super::*;
    use crate::commit::Publication;
    use crate::entry::{Entry, Output};
    use crate::memo::{Carried, Hit, Memo};
    use crate::recall::Recalled;
    use crate::tree::Kind;

    /// Enough that a few are few.
    const STEPS: usize = 400;

    struct Place {
        dir: tempfile::TempDir,
        cache: Cache,
        /// The key of each step.
        keys: Vec<Key>,
    }

    fn made(text: &str) -> Entry {
        let (name, digest) = ("x.bin".to_string(), Digest::of(text.as_bytes()));
        let output =
            Output { port: "x".into(), index: None, name, kind: Kind::File, digest, bytes: 1 };
        Entry::new(text.into(), vec![output], None, serde_json::json!({ "seconds": 2.5 }))
    }

    impl Place {
        fn new() -> Place {
            let dir = tempfile::tempdir().unwrap();
            let cache = Cache::open(dir.path().join("c")).unwrap();
            let mut place = Place { dir, cache, keys: Vec::new() };
            place.keys = place.publish((0..STEPS).map(|step| format!("step {step}")));
            (0..STEPS).for_each(|step| fs::write(place.file(step), "x").unwrap());
            std::thread::sleep(crate::stat::RACY + Duration::from_millis(100));
            place.note(&mut place.cache.memo(), 0..STEPS).write("memo-x", b"0", None);
            place
        }

        fn file(&self, step: usize) -> PathBuf {
            self.dir.path().join(format!("file {step}"))
        }

        fn publish(&self, texts: impl Iterator<Item = String>) -> Vec<Key> {
            let committer = self.cache.committer(|_| {});
            let keys = texts.map(|text| {
                let entry = made(&text);
                committer.publish(Publication::imported(entry.clone())).unwrap();
                entry.key
            });
            let keys = keys.collect();
            committer.flush().unwrap();
            keys
        }

        /// Other files, and other entries, of `steps`; what a run finds that starts from the memo, and
        /// is kept by it as the memo `name`, with `head`.
        fn change(&mut self, steps: &[usize], name: &str, head: &[u8]) {
            for &step in steps {
                let text = format!("step {step} {}", head.len());
                self.keys[step] = self.publish([text.clone()].into_iter())[0];
                fs::write(self.file(step), text).unwrap();
            }
            let earlier = self.recall();
            let mut memo = Memo::after(&earlier);
            let files = earlier.verdicts(&|_| None);
            let changed = earlier.changed(&|_| None);
            let stands = |step: usize| {
                earlier.stands_at(step)
                    && !steps.contains(&step)
                    && !changed.contains(&self.file(step).as_os_str())
            };
            let stand: Vec<bool> = (0..STEPS).map(stands).collect();
            let carried = Carried { from: &earlier, files, keys: &stand };
            let others = (0..STEPS).filter(|step| !stand[*step]);
            self.note(&mut memo, others).write(name, head, Some(&carried));
        }

        fn note<'a>(&'a self, memo: &'a mut Memo, steps: impl Iterator<Item = usize>) -> Noted<'a> {
            for step in steps {
                let (entry, stamp) = self.cache.lookup_stamped(&self.keys[step]).unwrap().unwrap();
                memo.hit(entry.key, stamp.unwrap(), &Hit::of(&entry));
                let path = self.file(step);
                let stamp = Stamp::of(&fs::metadata(&path).unwrap());
                let digest = Digest::of(&fs::read(&path).unwrap());
                if !memo.file(&path, &stamp, &digest) {
                    memo.unproved(&path);
                }
            }
            Noted { place: self, memo: std::mem::replace(memo, self.cache.memo()) }
        }

        fn recall(&self) -> Recalled {
            self.cache.recall("memo-x").unwrap()
        }

        fn bytes(&self, name: &str) -> Option<Vec<u8>> {
            fs::read(self.cache.kept_file(name)).ok()
        }
    }

    struct Noted<'a> {
        place: &'a Place,
        memo: Memo,
    }

    impl Noted<'_> {
        fn write(self, name: &str, head: &[u8], carried: Option<&Carried<'_>>) {
            self.memo.write(&self.place.cache, name, head, &self.place.keys, carried).unwrap();
        }
    }

    /// Whether all is noted as it is, but of the files of steps that changed a moment ago.
    fn same(place: &Place, recalled: &Recalled, young: &[usize]) {
        let is = |path: &Path| recalled.file(path).map(|(digest, _)| digest);
        for (step, key) in place.keys.iter().enumerate() {
            assert_eq!(recalled.key(step), Some(*key), "{step}");
            assert!(recalled.stands_at(step), "{step}");
            let hit = recalled.hit(key).unwrap().0;
            assert_eq!(recalled.hit_at(step), Some((*key, hit)), "{step}");
            let path = place.file(step);
            let now = Digest::of(&fs::read(&path).unwrap());
            assert_eq!(is(&path), (!young.contains(&step)).then_some(now), "{step}");
        }
    }

    #[test]
    fn a_small_change_is_written_beside_and_a_great_one_anew() {
        let mut place = Place::new();
        let (first, old) = (place.bytes("memo-x").unwrap(), place.keys.clone());
        place.change(&[7], "memo-x", b"01");
        place.change(&[7, 300], "memo-x", b"012");
        place.change(&[], "memo-x", b"0123");
        assert!(place.bytes("memo-x").unwrap() == first, "nothing but the patch is written");
        assert!(place.bytes("patch-memo-x").unwrap().len() < first.len() / 4);
        let recalled = place.recall();
        assert_eq!(recalled.head(), b"0123");
        same(&place, &recalled, &[7, 300]);
        let changed = recalled.changed(&|_| None);
        let paths = [place.file(300), place.file(7)];
        assert_eq!(changed, paths.each_ref().map(|path| path.as_os_str()), "they are young");
        for step in [7, 300] {
            assert!(recalled.hit(&old[step]).is_none(), "nobody looks at it any more");
        }
        assert!(recalled.entries_stand().is_some());
        let steps: Vec<usize> = (0..STEPS).step_by(2).collect();
        place.change(&steps, "memo-x", b"01234");
        assert!(place.bytes("memo-x").unwrap() != first);
        assert_eq!(place.bytes("patch-memo-x"), None);
        let young: Vec<usize> = steps.iter().copied().chain([7]).collect();
        same(&place, &place.recall(), &young);
    }

    #[test]
    fn an_entry_that_was_replaced_may_go() {
        let mut place = Place::new();
        let old = place.keys[7];
        place.change(&[7], "memo-x", b"01");
        fs::remove_file(place.cache.layout().entry(&old)).unwrap();
        let recalled = place.recall();
        assert!(recalled.entries_stand().is_some());
        assert!(recalled.hit(&old).is_none());
        same(&place, &recalled, &[7]);
        fs::remove_file(place.cache.layout().entry(&place.keys[7])).unwrap();
        let recalled = place.recall();
        assert_eq!(recalled.entries_stand(), None);
        assert!(!recalled.stands_at(7) && recalled.stands_at(8));
        assert!(recalled.hit(&place.keys[7]).is_none());
    }

    #[test]
    fn what_a_patch_says_is_carried_on() {
        let mut place = Place::new();
        place.change(&[3, 5], "memo-x", b"01");
        place.change(&[5, 9], "memo-x", b"012");
        let earlier = place.recall();
        // As another memo, all of it is written.
        let carried = Carried { from: &earlier, files: &[true; STEPS], keys: &[true; STEPS] };
        let keys: Vec<Key> = place.keys.iter().rev().copied().collect();
        Memo::after(&earlier).write(&place.cache, "memo-y", b"y", &keys, Some(&carried)).unwrap();
        let whole = place.cache.recall("memo-y").unwrap();
        assert_eq!(whole.changed(&|_| None), earlier.changed(&|_| None));
        for (at, key) in keys.iter().enumerate() {
            assert_eq!(whole.hit_at(at), earlier.hit_at(STEPS - 1 - at));
            assert_eq!(whole.hit(key), earlier.hit(key));
        }
    }

    #[test]
    fn a_file_that_changes_between_two_looks_vouches_for_nothing() {
        let place = Place::new();
        let (path, at) = (place.file(7), place.dir.path().join("at"));
        let point = |to: &Path| {
            let _ = fs::remove_file(&at);
            std::os::unix::fs::symlink(to, &at).unwrap();
        };
        point(&path);
        let stamp = || Stamp::of(&fs::metadata(&at).unwrap());
        let mut memo = place.cache.memo();
        assert!(memo.file(&at, &stamp(), &Digest::of(b"x")));
        place.note(&mut memo, 0..STEPS).write("memo-x", b"0", None);
        for (name, patched) in [("memo-x", true), ("memo-y", false)] {
            let earlier = place.recall();
            let files = earlier.verdicts(&|_| None).to_vec();
            // Another file, and one that is old: what it is is certain.
            point(&place.file(8));
            let mut memo = Memo::after(&earlier);
            assert!(memo.file(&at, &stamp(), &Digest::of(b"x")));
            let mut keys = place.keys.clone();
            // Of other steps it is written anew.
            keys.truncate(if patched { STEPS } else { STEPS - 1 });
            let carried = Carried { from: &earlier, files: &files, keys: &[true; STEPS] };
            memo.write(&place.cache, name, b"01", &keys, Some(&carried)).unwrap();
            let recalled = place.cache.recall(name).unwrap();
            assert_eq!((recalled.head(), recalled.patch().is_some()), (&b"01"[..], patched));
            assert_eq!(recalled.changed(&|_| None), [at.as_os_str()], "{name}");
            assert!(recalled.file(&at).is_none());
            point(&path);
            Patch::forget(&place.cache, "memo-x");
        }
    }

    #[test]
    fn after_a_while_each_entry_is_looked_at() {
        let place = Place::new();
        let mut recalled = place.recall();
        fs::remove_file(place.cache.layout().entry(&place.keys[7])).unwrap();
        assert!(recalled.hit(&place.keys[7]).is_some(), "as it was when the run began");
        recalled.age();
        assert!(recalled.hit(&place.keys[7]).is_none());
        assert!(recalled.hit(&place.keys[8]).is_some());
    }

    #[test]
    fn nothing_but_the_whole_patch_of_this_very_memo_is_read() {
        let mut place = Place::new();
        let before = place.keys.clone();
        place.change(&[3, 5], "memo-x", b"01");
        let path = place.cache.kept_file("patch-memo-x");
        let bytes = fs::read(&path).unwrap();
        let unpatched = |why: &str| {
            let recalled = place.recall();
            assert_eq!((recalled.head(), recalled.key(3)), (&b"0"[..], Some(before[3])), "{why}");
        };
        for at in (0..bytes.len()).step_by(97).chain([bytes.len() - 1]) {
            fs::write(&path, &bytes[..at]).unwrap();
            unpatched(&format!("cut at {at}"));
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            fs::write(&path, flipped).unwrap();
            unpatched(&format!("flip at {at}"));
        }
        fs::write(&path, &bytes).unwrap();
        assert_eq!(place.recall().key(3), Some(place.keys[3]));
        // One of the same name, and with the same keys, that is not the one it was written for.
        let memo = fs::read(place.cache.kept_file("memo-x")).unwrap();
        place.note(&mut place.cache.memo(), 0..STEPS).write("memo-z", b"0", None);
        fs::rename(place.cache.kept_file("memo-z"), place.cache.kept_file("memo-x")).unwrap();
        assert_eq!((place.recall().head(), place.recall().patch()), (&b"0"[..], None));
        fs::write(place.cache.kept_file("memo-x"), memo).unwrap();
        assert_eq!(place.recall().head(), b"01");
    }
}
