//! What a step takes of the machine, told before it runs by the stage that knows. Pure: parameters
//! and what is known of the inputs go in, figures come out; what cannot be known stays unknown.
//!
//! Every figure has one of two meanings. A *likely* one is for people and may be wrong. A *least* one
//! is a bound that no run stays below: only by those a step is refused.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::{Entry, Stage};

/// A stage that tells what it takes. Apart from [`Stage`], since no byte of a result depends on it:
/// a cost may be told better without results being called otherwise.
pub trait Costed: Stage {
    /// What a step with these parameters and inputs takes; `None` if too little is known.
    fn cost(params: &Self::Params, known: &Known) -> Option<Cost>;
}

/// What is known of an artifact, which may not have been made yet.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Artifact {
    /// Number within a list artifact (the layer), if it has one.
    pub index: Option<u32>,
    /// Its size.
    pub bytes: Option<u64>,
    /// What sizes depend on (a model's configuration, the length of sequences): a value that only
    /// stages understand; null if nothing is known.
    pub about: Value,
    /// Whether `about` is certain: read from the artifact, or following from what is certain.
    pub sure: bool,
}

/// What is known of the inputs of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    /// Artifacts by connected port, in order. Of a port that will get a list of unknown length there
    /// is one, of which nothing is known.
    pub ports: BTreeMap<String, Vec<Artifact>>,
}

impl Known {
    /// All artifacts at `port`; none when nothing is connected.
    pub fn all(&self, port: &str) -> &[Artifact] {
        self.ports.get(port).map_or(&[], Vec::as_slice)
    }

    /// The artifact at `port`, if exactly one is connected.
    pub fn one(&self, port: &str) -> Option<&Artifact> {
        match self.all(port) {
            [one] => Some(one),
            _ => None,
        }
    }

    /// Whether anything is connected to `port`.
    pub fn has(&self, port: &str) -> bool {
        !self.all(port).is_empty()
    }

    /// Bytes of all artifacts at `port`, if all are known.
    pub fn bytes(&self, port: &str) -> Option<u64> {
        self.all(port).iter().map(|artifact| artifact.bytes).sum()
    }

    /// Bytes of all inputs, if all are known.
    pub fn all_bytes(&self) -> Option<u64> {
        self.ports.values().flatten().map(|artifact| artifact.bytes).sum()
    }
}

/// How much of something a step takes at most at one time.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Amount {
    /// In bytes, as far as can be told.
    pub likely: Option<u64>,
    /// In bytes: no run takes less. 0 if nothing is certain.
    pub least: u64,
    /// What to change so that it takes less, as a clause: ``set `attention: qk` ``.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub lower: String,
}

/// What a step takes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Cost {
    /// Floating-point operations; a multiplication with an addition is two.
    pub flops: Option<f64>,
    /// What its time grows with, in any unit that compares steps of one stage; without it
    /// parameters tell.
    #[serde(skip)]
    pub work: Option<f64>,
    /// Bytes that it reads from files, each time counted.
    pub read: Option<u64>,
    /// Bytes of its artifacts.
    pub written: Option<u64>,
    /// The host's memory.
    pub memory: Amount,
    /// Memory of each device.
    pub device: Amount,
    /// The cache's disk, artifacts and checkpoints together.
    pub disk: Amount,
    /// What is known of its artifacts, by port.
    #[serde(skip)]
    pub makes: BTreeMap<String, Vec<Artifact>>,
}

impl Entry {
    /// Erases the types of `S`, which tells its cost.
    pub const fn costed<S: Costed>() -> Entry {
        Entry {
            cost: Some(|params, known| {
                let params: S::Params = serde_json::from_value(params.clone()).ok()?;
                S::cost(&params, known)
            }),
            ..Entry::of::<S>()
        }
    }
}
