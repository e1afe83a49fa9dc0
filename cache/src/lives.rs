//! Which processes live, told by files: for caches on a network's file system, where no lock of the
//! kernel's can be relied on. Knows no keys and no bytes.
//!
//! Every process that holds something has a file in `lives/`, which it counts up every few seconds.
//! One of this machine is dead at once when it is gone; one of another machine when its count has
//! stood still for [`Times::ttl`] by the observer's own clock: clocks of machines are never compared.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::layout::unique;

/// How often a process says that it lives, and how long it may say nothing.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Between two counts.
    pub beat: Duration,
    /// Silence after which a process of another machine is dead.
    pub ttl: Duration,
}

static BEAT_MS: AtomicU64 = AtomicU64::new(3_000);
static TTL_MS: AtomicU64 = AtomicU64::new(30_000);

/// For tests: other times than the usual ones, for this whole process.
pub fn set_times(times: Times) {
    BEAT_MS.store(times.beat.as_millis() as u64, Ordering::Relaxed);
    TTL_MS.store(times.ttl.as_millis() as u64, Ordering::Relaxed);
}

fn times() -> Times {
    let of = |ms: &AtomicU64| Duration::from_millis(ms.load(Ordering::Relaxed));
    Times { beat: of(&BEAT_MS), ttl: of(&TTL_MS) }
}

/// The file of one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    host: String,
    /// Of the machine since it was started.
    boot: String,
    /// Of its process ids.
    space: String,
    pid: u32,
    /// Of the process, in ticks since the boot.
    started: u64,
    beat: u64,
}

impl Record {
    fn own() -> Record {
        let pid = std::process::id();
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_string();
        let space = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        Record {
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            boot: read("/proc/sys/kernel/random/boot_id"),
            space: space.display().to_string(),
            pid,
            started: started(pid).unwrap_or(0),
            beat: 0,
        }
    }

    fn same_machine(&self, other: &Record) -> bool {
        (&self.host, &self.boot, &self.space) == (&other.host, &other.boot, &other.space)
            && !self.boot.is_empty()
    }
}

/// When a process of this machine was started, in ticks since the boot; none of a dead one.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    let started = fields.nth(18)?.parse().ok();
    started.filter(|_| state != "Z" && state != "X")
}

/// The lives of one cache.
#[derive(Debug)]
pub(crate) struct Lives {
    dir: PathBuf,
    own: Mutex<Option<Own>>,
    /// What this process has seen of others: their count and since when.
    seen: Mutex<HashMap<String, (Option<u64>, Instant)>>,
}

#[derive(Debug)]
struct Own {
    id: String,
    path: PathBuf,
    stop: Option<Sender<()>>,
    heart: Option<JoinHandle<()>>,
}

impl Lives {
    /// Those in `dir`; one object a process, so that it lives once.
    pub fn of(dir: &Path) -> Arc<Lives> {
        static ALL: LazyLock<Mutex<HashMap<PathBuf, Weak<Lives>>>> = LazyLock::new(Mutex::default);
        let mut all = locked(&ALL);
        if let Some(lives) = all.get(dir).and_then(Weak::upgrade) {
            return lives;
        }
        let (own, seen) = (Mutex::default(), Mutex::default());
        let lives = Arc::new(Lives { dir: dir.to_path_buf(), own, seen });
        all.insert(dir.to_path_buf(), Arc::downgrade(&lives));
        lives
    }

    /// The name of this process, which lives from now on.
    ///
    /// # Errors
    /// When its file cannot be written.
    pub fn own(&self) -> io::Result<String> {
        let mut own = locked(&self.own);
        if let Some(own) = &*own {
            return Ok(own.id.clone());
        }
        let mut record = Record::own();
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
        let host: String = record.host.chars().map(plain).collect();
        let id = format!("{host}-{}", unique());
        let path = self.dir.join(&id);
        write(&path, &record)?;
        let (stop, stopped) = channel();
        let to = path.clone();
        let heart = std::thread::Builder::new().name("life".into()).spawn(move || {
            while stopped.recv_timeout(times().beat) == Err(RecvTimeoutError::Timeout) {
                record.beat += 1;
                // What cannot be written now may be written the next time.
                let _ = write(&to, &record);
            }
        })?;
        *own = Some(Own { id: id.clone(), path, stop: Some(stop), heart: Some(heart) });
        Ok(id)
    }

    /// Whether the process `id` may still be at work.
    pub fn alive(&self, id: &str) -> bool {
        if locked(&self.own).as_ref().is_some_and(|own| own.id == id) {
            return true;
        }
        let text = fs::read(self.dir.join(id)).ok();
        let record: Option<Record> = text.and_then(|text| serde_json::from_slice(&text).ok());
        if let Some(record) = &record
            && record.same_machine(&Record::own())
        {
            return started(record.pid) == Some(record.started);
        }
        // Also a file that is not there: it may be seen late.
        let (now, beat) = (Instant::now(), record.map(|record| record.beat));
        let mut seen = locked(&self.seen);
        let known = seen.entry(id.to_string()).or_insert((beat, now));
        if known.0 != beat {
            *known = (beat, now);
        }
        now - known.1 < times().ttl
    }

    /// Removes the files of processes that are dead and were silent for so long: locks of a process
    /// without a file count until it was missed for a while.
    pub fn sweep(&self, silent: Duration) {
        for item in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = item.file_name();
            let age = item.metadata().and_then(|meta| meta.modified()).map(|at| at.elapsed());
            if !age.is_ok_and(|age| age.is_ok_and(|age| age >= silent)) {
                continue;
            }
            if let Some(id) = name.to_str().filter(|id| !id.starts_with('.') && !self.alive(id)) {
                let _ = fs::remove_file(self.dir.join(id));
            }
        }
    }
}

impl Drop for Lives {
    fn drop(&mut self) {
        let own = self.own.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = own {
            own.stop = None;
            if let Some(heart) = own.heart.take() {
                let _ = heart.join();
            }
            let _ = fs::remove_file(&own.path);
        }
    }
}

/// Whole, and under a new inode, so that no machine reads an old copy of it.
fn write(path: &Path, record: &Record) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let staged = path.with_file_name(format!(".{name}"));
    fs::write(&staged, serde_json::to_vec(record)?)?;
    fs::rename(&staged, path)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_of_this_machine_is_dead_at_once_and_others_by_silence() {
        let dir = tempfile::tempdir().unwrap();
        let lives = Lives::of(dir.path());
        let id = lives.own().unwrap();
        assert!(lives.alive(&id));
        let put = |name: &str, record: &Record| write(&dir.path().join(name), record).unwrap();
        put("mine", &Record { beat: 7, ..Record::own() });
        assert!(lives.alive("mine"), "it is this process, under another name");
        put("gone", &Record { started: 1, ..Record::own() });
        assert!(!lives.alive("gone"), "its number was given to another process");
        set_times(Times { beat: Duration::from_secs(3), ttl: Duration::from_millis(80) });
        let far = Record { host: "elsewhere".into(), ..Record::own() };
        put("far", &far);
        assert!(lives.alive("far") && lives.alive("unseen"));
        std::thread::sleep(Duration::from_millis(50));
        put("far", &Record { beat: 1, ..far });
        assert!(lives.alive("far"));
        std::thread::sleep(Duration::from_millis(50));
        assert!(lives.alive("far"), "it has said something 50 ms ago");
        std::thread::sleep(Duration::from_millis(60));
        assert!(!lives.alive("far") && !lives.alive("unseen"));
        lives.sweep(Duration::from_secs(60));
        assert!(dir.path().join("far").exists());
        lives.sweep(Duration::ZERO);
        assert!(!dir.path().join("far").exists() && dir.path().join("mine").exists());
        drop(lives);
        assert!(!dir.path().join(id).exists());
    }
}
