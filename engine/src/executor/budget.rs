//! A run with a budget of wall time: it starts what would end in time and stops at a clean frontier.
//!
//! A step that would end after the budget is not started, and what needs it is left with it; others
//! go on. One of which nothing like was ever done is started while there is time. When time is up,
//! whatever still runs is told to stop as by Ctrl-C: it seals a checkpoint, from which the next run
//! goes on. So a run is never much longer than its budget.

use std::collections::HashMap;
use std::time::Duration;

use cache::Key;

use super::Executor;

/// How long a run may take.
#[derive(Clone, Debug, Default)]
pub struct Budget {
    /// From its start, in seconds.
    pub seconds: f64,
    /// What each step takes, by position in the plan, as far as it is known; in seconds.
    pub estimates: HashMap<usize, f64>,
}

/// A step that was left for want of time. Those that need it are left, too.
#[derive(Clone, Debug, PartialEq)]
pub struct Left {
    /// Its position in the plan.
    pub step: usize,
    /// Why.
    pub why: Why,
}

/// Why a step was left.
#[derive(Clone, Debug, PartialEq)]
pub enum Why {
    /// It would have ended after the budget.
    TooLong {
        /// What it would have taken, in seconds.
        takes: f64,
        /// What was left of the budget, in seconds.
        left: f64,
    },
    /// It ran when time was up, and was stopped.
    Cut,
}

impl Executor<'_> {
    /// Whether `at`, launched, was left since it would end after the budget.
    pub(super) fn leaves(&mut self, at: usize, key: Key) -> bool {
        let Some(budget) = &self.options.budget else { return false };
        let step = self.steps[at];
        let Some(takes) = budget.estimates.get(&step) else { return false };
        let takes = takes * self.share_left(step, key);
        let left = (budget.seconds - self.started.elapsed().as_secs_f64()).max(0.0);
        if takes <= left {
            return false;
        }
        self.left.push(Left { step, why: Why::TooLong { takes, left } });
        self.schedule.leave(at);
        true
    }

    /// The share of a step's updates that its newest checkpoint leaves to be made.
    fn share_left(&self, step: usize, key: Key) -> f64 {
        let updates = self.plan.steps[step].params.get("updates").and_then(|n| n.as_f64());
        match (updates, self.cache.checkpoint_latest(&key)) {
            (Some(all), Some((done, _))) if all > 0.0 && !self.options.fresh.contains(&step) => {
                (1.0 - done as f64 / all).clamp(0.0, 1.0)
            }
            _ => 1.0,
        }
    }

    /// Stops what runs once time is up.
    pub(super) fn end_budget(&mut self) {
        let Some(budget) = &self.options.budget else { return };
        let limit = Duration::try_from_secs_f64(budget.seconds).unwrap_or(Duration::MAX);
        if self.out_of_time || self.started.elapsed() < limit {
            return;
        }
        self.out_of_time = true;
        let mut running: Vec<usize> = self.running.keys().map(|at| self.steps[*at]).collect();
        running.sort_unstable();
        self.left.extend(running.into_iter().map(|step| Left { step, why: Why::Cut }));
    }
}
