//! Measures a GPU: what it can do at most ([`ceilings`]), and how much of that single ops ([`ops`])
//! and whole phases ([`phases`]) get, with weights and tokens that are made up ([`subject`]).

pub mod ceilings;
pub mod count;
pub mod ops;
pub mod phases;
mod sheet;
pub mod subject;

use anyhow::Result;

use super::launch::Gpu;

/// Calls before those that count: they record graphs, choose algorithms and load code.
const WARM_UP: usize = 3;

/// Milliseconds of the device from each mark to the next; waits for the last.
fn spans(gpu: &Gpu, marks: &[usize]) -> Result<Vec<f64>> {
    gpu.synchronise()?;
    marks.windows(2).map(|pair| Ok(f64::from(gpu.between(pair[0], pair[1])?))).collect()
}

/// The middle value.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let len = values.len();
    // Of two, the mean.
    (values[(len - 1) / 2] + values[len / 2]) / 2.0
}
