//! Write-behind: results are handed over as they come and pushed while the work goes on. What
//! does not get there is noted in the cache, so that a later push sends it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::cache::Cache;
use crate::digest::Key;
use crate::remote::inner::Remote;
use crate::remote::lease::Lease;
use crate::remote::progress::Progress;
use crate::remote::push::Sent;
use crate::remote::{Trouble, inner};

/// Results that are pushed at the same time.
const THREADS: usize = 4;
/// So many different reasons are kept.
const REASONS: usize = 8;
/// How often a caller's wish and the remote's state are looked at.
const TICK: Duration = Duration::from_millis(50);

/// Pushes results on threads of its own, in the order in which they come.
#[derive(Debug)]
pub struct Uploader {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What an uploader did, for the last lines of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Totals {
    /// Results that are in the remote now; those that it had are among them.
    pub done: u64,
    /// Results that the remote had already.
    pub present: u64,
    /// Results of which the remote has, and keeps, another version.
    pub diverged: u64,
    /// Results that did not get there. They are noted for a later push.
    pub failed: u64,
    /// Bytes that went over the network.
    pub bytes: u64,
    /// Why results did not get there, and how many for that reason; the first few reasons.
    pub reasons: Vec<(String, u64)>,
}

#[derive(Debug)]
struct Shared {
    remote: Remote,
    cache: Cache,
    progress: Progress,
    state: Mutex<State>,
    wake: Condvar,
    /// Stops pushes that are running.
    cancel: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Key>,
    /// Everything that was handed over and is not done.
    open: HashSet<Key>,
    /// Given back when their result is there, or is given up.
    leases: HashMap<Key, Lease>,
    /// Not sent because the remote could not be used; tried again when it can.
    later: Vec<(Key, String)>,
    running: usize,
    ended: bool,
    totals: Totals,
}

impl Remote {
    /// Starts an uploader from `cache` to this remote.
    ///
    /// # Errors
    /// When no thread can be started or no directory be made.
    pub fn uploader(&self, cache: &Cache) -> Result<Uploader, Trouble> {
        self.todo_dir(cache)?;
        let shared = Arc::new(Shared {
            remote: self.clone(),
            cache: cache.clone(),
            progress: Progress::new(),
            state: Mutex::default(),
            wake: Condvar::new(),
            cancel: AtomicBool::new(false),
        });
        let start = |_| {
            let shared = shared.clone();
            let thread = std::thread::Builder::new().name("upload".to_string());
            thread.spawn(move || shared.serve())
        };
        let threads = (0..THREADS).map(start).collect::<Result<_, _>>();
        let threads = threads.map_err(|e| Trouble::Settings(format!("cannot start threads: {e}")));
        Ok(Uploader { threads: threads?, shared })
    }

    /// Keys of results that an earlier process did not get into this remote.
    pub fn pending(&self, cache: &Cache) -> Vec<Key> {
        let items = self.todo_dir(cache).ok().and_then(|dir| fs::read_dir(dir).ok());
        let names = items.into_iter().flatten().flatten().map(|item| item.file_name());
        let mut keys: Vec<Key> = names.filter_map(|name| name.to_str()?.parse().ok()).collect();
        keys.sort();
        keys
    }

    fn todo_dir(&self, cache: &Cache) -> crate::Result<PathBuf> {
        let dir = self.inner.uploads(cache)?.join("todo");
        cache.layout().make_dir(&dir)?;
        Ok(dir)
    }

    /// A result is in the remote: there is nothing left to do for it.
    pub(super) fn settle(&self, cache: &Cache, key: &Key) {
        if let Ok(dir) = self.todo_dir(cache) {
            let _ = fs::remove_file(dir.join(key.to_string()));
        }
    }

    /// Notes that a result is to be sent, and why it was not yet.
    fn note(&self, cache: &Cache, key: &Key, why: &str) {
        let write = |dir: &Path| {
            let path = dir.join(key.to_string());
            let tmp = dir.join(format!(".{}", crate::layout::unique()));
            fs::write(&tmp, why).and_then(|()| fs::rename(&tmp, path))
        };
        // Where this cannot be written, the run's totals still tell.
        let _ = self.todo_dir(cache).map(|dir| write(&dir));
    }
}

impl Uploader {
    /// Hands a result over by its key; it has to be in the cache, visible to this process. Never
    /// waits; 32 bytes are remembered of it, and an empty file in the cache.
    pub fn enqueue(&self, key: &Key) {
        self.enqueue_with(key, None);
    }

    /// The same; the lease under which it was made is given back only when the result is there, so
    /// that no other machine begins in between.
    pub fn enqueue_with(&self, key: &Key, lease: Option<Lease>) {
        let mut state = self.shared.locked();
        state.leases.extend(lease.map(|lease| (*key, lease)));
        if state.open.contains(key) {
            return;
        }
        // Noted before a thread can be done with it, and so with the note.
        self.shared.remote.note(&self.shared.cache, key, "");
        state.open.insert(*key);
        state.queue.push_back(*key);
        self.shared.wake.notify_one();
    }

    /// Hands over what earlier processes did not get there; says how many.
    pub fn enqueue_pending(&self) -> usize {
        let keys = self.shared.remote.pending(&self.shared.cache);
        keys.iter().for_each(|key| self.enqueue(key));
        keys.len()
    }

    /// How far the pushes are, in bytes.
    pub fn progress(&self) -> &Progress {
        &self.shared.progress
    }

    /// Results that are not there yet.
    pub fn left(&self) -> usize {
        self.shared.locked().open.len()
    }

    /// Waits until all is sent or given up, at most for `limit`, and until the caller wants to
    /// stop; what is left then counts as failed and stays noted.
    pub fn finish(mut self, limit: Option<Duration>, cancel: &AtomicBool) -> Totals {
        let start = Instant::now();
        let mut again = true;
        let why = loop {
            let mut state = self.shared.locked();
            if state.queue.is_empty() && state.running == 0 {
                // A last try for what found the remote down, if it is not known to be so still.
                if !again || state.later.is_empty() || self.shared.remote.usable().is_err() {
                    break None;
                }
                again = false;
                state.again();
                self.shared.wake.notify_all();
            }
            if cancel.load(Ordering::Relaxed) {
                break Some("the run was stopped");
            }
            if limit.is_some_and(|limit| start.elapsed() > limit) {
                break Some("there was no time left");
            }
            drop(self.shared.wake.wait_timeout(state, TICK));
        };
        self.end();
        let mut state = self.shared.locked();
        let State { queue, later, totals, .. } = &mut *state;
        for key in queue.drain(..) {
            self.shared.remote.note(&self.shared.cache, &key, why.unwrap_or_default());
            totals.fail(why.unwrap_or("it was not begun"));
        }
        later.drain(..).for_each(|(_, reason)| totals.fail(&reason));
        std::mem::take(totals)
    }

    fn end(&mut self) {
        self.shared.locked().ended = true;
        self.shared.cancel.store(true, Ordering::Relaxed);
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn serve(&self) {
        while let Some(key) = self.next() {
            let outcome = self.push(&key);
            let mut state = self.locked();
            state.running -= 1;
            // Dropped after the lock: giving it back may take a moment.
            let lease = match outcome {
                Err(Trouble::Unavailable { .. } | Trouble::Cancelled) => None,
                _ => state.leases.remove(&key),
            };
            match outcome {
                Ok(sent) => {
                    state.open.remove(&key);
                    match sent {
                        Some(sent) => state.totals.add(&sent),
                        None => state.totals.fail("its entry is not in the cache any more"),
                    }
                }
                Err(Trouble::Unavailable { why, .. }) => state.later.push((key, why)),
                Err(Trouble::Cancelled) => state.queue.push_front(key),
                Err(error) => {
                    state.open.remove(&key);
                    state.totals.fail(&error.to_string());
                }
            }
            drop(state);
            drop(lease);
            self.wake.notify_all();
        }
    }

    /// The next result to be pushed; none at the end.
    fn next(&self) -> Option<Key> {
        let mut state = self.locked();
        loop {
            if state.ended {
                return None;
            }
            if let Some(key) = state.queue.pop_front() {
                state.running += 1;
                return Some(key);
            }
            if !state.later.is_empty() && self.remote.inner.writes.peek(Instant::now()).is_ok() {
                state.again();
                continue;
            }
            let waited = self.wake.wait_timeout(state, TICK * 10);
            state = waited.unwrap_or_else(|e| e.into_inner()).0;
        }
    }

    /// Nothing is sent of a key whose entry has gone.
    fn push(&self, key: &Key) -> Result<Option<Sent>, Trouble> {
        let Some(entry) = self.cache.lookup(key)? else {
            self.remote.settle(&self.cache, key);
            return Ok(None);
        };
        let sent = self.remote.push(&self.cache, &entry, &self.progress, &self.cancel);
        if let Err(error) = &sent {
            self.remote.note(&self.cache, key, &error.to_string());
        }
        sent.map(Some)
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        inner::locked(&self.state)
    }
}

impl State {
    fn again(&mut self) {
        let keys: Vec<Key> = self.later.drain(..).map(|(key, _)| key).collect();
        self.queue.extend(keys);
    }
}

impl Totals {
    fn add(&mut self, sent: &Sent) {
        self.done += 1;
        self.present += u64::from(!sent.entry && !sent.diverged);
        self.diverged += u64::from(sent.diverged);
        self.bytes += sent.bytes;
    }

    fn fail(&mut self, why: &str) {
        self.failed += 1;
        if let Some((_, count)) = self.reasons.iter_mut().find(|(reason, _)| reason == why) {
            *count += 1;
        } else if self.reasons.len() < REASONS {
            self.reasons.push((why.to_string(), 1));
        }
    }
}
