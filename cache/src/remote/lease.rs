//! Who works on a key, told to other machines: an object in the remote, so that two of them do not
//! do the same work. It can only save work: whoever cannot get it, or loses it, goes on.
//!
//! Clocks of machines differ, so none is compared. A holder counts up a heartbeat; whoever wants
//! the lease watches that count by a clock of its own, and takes a lease whose count has stood
//! still for three beats. Where a store ignores "create only what is not there", two may take it in
//! the same moment; each reads back what is there, and the one that was written over has lost.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::digest::{Digest, Key};
use crate::remote::inner::{Inner, Length, Remote, Way, locked};
use crate::remote::probe::nonce;
use crate::remote::transport::{Fault, Put};
use crate::remote::{Trouble, layout};

const LARGEST: u64 = 8 << 10;
/// So many beats without a word, and the holder counts as dead.
const BEATS: u32 = 3;
/// How long giving a lease back may take.
const FAREWELL: Duration = Duration::from_secs(2);

/// The outcome of asking for a lease.
#[derive(Debug)]
pub enum Leased {
    Mine(Lease),
    /// Somebody else works on the key. Ask again in a few seconds: by asking it is found out
    /// whether the holder lives.
    Busy(LeaseHolder),
    /// Nobody knows. Go on without.
    Unavailable(String),
}

/// Who holds a lease, to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseHolder {
    /// What the holder gave as its name.
    pub owner: String,
    /// How long this process has seen it hold the lease.
    pub seen: Duration,
    /// How long it has not said that it lives.
    pub quiet: Duration,
}

impl fmt::Display for LeaseHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.owner)
    }
}

/// The right to work on a key, for as long as this lives. Dropping it gives it back.
pub struct Lease {
    inner: Arc<Inner>,
    name: String,
    record: Record,
    lost: Arc<AtomicBool>,
    stop: Arc<Notify>,
    heart: Option<JoinHandle<()>>,
}

/// The object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    owner: String,
    /// Of the holder's machine since it was started.
    boot: String,
    nonce: String,
    /// Higher than that of the lease which was taken over.
    fence: u64,
    beat: u64,
}

/// What this process has seen of a lease.
#[derive(Debug, Clone)]
pub(super) struct Observed {
    nonce: String,
    beat: u64,
    first: Instant,
    changed: Instant,
}

impl Remote {
    /// Tries to take the lease of `key`; never waits for another holder. `who` is shown to others.
    pub fn lease(&self, key: &Key, who: &str) -> Leased {
        let limit = self.inner.settings.timeouts.find;
        let work = async {
            let late = || self.inner.unavailable(format!("no answer in {} s", limit.as_secs_f32()));
            timeout(limit, self.inner.take(key, who)).await.unwrap_or_else(|_| Err(late()))
        };
        match self.work(Way::Write, Length::Short, work) {
            Ok(Taken::Mine(record)) => Leased::Mine(Lease::start(&self.inner, key, record)),
            Ok(Taken::Busy(holder)) => Leased::Busy(holder),
            Err(Trouble::Unavailable { why, .. } | Trouble::Refused { why, .. }) => {
                Leased::Unavailable(why)
            }
            Err(other) => Leased::Unavailable(other.to_string()),
        }
    }
}

enum Taken {
    Mine(Record),
    Busy(LeaseHolder),
}

impl Inner {
    async fn take(&self, key: &Key, who: &str) -> Result<Taken, Trouble> {
        self.ready(true).await?;
        let name = layout::lease(key);
        let fail = |fault| self.trouble(fault);
        let mut fence = 1;
        if let Some(record) = self.record(&name).await.map_err(fail)? {
            if let Some(holder) = self.observe(key, &record) {
                return Ok(Taken::Busy(holder));
            }
            // Once more, since whoever else has waited may have taken it just now.
            let now = self.record(&name).await.map_err(fail)?;
            match now {
                Some(now) if now != record => {
                    let holder = self.observe(key, &now);
                    return Ok(Taken::Busy(holder.unwrap_or_else(|| unseen(&now))));
                }
                Some(_) => self.transport.delete(&name).await.map_err(fail)?,
                None => {}
            }
            fence = record.fence.saturating_add(1);
        }
        let owner: String = who.chars().filter(|c| !c.is_control()).take(200).collect();
        let record = Record { owner, boot: boot_id(), nonce: nonce(), fence, beat: 0 };
        self.create(key, &name, record).await.map_err(fail)
    }

    /// Puts the record where none is, and looks whether it is this one that got there.
    async fn create(&self, key: &Key, name: &str, record: Record) -> Result<Taken, Fault> {
        let conditional = self.conditional().await?;
        let put = if conditional { Put::New } else { Put::Over };
        match self.transport.put(name, record.bytes(), put).await {
            Ok(()) | Err(Fault::Exists) => {}
            Err(fault) => return Err(fault),
        }
        if !conditional {
            // Somebody who looked before this was put may put over it: give that time to happen.
            tokio::time::sleep(self.settings.timeouts.heartbeat.min(Duration::from_millis(200)))
                .await;
        }
        let there = self.record(name).await?;
        Ok(match there {
            Some(there) if there.nonce == record.nonce => Taken::Mine(record),
            Some(there) => Taken::Busy(self.observe(key, &there).unwrap_or_else(|| unseen(&there))),
            None => return Err(Fault::Down("a lease that was put is not there".to_string())),
        })
    }

    /// The holder, as long as it counts as alive.
    fn observe(&self, key: &Key, record: &Record) -> Option<LeaseHolder> {
        let (now, mut leases) = (Instant::now(), locked(&self.leases));
        let fresh =
            Observed { nonce: record.nonce.clone(), beat: record.beat, first: now, changed: now };
        let seen = leases.entry(*key).or_insert_with(|| fresh.clone());
        if seen.nonce != record.nonce {
            *seen = fresh;
        } else if seen.beat != record.beat {
            (seen.beat, seen.changed) = (record.beat, now);
        }
        let (seen, quiet) = (now - seen.first, now - seen.changed);
        if quiet > self.settings.timeouts.heartbeat * BEATS {
            leases.remove(key);
            return None;
        }
        Some(LeaseHolder { owner: record.owner.clone(), seen, quiet })
    }

    /// What is under a lease's name. Something that cannot be read is a holder that never speaks.
    async fn record(&self, name: &str) -> Result<Option<Record>, Fault> {
        let Some(bytes) = self.read(name, LARGEST).await? else { return Ok(None) };
        Ok(Some(serde_json::from_slice(&bytes).unwrap_or_else(|_| Record {
            owner: "somebody unknown".to_string(),
            boot: String::new(),
            nonce: Digest::of(&bytes).to_string(),
            fence: 0,
            beat: 0,
        })))
    }
}

fn unseen(record: &Record) -> LeaseHolder {
    let (seen, quiet) = Default::default();
    LeaseHolder { owner: record.owner.clone(), seen, quiet }
}

impl Record {
    fn bytes(&self) -> Bytes {
        serde_json::to_vec(self).expect("plain values").into()
    }
}

impl Lease {
    fn start(inner: &Arc<Inner>, key: &Key, record: Record) -> Lease {
        let name = layout::lease(key);
        let (lost, stop) = (Arc::new(AtomicBool::new(false)), Arc::new(Notify::new()));
        let beating = beat(inner, name.clone(), record.clone(), lost.clone(), stop.clone());
        let heart = Some(inner.runtime().spawn(beating));
        locked(&inner.leases).remove(key);
        Lease { inner: inner.clone(), name, record, lost, stop, heart }
    }

    /// Whether somebody else has taken it since, as after this process was frozen for long. The
    /// work may go on all the same: its result is as good as the other's.
    pub fn lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Counts the holders that took the lease from one that seemed dead.
    pub fn fence(&self) -> u64 {
        self.record.fence
    }

    async fn give_back(&mut self) {
        self.stop.notify_one();
        if let Some(heart) = self.heart.take() {
            let _ = heart.await;
        }
        if self.lost() || self.inner.writes.peek(Instant::now()).is_err() {
            return;
        }
        let there = self.inner.record(&self.name).await;
        if there.is_ok_and(|r| r.is_some_and(|r| r.nonce == self.record.nonce)) {
            let _ = self.inner.transport.delete(&self.name).await;
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("name", &self.name).field("lost", &self.lost()).finish()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Within the runtime nothing can be waited for; the lease then ends by its silence.
        if tokio::runtime::Handle::try_current().is_ok() {
            self.stop.notify_one();
            return;
        }
        let inner = self.inner.clone();
        let _ = inner.block_on(async { timeout(FAREWELL, self.give_back()).await });
    }
}

/// Says again and again that the holder lives, until it is told to stop or finds another holder.
fn beat(
    inner: &Arc<Inner>,
    name: String,
    mut record: Record,
    lost: Arc<AtomicBool>,
    stop: Arc<Notify>,
) -> impl Future<Output = ()> + use<> {
    let (weak, pause) = (Arc::downgrade(inner), inner.settings.timeouts.heartbeat);
    async move {
        while timeout(pause, stop.notified()).await.is_err() {
            let Some(inner) = weak.upgrade() else { return };
            match inner.record(&name).await {
                Ok(Some(there)) if there.nonce == record.nonce => {
                    record.beat += 1;
                    let _ = inner.transport.put(&name, record.bytes(), Put::Over).await;
                }
                Ok(_) => {
                    lost.store(true, Ordering::Relaxed);
                    return;
                }
                // Whoever cannot reach the remote cannot lose anything there; nor can others take.
                Err(_) => {}
            }
        }
    }
}

/// Tells a machine's runs apart; empty where the system does not say.
fn boot_id() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().chars().take(40).collect()
}
