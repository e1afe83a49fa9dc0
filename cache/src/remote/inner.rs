//! A remote that is open: its store, what is remembered of it, and the runtime below. Knows the
//! ways to ask it, and no transfers.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use tokio::runtime::Runtime;
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};

use crate::cache::Cache;
use crate::digest::{Digest, Key};
use crate::remote::address::Address;
use crate::remote::breaker::{Breaker, FAILURES};
use crate::remote::buffers::Buffers;
use crate::remote::directory::Directory;
use crate::remote::lease::Observed;
use crate::remote::objects::Objects;
use crate::remote::settings::Timeouts;
use crate::remote::transport::{Fault, Put, Transport};
use crate::remote::{Settings, Trouble, credentials, layout};

/// Threads that move bytes, and at most so many that hash and write them. The latter may hang in
/// a network file system, and others must go on.
const WORKERS: usize = 2;
const BLOCKING: usize = 512;
/// Bytes of objects that are in memory at once, over all transfers, in MiB.
const MEMORY: u32 = 64;
/// So many digests are remembered as present; then all are forgotten.
const REMEMBERED: usize = 1 << 18;
/// How often a caller's wish to stop is looked at.
const TICK: Duration = Duration::from_millis(25);

/// A remote cache. Cheap to clone; all clones share one store and one memory.
#[derive(Clone)]
pub struct Remote {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub name: String,
    /// Tells remotes apart in file names.
    id: String,
    pub settings: Settings,
    pub transport: Arc<dyn Transport>,
    runtime: Option<Runtime>,
    pub reads: Breaker,
    pub writes: Breaker,
    /// Set once the layout was seen to be ours; true when there is a remote at all.
    laid_out: OnceCell<()>,
    /// Whether a conditional put works as it should, once that was tried.
    pub conditional: OnceCell<bool>,
    memory: Arc<Semaphore>,
    pub buffers: Buffers,
    known: Mutex<HashMap<Digest, u64>>,
    damaged: Mutex<HashSet<Digest>>,
    pub leases: Mutex<HashMap<Key, Observed>>,
    /// Whether old uploads were looked for.
    pub tidied: AtomicBool,
}

/// Which breaker a piece of work listens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Read,
    Write,
}

/// Whether a piece of work is some requests, or tries until its patience is at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Length {
    Short,
    Transfer,
}

impl Remote {
    /// Opens a remote without asking it anything. `env` gives the variables of the environment.
    ///
    /// # Errors
    /// [`Trouble::Settings`]: a URL that cannot be, or no credentials.
    pub fn open(
        settings: Settings,
        env: &dyn Fn(&str) -> Option<OsString>,
    ) -> Result<Remote, Trouble> {
        let address = Address::parse(&settings.url).map_err(Trouble::Settings)?;
        let name = address.to_string();
        let transport: Arc<dyn Transport> = match address {
            Address::Directory(root) => Arc::new(Directory::new(root, settings.timeouts.stall * 4)),
            Address::Bucket { service, bucket, prefix } => {
                let opened = credentials::open(service, &bucket, env, &settings.timeouts);
                let (store, secrets) = opened
                    .map_err(|why| Trouble::Settings(format!("the remote `{name}`: {why}")))?;
                Arc::new(Objects::new(store, prefix, secrets))
            }
        };
        Remote::over(transport, name, settings)
    }

    /// A remote over any store; `name` is shown to people.
    ///
    /// # Errors
    /// When no threads can be started.
    pub fn over(
        transport: Arc<dyn Transport>,
        name: impl Into<String>,
        settings: Settings,
    ) -> Result<Remote, Trouble> {
        let name = name.into();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .max_blocking_threads(BLOCKING)
            .thread_name("remote")
            .enable_all()
            .build()
            .map_err(|e| Trouble::Settings(format!("cannot start threads for `{name}`: {e}")))?;
        let Timeouts { pause, longest_pause, .. } = settings.timeouts;
        let inner = Inner {
            id: Digest::of(name.as_bytes()).short(),
            name,
            settings,
            transport,
            runtime: Some(runtime),
            reads: Breaker::new(pause, longest_pause),
            writes: Breaker::new(pause, longest_pause),
            laid_out: OnceCell::new(),
            conditional: OnceCell::new(),
            memory: Arc::new(Semaphore::new(MEMORY as usize)),
            buffers: Buffers::default(),
            known: Mutex::default(),
            damaged: Mutex::default(),
            leases: Mutex::default(),
            tidied: AtomicBool::new(false),
        };
        Ok(Remote { inner: Arc::new(inner) })
    }

    /// The same remote for whoever waits for it: asked again within `longest`, however long it has
    /// been down.
    ///
    /// # Errors
    /// When no threads can be started.
    pub fn waited_for(&self, longest: Duration) -> Result<Remote, Trouble> {
        let mut settings = self.inner.settings.clone();
        settings.timeouts.longest_pause = longest;
        Remote::over(self.inner.transport.clone(), self.name(), settings)
    }

    /// What people call it; no credentials in it.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Whether it would be asked now; otherwise why it is left alone.
    ///
    /// # Errors
    /// [`Trouble::Unavailable`].
    pub fn usable(&self) -> Result<(), Trouble> {
        self.inner.reads.peek(Instant::now()).map_err(|why| self.inner.unavailable(why))
    }

    /// Does `work` unless the remote is left alone, and remembers how it went.
    pub(super) fn work<T>(
        &self,
        way: Way,
        length: Length,
        work: impl Future<Output = Result<T, Trouble>>,
    ) -> Result<T, Trouble> {
        let inner = &self.inner;
        let breaker = match way {
            Way::Read => &inner.reads,
            Way::Write => &inner.writes,
        };
        breaker.ask(Instant::now()).map_err(|why| inner.unavailable(why))?;
        let result = inner.block_on(work);
        if length == Length::Transfer {
            inner.buffers.clear();
        }
        match &result {
            Err(Trouble::Unavailable { why, .. }) => {
                // A transfer that gives up has tried often.
                let times = if length == Length::Transfer { FAILURES } else { 1 };
                for _ in 0..times {
                    inner.reads.failed(Instant::now(), why);
                    inner.writes.failed(Instant::now(), why);
                }
            }
            Err(Trouble::Refused { why, .. }) => breaker.failed(Instant::now(), why),
            Err(Trouble::Local(_) | Trouble::Lost { .. } | Trouble::Cancelled) => {
                breaker.undecided(Instant::now());
            }
            _ => breaker.worked(),
        }
        result
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({})", self.inner.name)
    }
}

impl Inner {
    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime().block_on(work)
    }

    pub fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("there until the drop")
    }

    pub fn unavailable(&self, why: impl Into<String>) -> Trouble {
        Trouble::Unavailable { remote: self.name.clone(), why: why.into() }
    }

    /// A fault of a request for something that need not be there.
    pub fn trouble(&self, fault: Fault) -> Trouble {
        match fault {
            Fault::Refused(why) => Trouble::Refused { remote: self.name.clone(), why },
            other => self.unavailable(other.to_string()),
        }
    }

    /// One small request; a second try when the first fails at once, as it does over a connection
    /// that the other side has closed.
    pub async fn twice<T, F: Future<Output = Result<T, Fault>>>(
        &self,
        request: impl Fn() -> F,
    ) -> Result<T, Fault> {
        let start = Instant::now();
        match request().await {
            Err(Fault::Down(_)) if start.elapsed() < self.settings.timeouts.reply / 2 => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                request().await
            }
            result => result,
        }
    }

    pub async fn head(&self, name: &str) -> Result<Option<u64>, Fault> {
        match self.twice(|| self.transport.head(name)).await {
            Err(Fault::Absent) => Ok(None),
            result => result.map(Some),
        }
    }

    /// All of a small object; none when it is not there. One larger than `limit` comes as nothing,
    /// which is no text that anybody takes.
    pub async fn read(&self, name: &str, limit: u64) -> Result<Option<Bytes>, Fault> {
        match self.twice(|| self.read_once(name, limit)).await {
            Err(Fault::Absent) => Ok(None),
            result => result,
        }
    }

    async fn read_once(&self, name: &str, limit: u64) -> Result<Option<Bytes>, Fault> {
        let mut body = self.transport.get(name, None).await?;
        if body.size > limit {
            return Ok(Some(Bytes::new()));
        }
        let mut bytes = BytesMut::with_capacity(body.size as usize);
        while let Some(piece) = body.stream.next().await {
            bytes.extend_from_slice(&piece?);
            if bytes.len() as u64 > body.size {
                break;
            }
        }
        if (bytes.len() as u64) < body.size {
            return Err(Fault::Down("the answer was cut off".to_string()));
        }
        Ok(Some(bytes.freeze()))
    }

    /// Looks whether the remote is laid out as this build knows; `make` says so where nothing is.
    pub async fn ready(&self, make: bool) -> Result<(), Trouble> {
        match self.laid_out.get_or_try_init(|| self.look(make)).await {
            Ok(()) | Err(None) => Ok(()),
            Err(Some(trouble)) => Err(trouble),
        }
    }

    /// The error is none where nothing is.
    async fn look(&self, make: bool) -> Result<(), Option<Trouble>> {
        let found = self.read(layout::VERSION, 1024).await.map_err(|f| self.trouble(f))?;
        let ours = Bytes::from_static(layout::VERSION_TEXT.as_bytes());
        let text = match found {
            Some(text) => text,
            None if !make => return Err(None),
            None => {
                let put = || self.transport.put(layout::VERSION, ours.clone(), Put::Over);
                self.twice(put).await.map_err(|f| self.trouble(f))?;
                ours.clone()
            }
        };
        if text == ours {
            return Ok(());
        }
        let shown = String::from_utf8_lossy(&text[..text.len().min(40)]).trim().to_string();
        let why = format!("its layout is {shown:?}, this build knows another: use a newer build");
        Err(Some(Trouble::Refused { remote: self.name.clone(), why }))
    }

    /// Room for so many bytes, until it is dropped. When there is none now: waited for if `wait`,
    /// else none. Whoever waits must have none.
    pub async fn room(&self, bytes: u64, wait: bool) -> Option<OwnedSemaphorePermit> {
        let units = bytes.div_ceil(1 << 20).clamp(1, MEMORY.into()) as u32;
        if wait {
            return self.memory.clone().acquire_many_owned(units).await.ok();
        }
        self.memory.clone().try_acquire_many_owned(units).ok()
    }

    pub fn known(&self, digest: &Digest) -> Option<u64> {
        locked(&self.known).get(digest).copied()
    }

    pub fn remember(&self, digest: &Digest, bytes: u64) {
        let mut known = locked(&self.known);
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(*digest, bytes);
    }

    /// Forgets all that is remembered as present.
    pub fn forget_all(&self) {
        locked(&self.known).clear();
    }

    pub fn forget(&self, digest: &Digest) {
        locked(&self.known).remove(digest);
    }

    /// Remembers that what lies under `digest` is not that: a push puts it anew.
    pub fn set_damaged(&self, digest: &Digest, damaged: bool) {
        let mut all = locked(&self.damaged);
        if damaged {
            all.insert(*digest);
        } else {
            all.remove(digest);
        }
        drop(all);
        self.forget(digest);
    }

    pub fn is_damaged(&self, digest: &Digest) -> bool {
        locked(&self.damaged).contains(digest)
    }

    /// The directory in `cache` for what is on its way to this remote.
    pub fn uploads(&self, cache: &Cache) -> crate::Result<PathBuf> {
        let above = cache.root().join("uploads");
        cache.layout().make_dir(&above)?;
        let dir = above.join(&self.id);
        cache.layout().make_dir(&dir)?;
        Ok(dir)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Nothing waits for a remote that hangs, and this may happen on a thread of the runtime.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Does `work` until it is done or the caller wants to stop.
pub(super) async fn unless<T>(
    cancel: &AtomicBool,
    work: impl Future<Output = Result<T, Trouble>>,
) -> Result<T, Trouble> {
    tokio::pin!(work);
    loop {
        if cancel.load(Ordering::Relaxed) {
            return Err(Trouble::Cancelled);
        }
        if let Ok(result) = tokio::time::timeout(TICK, &mut work).await {
            return result;
        }
    }
}

/// Does `work` where it may block.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        // Only when the runtime ends, and then nobody is left to be told.
        Err(_) => std::future::pending().await,
    }
}

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
