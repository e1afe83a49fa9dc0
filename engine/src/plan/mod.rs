//! The checked graph of steps: plain data, serialisable, ready to be run.
//!
//! Everything in here is resolved: params, profiles, overrides, matrix, interpolation, defaults.
//! What is left open (`${in.x}`, `${out.x}`, `${checkpoint}`, `${scratch}` of a command) is filled
//! in by the worker, since it names places that are in no key.

pub(crate) mod build;
mod command;
mod device;
pub(crate) mod inputs;
pub mod kept;
mod matrix;
mod order;
pub(crate) mod outputs;
mod params;
pub mod reference;
mod select;
mod shared;
mod step;
mod uses;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::params::Params;
pub use self::shared::{Shared, Text};
pub use self::uses::Use;

/// A checked pipeline.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Plan {
    /// `name:` of the pipeline file, else the file's stem.
    pub name: String,
    /// The pipeline file as given; in a record absolute, and empty for the embedded one.
    pub file: PathBuf,
    /// Steps in an order in which every step comes after all it needs; ties in declared order.
    pub steps: Vec<Step>,
    /// What to put where after the run.
    pub outputs: Vec<Output>,
}

/// One step: an instance of a stage with everything resolved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Step {
    /// `align[2]`, `train[lr=3e-4,seed=1]`, or just `corpus`.
    pub name: String,
    /// The name in the file: `align`.
    pub group: Text,
    /// Axis and value of each matrix coordinate, in declared order.
    pub coords: Vec<(Text, Value)>,
    /// The stage's name.
    pub stage: Text,
    /// Canonical parameters, defaults filled in. Of a `command`: `run`, `out`, `env`.
    pub params: Params,
    /// What feeds each connected input port, in declared order.
    pub inputs: Vec<Port>,
    /// Steps (by position in [`Plan::steps`]) that must be done first though nothing flows.
    pub after: Vec<usize>,
    /// Output ports and whether each is a list, as the stage or the command's `out` declares them.
    pub ports: Shared<Vec<(String, bool, String)>>,
    /// What it takes to run it.
    pub resources: Shared<Resources>,
    /// How often to try again after a crash, a time-out or a lost worker.
    pub retries: u32,
    /// Wall time after which an attempt is ended, in seconds.
    pub timeout_s: Option<f64>,
    /// `false`: always run, never looked up.
    pub cache: bool,
    /// Environment variables a command passes through, never keyed, masked.
    pub secrets: Shared<Vec<String>>,
    /// Where the step was written.
    pub place: Place,
    /// Where each parameter got its value (`lr`, `layers`, `run`); absent means by default.
    pub origins: Shared<BTreeMap<String, Place>>,
    /// Parameters of the pipeline within the texts of a command.
    #[serde(default, skip_serializing_if = "none")]
    pub uses: Shared<Vec<Use>>,
    /// Why `device: auto` became what `params` say, if it was that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auto: Option<Text>,
}

fn none(uses: &[Use]) -> bool {
    uses.is_empty()
}

/// A place in a file, or on the command line.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// The file, or `--set`, `--params FILE`.
    pub file: Text,
    /// 1-based; 0 when it has no line.
    pub line: usize,
    /// 1-based, in characters.
    pub column: usize,
}

/// What feeds one input port.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Port {
    /// The port's name.
    pub name: Text,
    /// Whether base names enter the key.
    pub named: bool,
    /// Whether it takes a list.
    pub list: bool,
    /// Where the reference was written: of a parameter of the pipeline, where it got its value.
    pub place: Place,
    /// In order; a port that is no list ends up with exactly one artifact.
    pub sources: Vec<Source>,
}

/// One origin of artifacts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// An output of another step. Of a list port: item `index`, or all items when `None`.
    Step {
        /// Position in [`Plan::steps`].
        step: usize,
        /// Its output port.
        port: Text,
        /// The artifact's own number (the layer), not its position.
        index: Option<u32>,
    },
    /// The user's file, directory or glob, absolute.
    Path {
        /// Absolute path or pattern.
        path: PathBuf,
    },
    /// `hf:owner/name@revision`, or one file of it: `hf:owner/name@revision#file`.
    Hub {
        /// The text after `hf:`.
        name: String,
    },
}

/// What a step takes while it runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Resources {
    /// Cpu slots; `None` is the stage's default; more than there are means all.
    pub cpu: Option<u32>,
    /// Whole GPUs.
    pub gpu: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of memory on each GPU.
    pub vram: u64,
    /// Which GPUs, as a cluster calls them: `a100`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_type: Option<String>,
    /// Wall time to ask a cluster for, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_s: Option<f64>,
}

/// One of `outputs:`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Output {
    /// Its name in the file.
    pub name: String,
    /// What to copy.
    pub source: Source,
    /// Where to, absolute.
    pub to: PathBuf,
    /// Where it was written.
    pub place: Place,
}
