//! A remote that means harm: recipes and entries that are well sealed and want to get out of their
//! directory, or to be something else.

use std::fs;
use std::sync::Arc;

use bytes::Bytes;
use cache::remote::{Found, Remote, Trouble, artifacts};
use cache::{Digest, Entry, Item, Kind, Output, Part, Recipe};
use serde_json::json;

use crate::made::*;
use crate::memory::{Client, Memory};
use crate::support::*;

/// A store in which a result lies whose only artifact is the directory of this recipe.
fn planted(recipe: &Recipe) -> (Arc<Memory>, Entry) {
    let output = Output {
        port: "report".into(),
        index: None,
        name: "report".into(),
        kind: Kind::Dir,
        digest: recipe.digest,
        bytes: recipe.bytes,
    };
    let entry = Entry::new(preimage("evil"), vec![output], None, json!({}));
    let store = Arc::new(Memory::default());
    // An ordinary push of an ordinary result, whose entry is then put in our words.
    let home = Home::new();
    push(&Client::new(&store, 1).remote(), &home.cache, &put(&home.cache, "x", "x").0).unwrap();
    let (_, sealed) = envelope(&entry);
    let mut objects = store.objects.lock().unwrap();
    let shard = |dir: &str, name: String| format!("{dir}/{}/{name}", &name[..2]);
    objects.insert(shard("entries", entry.key.to_string()), sealed);
    objects.insert(shard("recipes", recipe.digest.to_string()), recipe.render().into());
    objects.insert(shard("objects", Digest::of(b"evil").to_string()), Bytes::from("evil"));
    drop(objects);
    (store, entry)
}

/// An entry object as anybody can make one: sealing is no signature.
fn envelope(entry: &Entry) -> (String, Bytes) {
    let seal = |kind: &str, body: &str| format!("{kind} 1 {}\n{body}", Digest::of(body.as_bytes()));
    let text = seal("pipe-entry", &(serde_json::to_string(entry).unwrap() + "\n"));
    let object = seal("pipe-remote-entry", &format!("\n{text}"));
    (text, object.into())
}

fn recipe(paths: &[&str], digest: Digest) -> Recipe {
    let part = Part { digest: Digest::of(b"evil"), bytes: 4 };
    let item = |path: &&str| Item { path: path.to_string(), executable: false, parts: vec![part] };
    Recipe {
        digest,
        kind: Kind::Dir,
        bytes: 4 * paths.len() as u64,
        items: paths.iter().map(item).collect(),
        empty_dirs: vec![],
    }
}

/// Nothing but a reason comes of it, and nothing outside changes.
fn harmless(store: &Arc<Memory>, entry: &Entry, what: &str) {
    let home = Home::new();
    let outside = home.dir.path().join("outside");
    fs::write(&outside, "mine").unwrap();
    let remote: Remote = Client::new(store, 2).remote();
    match remote.find(&home.cache, &entry.key) {
        Found::Hit(found) => {
            let error = fetch(&remote, &home.cache, &found).expect_err(what);
            assert!(!matches!(error, Trouble::Unavailable { .. }), "{what}: {error}");
        }
        Found::Rejected(_) => {}
        other => panic!("{what}: {other:?}"),
    }
    assert!(artifacts(entry).iter().all(|output| !home.cache.present(output)), "{what}");
    assert_eq!(fs::read_to_string(&outside).unwrap(), "mine");
    let names: Vec<_> = fs::read_dir(home.dir.path()).unwrap().flatten().collect();
    assert_eq!(names.len(), 2, "{what}: {names:?}");
    let left: Vec<_> = fs::read_dir(home.root().join("staging")).unwrap().flatten().collect();
    assert!(left.is_empty(), "{what}: {left:?}");
    nothing_wrong(&home.cache, &artifacts(entry));
}

#[test]
fn no_path_of_a_recipe_leaves_its_directory() {
    let bad: [&[&str]; 12] = [
        &["../../outside"],
        &["a/../../../outside"],
        &["/etc/pipe-was-here"],
        &[".."],
        &["."],
        &[""],
        &["a//b"],
        &["a/"],
        &["a\0b"],
        &["a", "a"],
        &["a", "a/b"],
        &["a/b", "a"],
    ];
    for paths in bad {
        let (store, entry) = planted(&recipe(paths, Digest::of(b"any")));
        harmless(&store, &entry, &format!("{paths:?}"));
    }
    // Well-formed, but not the directory that it is called.
    for paths in [&["A", "a"][..], &["dev/null"], &["tool"]] {
        let (store, entry) = planted(&recipe(paths, Digest::of(b"any")));
        harmless(&store, &entry, &format!("{paths:?}"));
    }
}

#[test]
fn a_recipe_of_many_parts_is_compared_as_a_whole() {
    let mut wrong = recipe(&["a"], Digest::of(b"any"));
    wrong.items[0].parts = vec![wrong.items[0].parts[0]; 3];
    wrong.bytes = 12;
    let (store, entry) = planted(&wrong);
    harmless(&store, &entry, "a file of three parts in a directory of another name");

    // The same, under its right name: it is built.
    let home = Home::new();
    let dir = home.dir.path().join("dir");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("a"), "evilevilevil").unwrap();
    let right = Recipe { digest: cache::hash_path(&dir).unwrap().0, ..wrong };
    let (store, entry) = planted(&right);
    pull(&Client::new(&store, 3).remote(), &home.cache, &entry.key);
    let built = home.cache.object(&right.digest).join("a");
    assert_eq!(fs::read_to_string(built).unwrap(), "evilevilevil");
}

#[test]
fn names_in_entries_are_checked() {
    for name in ["../x", "/etc/passwd", "..", "a/b", ""] {
        let (store, mut entry) = planted(&recipe(&["a"], Digest::of(b"any")));
        entry.outputs[0].name = name.into();
        let key = entry.key.to_string();
        let object = format!("entries/{}/{key}", &key[..2]);
        store.objects.lock().unwrap().insert(object, envelope(&entry).1);
        let found = Client::new(&store, 2).remote().find(&Home::new().cache, &entry.key);
        assert!(matches!(found, Found::Rejected(_)), "{name:?}: {found:?}");
    }
}

#[test]
fn links_and_devices_in_a_directory_remote_are_no_objects() {
    let home = Home::new();
    let dir = home.dir.path().join("remote");
    fs::create_dir(&dir).unwrap();
    let mut settings = cache::remote::Settings::new(dir.to_str().unwrap());
    settings.trust = cache::remote::Trust::Writers;
    let open = || Remote::open(settings.clone(), &|_| None).unwrap();
    let (entry, _) = put(&home.cache, "one", "text");
    push(&open(), &home.cache, &entry).unwrap();
    let digest = output(&entry, "model").digest.to_string();
    let object = dir.join("objects").join(&digest[..2]).join(&digest);
    let copy = home.dir.path().join("copy");
    fs::rename(&object, &copy).unwrap();
    std::os::unix::fs::symlink(&copy, &object).unwrap();
    let reader = Home::new();
    let found = open().find(&reader.cache, &entry.key);
    assert!(matches!(found, Found::Rejected(_)), "{found:?}");
    fs::remove_file(&object).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &object,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let found = open().find(&reader.cache, &entry.key);
    assert!(matches!(found, Found::Rejected(_)), "{found:?}");
}
