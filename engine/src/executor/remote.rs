//! The run and a remote cache: asks for results before steps run, brings bytes that steps need,
//! takes leases so that two machines do not do the same work, sends what was made.
//!
//! Nothing here decides what is right. Whatever a remote does (dies, hangs, lies), a step runs here
//! as if it did not exist; all talking is done on threads, so steps that need nothing of it go on.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use cache::remote::{Found, Lease, Leased, Progress, Remote, Totals, Uploader};
use cache::{Cache, Digest, Entry, Key, Output, Publication};

use super::{Blocked, Executor, Heard};
use crate::event::{Event, Failure, Shared};
use crate::schedule::State;

/// So many questions and transfers go on at once.
const THREADS: usize = 8;

/// What a thread says.
pub(super) enum Said {
    /// What the remote has of a key.
    Found(Key, Box<Found>),
    /// So many bytes came; or why not all, and what is still missing.
    Fetched { at: usize, result: Result<u64, (String, Vec<Digest>)> },
    /// The step may run, with a lease if there are such.
    Granted { at: usize, lease: Option<Lease> },
    /// Another machine works on it.
    Busy { at: usize, holder: String },
}

type Job = Box<dyn FnOnce() + Send>;

/// The remote of a run, and what is known of it.
pub(super) struct Sharing<'a> {
    remote: &'a Remote,
    cache: Cache,
    required: bool,
    jobs: Sender<Job>,
    sender: Sender<Heard>,
    cancel: Arc<AtomicBool>,
    /// Keys asked for; whether the answer came.
    asked: HashMap<Key, bool>,
    /// Steps to be woken by the answer about a key, each once.
    askers: HashMap<Key, Vec<usize>>,
    /// Bytes that did not come: their steps run again.
    unfetchable: HashSet<Digest>,
    /// Steps that may run: `None` where no lease could be had.
    granted: HashMap<usize, Option<Lease>>,
    /// Leases of steps that are done, until their result is sent.
    kept: HashMap<Key, Lease>,
    /// Results that came from the remote: not sent back.
    imported: HashSet<Key>,
    uploader: Option<Uploader>,
    told: HashSet<String>,
    shared: Shared,
}

impl<'a> Sharing<'a> {
    pub(super) fn new(
        remote: &'a Remote,
        cache: &Cache,
        required: bool,
        sender: Sender<Heard>,
    ) -> Sharing<'a> {
        let (jobs, queue) = channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..THREADS {
            let queue = queue.clone();
            std::thread::spawn(move || {
                loop {
                    let job = queue.lock().unwrap_or_else(|e| e.into_inner()).recv();
                    match job {
                        Ok(job) => job(),
                        Err(_) => return,
                    }
                }
            });
        }
        Sharing {
            remote,
            cache: cache.clone(),
            required,
            jobs,
            sender,
            cancel: Arc::default(),
            asked: HashMap::new(),
            askers: HashMap::new(),
            unfetchable: HashSet::new(),
            granted: HashMap::new(),
            kept: HashMap::new(),
            imported: HashSet::new(),
            uploader: remote.uploader(cache).ok(),
            told: HashSet::new(),
            shared: Shared { remote: remote.name().into(), ..Shared::default() },
        }
    }

    fn start(&self, work: impl FnOnce(&Remote, &Cache, &AtomicBool) -> Said + Send + 'static) {
        let (remote, cache) = (self.remote.clone(), self.cache.clone());
        let (cancel, sender) = (self.cancel.clone(), self.sender.clone());
        let job = move || drop(sender.send(Heard::Remote(work(&remote, &cache, &cancel))));
        let _ = self.jobs.send(Box::new(job));
    }

    fn find(&self, key: Key) {
        self.start(move |remote, cache, _| Said::Found(key, Box::new(remote.find(cache, &key))));
    }

    /// The step at `at` waits for the answer, perhaps as it did before.
    fn asks(&mut self, key: Key, at: usize) {
        let askers = self.askers.entry(key).or_default();
        if !askers.contains(&at) {
            askers.push(at);
        }
    }

    fn fetch(&self, at: usize, outputs: Vec<Output>) {
        self.start(move |remote, cache, cancel| {
            let result = remote.fetch(cache, &outputs, &Progress::new(), cancel);
            let missing = || outputs.iter().filter(|output| !cache.present(output));
            let result = result
                .map(|fetched| fetched.bytes)
                .map_err(|e| (e.to_string(), missing().map(|output| output.digest).collect()));
            Said::Fetched { at, result }
        });
    }

    /// Asks for the lease, and then, whoever has it, whether the result is there by now: another
    /// machine may have made it since the first question. A step that runs whatever is there
    /// (`must`) is not told so: it would only come back and ask again.
    fn lease(&self, at: usize, key: Key, must: bool, who: String) {
        self.start(move |remote, cache, _| {
            let leased = remote.lease(&key, &who);
            let asks = !must && !matches!(leased, Leased::Unavailable(_));
            if let Some(found @ Found::Hit(_)) = asks.then(|| remote.find(cache, &key)) {
                return Said::Found(key, Box::new(found));
            }
            match leased {
                Leased::Mine(lease) => Said::Granted { at, lease: Some(lease) },
                Leased::Busy(holder) => Said::Busy { at, holder: holder.to_string() },
                Leased::Unavailable(_) => Said::Granted { at, lease: None },
            }
        });
    }

    /// Lets the threads end.
    pub(super) fn stop(&mut self) {
        self.askers.clear();
        self.cancel.store(true, Ordering::Relaxed);
    }

    /// Waits for what is on its way to the remote, as long as it moves.
    fn finish(&mut self, interrupted: &(dyn Fn() -> bool + Sync)) -> Option<Totals> {
        let uploader = self.uploader.take()?;
        let (cancel, ended) = (AtomicBool::new(interrupted()), AtomicBool::new(false));
        Some(std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    if interrupted() {
                        cancel.store(true, Ordering::Relaxed);
                    }
                    std::thread::sleep(super::TICK);
                }
            });
            let totals = uploader.finish(None, &cancel);
            ended.store(true, Ordering::Relaxed);
            totals
        }))
    }
}

impl Executor<'_> {
    /// Whether the answer of the remote must be awaited before `key` counts as a miss.
    pub(super) fn asks_remote(&mut self, at: usize, key: Key) -> bool {
        let stopping = self.stopping > 0;
        let Some(sharing) = self.sharing.as_mut().filter(|_| !stopping) else { return false };
        match sharing.asked.get(&key) {
            Some(true) => return false,
            Some(false) => {}
            None => {
                sharing.asked.insert(key, false);
                sharing.find(key);
            }
        }
        sharing.asks(key, at);
        true
    }

    /// Whether bytes that are not here may come from the remote and are awaited. `launched`: the
    /// step has its slots, and gives them back meanwhile.
    pub(super) fn fetches(&mut self, at: usize, outputs: Vec<Output>, launched: bool) -> bool {
        let stopping = self.stopping > 0;
        let Some(sharing) = self.sharing.as_mut().filter(|_| !stopping) else { return false };
        if outputs.is_empty() || outputs.iter().any(|o| sharing.unfetchable.contains(&o.digest)) {
            return false;
        }
        sharing.fetch(at, outputs);
        if launched {
            let name = sharing.remote.name().to_string();
            self.block(at, Blocked::Remote, &format!("bytes from the remote `{name}`"));
        }
        true
    }

    /// Whether the step must wait until other machines leave it to this one.
    pub(super) fn waits_for_lease(&mut self, at: usize, key: Key) -> bool {
        let step = self.steps[at];
        let (who, must) = (self.who(step), self.must_run(step));
        let Some(sharing) = self.sharing.as_mut() else { return false };
        if sharing.granted.contains_key(&at) {
            return false;
        }
        sharing.lease(at, key, must, who);
        sharing.asks(key, at);
        // Silently: it takes a moment, and is told only if another machine has the lease.
        self.schedule.blocked(at);
        self.blocked.insert(at, Blocked::Remote);
        true
    }

    /// The step ended without a result: others may try.
    pub(super) fn give_lease_back(&mut self, at: usize) {
        if let Some(sharing) = &mut self.sharing {
            sharing.granted.remove(&at);
        }
    }

    /// The step was done here: its lease is kept until the result is sent, also to a remote that
    /// had it and has lost its bytes.
    pub(super) fn keep_lease(&mut self, at: usize, key: Key) {
        let Some(sharing) = &mut self.sharing else { return };
        sharing.imported.remove(&key);
        if let Some(Some(lease)) = sharing.granted.remove(&at) {
            sharing.kept.insert(key, lease);
        }
    }

    /// Sends a result that is durable here. `false`: it came from there.
    pub(super) fn send(&mut self, key: &Key) -> bool {
        let Some(sharing) = &mut self.sharing else { return true };
        if sharing.imported.contains(key) {
            return false;
        }
        let lease = sharing.kept.remove(key);
        if let Some(uploader) = &sharing.uploader {
            uploader.enqueue_with(key, lease);
        }
        true
    }

    pub(super) fn remote_said(&mut self, said: Said) {
        match said {
            Said::Found(key, found) => self.found(key, *found),
            Said::Fetched { at, result } => {
                let Some(sharing) = &mut self.sharing else { return };
                match result {
                    Ok(bytes) => sharing.shared.fetched_bytes += bytes,
                    Err((why, missing)) => {
                        sharing.unfetchable.extend(missing);
                        self.tell_trouble(why);
                    }
                }
                self.go_on(at);
            }
            Said::Granted { at, lease } => {
                if let Some(sharing) = &mut self.sharing {
                    sharing.granted.insert(at, lease);
                }
                self.go_on(at);
            }
            Said::Busy { at, holder } => {
                if self.schedule.state(at) == State::Blocked {
                    self.blocked.insert(at, Blocked::Lease(Instant::now()));
                    if self.waiting.insert(at) {
                        self.emit(Event::Waiting { step: self.steps[at], holder });
                    }
                }
            }
        }
    }

    /// The remote answered whether it has `key`.
    fn found(&mut self, key: Key, found: Found) {
        let Some(sharing) = &mut self.sharing else { return };
        let first = sharing.asked.insert(key, true) == Some(false);
        let Some(askers) = sharing.askers.remove(&key) else { return };
        match found {
            Found::Hit(entry) => self.import(*entry, self.steps[askers[0]]),
            Found::Miss if first => sharing.shared.misses += 1,
            Found::Miss => {}
            Found::Rejected(why) => {
                sharing.shared.misses += usize::from(first);
                self.tell_trouble(why);
            }
            Found::Unavailable(why) => {
                sharing.shared.unanswered += usize::from(first);
                self.tell_trouble(why);
            }
        }
        for at in askers {
            self.go_on(at);
        }
    }

    /// Takes a result of the remote for one of our own, unless there is one by now; its bytes come
    /// when they are needed.
    fn import(&mut self, entry: Entry, step: usize) {
        if let Ok(Some(_)) = self.cache.lookup(&entry.key) {
            return;
        }
        let Some(sharing) = &mut self.sharing else { return };
        sharing.shared.hits += usize::from(sharing.imported.insert(entry.key));
        self.publish(step, Publication::imported(entry));
    }

    /// Whether the result of `key` is the remote's.
    pub(super) fn is_imported(&self, key: &Key) -> bool {
        self.sharing.as_ref().is_some_and(|sharing| sharing.imported.contains(key))
    }

    /// What was to be sent is not there: others may try.
    pub(super) fn drop_kept_lease(&mut self, key: &Key) {
        let Some(sharing) = &mut self.sharing else { return };
        if let Some(lease) = sharing.kept.remove(key) {
            // To give it back is to talk to the remote.
            let _ = sharing.jobs.send(Box::new(move || drop(lease)));
        }
    }

    /// Looks at a step again that waited for the remote.
    fn go_on(&mut self, at: usize) {
        match self.schedule.state(at) {
            // A failure elsewhere may have skipped it meanwhile.
            State::Ready => self.look(at),
            State::Blocked if matches!(self.blocked.get(&at), Some(Blocked::Remote)) => {
                self.blocked.remove(&at);
                self.schedule.released(at);
            }
            _ => {}
        }
    }

    /// Says once what is wrong with the remote.
    fn tell_trouble(&mut self, why: String) {
        let Some(sharing) = &mut self.sharing else { return };
        if sharing.told.insert(why.clone()) && sharing.told.len() <= 20 {
            self.emit(Event::Note { text: format!("remote: {why}") });
        }
    }

    /// Why a step may not run without the remote's answer, where the user wants that.
    pub(super) fn remote_is_missed(&self, key: &Key) -> Option<String> {
        let sharing = self.sharing.as_ref().filter(|s| s.required)?;
        let unanswered = sharing.asked.get(key) == Some(&true)
            && sharing.shared.unanswered > 0
            && !sharing.imported.contains(key);
        unanswered.then(|| {
            format!(
                "the remote `{}` does not answer, and the run is to fail without it\nhint: run without `--remote-required`",
                sharing.remote.name()
            )
        })
    }

    /// Brings what is to be delivered of what ran on nodes that have no part in this cache.
    pub(super) fn bring_outputs(&mut self) {
        let remote = self.options.cluster.as_ref().is_some_and(|cluster| cluster.remote);
        let Some(sharing) = self.sharing.as_ref().filter(|_| remote && self.stopping == 0) else {
            return;
        };
        let made = self.settled.iter().enumerate();
        let wanted = made.flat_map(|(step, settled)| {
            self.undelivered(step, settled.outputs.as_deref().unwrap_or_default())
        });
        let wanted: Vec<Output> = wanted.collect();
        let (cancel, ended) = (AtomicBool::new(false), AtomicBool::new(false));
        let fetched = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    if self.interrupts.load(Ordering::Relaxed) > 0 {
                        cancel.store(true, Ordering::Relaxed);
                    }
                    std::thread::sleep(super::TICK);
                }
            });
            let fetched = sharing.remote.fetch(self.cache, &wanted, &Progress::new(), &cancel);
            ended.store(true, Ordering::Relaxed);
            fetched
        });
        match fetched {
            Ok(fetched) => {
                let sharing = self.sharing.as_mut().expect("it is there");
                sharing.shared.fetched_bytes += fetched.bytes;
            }
            Err(trouble) => self.tell_trouble(trouble.to_string()),
        }
    }

    /// Lets the last results go out; what could not be sent is kept for `pipe push`.
    pub(super) fn finish_sharing(&mut self) {
        let interrupts = self.interrupts;
        let stopped = self.stopping;
        let Some(sharing) = &mut self.sharing else { return };
        // One more Ctrl-C than those that stopped the steps leaves the rest for the next time.
        let totals = sharing.finish(&|| interrupts.load(Ordering::Relaxed) > stopped);
        let mut shared = sharing.shared.clone();
        if let Some(totals) = totals {
            shared.uploads_done = totals.done as usize;
            shared.uploads_failed = totals.failed as usize;
            shared.sent_bytes = totals.bytes;
            for (why, count) in totals.reasons {
                self.tell_trouble(format!("{count} results were not sent: {why}"));
            }
        }
        let required = self.sharing.as_ref().is_some_and(|s| s.required);
        if required && shared.uploads_failed + shared.unanswered > 0 {
            self.summary.failed += usize::from(self.summary.failed == 0);
        }
        self.summary.shared = Some(shared);
    }

    /// What a failed step says when the remote is required and silent.
    pub(super) fn fail_for_remote(&mut self, at: usize, why: String) {
        self.fail_early(at, Failure::Error, why);
    }
}
