//! Every class of thing in a cache, harmed in every way: never served, nothing stops, and a repair
//! leaves a clean cache in which everything can be made again.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use cache::{Cache, Entry, Finished, Output, Pin, checkpoint};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use crate::gc::{all, gc};
use crate::support::*;

const HARMS: [&str; 10] =
    ["flip", "cut", "zero", "empty", "swap", "remove", "dir", "link", "loop", "fifo"];

/// A cache in which there are two of each class.
struct Place {
    home: Home,
    entries: [Entry; 2],
    finished: [Finished; 2],
}

const NAMES: [&str; 2] = ["one", "two"];

/// A file, a file of tensors and a directory.
fn make_all(cache: &Cache, name: &str) -> Entry {
    let attempt = cache.attempt(&key(name)).unwrap();
    let at = |port: &str| attempt.dir.join(port);
    fs::write(at("a"), format!("a plain file of {name}")).unwrap();
    fs::write(at("m"), tensors(name.as_bytes()[0], 7)).unwrap();
    fs::create_dir(at("d")).unwrap();
    fs::write(at("d/x"), format!("member of {name}")).unwrap();
    let outputs = ["a", "m", "d"].map(|port| attempt.absorb(port, None, port, at(port)).unwrap());
    let provenance = serde_json::json!({ "stage": "toy", "step": name, "seconds": 1.5 });
    let entry = Entry::new(preimage(name), outputs.to_vec(), None, provenance);
    drop(attempt);
    entry
}

impl Place {
    fn new() -> Place {
        let home = Home::new();
        let cache = &home.cache;
        let entries = NAMES.map(|name| {
            let entry = make_all(cache, name);
            publish(cache, &entry, false);
            let mut other = entry.clone();
            other.outputs.pop();
            publish(cache, &other, false);
            cache.attempts_clean(&entry.key).unwrap();
            cache.pin(&entry.key, "a test").unwrap();
            entry
        });
        let finished = NAMES.map(|name| {
            let attempt = cache.attempt(&key(&format!("unpublished {name}"))).unwrap();
            fs::write(attempt.dir.join("o"), format!("unpublished {name}")).unwrap();
            let outputs = vec![attempt.absorb("o", None, "o", attempt.dir.join("o")).unwrap()];
            let provenance = serde_json::json!({ "step": name });
            let made = Finished { outputs, log: None, provenance };
            attempt.finish(&made).unwrap();
            let other = cache.attempt(&key(&format!("begun {name}"))).unwrap();
            let fill = |dir: &Path| fs::write(dir.join("w"), format!("weights of {name}"));
            checkpoint::save(&other.checkpoints(), 7, fill).unwrap();
            made
        });
        cache.flush_index();
        Place { home, entries, finished }
    }

    /// Where the `which`th thing of each class is.
    fn things(&self, which: usize) -> Vec<(&'static str, PathBuf)> {
        let (cache, entry) = (&self.home.cache, &self.entries[which]);
        let (text, root) = (entry.key.to_string(), self.home.root());
        let digest = |port: &str| output(entry, port).digest;
        let part = cache.recipe(&digest("m")).unwrap().parts().nth(1).unwrap().digest;
        let only = |dir: PathBuf| fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
        let attempt = |name: &str| {
            only(root.join("attempts").join(key(&format!("{name} {}", NAMES[which])).to_string()))
        };
        vec![
            ("entry", root.join("entries").join(&text[..2]).join(&text)),
            ("evidence", only(root.join("divergences").join(&text))),
            ("recipe", cache.path(&digest("m"))),
            ("part", cache.object(&part)),
            ("object", cache.object(&digest("a"))),
            ("member", cache.object(&digest("d")).join("x")),
            ("pin", root.join("pins").join(&text)),
            ("attempt", attempt("unpublished").join("attempt.json")),
            ("checkpoint", attempt("begun").join("checkpoints/7/w")),
            ("seal", attempt("begun").join("checkpoints/7.seal")),
        ]
    }

    /// That nothing is served which is not what it was, and that nothing stops.
    fn look(&self, what: &str) {
        let cache = self.home.reopened();
        for (which, entry) in self.entries.iter().enumerate() {
            let found = cache.lookup(&entry.key).unwrap();
            assert!(found.is_none_or(|found| found == *entry), "{what}");
            for (at, output) in entry.outputs.iter().enumerate() {
                let served = cache.check(output).is_ok();
                assert!(!served || self.is_right(&cache, output), "{what}: output {at}");
                let _ =
                    (cache.present(output), cache.verify(output), cache.objects(&output.digest));
            }
            for found in cache.divergences(&entry.key) {
                assert_eq!(found.outputs.len(), 2, "{what}");
            }
            let unpublished = key(&format!("unpublished {}", NAMES[which]));
            let found = cache.finished(&unpublished);
            assert!(found.is_none_or(|found| found == self.finished[which]), "{what}");
            if let Some((_, dir)) =
                cache.checkpoint_latest(&key(&format!("begun {}", NAMES[which])))
            {
                let text = fs::read_to_string(dir.join("w")).unwrap();
                assert_eq!(text, format!("weights of {}", NAMES[which]), "{what}");
            }
        }
        let pins: Vec<Pin> = cache.pins().unwrap();
        let lost = what == "remove pin";
        assert_eq!(pins.len(), 2 - usize::from(lost), "{what}: a pin pins by its name");
        assert!(cache.inspector().unwrap().survey(&[], &[]).is_ok(), "{what}");
        assert!(cache.reindex().unwrap().is_some(), "{what}");
    }

    fn is_right(&self, cache: &Cache, output: &Output) -> bool {
        let to = self.home.dir.path().join("whole");
        let _ = fs::remove_file(&to);
        let path = cache.whole(output, || to.clone()).unwrap();
        cache::hash_path(path).unwrap().0 == output.digest
    }
}

/// Lets `f` change things in the directory of `path`.
fn in_dir(path: &Path, f: impl FnOnce()) {
    let dir = path.parent().unwrap();
    let mode = fs::metadata(dir).unwrap().permissions();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).unwrap();
    f();
    fs::set_permissions(dir, mode).unwrap();
}

fn harm(path: &Path, other: &Path, how: &str) {
    let aside = || path.ancestors().find(|p| p.ends_with("c")).unwrap().with_file_name("aside");
    let replace = |make: &dyn Fn()| {
        in_dir(path, || {
            fs::rename(path, aside()).unwrap();
            make();
        });
    };
    let edit = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = fs::read(path).unwrap();
        change(&mut bytes);
        in_dir(path, || scribble(path, &bytes));
    };
    match how {
        "flip" => edit(&|bytes| *bytes.last_mut().unwrap() ^= 1),
        "cut" => edit(&|bytes| bytes.truncate(bytes.len() - 1)),
        "zero" => edit(&|bytes| bytes.fill(0)),
        "empty" => edit(&|bytes| bytes.clear()),
        "remove" => replace(&|| {}),
        "dir" => replace(&|| {
            fs::create_dir(path).unwrap();
            fs::write(path.join("x"), "x").unwrap();
        }),
        "link" => replace(&|| symlink(aside(), path).unwrap()),
        "loop" => replace(&|| symlink(path.file_name().unwrap(), path).unwrap()),
        "fifo" => replace(&|| {
            mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        }),
        _ => in_dir(other, || {
            replace(&|| {
                fs::rename(other, path).unwrap();
                fs::rename(aside(), other).unwrap();
            });
        }),
    }
}

#[test]
fn every_harm_to_every_class_is_seen_and_repaired() {
    let classes = Place::new().things(0).len();
    for how in HARMS {
        for at in 0..classes {
            let place = Place::new();
            let (class, path) = place.things(0).swap_remove(at);
            let (_, other) = place.things(1).swap_remove(at);
            let what = format!("{how} {class}");
            harm(&path, &other, how);
            place.look(&what);
            let found = place.home.reopened().scrub(false, &|_, _| {}).unwrap().damage;
            // What is not there at all may have been collected, but for what others name.
            let gone =
                how == "remove" && !["part", "member", "checkpoint", "seal"].contains(&class);
            assert_eq!(found.is_empty(), gone, "{what}: {found:?}");
            let found = place.home.reopened().scrub(true, &|_, _| {}).unwrap().damage;
            assert!(found.iter().all(|damage| damage.repaired), "{what}: {found:?}");
            let found = place.home.reopened().scrub(true, &|_, _| {}).unwrap().damage;
            assert_eq!(found, [], "{what}");
            place.look(if gone { &what } else { "repaired" });
            // Made again, everything is what it was.
            let cache = place.home.reopened();
            for (name, entry) in NAMES.iter().zip(&place.entries) {
                let again = make_all(&cache, name);
                publish(&cache, &again, true);
                assert_eq!(&again.outputs, &entry.outputs, "{what}");
                again.outputs.iter().for_each(|output| cache.verify(output).unwrap());
            }
            gc(&cache, &[], &all());
            assert_eq!(cache.scrub(false, &|_, _| {}).unwrap().damage, [], "{what}");
        }
    }
}

#[test]
fn an_index_harmed_in_any_way_is_made_anew() {
    for how in HARMS {
        let place = Place::new();
        let database = |place: &Place| {
            let items = fs::read_dir(place.home.root().join("index")).unwrap();
            let mut paths: Vec<PathBuf> = items.map(|item| item.unwrap().path()).collect();
            paths.sort();
            paths.into_iter().find(|path| path.extension().is_some_and(|e| e == "sqlite")).unwrap()
        };
        let path = database(&place);
        // Nobody has it open any more, so that all of it is in one file.
        let Place { home, entries, finished } = place;
        let Home { dir, cache } = home;
        drop(cache);
        let other = dir.path().join("other");
        fs::write(&other, "SQLite format 3\0 of something else").unwrap();
        harm(&path, &other, how);
        let cache = Cache::open(dir.path().join("c")).unwrap();
        let place = Place { home: Home { dir, cache }, entries, finished };
        for entry in &place.entries {
            let found = place.home.cache.lookup(&entry.key).unwrap();
            assert_eq!(found.as_ref(), Some(entry), "{how}");
            entry.outputs.iter().for_each(|output| place.home.cache.check(output).unwrap());
        }
        let _ = place.home.cache.recent("toy", "one", 5);
        let _ = place.home.cache.reindex().unwrap();
        let cache = place.home.reopened();
        assert_eq!(cache.recent("toy", "one", 5).len(), 2, "{how}");
    }
}
