//! The closed list of what can be observed of a run: one fact, one event, one line of its record.

use cache::{Key, Output};
use serde::{Deserialize, Serialize};

use crate::stage::Report;

/// An event with its time.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stamped {
    /// Seconds since the run started.
    pub t: f64,
    /// What happened.
    #[serde(rename = "e")]
    pub event: Event,
}

/// What happened. Steps are named by their position in the plan.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Event {
    /// The run began.
    Started {
        /// Steps of the plan that this run looks at.
        steps: usize,
        /// Cpu slots.
        jobs: usize,
    },
    /// An entry was there; nothing to do.
    Cached {
        /// Position in the plan.
        step: usize,
        /// Its key.
        key: Key,
        /// What it took when it ran, in seconds.
        saved_s: f64,
        /// The artifacts.
        outputs: Vec<Output>,
    },
    /// Every step is a hit, found or made by an earlier run whose events lie beside these; but some,
    /// of which events of their own tell.
    Unchanged {
        /// Id of that run.
        run: String,
        /// Positions in the plan of those that are not as in that run, sorted.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        but: Vec<usize>,
    },
    /// Another process works on the same key.
    Waiting {
        /// Position in the plan.
        step: usize,
        /// Who does the work.
        holder: String,
    },
    /// A worker took the step.
    Launched {
        /// Position in the plan.
        step: usize,
        /// Its key.
        key: Key,
        /// 1 for the first attempt of this run.
        attempt: u32,
        /// The attempt's directory, below the store.
        dir: String,
        /// Position of the sealed checkpoint it starts from.
        resumed: Option<u64>,
    },
    /// The stage said something.
    Reported {
        /// Position in the plan.
        step: usize,
        /// What it said.
        report: Report,
    },
    /// The step is done, its artifacts are there.
    Finished {
        /// Position in the plan.
        step: usize,
        /// Its key.
        key: Key,
        /// Wall time of the attempt.
        seconds: f64,
        /// The artifacts.
        outputs: Vec<Output>,
    },
    /// An attempt failed.
    Failed {
        /// Position in the plan.
        step: usize,
        /// Its key, when it was known.
        key: Option<Key>,
        /// What kind of failure.
        failure: Failure,
        /// For people.
        message: String,
        /// The end of the attempt's log.
        log: String,
        /// Whether it will be tried again.
        retry: bool,
    },
    /// The step was not run, since another failed or the run was stopped.
    Skipped {
        /// Position in the plan.
        step: usize,
        /// The step that failed, if that was the reason.
        because: Option<usize>,
    },
    /// What became of the step's job on a cluster.
    Job {
        /// Position in the plan.
        step: usize,
        /// What.
        said: Job,
    },
    /// Its entry is on disk for everybody.
    Durable {
        /// Position in the plan.
        step: usize,
    },
    /// Something a person should read.
    Note {
        /// The text.
        text: String,
    },
    /// The run ended.
    Ended {
        /// How.
        summary: Summary,
    },
}

/// What a cluster says of jobs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum Job {
    /// It waits in the queue.
    Queued {
        /// The cluster's name of it; empty before it has one.
        job: String,
        /// Why, in the cluster's words.
        reason: String,
    },
    /// A node works at the step.
    Began {
        /// The cluster's name of the job.
        job: String,
        /// The node.
        host: String,
    },
    /// A node has done so.
    Ended {
        /// The cluster's name of the job.
        job: String,
        /// The node.
        host: String,
        /// Wall time.
        seconds: f64,
        /// Cpus it had.
        cpus: u32,
        /// GPUs it had.
        gpus: u32,
    },
    /// A job that takes many steps ended; it was of no step for so long.
    Idle {
        /// Wall time without a step.
        seconds: f64,
        /// Cpus it had.
        cpus: u32,
        /// GPUs it had.
        gpus: u32,
    },
    /// What nodes left for the leader cannot be taken; it is tried on.
    Troubled {
        /// Why.
        why: String,
    },
}

/// Why an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// The stage or command returned an error.
    Error,
    /// The stage panicked.
    Panic,
    /// The numbers are no numbers any more.
    Diverged,
    /// The worker vanished.
    Crash,
    /// The worker was killed by the kernel for memory, or a device has too little of it.
    OutOfMemory,
    /// A device failed in an operation.
    Fault,
    /// It ran past its time-out.
    Timeout,
    /// The run was stopped.
    Cancelled,
    /// Its job ended before it did: its time was over, it made room for another, it was cancelled.
    Preempted,
    /// Its job, or the node under it, is lost.
    Lost,
    /// A user's file is missing, unreadable or changed while it was read.
    Input,
}

impl Failure {
    /// Whether the step is no cause of it, as may be on a cluster.
    pub fn is_foreign(self) -> bool {
        matches!(self, Failure::Preempted | Failure::Lost)
    }

    /// Whether trying again can help.
    pub fn retriable(self) -> bool {
        matches!(
            self,
            Failure::Crash
                | Failure::OutOfMemory
                | Failure::Fault
                | Failure::Timeout
                | Failure::Preempted
                | Failure::Lost
        )
    }
}

/// Totals of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Hits.
    pub cached: usize,
    /// Executed with success.
    pub ran: usize,
    /// Failed for good.
    pub failed: usize,
    /// Not run, those that were left included.
    pub skipped: usize,
    /// Not run or not ended, since the budget was used up.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub left: usize,
    /// Wall time.
    pub seconds: f64,
    /// What the hits took when they ran.
    pub saved_s: f64,
    /// Stopped by the user.
    pub interrupted: bool,
    /// What the remote cache was good for, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<Shared>,
    /// What a cluster gave, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<Used>,
}

/// What the jobs of a run took, also those of failed attempts and of idle pilots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Used {
    /// Attempts that nodes ran.
    pub jobs: usize,
    /// Cpus times hours.
    pub cpu_hours: f64,
    /// GPUs times hours.
    pub gpu_hours: f64,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// Totals of a run with a remote cache.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Shared {
    /// Its name, without credentials.
    pub remote: String,
    /// Results that came from it.
    pub hits: usize,
    /// Results it did not have, or whose entry was not believed.
    pub misses: usize,
    /// Questions without an answer.
    pub unanswered: usize,
    /// Bytes that came.
    pub fetched_bytes: u64,
    /// Results that were sent.
    pub uploads_done: usize,
    /// Results that could not be sent.
    pub uploads_failed: usize,
    /// Bytes that were sent.
    pub sent_bytes: u64,
}
