//! Where a step computes; `auto` is resolved when the pipeline is planned.

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
    /// Refuses what a build without CUDA cannot do.
    pub fn require_cpu(self, stage: &str) -> Result<()> {
        if self == Device::Cuda {
            bail!(
                "`{stage}` is asked for `device: cuda`, but this build has no CUDA: build it with \
                 `--features cuda`, or set `device` to `auto` or `cpu`"
            );
        }
        Ok(())
    }
}
