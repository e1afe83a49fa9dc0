//! Runs frozen steps on a cluster: the leader writes an order into the attempt's directory and
//! submits a job; a node's agent runs it and leaves an exit record. Knows no plan.
//!
//! In reading order: [`batch`] (what is needed of a batch system) and `slurm/` (one of them),
//! `records` (what leader and node tell each other), `agent` and `pilot` (the node), `driver` with
//! `submit` and `watch` (the leader's thread), `journal` and `orphans` (what a dead leader left). Where
//! nodes see none of the leader's directories, `courier` and `node` carry the same records by a remote
//! (`desk`).

pub mod agent;
pub mod batch;
mod clerk;
mod courier;
mod desk;
mod driver;
pub mod export;
mod far;
pub mod journal;
pub mod node;
mod orphans;
pub mod pilot;
pub mod records;
mod saved;
mod settings;
pub mod slurm;
mod submit;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use cache::remote::Remote;
use cache::{Cache, Key};
use rustix::process::Signal;

use self::batch::{Batch, Shape};
use self::courier::Carrier;
use self::driver::{Command, Driver, Inbox};
use self::orphans::Orphan;
pub use self::settings::{Bytes, Duration, Mode, Settings, Store};
pub use self::slurm::script::{quoted as shell_word, script as job_script};
use crate::event::Failure;
use crate::pool::{Messages, Runner, Wanted};
use crate::wire::Order;

/// What a run on a cluster needs.
pub struct Setup {
    /// The batch system.
    pub batch: Box<dyn Batch>,
    /// What site and pipeline want.
    pub settings: Settings,
    /// The record of the run, where its dealings are kept.
    pub run: PathBuf,
    /// Id of the run.
    pub id: String,
    /// The binary that nodes run.
    pub program: PathBuf,
    /// Most tasks of an array.
    pub max_array: usize,
    /// Nodes there are.
    pub nodes: usize,
    /// Wall time of jobs that ask for none, in seconds.
    pub default_s: Option<u64>,
    /// Records of runs that may have left jobs; those that go on are passed over.
    pub earlier: Vec<PathBuf>,
    /// By what nodes are reached that see none of the leader's directories.
    pub remote: Option<Remote>,
}

/// The leader's side of a cluster: a handle on the thread that does the work.
pub struct Cluster {
    inbox: Sender<Inbox>,
    thread: Option<JoinHandle<()>>,
    orphans: HashMap<Key, Orphan>,
    store: PathBuf,
    next: u64,
    wanted: HashMap<u64, Wish>,
    /// Memory is doubled as often for a key.
    doubled: HashMap<Key, u32>,
}

/// What was said of a step before its order.
struct Wish {
    shape: Shape,
    pilot: bool,
}

impl Cluster {
    /// Starts the thread; asks once for what earlier leaders left.
    ///
    /// # Errors
    /// When the record of the run cannot be written to.
    pub fn start(
        mut setup: Setup,
        cache: &Cache,
        build: &str,
        messages: Messages,
    ) -> io::Result<Cluster> {
        let carrier = setup.remote.as_ref().map(|remote| Carrier::new(cache, remote));
        let orphans = orphans::find(&setup.earlier, cache, carrier.as_ref(), setup.batch.as_mut());
        let (inbox, driver) = Driver::new(setup, cache.root(), carrier, build, messages)?;
        let thread = std::thread::Builder::new().name("cluster".into()).spawn(|| driver.run())?;
        let store = cache.root().to_path_buf();
        let (wanted, doubled) = (HashMap::new(), HashMap::new());
        Ok(Cluster { inbox, thread: Some(thread), orphans, store, next: 0, wanted, doubled })
    }

    fn send(&self, command: Command) -> io::Result<()> {
        let gone = |_| io::Error::from(io::ErrorKind::NotConnected);
        self.inbox.send(Inbox::Command(command)).map_err(gone)
    }

    fn end(&mut self, leave: bool) {
        let Some(thread) = self.thread.take() else { return };
        let _ = self.send(Command::Close { leave });
        let _ = thread.join();
    }
}

impl Runner for Cluster {
    fn take(&mut self, wanted: &Wanted<'_>, _log: &Path) -> io::Result<u64> {
        let id = self.next;
        self.next += 1;
        let mut shape = wanted.shape.clone();
        let times = self.doubled.get(&wanted.key).copied().unwrap_or(0);
        shape.memory = shape.memory.saturating_mul(1 << times);
        self.wanted.insert(id, Wish { shape, pilot: wanted.pilot });
        Ok(id)
    }

    fn order(&mut self, worker: u64, order: &Order) -> io::Result<()> {
        match order {
            Order::Cancel => self.send(Command::Stop(worker)),
            Order::Run { .. } => {
                let Some(wish) = self.wanted.remove(&worker) else {
                    return Err(io::ErrorKind::NotConnected.into());
                };
                let Wish { shape, pilot } = wish;
                self.send(Command::Run { worker, order: Box::new(order.clone()), shape, pilot })
            }
        }
    }

    fn give_back(&mut self, _worker: u64) {}

    fn throw_away(&mut self, worker: u64, _gone: bool) -> Option<Signal> {
        self.wanted.remove(&worker);
        let _ = self.send(Command::Drop(worker));
        None
    }

    fn evict(&mut self, _uuid: &str) -> bool {
        false
    }

    fn resume(&mut self, key: &Key) -> Option<(u64, PathBuf)> {
        let orphan = self.orphans.remove(key)?;
        let dir = records::dir_of(&self.store, &orphan.attempt)?;
        if !orphan.goes_on(&dir) {
            return None;
        }
        let id = self.next;
        self.next += 1;
        self.send(Command::Attach { worker: id, orphan }).ok()?;
        Some((id, dir))
    }

    fn saved(&self, key: &Key) -> Option<u64> {
        saved::newest(&self.store, key).map(|saved| saved.position)
    }

    fn failed(&mut self, key: &Key, failure: Failure) {
        if failure == Failure::OutOfMemory {
            *self.doubled.entry(*key).or_default() += 1;
        }
    }

    fn leave(&mut self) {
        self.end(true);
    }

    fn close(&mut self) {
        self.end(false);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.end(false);
    }
}
