//! SIGKILL at every named point of a result's life, then a fresh process: the result is absent and
//! can be made again, or it is there and whole. Nothing has to be cleaned up by hand.

use std::os::unix::process::ExitStatusExt;

use cache::{Cache, Claimed, Published};

use crate::support::*;

const POINTS: [&str; 8] = [
    "absorb.before-rename",
    "absorb.after-rename",
    "absorb.after-rename@2",
    "attempt.before-json",
    "commit.before-sync",
    "commit.before-link",
    "commit.after-link",
    "commit.after-row",
];

/// Run as a child: a whole life of a result.
#[test]
fn child_lives() {
    let Some(cache) = as_child() else { return };
    live(&cache);
}

fn live(cache: &Cache) -> Published {
    let Claimed::Mine(_claim) = cache.claim(&key("one"), "life").unwrap() else {
        panic!("somebody holds the claim")
    };
    put(cache, "one", "bytes").1
}

#[test]
fn absent_or_whole_after_a_kill_anywhere() {
    for point in POINTS {
        for index in [true, false] {
            let home = Home::new();
            put(&home.cache, "earlier", "earlier bytes");
            let mut child = child("crash::child_lives", &home.root());
            let status = child.env("PIPE_CRASH_AT", point).status().unwrap();
            assert_eq!(status.signal(), Some(9), "{point} is never reached");
            if !index {
                home.drop_index();
            }
            let cache = home.reopened();
            check_after(&cache, point);
            let (earlier, _) = put(&cache, "earlier", "earlier bytes");
            earlier.outputs.iter().for_each(|o| cache.verify(o).unwrap());
        }
    }
}

fn check_after(cache: &Cache, point: &str) {
    let linked = matches!(point, "commit.after-link" | "commit.after-row");
    let found = cache.lookup(&key("one")).unwrap();
    assert_eq!(found.is_some(), linked, "{point}");
    if let Some(entry) = &found {
        entry.outputs.iter().for_each(|o| cache.verify(o).unwrap());
        assert_eq!(cache.reader().lookup(&entry.key).unwrap(), found, "{point}");
        assert_eq!(cache.recent("toy", "one", 1)[0], *entry, "{point}");
    }
    let adoptable = point.starts_with("commit.");
    assert_eq!(cache.finished(&key("one")).is_some(), adoptable, "{point}");
    assert_eq!(cache.take_reports(), [""; 0], "{point}");

    let outcome = live(cache);
    assert_eq!(outcome, if linked { Published::Same } else { Published::New }, "{point}");
    let entry = cache.lookup(&key("one")).unwrap().unwrap();
    entry.outputs.iter().for_each(|o| cache.verify(o).unwrap());
    cache.attempts_clean(&key("one")).unwrap();
    assert!(cache.finished(&key("one")).is_none(), "{point}");
}
