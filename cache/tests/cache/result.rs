//! Results: published, looked up, diverging, replaced, damaged, private.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use cache::{Cache, Digest, Entry, Error, Kind, Publication, Published};

use crate::support::*;

#[test]
fn a_result_comes_back_whole() {
    let home = Home::new();
    let (entry, outcome) = put(&home.cache, "one", "bytes");
    assert_eq!(outcome, Published::New);
    for cache in [&home.cache, &home.reopened()] {
        assert_eq!(cache.lookup(&entry.key).unwrap().unwrap(), entry);
        let model = output(&entry, "model");
        assert_eq!((read(cache, model).as_str(), model.kind), ("bytes", Kind::File));
        assert_eq!(model.digest, Digest::of(b"bytes"));
        let report = output(&entry, "report");
        assert_eq!((report.kind, report.bytes), (Kind::Dir, 11));
        let deep = cache.object(&report.digest).join("deep/a");
        assert_eq!(fs::read_to_string(deep).unwrap(), "a of bytes");
        for output in &entry.outputs {
            assert!(cache.present(output));
            cache.verify(output).unwrap();
        }
    }
    assert!(home.cache.lookup(&key("two")).unwrap().is_none());
}

#[test]
fn everything_is_private_and_objects_are_read_only() {
    let home = Home::new();
    let (entry, _) = put(&home.cache, "one", "bytes");
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let mut dirs = vec![home.root()];
    dirs.extend(["entries", "objects", "locks", "runs", "index"].map(|d| home.root().join(d)));
    dirs.extend(fs::read_dir(home.root().join("objects")).unwrap().map(|d| d.unwrap().path()));
    for dir in dirs {
        assert_eq!(mode(&dir), 0o700, "{}", dir.display());
    }
    assert_eq!(mode(&home.cache.object(&output(&entry, "model").digest)), 0o444);
    let report = home.cache.object(&output(&entry, "report").digest);
    assert_eq!([mode(&report), mode(&report.join("deep"))], [0o555; 2]);
    assert_eq!(mode(&report.join("deep/a")), 0o444);
}

#[test]
fn a_flipped_byte_and_a_lost_file_are_seen() {
    let home = Home::new();
    let (entry, _) = put(&home.cache, "one", "bytes");
    let model = output(&entry, "model");
    scribble(&home.cache.object(&model.digest), b"bytez");
    assert!(home.cache.present(model), "the same size");
    assert!(matches!(home.cache.verify(model), Err(Error::Damaged { .. })));
    scribble(&home.cache.object(&model.digest), b"byte");
    assert!(!home.cache.present(model));
    let report = output(&entry, "report");
    fs::remove_file(home.cache.object(&report.digest).join("b")).unwrap();
    assert!(!home.cache.present(report));
    assert!(matches!(home.cache.verify(report), Err(Error::Damaged { .. })));
    lose(&home.cache, &report.digest);
    assert!(matches!(home.cache.verify(report), Err(Error::Missing { .. })));
}

#[test]
fn damaged_bytes_are_replaced_by_the_next_attempt() {
    let home = Home::new();
    let (entry, _) = put(&home.cache, "one", "bytes");
    scribble(&home.cache.object(&output(&entry, "model").digest), b"bytez");
    let deep = home.cache.object(&output(&entry, "report").digest).join("deep/a");
    scribble(&deep, b"A of bytes");
    let (_, outcome) = put(&home.cache, "one", "bytes");
    assert_eq!(outcome, Published::Same);
    entry.outputs.iter().for_each(|o| home.cache.verify(o).unwrap());
}

#[test]
fn the_first_result_stays_and_another_is_evidence() {
    let home = Home::new();
    let (first, _) = put(&home.cache, "one", "bytes");
    let (second, outcome) = put(&home.cache, "one", "other bytes");
    assert_eq!(outcome, Published::Diverged { kept: first.clone() });
    assert_eq!(put(&home.cache, "one", "bytes").1, Published::Same);
    let cache = home.reopened();
    assert_eq!(cache.lookup(&first.key).unwrap().unwrap(), first);
    assert_eq!(cache.divergences(&first.key), [second]);
}

#[test]
fn a_result_whose_bytes_are_lost_is_replaced() {
    let home = Home::new();
    let (first, _) = put(&home.cache, "one", "bytes");
    lose(&home.cache, &output(&first, "model").digest);
    let (second, outcome) = put(&home.cache, "one", "other bytes");
    assert_eq!(outcome, Published::Replaced);
    assert_eq!(home.cache.reader().lookup(&first.key).unwrap().unwrap(), second);
    assert_eq!(home.reopened().lookup(&first.key).unwrap().unwrap(), second);
}

#[test]
fn a_forced_result_replaces() {
    let home = Home::new();
    put(&home.cache, "one", "bytes");
    let reader = home.cache.reader();
    let (_attempt, forced) = make(&home.cache, "one", "other bytes");
    assert_eq!(publish(&home.cache, &forced, true), Published::Replaced);
    assert_eq!(reader.lookup(&forced.key).unwrap().unwrap(), forced, "an old view of the index");
    assert_eq!(home.reopened().lookup(&forced.key).unwrap().unwrap(), forced);
}

#[test]
fn a_garbled_entry_is_reported_never_served_and_replaced() {
    for damage in ["cut", "flip", "zero", "swap", "dir"] {
        let home = Home::new();
        let (entry, _) = put(&home.cache, "one", "bytes");
        let (other, _) = put(&home.cache, "two", "bytes");
        let file = |key: &cache::Key| {
            let name = key.to_string();
            home.root().join("entries").join(&name[..2]).join(name)
        };
        let path = file(&entry.key);
        let mut bytes = fs::read(&path).unwrap();
        match damage {
            "cut" => bytes.truncate(bytes.len() / 2),
            "flip" => bytes[300] ^= 4,
            "zero" => bytes.fill(0),
            "swap" => bytes = fs::read(file(&other.key)).unwrap(),
            _ => {}
        }
        scribble(&path, &bytes);
        if damage == "dir" {
            fs::remove_file(&path).unwrap();
            fs::create_dir(&path).unwrap();
        }
        assert!(home.cache.lookup(&entry.key).unwrap().is_none(), "{damage}");
        assert!(home.cache.reader().lookup(&entry.key).unwrap().is_none(), "{damage}");
        let reports = home.cache.take_reports();
        assert!(reports[0].contains(&entry.key.to_string()), "{damage}: {reports:?}");
        assert_eq!(home.cache.entries().unwrap().collect::<Vec<_>>(), [other]);
        assert_eq!(put(&home.cache, "one", "bytes").1, Published::Replaced, "{damage}");
        assert_eq!(home.cache.lookup(&entry.key).unwrap().unwrap(), entry, "{damage}");
    }
}

#[test]
fn a_result_is_visible_at_once_and_durable_after_the_flush() {
    let home = Home::new();
    let committer = home.cache.committer(|_| {});
    let entries: Vec<Entry> = (0..300).map(|i| tiny(&home.cache, i)).collect();
    for entry in &entries {
        let publication = Publication {
            key: entry.key,
            entry: entry.clone(),
            claim: None,
            attempt: None,
            replace: false,
        };
        committer.publish(publication).unwrap();
        assert_eq!(home.cache.lookup(&entry.key).unwrap().as_ref(), Some(entry));
    }
    committer.flush().unwrap();
    let other = home.reopened();
    for entry in &entries {
        assert_eq!(other.lookup(&entry.key).unwrap().as_ref(), Some(entry));
    }
    assert_eq!(fs::read_dir(home.root().join("staging")).unwrap().count(), 0);
}

fn tiny(cache: &Cache, i: usize) -> Entry {
    let attempt = cache.attempt(&key(&i.to_string())).unwrap();
    let path = attempt.dir.join("n");
    fs::write(&path, i.to_string()).unwrap();
    let outputs = vec![attempt.absorb("n", None, "n", path).unwrap()];
    Entry::new(preimage(&i.to_string()), outputs, None, serde_json::json!({ "stage": "tiny" }))
}

#[test]
fn two_writers_of_a_key_at_once_agree_on_one_result() {
    let home = Home::new();
    let texts = ["left", "right"];
    let outcomes: Vec<(Entry, Published)> = std::thread::scope(|scope| {
        let start = |text| {
            let cache = home.reopened();
            scope.spawn(move || put(&cache, "one", text))
        };
        texts.map(start).into_iter().map(|t| t.join().unwrap()).collect()
    });
    let kept = home.cache.lookup(&key("one")).unwrap().unwrap();
    let (winner, loser) = match &outcomes[..] {
        [a, b] if a.1 == Published::New => (a, b),
        [a, b] => (b, a),
        _ => unreachable!(),
    };
    assert_eq!((&winner.1, &winner.0), (&Published::New, &kept));
    assert_eq!(loser.1, Published::Diverged { kept });
}

#[test]
fn a_result_that_cannot_be_written_fails_the_flush_and_nothing_else() {
    let home = Home::new();
    let (_attempt, mut entry) = make(&home.cache, "one", "bytes");
    entry.preimage.push(' ');
    let committer = home.cache.committer(|_| {});
    let publication =
        Publication { key: entry.key, entry, claim: None, attempt: None, replace: false };
    committer.publish(publication).unwrap();
    let error = committer.flush().unwrap_err().to_string();
    assert!(error.contains("pre-image"), "{error}");
    committer.flush().unwrap();
    // The same of one that was made in haste, which nobody waited for.
    let (_attempt, mut entry) = make(&home.cache, "one", "bytes");
    entry.preimage.push(' ');
    let publication =
        Publication { key: entry.key, entry, claim: None, attempt: None, replace: false };
    committer.publish(publication).unwrap();
    committer.hurry().unwrap();
    assert!(committer.flush().is_err());
    committer.flush().unwrap();
    assert_eq!(put(&home.cache, "two", "bytes").1, Published::New);
    assert!(home.cache.lookup(&key("one")).unwrap().is_none());
}

#[test]
fn only_an_empty_directory_or_a_known_cache_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("thesis.txt"), "").unwrap();
    assert!(matches!(Cache::open(dir.path()), Err(Error::NotACache { .. })));
    let home = Home::new();
    fs::write(home.root().join("version"), "pipe cache layout 7\n").unwrap();
    let error = Cache::open(home.root()).unwrap_err().to_string();
    assert!(error.contains("`7`") && error.contains("newer build"), "{error}");
}
