//! Random sequences of operations against plain maps: what each key has, and what each object is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use cache::gc::Policy;
use cache::{Attempt, Cache, Claimed, Digest, Entry, Finished, Lease, Published};
use proptest::prelude::*;
use serde_json::json;

use crate::acts::flip;
use crate::loss::POINTS;
use crate::story::{NAMES, absorb, collect, everything, known, publish_all};
use crate::support::*;

const KEYS: u8 = 4;
const CONTENTS: u8 = 6;

/// What a process may be killed in the middle of.
#[derive(Debug, Clone, Copy)]
enum Deed {
    Put { name: u8, c: u8, replace: bool },
    Leave { name: u8, c: u8 },
    Gc { policy: u8 },
    Repair,
    Pin { name: u8 },
}

#[derive(Debug, Clone)]
enum Op {
    Do(Deed),
    Killed { deed: Deed, point: usize, times: u8 },
    Adopt { name: u8 },
    Use { name: u8 },
    Unpin { name: u8 },
    Hold { c: u8 },
    Release,
    Lose { name: u8, at: u8 },
    Flip { name: u8, at: u8, bit: u16 },
    Garble { name: u8, bit: u16 },
    Verify,
    Reindex,
    Reopen,
    DropIndex,
    ScribbleIndex,
}

fn deed() -> impl Strategy<Value = Deed> {
    let (name, c) = (0..KEYS, 0..CONTENTS);
    prop_oneof![
        6 => (name.clone(), c.clone(), prop::bool::weighted(0.2))
            .prop_map(|(name, c, replace)| Deed::Put { name, c, replace }),
        1 => (name.clone(), c).prop_map(|(name, c)| Deed::Leave { name, c }),
        2 => (0u8..5).prop_map(|policy| Deed::Gc { policy }),
        1 => Just(Deed::Repair),
        1 => name.prop_map(|name| Deed::Pin { name }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let name = 0..KEYS;
    prop_oneof![
        24 => deed().prop_map(Op::Do),
        2 => (deed(), 0..POINTS.len(), 1u8..4)
            .prop_map(|(deed, point, times)| Op::Killed { deed, point, times }),
        1 => name.clone().prop_map(|name| Op::Adopt { name }),
        6 => name.clone().prop_map(|name| Op::Use { name }),
        1 => name.clone().prop_map(|name| Op::Unpin { name }),
        2 => (0..CONTENTS).prop_map(|c| Op::Hold { c }),
        1 => Just(Op::Release),
        2 => (name.clone(), any::<u8>()).prop_map(|(name, at)| Op::Lose { name, at }),
        2 => (name.clone(), any::<u8>(), any::<u16>())
            .prop_map(|(name, at, bit)| Op::Flip { name, at, bit }),
        2 => (name, any::<u16>()).prop_map(|(name, bit)| Op::Garble { name, bit }),
        1 => Just(Op::Verify),
        1 => Just(Op::Reindex),
        1 => Just(Op::Reopen),
        1 => Just(Op::DropIndex),
        1 => Just(Op::ScribbleIndex),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Blob {
    Recipe(Digest),
    Object(Digest),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Right,
    Wrong,
}

/// The plain maps.
#[derive(Debug, Clone, Default)]
struct Map {
    /// Of each name its content, and whether its entry can be read.
    entries: BTreeMap<u8, (u8, bool)>,
    /// Those that are there.
    blobs: BTreeMap<Blob, State>,
    pins: BTreeSet<u8>,
    /// Contents of finished attempts that were not published, the newest last.
    left: BTreeMap<u8, Vec<u8>>,
    /// Contents that differ from the entry's.
    evidence: BTreeSet<(u8, u8)>,
    held: Vec<u8>,
}

/// Of what content `c` consists.
fn blobs(c: u8) -> Vec<Blob> {
    let (digest, all) = known(c);
    match all.len() {
        1 => vec![Blob::Object(digest)],
        _ => {
            let parts = all.into_iter().filter(|part| *part != digest).map(Blob::Object);
            [Blob::Recipe(digest)].into_iter().chain(parts).collect()
        }
    }
}

impl Map {
    fn right(&self, c: u8) -> bool {
        blobs(c).iter().all(|blob| self.blobs.get(blob) == Some(&State::Right))
    }

    /// By names and sizes, which no damage here changes; a recipe is always read.
    fn present(&self, c: u8) -> bool {
        blobs(c).iter().all(|blob| match blob {
            Blob::Recipe(_) => self.blobs.get(blob) == Some(&State::Right),
            Blob::Object(_) => self.blobs.contains_key(blob),
        })
    }

    /// Names of the bytes of `c`, as far as they can be known.
    fn names(&self, c: u8) -> Vec<Blob> {
        let all = blobs(c);
        let known = self.blobs.get(&all[0]) == Some(&State::Right);
        if known || all.len() == 1 { all } else { all[..1].to_vec() }
    }

    fn outcome(&self, name: u8, c: u8, replace: bool) -> &'static str {
        match self.entries.get(&name) {
            None => "New",
            Some((old, readable)) if replace || !readable || !self.present(*old) => "Replaced",
            Some((old, _)) if *old == c => "Same",
            Some(_) => "Diverged",
        }
    }

    fn made(&mut self, c: u8) {
        self.blobs.extend(blobs(c).into_iter().map(|blob| (blob, State::Right)));
    }

    fn published(&mut self, name: u8, c: u8, replace: bool) -> &'static str {
        let outcome = self.outcome(name, c, replace);
        match outcome {
            "Diverged" => drop(self.evidence.insert((name, c))),
            _ => drop(self.entries.insert(name, (c, true))),
        }
        self.left.remove(&name);
        outcome
    }

    fn deed(&mut self, deed: Deed) {
        match deed {
            Deed::Put { name, c, replace } => {
                self.made(c);
                self.published(name, c, replace);
            }
            Deed::Leave { name, c } => {
                self.made(c);
                self.left.entry(name).or_default().push(c);
            }
            Deed::Gc { policy } => self.gc(policy),
            Deed::Repair => self.repair(),
            Deed::Pin { name } => drop(self.pins.insert(name)),
        }
    }

    fn rooted(&self, policy: u8) -> BTreeSet<Blob> {
        let pinned = self.pins.iter().filter_map(|name| self.entries.get(name));
        let pinned = pinned.filter(|(_, readable)| *readable).map(|(c, _)| *c);
        let named = pinned.chain(self.held.iter().copied()).flat_map(|c| self.names(c));
        // An attempt notes each part.
        let left = self.left.values().flatten().filter(|_| policy != 0).flat_map(|c| blobs(*c));
        named.chain(left).collect()
    }

    fn gc(&mut self, policy: u8) {
        let mut keep = self.rooted(policy);
        let named = self.entries.values().filter(|(_, readable)| *readable).map(|(c, _)| *c);
        let named = named.chain(self.evidence.iter().map(|(_, c)| *c));
        if policy > 1 {
            keep.extend(named.flat_map(|c| self.names(c)));
        }
        if policy == 0 {
            let used = self.left.values().flatten().chain(&self.held);
            let used: BTreeSet<u8> = used.copied().collect();
            let (pins, held) = (self.pins.clone(), |c: &u8| used.contains(c));
            self.entries.retain(|name, (c, readable)| !*readable || pins.contains(name) || held(c));
            self.evidence.retain(|(_, c)| held(c));
            self.left.clear();
        }
        if policy != 4 {
            self.blobs.retain(|blob, _| keep.contains(blob));
        }
    }

    fn incomplete(&self) -> Vec<Blob> {
        let lacks = |c: &u8| {
            let all = blobs(*c);
            all.len() > 1
                && self.blobs.get(&all[0]) == Some(&State::Right)
                && !all.iter().all(|blob| self.blobs.contains_key(blob))
        };
        (0..CONTENTS).filter(lacks).map(|c| blobs(c)[0]).collect()
    }

    fn repair(&mut self) {
        self.entries.retain(|_, (_, readable)| *readable);
        self.blobs.retain(|_, state| *state == State::Right);
        for recipe in self.incomplete() {
            self.blobs.remove(&recipe);
        }
    }

    fn damage(&self) -> usize {
        self.entries.values().filter(|(_, readable)| !readable).count()
            + self.blobs.values().filter(|state| **state == State::Wrong).count()
    }
}

fn policy(policy: u8) -> Policy {
    let all = everything();
    match policy {
        0 => all,
        1 => Policy {
            older_than: None,
            forget: false,
            attempts_older_than: Duration::from_secs(86_400),
            ..all
        },
        // What nothing names.
        2 | 3 => Policy { grace: Duration::ZERO, ..Policy::default() },
        _ => Policy::default(),
    }
}

fn name_of(name: u8) -> &'static str {
    NAMES[usize::from(name)]
}

fn key_of(name: u8) -> cache::Key {
    key(name_of(name))
}

fn attempt(cache: &Cache, name: u8, c: u8) -> (Attempt, Entry) {
    let attempt = cache.attempt(&key_of(name)).unwrap();
    let outputs = vec![absorb(&attempt, c)];
    let provenance = json!({ "stage": "toy", "step": name_of(name), "seconds": f64::from(c) });
    let finished = Finished { outputs, log: None, provenance };
    attempt.finish(&finished).unwrap();
    let entry = Entry::new(preimage(name_of(name)), finished.outputs, None, finished.provenance);
    (attempt, entry)
}

/// Does it for real; of a put what became of it.
fn carry_out(cache: &Cache, deed: Deed) -> Option<Published> {
    match deed {
        Deed::Put { name, c, replace } => {
            let Claimed::Mine(claim) = cache.claim(&key_of(name), "a test").unwrap() else {
                panic!("the claim is free")
            };
            let (attempt, entry) = attempt(cache, name, c);
            return Some(publish_all(cache, &entry, Some(claim), Some(attempt), replace));
        }
        Deed::Leave { name, c } => drop(attempt(cache, name, c)),
        Deed::Gc { policy: of } => collect(cache, &policy(of)),
        Deed::Repair => drop(cache.scrub(true, &|_, _| {}).unwrap()),
        Deed::Pin { name } => drop(cache.pin(&key_of(name), "a test").unwrap()),
    }
    None
}

/// Run as a child, to be killed: one deed, by its numbers.
#[test]
fn child_does_one() {
    let Some(cache) = as_child() else { return };
    let text = std::env::var("CACHE_TEST_DEED").unwrap();
    let n: Vec<u8> = text.split(' ').map(|word| word.parse().unwrap()).collect();
    let deed = match n[0] {
        0 => Deed::Put { name: n[1], c: n[2], replace: n[3] == 1 },
        1 => Deed::Leave { name: n[1], c: n[2] },
        2 => Deed::Gc { policy: n[1] },
        3 => Deed::Repair,
        _ => Deed::Pin { name: n[1] },
    };
    carry_out(&cache, deed);
}

fn numbers(deed: Deed) -> String {
    match deed {
        Deed::Put { name, c, replace } => format!("0 {name} {c} {}", u8::from(replace)),
        Deed::Leave { name, c } => format!("1 {name} {c}"),
        Deed::Gc { policy } => format!("2 {policy}"),
        Deed::Repair => "3".into(),
        Deed::Pin { name } => format!("4 {name}"),
    }
}

struct World {
    home: Home,
    cache: Cache,
    map: Map,
    leases: Vec<Lease>,
}

impl World {
    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Do(deed) => self.deed(deed),
            Op::Killed { deed, point, times } => self.killed(deed, POINTS[point], times),
            Op::Adopt { name } => self.adopt(name),
            Op::Use { name } => self.use_one(name),
            Op::Unpin { name } => {
                assert_eq!(self.cache.unpin(&key_of(name)).unwrap(), self.map.pins.remove(&name));
            }
            Op::Hold { c } => {
                let lease = self.cache.lease("a test").unwrap();
                lease.hold(&[known(c).0]).unwrap();
                self.leases.push(lease);
                self.map.held.push(c);
            }
            Op::Release => {
                self.leases.pop();
                self.map.held.pop();
            }
            Op::Lose { name, at } => {
                if let Some(blob) = self.victim(name, at) {
                    match blob {
                        Blob::Object(digest) => lose(&self.cache, &digest),
                        Blob::Recipe(_) => fs::remove_file(self.path(&blob)).unwrap(),
                    }
                    self.map.blobs.remove(&blob);
                }
            }
            Op::Flip { name, at, bit } => {
                if let Some(blob) = self.victim(name, at) {
                    let path = self.path(&blob);
                    let path = if path.is_dir() { path.join("deep/a") } else { path };
                    flip(&path, bit.into()).unwrap();
                    self.map.blobs.insert(blob, State::Wrong);
                }
            }
            Op::Garble { name, bit } => {
                if let Some((_, readable @ true)) = self.map.entries.get_mut(&name) {
                    let text = key_of(name).to_string();
                    let path = self.home.root().join("entries").join(&text[..2]).join(&text);
                    flip(&path, bit.into()).unwrap();
                    *readable = false;
                }
            }
            Op::Verify => {
                let found = self.cache.scrub(false, &|_, _| {}).unwrap();
                let expected = self.map.damage() + self.map.incomplete().len();
                assert_eq!(found.damage.len(), expected, "{:?}", found.damage);
            }
            Op::Reindex => {
                // A handle whose index was deleted has none any more.
                self.cache = self.home.reopened();
                let made = self.cache.reindex().unwrap().unwrap();
                let all = self.map.entries.values();
                let readable = all.filter(|(_, readable)| *readable).count();
                let damaged = self.map.entries.len() - readable;
                assert_eq!((made.entries, made.damaged), (readable, damaged));
            }
            Op::Reopen => self.cache = self.home.reopened(),
            Op::DropIndex => self.home.drop_index(),
            Op::ScribbleIndex => {
                for item in fs::read_dir(self.cache.index_dir()).into_iter().flatten().flatten() {
                    fs::write(item.path(), "garbage".repeat(999)).unwrap();
                }
                self.cache = self.home.reopened();
            }
        }
    }

    fn deed(&mut self, deed: Deed) {
        let mut after = self.map.clone();
        after.deed(deed);
        let outcome = carry_out(&self.cache, deed);
        if let Deed::Put { name, c, replace } = deed {
            self.map.made(c);
            let expected = self.map.outcome(name, c, replace);
            let outcome = format!("{:?}", outcome.unwrap());
            assert!(outcome.starts_with(expected), "{outcome}, expected {expected}");
        }
        self.map = after;
    }

    /// Kills another process in the middle of it: everything is as before or as after.
    fn killed(&mut self, deed: Deed, point: &str, times: u8) {
        let mut child = child("model::child_does_one", &self.home.root());
        child.env("CACHE_TEST_DEED", numbers(deed));
        child.env("PIPE_CRASH_AT", format!("{point}@{times}"));
        child.status().unwrap();
        let before = self.map.clone();
        let mut after = before.clone();
        after.deed(deed);
        // Whatever was left is cleaned, as after the next success.
        for name in 0..KEYS {
            self.cache.attempts_clean(&key_of(name)).unwrap();
            self.map.left.remove(&name);
        }
        for c in 0..CONTENTS {
            for blob in blobs(c) {
                let is = self.is(&blob);
                let (old, new) = (before.blobs.get(&blob), after.blobs.get(&blob));
                let moved = is.is_none() && old == Some(&State::Wrong);
                assert!(moved || [old, new].contains(&is.as_ref()), "{blob:?}: {is:?}");
                match is {
                    Some(state) => drop(self.map.blobs.insert(blob, state)),
                    None => drop(self.map.blobs.remove(&blob)),
                }
            }
        }
        for name in 0..KEYS {
            let found = self.cache.lookup(&key_of(name)).unwrap();
            let found = found.map(|entry| entry.outputs[0].digest);
            let (old, new) = (before.entries.get(&name), after.entries.get(&name));
            let like = |e: Option<&(u8, bool)>| e.filter(|e| e.1).map(|e| known(e.0).0) == found;
            assert!(like(old) || like(new), "{name}: {found:?}");
            let text = key_of(name).to_string();
            let there = self.home.root().join("entries").join(&text[..2]).join(&text).exists();
            match (if like(new) { new } else { old }).filter(|_| there) {
                Some(entry) => drop(self.map.entries.insert(name, *entry)),
                None => drop(self.map.entries.remove(&name)),
            }
            let all = self.cache.divergences(&key_of(name));
            let seen = |c: &u8| all.iter().any(|entry| entry.outputs[0].digest == known(*c).0);
            self.map.evidence.retain(|(n, _)| *n != name);
            self.map.evidence.extend((0..CONTENTS).filter(seen).map(|c| (name, c)));
        }
        let pins: BTreeSet<_> = self.cache.pins().unwrap().iter().map(|pin| pin.key).collect();
        self.map.pins = (0..KEYS).filter(|name| pins.contains(&key_of(*name))).collect();
        assert!(self.map.pins == before.pins || self.map.pins == after.pins);
    }

    fn adopt(&mut self, name: u8) {
        let left = self.map.left.get(&name).cloned().unwrap_or_default();
        let expected = left.into_iter().rev().find(|c| self.map.right(*c));
        let found = self.cache.finished(&key_of(name));
        assert_eq!(found.as_ref().map(|f| f.outputs[0].digest), expected.map(|c| known(c).0));
        let (Some(c), Some(finished)) = (expected, found) else { return };
        let Finished { outputs, log, provenance } = finished;
        let entry = Entry::new(preimage(name_of(name)), outputs, log, provenance);
        let outcome = format!("{:?}", publish_all(&self.cache, &entry, None, None, false));
        let expected = self.map.published(name, c, false);
        assert!(outcome.starts_with(expected), "{outcome}, expected {expected}");
    }

    /// As a step that needs it as an input.
    fn use_one(&mut self, name: u8) {
        self.look(name);
        let Some(&(c, true)) = self.map.entries.get(&name) else { return };
        if self.map.right(c) {
            return;
        }
        let entry = self.cache.lookup(&key_of(name)).unwrap().unwrap();
        self.cache.discard(&entry.outputs[0]).unwrap();
        for blob in self.map.names(c) {
            if self.map.blobs.get(&blob) == Some(&State::Wrong) {
                self.map.blobs.remove(&blob);
                assert_eq!(self.is(&blob), None);
            }
        }
        self.deed(Deed::Put { name, c, replace: false });
        self.look(name);
    }

    fn look(&self, name: u8) {
        let key = key_of(name);
        let found = self.cache.lookup(&key).unwrap();
        assert_eq!(self.cache.reader().lookup(&key).unwrap(), found);
        let expected = self.map.entries.get(&name).filter(|(_, readable)| *readable);
        let digest = found.as_ref().map(|entry| entry.outputs[0].digest);
        assert_eq!(digest, expected.map(|(c, _)| known(*c).0));
        if let (Some(entry), Some((c, _))) = (found, expected) {
            let output = &entry.outputs[0];
            assert_eq!(self.cache.present(output), self.map.present(*c));
            assert_eq!(self.cache.verify(output).is_ok(), self.map.right(*c));
            assert_eq!(self.cache.check(output).is_ok(), self.map.right(*c));
        }
    }

    /// One of the blobs of a result that is right.
    fn victim(&self, name: u8, at: u8) -> Option<Blob> {
        let (c, _) = self.map.entries.get(&name)?;
        let all = blobs(*c);
        let blob = all[usize::from(at) % all.len()];
        (self.map.blobs.get(&blob) == Some(&State::Right)).then_some(blob)
    }

    fn path(&self, blob: &Blob) -> PathBuf {
        let (dir, digest) = match blob {
            Blob::Recipe(digest) => ("recipes", digest.to_string()),
            Blob::Object(digest) => ("objects", digest.to_string()),
        };
        self.home.root().join(dir).join(&digest[..2]).join(&digest)
    }

    /// What is there, by reading it.
    fn is(&self, blob: &Blob) -> Option<State> {
        let path = self.path(blob);
        if !path.exists() {
            return None;
        }
        let right = match blob {
            Blob::Recipe(digest) => self.home.reopened().recipe(digest).is_some(),
            Blob::Object(digest) => cache::hash_path(&path).unwrap().0 == *digest,
        };
        Some(if right { State::Right } else { State::Wrong })
    }

    fn compare(&self) {
        for c in 0..CONTENTS {
            for blob in blobs(c) {
                assert_eq!(self.is(&blob), self.map.blobs.get(&blob).copied(), "{blob:?} of {c}");
            }
        }
        (0..KEYS).for_each(|name| self.look(name));
        let pins: BTreeSet<_> = self.cache.pins().unwrap().iter().map(|pin| pin.key).collect();
        assert_eq!(pins, self.map.pins.iter().map(|name| key_of(*name)).collect());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn behaves_as_a_map(ops in prop::collection::vec(op(), 1..24)) {
        let home = Home::in_memory();
        let cache = home.cache.clone();
        let mut world = World { home, cache, map: Map::default(), leases: Vec::new() };
        for op in &ops {
            world.apply(op);
        }
        world.compare();
        world.home.drop_index();
        world.cache = world.home.reopened();
        world.compare();
        world.deed(Deed::Repair);
        world.compare();
        let left = world.cache.scrub(false, &|_, _| {}).unwrap();
        prop_assert_eq!(left.damage, []);
    }
}

/// Few in CI; `PROPTEST_CASES` for a soak.
pub fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(24)
}
