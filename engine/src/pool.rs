//! The leader's workers: spawned when needed, kept warm per kind, thrown away after a failure.
//!
//! Knows processes and sockets; knows no steps and no schedule.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::time::Duration;

use cache::{Cache, Key};
use rustix::process::Signal;

use crate::cluster::batch::Shape;
use crate::cluster::{self, Cluster};
use crate::descendants;
use crate::early::{self, Early};
use crate::event::Failure;
use crate::stage::Registry;
use crate::wire::{self, Answer, Order};
use crate::worker;

/// How workers come to life.
pub enum Launcher {
    /// Child processes of this very binary (`/proc/self/exe`, so that a rebuild in mid-run swaps
    /// nothing), with these arguments followed by the store's path.
    Processes {
        /// Such as `["worker"]`.
        args: Vec<String>,
        /// One that was started before it was known what for, with the same arguments.
        early: Option<Early>,
    },
    /// Threads of this process: for tests of the engine alone.
    Threads(Registry),
}

/// Who is to run the steps of a run.
pub enum Crew {
    /// Workers of this machine.
    Local(Launcher),
    /// Jobs of a cluster.
    Cluster(Box<cluster::Setup>),
}

impl Crew {
    /// Those who run the steps; their messages go to `messages`.
    ///
    /// # Errors
    /// When what a cluster needs cannot be written.
    pub fn start(
        self,
        cache: &Cache,
        build: &str,
        messages: Messages,
    ) -> io::Result<Box<dyn Runner>> {
        Ok(match self {
            Crew::Local(launcher) => Box::new(Pool::new(launcher, cache, build, messages)),
            Crew::Cluster(setup) => Box::new(Cluster::start(*setup, cache, build, messages)?),
        })
    }
}

/// Who runs frozen steps, and says what became of them by [`Messages`]: workers of this machine
/// ([`Pool`]), or a cluster ([`Cluster`](crate::cluster::Cluster)).
pub trait Runner {
    /// Somebody for a step, by a number; what it prints before the step goes to `log`.
    ///
    /// # Errors
    /// Nobody can be had.
    fn take(&mut self, wanted: &Wanted<'_>, log: &Path) -> io::Result<u64>;
    /// Sends an order.
    ///
    /// # Errors
    /// Whom it is for is gone.
    fn order(&mut self, worker: u64, order: &Order) -> io::Result<()>;
    /// Takes a worker back after a success.
    fn give_back(&mut self, worker: u64);
    /// Ends a worker and its step. Of one that is `gone` by itself, tells the signal that ended it,
    /// if one did and that is known.
    fn throw_away(&mut self, worker: u64, gone: bool) -> Option<Signal>;
    /// Ends the idle worker that has the GPU, so that what it holds there is free. Tells whether
    /// there was one.
    fn evict(&mut self, uuid: &str) -> bool;
    /// Ends all.
    fn close(&mut self);
    /// Somebody who works at `key` for a leader that is gone, and the attempt's directory.
    fn resume(&mut self, _key: &Key) -> Option<(u64, PathBuf)> {
        None
    }
    /// How far the newest checkpoint of `key` is that is not in the cache, if there is one.
    fn saved(&self, _key: &Key) -> Option<u64> {
        None
    }
    /// A step failed in this way: more may be asked for when it is tried again.
    fn failed(&mut self, _key: &Key, _failure: Failure) {}
    /// Lets all go on without this leader.
    fn leave(&mut self) {}
}

/// What a step needs of whoever runs it.
pub struct Wanted<'a> {
    /// Of a local worker.
    pub kind: &'a Kind,
    /// Of a job.
    pub shape: Shape,
    /// Its key.
    pub key: Key,
    /// Whether it is better run by a pilot than by a job of its own.
    pub pilot: bool,
}

/// What distinguishes warm workers. One that has GPUs is the only one on them: what it holds there
/// is worth more than its number of threads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Without GPUs, for so many threads.
    Cpu(usize),
    /// Started with these GPUs, by UUID.
    Gpus(Vec<String>),
}

impl Kind {
    fn has(&self, uuid: &str) -> bool {
        matches!(self, Kind::Gpus(uuids) if uuids.iter().any(|other| other == uuid))
    }
}

/// A message from a worker, or `None` once it is gone.
pub struct Message {
    /// Which worker.
    pub worker: u64,
    /// What it said.
    pub answer: Option<Answer>,
}

/// Takes messages of all workers; `false` once nobody listens.
pub type Messages = Arc<dyn Fn(Message) -> bool + Send + Sync>;

struct Worker {
    kind: Kind,
    stream: UnixStream,
    child: Option<Child>,
    /// What an early one says before its first step, and the log of that.
    words: Option<(File, PathBuf)>,
}

/// All workers of one run.
pub struct Pool {
    launcher: Launcher,
    store: PathBuf,
    cache: Cache,
    build: String,
    messages: Messages,
    workers: HashMap<u64, Worker>,
    idle: Vec<u64>,
    next: u64,
}

impl Pool {
    /// A pool whose workers' messages go to `messages`.
    pub fn new(launcher: Launcher, cache: &Cache, build: &str, messages: Messages) -> Pool {
        Pool {
            launcher,
            store: cache.root().to_path_buf(),
            cache: cache.clone(),
            build: build.into(),
            messages,
            workers: HashMap::new(),
            idle: Vec::new(),
            next: 0,
        }
    }

    /// An idle worker of `kind`, or a new one whose output goes to `log` until its first step.
    pub fn take(&mut self, kind: &Kind, log: &Path) -> io::Result<u64> {
        if let Some(at) = self.idle.iter().position(|id| self.workers[id].kind == *kind) {
            return Ok(self.idle.swap_remove(at));
        }
        if let Kind::Gpus(uuids) = kind {
            for uuid in uuids {
                self.evict(uuid);
            }
        }
        self.spawn(kind, log)
    }

    /// Ends the idle worker that has the GPU, so that what it holds there is free. Tells whether
    /// there was one.
    pub fn evict(&mut self, uuid: &str) -> bool {
        let Some(&id) = self.idle.iter().find(|id| self.workers[id].kind.has(uuid)) else {
            return false;
        };
        self.throw_away(id, false);
        true
    }

    fn spawn(&mut self, kind: &Kind, log: &Path) -> io::Result<u64> {
        let mut words = None;
        let (ours, child) = match &mut self.launcher {
            Launcher::Processes { args, early } => {
                let started = match kind {
                    Kind::Cpu(_) => early.take().and_then(Early::alive),
                    Kind::Gpus(_) => None,
                };
                let (ours, child) = match started {
                    Some((ours, child, said)) => {
                        words = Some((said, log.to_path_buf()));
                        (ours, child)
                    }
                    None => {
                        let log = File::options().create(true).append(true).open(log)?;
                        early::process(args, &self.store, &log, kind)?
                    }
                };
                (ours, Some(child))
            }
            Launcher::Threads(registry) => {
                let (ours, theirs) = UnixStream::pair()?;
                let (registry, cache, build) = (*registry, self.cache.clone(), self.build.clone());
                std::thread::spawn(move || worker::serve(theirs, &cache, registry, &build, false));
                (ours, None)
            }
        };
        let id = self.next;
        self.next += 1;
        let (reader, tell, build) = (ours.try_clone()?, self.messages.clone(), self.build.clone());
        std::thread::spawn(move || {
            for answer in wire::receive::<Answer>(reader) {
                if let Answer::Hello { protocol, build: theirs } = &answer {
                    if (*protocol, theirs) != (wire::PROTOCOL, &build) {
                        break; // another binary: as good as gone
                    }
                    continue;
                }
                if !tell(Message { worker: id, answer: Some(answer) }) {
                    return;
                }
            }
            tell(Message { worker: id, answer: None });
        });
        self.workers.insert(id, Worker { kind: kind.clone(), stream: ours, child, words });
        Ok(id)
    }

    /// Sends an order.
    pub fn order(&self, worker: u64, order: &Order) -> io::Result<()> {
        match self.workers.get(&worker) {
            Some(worker) => wire::send(&worker.stream, order),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Takes a worker back after a success.
    pub fn give_back(&mut self, worker: u64) {
        if let Some(found) = self.workers.get_mut(&worker) {
            // Its first step is done; the log of that is no place for what comes later.
            found.words = None;
            self.idle.push(worker);
        }
    }

    /// Ends a worker and everything below it. Of one that is `gone` by itself, tells the signal that
    /// ended it, if one did.
    pub fn throw_away(&mut self, worker: u64, gone: bool) -> Option<Signal> {
        self.idle.retain(|id| *id != worker);
        let mut worker = self.workers.remove(&worker)?;
        let _ = worker.stream.shutdown(std::net::Shutdown::Both);
        let child = worker.child.as_mut()?;
        // The socket closes a moment before the process is a zombie.
        let mut signal = None;
        for _ in 0..if gone { 500 } else { 0 } {
            if let Ok(Some(status)) = child.try_wait() {
                signal = ExitStatusExt::signal(&status);
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = child.kill();
        let _ = child.wait();
        if let Some((said, log)) = worker.words.take().filter(|_| gone) {
            let _ = early::tell(said, &log);
        }
        // What it leaves behind becomes our child (we are a subreaper) and ends here.
        descendants::kill_all(&self.children());
        signal.and_then(Signal::from_named_raw)
    }

    fn children(&self) -> Vec<u32> {
        let early = match &self.launcher {
            Launcher::Processes { early, .. } => early.as_ref().and_then(Early::id),
            Launcher::Threads(_) => None,
        };
        let workers = self.workers.values().filter_map(|w| Some(w.child.as_ref()?.id()));
        workers.chain(early).collect()
    }

    /// Ends all workers: idle ones end by themselves once their socket closes.
    pub fn close(&mut self) {
        let ids: Vec<u64> = self.workers.keys().copied().collect();
        for worker in self.workers.values_mut() {
            let _ = worker.stream.shutdown(std::net::Shutdown::Both);
            let _ = worker.child.as_mut().map(Child::kill);
        }
        if let Launcher::Processes { early, .. } = &mut self.launcher {
            *early = None;
        }
        for id in ids {
            self.throw_away(id, false);
        }
    }
}

impl Runner for Pool {
    fn take(&mut self, wanted: &Wanted<'_>, log: &Path) -> io::Result<u64> {
        Pool::take(self, wanted.kind, log)
    }
    fn order(&mut self, worker: u64, order: &Order) -> io::Result<()> {
        Pool::order(self, worker, order)
    }
    fn give_back(&mut self, worker: u64) {
        Pool::give_back(self, worker);
    }
    fn throw_away(&mut self, worker: u64, gone: bool) -> Option<Signal> {
        Pool::throw_away(self, worker, gone)
    }
    fn evict(&mut self, uuid: &str) -> bool {
        Pool::evict(self, uuid)
    }
    fn close(&mut self) {
        Pool::close(self);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.close();
    }
}
