//! Steps as jobs of a cluster: what they ask for, where they stand, and failures that are not theirs.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cache::{Attempt, Key};

use super::{Executor, Running, here};
use crate::cluster::batch::Shape;
use crate::event::{Event, Failure, Job, Used};
use crate::pool::{Kind, Wanted};
use crate::stage::Cpu;

/// So often a step is tried again after failures by no fault of its own, without a new checkpoint.
const MOST_FOREIGN: u32 = 10;
/// So often with twice the memory.
const MOST_MEMORY: u32 = 2;

/// How often a step was tried again though its `retries` do not say so.
#[derive(Default)]
pub(super) struct Tries {
    /// After failures by no fault of its own.
    foreign: u32,
    /// For lack of memory.
    memory: u32,
    /// How far its checkpoint was then.
    position: Option<u64>,
}

/// What a step's [`Kind`] is, kept for as long as it is wanted.
pub(super) struct Asked {
    kind: Kind,
    pub shape: Shape,
    key: Key,
    pilot: bool,
}

impl Asked {
    pub fn wanted(&self) -> Wanted<'_> {
        Wanted { kind: &self.kind, shape: self.shape.clone(), key: self.key, pilot: self.pilot }
    }
}

impl Executor<'_> {
    /// What a step needs of whoever runs it.
    pub(super) fn wanted(&self, step: usize, key: Key, gpus: &[String]) -> Asked {
        let slots = here(self.plan, step, self.registry, self.options);
        let mut shape = Shape { cpus: slots.cpu, ..Shape::default() };
        let mut pilot = false;
        if let Some(cluster) = &self.options.cluster {
            let planned = &self.plan.steps[step];
            let resources = &planned.resources;
            let all = self.registry.get(&planned.stage).is_some_and(|s| s.cpu == Cpu::All);
            let default = if all && resources.gpu == 0 { cluster.cpus } else { 1 };
            let memory = Some(resources.memory).filter(|memory| *memory > 0);
            shape = Shape {
                cpus: resources.cpu.unwrap_or(default).max(1),
                gpus: resources.gpu,
                gpu_type: resources.gpu_type.clone(),
                memory: memory.unwrap_or(cluster.memory),
                time_s: resources.time_s.map(|s| s.ceil() as u64).or(cluster.time_s),
            };
            pilot = cluster.pilots.contains(&step);
        }
        let kind = match gpus.is_empty() {
            true => Kind::Cpu(shape.cpus as usize),
            false => Kind::Gpus(gpus.to_vec()),
        };
        Asked { kind, shape, key, pilot }
    }

    /// Somebody who works at `key` for a leader that is gone.
    pub(super) fn resumed(&mut self, key: &Key) -> Option<(u64, Attempt)> {
        let (worker, dir) = self.pool.resume(key)?;
        match Attempt::reopen(Path::new(&dir)) {
            Ok(attempt) => Some((worker, attempt)),
            Err(_) => {
                self.pool.throw_away(worker, false);
                None
            }
        }
    }

    /// Takes what a cluster says of a step's job.
    pub(super) fn of_job(&mut self, worker: u64, said: Job) {
        if let Job::Troubled { why } = said {
            return self
                .emit(Event::Note { text: format!("what nodes left cannot be taken now: {why}") });
        }
        let mut used = self.summary.used.unwrap_or_default();
        if let Job::Ended { seconds, cpus, gpus, .. } | Job::Idle { seconds, cpus, gpus } = said {
            used.cpu_hours += seconds / 3600.0 * f64::from(cpus);
            used.gpu_hours += seconds / 3600.0 * f64::from(gpus);
            used.jobs += usize::from(matches!(said, Job::Ended { .. }));
            self.summary.used = Some(Used { ..used });
        }
        let Some(&at) = self.by_worker.get(&worker) else { return };
        if let Some(running) = self.running.get_mut(&at) {
            match &said {
                Job::Began { .. } => (running.begun, running.started) = (true, Instant::now()),
                Job::Ended { seconds, .. } => {
                    let took = Duration::from_secs_f64(seconds.max(0.0));
                    running.started = Instant::now().checked_sub(took).unwrap_or(running.started);
                }
                Job::Queued { .. } | Job::Idle { .. } | Job::Troubled { .. } => {}
            }
        }
        self.emit(Event::Job { step: self.steps[at], said });
    }

    /// Whether a failed step is tried again. What is no fault of its own is not counted, but bounded
    /// while its checkpoints do not get any further.
    pub(super) fn tries_again(&mut self, at: usize, running: &Running, failure: Failure) -> bool {
        let step = self.steps[at];
        let on_cluster = self.options.cluster.is_some();
        if on_cluster && (failure.is_foreign() || failure == Failure::OutOfMemory) {
            let position = self.position(&running.key);
            let tries = self.foreign.entry(step).or_default();
            if position > tries.position {
                *tries = Tries { position, ..Tries::default() };
            }
            let (count, most) = match failure.is_foreign() {
                true => (&mut tries.foreign, MOST_FOREIGN),
                false => (&mut tries.memory, MOST_MEMORY),
            };
            *count += 1;
            if *count <= most {
                self.attempts[step] -= 1;
                self.pool.failed(&running.key, failure);
                return true;
            }
        }
        failure.retriable() && self.attempts[step] <= self.plan.steps[step].retries
    }

    /// How far the newest checkpoint of `key` is.
    pub(super) fn position(&self, key: &Key) -> Option<u64> {
        match self.options.cluster.as_ref().is_some_and(|cluster| cluster.remote) {
            // Nodes see none of this cache.
            true => self.pool.saved(key),
            false => self.cache.checkpoint_latest(key).map(|(position, _)| position),
        }
    }

    /// Lets the jobs of this run go on without it, if that is wanted: their steps are skipped here.
    pub(super) fn leaves_jobs(&mut self) -> bool {
        if self.options.cluster.is_none() || !self.leave.load(Ordering::Relaxed) {
            return false;
        }
        self.pool.leave();
        for at in self.running.keys().copied().collect::<Vec<_>>() {
            let running = self.running.remove(&at).expect("just listed");
            self.by_worker.remove(&running.worker);
            self.schedule.again(at); // after a stop this means skipped
        }
        true
    }

    /// Somebody else wants the run and its jobs to end.
    pub(super) fn cancelled(&mut self) {
        if self.stopping == 0 {
            self.leave.store(false, Ordering::Relaxed);
            self.interrupts.store(1, Ordering::Relaxed);
        }
    }
}
