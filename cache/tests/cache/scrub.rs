//! Everything read: each kind of damage to each kind of thing is named, and repaired if asked.

use std::fs;
use std::path::{Path, PathBuf};

use cache::{Cache, Entry, Scrubbed};

use crate::support::*;

fn scrub(cache: &Cache, repair: bool) -> Scrubbed {
    cache.scrub(repair, &|_, _| {}).unwrap()
}

/// A result with a file, a file of tensors and a directory.
fn make_one(cache: &Cache) -> Entry {
    let attempt = cache.attempt(&key("one")).unwrap();
    let at = |name: &str| attempt.dir.join(name);
    fs::write(at("a"), "a plain file").unwrap();
    fs::write(at("m"), tensors(1, 2)).unwrap();
    fs::create_dir(at("d")).unwrap();
    fs::write(at("d/x"), "in a directory").unwrap();
    let outputs = ["a", "m", "d"].map(|name| attempt.absorb(name, None, name, at(name)).unwrap());
    let provenance = serde_json::json!({ "stage": "toy", "step": "first", "seconds": 1.5 });
    Entry::new(preimage("one"), outputs.to_vec(), None, provenance)
}

fn home() -> (Home, Entry) {
    let home = Home::new();
    let entry = make_one(&home.cache);
    publish(&home.cache, &entry, false);
    let mut other = make_one(&home.cache);
    other.outputs.pop();
    publish(&home.cache, &other, false);
    home.cache.attempts_clean(&entry.key).unwrap();
    (home, entry)
}

/// Where each kind of thing is, by what it is called here.
fn things(home: &Home, entry: &Entry) -> Vec<(&'static str, PathBuf)> {
    let cache = &home.cache;
    let text = entry.key.to_string();
    let digest = |port: &str| output(entry, port).digest;
    let part = cache.recipe(&digest("m")).unwrap().parts().nth(2).unwrap().digest;
    let evidence = fs::read_dir(home.root().join("divergences").join(&text)).unwrap().next();
    vec![
        ("entry", home.root().join("entries").join(&text[..2]).join(&text)),
        ("evidence", evidence.unwrap().unwrap().path()),
        ("recipe", cache.path(&digest("m"))),
        ("part", cache.object(&part)),
        ("file", cache.object(&digest("a"))),
        ("member", cache.object(&digest("d")).join("x")),
    ]
}

fn damage(path: &Path, how: &str) {
    let mut bytes = fs::read(path).unwrap();
    match how {
        "flip" => bytes[5] ^= 1,
        "cut" => bytes.truncate(bytes.len() - 1),
        "zero" => bytes.fill(0),
        "empty" => bytes.clear(),
        "other" => bytes = b"something else altogether".to_vec(),
        _ => unreachable!(),
    }
    let dir = path.parent().unwrap();
    let mode = fs::metadata(dir).unwrap().permissions();
    fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    scribble(path, &bytes);
    fs::set_permissions(dir, mode).unwrap();
}

#[test]
fn a_sound_store_is_sound() {
    let (home, _) = home();
    let seen = std::sync::Mutex::new(Vec::new());
    let all = home.cache.scrub(true, &|done, all| seen.lock().unwrap().push((done, all))).unwrap();
    assert_eq!((all.entries, all.recipes, all.objects, &all.damage[..]), (1, 1, 6, &[][..]));
    let most = seen.lock().unwrap().iter().max().copied().unwrap();
    assert_eq!(most, (all.bytes, all.bytes));
}

#[test]
fn every_damage_to_everything_is_named_and_repaired() {
    for how in ["flip", "cut", "zero", "empty", "other"] {
        for at in 0..6 {
            let (home, entry) = home();
            let (name, path) = things(&home, &entry)[at].clone();
            damage(&path, how);
            let told = |repair: bool| {
                let all = scrub(&home.reopened(), repair);
                // A part that is cut off or moved away is missed by its recipe too.
                let of_recipe = all.damage.len() == 2 && name == "part";
                assert!(all.damage.len() == 1 || of_recipe, "{how} {name}: {:?}", all.damage);
                let found = all.damage.iter().find(|d| path.starts_with(&d.path)).unwrap().clone();
                let step = if name == "entry" || name == "evidence" { "" } else { "first" };
                assert_eq!(found.needed_by, [(entry.key, step.to_string())], "{how} {name}");
                assert_eq!((found.what.is_empty(), found.repaired), (false, repair));
            };
            told(false);
            told(true);
            assert_eq!(scrub(&home.cache, false).damage, [], "{how} {name}");
            // Made again, it is whole.
            let again = make_one(&home.cache);
            publish(&home.cache, &again, false);
            assert_eq!(again.outputs, entry.outputs);
            again.outputs.iter().for_each(|output| home.cache.verify(output).unwrap());
        }
    }
}

#[test]
fn a_lost_part_is_damage_and_an_evicted_artifact_is_none() {
    let (home, entry) = home();
    let things = things(&home, &entry);
    fs::remove_file(&things[4].1).unwrap();
    assert_eq!(scrub(&home.cache, false).damage, []);
    fs::remove_file(&things[3].1).unwrap();
    let found = scrub(&home.cache, true).damage;
    assert_eq!((found.len(), &found[0].path), (1, &things[2].1));
    assert!(found[0].what.contains("is missing"), "{}", found[0].what);
    assert_eq!(scrub(&home.cache, false).damage, []);
}

#[test]
fn swapped_and_strange_things() {
    let (home, entry) = home();
    let digest = |port: &str| home.cache.object(&output(&entry, port).digest);
    let (file, dir) = (digest("a"), digest("d"));
    let part = things(&home, &entry)[3].1.clone();
    fs::rename(&file, home.root().join("between")).unwrap();
    fs::rename(&part, &file).unwrap();
    fs::rename(home.root().join("between"), &part).unwrap();
    fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", dir.join("link")).unwrap();
    let found = scrub(&home.cache, true).damage;
    let paths: Vec<&PathBuf> = found.iter().map(|damage| &damage.path).collect();
    for path in [&file, &dir, &part] {
        assert!(paths.contains(&path), "{path:?} in {found:?}");
    }
    assert!(Path::new("/etc/passwd").exists());
    assert_eq!(scrub(&home.cache, false).damage, []);
}

#[test]
fn an_index_made_anew_knows_what_the_old_one_knew() {
    let (home, entry) = home();
    home.drop_index();
    let cache = home.reopened();
    let text = entry.key.to_string();
    let path = home.root().join("entries").join(&text[..2]).join(&text);
    let then = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    fs::File::open(&path).unwrap().set_modified(then).unwrap();
    let made = cache.reindex().unwrap().unwrap();
    assert_eq!((made.entries, made.damaged), (1, 0));
    assert_eq!(cache.uses(), [(entry.key, 1_000_000_000, 1.5)], "never used, as far as is known");
    assert!(cache.lookup(&entry.key).unwrap().is_some());
    cache.flush_index();
    let used = cache.uses()[0].1;
    assert!(used > 1_000_000_000);
    cache.reindex().unwrap().unwrap();
    assert_eq!(cache.uses()[0].1, used);
    scribble(&path, b"damaged");
    let made = cache.reindex().unwrap().unwrap();
    assert_eq!((made.entries, made.damaged, cache.take_reports().len()), (0, 1, 1));
    fs::remove_file(&path).unwrap();
    assert_eq!(cache.uses(), []);
}
