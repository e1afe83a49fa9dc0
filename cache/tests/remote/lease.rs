//! Leases: one holder in the normal case; a dead or frozen holder stops nobody; nothing that is
//! wrong with them stops anybody.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cache::remote::{Lease, Leased, Remote};

use crate::memory::{Client, Faults, Memory};
use crate::support::*;

fn mine(leased: Leased) -> Lease {
    match leased {
        Leased::Mine(lease) => lease,
        other => panic!("{other:?}"),
    }
}

fn busy(leased: Leased) -> String {
    match leased {
        Leased::Busy(holder) => holder.owner,
        other => panic!("{other:?}"),
    }
}

/// Asks until it is had.
fn wait(remote: &Remote) -> Lease {
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        if let Leased::Mine(lease) = remote.lease(&key("one"), "the next") {
            return lease;
        }
        assert!(Instant::now() < until, "never had");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn one_holder_until_it_is_given_back() {
    let store = Arc::new(Memory::default());
    let [a, b] = [1, 2].map(|seed| Client::new(&store, seed).remote());
    let lease = mine(a.lease(&key("one"), "ann\non host"));
    assert_eq!(busy(b.lease(&key("one"), "bob")), "annon host");
    assert_eq!(busy(a.lease(&key("one"), "ann again")), "annon host");
    let other = mine(b.lease(&key("two"), "bob"));
    // Long enough for a dead holder to be found out: this one lives.
    let until = Instant::now() + Duration::from_secs(3);
    while Instant::now() < until {
        busy(b.lease(&key("one"), "bob"));
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(!lease.lost());
    drop(lease);
    drop(other);
    assert!(store.names("leases/").is_empty());
    assert_eq!(mine(b.lease(&key("one"), "bob")).fence(), 1);
}

#[test]
fn a_frozen_holder_loses_it_and_finds_out() {
    let store = Arc::new(Memory::default());
    let frozen = Client::new(&store, 1);
    let (a, b) = (frozen.remote(), Client::new(&store, 2).remote());
    let lease = mine(a.lease(&key("one"), "ann"));
    frozen.set(Faults { down: 100, ..Default::default() });
    let taken = wait(&b);
    assert_eq!(taken.fence(), 2);
    frozen.set(Faults::default());
    let until = Instant::now() + Duration::from_secs(120);
    while !lease.lost() {
        assert!(Instant::now() < until, "never told");
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(lease);
    assert_eq!(store.names("leases/").len(), 1, "the other's stays");
    busy(a.lease(&key("one"), "ann"));
}

#[test]
fn a_killed_holder_stops_nobody() {
    let home = Home::new();
    let remote_dir = home.dir.path().join("remote");
    std::fs::create_dir(&remote_dir).unwrap();
    let mut holder = child("lease::child_holds", &home.root());
    let mut holder = holder.env("REMOTE", &remote_dir).spawn().unwrap();
    let remote = crate::crash::directory(&remote_dir);
    let until = Instant::now() + Duration::from_secs(120);
    while !remote_dir.join("leases").is_dir() {
        assert!(Instant::now() < until, "the child takes no lease");
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(busy(remote.lease(&key("one"), "bob")), "a child");
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert_eq!(wait(&remote).fence(), 2);
}

/// Run as a child: holds a lease until it is killed.
#[test]
fn child_holds() {
    let (Some(_), Some(dir)) = (as_child(), std::env::var_os("REMOTE")) else { return };
    let _lease = mine(crate::crash::directory(dir.as_ref()).lease(&key("one"), "a child"));
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn a_store_that_replaces_all_the_same_gives_it_to_one() {
    let store = Arc::new(Memory::default());
    let remotes: Vec<Remote> = (0..4)
        .map(|seed| {
            let client = Client::new(&store, seed);
            client.set(Faults { replaces: true, ..Default::default() });
            client.remote()
        })
        .collect();
    let leases: Vec<Leased> = std::thread::scope(|scope| {
        let ask = |remote| scope.spawn(move || Remote::lease(remote, &key("one"), "one of many"));
        let asked: Vec<_> = remotes.iter().map(ask).collect();
        asked.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let held = leases.iter().filter(|leased| matches!(leased, Leased::Mine(_))).count();
    assert_eq!(held, 1, "{leases:?}");
}

#[test]
fn nonsense_under_its_name_stops_nobody() {
    let store = Arc::new(Memory::default());
    let name = key("one").to_string();
    let object = format!("leases/{}/{name}", &name[..2]);
    for nonsense in ["", "nonsense", "{\"owner\": 1}"] {
        store.objects.lock().unwrap().insert(object.clone(), nonsense.into());
        let remote = Client::new(&store, 1).remote();
        busy(remote.lease(&key("one"), "bob"));
        drop(wait(&remote));
    }
}

#[test]
fn without_a_remote_one_goes_on() {
    let store = Arc::new(Memory::default());
    for faults in [
        Faults { down: 100, ..Default::default() },
        Faults { refused: 100, ..Default::default() },
        Faults { hangs: 100, ..Default::default() },
        Faults { lost: 100, ..Default::default() },
    ] {
        let client = Client::new(&store, 1);
        client.set(faults.clone());
        let leased = client.remote().lease(&key("one"), "bob");
        assert!(matches!(leased, Leased::Unavailable(_)), "{faults:?}: {leased:?}");
    }
}
