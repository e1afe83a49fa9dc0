//! `pipe bench …`: what models and machines are worth.

mod decode;
#[cfg(any(feature = "cuda", feature = "emulate"))]
mod gpu;

use std::process::ExitCode;

use anyhow::{Result, bail};

use super::Wrong;
use crate::cli::BenchGpu;

pub use decode::decode;

/// `pipe bench gpu`; without a GPU that can be used it says why.
pub fn gpu(args: BenchGpu) -> Result<ExitCode> {
    let emulated = cfg!(all(feature = "emulate", not(feature = "cuda")));
    if let Err(why) = stages::gpu::devices()
        && !emulated
    {
        bail!(Wrong(format!("no GPU can be measured: {why}")));
    }
    if emulated && args.model != "tiny" {
        bail!(Wrong("the emulator of GPUs can be asked for `--model tiny` only".into()));
    }
    #[cfg(any(feature = "cuda", feature = "emulate"))]
    return gpu::gpu(&args);
    #[cfg(not(any(feature = "cuda", feature = "emulate")))]
    bail!(Wrong("this build has no CUDA: build it with `--features cuda`".into()))
}
