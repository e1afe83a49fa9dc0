//! What processes say they will do and have done to a store, in one file that all append to, and
//! what must be true of the store afterwards, whoever was killed when.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use cache::gc::{Plan, Policy};
use cache::{
    Attempt, Cache, Claimed, Digest, Entry, Finished, Lease, Output, Publication, Published,
};
use serde_json::json;

use crate::support::*;

/// Contents are numbers below this.
pub const CONTENTS: u8 = 12;
/// Steps have these names.
pub const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// Puts content `c` away: a plain file, a directory, or a file of tensors that shares one.
pub fn absorb(attempt: &Attempt, c: u8) -> Output {
    let path = attempt.dir.join("made");
    match c % 3 {
        0 => fs::write(&path, format!("content {c} ").repeat(40)).unwrap(),
        1 => {
            fs::create_dir_all(path.join("deep")).unwrap();
            fs::write(path.join("deep/a"), format!("a of {c}")).unwrap();
            fs::write(path.join("b"), "b of all").unwrap();
        }
        _ => fs::write(&path, tensors(c, 9)).unwrap(),
    }
    attempt.absorb("o", None, "made", &path).unwrap()
}

/// The digest of content `c` and those of everything it consists of.
pub fn known(c: u8) -> (Digest, BTreeSet<Digest>) {
    type Known = HashMap<u8, (Digest, BTreeSet<Digest>)>;
    static KNOWN: LazyLock<Mutex<Known>> = LazyLock::new(Mutex::default);
    let mut known = KNOWN.lock().unwrap();
    let make = || {
        let home = Home::in_memory();
        let output = absorb(&home.cache.attempt(&key("x")).unwrap(), c);
        let recipe = home.cache.recipe(&output.digest);
        let parts = recipe.iter().flat_map(|r| r.parts()).map(|part| part.digest);
        (output.digest, parts.chain([output.digest]).collect())
    };
    known.entry(c).or_insert_with(make).clone()
}

/// Which content an entry has.
pub fn content(entry: &Entry) -> u8 {
    let digest = entry.outputs[0].digest;
    (0..CONTENTS).find(|&c| known(c).0 == digest).expect("one of ours")
}

/// An attempt at `name` that makes content `c` and a log.
pub fn make_content(cache: &Cache, name: &str, c: u8, lease: Option<&Lease>) -> (Attempt, Entry) {
    let attempt = cache.attempt(&key(name)).unwrap();
    let output = absorb(&attempt, c);
    if let Some(lease) = lease {
        lease.hold(&[output.digest]).unwrap();
    }
    let log = attempt.dir.join("log");
    fs::write(&log, format!("log of {name}")).unwrap();
    let log = Some(attempt.absorb_log(&log).unwrap());
    let provenance = json!({ "stage": "toy", "step": name, "seconds": f64::from(c) });
    let finished = Finished { outputs: vec![output], log, provenance };
    attempt.finish(&finished).unwrap();
    let entry = Entry::new(preimage(name), finished.outputs, log, finished.provenance);
    (attempt, entry)
}

/// Set where processes keep what is left of an attempt for other keys, as a run does, instead of
/// removing it.
pub const PARK: &str = "CACHE_TEST_PARK";

/// Publishes with the claim and the attempt, as a run does, and tidies up.
pub fn publish_all(
    cache: &Cache,
    entry: &Entry,
    claim: Option<cache::Claim>,
    attempt: Option<Attempt>,
    replace: bool,
) -> Published {
    let seen = std::sync::Arc::new(Mutex::new(Vec::new()));
    let sink = seen.clone();
    let committer = cache.committer(move |done| sink.lock().unwrap().extend(done));
    let (key, entry) = (entry.key, entry.clone());
    committer.publish(Publication { key, entry, claim, attempt, replace }).unwrap();
    committer.flush().unwrap();
    let (_, outcome) = seen.lock().unwrap().pop().unwrap();
    match std::env::var_os(PARK) {
        Some(_) => cache.attempts_park(&key),
        None => cache.attempts_clean(&key).unwrap(),
    }
    outcome
}

pub fn everything() -> Policy {
    let none = Duration::ZERO;
    let all = Policy { max_size: Some(0), grace: none, ..Policy::default() };
    Policy { older_than: Some(none), attempts_older_than: none, forget: true, ..all }
}

pub fn collect(cache: &Cache, policy: &Policy) {
    let mut collector = cache.collector(|| {}).unwrap();
    let records = [cache.runs_dir().join("old")];
    let facts = collector.survey(&[], &records).unwrap();
    let plan = Plan::new(&facts, policy);
    collector.carry_out(&facts, &plan, &mut |_| {}).unwrap();
}

/// The file beside a store that processes append to.
#[derive(Clone)]
pub struct Log(PathBuf);

impl Log {
    pub fn of(root: &Path) -> Log {
        Log(root.with_file_name("log"))
    }

    pub fn will(&self, what: &str) {
        self.append(&format!("will {what}\n"));
    }

    pub fn did(&self, what: &str) {
        self.append(&format!("did {what}\n"));
    }

    fn append(&self, line: &str) {
        let mut options = fs::File::options();
        options
            .append(true)
            .create(true)
            .open(&self.0)
            .unwrap()
            .write_all(line.as_bytes())
            .unwrap();
    }

    pub fn read(&self) -> String {
        fs::read_to_string(&self.0).unwrap_or_default()
    }
}

/// What a log tells.
pub struct Story(Vec<Vec<String>>);

impl Story {
    pub fn read(log: &Log) -> Story {
        Story(log.read().lines().map(|l| l.split(' ').map(String::from).collect()).collect())
    }

    fn all<'a>(
        &'a self,
        words: &'a [&str],
    ) -> impl DoubleEndedIterator<Item = (usize, &'a [String])> {
        let like = |line: &[String]| {
            line.len() >= words.len() && words.iter().zip(line).all(|(w, l)| *w == "_" || w == l)
        };
        self.0.iter().enumerate().map(|(i, l)| (i, &l[..])).filter(move |(_, line)| like(line))
    }

    /// When the last of those acts began that have come to their ends. What an act does it may have
    /// done at once or at its end, so others that overlap it come before or after it.
    fn begun(&self, what: &str, name: &str) -> Option<usize> {
        let ended = ["did", what, "_", name];
        let start = |line: &[String]| self.all(&["will", what, &line[2]]).next().map(|(i, _)| i);
        self.all(&ended).filter_map(|(_, line)| start(line)).max()
    }

    fn last(&self, words: &[&str]) -> Option<usize> {
        self.all(words).next_back().map(|(i, _)| i)
    }

    /// Whether something of this kind was under way at line `i` or began after it. The third word
    /// of a line is the same when an act begins and when it ends.
    fn after(&self, words: &[&str], i: usize) -> bool {
        self.all(words).any(|(j, line)| j > i || !self.ended(line, i))
    }

    fn ended(&self, line: &[String], before: usize) -> bool {
        self.all(&["did", &line[1], &line[2]]).any(|(k, _)| k < before)
    }

    /// Whether `name` has a durable entry that nobody may have taken away.
    pub fn entry_is_sure(&self, name: &str) -> bool {
        self.begun("put", name).is_some_and(|i| {
            !self.after(&["will", "gc", "_", "forget"], i)
                && !self.after(&["will", "garble", "_", name], i)
        })
    }

    pub fn damaged(&self, digests: &BTreeSet<Digest>) -> bool {
        self.all(&["will", "damage"]).any(|(_, line)| {
            line.last().and_then(|word| word.parse().ok()).is_some_and(|d| digests.contains(&d))
        })
    }

    /// Whether the bytes of content `c` must be there, as `name` has it.
    pub fn bytes_are_sure(&self, name: &str, c: u8) -> bool {
        if self.damaged(&known(c).1) {
            return false;
        }
        if self.last(&["will", "gc"]).is_none() {
            return true;
        }
        let c = c.to_string();
        self.pinned(name) == Some(true)
            && self.last(&["did", "pin", "_", name]).is_some_and(|pinned| {
                self.all(&["will", "put", "_", name, &c]).all(|(i, _)| i > pinned)
            })
    }

    /// Whether `name` is pinned, when that is sure.
    pub fn pinned(&self, name: &str) -> Option<bool> {
        let sure = |did: &str, undo: &str| {
            let begun = self.begun(did, name)?;
            (!self.after(&["will", undo, "_", name], begun)).then_some(())
        };
        match (sure("pin", "unpin"), sure("unpin", "pin")) {
            (Some(()), _) => Some(true),
            (None, Some(())) => Some(false),
            (None, None) => None,
        }
    }

    fn contents(&self, name: &str) -> BTreeSet<u8> {
        self.all(&["will", "put", "_", name]).map(|(_, line)| line[4].parse().unwrap()).collect()
    }

    /// Positions of checkpoints that nobody may have taken away.
    fn checkpoint(&self, name: &str) -> Option<u64> {
        let quiet = |words: &[&str]| self.last(words).is_none();
        let sure = quiet(&["will", "gc"]) && quiet(&["will", "put", "_", name]);
        let words = ["did", "checkpoint", name];
        sure.then(|| self.all(&words).map(|(_, line)| line[3].parse().unwrap()).max()).flatten()
    }
}

/// What must be true, whatever happened; then everything is used again, and must be right.
pub fn judge(cache: &Cache, log: &Log) {
    let story = Story::read(log);
    let pins: BTreeMap<_, _> = cache.pins().unwrap().into_iter().map(|p| (p.key, p)).collect();
    for name in NAMES {
        let key = key(name);
        let found = cache.lookup(&key).unwrap();
        assert_eq!(cache.reader().lookup(&key).unwrap(), found, "{name}");
        assert!(found.is_some() || !story.entry_is_sure(name), "the entry of {name} is lost");
        if let Some(entry) = &found {
            judge_entry(cache, &story, name, entry);
        }
        let pin = pins.get(&key);
        let pinned = story.pinned(name);
        assert!(pinned.is_none_or(|p| p == pin.is_some()), "{name}: {pinned:?}, {pin:?}");
        assert!(pin.is_none_or(|pin| pin.reason == "soak"), "{name}: {pin:?}");
        let checkpoint = cache.checkpoint_latest(&key);
        let sure = story.checkpoint(name);
        assert!(checkpoint.as_ref().map(|c| c.0) >= sure, "{name}: {checkpoint:?}, {sure:?}");
        if let Some((position, dir)) = checkpoint {
            let text = fs::read_to_string(dir.join("deep/state")).unwrap();
            assert_eq!(text, position.to_string(), "{name}: a checkpoint is not whole");
        }
        if let Some(finished) = cache.finished(&key) {
            finished.outputs.iter().for_each(|output| cache.verify(output).unwrap());
            assert!(finished.log.is_none_or(|(digest, _)| cache.read(&digest).is_ok()));
        }
    }
    make_good(cache);
}

fn judge_entry(cache: &Cache, story: &Story, name: &str, entry: &Entry) {
    let c = content(entry);
    let said = story.contents(name);
    assert!(said.contains(&c), "{name} has {c}, said were {said:?}");
    let output = &entry.outputs[0];
    let right = cache.verify(output);
    if story.bytes_are_sure(name, c) {
        assert!(right.is_ok(), "bytes of {name} = {c} are lost: {right:?}");
    }
    // What is wrong is found before it is used.
    let check = cache.check(output);
    assert!(right.is_ok() || check.is_err(), "{name} = {c} would be served: {right:?}");
    assert!(right.is_err() || check.is_ok(), "{name} = {c}: {check:?}");
}

/// Nothing by hand: each step can be run, everything damaged repaired, everything collected.
fn make_good(cache: &Cache) {
    for (c, name) in (0..).zip(NAMES) {
        let Claimed::Mine(claim) = cache.claim(&key(name), "judge").unwrap() else {
            panic!("somebody holds {name}")
        };
        let found = cache.lookup(&key(name)).unwrap();
        if let Some(entry) = found.filter(|e| cache.check(&e.outputs[0]).is_err()) {
            cache.discard(&entry.outputs[0]).unwrap();
        }
        let (attempt, entry) = make_content(cache, name, c, None);
        publish_all(cache, &entry, Some(claim), Some(attempt), true);
        assert_eq!(cache.lookup(&key(name)).unwrap().as_ref(), Some(&entry));
        cache.verify(&entry.outputs[0]).unwrap();
        cache.check(&entry.outputs[0]).unwrap();
        assert_eq!(cache.read(&entry.log.unwrap().0).unwrap(), format!("log of {name}").as_bytes());
        cache.pin(&key(name), "soak").unwrap();
    }
    cache.scrub(true, &|_, _| {}).unwrap();
    assert_eq!(cache.scrub(false, &|_, _| {}).unwrap().damage, []);
    let made = cache.reindex().unwrap().unwrap();
    assert_eq!((made.entries, made.damaged), (NAMES.len(), 0));
    collect(cache, &everything());
    let count = |dir: &str| fs::read_dir(cache.root().join(dir)).unwrap().count();
    assert_eq!(["attempts", "leases", "runs", "trash"].map(count), [0; 4]);
    for name in NAMES {
        let entry = cache.lookup(&key(name)).unwrap().expect("it is pinned");
        cache.verify(&entry.outputs[0]).unwrap();
    }
}

/// Splitmix64: a seed gives the whole course.
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

/// `PIPE_SOAK`, or what CI does.
pub fn soak(default: usize) -> usize {
    std::env::var("PIPE_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(default)
}
