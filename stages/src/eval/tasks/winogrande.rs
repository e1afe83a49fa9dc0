//! WinoGrande by partial evaluation (Trinh and Le 2018): each option is put into the gap, and what
//! comes after it is scored; so contexts differ, the continuation does not.

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::text::strip;
use super::{Document, Request};

#[derive(Deserialize)]
struct Line {
    sentence: String,
    option1: String,
    option2: String,
    answer: String,
}

/// Two contexts and what is after the gap.
pub fn parse(line: &[u8]) -> Result<Document> {
    let Line { sentence, option1, option2, answer } = serde_json::from_slice(line)?;
    let (before, after) = sentence.split_once('_').context("`sentence` has no `_`")?;
    let gold = match answer.as_str() {
        "1" => 0,
        "2" => 1,
        other => bail!("`answer` is `{other}`, not `1` or `2`"),
    };
    let contexts = [option1, option2].map(|option| format!("{before}{option}"));
    let lengths = contexts.iter().map(|context| context.chars().count()).collect();
    let continuation = format!(" {}", strip(after));
    let request = |context| Request { context, continuation: continuation.clone() };
    Ok(Document { requests: contexts.map(request).into(), lengths, gold })
}
