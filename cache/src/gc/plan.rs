//! What goes and why, from facts and a policy alone. Touches no disk and no clock.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};
use std::path::PathBuf;
use std::time::Duration;

use crate::digest::{Digest, Key};

/// Under which name bytes of artifacts lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Name {
    Recipe(Digest),
    Object(Digest),
}

/// A file or directory of the store.
#[derive(Debug, Clone)]
pub struct Blob {
    pub name: Name,
    pub bytes: u64,
    /// Since it got its name.
    pub age: Duration,
    /// Whether a recipe names it.
    pub part: bool,
}

/// A result, as far as its bytes go.
#[derive(Debug, Clone)]
pub struct Product {
    pub key: Key,
    pub step: String,
    pub stage: String,
    /// What making it again takes.
    pub seconds: f64,
    /// Since its last use.
    pub idle: Duration,
    /// Of its artifacts and its log, wherever else they are needed.
    pub bytes: u64,
    /// Of those that are there, every byte of them.
    pub here: u64,
    /// Those of its blobs that are there, each once, as places in [`Facts::blobs`].
    pub blobs: Vec<usize>,
    /// The pin and the runs that keep it, by reason and id.
    pub roots: Vec<Root>,
    /// What its artifacts and its log are.
    pub artifacts: Vec<Digest>,
    /// Whether a process or an attempt uses one of those.
    pub in_use: bool,
    /// Evidence of another result for the same key, in this file: nothing needs its bytes.
    pub evidence: Option<PathBuf>,
}

/// Why a result stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Root {
    Pin(String),
    Run(String),
}

/// What keeps bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Keeper {
    Pin,
    Run,
    /// A process that uses them.
    Lease,
    /// An attempt that works, or has finished and is not published.
    Attempt,
}

/// A process or an attempt that uses blobs.
#[derive(Debug, Clone)]
pub struct Holder {
    pub by: Keeper,
    /// Of an attempt that nobody works on: its place in [`Facts::trials`].
    pub trial: Option<usize>,
    /// For people.
    pub who: String,
    pub blobs: Vec<usize>,
}

/// An attempt that nobody works on: its directory with its checkpoints.
#[derive(Debug, Clone)]
pub struct Trial {
    pub key: Key,
    pub dir: PathBuf,
    pub bytes: u64,
    /// Since something in it changed.
    pub idle: Duration,
    /// Whether it came to an end and can be published.
    pub finished: bool,
    /// Whether its key has a younger result.
    pub superseded: bool,
}

/// The record of a run that is no root.
#[derive(Debug, Clone)]
pub struct Record {
    pub dir: PathBuf,
    pub bytes: u64,
    /// Since something in it changed.
    pub idle: Duration,
}

/// All that is decided by.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    pub blobs: Vec<Blob>,
    pub products: Vec<Product>,
    pub holders: Vec<Holder>,
    pub trials: Vec<Trial>,
    pub records: Vec<Record>,
    /// Bytes of what is not collected: entries, index, records of kept runs, work in progress.
    pub rest: u64,
    /// How many keepers of each kind there are.
    pub keepers: Vec<(Keeper, usize)>,
    /// Files and bytes of each directory beside objects and recipes; attempts and runs count as
    /// one each.
    pub dirs: BTreeMap<String, (usize, u64)>,
}

/// What is wanted.
#[derive(Debug, Clone)]
pub struct Policy {
    /// How many bytes the whole cache may have.
    pub max_size: Option<u64>,
    /// Results that are no roots and were not used for so long go, and records of runs.
    pub older_than: Option<Duration>,
    /// Checkpoints of attempts that nobody works on go after so long.
    pub attempts_older_than: Duration,
    /// What nothing names stays for so long.
    pub grace: Duration,
    /// Whether entries go with results that are too old.
    pub forget: bool,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            max_size: None,
            older_than: None,
            attempts_older_than: Duration::from_secs(14 * 86_400),
            grace: Duration::from_secs(3600),
            forget: false,
        }
    }
}

/// Why something goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Why {
    /// Nothing names it.
    Orphan,
    /// It was not used for long.
    Age,
    /// There is too much.
    Size,
}

/// A result whose bytes go.
#[derive(Debug, Clone, PartialEq)]
pub struct Eviction {
    /// Its place in [`Facts::products`].
    pub product: usize,
    pub why: Why,
    /// What goes with it: bytes it shares count to the last of those that share them.
    pub bytes: u64,
}

/// What a kind of keeper keeps; bytes kept by several count to the first of pin, run, lease,
/// attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct Keeping {
    pub by: Keeper,
    pub count: usize,
    pub bytes: u64,
}

/// What goes, by places in [`Facts`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    pub before: u64,
    pub after: u64,
    pub blobs: Vec<(usize, Why)>,
    pub evictions: Vec<Eviction>,
    /// Products whose entries (or evidence) go.
    pub forget: Vec<usize>,
    pub trials: Vec<usize>,
    pub records: Vec<usize>,
    pub kept: Vec<Keeping>,
    /// Bytes of what nothing names and is too young to go.
    pub young: u64,
    /// Bytes of attempts, records, entries and the like that stay.
    pub rest: u64,
}

impl Plan {
    /// Decides.
    pub fn new(facts: &Facts, policy: &Policy) -> Plan {
        let mut plan = Plan::default();
        plan.trials_and_records(facts, policy);
        let mut ledger = Ledger::new(facts, &plan.trials);
        plan.before = facts.rest
            + facts.blobs.iter().map(|b| b.bytes).sum::<u64>()
            + facts.trials.iter().map(|t| t.bytes).sum::<u64>()
            + facts.records.iter().map(|r| r.bytes).sum::<u64>();
        let gone = |list: &[usize], bytes: &dyn Fn(usize) -> u64| -> u64 {
            list.iter().map(|&i| bytes(i)).sum()
        };
        let freed = gone(&plan.trials, &|i| facts.trials[i].bytes)
            + gone(&plan.records, &|i| facts.records[i].bytes);
        ledger.total = plan.before - freed;
        let orphan = |i: &usize| ledger.keeper[*i].is_none() && ledger.users[*i].is_empty();
        let orphans: Vec<usize> = (0..facts.blobs.len()).filter(orphan).collect();
        let (old, young): (Vec<usize>, Vec<usize>) =
            orphans.into_iter().partition(|&i| facts.blobs[i].age >= policy.grace);
        plan.young = gone(&young, &|i| facts.blobs[i].bytes);
        ledger.total -= gone(&old, &|i| facts.blobs[i].bytes);
        let mut evicted = Vec::new();
        if let Some(limit) = policy.older_than {
            let aged = |p: &usize| ledger.free(*p) && facts.products[*p].idle >= limit;
            let aged: Vec<usize> = (0..facts.products.len()).filter(aged).collect();
            if policy.forget {
                let unused = |p: &&usize| !facts.products[**p].in_use;
                plan.forget = aged.iter().filter(unused).copied().collect();
            }
            aged.iter().for_each(|&p| ledger.evict(p));
            evicted.extend(aged.into_iter().map(|p| (p, Why::Age)));
        }
        if let Some(limit) = policy.max_size {
            let sized = ledger.shrink(limit);
            evicted.extend(sized.into_iter().map(|p| (p, Why::Size)));
        }
        plan.blobs = old.into_iter().map(|i| (i, Why::Orphan)).collect();
        plan.settle(facts, &ledger, &evicted);
        plan
    }

    /// How many bytes more than `limit` are left.
    pub fn over(&self, limit: u64) -> u64 {
        self.after.saturating_sub(limit)
    }

    fn trials_and_records(&mut self, facts: &Facts, policy: &Policy) {
        let spent = |t: &Trial| t.superseded || t.idle >= policy.attempts_older_than;
        self.trials = places(&facts.trials, spent);
        let spent = |r: &Record| policy.older_than.is_some_and(|limit| r.idle >= limit);
        self.records = places(&facts.records, spent);
        let bytes = |all: u64, gone: u64| all - gone;
        self.rest = facts.rest
            + bytes(
                facts.trials.iter().map(|t| t.bytes).sum(),
                self.trials.iter().map(|&i| facts.trials[i].bytes).sum(),
            )
            + bytes(
                facts.records.iter().map(|r| r.bytes).sum(),
                self.records.iter().map(|&i| facts.records[i].bytes).sum(),
            );
    }

    /// Turns results that are let go into blobs that go, and sums up what stays.
    fn settle(&mut self, facts: &Facts, ledger: &Ledger, evicted: &[(usize, Why)]) {
        let gone = |i: usize| ledger.keeper[i].is_none() && ledger.remaining[i] == 0;
        let mut told = vec![false; facts.blobs.len()];
        for &(product, why) in evicted.iter().rev() {
            let mut bytes = 0;
            let mut any = false;
            for &i in &facts.products[product].blobs {
                if gone(i) && !std::mem::replace(&mut told[i], true) {
                    bytes += facts.blobs[i].bytes;
                    any = true;
                    self.blobs.push((i, why));
                }
            }
            // What it shares with results that go later is counted there.
            if any || facts.products[product].blobs.iter().any(|&i| gone(i)) {
                self.evictions.push(Eviction { product, why, bytes });
            }
        }
        self.evictions.reverse();
        self.after = ledger.total;
        let mut bytes = [0; 4];
        for (i, keeper) in ledger.keeper.iter().enumerate() {
            if let Some(keeper) = keeper {
                bytes[*keeper as usize] += facts.blobs[i].bytes;
            }
        }
        let keeping = |&(by, count): &(Keeper, usize)| {
            let bytes = bytes[by as usize];
            (bytes > 0).then_some(Keeping { by, count, bytes })
        };
        self.kept = facts.keepers.iter().filter_map(keeping).collect();
    }
}

fn places<T>(items: &[T], wanted: impl Fn(&T) -> bool) -> Vec<usize> {
    items.iter().enumerate().filter(|(_, item)| wanted(item)).map(|(i, _)| i).collect()
}

/// Who needs which blob, and how many bytes there are, while results are let go.
struct Ledger<'a> {
    facts: &'a Facts,
    /// What keeps a blob whatever happens to results.
    keeper: Vec<Option<Keeper>>,
    /// Results without a root that name a blob.
    users: Vec<Vec<usize>>,
    /// How many of those are not let go.
    remaining: Vec<usize>,
    evicted: Vec<bool>,
    total: u64,
}

impl<'a> Ledger<'a> {
    fn new(facts: &'a Facts, trials_gone: &[usize]) -> Ledger<'a> {
        let mut ledger = Ledger {
            facts,
            keeper: vec![None; facts.blobs.len()],
            users: vec![Vec::new(); facts.blobs.len()],
            remaining: vec![0; facts.blobs.len()],
            evicted: vec![false; facts.products.len()],
            total: 0,
        };
        for holder in &facts.holders {
            if holder.trial.is_none_or(|trial| trials_gone.binary_search(&trial).is_err()) {
                holder.blobs.iter().for_each(|&blob| ledger.keep(blob, holder.by));
            }
        }
        for (p, product) in facts.products.iter().enumerate() {
            let pinned = product.roots.iter().any(|root| matches!(root, Root::Pin(_)));
            let keeper = if pinned { Keeper::Pin } else { Keeper::Run };
            for &i in &product.blobs {
                if product.roots.is_empty() {
                    ledger.users[i].push(p);
                    ledger.remaining[i] += 1;
                } else {
                    ledger.keep(i, keeper);
                }
            }
        }
        ledger
    }

    fn keep(&mut self, blob: usize, by: Keeper) {
        let keeper = &mut self.keeper[blob];
        *keeper = Some(keeper.map_or(by, |known| known.min(by)));
    }

    fn free(&self, product: usize) -> bool {
        self.facts.products[product].roots.is_empty()
    }

    fn evict(&mut self, product: usize) {
        self.evicted[product] = true;
        for &i in &self.facts.products[product].blobs {
            self.remaining[i] -= 1;
            if self.remaining[i] == 0 && self.keeper[i].is_none() {
                self.total -= self.facts.blobs[i].bytes;
            }
        }
    }

    fn restore(&mut self, product: usize) {
        self.total += self.price(product);
        self.evicted[product] = false;
        for &i in &self.facts.products[product].blobs {
            self.remaining[i] += 1;
        }
    }

    /// What is gone of a result that was let go.
    fn price(&self, product: usize) -> u64 {
        let gone = |i: &&usize| self.keeper[**i].is_none() && self.remaining[**i] == 0;
        let blobs = self.facts.products[product].blobs.iter();
        blobs.filter(gone).map(|&i| self.facts.blobs[i].bytes).sum()
    }

    /// Seconds lost for each byte won. Bytes that several results share count to each of them by
    /// its part: letting all of them go wins the bytes once. `None` when nothing is to be won.
    fn rate(&self, product: usize) -> Option<f64> {
        let product = &self.facts.products[product];
        let part = |&i: &usize| match self.keeper[i] {
            Some(_) => 0.0,
            None => self.facts.blobs[i].bytes as f64 / self.remaining[i] as f64,
        };
        let bytes: f64 = product.blobs.iter().map(part).sum();
        let seconds = if product.seconds > 0.0 { product.seconds } else { 0.0 };
        (bytes > 0.0).then_some(seconds / bytes)
    }

    fn cheap(&self, product: usize) -> Option<Cheap> {
        let idle = self.facts.products[product].idle;
        Some(Cheap { rate: self.rate(product)?, idle, product })
    }

    /// Lets results go, the cheapest first, until no more than `limit` bytes are left or nothing
    /// can go. Then takes back what need not have gone, the dearest first.
    fn shrink(&mut self, limit: u64) -> Vec<usize> {
        let candidate = |p: &usize| self.free(*p) && !self.evicted[*p];
        let products = (0..self.facts.products.len()).filter(candidate);
        let mut heap: BinaryHeap<Cheap> = products.filter_map(|p| self.cheap(p)).collect();
        let mut gone = Vec::new();
        while self.total > limit
            && let Some(Cheap { product, .. }) = heap.pop()
        {
            if self.evicted[product] {
                continue;
            }
            self.evict(product);
            gone.push(product);
            for &i in &self.facts.products[product].blobs {
                // What shares the blob is cheaper now. Not told each time, since a blob may have
                // very many users: a rate out of date is too high by less than two.
                if self.keeper[i].is_none() && self.remaining[i].is_power_of_two() {
                    let others = self.users[i].iter().filter(|&&p| !self.evicted[p]);
                    heap.extend(others.filter_map(|&p| self.cheap(p)));
                }
            }
        }
        for at in (0..gone.len()).rev() {
            if self.total + self.price(gone[at]) <= limit {
                self.restore(gone[at]);
            }
        }
        gone.retain(|&p| self.evicted[p]);
        gone
    }
}

/// A result by what letting it go costs; the greatest is the cheapest, of equals the longest idle.
#[derive(PartialEq)]
struct Cheap {
    rate: f64,
    idle: Duration,
    product: usize,
}

impl Eq for Cheap {}

impl Ord for Cheap {
    fn cmp(&self, other: &Cheap) -> Ordering {
        let rate = other.rate.total_cmp(&self.rate);
        rate.then(self.idle.cmp(&other.idle)).then(other.product.cmp(&self.product))
    }
}

impl PartialOrd for Cheap {
    fn partial_cmp(&self, other: &Cheap) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
