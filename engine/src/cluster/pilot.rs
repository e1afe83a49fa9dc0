//! A pilot: an allocation that takes step after step from a directory, keeps its worker (and with it
//! a GPU's context) warm, and ends when there is nothing to do.
//!
//! `queue/` holds orders, one file each. Whoever moves a file to `taken/` has it: a rename succeeds
//! once. `cancel/` names steps that are to stop; `end` says that no more will come.

use std::collections::VecDeque;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::agent::{Agent, Setting, leave, waiting};
use super::records::{self, Ordered, Place};

/// Pauses between looks at an empty queue, from first to longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(250));
/// A leader whose count stands still for so long is gone.
const SILENCE: Duration = Duration::from_secs(60);

/// The folders of the pilots of one shape.
#[derive(Clone, Debug)]
pub(crate) struct Queue(pub PathBuf);

impl Queue {
    pub fn make(&self) -> std::io::Result<()> {
        for name in ["queue", "taken", "cancel"] {
            fs::create_dir_all(self.0.join(name))?;
        }
        Ok(())
    }

    pub fn queue(&self) -> PathBuf {
        self.0.join("queue")
    }

    pub fn taken(&self) -> PathBuf {
        self.0.join("taken")
    }

    pub fn cancel(&self) -> PathBuf {
        self.0.join("cancel")
    }

    pub fn end(&self) -> PathBuf {
        self.0.join("end")
    }

    /// Takes the order `file` for `who`; `false` when another was faster.
    pub fn take(&self, file: &str, who: &str) -> std::io::Result<bool> {
        let to = self.taken().join(format!("{file}@{who}"));
        match fs::rename(self.queue().join(file), &to) {
            Ok(()) => Ok(true),
            // Said twice over a network, the second time says that it is gone.
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(to.exists()),
            Err(e) => Err(e),
        }
    }
}

/// How pilots are to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Brief {
    /// Whose count tells that the leader lives.
    pub beat: PathBuf,
    /// Where a pilot says that it ends.
    pub mail: PathBuf,
    /// Seconds without a step after which it does.
    pub idle_s: f64,
    /// Cpus of each.
    pub cpus: u32,
    /// GPUs of each.
    pub gpus: u32,
}

/// What a pilot says when it ends.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Farewell {
    pub place: Place,
    /// Wall time.
    pub seconds: f64,
    /// Of them, with a step.
    pub busy_s: f64,
    pub cpus: u32,
    pub gpus: u32,
}

/// Names of farewells begin so in a mailbox.
pub(crate) const FAREWELL: &str = "pilot.";
pub(crate) const BRIEF: &str = "brief.json";

/// Serves the queue in `dir` to its end: the main function of a pilot.
pub fn pilot(setting: Setting, dir: &Path) -> Result<()> {
    let queue = Queue(dir.to_path_buf());
    let Some(brief) = records::read::<Brief>(&dir.join(BRIEF)) else {
        anyhow::bail!("{} is no queue of pilots", dir.display());
    };
    let mut agent = Agent::new(setting)?;
    let mut leader = Leader::new(&brief.beat);
    let mut busy = Duration::ZERO;
    let (mut idle, mut pause) = (Instant::now(), PAUSE.0);
    let mut seen: VecDeque<String> = VecDeque::new();
    while !agent.signalled() {
        if seen.is_empty() {
            seen = waiting(&queue.queue());
        }
        let began = Instant::now();
        if take_one(&mut agent, &queue, &mut seen)? {
            busy += began.elapsed();
            (idle, pause) = (Instant::now(), PAUSE.0);
            continue;
        }
        let over = queue.end().exists() || leader.is_gone();
        if over || idle.elapsed().as_secs_f64() > brief.idle_s {
            break;
        }
        std::thread::sleep(pause);
        pause = (pause * 3 / 2).min(PAUSE.1);
    }
    let place = agent.setting.place.clone();
    let name = format!("{FAREWELL}{}", place.job);
    let farewell = Farewell {
        place,
        seconds: agent.began.elapsed().as_secs_f64(),
        busy_s: busy.as_secs_f64(),
        cpus: brief.cpus,
        gpus: brief.gpus,
    };
    let _ = records::write_new(&brief.mail.join(name), &farewell);
    Ok(())
}

/// Takes and runs the first order of `seen` that nobody else took and that fits into what is left
/// of this job's time.
fn take_one(agent: &mut Agent, queue: &Queue, seen: &mut VecDeque<String>) -> Result<bool> {
    let Place { job, host } = agent.setting.place.clone();
    let who = format!("{job}@{host}");
    while let Some(file) = seen.pop_front() {
        if agent.signalled() {
            return Ok(false);
        }
        if !queue.take(&file, &who)? {
            continue;
        }
        let taken = queue.taken().join(format!("{file}@{who}"));
        let Some(ordered) = records::read::<Ordered>(&taken) else {
            let _ = fs::remove_file(taken);
            continue;
        };
        if agent.left(&ordered).is_some_and(|left| left < 2.0 * ordered.margin_s) {
            // For another, or for the next one: this job ends.
            fs::rename(&taken, queue.queue().join(&file))?;
            agent.setting.signals.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            return Ok(false);
        }
        let name = file.split_once('-').map_or(&file[..], |(_, name)| name);
        let Some(dir) = records::dir_of(&agent.setting.store, name) else {
            let _ = fs::remove_file(taken);
            continue;
        };
        let asked = queue.cancel().join(name);
        let looked = std::cell::Cell::new(Instant::now());
        let cancelled = || {
            // Not too often: it is a question to a server.
            if looked.get().elapsed() < Duration::from_secs(1) {
                return false;
            }
            looked.set(Instant::now());
            asked.exists()
        };
        // An attempt that is gone was given up: nobody waits for it.
        if records::prepare(&dir).is_ok() {
            let exit = agent.step(&ordered, &cancelled);
            let _ = leave(&dir, &ordered, &exit);
        }
        let _ = fs::remove_file(taken);
        return Ok(true);
    }
    Ok(false)
}

/// The leader, watched by this process' own clock.
struct Leader<'a> {
    beat: &'a Path,
    last: Option<Vec<u8>>,
    changed: Instant,
    looked: Instant,
}

impl Leader<'_> {
    fn new(beat: &Path) -> Leader<'_> {
        Leader { beat, last: None, changed: Instant::now(), looked: Instant::now() }
    }

    fn is_gone(&mut self) -> bool {
        if self.looked.elapsed() < Duration::from_secs(2) {
            return false;
        }
        self.looked = Instant::now();
        let now = fs::read(self.beat).ok();
        if now != self.last {
            (self.last, self.changed) = (now, Instant::now());
        }
        self.changed.elapsed() > SILENCE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_taken_once() {
        let dir = tempfile::tempdir().unwrap();
        let queue = Queue(dir.path().to_path_buf());
        queue.make().unwrap();
        for i in 0..200 {
            fs::write(queue.queue().join(format!("{i:04}-k.a")), "").unwrap();
        }
        let taker = |who: &'static str| {
            let queue = queue.clone();
            std::thread::spawn(move || {
                let names = waiting(&queue.queue());
                names.iter().filter(|name| queue.take(name, who).unwrap()).count()
            })
        };
        let takers = ["a", "b", "c"].map(taker);
        let taken: usize = takers.into_iter().map(|taker| taker.join().unwrap()).sum();
        assert_eq!(taken, 200);
        assert_eq!(fs::read_dir(queue.taken()).unwrap().count(), 200);
    }
}
