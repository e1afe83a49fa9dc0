//! The node's side: takes frozen steps from files, has them run by a worker of its own, and leaves
//! what came of it in files. It plans nothing and reaches nobody.
//!
//! When its time is nearly over, or it is told to go, the step saves a checkpoint and stops; the
//! leader submits it again and it goes on from there. Which of the two it was is told by the clock:
//! which signal comes when differs from release to release.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use cache::Cache;
use rustix::process::Signal;

use super::records::{self, ANSWERS, EXIT, Exit, ORDER, Ordered, Place, STARTED};
use crate::event::Failure;
use crate::pool::{Kind, Launcher, Message, Pool};
use crate::wire::{Answer, Order};
use crate::worker::LOG;

/// How often signals and the clock are looked at.
const TICK: Duration = Duration::from_millis(50);
/// Reports are written this often.
const FLUSH: Duration = Duration::from_millis(500);
/// How long a step may take to stop when nothing else says so.
const GRACE: Duration = Duration::from_secs(20);

/// What an agent knows of itself.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The store.
    pub store: PathBuf,
    /// Build of the binary.
    pub build: String,
    /// Job and node.
    pub place: Place,
    /// Arguments of its worker, before the store's path.
    pub worker: Vec<String>,
    /// Raised by each signal that asks it to go.
    pub signals: &'static AtomicU32,
}

/// An agent at work.
pub(super) struct Agent {
    pub setting: Setting,
    pool: Pool,
    heard: Receiver<Message>,
    pub began: Instant,
}

impl Agent {
    pub fn new(setting: Setting) -> Result<Agent> {
        crate::descendants::adopt();
        let cache = Cache::open(&setting.store)?;
        let (sender, heard) = channel();
        let launcher = Launcher::Processes { args: setting.worker.clone(), early: None };
        let messages = Arc::new(move |message| sender.send(message).is_ok());
        let pool = Pool::new(launcher, &cache, &setting.build, messages);
        Ok(Agent { setting, pool, heard, began: Instant::now() })
    }

    /// Whether somebody wants it to go.
    pub fn signalled(&self) -> bool {
        self.setting.signals.load(Ordering::Relaxed) > 0
    }

    /// Runs the step of `ordered` to its end; `cancelled` tells whether the leader wants it to stop.
    pub fn step(&mut self, ordered: &Ordered, cancelled: &dyn Fn() -> bool) -> Exit {
        let started = Instant::now();
        let answer = match &ordered.order {
            Order::Run { frozen, attempt, .. } if ordered.build == self.setting.build => {
                let kind = Kind::Cpu(frozen.threads);
                let worker = self.pool.take(&kind, &attempt.join(LOG));
                match worker.and_then(|id| self.pool.order(id, &ordered.order).map(|()| id)) {
                    Ok(worker) => self.watch(worker, ordered, attempt, cancelled),
                    Err(error) => lost(format!("no worker could be started: {error}")),
                }
            }
            _ => Answer::Failed {
                failure: Failure::Error,
                message: format!(
                    "the node runs `{}`, the leader `{}`\nhint: name the leader's binary under `program:`",
                    self.setting.build, ordered.build
                ),
            },
        };
        Exit {
            answer,
            place: self.setting.place.clone(),
            seconds: started.elapsed().as_secs_f64(),
            cpus: ordered.cpus,
            gpus: ordered.gpus,
        }
    }

    fn watch(
        &mut self,
        worker: u64,
        ordered: &Ordered,
        attempt: &Path,
        cancelled: &dyn Fn() -> bool,
    ) -> Answer {
        let mut reports = Reports::new(attempt);
        let mut stopping: Option<(Instant, &str)> = None;
        loop {
            match self.heard.recv_timeout(TICK) {
                Ok(message) if message.worker != worker => {
                    if message.answer.is_none() {
                        self.pool.throw_away(message.worker, true);
                    }
                    continue;
                }
                Ok(Message { answer: Some(answer @ Answer::Report { .. }), .. }) => {
                    reports.take(&answer);
                }
                Ok(message) => {
                    reports.flush();
                    return self.ended(worker, message.answer, ordered, stopping.map(|s| s.1));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return lost("the worker is gone".into()),
            }
            reports.now_and_then();
            match stopping {
                None => {
                    let Some(why) = self.reason(ordered, cancelled) else { continue };
                    stopping = Some((Instant::now(), why));
                    let _ = self.pool.order(worker, &Order::Cancel);
                }
                Some((since, why)) if since.elapsed() > self.grace(ordered) => {
                    self.pool.throw_away(worker, false);
                    let message = format!("{why}; it did not stop in time and was ended");
                    return Answer::Failed { failure: Failure::Preempted, message };
                }
                Some(_) => {}
            }
        }
    }

    /// Why a step is to stop now, if it is.
    fn reason(&self, ordered: &Ordered, cancelled: &dyn Fn() -> bool) -> Option<&'static str> {
        if self.left(ordered).is_some_and(|left| left < ordered.margin_s) {
            Some("the time of its job was over")
        } else if self.signalled() {
            Some("its job was told to end: preempted, or cancelled")
        } else {
            cancelled().then_some("stopped")
        }
    }

    /// Seconds of this job that are left.
    pub fn left(&self, ordered: &Ordered) -> Option<f64> {
        Some(ordered.limit_s? - self.began.elapsed().as_secs_f64())
    }

    /// How long a stopping step may take; without a known end, what the site gives is not known.
    fn grace(&self, ordered: &Ordered) -> Duration {
        match self.left(ordered) {
            Some(left) if left < ordered.margin_s => {
                Duration::from_secs_f64((ordered.margin_s * 0.8).max(1.0))
            }
            _ => GRACE,
        }
    }

    /// What the worker's last word, or its end, means for the step.
    fn ended(
        &mut self,
        worker: u64,
        answer: Option<Answer>,
        ordered: &Ordered,
        stopping: Option<&str>,
    ) -> Answer {
        let answer = match answer {
            Some(answer @ (Answer::Done { .. } | Answer::Lost { .. })) => {
                self.pool.give_back(worker);
                return answer;
            }
            Some(answer) => {
                self.pool.throw_away(worker, false);
                answer
            }
            None => {
                let signal = self.pool.throw_away(worker, true);
                let (failure, how) = match signal {
                    Some(Signal::KILL) => {
                        (Failure::OutOfMemory, "killed (SIGKILL): out of memory, or by hand")
                    }
                    _ => (Failure::Crash, "gone without an answer"),
                };
                Answer::Failed { failure, message: format!("the worker was {how}") }
            }
        };
        // The signal that ended the step may reach its processes before it reaches this one.
        std::thread::sleep(2 * TICK);
        match stopping.or_else(|| self.reason(ordered, &|| false)) {
            Some(why) => Answer::Failed { failure: Failure::Preempted, message: why.into() },
            None => answer,
        }
    }
}

fn lost(message: String) -> Answer {
    Answer::Failed { failure: Failure::Lost, message }
}

/// What a step reports, on its way into a file.
struct Reports {
    path: PathBuf,
    file: Option<File>,
    text: Vec<u8>,
    flushed: Instant,
}

impl Reports {
    fn new(attempt: &Path) -> Reports {
        let path = records::path(attempt, ANSWERS);
        Reports { path, file: None, text: Vec::new(), flushed: Instant::now() }
    }

    fn take(&mut self, answer: &Answer) {
        if serde_json::to_writer(&mut self.text, answer).is_ok() {
            self.text.push(b'\n');
        }
    }

    fn now_and_then(&mut self) {
        if self.flushed.elapsed() > FLUSH {
            self.flush();
        }
    }

    fn flush(&mut self) {
        self.flushed = Instant::now();
        if self.text.is_empty() {
            return;
        }
        if self.file.is_none() {
            self.file = OpenOptions::new().create(true).append(true).open(&self.path).ok();
        }
        // Reports are for people: what cannot be written is not missed.
        if let Some(file) = &mut self.file {
            let _ = file.write_all(&self.text);
        }
        self.text.clear();
    }
}

/// Runs the attempt that stands in line `task` of `list`: the main function of a job of its own.
pub fn job(setting: Setting, list: &Path, task: usize) -> Result<()> {
    let text = std::fs::read_to_string(list)
        .with_context(|| format!("cannot read the list of steps, {}", list.display()))?;
    let Some(name) = text.lines().nth(task) else {
        bail!("{} has no line {task}", list.display());
    };
    let dir = records::dir_of(&setting.store, name);
    let dir = dir.with_context(|| format!("`{name}` names no attempt"))?;
    let ordered: Ordered = records::read(&records::path(&dir, ORDER))
        .with_context(|| format!("there is no order in {}", dir.display()))?;
    if !records::write_new(&records::path(&dir, STARTED), &setting.place)? {
        // Slurm has started it again, or another copy of it goes on somewhere.
        let answer = Answer::Failed {
            failure: Failure::Preempted,
            message: "its job was started a second time".into(),
        };
        let place = setting.place.clone();
        let exit = Exit { answer, place, seconds: 0.0, cpus: ordered.cpus, gpus: ordered.gpus };
        return leave(&dir, &ordered, &exit);
    }
    records::announce_start(&dir, &ordered.mail);
    let mut agent = Agent::new(setting)?;
    let exit = agent.step(&ordered, &|| false);
    leave(&dir, &ordered, &exit)
}

/// Leaves the exit record and tells of it; only the first one of an attempt counts.
pub(super) fn leave(dir: &Path, ordered: &Ordered, exit: &Exit) -> Result<()> {
    let path = records::path(dir, EXIT);
    let written = records::write_new(&path, exit);
    written.with_context(|| format!("cannot write {}", path.display()))?;
    records::announce(dir, &ordered.mail);
    Ok(())
}

/// Files of a directory in the order of their names, without those that are being written.
pub(super) fn waiting(dir: &Path) -> VecDeque<String> {
    let items = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = items.filter_map(|item| item.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort_unstable();
    names.into()
}
