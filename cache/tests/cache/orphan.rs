//! A worker that outlives its leader, and a leader that wakes after its claim is gone: neither
//! harms what others have made meanwhile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use cache::{Attempt, Cache, Claimed, Entry, Finished, Published, checkpoint};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::story::*;
use crate::support::*;

fn wait_for(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(30), "never happened: {what}");
        std::thread::sleep(Duration::from_millis(3));
    }
}

fn beside(root: &Path, name: &str) -> PathBuf {
    root.with_file_name(name)
}

/// Run as a child: a leader, which starts a worker and waits for it.
#[test]
fn child_leads() {
    let Some(cache) = as_child() else { return };
    let Claimed::Mine(_claim) = cache.claim(&key("one"), "leader").unwrap() else { panic!() };
    let attempt = cache.attempt(&key("one")).unwrap();
    let mut worker = child("orphan::child_works", cache.root());
    worker.env("CACHE_TEST_ATTEMPT", &attempt.dir).spawn().unwrap().wait().unwrap();
}

/// Run as a child: a worker, which goes on writing whatever becomes of its leader.
#[test]
fn child_works() {
    let Some(cache) = as_child() else { return };
    let attempt = Attempt::reopen(std::env::var_os("CACHE_TEST_ATTEMPT").unwrap()).unwrap();
    let path = attempt.dir.join("made");
    fs::write(beside(cache.root(), "began"), "").unwrap();
    while !beside(cache.root(), "published").exists() {
        fs::write(&path, "half of it").unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    // Now the worst: other bytes for the same key, and everything as if all were well.
    fs::write(&path, "an orphan's bytes").unwrap();
    let fill = |dir: &Path| fs::write(dir.join("state"), "an orphan's");
    checkpoint::save(&attempt.checkpoints(), 7, fill).unwrap();
    let outputs = vec![attempt.absorb("o", None, "made", &path).unwrap()];
    attempt.finish(&Finished { outputs, log: None, provenance: json!({}) }).unwrap();
    fs::write(beside(cache.root(), "ended"), "").unwrap();
}

#[test]
fn an_orphan_that_goes_on_writing_harms_nothing() {
    let home = Home::in_memory();
    let mut leader = child("orphan::child_leads", &home.root()).spawn().unwrap();
    wait_for("the worker works", || beside(&home.root(), "began").exists());
    leader.kill().unwrap();
    leader.wait().unwrap();

    let cache = home.reopened();
    let Claimed::Mine(claim) = cache.claim(&key("one"), "the next").unwrap() else {
        panic!("a dead leader's claim is free")
    };
    assert!(cache.finished(&key("one")).is_none());
    let (attempt, entry) = make_content(&cache, "one", 2, None);
    let outcome = publish_all(&cache, &entry, Some(claim), Some(attempt), false);
    assert_eq!(outcome, Published::New);
    let attempts = home.root().join("attempts").join(key("one").to_string());
    assert_eq!(fs::read_dir(&attempts).unwrap().count(), 1, "the orphan's stays while it lives");
    fs::write(beside(&home.root(), "published"), "").unwrap();
    wait_for("the orphan has done its worst", || beside(&home.root(), "ended").exists());

    let cache = home.reopened();
    assert_eq!(cache.lookup(&key("one")).unwrap().as_ref(), Some(&entry));
    cache.verify(&entry.outputs[0]).unwrap();
    assert_eq!(cache.divergences(&key("one")), []);
    assert_eq!(cache.scrub(false, &|_, _| {}).unwrap().damage, []);
    wait_for("its attempt can be cleaned", || {
        cache.attempts_clean(&key("one")).unwrap();
        !attempts.exists()
    });
    assert_eq!(cache.checkpoint_latest(&key("one")), None);
}

/// Run as a child: works, and publishes when it is told.
#[test]
fn child_publishes_late() {
    let Some(cache) = as_child() else { return };
    let Claimed::Mine(claim) = cache.claim(&key("one"), "the frozen").unwrap() else { panic!() };
    let c = std::env::var("CACHE_TEST_SEED").unwrap().parse().unwrap();
    let (attempt, entry) = make_content(&cache, "one", c, None);
    fs::write(beside(cache.root(), "made"), "").unwrap();
    while !beside(cache.root(), "go").exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let outcome = publish_all(&cache, &entry, Some(claim), Some(attempt), false);
    fs::write(beside(cache.root(), "outcome"), format!("{outcome:?}")).unwrap();
}

fn frozen(root: &Path, c: u8) -> Child {
    let mut late = child("orphan::child_publishes_late", root);
    let child =
        late.env("CACHE_TEST_SEED", c.to_string()).stderr(Stdio::inherit()).spawn().unwrap();
    wait_for("it has made its result", || beside(root, "made").exists());
    kill_process(Pid::from_child(&child), Signal::STOP).unwrap();
    child
}

fn work_meanwhile(cache: &Cache, c: u8) -> (Entry, cache::Claim) {
    let name = key("one").to_string();
    assert!(matches!(cache.claim(&key("one"), "me").unwrap(), Claimed::Busy(_)));
    fs::remove_file(cache.root().join("locks").join(&name[..2]).join(&name)).unwrap();
    let Claimed::Mine(claim) = cache.claim(&key("one"), "me").unwrap() else {
        panic!("the lock without a name counts for nothing")
    };
    let (attempt, entry) = make_content(cache, "one", c, None);
    let outcome = publish_all(cache, &entry, None, Some(attempt), false);
    assert_eq!(outcome, Published::New);
    (entry, claim)
}

#[test]
fn a_frozen_process_that_wakes_after_its_claim_is_gone_harms_nothing() {
    for (same, c) in [(true, 2), (false, 5)] {
        let home = Home::in_memory();
        let mut late = frozen(&home.root(), c);
        let (entry, claim) = work_meanwhile(&home.cache, 2);
        fs::write(beside(&home.root(), "go"), "").unwrap();
        kill_process(Pid::from_child(&late), Signal::CONT).unwrap();
        assert!(late.wait().unwrap().success());
        let outcome = fs::read_to_string(beside(&home.root(), "outcome")).unwrap();
        assert!(outcome.starts_with(if same { "Same" } else { "Diverged" }), "{outcome}");
        let cache = home.reopened();
        assert_eq!(cache.lookup(&key("one")).unwrap().as_ref(), Some(&entry));
        cache.verify(&entry.outputs[0]).unwrap();
        assert_eq!(cache.divergences(&key("one")).len(), usize::from(!same));
        // It gave back its own claim, and not the one that another has by now.
        assert!(matches!(cache.claim(&key("one"), "a third").unwrap(), Claimed::Busy(_)));
        drop(claim);
        assert!(matches!(cache.claim(&key("one"), "a third").unwrap(), Claimed::Mine(_)));
    }
}
