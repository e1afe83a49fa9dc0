//! LAMBADA: the last word of a passage.

use anyhow::Result;
use serde::Deserialize;

use super::{Document, Request};

#[derive(Deserialize)]
struct Line {
    text: String,
}

/// The text before its last space, and the word after it.
pub fn parse(line: &[u8]) -> Result<Document> {
    let Line { text } = serde_json::from_slice(line)?;
    let (context, word) = text.rsplit_once(' ').unwrap_or(("", &text));
    let request = Request { context: context.into(), continuation: format!(" {word}") };
    let lengths = vec![request.continuation.chars().count()];
    Ok(Document { requests: vec![request], lengths, gold: 0 })
}
