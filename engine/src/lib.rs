//! Decides and drives: pipeline file → plan → keys → schedule → workers → entries → report.
//!
//! Knows stages only as a trait; knows no tensors' meaning, no CUDA, no terminal. In reading order:
//! [`stage`] (what a stage is), [`plan`] (the checked graph), [`lookup`] and [`key`] (what a step's
//! result is called), [`schedule`] (what may run), [`executor`] with [`pool`], [`cluster`] and [`wire`] (who runs
//! it), [`gpu`] (whose a GPU is), [`worker`] (how), [`command`] (the stage that runs any program), [`event`] and [`run`]
//! (what is kept of it), [`repeat`] (a run that has nothing to do) and [`kept`] (long plans), [`roots`] (what that keeps). [`hub`] fetches models.
//! [`graph`] draws plans, [`history`] reads runs, [`interop`] writes
//! them for other tools.

pub mod cause;
pub mod cluster;
pub mod command;
pub mod descendants;
pub mod diagnostic;
pub mod early;
mod edges;
pub mod estimate;
pub mod event;
pub mod executor;
pub mod fit;
pub mod forecast;
pub mod gpu;
pub mod graph;
pub mod history;
pub mod hub;
pub mod inputs;
pub mod interop;
pub mod interpolate;
pub mod kept;
pub mod key;
pub mod lookup;
mod mask;
pub mod outputs;
mod places;
mod plain;
pub mod plan;
pub mod pool;
pub mod price;
pub mod recents;
pub mod repeat;
pub mod report;
pub mod roots;
pub mod run;
pub mod schedule;
mod spawn;
pub mod spec;
pub mod stage;
pub mod tensors;
pub mod wire;
pub mod worker;
