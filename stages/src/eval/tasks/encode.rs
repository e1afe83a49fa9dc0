//! Requests as tokens, by the harness' rules (`lm_eval.api.model.TemplateLM`).

use anyhow::{Context as _, Result, anyhow, ensure};
use tokenizers::Tokenizer;

use super::Request;
use super::text::is_space;
use crate::eval::likelihood::Item;

/// A tokenizer, and what stands for nothing.
pub struct Encoder {
    tokenizer: Tokenizer,
    prefix: Option<Prefix>,
    length: usize,
}

/// What an empty context is replaced by.
struct Prefix {
    id: u32,
    text: String,
}

impl Encoder {
    /// `prefix` is read in place of an empty context; inputs are cut to their last `length` tokens.
    pub fn new(mut tokenizer: Tokenizer, prefix: Option<u32>, length: usize) -> Result<Encoder> {
        // What a file says of padding and truncation is for training.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(failed)?;
        let prefix = match prefix {
            None => None,
            Some(id) => Some(Prefix { id, text: tokenizer.decode(&[id], false).map_err(failed)? }),
        };
        Ok(Encoder { tokenizer, prefix, length })
    }

    /// The id above all that the tokenizer may give.
    pub fn ids(&self) -> usize {
        self.tokenizer.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// Longest input.
    pub fn length(&self) -> usize {
        self.length
    }

    /// A request as a model reads it.
    pub fn item(&self, request: &Request) -> Result<Item> {
        let (context, continuation) = self.pair(&request.context, &request.continuation)?;
        Item::new(&context, &continuation, self.length)
    }

    /// Tokens of context and continuation. White space at the end of the context goes to the
    /// continuation. Both are encoded together, and what the context has alone is taken off: where a
    /// token crosses the border, it counts to neither or to both, as in the harness.
    pub fn pair(&self, context: &str, continuation: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        if context.is_empty() {
            return self.after_nothing(continuation);
        }
        let kept = context.trim_end_matches(is_space);
        ensure!(!kept.is_empty(), "the context is white space only");
        let whole = self.encode(&format!("{context}{continuation}"))?;
        let context = self.encode(kept)?;
        let continuation = whole.get(context.len()..).unwrap_or_default().to_vec();
        Ok((context, continuation))
    }

    /// Tokens of `text` that begin at byte `start` or later.
    pub fn tokens_from(&self, text: &str, start: usize) -> Result<usize> {
        let encoding = self.tokenizer.encode(text, false).map_err(failed)?;
        Ok(encoding.get_offsets().iter().filter(|(from, _)| *from >= start).count())
    }

    fn after_nothing(&self, continuation: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        let prefix = self.prefix.as_ref();
        let prefix = prefix.context("the context is empty: name a token for it, `prefix_token`")?;
        let mut tokens = self.ids_of(continuation, false)?;
        match tokens.first() {
            Some(first) if *first == prefix.id => Ok((vec![tokens.remove(0)], tokens)),
            _ => Ok((vec![prefix.id], tokens)),
        }
    }

    /// With the special tokens that the tokenizer adds, unless the text has the first one itself.
    fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let prefix = self.prefix.as_ref().filter(|prefix| !prefix.text.is_empty());
        let begun = prefix.is_some_and(|prefix| text.starts_with(&prefix.text));
        self.ids_of(text, !begun)
    }

    fn ids_of(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, special).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }
}

fn failed(error: tokenizers::Error) -> anyhow::Error {
    anyhow!("the tokenizer failed: {error}")
}
