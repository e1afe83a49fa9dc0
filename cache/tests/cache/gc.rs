//! Garbage collection on a store: what stays, what goes, and what happens meanwhile.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use cache::gc::{Collected, Facts, KeptRun, Plan, Policy, Root};
use cache::{Attempt, Cache, Digest, Entry, Key, Published};

use crate::support::*;

/// Everything that can go.
pub fn all() -> Policy {
    Policy { max_size: Some(0), grace: Duration::ZERO, ..Policy::default() }
}

/// A whole collection.
pub fn gc(cache: &Cache, runs: &[KeptRun], policy: &Policy) -> (Facts, Plan, Collected) {
    let mut collector = cache.collector(|| {}).unwrap();
    let facts = collector.survey(runs, &[]).unwrap();
    let plan = Plan::new(&facts, policy);
    let done = collector.carry_out(&facts, &plan, &mut |_| {}).unwrap();
    (facts, plan, done)
}

fn here(cache: &Cache, entry: &Entry) -> bool {
    let all: Vec<bool> = entry.outputs.iter().map(|output| cache.present(output)).collect();
    assert!(all.iter().all(|there| *there == all[0]), "by half: {all:?}");
    all[0]
}

/// Publishes a file of tensors under `name`.
fn put_tensors(cache: &Cache, name: &str, bytes: &[u8]) -> Entry {
    let attempt = cache.attempt(&key(name)).unwrap();
    let entry = tensors_in(&attempt, name, bytes);
    publish(cache, &entry, false);
    drop(attempt);
    cache.attempts_clean(&entry.key).unwrap();
    entry
}

fn tensors_in(attempt: &Attempt, name: &str, bytes: &[u8]) -> Entry {
    let path = attempt.dir.join("m.safetensors");
    fs::write(&path, bytes).unwrap();
    let outputs = vec![attempt.absorb("model", None, "m.safetensors", &path).unwrap()];
    let provenance = serde_json::json!({ "stage": "toy", "step": name, "seconds": 1.0 });
    Entry::new(preimage(name), outputs, None, provenance)
}

/// Publishes and leaves nothing of the attempt.
fn put_clean(cache: &Cache, name: &str) -> Entry {
    let (entry, _) = put(cache, name, &format!("bytes of {name}"));
    cache.attempts_clean(&entry.key).unwrap();
    entry
}

fn run(id: &str, entries: &[&Entry]) -> KeptRun {
    KeptRun { id: id.into(), keys: entries.iter().map(|entry| entry.key).collect() }
}

fn objects(home: &Home) -> usize {
    let count = |dir: &str| -> usize {
        let shards = fs::read_dir(home.root().join(dir)).unwrap();
        shards.map(|shard| fs::read_dir(shard.unwrap().path()).unwrap().count()).sum()
    };
    count("objects") + count("recipes")
}

#[test]
fn pins_runs_and_leases_keep_and_the_rest_goes_but_for_its_entry() {
    let home = Home::new();
    let cache = &home.cache;
    let names = ["pinned", "kept", "leased", "free"];
    let entries = names.map(|name| put_clean(cache, name));
    cache.pin(&entries[0].key, "the paper's").unwrap();
    let lease = cache.lease("a test").unwrap();
    let digests: Vec<Digest> = entries[2].outputs.iter().map(|o| o.digest).collect();
    lease.hold(&digests).unwrap();
    let (facts, plan, done) = gc(cache, &[run("r1", &[&entries[1]])], &all());
    assert_eq!(entries.each_ref().map(|e| here(cache, e)), [true, true, true, false]);
    let free = facts.products.iter().find(|p| p.step == "free").unwrap();
    assert_eq!(
        (free.here, free.bytes, done.bytes, done.spared),
        (free.bytes, free.bytes, free.bytes, 0)
    );
    assert_eq!(plan.after, plan.before - free.bytes);
    let pinned = facts.products.iter().find(|p| p.step == "pinned").unwrap();
    assert_eq!(pinned.roots, [Root::Pin("the paper's".into())]);
    assert_eq!(home.reopened().lookup(&entries[3].key).unwrap().as_ref(), Some(&entries[3]));

    drop(lease);
    assert!(cache.unpin(&entries[0].key).unwrap());
    assert!(!cache.unpin(&entries[0].key).unwrap());
    gc(cache, &[], &all());
    assert!(entries.iter().all(|entry| !here(cache, entry)));
    assert_eq!(objects(&home), 0);
    assert_eq!(cache.entries().unwrap().count(), 4);
    let (again, outcome) = put(cache, "free", "bytes of free");
    assert_eq!((again.outputs, outcome), (entries[3].outputs.clone(), Published::Same));
    assert!(here(cache, &entries[3]), "made again, for the entry that was there");
}

#[test]
fn what_is_looked_at_only_stays() {
    let home = Home::new();
    let entry = put_clean(&home.cache, "one");
    let mut inspector = home.cache.inspector().unwrap();
    let facts = inspector.survey(&[], &[]).unwrap();
    let plan = Plan::new(&facts, &all());
    assert_eq!(plan.evictions.len(), 1);
    let removal = std::panic::AssertUnwindSafe(|| inspector.carry_out(&facts, &plan, &mut |_| {}));
    assert!(std::panic::catch_unwind(removal).is_err());
    assert!(here(&home.cache, &entry));
}

#[test]
fn shared_tensors_stay_with_any_that_need_them() {
    let home = Home::new();
    let cache = &home.cache;
    let one = put_tensors(cache, "one", &tensors(1, 9));
    let two = put_tensors(cache, "two", &tensors(2, 9));
    let before = objects(&home);
    let (facts, ..) = gc(cache, &[run("r", &[&two])], &all());
    assert_eq!(facts.blobs.iter().filter(|blob| blob.part).count(), 6);
    assert_eq!(before - objects(&home), 3, "a recipe and two tensors");
    assert!(!here(cache, &one));
    cache.verify(&two.outputs[0]).unwrap();
    gc(cache, &[], &all());
    assert_eq!(objects(&home), 0);
    assert_eq!(put_tensors(cache, "one", &tensors(1, 9)).outputs, one.outputs);
    cache.verify(&one.outputs[0]).unwrap();
}

#[test]
fn attempts_keep_what_they_absorbed_while_they_work_and_when_they_have_finished() {
    let home = Home::new();
    let cache = &home.cache;
    let attempt = cache.attempt(&key("work")).unwrap();
    let entry = tensors_in(&attempt, "work", &tensors(1, 2));
    gc(cache, &[], &all());
    cache.verify(&entry.outputs[0]).unwrap();
    let (finished, made) = make(cache, "done", "bytes");
    drop((attempt, finished));
    let (facts, ..) = gc(cache, &[], &all());
    assert!(!here(cache, &entry), "nobody works on it and it is not finished");
    assert!(here(cache, &made));
    assert!(cache.finished(&key("done")).is_some());
    assert_eq!(facts.trials.iter().filter(|trial| trial.finished).count(), 1);
    let late = Policy { attempts_older_than: Duration::ZERO, ..all() };
    let (.., done) = gc(cache, &[], &late);
    assert_eq!((done.trials, objects(&home)), (2, 0), "its time is over");
    assert_eq!(fs::read_dir(home.root().join("attempts")).unwrap().count(), 0);
}

#[test]
fn every_part_is_noted_before_there_is_a_recipe_that_names_it() {
    let home = Home::new();
    let attempt = home.cache.attempt(&key("work")).unwrap();
    const N: usize = 9 << 20;
    let header = format!(
        r#"{{"a":{{"dtype":"U8","shape":[{N}],"data_offsets":[0,{N}]}},"b":{{"dtype":"U8","shape":[{N}],"data_offsets":[{N},{}]}}}}"#,
        2 * N
    );
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend((0..2 * N).map(|at| (at >> 12) as u8));
    for bytes in [bytes, tensors(1, 2)] {
        let whole = tensors_in(&attempt, "work", &bytes).outputs[0].digest;
        let notes = fs::read_to_string(attempt.dir.join("holds")).unwrap();
        let at = |digest: &Digest| notes.find(&digest.to_string()).expect("noted");
        let parts: Vec<Digest> =
            home.cache.recipe(&whole).unwrap().parts().map(|part| part.digest).collect();
        assert!(parts.len() >= 3 && parts.iter().all(|part| at(part) < at(&whole)));
    }
}

#[test]
fn an_attempt_at_work_keeps_the_checkpoints_of_its_key() {
    let home = Home::new();
    let cache = &home.cache;
    let seal = |attempt: &Attempt, at: u64| {
        fs::create_dir_all(attempt.checkpoints()).unwrap();
        let fill = |dir: &std::path::Path| fs::write(dir.join("w"), "x");
        cache::checkpoint::save(&attempt.checkpoints(), at, fill).unwrap()
    };
    let killed = cache.attempt(&key("one")).unwrap();
    seal(&killed, 7);
    drop(killed);
    let late = Policy { attempts_older_than: Duration::ZERO, ..all() };
    let works = cache.attempt(&key("one")).unwrap();
    assert_eq!(gc(cache, &[], &late).2.trials, 0);
    assert_eq!(cache.checkpoint_latest(&key("one")).unwrap().0, 7);
    drop(works);
    assert_eq!(gc(cache, &[], &Policy::default()).2.trials, 0, "they are young");
    assert_eq!(gc(cache, &[], &late).2.trials, 2);
    assert_eq!(cache.checkpoint_latest(&key("one")), None);
    // Older than the result of its key: nobody will go on from it.
    let (killed, entry) = make(cache, "two", "bytes");
    drop(killed);
    std::thread::sleep(Duration::from_millis(30));
    publish(cache, &entry, false);
    assert_eq!(gc(cache, &[run("r", &[&entry])], &Policy::default()).2.trials, 1);
    assert!(here(cache, &entry));
}

#[test]
fn what_nothing_names_goes_after_a_grace() {
    let home = Home::new();
    let cache = &home.cache;
    let attempt = cache.attempt(&key("one")).unwrap();
    let entry = tensors_in(&attempt, "one", &tensors(1, 2));
    drop(attempt);
    let mut policy = Policy::default();
    let (_, plan, done) = gc(cache, &[], &policy);
    assert!(plan.young > 60_000 && done.blobs == 0 && here(cache, &entry));
    policy.grace = Duration::ZERO;
    gc(cache, &[], &policy);
    assert_eq!(objects(&home), 0);
}

#[test]
fn age_is_known_without_an_index_and_entries_are_forgotten_if_asked() {
    let home = Home::new();
    let cache = &home.cache;
    let entries = ["old", "used", "pinned"].map(|name| put_clean(cache, name));
    cache.pin(&entries[2].key, "").unwrap();
    for entry in &entries {
        age(&home, &entry.key, 40);
    }
    home.drop_index();
    let cache = home.reopened();
    cache.rebuild();
    assert!(cache.lookup(&entries[1].key).unwrap().is_some());
    cache.flush_index();
    let limit = Duration::from_secs(30 * 86_400);
    let mut policy = Policy { older_than: Some(limit), ..Policy::default() };
    let idle = |facts: &Facts, name: &str| {
        facts.products.iter().find(|p| p.step == name).unwrap().idle.as_secs() / 86_400
    };
    let (facts, ..) = gc(&cache, &[], &policy);
    assert_eq!(["old", "used", "pinned"].map(|name| idle(&facts, name)), [40, 0, 40]);
    assert_eq!(entries.each_ref().map(|e| here(&cache, e)), [false, true, true]);
    assert_eq!(cache.entries().unwrap().count(), 3);
    policy.forget = true;
    assert_eq!(gc(&cache, &[], &policy).2.entries, 1);
    assert_eq!(cache.lookup(&entries[0].key).unwrap(), None);
    assert_eq!(cache.uses().len(), 2);
}

/// Makes the entry's file so many days old.
fn age(home: &Home, key: &Key, days: u64) {
    let text = key.to_string();
    let path = home.root().join("entries").join(&text[..2]).join(&text);
    let then = std::time::SystemTime::now() - Duration::from_secs(days * 86_400);
    // Opened for reading: an entry is read-only, and its times are its owner's to set.
    fs::File::open(path).unwrap().set_modified(then).unwrap();
}

#[test]
fn evidence_keeps_its_bytes_until_there_is_too_much() {
    let home = Home::new();
    let cache = &home.cache;
    put_clean(cache, "one");
    let (other, outcome) = put(cache, "one", "other bytes");
    assert!(matches!(outcome, Published::Diverged { .. }));
    cache.attempts_clean(&other.key).unwrap();
    let policy = Policy { grace: Duration::ZERO, ..Policy::default() };
    gc(cache, &[], &policy);
    assert!(here(cache, &other));
    let first = cache.lookup(&other.key).unwrap().unwrap();
    gc(cache, &[run("r", &[&first])], &all());
    assert!(here(cache, &first) && !cache.present(output(&other, "model")));
    assert_eq!(cache.divergences(&other.key), [other]);
}

#[test]
fn damaged_entries_and_recipes_are_reported_and_keep_nothing() {
    let home = Home::new();
    let cache = &home.cache;
    let (one, two) = (put_clean(cache, "one"), put_tensors(cache, "two", &tensors(1, 2)));
    let text = one.key.to_string();
    scribble(&home.root().join("entries").join(&text[..2]).join(&text), b"x");
    scribble(&cache.path(&two.outputs[0].digest), b"x");
    let policy = Policy { grace: Duration::ZERO, ..Policy::default() };
    gc(cache, &[], &policy);
    assert!(!here(cache, &one) && !here(cache, &two));
    let reports = cache.take_reports();
    assert_eq!(reports.len(), 2, "{reports:?}");
}

#[test]
fn an_unreadable_store_stops_a_collection() {
    let home = Home::new();
    put_clean(&home.cache, "one");
    let text = key("one").to_string();
    let path = home.root().join("entries").join(&text[..2]);
    fs::remove_dir_all(&path).unwrap();
    // Listing it fails, whoever asks.
    std::os::unix::fs::symlink(&path, &path).unwrap();
    let mut collector = home.cache.collector(|| {}).unwrap();
    assert!(collector.survey(&[], &[]).is_err());
}

#[test]
fn records_and_what_is_told_of_directories() {
    let home = Home::new();
    let (entry, cache) = (put_clean(&home.cache, "one"), &home.cache);
    let record = |id: &str| -> PathBuf {
        let dir = cache.runs_dir().join(id);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("run.json"), "12345").unwrap();
        dir
    };
    let (old, new) = (record("a"), record("b"));
    let outside = home.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    let mut collector = cache.collector(|| {}).unwrap();
    let facts = collector.survey(&[run("b", &[&entry])], &[old.clone(), outside.clone()]).unwrap();
    assert_eq!((facts.records.len(), facts.records[0].bytes), (1, 5), "only of this cache");
    assert_eq!(facts.dirs["runs"], (2, 10));
    assert_eq!(facts.dirs["entries"].0, 1);
    let policy = Policy { older_than: Some(Duration::ZERO), ..Policy::default() };
    let plan = Plan::new(&facts, &policy);
    assert_eq!(collector.carry_out(&facts, &plan, &mut |_| {}).unwrap().records, 1);
    assert!(!old.exists() && new.exists() && outside.exists());
}

/// Between the survey and the removal.
#[test]
fn what_comes_into_use_meanwhile_is_spared() {
    let home = Home::new();
    let cache = &home.cache;
    let entries: Vec<Entry> = (0..6).map(|i| put_clean(cache, &i.to_string())).collect();
    let attempt = cache.attempt(&key("orphan")).unwrap();
    let orphan = tensors_in(&attempt, "orphan", &tensors(1, 2));
    drop(attempt);
    let other = home.reopened();
    let old_lease = other.lease("began before").unwrap();
    let mut collector = cache.collector(|| {}).unwrap();
    let facts = collector.survey(&[], &[]).unwrap();
    let policy = Policy { older_than: Some(Duration::ZERO), forget: true, ..all() };
    let plan = Plan::new(&facts, &policy);
    assert_eq!((plan.evictions.len(), plan.forget.len()), (6, 6));

    let digests =
        |entry: &Entry| -> Vec<Digest> { entry.outputs.iter().map(|o| o.digest).collect() };
    let new_lease = other.lease("began later").unwrap();
    old_lease.hold(&digests(&entries[0])).unwrap();
    new_lease.hold(&digests(&entries[1])).unwrap();
    drop(new_lease); // it may have made what is a root now
    other.pin(&entries[2].key, "just now").unwrap();
    // The same bytes made by an attempt, and published for another key.
    let (_held, _) = make(&other, "another", "bytes of 3");
    put_clean(&other, "4"); // the same again: an equal result, and nothing that holds it
    let again = put_tensors(&other, "new", &tensors(1, 2));
    assert_eq!(again.outputs, orphan.outputs);

    let done = collector.carry_out(&facts, &plan, &mut |_| {}).unwrap();
    let there: Vec<bool> =
        entries.iter().map(|entry| cache.present(output(entry, "model"))).collect();
    assert_eq!(there, [true, true, true, true, false, false]);
    cache.verify(&again.outputs[0]).unwrap();
    let known: Vec<bool> =
        entries.iter().map(|entry| cache.lookup(&entry.key).unwrap().is_some()).collect();
    assert_eq!(known, [true, true, true, true, false, false], "nor is it forgotten");
    assert_eq!(done.entries, 2);
    assert!(done.spared > 0);
}

#[test]
fn a_collection_waits_for_another() {
    let home = Home::new();
    let first = home.cache.collector(|| panic!("nobody else collects")).unwrap();
    let other = home.reopened();
    let (told, tells) = std::sync::mpsc::channel();
    let second = std::thread::spawn(move || other.collector(|| told.send(()).unwrap()).map(drop));
    tells.recv_timeout(Duration::from_secs(20)).unwrap();
    drop(first);
    second.join().unwrap().unwrap();
}
