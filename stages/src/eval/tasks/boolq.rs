//! BoolQ: a question about a passage, yes or no.

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::{Document, choices};

/// `answer` is how its authors publish it, `label` how SuperGLUE does.
#[derive(Deserialize)]
struct Line {
    passage: String,
    question: String,
    answer: Option<bool>,
    label: Option<usize>,
}

/// Passage and question, `no` and `yes`.
pub fn parse(line: &[u8]) -> Result<Document> {
    let Line { passage, question, answer, label } = serde_json::from_slice(line)?;
    let gold = answer.map(usize::from).or(label);
    let gold = gold.context("missing field `answer` (true or false) or `label` (0 or 1)")?;
    choices(&format!("{passage}\nQuestion: {question}?\nAnswer:"), &["no", "yes"], gold)
}
