//! Results go from one cache to another, whole, with as few bytes as can be.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cache::Entry;
use cache::remote::{Found, Leased, Progress, Remote, Sent, Settings, Trouble, Trust, artifacts};

use crate::made::*;
use crate::memory::{Client, Memory};
use crate::support::*;

/// A remote in a directory beside the cache of `home`.
fn beside(home: &Home) -> Remote {
    let dir = home.dir.path().join("remote");
    fs::create_dir_all(&dir).unwrap();
    let mut settings = Settings::new(format!("file://{}", dir.display()));
    settings.trust = Trust::Writers;
    Remote::open(settings, &|_| None).unwrap()
}

fn there_and_back(remote: &Remote, from: &Home) {
    let entry = result(&from.cache, "one", true);
    assert_eq!(remote.find(&from.cache, &entry.key), Found::Miss);
    let sent = push(remote, &from.cache, &entry).unwrap();
    assert!(sent.entry && !sent.diverged && sent.bytes > LARGE as u64, "{sent:?}");
    let again = push(remote, &from.cache, &entry).unwrap();
    assert_eq!(again, Sent::default(), "nothing goes twice");

    let to = Home::new();
    let progress = Progress::new();
    let found = hit(remote.find(&to.cache, &entry.key));
    assert_eq!(found, entry);
    assert_eq!(kinds(&found), (1, 4));
    let cancel = AtomicBool::new(false);
    let fetched = remote.fetch(&to.cache, &artifacts(&found), &progress, &cancel).unwrap();
    whole(&to.cache, &found);
    assert_eq!(fetched.artifacts, 6);
    assert!(fetched.bytes > LARGE as u64 && progress.done() == progress.total());
    assert!(progress.total() >= fetched.bytes);
    assert_eq!(fetch(remote, &to.cache, &found).unwrap().bytes, 0);
    let report = to.cache.object(&output(&found, "report").digest);
    assert_eq!(fs::read_to_string(report.join("deep/a")).unwrap(), "one");
    assert!(report.join("nothing/here").is_dir());
    let mode = |path: &str| fs::metadata(report.join(path)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("tool"), mode("same"), mode("deep")), (0o555, 0o444, 0o555));
    assert!(to.cache.recipe(&output(&found, "tensors").digest).is_some(), "kept in parts");
    let left: Vec<_> = fs::read_dir(to.root().join("staging")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn through_a_directory() {
    let from = Home::new();
    let remote = beside(&from);
    assert!(remote.name().ends_with("/remote"));
    there_and_back(&remote, &from);
}

#[test]
fn through_a_store() {
    let store = Arc::new(Memory::default());
    let from = Home::new();
    there_and_back(&Client::new(&store, 1).remote(), &from);
    assert_eq!(store.open_uploads(), 0);
    assert_eq!(fs::read_dir(from.root().join("uploads")).unwrap().count(), 1);
}

#[test]
fn a_directory_that_is_not_there_is_no_empty_remote() {
    let home = Home::new();
    let entry = result(&home.cache, "one", false);
    let mut settings = Settings::new(home.dir.path().join("gone").to_str().unwrap());
    settings.trust = Trust::Writers;
    let remote = Remote::open(settings, &|_| None).unwrap();
    let Found::Unavailable(why) = remote.find(&home.cache, &entry.key) else { panic!() };
    assert!(why.contains("there is no directory"), "{why}");
    let error = push(&remote, &home.cache, &entry).unwrap_err();
    assert!(matches!(error, Trouble::Unavailable { .. }), "{error}");
    assert!(!home.dir.path().join("gone").exists());
}

#[test]
fn what_is_shared_goes_once() {
    let store = Arc::new(Memory::default());
    let (from, client) = (Home::new(), Client::new(&store, 1));
    let remote = client.remote();
    let one = result(&from.cache, "one", false);
    let two = result(&from.cache, "two", false);
    push(&remote, &from.cache, &one).unwrap();
    let sent = push(&remote, &from.cache, &two).unwrap();
    let own: u64 = artifacts(&two).iter().map(|output| output.bytes).sum();
    assert!(sent.bytes < own, "the shared tensor is there: {} of {own}", sent.bytes);
    // Parts that are here already do not come again either.
    let to = Home::new();
    pull(&remote, &to.cache, &one.key);
    let before = client.read.load(Ordering::SeqCst);
    let tensors = output(&two, "tensors").clone();
    let cancel = AtomicBool::new(false);
    let wanted = std::slice::from_ref(&tensors);
    let fetched = remote.fetch(&to.cache, wanted, &Progress::new(), &cancel).unwrap();
    assert!(fetched.bytes < tensors.bytes && fetched.bytes > 0);
    assert!(client.read.load(Ordering::SeqCst) - before >= fetched.bytes);
    to.cache.verify(&tensors).unwrap();
}

#[test]
fn bytes_that_the_remote_has_need_not_be_here() {
    let store = Arc::new(Memory::default());
    let (from, to) = (Home::new(), Home::new());
    let remote = Client::new(&store, 1).remote();
    let entry = result(&from.cache, "one", false);
    push(&remote, &from.cache, &entry).unwrap();
    let fresh = Client::new(&store, 2).remote();
    store.objects.lock().unwrap().retain(|name, _| !name.starts_with("entries/"));
    let sent = push(&fresh, &to.cache, &entry).unwrap();
    assert_eq!((sent.entry, sent.objects), (true, 0));
    store.objects.lock().unwrap().retain(|name, _| !name.starts_with("objects/"));
    let error = push(&Client::new(&store, 3).remote(), &to.cache, &entry).unwrap_err();
    assert!(matches!(error, Trouble::Lost { .. }), "{error}");
}

#[test]
fn the_first_result_of_a_key_stays() {
    let store = Arc::new(Memory::default());
    let (a, b) = (Home::new(), Home::new());
    let (first, _) = put(&a.cache, "one", "first");
    let (second, _) = put(&b.cache, "one", "second");
    assert_eq!(first.key, second.key);
    push(&Client::new(&store, 1).remote(), &a.cache, &first).unwrap();
    let remote = Client::new(&store, 2).remote();
    let sent = push(&remote, &b.cache, &second).unwrap();
    assert!(sent.diverged && !sent.entry);
    assert_eq!(hit(remote.find(&b.cache, &second.key)), first);
    // One whose bytes are lost is worth nothing.
    let model = format!("/{}", output(&first, "model").digest);
    store.objects.lock().unwrap().retain(|name, _| !name.ends_with(&model));
    let remote = Client::new(&store, 3).remote();
    let Found::Rejected(why) = remote.find(&b.cache, &second.key) else { panic!() };
    assert!(why.contains("not complete"), "{why}");
    assert!(push(&remote, &b.cache, &second).unwrap().entry);
    assert_eq!(hit(remote.find(&Home::new().cache, &second.key)), second);
}

#[test]
fn two_machines_that_fill_one_remote_at_once_are_no_conflict() {
    let store = Arc::new(Memory::default());
    let homes = [Home::new(), Home::new(), Home::new()];
    let names: Vec<String> = (0..6).map(|i| format!("step {i}")).collect();
    std::thread::scope(|scope| {
        for (i, home) in homes.iter().enumerate() {
            let (store, names) = (store.clone(), &names);
            scope.spawn(move || {
                let remote = Client::new(&store, i as u64).remote();
                for name in names {
                    let entry = result(&home.cache, name, false);
                    push(&remote, &home.cache, &entry).unwrap();
                }
            });
        }
    });
    let to = Home::new();
    for name in &names {
        pull(&Client::new(&store, 9).remote(), &to.cache, &key(name));
    }
}

/// A machine that runs steps: it looks, leases, looks again, works, publishes, pushes.
fn run(home: &Home, remote: &Remote, name: &str, done: &Mutex<HashMap<String, u32>>) -> Entry {
    let find = || match remote.find(&home.cache, &key(name)) {
        Found::Hit(entry) => Some(*entry),
        Found::Miss => None,
        other => panic!("{other:?}"),
    };
    loop {
        if let Some(entry) = find() {
            fetch(remote, &home.cache, &entry).unwrap();
            return entry;
        }
        match remote.lease(&key(name), "a test") {
            Leased::Mine(lease) => {
                if find().is_some() {
                    continue;
                }
                *done.lock().unwrap().entry(name.to_string()).or_default() += 1;
                let entry = result(&home.cache, name, false);
                push(remote, &home.cache, &entry).unwrap();
                assert!(!lease.lost());
                return entry;
            }
            Leased::Busy(_) => std::thread::sleep(Duration::from_millis(30)),
            Leased::Unavailable(why) => panic!("{why}"),
        }
    }
}

pub fn each_once(remotes: [Remote; 2]) {
    let names: Vec<String> = (0..8).map(|i| format!("step {i}")).collect();
    let done = Mutex::new(HashMap::new());
    let homes = [Home::new(), Home::new()];
    std::thread::scope(|scope| {
        for (home, remote) in homes.iter().zip(&remotes) {
            let (names, done) = (&names, &done);
            scope.spawn(move || {
                for name in names {
                    let entry = run(home, remote, name, done);
                    whole(&home.cache, &entry);
                }
            });
        }
    });
    let done = done.into_inner().unwrap();
    assert_eq!(done.len(), names.len());
    assert!(done.values().all(|times| *times == 1), "{done:?}");
}

#[test]
fn two_caches_with_one_remote_run_each_key_once() {
    let store = Arc::new(Memory::default());
    each_once([1, 2].map(|seed| Client::new(&store, seed).remote()));
    let home = Home::new();
    each_once([beside(&home), beside(&home)]);
}

#[test]
fn a_transfer_that_is_stopped_stops_and_goes_on_later() {
    let store = Arc::new(Memory::default());
    let (from, to) = (Home::new(), Home::new());
    let client = Client::new(&store, 1);
    let remote = client.remote();
    let entry = result(&from.cache, "one", true);
    let stopped = AtomicBool::new(true);
    let error = remote.push(&from.cache, &entry, &Progress::new(), &stopped).unwrap_err();
    assert!(matches!(error, Trouble::Cancelled));
    push(&remote, &from.cache, &entry).unwrap();
    let outputs = artifacts(&entry);
    let error = remote.fetch(&to.cache, &outputs, &Progress::new(), &stopped).unwrap_err();
    assert!(matches!(error, Trouble::Cancelled));
    fetch(&remote, &to.cache, &entry).unwrap();
    whole(&to.cache, &entry);
}

#[test]
fn a_probe_says_what_works() {
    let store = Arc::new(Memory::default());
    let client = Client::new(&store, 1);
    assert!(client.remote().probe().unwrap().conditional);
    client.set(crate::memory::Faults { replaces: true, ..Default::default() });
    assert!(!client.remote().probe().unwrap().conditional);
    client.set(crate::memory::Faults { lost: 100, ..Default::default() });
    client.remote().probe().unwrap_err();
    let home = Home::new();
    assert!(beside(&home).probe().unwrap().conditional);
    assert!(store.names("probes/").is_empty());
}
