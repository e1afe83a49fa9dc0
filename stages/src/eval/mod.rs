//! What an evaluation measures, and how models are run for it. Knows no file but shards.

pub mod report;
pub mod runner;
pub mod score;
