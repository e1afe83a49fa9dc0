//! A store in memory, as each of several clients sees it: with faults of the client's own.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use cache::remote::{
    Body, Fault, Piece, Put, Remote, Settings, Timeouts, Transport, Trust, Upload,
};
use futures_util::{StreamExt, stream};

/// The store that all clients share.
#[derive(Debug, Default)]
pub struct Memory {
    pub objects: Mutex<BTreeMap<String, Bytes>>,
    uploads: Mutex<HashMap<String, BTreeMap<usize, Bytes>>>,
    next: AtomicU64,
}

/// What can go wrong with a request, each with a probability in percent.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    pub down: u64,
    pub refused: u64,
    pub hangs: u64,
    /// A body ends early.
    pub cut: u64,
    /// A bit of a body is another.
    pub flips: u64,
    /// A put is answered with success and forgotten.
    pub lost: u64,
    /// "Create only what is not there" puts over it.
    pub replaces: bool,
}

/// One client's way to the store.
#[derive(Debug)]
pub struct Client {
    pub store: Arc<Memory>,
    pub faults: Mutex<Faults>,
    random: AtomicU64,
    /// Requests so far, and bytes that left the store.
    pub requests: AtomicU64,
    pub read: AtomicU64,
    pub parts: AtomicU64,
}

impl Client {
    pub fn new(store: &Arc<Memory>, seed: u64) -> Arc<Client> {
        Arc::new(Client {
            store: store.clone(),
            faults: Mutex::default(),
            random: AtomicU64::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            requests: AtomicU64::new(0),
            read: AtomicU64::new(0),
            parts: AtomicU64::new(0),
        })
    }

    /// A remote of which everybody is believed, with short time-outs.
    pub fn remote(self: &Arc<Self>) -> Remote {
        let mut settings = Settings::new("memory");
        settings.trust = Trust::Writers;
        self.remote_with(settings)
    }

    /// One that does not give up soon.
    pub fn patient(self: &Arc<Self>) -> Remote {
        let mut settings = Settings::new("memory");
        settings.trust = Trust::Writers;
        settings.timeouts = Timeouts { patience: Duration::from_secs(60), ..short() };
        Remote::over(self.clone(), "memory", settings).unwrap()
    }

    pub fn remote_with(self: &Arc<Self>, mut settings: Settings) -> Remote {
        settings.timeouts = short();
        Remote::over(self.clone(), "memory", settings).unwrap()
    }

    pub fn set(&self, faults: Faults) {
        *self.faults.lock().unwrap() = faults;
    }

    fn roll(&self, percent: u64) -> bool {
        // xorshift: the same faults for the same seed and order of requests.
        let next = |mut x: u64| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^ (x << 17)
        };
        let old = self.random.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |x| Some(next(x)));
        percent > 0 && (old.unwrap() >> 20) % 100 < percent
    }

    async fn request(&self) -> Result<Faults, Fault> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let faults = self.faults.lock().unwrap().clone();
        if self.roll(faults.hangs) {
            // As a client with a time-out sees it.
            tokio::time::sleep(short().reply).await;
            return Err(Fault::Down("no answer".into()));
        }
        if self.roll(faults.down) {
            return Err(Fault::Down("it is down".into()));
        }
        if self.roll(faults.refused) {
            return Err(Fault::Refused("it answers 403".into()));
        }
        Ok(faults)
    }
}

/// Time-outs for tests in which things are to go wrong.
pub fn short() -> Timeouts {
    Timeouts {
        connect: Duration::from_millis(200),
        reply: Duration::from_millis(200),
        stall: Duration::from_millis(300),
        find: Duration::from_secs(5),
        patience: Duration::from_millis(600),
        pause: Duration::from_millis(300),
        longest_pause: Duration::from_secs(600),
        heartbeat: Duration::from_millis(400),
    }
}

#[async_trait]
impl Transport for Client {
    async fn head(&self, name: &str) -> Result<u64, Fault> {
        self.request().await?;
        let objects = self.store.objects.lock().unwrap();
        objects.get(name).map(|bytes| bytes.len() as u64).ok_or(Fault::Absent)
    }

    async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Body, Fault> {
        let faults = self.request().await?;
        let found = self.store.objects.lock().unwrap().get(name).cloned();
        let whole = found.ok_or(Fault::Absent)?;
        let size = whole.len() as u64;
        let range = range.unwrap_or(0..size);
        if range.start >= size && size > 0 {
            return Err(Fault::Refused("it answers 416".into()));
        }
        let bytes = whole.slice(range.start as usize..range.end.min(size) as usize);
        let mut pieces: Vec<Result<Bytes, Fault>> =
            bytes.chunks(64 << 10).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        if self.roll(faults.flips) && !bytes.is_empty() {
            let mut flipped = bytes.to_vec();
            let at = (self.random.load(Ordering::SeqCst) % flipped.len() as u64) as usize;
            flipped[at] ^= 4;
            pieces = vec![Ok(flipped.into())];
        }
        if self.roll(faults.cut) {
            pieces.truncate(pieces.len() / 2);
            pieces.push(Err(Fault::Down("the connection broke".into())));
        }
        let moved = pieces.iter().flatten().map(|piece| piece.len() as u64).sum();
        self.read.fetch_add(moved, Ordering::SeqCst);
        Ok(Body { size, stream: stream::iter(pieces).boxed() })
    }

    async fn put(&self, name: &str, bytes: Bytes, put: Put) -> Result<(), Fault> {
        let faults = self.request().await?;
        if self.roll(faults.lost) {
            return Ok(());
        }
        let mut objects = self.store.objects.lock().unwrap();
        if put == Put::New && !faults.replaces && objects.contains_key(name) {
            return Err(Fault::Exists);
        }
        objects.insert(name.to_string(), bytes);
        Ok(())
    }

    async fn delete(&self, name: &str) -> Result<(), Fault> {
        self.request().await?;
        self.store.objects.lock().unwrap().remove(name);
        Ok(())
    }

    async fn begin(&self, _name: &str) -> Result<String, Fault> {
        self.request().await?;
        let id = self.store.next.fetch_add(1, Ordering::SeqCst).to_string();
        self.store.uploads.lock().unwrap().insert(id.clone(), BTreeMap::new());
        Ok(id)
    }

    async fn part(&self, upload: Upload<'_>, part: Piece) -> Result<String, Fault> {
        let faults = self.request().await?;
        self.parts.fetch_add(1, Ordering::SeqCst);
        let mut uploads = self.store.uploads.lock().unwrap();
        let parts = uploads.get_mut(upload.id).ok_or(Fault::Absent)?;
        if !self.roll(faults.lost) {
            parts.insert(part.index, part.bytes);
        }
        Ok(format!("part {}", part.index))
    }

    async fn complete(&self, upload: Upload<'_>, parts: Vec<String>) -> Result<(), Fault> {
        self.request().await?;
        let found = self.store.uploads.lock().unwrap().remove(upload.id);
        let found = found.ok_or(Fault::Absent)?;
        if !found.keys().copied().eq(0..parts.len()) {
            return Err(Fault::Refused("it answers 400 (InvalidPart)".into()));
        }
        let bytes = found.into_values().collect::<Vec<_>>().concat();
        self.store.objects.lock().unwrap().insert(upload.name.to_string(), bytes.into());
        Ok(())
    }

    async fn abort(&self, upload: Upload<'_>) -> Result<(), Fault> {
        self.request().await?;
        self.store.uploads.lock().unwrap().remove(upload.id);
        Ok(())
    }
}

impl Memory {
    /// Uploads that are neither completed nor dropped.
    pub fn open_uploads(&self) -> usize {
        self.uploads.lock().unwrap().len()
    }

    pub fn names(&self, start: &str) -> Vec<String> {
        let objects = self.objects.lock().unwrap();
        objects.keys().filter(|name| name.starts_with(start)).cloned().collect()
    }
}
