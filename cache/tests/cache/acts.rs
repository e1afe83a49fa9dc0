//! What a process may do to a store, each act told to the log before and after.

use std::cell::Cell;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use cache::gc::Policy;
use cache::{Cache, Claimed, Digest, Entry, Kind, Lease, checkpoint};

use crate::story::*;
use crate::support::*;

/// A process at work on a store.
pub struct Actor {
    pub cache: Cache,
    pub log: Log,
    pub dice: Dice,
    lease: Lease,
    count: Cell<usize>,
}

impl Actor {
    pub fn new(cache: Cache, seed: u64) -> Actor {
        let (log, lease) = (Log::of(cache.root()), cache.lease("a test").unwrap());
        Actor { cache, log, dice: Dice(seed), lease, count: Cell::new(0) }
    }

    /// A word that nobody else uses.
    fn word(&self) -> String {
        self.count.set(self.count.get() + 1);
        format!("{}-{}", std::process::id(), self.count.get())
    }

    /// Runs a step.
    pub fn put(&mut self, name: &str, c: u8, replace: bool) {
        let act = format!("put {} {name} {c}", self.word());
        self.log.will(&act);
        let Claimed::Mine(claim) = self.cache.claim(&key(name), "a test").unwrap() else { return };
        let (attempt, entry) = make_content(&self.cache, name, c, Some(&self.lease));
        publish_all(&self.cache, &entry, Some(claim), Some(attempt), replace);
        self.log.did(&act);
    }

    /// Runs a step and ends before its result is published.
    pub fn leave(&mut self, name: &str, c: u8) {
        self.log.will(&format!("put {} {name} {c}", self.word()));
        let Claimed::Mine(_claim) = self.cache.claim(&key(name), "a test").unwrap() else { return };
        make_content(&self.cache, name, c, None);
    }

    /// Publishes what another left.
    pub fn adopt(&mut self, name: &str) {
        let Claimed::Mine(claim) = self.cache.claim(&key(name), "a test").unwrap() else { return };
        let Some(finished) = self.cache.finished(&key(name)) else { return };
        let cache::Finished { outputs, log, provenance } = finished;
        let entry = Entry::new(preimage(name), outputs, log, provenance);
        let c = content(&entry);
        let act = format!("put {} {name} {c}", self.word());
        self.log.will(&act);
        publish_all(&self.cache, &entry, Some(claim), None, false);
        self.log.did(&act);
    }

    /// Uses a result as a step's input: what is not there or not right is made again.
    pub fn read(&mut self, name: &str) {
        let Some(entry) = self.cache.lookup(&key(name)).unwrap() else { return };
        let output = &entry.outputs[0];
        self.lease.hold(&[output.digest]).unwrap();
        if !self.cache.present(output) {
            return self.put(name, content(&entry), false);
        }
        if self.cache.check(output).is_err() {
            assert!(Story::read(&self.log).damaged(&known(content(&entry)).1), "{name} is damaged");
            self.cache.discard(output).unwrap();
            return self.put(name, content(&entry), false);
        }
        if let Err(error) = self.cache.verify(output) {
            let c = content(&entry);
            assert!(Story::read(&self.log).damaged(&known(c).1), "{name} = {c}: {error}");
        }
    }

    pub fn train(&mut self, name: &str, position: u64) {
        let Claimed::Mine(_claim) = self.cache.claim(&key(name), "a test").unwrap() else { return };
        let attempt = self.cache.attempt(&key(name)).unwrap();
        let fill = |dir: &Path| {
            fs::create_dir(dir.join("deep"))?;
            fs::write(dir.join("deep/state"), position.to_string())
        };
        checkpoint::save(&attempt.checkpoints(), position, fill).unwrap();
        self.log.did(&format!("checkpoint {name} {position}"));
    }

    pub fn pin(&mut self, name: &str) {
        let word = self.word();
        self.log.will(&format!("pin {word} {name}"));
        self.cache.pin(&key(name), "soak").unwrap();
        self.log.did(&format!("pin {word} {name}"));
    }

    pub fn unpin(&mut self, name: &str) {
        let word = self.word();
        self.log.will(&format!("unpin {word} {name}"));
        self.cache.unpin(&key(name)).unwrap();
        self.log.did(&format!("unpin {word} {name}"));
    }

    pub fn gc(&mut self, policy: &Policy) {
        let word = self.word();
        let how = if policy.forget { "forget" } else { "keep" };
        self.log.will(&format!("gc {word} {how}"));
        collect(&self.cache, policy);
        self.log.did(&format!("gc {word}"));
    }

    /// One of the files of a result, and what they are called.
    fn victim(&mut self, name: &str) -> Option<(PathBuf, Kind)> {
        let entry = self.cache.lookup(&key(name)).unwrap()?;
        let mut paths = self.cache.objects(&entry.outputs[0].digest);
        paths.sort();
        let path = (!paths.is_empty()).then(|| paths[self.dice.below(paths.len())].clone())?;
        Some((path, entry.outputs[0].kind))
    }

    /// Removes bytes, as a careless hand would.
    pub fn lose(&mut self, name: &str) {
        let Some((path, _)) = self.victim(name) else { return };
        self.will_damage(&path);
        let _ = fs::rename(&path, self.cache.root().with_file_name(self.word()));
    }

    /// Turns a bit over where it lies, as a disk would.
    pub fn flip(&mut self, name: &str) {
        if let Some((path, kind)) = self.victim(name) {
            self.will_damage(&path);
            let path = if kind == Kind::Dir { path.join("deep/a") } else { path };
            let _ = flip(&path, self.dice.below(60_000) as u64);
        }
    }

    /// As [`Actor::flip`], of what says of which parts a file consists.
    pub fn flip_recipe(&mut self, name: &str) {
        let entry = self.cache.lookup(&key(name)).unwrap().unwrap();
        let path = self.cache.path(&entry.outputs[0].digest);
        self.will_damage(&path);
        flip(&path, 100).unwrap();
    }

    fn will_damage(&mut self, path: &Path) {
        let digest: Digest = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        self.log.will(&format!("damage {} {digest}", self.word()));
    }

    /// Spoils an entry's file.
    pub fn garble(&mut self, name: &str) {
        let word = self.word();
        self.log.will(&format!("garble {word} {name}"));
        let text = key(name).to_string();
        let path = self.cache.root().join("entries").join(&text[..2]).join(&text);
        let _ = flip(&path, self.dice.below(500) as u64);
        self.log.did(&format!("garble {word}"));
    }

    /// Any of the above.
    pub fn anything(&mut self) {
        let name = self.dice.pick(&NAMES);
        // Two contents a name.
        let at = NAMES.iter().position(|n| *n == name).unwrap();
        let c = ((at * 2 + self.dice.below(2)) % usize::from(CONTENTS)) as u8;
        match self.dice.below(100) {
            0..30 => self.put(name, c, false),
            30..36 => self.put(name, c, true),
            36..58 => self.read(name),
            58..62 => self.leave(name, c),
            62..66 => self.adopt(name),
            66..70 => {
                let position = self.dice.below(9) as u64;
                self.train(name, position);
            }
            70..74 => self.pin(name),
            74..76 => self.unpin(name),
            76..82 => {
                let policy = self.policy();
                self.gc(&policy);
            }
            82..86 => drop(self.cache.scrub(true, &|_, _| {}).unwrap()),
            86..88 => drop(self.cache.reindex().unwrap()),
            88..91 => self.lose(name),
            91..94 => self.flip(name),
            94..96 => self.garble(name),
            96..98 => drop_index(self.cache.root()),
            _ => self.lease = self.cache.lease("a test, again").unwrap(),
        }
    }

    pub fn policy(&mut self) -> Policy {
        let all = everything();
        match self.dice.below(4) {
            0 => all,
            1 => Policy { older_than: None, forget: false, ..all },
            2 => Policy { max_size: Some(150_000), older_than: None, forget: false, ..all },
            _ => Policy { max_size: None, grace: Duration::ZERO, ..Policy::default() },
        }
    }
}

/// Turns a bit of the file over, wherever it is; it stays the same file.
pub fn flip(path: &Path, at: u64) -> std::io::Result<()> {
    let meta = fs::metadata(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    let file = File::options().read(true).write(true).open(path)?;
    let (mut byte, at) = ([0], at % meta.len().max(1));
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ 4], at)?;
    // Two changes within one tick of the kernel's clock look alike.
    file.set_modified(SystemTime::now())?;
    fs::set_permissions(path, meta.permissions())
}
