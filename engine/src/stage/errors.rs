//! Errors of a stage that mean something to the engine; any other error is just that.
//!
//! They are found below any `context` that was put on top of them.

use std::fmt;

/// The error of a stage that stopped because it was asked to.
#[derive(Debug)]
pub struct Cancelled;

impl fmt::Display for Cancelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cancelled")
    }
}

impl std::error::Error for Cancelled {}

/// The error of a stage whose numbers are no numbers any more; such a step is never retried.
#[derive(Debug)]
pub struct Diverged(pub String);

impl fmt::Display for Diverged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Diverged {}

/// A device did something wrong while it ran `op`: an illegal address, a launch that failed. What it
/// holds is lost, so the worker ends; the step may be retried in a fresh one.
#[derive(Clone, Debug)]
pub struct DeviceFault {
    /// The operation or kernel, as its author calls it.
    pub op: String,
    /// What the driver said.
    pub message: String,
}

impl fmt::Display for DeviceFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the GPU failed in `{}`: {}", self.op, self.message)
    }
}

impl std::error::Error for DeviceFault {}

/// A device has too little memory: for what, how much, and what to do. The worker ends, so that
/// nothing of it stays there; the step may be retried.
#[derive(Clone, Debug)]
pub struct OutOfDeviceMemory(pub String);

impl fmt::Display for OutOfDeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for OutOfDeviceMemory {}
