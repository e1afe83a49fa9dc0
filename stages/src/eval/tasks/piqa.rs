//! PIQA: which of two ways reaches a goal.

use anyhow::Result;
use serde::Deserialize;

use super::{Document, choices};

#[derive(Deserialize)]
struct Line {
    goal: String,
    sol1: String,
    sol2: String,
    label: usize,
}

/// The goal as a question, two solutions.
pub fn parse(line: &[u8]) -> Result<Document> {
    let Line { goal, sol1, sol2, label } = serde_json::from_slice(line)?;
    choices(&format!("Question: {goal}\nAnswer:"), &[sol1, sol2], label)
}
