//! HellaSwag: how a description goes on.

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::text::{capitalize, strip, without_brackets};
use super::{Document, choices};

#[derive(Deserialize)]
struct Line {
    activity_label: String,
    ctx_a: String,
    ctx_b: String,
    endings: Vec<String>,
    label: Label,
}

/// A string where it is published.
#[derive(Deserialize)]
#[serde(untagged)]
enum Label {
    Text(String),
    Number(usize),
}

/// The activity and what happened so far, four endings; both without the marks of WikiHow.
pub fn parse(line: &[u8]) -> Result<Document> {
    let Line { activity_label, ctx_a, ctx_b, endings, label } = serde_json::from_slice(line)?;
    let gold = match label {
        Label::Number(number) => number,
        Label::Text(text) => {
            text.parse().with_context(|| format!("`label` is `{text}`, which is no number"))?
        }
    };
    let query = format!("{activity_label}: {ctx_a} {}", capitalize(&ctx_b));
    let endings: Vec<String> = endings.iter().map(|ending| clean(ending)).collect();
    choices(&clean(&query), &endings, gold)
}

fn clean(text: &str) -> String {
    without_brackets(&strip(text).replace(" [title]", ". ")).replace("  ", " ")
}
