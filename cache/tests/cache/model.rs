//! Random sequences of operations against a plain map.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use cache::{Cache, Digest, Published};
use proptest::prelude::*;

use crate::support::*;

#[derive(Debug, Clone)]
enum Op {
    Put {
        name: u8,
        text: u8,
        replace: bool,
    },
    /// A process is killed in an attempt, after it has absorbed or after it has finished.
    Leave {
        name: u8,
        text: u8,
        finished: bool,
    },
    Lookup {
        name: u8,
    },
    LoseBytes {
        name: u8,
    },
    Garble {
        name: u8,
        at: u16,
    },
    Reopen,
    DropIndex,
    ScribbleIndex,
    Reindex,
    Pin {
        name: u8,
    },
    Unpin {
        name: u8,
    },
    Gc {
        forget: bool,
    },
    Repair,
}

fn op() -> impl Strategy<Value = Op> {
    let name = 0u8..4;
    prop_oneof![
        6 => (name.clone(), 0u8..3, prop::bool::weighted(0.2))
            .prop_map(|(name, text, replace)| Op::Put { name, text, replace }),
        4 => name.clone().prop_map(|name| Op::Lookup { name }),
        1 => name.clone().prop_map(|name| Op::LoseBytes { name }),
        1 => (name, any::<u16>()).prop_map(|(name, at)| Op::Garble { name, at }),
        1 => Just(Op::Reopen),
        1 => Just(Op::DropIndex),
        1 => Just(Op::ScribbleIndex),
        1 => Just(Op::Reindex),
        1 => (0u8..4, 0u8..3, any::<bool>())
            .prop_map(|(name, text, finished)| Op::Leave { name, text, finished }),
        1 => (0u8..4).prop_map(|name| Op::Pin { name }),
        1 => (0u8..4).prop_map(|name| Op::Unpin { name }),
        2 => prop::bool::weighted(0.3).prop_map(|forget| Op::Gc { forget }),
        1 => Just(Op::Repair),
    ]
}

/// What the map knows of a name: its text, and whether its entry and its bytes are right.
#[derive(Debug, Clone)]
struct Known {
    text: u8,
    readable: bool,
}

struct World {
    home: Home,
    cache: Cache,
    map: BTreeMap<u8, Known>,
    /// Texts whose bytes are in the store.
    there: BTreeSet<u8>,
    pins: BTreeSet<u8>,
    /// Texts of finished attempts that were not published, by name.
    left: BTreeSet<(u8, u8)>,
}

impl World {
    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Put { name, text, replace } => self.put(name, text, replace),
            Op::Lookup { name } => self.lookup(name),
            Op::LoseBytes { name } => {
                if let Some(known) = self.map.get(&name)
                    && self.there.remove(&known.text)
                {
                    lose(&self.cache, &Digest::of(content(known.text).as_bytes()));
                }
            }
            Op::Garble { name, at } => self.garble(name, at),
            Op::Reopen => self.cache = self.home.reopened(),
            Op::DropIndex => self.home.drop_index(),
            Op::Reindex => {
                // Another process, which an index that was deleted meanwhile is no trouble for.
                let made = self.home.reopened().reindex().unwrap().unwrap();
                let damaged = self.map.values().filter(|known| !known.readable).count();
                assert_eq!((made.entries + damaged, made.damaged), (self.map.len(), damaged));
            }
            Op::Leave { name, text, finished } => self.leave(name, text, finished),
            Op::Pin { name } => {
                let new = self.cache.pin(&key(&name.to_string()), "a test").unwrap();
                assert_eq!(new, self.pins.insert(name));
            }
            Op::Unpin { name } => {
                let was = self.cache.unpin(&key(&name.to_string())).unwrap();
                assert_eq!(was, self.pins.remove(&name));
            }
            Op::Gc { forget } => self.gc(forget),
            Op::Repair => self.repair(),
            Op::ScribbleIndex => {
                for item in fs::read_dir(self.cache.index_dir()).into_iter().flatten().flatten() {
                    fs::write(item.path(), "garbage".repeat(999)).unwrap();
                }
                self.cache = self.home.reopened();
            }
        }
    }

    fn put(&mut self, name: u8, text: u8, replace: bool) {
        let (attempt, entry) = make(&self.cache, &name.to_string(), &content(text));
        self.there.insert(text);
        let outcome = publish(&self.cache, &entry, replace);
        drop(attempt);
        self.cache.attempts_clean(&entry.key).unwrap();
        self.left.retain(|(other, _)| *other != name);
        let expected = match self.map.get(&name) {
            None => Published::New,
            Some(known) if replace || !known.readable || !self.there.contains(&known.text) => {
                Published::Replaced
            }
            Some(known) if known.text == text => Published::Same,
            Some(known) => {
                let Published::Diverged { kept } = outcome else { panic!("{outcome:?}") };
                assert_eq!(read(&self.cache, output(&kept, "model")), content(known.text));
                return;
            }
        };
        assert_eq!(outcome, expected);
        self.map.insert(name, Known { text, readable: true });
    }

    fn leave(&mut self, name: u8, text: u8, finished: bool) {
        let (attempt, _) = make(&self.cache, &name.to_string(), &content(text));
        if finished {
            self.left.insert((name, text));
        } else {
            fs::remove_file(attempt.dir.join("attempt.json")).unwrap();
        }
        self.there.insert(text);
    }

    fn gc(&mut self, forget: bool) {
        let mut policy = crate::gc::all();
        if forget {
            policy.forget = true;
            policy.older_than = Some(std::time::Duration::ZERO);
        }
        let (_, plan, done) = crate::gc::gc(&self.cache, &[], &policy);
        assert_eq!((done.spared, plan.before - plan.after), (0, done.bytes));
        let pinned = |name: &u8, known: &Known| self.pins.contains(name) && known.readable;
        let kept = self.map.iter().filter(|(name, known)| pinned(name, known));
        let mut needed: BTreeSet<u8> = kept.map(|(_, known)| known.text).collect();
        let in_use: BTreeSet<u8> = self.left.iter().map(|(_, text)| *text).collect();
        needed.extend(&in_use);
        self.there.retain(|text| needed.contains(text));
        if forget {
            let pins = &self.pins;
            self.map.retain(|name, known| {
                pins.contains(name) || !known.readable || in_use.contains(&known.text)
            });
        }
    }

    fn repair(&mut self) {
        let all = self.cache.scrub(true, &|_, _| {}).unwrap();
        let damaged = self.map.values().filter(|known| !known.readable).count();
        assert_eq!(all.damage.len(), damaged, "{:?}", all.damage);
        self.map.retain(|_, known| known.readable);
        assert_eq!(all.entries, self.map.len());
    }

    fn lookup(&self, name: u8) {
        let key = key(&name.to_string());
        let found = self.cache.lookup(&key).unwrap();
        assert_eq!(self.cache.reader().lookup(&key).unwrap(), found);
        let expected = self.map.get(&name).filter(|known| known.readable);
        assert_eq!(found.is_some(), expected.is_some());
        if let (Some(entry), Some(known)) = (found, expected) {
            let model = output(&entry, "model");
            assert_eq!(model.digest, Digest::of(content(known.text).as_bytes()));
            let whole = self.there.contains(&known.text);
            assert_eq!(self.cache.verify(model).is_ok(), whole);
            assert_eq!(self.cache.present(model), whole);
        }
    }

    fn garble(&mut self, name: u8, at: u16) {
        let Some(known) = self.map.get_mut(&name) else { return };
        let text = key(&name.to_string()).to_string();
        let path = self.home.root().join("entries").join(&text[..2]).join(&text);
        let mut bytes = fs::read(&path).unwrap();
        let at = at as usize % bytes.len();
        bytes[at] = bytes[at].wrapping_add(1);
        scribble(&path, &bytes);
        known.readable = false;
    }
}

fn content(text: u8) -> String {
    format!("content {text}")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn behaves_as_a_map(ops in prop::collection::vec(op(), 1..14)) {
        let home = Home::new();
        let cache = home.cache.clone();
        let mut world = World { home, cache, map: BTreeMap::new(), there: BTreeSet::new(), pins: BTreeSet::new(), left: BTreeSet::new() };
        for op in &ops {
            world.apply(op);
        }
        for name in 0..4 {
            world.lookup(name);
        }
        world.home.drop_index();
        world.cache = world.home.reopened();
        for name in 0..4 {
            world.lookup(name);
        }
    }
}

/// Few in CI; `PROPTEST_CASES` for a soak.
pub fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(24)
}
