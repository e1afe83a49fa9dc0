//! What the leader needs of a cluster's batch system, whichever it is. `slurm/` is one; a page of
//! the documentation, `docs/adding-an-engine.md`, says how to add another.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What a job takes. Steps of equal shape go into one array, or to the same pilots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Shape {
    /// Cpus.
    pub cpus: u32,
    /// GPUs.
    pub gpus: u32,
    /// As the site calls it: `a100`.
    pub gpu_type: Option<String>,
    /// Bytes of memory; 0 leaves it to the site.
    pub memory: u64,
    /// Wall time in seconds; `None` leaves it to the site.
    pub time_s: Option<u64>,
}

/// Jobs to be submitted together: the tasks 0 to `count - 1` of one script.
#[derive(Clone, Debug, Default)]
pub struct Array {
    /// What it is called; nobody else calls one so.
    pub name: String,
    /// The script that every task runs.
    pub script: PathBuf,
    /// What each task takes.
    pub shape: Shape,
    /// How many tasks.
    pub count: usize,
    /// Where what they print goes, a path on their nodes: see [`Array::output_of`].
    pub output: PathBuf,
    /// Nodes not to be used.
    pub exclude: Vec<String>,
    /// Seconds before the end of its time at which a task is to be told.
    pub margin_s: u64,
}

impl Array {
    /// Where what the task `task` prints goes.
    pub fn output_of(&self, task: usize) -> PathBuf {
        let mut name = self.output.clone().into_os_string();
        name.push(format!("-{task}.out"));
        name.into()
    }
}

/// Why an array was not submitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It never will be.
    Never(String),
    /// There is no room now, or nobody answers: nothing was submitted.
    Later(String),
    /// It may have been submitted or not: ask for its name before it is submitted again.
    Unsure(String),
}

/// Where a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// In the queue.
    Pending,
    /// On a node.
    Running,
    /// About to end; where its node does not answer, for long.
    Ending,
    /// Over, by itself or not.
    Ended(End),
}

/// How a job ended. None of it tells whether its step succeeded: only an exit record does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Its script ended well.
    Completed,
    /// Its script ended badly.
    Failed,
    /// Its time was over.
    TimedOut,
    /// It took more memory than it had asked for.
    OutOfMemory,
    /// Its node is lost.
    NodeFailed,
    /// It was cancelled by somebody.
    Cancelled,
    /// It had to make room for another.
    Preempted,
}

/// What the batch system says of one task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The name of its array.
    pub name: String,
    /// The array's id.
    pub array: String,
    /// Its number in the array.
    pub task: usize,
    /// Its id: `12_3`.
    pub id: String,
    /// Where it stands.
    pub state: State,
    /// Why it waits, or what became of it, in the batch system's words.
    pub reason: String,
    /// Its node.
    pub host: Option<String>,
}

/// How tasks are to be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancel {
    /// What waits goes; what runs is told to save a checkpoint.
    Gently,
    /// All go at once.
    Now,
}

/// A batch system. Its calls may take long; one thread makes them all.
pub trait Batch: Send {
    /// Submits an array and gives its id.
    ///
    /// # Errors
    /// See [`Refusal`].
    fn submit(&mut self, array: &Array) -> Result<String, Refusal>;

    /// What is known of arrays, by name, in one question. What is not known is left out: that is
    /// no proof of anything.
    ///
    /// # Errors
    /// Nobody answered.
    fn poll(&mut self, names: &[String]) -> Result<Vec<Status>, String>;

    /// Ends arrays (`12`) or tasks (`12_3`), by id.
    ///
    /// # Errors
    /// Nobody answered; some may have been ended.
    fn cancel(&mut self, ids: &[String], how: Cancel) -> Result<(), String>;
}
