//! Finds GPUs for a granted step, and gives back what no step uses any more.

use std::time::{Duration, Instant};

use super::{Blocked, Executor};
use crate::event::Failure;
use crate::gpu::desk::{Granted, Wish};

impl Executor<'_> {
    /// GPUs for a step that was granted its slots; `None` when it has to wait or cannot run, which
    /// the schedule knows then.
    pub(super) fn take_gpus(&mut self, at: usize) -> Option<Vec<String>> {
        let step = &self.plan.steps[self.steps[at]];
        let count = (step.resources.gpu as usize).min(self.options.gpus.len());
        // Of a cluster's GPUs its batch system takes care.
        if count == 0 || self.options.cluster.is_some() {
            return Some(Vec::new());
        }
        let who = format!("run {} (process {})", self.run_id, std::process::id());
        let wish = Wish { count, memory: step.resources.vram, step: &step.name, who: &who };
        let pool = &mut self.pool;
        match self.desk.take(wish, &mut |uuid| pool.evict(uuid)) {
            Granted::Gpus(gpus) => {
                self.short.remove(&at);
                return Some(gpus);
            }
            Granted::Busy(holder) => {
                self.short.remove(&at);
                self.block(at, Blocked::Gpus(Instant::now()), &holder);
            }
            Granted::Short(message) => {
                let patience = self.options.gpu_patience;
                let since = *self.short.entry(at).or_insert_with(Instant::now);
                if since.elapsed() >= patience {
                    self.fail_early(at, Failure::OutOfMemory, message);
                } else {
                    // The driver takes its time to tell: not too often.
                    let next = Instant::now() + (patience / 4).min(Duration::from_secs(1));
                    let short = message.lines().next().unwrap_or_default();
                    self.block(at, Blocked::Gpus(next), &format!("memory: {short}"));
                }
            }
            Granted::Broken(message) => self.fail_early(at, Failure::Error, message),
        }
        None
    }

    /// Ends workers whose GPUs were idle for a while; other runs may want them.
    pub(super) fn release_gpus(&mut self) {
        for uuid in self.desk.idle(self.options.gpu_warm) {
            self.pool.evict(&uuid);
            self.desk.release(&uuid);
        }
    }
}
