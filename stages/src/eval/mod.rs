//! What an evaluation measures, and how models are run for it. Knows no file but shards and
//! benchmarks.

pub mod bench;
pub mod benchmarks;
pub mod likelihood;
pub mod matrices;
#[cfg(any(feature = "cuda", feature = "emulate"))]
mod on_gpu;
pub mod probes;
pub mod report;
pub mod runner;
pub mod score;
pub mod spread;
pub mod tasks;
