//! What leader and worker say to each other: one JSON object a line over a socket.
//!
//! A frozen step holds digests and no paths, so that the same text can be run by another machine
//! with a store of its own; the places of files that are in no store travel beside it.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use cache::{Digest, Key, Kind, Output};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::event::{Failure, Job};
use crate::stage::Report;

/// Raised when messages change their meaning; both sides must agree.
pub const PROTOCOL: u32 = 2;

/// A step with nothing left to decide.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Frozen {
    /// Its key.
    pub key: Key,
    /// Stage name.
    pub stage: String,
    /// Stage version.
    pub version: u32,
    /// Canonical parameters.
    pub params: Value,
    /// Artifacts by port.
    pub inputs: BTreeMap<String, Vec<FrozenInput>>,
    /// Output ports: name, whether a list, file name.
    pub ports: Vec<(String, bool, String)>,
    /// Threads it may keep busy.
    pub threads: usize,
    /// Environment variables a command passes through.
    pub secrets: Vec<String>,
}

/// An input artifact of a frozen step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FrozenInput {
    /// Number within a list artifact.
    pub index: Option<u32>,
    /// Base name.
    pub name: String,
    /// Digest of its bytes.
    pub digest: Digest,
    /// File or directory.
    pub kind: Kind,
    /// Size.
    pub bytes: u64,
}

impl FrozenInput {
    /// As what the store knows it.
    pub fn output(&self, port: &str) -> Output {
        Output {
            port: port.into(),
            index: self.index,
            name: self.name.clone(),
            kind: self.kind,
            digest: self.digest,
            bytes: self.bytes,
        }
    }
}

/// Leader → worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "do")]
pub enum Order {
    /// Run this step; one at a time.
    Run {
        /// The step.
        frozen: Box<Frozen>,
        /// The attempt's directory.
        attempt: PathBuf,
        /// Where the user's own files are, which no store holds.
        places: BTreeMap<Digest, PathBuf>,
    },
    /// Stop the running step, after a checkpoint if it can.
    Cancel,
}

/// Worker → leader.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "say")]
pub enum Answer {
    /// First message.
    Hello {
        /// [`PROTOCOL`].
        protocol: u32,
        /// Build of the binary.
        build: String,
    },
    /// The stage reports.
    Report {
        /// What.
        report: Report,
    },
    /// The step succeeded; its artifacts are in the store.
    Done {
        /// The artifacts.
        outputs: Vec<Output>,
        /// Digest and size of the log.
        log: Option<(Digest, u64)>,
    },
    /// Nothing was done, since the bytes of these inputs are missing or damaged.
    Lost {
        /// Which, each once.
        digests: Vec<Digest>,
    },
    /// The step failed.
    Failed {
        /// How.
        failure: Failure,
        /// For people.
        message: String,
    },
    /// Of the step's job; said by a cluster, never by a worker.
    Job {
        /// What.
        said: Job,
    },
    /// Somebody wants the run to end; said by a cluster.
    Cancelled,
}

/// Sends one message.
pub fn send(mut stream: &UnixStream, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Receives messages until the other side is gone; a garbled line ends it too.
pub fn receive<T: DeserializeOwned>(stream: UnixStream) -> impl Iterator<Item = T> {
    let lines = BufReader::new(stream).lines();
    lines.map_while(|line| serde_json::from_str(&line.ok()?).ok())
}
