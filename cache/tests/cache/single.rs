//! Many processes, many keys: every key is worked on once.

use std::collections::BTreeMap;
use std::process::Child;
use std::time::Duration;

use cache::Claimed;

use crate::story::*;
use crate::support::*;

const PROCESSES: u64 = 8;
const KEYS: usize = 50;

/// Run as a child: sees to it that all keys have results, in an order of its own.
#[test]
fn child_fills() {
    let Some(cache) = as_child() else { return };
    let (log, mut dice) = (Log::of(cache.root()), Dice(std::process::id().into()));
    let mut missing: Vec<usize> = (0..KEYS).collect();
    while !missing.is_empty() {
        let at = dice.below(missing.len());
        let name = format!("k{}", missing[at]);
        if cache.lookup(&key(&name)).unwrap().is_some() {
            missing.swap_remove(at);
            continue;
        }
        let Claimed::Mine(claim) = cache.claim(&key(&name), "one of many").unwrap() else {
            std::thread::sleep(Duration::from_micros(200));
            continue;
        };
        // Whoever had the claim before may have done it.
        if cache.lookup(&key(&name)).unwrap().is_some() {
            continue;
        }
        log.did(&name);
        let (attempt, entry) = make_content(&cache, &name, (missing[at] % 12) as u8, None);
        publish_all(&cache, &entry, Some(claim), Some(attempt), false);
    }
}

#[test]
fn eight_processes_and_fifty_keys_are_fifty_executions() {
    let home = Home::in_memory();
    let start = |_| child("single::child_fills", &home.root()).spawn().unwrap();
    let all: Vec<Child> = (0..PROCESSES).map(start).collect();
    for mut child in all {
        assert!(child.wait().unwrap().success());
    }
    let mut executed = BTreeMap::new();
    for line in Log::of(&home.root()).read().lines() {
        *executed.entry(line.to_string()).or_insert(0) += 1;
    }
    assert_eq!(executed.len(), KEYS);
    assert!(executed.values().all(|times| *times == 1), "{executed:?}");
    for entry in home.reopened().entries().unwrap() {
        home.cache.verify(&entry.outputs[0]).unwrap();
    }
}
