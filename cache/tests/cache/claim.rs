//! Claims: one holder over threads and processes, and nothing left behind by a killed one.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cache::{Cache, Claim, Claimed, Holder, Publication, Published};

use crate::support::*;

fn mine(cache: &Cache, name: &str) -> Claim {
    match cache.claim(&key(name), "me").unwrap() {
        Claimed::Mine(claim) => claim,
        Claimed::Busy(holder) => panic!("held by {holder:?}"),
    }
}

fn busy(cache: &Cache, name: &str) -> Option<Holder> {
    match cache.claim(&key(name), "prober").unwrap() {
        Claimed::Mine(_) => None,
        Claimed::Busy(holder) => Some(holder),
    }
}

#[test]
fn one_holder_who_is_named_and_leaves_no_file() {
    let home = Home::new();
    let claim = mine(&home.cache, "one");
    let holder = busy(&home.reopened(), "one").unwrap();
    assert_eq!((holder.pid, holder.who.as_str()), (std::process::id(), "me"));
    let _two = mine(&home.cache, "two");
    drop(claim);
    assert_eq!(busy(&home.cache, "one"), None);
    let name = key("one").to_string();
    assert!(!home.root().join("locks").join(&name[..2]).join(name).exists());
}

#[test]
fn never_two_holders_under_contention() {
    let home = Home::new();
    let (inside, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let cache = home.reopened();
                while done.load(Ordering::SeqCst) < 300 {
                    if let Claimed::Mine(_claim) = cache.claim(&key("one"), "t").unwrap() {
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

/// Run as a child: holds a claim until it is killed.
#[test]
fn child_holds() {
    let Some(cache) = as_child() else { return };
    let _claim = mine(&cache, "one");
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn another_process_excludes_and_its_death_frees() {
    let home = Home::new();
    let mut child = child("claim::child_holds", &home.root()).spawn().unwrap();
    let start = Instant::now();
    let holder = loop {
        match busy(&home.cache, "one") {
            Some(holder) if holder.pid == child.id() => break holder,
            _ => assert!(start.elapsed() < Duration::from_secs(20)),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert_eq!(holder.who, "me");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(busy(&home.cache, "one"), None);
}

#[test]
fn a_claim_is_not_inherited_by_a_child() {
    let home = Home::new();
    let claim = mine(&home.cache, "one");
    let mut child = Command::new("sleep").arg("5").spawn().unwrap();
    drop(claim);
    assert_eq!(busy(&home.cache, "one"), None);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_claim_is_given_back_when_its_result_is_durable() {
    let home = Home::new();
    let other = home.reopened();
    let claim = mine(&home.cache, "one");
    let (_attempt, entry) = make(&home.cache, "one", "bytes");
    let key = entry.key;
    let committer = home.cache.committer(move |done| {
        assert_eq!(done, [(key, Published::New)]);
        assert!(other.lookup(&key).unwrap().is_some());
        assert_eq!(busy(&other, "one"), None);
    });
    let claim = Some(claim);
    committer.publish(Publication { key, entry, claim, attempt: None, replace: false }).unwrap();
    assert!(busy(&home.cache, "one").is_some());
    committer.flush().unwrap();
    assert_eq!(busy(&home.cache, "one"), None);
}
