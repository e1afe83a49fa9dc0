//! Write-behind: what is handed over gets there, or is noted and told.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crate::made::*;
use crate::memory::{Client, Faults, Memory};
use crate::support::*;

fn go_on() -> AtomicBool {
    AtomicBool::new(false)
}

#[test]
fn all_gets_there_and_is_counted() {
    let store = Arc::new(Memory::default());
    let (home, to) = (Home::new(), Home::new());
    let remote = Client::new(&store, 1).remote();
    let first = result(&home.cache, "step 0", false);
    push(&remote, &home.cache, &first).unwrap();
    let uploader = remote.uploader(&home.cache).unwrap();
    for i in 0..12 {
        let entry = result(&home.cache, &format!("step {i}"), false);
        uploader.enqueue(&entry.key);
        uploader.enqueue(&entry.key);
    }
    let totals = uploader.finish(None, &go_on());
    // Whatever is handed over again after it is done is there.
    assert_eq!((totals.done - totals.present, totals.failed), (11, 0), "{totals:?}");
    assert!(totals.bytes > 0 && totals.reasons.is_empty());
    for i in 0..12 {
        pull(&remote, &to.cache, &key(&format!("step {i}")));
    }
    assert!(remote.pending(&home.cache).is_empty());
}

#[test]
fn what_fails_is_told_noted_and_sent_later() {
    let store = Arc::new(Memory::default());
    let home = Home::new();
    let client = Client::new(&store, 1);
    let remote = client.remote();
    client.set(Faults { refused: 100, ..Default::default() });
    let uploader = remote.uploader(&home.cache).unwrap();
    let (good, _) = put(&home.cache, "good", "text");
    let (lost, _) = put(&home.cache, "lost", "other");
    for entry in [&good, &lost] {
        uploader.enqueue(&entry.key);
    }
    let totals = uploader.finish(None, &go_on());
    assert_eq!((totals.done, totals.failed), (0, 2), "{totals:?}");
    assert!(totals.reasons[0].0.contains("403"), "{totals:?}");
    let mut noted = vec![good.key, lost.key];
    noted.sort();
    assert_eq!(remote.pending(&home.cache), noted);

    // Another process, later.
    lose(&home.cache, &output(&lost, "model").digest);
    let fresh = Client::new(&store, 2).remote();
    let uploader = fresh.uploader(&home.cache).unwrap();
    assert_eq!(uploader.enqueue_pending(), 2);
    let totals = uploader.finish(None, &go_on());
    assert_eq!((totals.done, totals.failed), (1, 1), "{totals:?}");
    assert!(totals.reasons[0].0.contains("nothing to push"), "{totals:?}");
    assert_eq!(fresh.pending(&home.cache), [lost.key]);
    pull(&fresh, &Home::new().cache, &good.key);
}

#[test]
fn an_outage_in_the_middle_is_lived_through() {
    let store = Arc::new(Memory::default());
    let home = Home::new();
    let client = Client::new(&store, 1);
    let remote = client.remote();
    client.set(Faults { down: 100, ..Default::default() });
    let uploader = remote.uploader(&home.cache).unwrap();
    for i in 0..4 {
        uploader.enqueue(&put(&home.cache, &i.to_string(), "text").0.key);
    }
    let until = std::time::Instant::now() + Duration::from_secs(120);
    while remote.usable().is_ok() {
        assert!(std::time::Instant::now() < until);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(uploader.left(), 4);
    client.set(Faults::default());
    while uploader.left() > 0 {
        assert!(std::time::Instant::now() < until, "never tried again");
        std::thread::sleep(Duration::from_millis(10));
    }
    let totals = uploader.finish(None, &go_on());
    assert_eq!((totals.done, totals.failed), (4, 0), "{totals:?}");
}

#[test]
fn no_time_left_and_stopped_are_failures_that_stay_noted() {
    for stopped in [false, true] {
        let store = Arc::new(Memory::default());
        let home = Home::new();
        let client = Client::new(&store, 1);
        let remote = client.remote();
        client.set(Faults { hangs: 100, ..Default::default() });
        let uploader = remote.uploader(&home.cache).unwrap();
        let keys: Vec<_> = (0..9).map(|i| put(&home.cache, &i.to_string(), "text").0.key).collect();
        keys.iter().for_each(|key| uploader.enqueue(key));
        let cancel = AtomicBool::new(stopped);
        let limit = (!stopped).then_some(Duration::from_millis(1));
        let totals = uploader.finish(limit, &cancel);
        assert_eq!((totals.done, totals.failed), (0, 9), "{totals:?}");
        assert_eq!(totals.reasons.iter().map(|(_, n)| n).sum::<u64>(), 9);
        assert_eq!(remote.pending(&home.cache).len(), 9);
    }
}
