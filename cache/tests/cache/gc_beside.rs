//! Garbage collection killed anywhere, and beside processes that work.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use cache::gc::Policy;
use cache::{Cache, Claimed, Digest, Entry, Lease, Output, Publication, checkpoint};
use serde_json::json;

use crate::gc::{all, gc};
use crate::support::*;

const POINTS: [&str; 14] = [
    "gc.begin",
    "gc.after-leases",
    "gc.after-trial",
    "gc.after-trial@2",
    "gc.before-batch",
    "gc.after-rename",
    "gc.after-rename@2",
    "gc.after-rename@5",
    "gc.before-unlink",
    "gc.after-unlink",
    "gc.after-unlink@4",
    "gc.after-forget",
    "gc.after-forget@2",
    "gc.after-records",
];

fn everything() -> Policy {
    let none = Duration::ZERO;
    Policy { older_than: Some(none), attempts_older_than: none, forget: true, ..all() }
}

/// A result with a file of tensors, one of them shared by all, and a directory.
fn make_one(cache: &Cache, name: &str, lease: Option<&Lease>) -> (cache::Attempt, Entry) {
    let attempt = cache.attempt(&key(name)).unwrap();
    let weights = attempt.dir.join("w");
    fs::write(&weights, tensors(name.len() as u8, 1)).unwrap();
    let dir = attempt.dir.join("d");
    fs::create_dir_all(dir.join("deep")).unwrap();
    fs::write(dir.join("deep/a"), name).unwrap();
    let outputs = vec![
        attempt.absorb("model", None, "model.safetensors", &weights).unwrap(),
        attempt.absorb("report", None, "report", &dir).unwrap(),
    ];
    if let Some(lease) = lease {
        lease.hold(&digests(&outputs)).unwrap();
    }
    let provenance = json!({ "stage": "toy", "step": name, "seconds": 1.0 });
    let finished = cache::Finished { outputs, log: None, provenance };
    attempt.finish(&finished).unwrap();
    (attempt, Entry::new(preimage(name), finished.outputs, None, finished.provenance))
}

fn digests(outputs: &[Output]) -> Vec<Digest> {
    outputs.iter().map(|output| output.digest).collect()
}

/// All kinds of things to remove, and a pinned result.
fn fill(cache: &Cache) -> Vec<Entry> {
    let publish_one = |name: &str| {
        let (_, entry) = make_one(cache, name, None);
        publish(cache, &entry, false);
        cache.attempts_clean(&entry.key).unwrap();
        entry
    };
    let entries = ["a", "bb", "ccc", "pinned"].map(publish_one);
    cache.pin(&entries[3].key, "a test").unwrap();
    drop(make_one(cache, "never published", None));
    let killed = cache.attempt(&key("killed")).unwrap();
    fs::create_dir(killed.checkpoints()).unwrap();
    checkpoint::save(&killed.checkpoints(), 3, |dir| fs::write(dir.join("w"), "x")).unwrap();
    fs::write(killed.dir.join("o"), "orphan").unwrap();
    killed.absorb("o", None, "o", killed.dir.join("o")).unwrap();
    fs::write(cache.root().join("leases/dead"), "1 nobody\n").unwrap();
    fs::create_dir(cache.runs_dir().join("old")).unwrap();
    entries.to_vec()
}

fn collect(cache: &Cache) {
    let mut collector = cache.collector(|| {}).unwrap();
    let records = [cache.runs_dir().join("old")];
    let facts = collector.survey(&[], &records).unwrap();
    let plan = cache::gc::Plan::new(&facts, &everything());
    collector.carry_out(&facts, &plan, &mut |_| {}).unwrap();
}

/// Run as a child.
#[test]
fn child_collects() {
    let Some(cache) = as_child() else { return };
    collect(&cache);
}

#[test]
fn killed_anywhere_it_leaves_nothing_wrong_and_the_next_goes_on() {
    for point in POINTS {
        let home = Home::new();
        let entries = fill(&home.cache);
        let mut child = child("gc_beside::child_collects", &home.root());
        let status = child.env("PIPE_CRASH_AT", point).status().unwrap();
        assert_eq!(status.signal(), Some(9), "{point} is never reached");
        let cache = home.reopened();
        for entry in &entries {
            for output in entry.outputs.iter().filter(|output| cache.present(output)) {
                cache.verify(output).unwrap();
            }
            let found = cache.lookup(&entry.key).unwrap();
            assert!(found.is_none_or(|found| found == *entry), "{point}");
        }
        assert!(entries[3].outputs.iter().all(|output| cache.present(output)), "{point}");
        // What is made again beside what is left is whole.
        let (_held, again) = make_one(&cache, "a", None);
        publish(&cache, &again, false);
        assert_eq!(again.outputs, entries[0].outputs);
        again.outputs.iter().for_each(|output| cache.verify(output).unwrap());
        drop(_held);
        cache.attempts_clean(&again.key).unwrap();
        collect(&cache);
        entries[3].outputs.iter().for_each(|output| cache.verify(output).unwrap());
        let count = |dir: &str| fs::read_dir(home.root().join(dir)).unwrap().count();
        let left = ["attempts", "leases", "runs", "trash"].map(count);
        assert_eq!(left, [0; 4], "{point}");
        assert_eq!(cache.entries().unwrap().count(), 1, "{point}");
        assert_eq!(gc(&cache, &[], &everything()).2.bytes, 0, "{point}: nothing is left to do");
        assert_eq!(cache.take_reports(), [""; 0], "{point}");
    }
}

/// Run as a child: collects without a pause until it is killed.
#[test]
fn child_collects_on() {
    let Some(cache) = as_child() else { return };
    let log = cache.root().with_file_name("collected");
    for round in 0u64.. {
        let policy = if round % 3 == 0 { everything() } else { all() };
        let (.., done) = gc(&cache, &[], &policy);
        append(&log, if done.blobs > 0 { "collected\n" } else { "nothing\n" });
    }
}

fn append(path: &Path, text: &str) {
    use std::io::Write;
    let mut file = fs::File::options().append(true).create(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

/// Run as a child: looks up, makes, holds and reads results, each time as a run does.
#[test]
fn child_uses() {
    let Some(cache) = as_child() else { return };
    let seed = std::process::id() as usize;
    let committer = cache.committer(|_| {});
    let mut lease = cache.lease("a user").unwrap();
    let log = cache.root().with_file_name("used");
    for round in 0..120 * soak() {
        if round % 3 == 0 {
            lease = cache.lease("a user, again").unwrap();
        }
        let name = "n".repeat(1 + (seed + round * 5 + round / 3) % 12);
        let Claimed::Mine(claim) = cache.claim(&key(&name), "a user").unwrap() else { continue };
        let entry = cache.lookup(&key(&name)).unwrap();
        let entry = entry.filter(|entry| {
            lease.hold(&digests(&entry.outputs)).unwrap();
            entry.outputs.iter().all(|output| cache.present(output))
        });
        let (entry, how) = match entry {
            Some(entry) => (entry, "hit\n"),
            None => {
                let (attempt, entry) = make_one(&cache, &name, Some(&lease));
                let (key, claim) = (entry.key, Some(claim));
                let attempt = Some(attempt);
                let made = entry.clone();
                committer
                    .publish(Publication { key, entry: made, claim, attempt, replace: true })
                    .unwrap();
                if round % 2 == 0 {
                    committer.flush().unwrap();
                    cache.attempts_clean(&key).unwrap();
                }
                (entry, "made\n")
            }
        };
        std::thread::sleep(Duration::from_micros(300));
        entry.outputs.iter().for_each(|output| cache.verify(output).unwrap());
        append(&log, how);
    }
    committer.flush().unwrap();
    assert_eq!(cache.take_reports(), [""; 0]);
}

/// `PIPE_SOAK` lengthens it.
fn soak() -> usize {
    crate::story::soak(100).div_ceil(100)
}

#[test]
fn beside_work_nothing_that_is_in_use_goes() {
    let home = Home::new();
    let user = |_| {
        let mut user = child("gc_beside::child_uses", &home.root());
        user.stderr(std::process::Stdio::inherit()).spawn().unwrap()
    };
    let mut users: Vec<Child> = (0..3).map(user).collect();
    let start = || child("gc_beside::child_collects_on", &home.root()).spawn().unwrap();
    let mut collector = start();
    for at in 0.. {
        let ended: Vec<_> = users.iter_mut().map(|user| user.try_wait().unwrap()).collect();
        assert!(ended.iter().flatten().all(|status| status.success()), "{ended:?}");
        if ended.iter().all(Option::is_some) {
            break;
        }
        std::thread::sleep(Duration::from_millis(40));
        // A collection that is killed in the middle is one, too.
        if at % 5 == 4 {
            collector.kill().unwrap();
            collector.wait().unwrap();
            collector = start();
        }
    }
    collector.kill().unwrap();
    collector.wait().unwrap();
    let lines = |name: &str| fs::read_to_string(home.dir.path().join(name)).unwrap_or_default();
    let rounds = lines("collected");
    let collected = rounds.lines().filter(|line| *line == "collected").count();
    let used = lines("used");
    let count = |what: &str| used.lines().filter(|line| *line == what).count();
    let counts = (count("hit"), count("made"), collected);
    assert!(counts.0 > 0 && counts.1 > 12 && counts.2 > 0, "{counts:?}");
    let cache = home.reopened();
    for entry in cache.entries().unwrap() {
        for output in entry.outputs.iter().filter(|output| cache.present(output)) {
            cache.verify(output).unwrap();
        }
    }
}
