//! How to run a plan: slots, selection, forced steps.

use std::collections::BTreeSet;

use crate::lookup;
use crate::plan::Plan;

/// See the flags of `pipe run`.
#[derive(Clone, Debug)]
pub struct Options {
    /// Cpu slots.
    pub jobs: u32,
    /// GPUs of the pool, as CUDA_VISIBLE_DEVICES wants them.
    pub gpus: Vec<String>,
    /// Bytes of memory to hand out.
    pub memory: u64,
    /// Go on with what does not depend on a failure.
    pub keep_going: bool,
    /// Only these steps and what they need; empty means all.
    pub until: Vec<usize>,
    /// Only this step; what it needs must be cached.
    pub only: Option<usize>,
    /// Run although an entry may be there, and let the result replace it.
    pub force: BTreeSet<usize>,
    /// Drop checkpoints of these steps first.
    pub fresh: BTreeSet<usize>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            jobs: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
            gpus: Vec::new(),
            memory: u64::MAX,
            keep_going: false,
            until: Vec::new(),
            only: None,
            force: BTreeSet::new(),
            fresh: BTreeSet::new(),
        }
    }
}

impl Options {
    /// Positions of the steps to look at, in the plan's order.
    pub fn selection(&self, plan: &Plan) -> Vec<usize> {
        let mut stack: Vec<usize> = self.until.iter().copied().chain(self.only).collect();
        if stack.is_empty() {
            return (0..plan.steps.len()).collect();
        }
        let mut wanted = BTreeSet::new();
        while let Some(step) = stack.pop() {
            if wanted.insert(step) {
                stack.extend(lookup::upstream(plan, step));
            }
        }
        wanted.into_iter().collect()
    }
}
