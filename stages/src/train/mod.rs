//! What every training stage shares: random numbers, optimiser, schedule, clip, checkpoints, loop.

pub mod adamw;
pub mod checkpoint;
pub mod clip;
pub mod device;
pub mod language;
pub mod layer;
pub mod learner;
pub mod logits;
pub mod philox;
pub mod run;
pub mod schedule;
pub mod signals;
pub mod source;
