//! Locks that are files: for caches on a network's file system, here told to be one by their mark.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use cache::{Cache, Claim, Claimed, Presence, Publication};

use crate::support::*;

/// A cache whose locks are leases.
fn leased() -> Home {
    let home = Home::new();
    fs::write(home.root().join("leases-only"), "").unwrap();
    home
}

fn mine(cache: &Cache, name: &str) -> Option<Claim> {
    match cache.claim(&key(name), "me").unwrap() {
        Claimed::Mine(claim) => Some(claim),
        Claimed::Busy(_) => None,
    }
}

fn lock(home: &Home, name: &str) -> std::path::PathBuf {
    let name = key(name).to_string();
    home.root().join("locks").join(&name[..2]).join(name)
}

/// Says that a process of this machine lives, or lived, under `id`.
fn put_life(root: &Path, id: &str, from: &str, started: u64) {
    let own = fs::read_dir(root.join("lives")).unwrap().flatten();
    let own = own.map(|item| item.path()).find(|path| !path.ends_with(id)).expect(from);
    let mut life: serde_json::Value = serde_json::from_slice(&fs::read(own).unwrap()).unwrap();
    life["started"] = started.into();
    fs::write(root.join("lives").join(id), life.to_string()).unwrap();
}

#[test]
fn one_holder_who_is_named_and_leaves_no_file() {
    let home = leased();
    let cache = home.reopened();
    let claim = mine(&cache, "one").unwrap();
    assert!(claim.is_mine());
    match cache.claim(&key("one"), "other").unwrap() {
        Claimed::Busy(holder) => {
            assert_eq!((holder.pid, holder.who.as_str()), (std::process::id(), "me"));
            assert!(holder.since > 0);
        }
        Claimed::Mine(_) => panic!("twice"),
    }
    drop(claim);
    assert!(!lock(&home, "one").exists());
    assert!(mine(&cache, "one").is_some());
}

#[test]
fn never_two_holders_under_contention() {
    let home = leased();
    let (inside, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let cache = home.reopened();
                while done.load(Ordering::SeqCst) < 200 {
                    if let Some(_claim) = mine(&cache, "one") {
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                }
            });
        }
    });
}

#[test]
fn a_dead_holder_is_followed_and_notices_it() {
    let home = leased();
    let cache = home.reopened();
    let claim = mine(&cache, "one").unwrap();
    let path = lock(&home, "one");
    // As if this claim had been of a process that is gone.
    put_life(&home.root(), "gone", "this process lives", 1);
    fs::write(&path, "gone 1\n7 5\nwas here").unwrap();
    assert!(!claim.is_mine(), "its lock is another's");
    let next = mine(&cache, "one").expect("the other is dead");
    assert!(next.is_mine());
    drop(claim);
    assert!(next.is_mine(), "who lost it takes nothing away");
    // And of one that lives.
    drop(next);
    let holder = mine(&cache, "two").unwrap();
    put_life(&home.root(), "here", "this process lives", own_start());
    fs::write(lock(&home, "one"), "here 1\n7 5\nis here").unwrap();
    assert!(mine(&cache, "one").is_none());
    drop(holder);
}

/// When this process was started, as `/proc` tells.
fn own_start() -> u64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let rest = stat.rsplit_once(')').unwrap().1;
    rest.split_whitespace().nth(19).unwrap().parse().unwrap()
}

#[test]
fn attempts_and_leases_of_the_living_are_not_collected() {
    let home = leased();
    let cache = home.reopened();
    let attempt = cache.attempt(&key("one")).unwrap();
    let (dir, other) = (attempt.dir.clone(), cache.attempt(&key("one")).unwrap());
    let left = other.dir.clone();
    drop(other);
    let lease = cache.lease("a test").unwrap();
    lease.hold(&[cache::Digest::of(b"1")]).unwrap();
    let leases = || fs::read_dir(home.root().join("leases")).unwrap().count();
    assert_eq!(leases(), 1);
    // One of a process that is gone.
    put_life(&home.root(), "gone", "this process lives", 1);
    fs::write(home.root().join("leases/0-1@gone"), "1 gone\n").unwrap();
    let collector = cache.collector(|| panic!("nobody else collects")).unwrap();
    assert_eq!(leases(), 1, "the dead one's is removed");
    drop(collector);
    cache.attempts_clean(&key("one")).unwrap();
    assert!(dir.exists() && !left.exists());
    drop(lease);
    assert_eq!(leases(), 0);
}

#[test]
fn presence_ends_with_its_process() {
    let home = leased();
    let cache = home.reopened();
    let file = home.root().join("runs/x");
    fs::write(&file, "").unwrap();
    assert_eq!(Presence::there(&home.root(), &file), Some(false));
    let presence = cache.presence(&file).unwrap().unwrap();
    assert_eq!(Presence::there(&home.root(), &file), Some(true));
    drop(presence);
    assert_eq!(Presence::there(&home.root(), &file), Some(false));
    let plain = Home::new();
    assert!(plain.cache.presence(&file).unwrap().is_none());
    assert_eq!(Presence::there(&plain.root(), &file), None);
}

#[test]
fn results_are_published_and_found_again() {
    let home = leased();
    let cache = home.reopened();
    publish_one(&cache, "one");
    assert!(home.reopened().lookup(&key("one")).unwrap().is_some());
    assert!(!lock(&home, "one").exists());
}

fn publish_one(cache: &Cache, name: &str) {
    let claim = mine(cache, name);
    let (attempt, entry) = make(cache, name, "text");
    let committer = cache.committer(|_| {});
    let attempt = Some(attempt);
    let publication = Publication { key: key(name), entry, claim, attempt, replace: false };
    committer.publish(publication).unwrap();
    committer.flush().unwrap();
}
