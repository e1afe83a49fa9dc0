//! Where a step computes. Only the CPU is built so far.

use anyhow::{Result, bail};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The device of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    /// CUDA where the step is given a GPU, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

impl Device {
    /// Refuses what stage `stage` cannot do yet.
    pub fn require_cpu(self, stage: &str) -> Result<()> {
        if self == Device::Cuda {
            bail!("`{stage}` runs on the CPU only so far: set `device` to `auto` or `cpu`");
        }
        Ok(())
    }
}
