//! ARC and OpenBookQA: questions of elementary science with lettered choices.

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::text::is_space;
use super::{Document, choices};

#[derive(Deserialize)]
struct Arc {
    question: String,
    choices: Choices,
    #[serde(rename = "answerKey")]
    key: String,
}

#[derive(Deserialize)]
struct OpenBookQa {
    question_stem: String,
    choices: Choices,
    #[serde(rename = "answerKey")]
    key: String,
}

#[derive(Deserialize)]
struct Choices {
    text: Vec<String>,
    label: Vec<String>,
}

impl Choices {
    fn after(&self, context: &str, key: &str) -> Result<Document> {
        let (texts, labels) = (self.text.len(), self.label.len());
        ensure!(texts == labels, "`choices` has {texts} texts and {labels} labels");
        let gold = self.label.iter().position(|label| label == key);
        let gold = gold.with_context(|| format!("no choice is labelled `{key}`, the answer"))?;
        choices(context, &self.text, gold)
    }
}

/// ARC: the question by name.
pub fn parse(line: &[u8]) -> Result<Document> {
    let Arc { question, choices, key } = serde_json::from_slice(line)?;
    choices.after(&format!("Question: {question}\nAnswer:"), &key)
}

/// OpenBookQA: the bare stem.
pub fn parse_openbookqa(line: &[u8]) -> Result<Document> {
    let OpenBookQa { question_stem, choices, key } = serde_json::from_slice(line)?;
    choices.after(&question_stem, key.trim_start_matches(is_space))
}
