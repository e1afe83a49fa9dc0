//! Who may read and write: a private cache, a group's, and two users of one group.

#![allow(clippy::print_stdout)] // what is skipped is said

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use cache::{Cache, Claimed, Error, Published, checkpoint};

use crate::gc::{all, gc};
use crate::support::*;

/// One of everything that a cache holds.
fn fill(cache: &Cache) {
    let (attempt, entry) = make(cache, "one", "text");
    publish(cache, &entry, false);
    let mut other = entry.clone();
    other.outputs.pop();
    assert!(matches!(publish(cache, &other, false), Published::Diverged { .. }));
    fs::write(attempt.dir.join("m"), tensors(1, 2)).unwrap();
    attempt.absorb("m", None, "m", attempt.dir.join("m")).unwrap();
    cache.pin(&entry.key, "a test").unwrap();
    let dir = cache.runs_dir().join("r");
    cache.make_dir(&dir).unwrap();
    cache.write(&dir.join("run.json"), b"{}").unwrap();
    cache.digest_of(file!()).ok();
    cache.flush_index();
}

/// Everything below `root` with its mode, but for `skip`, whose content programs make.
fn modes(root: &Path) -> Vec<(PathBuf, fs::Metadata)> {
    fn walk(path: PathBuf, found: &mut Vec<(PathBuf, fs::Metadata)>) {
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            fs::read_dir(&path).unwrap().for_each(|item| walk(item.unwrap().path(), found));
        }
        found.push((path, meta));
    }
    let mut found = Vec::new();
    walk(root.to_path_buf(), &mut found);
    found
}

/// Run as a child, with an umask of its own.
#[test]
fn child_fills() {
    let Some(cache) = as_child() else { return };
    let Claimed::Mine(_claim) = cache.claim(&key("claimed"), "a test").unwrap() else { panic!() };
    let lease = cache.lease("a test").unwrap();
    fill(&cache);
    let attempt = cache.attempt(&key("at work")).unwrap();
    fs::write(attempt.dir.join("o"), "o").unwrap();
    attempt.absorb("o", None, "o", attempt.dir.join("o")).unwrap();
    // As a killed one leaves it.
    std::mem::forget((_claim, lease, attempt));
}

/// Fills the cache at `root` in a process with this umask.
fn filled_under(umask: &str, root: &Path) {
    let inner = child("access::child_fills", root);
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("umask {umask}; exec \"$@\""), "sh"]).arg(inner.get_program());
    shell.args(inner.get_args()).env("CACHE_TEST_ROOT", root);
    let output = shell.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_cache_is_its_users_alone_whatever_the_umask() {
    for umask in ["000", "022", "077"] {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("c");
        drop(Cache::open(&root).unwrap());
        filled_under(umask, &root);
        assert!(!Cache::open(&root).unwrap().is_shared());
        for (path, meta) in modes(&root) {
            let below = path.strip_prefix(&root).unwrap();
            let object = below.starts_with("objects") && below.components().count() > 2;
            if meta.is_dir() && !object {
                assert_eq!(meta.mode() & 0o7777, 0o700, "{umask} {}", path.display());
            } else if object {
                assert_eq!(meta.mode() & 0o222, 0, "{umask} {}", path.display());
            }
        }
    }
}

#[test]
fn a_groups_cache_is_the_groups_whatever_the_umask_and_stays_so() {
    for umask in ["000", "022", "077"] {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("c");
        drop(Cache::open_shared(&root).unwrap());
        filled_under(umask, &root);
        let cache = Cache::open(&root).unwrap();
        assert!(cache.is_shared(), "without saying so again");
        drop(Cache::open_shared(&root).unwrap());
        let gid = fs::metadata(&root).unwrap().gid();
        let mut kinds = std::collections::BTreeSet::new();
        for (path, meta) in modes(&root) {
            let below = path.strip_prefix(&root).unwrap();
            let top = below.iter().next().unwrap_or_default().to_string_lossy().into_owned();
            let wanted = match (&top[..], meta.is_dir()) {
                (_, true) => 0o2770,
                ("objects" | "recipes", _) => 0o444,
                ("entries" | "divergences", _) => 0o440,
                // What else is in an attempt is the program's, whose umask the engine sets.
                ("attempts", _)
                    if !["lock", "holds", "attempt.json"].iter().any(|n| path.ends_with(n)) =>
                {
                    continue;
                }
                _ => 0o660,
            };
            assert_eq!(meta.mode() & 0o7777, wanted, "{umask} {}", path.display());
            assert_eq!(meta.gid(), gid, "{}", path.display());
            kinds.insert(top);
        }
        for kind in
            ["objects", "recipes", "entries", "divergences", "pins", "runs", "index", "locks"]
        {
            assert!(kinds.contains(kind), "{kind} is in {kinds:?}");
        }
    }
}

#[test]
fn a_private_cache_is_never_opened_to_a_group_by_the_way() {
    let home = Home::new();
    let (entry, _) = put(&home.cache, "one", "text");
    let before: Vec<u32> = modes(&home.root()).iter().map(|(_, meta)| meta.mode()).collect();
    let error = Cache::open_shared(home.root()).unwrap_err();
    assert!(matches!(error, Error::Private { .. }));
    let after: Vec<u32> = modes(&home.root()).iter().map(|(_, meta)| meta.mode()).collect();
    assert_eq!(before, after);
    // What the error says is to be done does it.
    let text = error.to_string();
    let line = text.split('`').nth(3).unwrap();
    let gid = fs::metadata(home.root()).unwrap().gid().to_string();
    let line = line.replace("GROUP", &gid);
    assert!(Command::new("sh").args(["-ec", &line]).status().unwrap().success(), "{line}");
    let cache = Cache::open_shared(home.root()).unwrap();
    assert_eq!(cache.lookup(&entry.key).unwrap(), Some(entry.clone()));
    entry.outputs.iter().for_each(|output| cache.verify(output).unwrap());
    put(&cache, "two", "more");
}

/// Run as a child, by the first user.
#[test]
fn member_makes() {
    let Some(cache) = as_child() else { return };
    assert!(cache.is_shared());
    fill(&cache);
    cache.attempts_clean(&key("one")).unwrap();
    cache.unpin(&key("one")).unwrap();
    let left = cache.attempt(&key("left")).unwrap();
    fs::create_dir_all(left.dir.join("work/deep")).unwrap();
    fs::write(left.dir.join("work/deep/x"), "x").unwrap();
    checkpoint::save(&left.checkpoints(), 7, |dir| fs::write(dir.join("w"), "weights")).unwrap();
}

/// Run as a child, by the second user.
#[test]
fn member_takes_and_collects() {
    let Some(cache) = as_child() else { return };
    let entry = cache.lookup(&key("one")).unwrap().expect("made by the other");
    entry.outputs.iter().for_each(|output| cache.check(output).unwrap());
    let (position, dir) = cache.checkpoint_latest(&key("left")).expect("left by the other");
    assert_eq!((position, &fs::read(dir.join("w")).unwrap()[..]), (7, &b"weights"[..]));
    // The same bytes again, and another result of the same key.
    assert_eq!(put(&cache, "one", "text").1, Published::Same);
    assert!(matches!(put(&cache, "one", "other").1, Published::Diverged { .. }));
    let Claimed::Mine(_claim) = cache.claim(&key("one"), "b").unwrap() else { panic!() };
    cache.attempts_clean(&key("left")).unwrap();
    assert_eq!(cache.checkpoint_latest(&key("left")), None);
    cache.attempts_clean(&key("one")).unwrap();
    // What the first user made goes, a directory too.
    let (_, _, done) = gc(&cache, &[], &all());
    assert!(done.blobs > 4, "{done:?}");
    assert!(entry.outputs.iter().all(|output| !cache.present(output)));
    assert_eq!(put(&cache, "one", "text").1, Published::Same);
    entry.outputs.iter().for_each(|output| cache.verify(output).unwrap());
}

/// Run as a child, by somebody who is not in the group.
#[test]
fn stranger_sees_nothing() {
    let Some(root) = std::env::var_os("CACHE_TEST_ROOT") else { return };
    assert!(Cache::open(&root).is_err());
    assert!(fs::read_dir(&root).is_err());
}

#[test]
fn two_users_of_a_group_share_and_collect() {
    const GROUP: u32 = 54_321;
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can be two users");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let program = dir.path().join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let team = dir.path().join("team");
    fs::create_dir(&team).unwrap();
    chown(&team, None, Some(GROUP)).unwrap();
    fs::set_permissions(&team, fs::Permissions::from_mode(0o2775)).unwrap();
    let root = team.join("c");
    let by = |user: u32, group: u32, test: &str, umask: &str| {
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("umask {umask}; exec \"$@\""), "sh"]).arg(&program);
        shell.args([&format!("access::{test}"), "--exact", "--test-threads=1"]);
        shell.env("CACHE_TEST_ROOT", &root).current_dir(dir.path()).uid(user).gid(group);
        let output = shell.output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && told.contains("1 passed"), "{user} {test}: {told}");
    };
    by(54_001, GROUP, "member_begins", "077");
    by(54_001, GROUP, "member_makes", "007");
    by(54_003, 54_003, "stranger_sees_nothing", "022");
    by(54_002, GROUP, "member_takes_and_collects", "007");
    by(54_001, GROUP, "member_makes", "077");
    by(54_002, GROUP, "member_sweeps", "007");
}

/// Run as a child, by the first user.
#[test]
fn member_begins() {
    let Some(root) = std::env::var_os("CACHE_TEST_ROOT") else { return };
    let cache = Cache::open_shared(&root).unwrap();
    assert!(cache.is_shared());
}

/// Run as a child, by the second user: what a program of the first made unreadable is no trouble.
#[test]
fn member_sweeps() {
    let Some(cache) = as_child() else { return };
    assert_eq!(cache.checkpoint_latest(&key("left")), None, "it cannot be read");
    let policy = cache::gc::Policy { attempts_older_than: std::time::Duration::ZERO, ..all() };
    let (_, _, done) = gc(&cache, &[], &policy);
    assert!(done.trials > 0, "{done:?}");
    assert!(cache.scrub(true, &|_, _| {}).unwrap().damage.is_empty());
}
