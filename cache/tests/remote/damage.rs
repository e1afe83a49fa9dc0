//! Every class of object in a remote, damaged in every way: seen, never served, and healed by
//! whoever has the bytes.

use std::sync::Arc;

use bytes::Bytes;
use cache::remote::{Found, Remote, Trouble, artifacts};
use cache::{Cache, Entry};

use crate::made::*;
use crate::memory::{Client, Memory};
use crate::support::*;

#[derive(Debug, Clone, Copy)]
enum Damage {
    Flip,
    Cut,
    Zero,
    Grow,
    Empty,
    Swap,
    Remove,
}

const ALL: [Damage; 7] = [
    Damage::Flip,
    Damage::Cut,
    Damage::Zero,
    Damage::Grow,
    Damage::Empty,
    Damage::Swap,
    Damage::Remove,
];

/// Damages one object; false when that changes nothing.
fn damage(store: &Memory, name: &str, how: Damage) -> bool {
    let mut objects = store.objects.lock().unwrap();
    let before = objects[name].clone();
    let (class, _) = name.split_once('/').unwrap();
    let swapped = objects.iter().find(|(n, _)| n.starts_with(class) && *n != name);
    let swapped = swapped.map(|(_, bytes)| bytes.clone());
    let mut bytes = before.to_vec();
    match how {
        Damage::Flip => bytes.iter_mut().rev().take(1).for_each(|byte| *byte ^= 1),
        Damage::Cut => bytes.truncate(bytes.len() / 2),
        Damage::Zero => bytes.fill(0),
        Damage::Grow => bytes.push(b'x'),
        Damage::Empty => bytes.clear(),
        Damage::Swap => bytes = swapped.unwrap_or_default().to_vec(),
        Damage::Remove => {
            objects.remove(name);
            return true;
        }
    }
    let changed = bytes != before;
    objects.insert(name.to_string(), Bytes::from(bytes));
    changed
}

/// Tries to get a result: all of it, or a reason. Nothing that is here is wrong.
fn attempt(remote: &Remote, cache: &Cache, entry: &Entry) -> Result<(), String> {
    let outcome = match remote.find(cache, &entry.key) {
        Found::Hit(found) => {
            assert_eq!(*found, *entry);
            fetch(remote, cache, &found).map(|_| whole(cache, &found)).map_err(|e| e.to_string())
        }
        Found::Miss => Err("miss".to_string()),
        Found::Rejected(why) => Err(why),
        Found::Unavailable(why) => panic!("{why}"),
    };
    nothing_wrong(cache, &artifacts(entry));
    outcome
}

#[test]
fn every_class_damaged_in_every_way_is_seen_and_healed() {
    let store = Arc::new(Memory::default());
    let from = Home::new();
    let entry = result(&from.cache, "one", false);
    push(&Client::new(&store, 1).remote(), &from.cache, &result(&from.cache, "two", false))
        .unwrap();
    push(&Client::new(&store, 1).remote(), &from.cache, &entry).unwrap();
    let name = format!("/{}", entry.key);
    let mut names: Vec<String> = store.names("entries/");
    names.retain(|n| n.ends_with(&name));
    let whole_entry = store.objects.lock().unwrap().clone();
    for output in artifacts(&entry) {
        let recipes = store.names("recipes/").into_iter();
        names.extend(recipes.filter(|n| n.ends_with(&output.digest.to_string())));
    }
    let tensors = from.cache.recipe(&output(&entry, "tensors").digest).unwrap();
    let digests = [tensors.items[0].parts[1].digest, output(&entry, "model").digest];
    let objects = store.names("objects/").into_iter();
    names.extend(objects.filter(|n| digests.iter().any(|d| n.ends_with(&d.to_string()))));
    assert_eq!(names.len(), 5, "an entry, two recipes, two objects: {names:?}");
    for name in &names {
        for how in ALL {
            *store.objects.lock().unwrap() = whole_entry.clone();
            if !damage(&store, name, how) {
                continue;
            }
            let reader = Home::new();
            let remote = Client::new(&store, 2).remote();
            let outcome = attempt(&remote, &reader.cache, &entry);
            let why = outcome.expect_err(&format!("{name} {how:?}"));
            assert!(!why.is_empty());
            // Whoever found the damage makes the result again, and its push heals.
            let again = result(&reader.cache, "one", false);
            assert_eq!(again, entry);
            push(&remote, &reader.cache, &again).unwrap_or_else(|e| panic!("{name} {how:?}: {e}"));
            let other = Home::new();
            attempt(&Client::new(&store, 3).remote(), &other.cache, &entry)
                .unwrap_or_else(|why| panic!("not healed: {name} {how:?}: {why}"));
        }
    }
}

#[test]
fn damage_on_the_way_is_tried_once_more_and_told() {
    let store = Arc::new(Memory::default());
    let (from, to) = (Home::new(), Home::new());
    let entry = result(&from.cache, "one", true);
    push(&Client::new(&store, 1).remote(), &from.cache, &entry).unwrap();
    let client = Client::new(&store, 2);
    let remote = client.remote();
    hit(remote.find(&to.cache, &entry.key));
    client.set(crate::memory::Faults { flips: 100, ..Default::default() });
    let large = output(&entry, "large").clone();
    let cancel = Default::default();
    let one = std::slice::from_ref(&large);
    let error = remote.fetch(&to.cache, one, &Default::default(), &cancel).unwrap_err();
    assert!(matches!(error, Trouble::Damaged { .. }), "{error}");
    let reports = to.cache.take_reports();
    assert!(reports.iter().any(|r| r.contains(&large.digest.to_string())), "{reports:?}");
    assert!(!to.cache.present(&large));
    client.set(Default::default());
    remote.fetch(&to.cache, one, &Default::default(), &cancel).unwrap();
    to.cache.verify(&large).unwrap();
}

#[test]
fn damaged_bytes_here_are_never_pushed() {
    for port in ["model", "tensors", "report", "large"] {
        let store = Arc::new(Memory::default());
        let home = Home::new();
        let entry = result(&home.cache, "one", true);
        let digest = output(&entry, port).digest;
        let path = match (home.cache.recipe(&digest), port) {
            (Some(recipe), _) => home.cache.object(&recipe.items[0].parts[1].digest),
            (None, "report") => {
                let dir = home.cache.object(&digest).join("deep");
                std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o755))
                    .unwrap();
                dir.join("a")
            }
            (None, _) => home.cache.object(&digest),
        };
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[1] ^= 1;
        scribble(&path, &bytes);
        let error = push(&Client::new(&store, 1).remote(), &home.cache, &entry).unwrap_err();
        assert!(matches!(error, Trouble::Local(_)), "{port}: {error}");
        assert!(store.names("entries/").is_empty(), "{port}");
        let name = format!("/{}", cache::Digest::of(&bytes));
        for (object, held) in store.objects.lock().unwrap().iter() {
            let digest = object.rsplit('/').next().unwrap();
            if object.starts_with("objects/") {
                assert_eq!(cache::Digest::of(held).to_string(), digest, "{port}");
            }
            assert!(!object.ends_with(&name), "{port}");
        }
        // Others that were on their way are gone on with by the next push.
        assert!(store.open_uploads() <= usize::from(port != "large"), "{port}");
    }
}

#[test]
fn damaged_parts_here_are_brought_anew() {
    let store = Arc::new(Memory::default());
    let (from, to) = (Home::new(), Home::new());
    let one = result(&from.cache, "one", false);
    let two = result(&from.cache, "two", false);
    let remote = Client::new(&store, 1).remote();
    push(&remote, &from.cache, &one).unwrap();
    push(&remote, &from.cache, &two).unwrap();
    pull(&remote, &to.cache, &one.key);
    // The tensor that both share is damaged here, with its size kept.
    let shared = to.cache.recipe(&output(&one, "tensors").digest).unwrap().items[0].parts[2];
    let path = to.cache.object(&shared.digest);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[0] ^= 1;
    scribble(&path, &bytes);
    pull(&remote, &to.cache, &two.key);
    whole(&to.cache, &one);
}
