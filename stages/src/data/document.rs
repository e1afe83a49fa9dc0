//! One document of a corpus, as it stands on a line of `text.jsonl`.

use serde::{Deserialize, Serialize};

/// A text and what can be asked about it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// The text.
    pub text: String,
    /// What the text itself answers, in order; only the sample has any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<Question>,
    /// What sort of document it is: `facts`, `refrain`, or empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub kind: String,
}

/// A stretch of the text that a reader of all before it can know. Spans are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Start and end of the answer.
    pub span: [usize; 2],
    /// Start and end of the nearest earlier statement of the fact.
    pub fact_span: [usize; 2],
    /// How many distinct answers of its kind the document holds (a guesser's choice).
    pub candidates: usize,
}

impl Document {
    /// A document of which nothing is asked.
    pub fn plain(text: String) -> Document {
        Document { text, ..Document::default() }
    }

    /// The spans that lie outside the text, inside a character, or before their fact.
    pub fn bad_answer(&self) -> Option<&Question> {
        let inside =
            |span: &[usize; 2]| span[0] < span[1] && self.text.get(span[0]..span[1]).is_some();
        self.answers.iter().find(|q| {
            !inside(&q.span)
                || !inside(&q.fact_span)
                || q.fact_span[1] > q.span[0]
                || q.candidates == 0
        })
    }
}
