//! Attempts and user files: what may be absorbed, digests of directories, the stat cache.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cache::{Attempt, Error, Kind, hash_path};

use crate::support::*;

#[test]
fn a_directory_is_its_names_kinds_and_bytes_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let fill = |name: &str, order: &[&str]| {
        let top = dir.path().join(name);
        fs::create_dir_all(top.join("sub")).unwrap();
        order.iter().for_each(|f| fs::write(top.join(f), format!("is {f}")).unwrap());
        top
    };
    let a = fill("a", &["x", "y", "sub/z"]);
    let b = fill("b", &["sub/z", "y", "x"]);
    let digest = |path| hash_path(path).unwrap();
    assert_eq!(digest(&a), digest(&b));
    assert_eq!((digest(&a).1, digest(&a).2), (Kind::Dir, 4 + 4 + 8));
    let mut seen = vec![digest(&a).0];
    let mut differs = |what: &str| {
        let now = digest(&b).0;
        assert!(!seen.contains(&now), "{what}");
        seen.push(now);
    };
    fs::set_permissions(b.join("x"), fs::Permissions::from_mode(0o755)).unwrap();
    differs("an executable bit");
    fs::rename(b.join("y"), b.join("yy")).unwrap();
    differs("a name");
    fs::create_dir(b.join("empty")).unwrap();
    differs("an empty directory");
    fs::write(b.join("sub/z"), "is not").unwrap();
    differs("bytes");
    let link = dir.path().join("link");
    symlink(&a, &link).unwrap();
    assert_eq!(digest(&link), digest(&a), "a link at the top is followed");
    symlink("x", a.join("inner")).unwrap();
    let error = hash_path(&a).unwrap_err().to_string();
    assert!(error.contains("inner") && error.contains("symbolic link"), "{error}");
}

#[test]
fn files_that_lie_apart_have_the_digest_of_the_directory_they_would_make() {
    let home = Home::new();
    let dir = tempfile::tempdir().unwrap();
    let (together, apart) = (dir.path().join("together"), dir.path().join("apart"));
    fs::create_dir_all(&together).unwrap();
    fs::create_dir_all(&apart).unwrap();
    let mut files = Vec::new();
    for name in ["b.txt", "a.txt", "a-1"] {
        fs::write(together.join(name), format!("is {name}")).unwrap();
        fs::write(apart.join(format!("blob-{name}")), format!("is {name}")).unwrap();
        symlink(format!("blob-{name}"), apart.join(name)).unwrap();
        files.push((name.to_string(), apart.join(name)));
    }
    let (digest, _, bytes) = hash_path(&together).unwrap();
    assert_eq!(home.cache.digest_of_files(&files).unwrap(), (digest, bytes));
    files[0].0 = "c.txt".into();
    assert_ne!(home.cache.digest_of_files(&files).unwrap().0, digest, "names count");
    files[0].1 = together;
    assert!(home.cache.digest_of_files(&files).is_err(), "a directory is no file");
}

#[test]
fn an_attempt_gives_only_its_own_plain_files() {
    let home = Home::new();
    let attempt = home.cache.attempt(&key("one")).unwrap();
    let theirs = home.dir.path().join("theirs");
    fs::write(&theirs, "x").unwrap();
    let refused = |path: &std::path::Path| attempt.absorb("p", None, "n", path).unwrap_err();
    assert!(matches!(refused(&theirs), Error::Outside { .. }));
    assert!(matches!(refused(&attempt.dir.join("../../../../theirs")), Error::Outside { .. }));
    assert!(matches!(refused(&attempt.dir), Error::Outside { .. }));
    symlink(&theirs, attempt.dir.join("link")).unwrap();
    assert!(matches!(refused(&attempt.dir.join("link")), Error::Symlink { .. }));
    symlink(home.dir.path(), attempt.dir.join("up")).unwrap();
    assert!(matches!(refused(&attempt.dir.join("up/theirs")), Error::Outside { .. }));
    fs::create_dir(attempt.dir.join("d")).unwrap();
    symlink("/etc/passwd", attempt.dir.join("d/inner")).unwrap();
    assert!(matches!(refused(&attempt.dir.join("d")), Error::Symlink { .. }));
    fs::write(attempt.dir.join("f"), "x").unwrap();
    for name in ["../f", "a/b", "", ".."] {
        let error = attempt.absorb("p", None, name, attempt.dir.join("f")).unwrap_err();
        assert!(matches!(error, Error::BadName { .. }));
    }
    assert_eq!(fs::read_to_string(&theirs).unwrap(), "x");
}

#[test]
fn a_hard_link_to_somebody_elses_file_is_copied() {
    let home = Home::new();
    let attempt = home.cache.attempt(&key("one")).unwrap();
    let theirs = home.dir.path().join("theirs");
    fs::write(&theirs, "x").unwrap();
    fs::hard_link(&theirs, attempt.dir.join("f")).unwrap();
    fs::create_dir(attempt.dir.join("d")).unwrap();
    fs::hard_link(&theirs, attempt.dir.join("d/f")).unwrap();
    let file = attempt.absorb("p", None, "f", attempt.dir.join("f")).unwrap();
    let dir = attempt.absorb("q", None, "d", attempt.dir.join("d")).unwrap();
    fs::write(&theirs, "y").unwrap();
    assert_eq!(read(&home.cache, &file), "x");
    home.cache.verify(&file).unwrap();
    home.cache.verify(&dir).unwrap();
}

#[test]
fn a_file_edited_in_place_is_never_taken_for_what_it_was() {
    let home = Home::new();
    let path = home.dir.path().join("data");
    for text in ["aaaa", "bbbb", "cccc"] {
        fs::write(&path, text).unwrap();
        let expected = (cache::Digest::of(text.as_bytes()), Kind::File, 4);
        assert_eq!(home.cache.digest_of(&path).unwrap(), expected, "young");
    }
    std::thread::sleep(Duration::from_millis(2100));
    for cache in [&home.cache, &home.reopened(), &home.reopened()] {
        assert_eq!(cache.digest_of(&path).unwrap().0, cache::Digest::of(b"cccc"), "settled");
        cache.flush_index();
    }
    let before = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, "dddd").unwrap();
    fs::File::open(&path).unwrap().set_modified(before).unwrap();
    assert_eq!(home.cache.digest_of(&path).unwrap().0, cache::Digest::of(b"dddd"), "back-dated");
    let dir = home.cache.digest_of(home.dir.path().join("c/objects")).unwrap();
    assert_eq!(dir.1, Kind::Dir);
}

#[test]
fn a_damaged_row_does_not_vouch_for_a_file() {
    let home = Home::new();
    let path = home.dir.path().join("data");
    fs::write(&path, "text").unwrap();
    std::thread::sleep(Duration::from_millis(2100));
    home.cache.digest_of(&path).unwrap();
    home.cache.flush_index();
    let rows = rusqlite::Connection::open(newest_index(&home)).unwrap();
    let count: i64 = rows.query_row("SELECT count(*) FROM files", [], |r| r.get(0)).unwrap();
    assert_eq!(count, 1);
    let wrong = vec![7u8; 32];
    rows.execute("UPDATE files SET digest = ?1", [&wrong]).unwrap();
    assert_eq!(home.cache.digest_of(&path).unwrap().0, cache::Digest::of(b"text"));
}

fn newest_index(home: &Home) -> std::path::PathBuf {
    let mut all: Vec<_> =
        fs::read_dir(home.cache.index_dir()).unwrap().map(|i| i.unwrap().path()).collect();
    all.retain(|p| p.extension().is_some_and(|e| e == "sqlite"));
    all.pop().unwrap()
}

#[test]
fn checkpoints_belong_to_the_key_and_attempts_in_use_stay() {
    let home = Home::new();
    let key = key("one");
    let first = home.cache.attempt(&key).unwrap();
    let fill = |dir: &std::path::Path| fs::write(dir.join("w"), "x");
    cache::checkpoint::save(&first.checkpoints(), 9, fill).unwrap();
    let second = home.cache.attempt(&key).unwrap();
    cache::checkpoint::save(&second.checkpoints(), 10, fill).unwrap();
    assert_eq!(home.cache.checkpoint_latest(&key).unwrap().0, 10);
    let worker = Attempt::reopen(&second.dir).unwrap();
    drop((first, second));
    home.cache.attempts_clean(&key).unwrap();
    assert!(worker.dir.exists());
    assert_eq!(home.cache.checkpoint_latest(&key).unwrap().0, 10);
    home.cache.checkpoints_drop(&key).unwrap();
    assert_eq!(home.cache.checkpoint_latest(&key), None);
    let dir = worker.dir.clone();
    drop(worker);
    home.cache.attempts_clean(&key).unwrap();
    assert!(!dir.exists());
    assert!(Attempt::reopen(&dir).is_err());
    assert_eq!(fs::read_dir(home.root().join("trash")).unwrap().count(), 0);
}

#[test]
fn a_finished_attempt_can_be_adopted_while_its_bytes_are_whole() {
    let home = Home::new();
    let (attempt, entry) = make(&home.cache, "one", "bytes");
    drop(attempt);
    let found = home.reopened().finished(&entry.key).unwrap();
    assert_eq!(
        (found.outputs, found.provenance),
        (entry.outputs.clone(), entry.provenance.clone())
    );
    scribble(&home.cache.object(&output(&entry, "model").digest), b"bytez");
    assert!(home.cache.finished(&entry.key).is_none());
}

/// A cleaner that sees a directory before its lock is there must not take it from its maker.
#[test]
fn whoever_cleans_takes_no_attempt_that_is_just_made() {
    let home = Home::in_memory();
    let key = key("one");
    let (over, mut made) = (AtomicBool::new(false), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            (0..5000).for_each(|_| home.cache.attempts_clean(&key).unwrap());
            over.store(true, Ordering::Relaxed);
        });
        while !over.load(Ordering::Relaxed) {
            let attempt = home.cache.attempt(&key).unwrap();
            std::thread::yield_now();
            assert!(attempt.dir.join("lock").exists());
            made += 1;
        }
    });
    assert!(made > 0);
}
