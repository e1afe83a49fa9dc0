//! How to run a plan: slots, selection, forced steps.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::Budget;
use crate::gpu::{self, Gpu};
use crate::lookup;
use crate::plan::Plan;
use crate::repeat::Earlier;
use crate::schedule::Slots;

/// See the flags of `pipe run`.
#[derive(Clone, Debug)]
pub struct Options {
    /// Cpu slots.
    pub jobs: u32,
    /// GPUs of the pool.
    pub gpus: Vec<Gpu>,
    /// Directory of the GPUs' locks; all processes of a machine must agree on it.
    pub gpu_locks: PathBuf,
    /// How long a step waits where other processes leave too little GPU memory.
    pub gpu_patience: Duration,
    /// How long a worker without a step keeps its GPU from other runs.
    pub gpu_warm: Duration,
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
    /// Fail where the remote does not answer or takes nothing.
    pub remote_required: bool,
    /// How long the run may take.
    pub budget: Option<Budget>,
    /// Under which name the next run that asks the same finds what this one found.
    pub memo: Option<String>,
    /// What the last run that asked the same left.
    pub earlier: Option<Arc<Earlier>>,
    /// The record in which the plan lies, when it is known to be the same as an earlier one.
    pub plan_of: Option<String>,
    /// Read every byte of the user's files and every entry, whatever was found before.
    pub paranoid: bool,
    /// Steps run on a cluster, not here.
    pub cluster: Option<OnCluster>,
}

/// How steps become jobs.
#[derive(Clone, Debug, Default)]
pub struct OnCluster {
    /// So many at a time.
    pub jobs: u32,
    /// Cpus of a step that takes all there are.
    pub cpus: u32,
    /// Bytes of memory of a step that says none; 0 leaves it to the site.
    pub memory: u64,
    /// Wall time of a step that says none, in seconds.
    pub time_s: Option<u64>,
    /// Steps that pilots run.
    pub pilots: BTreeSet<usize>,
    /// Whether its nodes get and leave bytes in the run's remote, not in this cache.
    pub remote: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            jobs: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
            gpus: Vec::new(),
            gpu_locks: gpu::lock::place(),
            gpu_patience: Duration::from_secs(30),
            gpu_warm: Duration::from_secs(5),
            memory: u64::MAX,
            keep_going: false,
            until: Vec::new(),
            only: None,
            force: BTreeSet::new(),
            fresh: BTreeSet::new(),
            remote_required: false,
            budget: None,
            memo: None,
            earlier: None,
            plan_of: None,
            paranoid: false,
            cluster: None,
        }
    }
}

impl Options {
    /// What there is to hand out.
    pub fn slots(&self) -> Slots {
        match &self.cluster {
            Some(cluster) => Slots { cpu: cluster.jobs, ..Slots::default() },
            None => Slots { cpu: self.jobs, gpu: self.gpus.len() as u32, memory: self.memory },
        }
    }

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
