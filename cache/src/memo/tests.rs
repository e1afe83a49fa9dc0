//! What is noted comes back, and nothing that is not so any more.

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
    assert!(
        !noted(&cache, &entries).renew(&cache, "memo-x").unwrap(),
        "too young to prove anything"
    );
    std::thread::sleep(crate::stat::RACY + Duration::from_millis(100));
    let recalled = cache.recall("memo-x").unwrap();
    assert_eq!(recalled.entries_stand(), Some(entries.len()));
    assert!(recalled.renew(&cache, "memo-x").unwrap());
    let recalled = cache.recall("memo-x").unwrap();
    assert_eq!(recalled.entries_stand(), Some(0));
    assert!(!recalled.renew(&cache, "memo-x").unwrap());
    assert_eq!((recalled.head(), recalled.len()), (&b"head"[..], entries.len()));
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
    let note = |memo: &mut Memo, steps: std::ops::Range<usize>, files: std::ops::Range<usize>| {
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
fn what_is_not_noted_does_not_stand() {
    let (_dir, cache, entries) = cache();
    let mut memo = cache.memo();
    let (entry, stamp) = cache.lookup_stamped(&entries[0].key).unwrap().unwrap();
    memo.hit(entry.key, stamp.unwrap(), &Hit::of(&entry));
    memo.write(&cache, "memo-x", b"", &[entries[0].key, entries[1].key], None).unwrap();
    let recalled = cache.recall("memo-x").unwrap();
    assert_eq!((recalled.key(0), recalled.key(1)), (Some(entries[0].key), None));
    assert_eq!(recalled.entries_stand(), None);
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
