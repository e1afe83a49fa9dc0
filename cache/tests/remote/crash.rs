//! SIGKILL at every named point of a push and of a fetch, then a fresh process: nothing wrong is
//! found by anybody, and going on does not begin anew.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use cache::Cache;
use cache::remote::{Found, Progress, Remote, Settings, Trust, artifacts};

use crate::made::*;
use crate::memory::short;
use crate::support::*;

const PUSH: [&str; 9] = [
    "push.after-begin",
    "push.after-part",
    "push.after-part@2",
    "push.before-complete",
    "push.after-complete",
    "push.before-recipes",
    "push.before-entry",
    "push.after-entry",
    "push.never",
];
const FETCH: [&str; 11] = [
    "fetch.after-piece",
    "fetch.after-piece@4",
    "fetch.before-place",
    "fetch.before-place@4",
    "fetch.after-place",
    "fetch.after-object",
    "fetch.after-object@3",
    "fetch.after-recipe",
    "fetch.before-directory",
    "fetch.after-directory",
    "fetch.never",
];

/// A remote in a directory, of which everybody is believed.
pub fn directory(dir: &Path) -> Remote {
    let mut settings = Settings::new(dir.to_str().unwrap());
    settings.trust = Trust::Writers;
    settings.timeouts = short();
    // A busy machine writes slowly.
    settings.timeouts.patience = std::time::Duration::from_secs(20);
    Remote::open(settings, &|_| None).unwrap()
}

struct Place {
    home: Home,
    remote: std::path::PathBuf,
}

impl Place {
    fn new() -> Place {
        let home = Home::new();
        let remote = home.dir.path().join("remote");
        std::fs::create_dir(&remote).unwrap();
        Place { home, remote }
    }

    /// Runs a test of this binary that is killed at `point`, or ends well when that never comes.
    fn kill(&self, test: &str, root: &Path, point: &str) {
        let mut child = child(test, root);
        child.env("REMOTE", &self.remote).env("PIPE_CRASH_AT", point);
        let status = child.status().unwrap();
        if point.ends_with(".never") {
            assert!(status.success(), "{point}: {status}");
        } else {
            assert_eq!(status.signal(), Some(9), "{point} is never reached");
        }
    }
}

fn as_remote_child() -> Option<(Cache, Remote)> {
    let cache = as_child()?;
    Some((cache, directory(Path::new(&std::env::var_os("REMOTE")?))))
}

/// Run as a child.
#[test]
fn child_pushes() {
    let Some((cache, remote)) = as_remote_child() else { return };
    let entry = cache.lookup(&key("one")).unwrap().unwrap();
    push(&remote, &cache, &entry).unwrap();
}

/// Run as a child.
#[test]
fn child_fetches() {
    let Some((cache, remote)) = as_remote_child() else { return };
    pull(&remote, &cache, &key("one"));
}

#[test]
fn a_push_that_was_killed_goes_on() {
    let made = Home::new();
    let entry = result(&made.cache, "one", true);
    for point in PUSH {
        let place = Place::new();
        place.kill("crash::child_pushes", &made.root(), point);
        let remote = directory(&place.remote);
        let reader = Home::new();
        match remote.find(&reader.cache, &entry.key) {
            Found::Miss => assert!(!matches!(point, "push.after-entry" | "push.never"), "{point}"),
            Found::Hit(_) => assert!(matches!(point, "push.after-entry" | "push.never"), "{point}"),
            other => panic!("{point}: {other:?}"),
        }
        let sent = push(&remote, &made.cache, &entry).unwrap();
        let large = large_bytes("one").len() as u64;
        match point {
            // The object is there: none of it goes again.
            "push.after-complete" | "push.before-recipes" | "push.before-entry" => {
                assert!(sent.bytes < large, "{point}: {sent:?}");
            }
            // All but the parts that were sent.
            "push.after-part" | "push.after-part@2" | "push.before-complete" => {
                assert!(sent.bytes < large, "{point}: {sent:?}");
            }
            _ => {}
        }
        pull(&remote, &reader.cache, &entry.key);
        // Nothing of an upload; puts of small objects that were killed are left for a fortnight.
        let left = std::fs::read_dir(place.remote.join("tmp")).unwrap().flatten();
        let left: u64 = left.map(|item| item.metadata().unwrap().len()).sum();
        assert!(left < 1 << 20, "{point}: {left}");
        let uploads = made.root().join("uploads");
        // The journal of an object that got there is left for a week.
        let done = matches!(point, "push.after-complete");
        for dir in std::fs::read_dir(&uploads).unwrap() {
            let parts = std::fs::read_dir(dir.unwrap().path()).unwrap().flatten();
            let parts: Vec<_> =
                parts.filter(|i| i.path().extension().is_some_and(|e| e == "parts")).collect();
            assert!(done || parts.is_empty(), "{point}: {parts:?}");
            parts.iter().for_each(|item| std::fs::remove_file(item.path()).unwrap());
        }
    }
}

#[test]
fn a_fetch_that_was_killed_goes_on() {
    let place = Place::new();
    let entry = result(&place.home.cache, "one", true);
    push(&directory(&place.remote), &place.home.cache, &entry).unwrap();
    let all: u64 = artifacts(&entry).iter().map(|output| output.bytes).sum();
    for point in FETCH {
        let reader = Home::new();
        place.kill("crash::child_fetches", &reader.root(), point);
        let cache = reader.reopened();
        nothing_wrong(&cache, &artifacts(&entry));
        let remote = directory(&place.remote);
        let fetched = fetch(&remote, &cache, &entry).unwrap();
        whole(&cache, &entry);
        match point {
            "fetch.after-piece@4" | "fetch.before-place@4" | "fetch.after-object@3" => {
                assert!(fetched.bytes < all, "{point}: {} of {all}", fetched.bytes);
            }
            "fetch.never" => assert_eq!(fetched.bytes, 0),
            _ => {}
        }
        let left = std::fs::read_dir(reader.root().join("staging")).unwrap().flatten();
        let left: Vec<_> =
            left.filter(|i| i.file_name().to_string_lossy().starts_with("fetch-")).collect();
        assert!(left.is_empty(), "{point}: {left:?}");
    }
}

#[test]
fn a_local_file_that_changed_since_is_sent_as_it_is_now() {
    // Parts of an upload that was broken off are of other bytes than the file has now.
    let place = Place::new();
    let cache = &place.home.cache;
    let entry = result(cache, "one", true);
    let object = cache.object(&output(&entry, "large").digest);
    let good = std::fs::read(&object).unwrap();
    let mut bad = good.clone();
    bad[3] ^= 1;
    scribble(&object, &bad);
    place.kill("crash::child_pushes", &place.home.root(), "push.after-part@3");
    scribble(&object, &good);
    let remote = directory(&place.remote);
    let cancel = AtomicBool::new(false);
    remote.push(cache, &entry, &Progress::new(), &cancel).unwrap();
    pull(&remote, &Home::new().cache, &entry.key);
}
