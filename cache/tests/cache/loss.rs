//! A loss of power at every named point: what was not synced is lost in many ways, and a fresh
//! process finds everything that was durable, and nothing wrong.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;

use cache::Cache;

use crate::acts::Actor;
use crate::story::*;
use crate::support::*;

/// Every crash point of the store, but for those with a list of their own.
pub const POINTS: [&str; 51] = [
    "absorb.after-discard",
    "absorb.after-discarded-recipe",
    "absorb.after-recipe",
    "absorb.after-rename",
    "absorb.before-recipe",
    "absorb.before-rename",
    "absorb.part",
    "attempt.after-json",
    "attempt.before-json",
    "attempt.before-lock",
    "checkpoint.after-seal",
    "checkpoint.before-drop",
    "checkpoint.before-seal",
    "checkpoint.before-sync",
    "checkpoint.durable",
    "claim.after-remove",
    "claim.before-name",
    "commit.after-evidence",
    "commit.after-link",
    "commit.after-replace",
    "commit.after-row",
    "commit.before-dirs",
    "commit.before-link",
    "commit.before-replace",
    "commit.before-sync",
    "commit.linked",
    "discard.after-move",
    "gc.after-forget",
    "gc.after-leases",
    "gc.after-records",
    "gc.after-rename",
    "gc.after-trial",
    "gc.after-unlink",
    "gc.before-batch",
    "gc.before-unlink",
    "gc.begin",
    "holds.after-note",
    "index.after-commit",
    "index.before-commit",
    "index.retiring",
    "lease.before-lock",
    "open.after-version",
    "open.before-sync",
    "open.before-version",
    "pin.after-sync",
    "pin.before-rename",
    "pin.before-sync",
    "reindex.after-batch",
    "repair.after-move",
    "unpin.after-sync",
    "unpin.before-sync",
];

/// Run as a child: a course that comes by all of them.
#[test]
fn child_lives_long() {
    let Some(cache) = as_child() else { return };
    let mut actor = Actor::new(cache, 1);
    live(&mut actor);
}

fn live(actor: &mut Actor) {
    let root = actor.cache.root().to_path_buf();
    actor.pin("a");
    for (c, name) in (0..).zip(["a", "b", "c"]) {
        actor.put(name, c, false);
    }
    actor.train("f", 1);
    let checkpoints = fs::read_dir(root.join("attempts").join(key("f").to_string())).unwrap();
    let attempt = checkpoints.last().unwrap().unwrap().path();
    cache::checkpoint::save(&attempt.join("checkpoints"), 2, |dir| {
        fs::create_dir(dir.join("deep"))?;
        fs::write(dir.join("deep/state"), "2")
    })
    .unwrap();
    actor.log.did("checkpoint f 2");
    actor.put("b", 4, true);
    actor.put("a", 3, false);
    actor.leave("d", 5);
    actor.adopt("d");
    actor.leave("e", 8);
    // A tensor that is damaged, and a recipe.
    actor.flip_recipe("c");
    actor.put("c", 2, false);
    actor.flip("c");
    actor.put("c", 2, false);
    actor.flip("a");
    actor.read("a");
    actor.flip("b");
    actor.cache.scrub(true, &|_, _| {}).unwrap();
    actor.read("b");
    actor.garble("b");
    actor.put("b", 1, false);
    for item in fs::read_dir(root.join("index")).unwrap() {
        fs::write(item.unwrap().path(), "garbage".repeat(999)).unwrap();
    }
    actor.cache = Cache::open(&root).unwrap();
    actor.cache.reindex().unwrap();
    actor.pin("b");
    actor.unpin("b");
    fs::create_dir_all(root.join("runs/old")).unwrap();
    let mut fresh = Actor::new(actor.cache.clone(), 2);
    std::mem::swap(actor, &mut fresh);
    drop(fresh); // and with it what it used
    actor.gc(&everything());
    actor.put("c", 2, false);
}

/// Run as a child: judges what is left.
#[test]
fn child_judges() {
    let Some(cache) = as_child() else { return };
    judge(&cache, &Log::of(cache.root()));
}

/// A fresh process, which must find nothing wrong.
pub fn judged(root: &Path, what: &str) {
    let mut judge = child("loss::child_judges", root);
    let output = judge.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
    if !output.status.success() {
        let told = [output.stdout, output.stderr].concat();
        let log = Log::of(root).read();
        panic!("{what}\n{}\n{log}", String::from_utf8_lossy(&told));
    }
}

#[test]
fn what_was_durable_stays_and_nothing_is_wrong_after_a_loss_of_power_anywhere() {
    let seeds = (soak(100) / 50) as u64;
    for (at, point) in POINTS.iter().enumerate() {
        for seed in 0..seeds {
            let dir = Home::in_memory().dir;
            let root = dir.path().join("fresh");
            let times = 1 + seed / 2;
            let mut child = child("loss::child_lives_long", &root);
            child.env("PIPE_CRASH_AT", format!("{point}@{times}"));
            child.env("PIPE_CRASH_LOSE", (at as u64 * 1_000_003 + seed).to_string());
            if seed % 2 == 1 {
                child.env("PIPE_CRASH_SYNC", "each");
            }
            let status = child.status().unwrap();
            let reached = status.signal() == Some(9);
            assert!(reached || times > 1 && status.success(), "{point}: {status}");
            judged(&root, &format!("{point}@{times}, seed {seed}"));
        }
    }
}

/// The names in the store's sources.
fn in_sources(dir: &Path, found: &mut BTreeSet<String>) {
    for item in fs::read_dir(dir).unwrap() {
        let path = item.unwrap().path();
        if path.is_dir() {
            in_sources(&path, found);
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        for part in text.split("crash_point!(\"").skip(1) {
            found.insert(part.split('"').next().unwrap().to_string());
        }
    }
}

#[test]
fn every_crash_point_is_in_a_list() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut there = BTreeSet::new();
    in_sources(&here.join("src"), &mut there);
    assert!(there.remove("never"), "the one that says so");
    let tests: String = ["tests/cache", "tests/remote"]
        .iter()
        .flat_map(|dir| fs::read_dir(here.join(dir)).unwrap())
        .map(|item| fs::read_to_string(item.unwrap().path()).unwrap())
        .collect();
    let unlisted: Vec<_> =
        there.iter().filter(|name| !tests.contains(&format!("\"{name}\""))).collect();
    assert!(unlisted.is_empty(), "no test comes by {unlisted:?}");
    let gone: Vec<_> = POINTS.iter().filter(|name| !there.contains(**name)).collect();
    assert!(gone.is_empty(), "{gone:?} are no more");
}
