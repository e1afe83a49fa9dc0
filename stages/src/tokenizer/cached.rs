//! Encoding of much text by many threads: the ids of [`Tokenizer::encode_fast`], but what comes again
//! is looked up. Knows no documents.
//!
//! The crate spends its time on cutting text to words, not on merging them. A text is cut here first,
//! where every known pattern cuts anyway: before a single blank between a visible ASCII character
//! and an ASCII letter. No match of such a pattern goes over that place, and none looks back, so the
//! stretches encode on their own to the same ids.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, anyhow};
use serde_json::Value;
use tokenizers::{ModelWrapper, Tokenizer};

use super::bpe::Pre;

/// Longest stretch that is kept, in bytes, and how many are kept for each thread: some MiB.
const LONGEST: usize = 48;
const MOST: usize = 1 << 16;

type Known = HashMap<Box<str>, Box<[u32]>>;

/// A tokenizer and what its threads know by heart.
pub struct Encoder {
    tokenizer: Tokenizer,
    /// One for each thread; empty if the tokenizer does not cut as known.
    known: Vec<Mutex<Known>>,
}

impl Encoder {
    /// Good for a rayon pool of `threads` threads; more may use it, but wait for each other.
    pub fn new(tokenizer: Tokenizer, threads: usize) -> Encoder {
        let count = if cuts_at_blanks(&tokenizer) { threads.max(1) } else { 0 };
        Encoder { tokenizer, known: (0..count).map(|_| Mutex::default()).collect() }
    }

    /// The tokenizer itself.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The ids of `text`, with no special tokens put to it.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        if self.known.is_empty() {
            return Ok(self.encode(text)?.into());
        }
        let thread = rayon::current_thread_index().unwrap_or(0) % self.known.len();
        let mut known = self.known[thread].lock().unwrap_or_else(PoisonError::into_inner);
        let mut ids = Vec::with_capacity(text.len() / 3);
        for stretch in stretches(text) {
            if let Some(found) = known.get(stretch) {
                ids.extend_from_slice(found);
                continue;
            }
            let found = self.encode(stretch)?;
            ids.extend_from_slice(&found);
            if stretch.len() <= LONGEST && known.len() < MOST {
                known.insert(stretch.into(), found);
            }
        }
        Ok(ids)
    }

    fn encode(&self, text: &str) -> Result<Box<[u32]>> {
        let encoding = self.tokenizer.encode_fast(text, false);
        let encoding = encoding.map_err(|error| anyhow!("cannot encode a document: {error}"))?;
        Ok(encoding.get_ids().into())
    }
}

/// The parts of `text` between cuts; together they are the text.
fn stretches(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let bytes = rest.as_bytes();
        let cut = bytes.windows(3).position(|three| {
            three[0].is_ascii_graphic() && three[1] == b' ' && three[2].is_ascii_alphabetic()
        });
        let (stretch, after) = rest.split_at(cut.map_or(rest.len(), |at| at + 1));
        rest = after;
        (!stretch.is_empty()).then_some(stretch)
    })
}

/// Whether words are cut by one of the known patterns and nothing else looks at more than a word.
fn cuts_at_blanks(tokenizer: &Tokenizer) -> bool {
    let steps = serde_json::to_value(tokenizer.get_pre_tokenizer()).map(without_offsets);
    let known = [Pre::Gpt2, Pre::Digits, Pre::Llama3, Pre::Qwen2];
    let known = known.iter().flat_map(|pre| [pre.steps(false), pre.steps(true)]);
    let same = known.map(without_offsets).any(|known| steps.as_ref().is_ok_and(|s| *s == known));
    let random = match tokenizer.get_model() {
        ModelWrapper::BPE(bpe) => bpe.dropout.is_some(),
        _ => true,
    };
    let simple = |token: &tokenizers::AddedToken| {
        !token.lstrip && !token.rstrip && !token.single_word && !token.content.contains(' ')
    };
    same && !random
        && tokenizer.get_normalizer().is_none()
        && tokenizer.get_truncation().is_none()
        && tokenizer.get_padding().is_none()
        && tokenizer.get_added_tokens_decoder().values().all(simple)
}

/// Offsets are not asked for, so it does not matter how they are trimmed.
fn without_offsets(mut steps: Value) -> Value {
    for inner in steps.get_mut("pretokenizers").and_then(Value::as_array_mut).into_iter().flatten()
    {
        *inner = without_offsets(inner.take());
    }
    if let Some(steps) = steps.as_object_mut() {
        steps.remove("trim_offsets");
    }
    steps
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::gguf::Vocabulary;
    use super::*;

    fn vocabulary(pre: &str) -> Vocabulary {
        let tokens = "a b c d e ' s 1 2 Ġ Ċ . , ! Ġa Ġb ab Ġab Ġ1 12 ĠĠ ĊĊ .Ċ 's Ã ©".split(' ');
        let mut tokens: Vec<String> = tokens.map(String::from).collect();
        tokens.push("<x>".into());
        let merges = ["Ġ a", "Ġ b", "a b", "Ġa b", "Ġ 1", "1 2", "Ġ Ġ", "Ċ Ċ", ". Ċ", "' s"];
        Vocabulary {
            model: "gpt2".into(),
            pre: pre.into(),
            kinds: Some((0..tokens.len()).map(|id| if id == 26 { 3 } else { 1 }).collect()),
            tokens,
            merges: merges.map(String::from).to_vec(),
            ..Vocabulary::default()
        }
    }

    #[test]
    fn stretches_are_the_text() {
        let found: Vec<&str> = stretches("One two,  three é four 5 six\n seven. ").collect();
        assert_eq!(found, ["One", " two,  three é four 5", " six\n seven. "]);
        assert_eq!(stretches("").count(), 0);
    }

    #[test]
    fn only_what_is_known_is_cut() {
        let cuts = |vocabulary: &Vocabulary| cuts_at_blanks(&vocabulary.tokenizer().unwrap());
        assert!(cuts(&vocabulary("gpt-2")) && cuts(&vocabulary("smollm")));
        assert!(cuts(&vocabulary("llama-bpe")));
        // It normalises.
        assert!(!cuts(&vocabulary("qwen2")));
        let mut blanks = vocabulary("gpt-2");
        blanks.tokens[26] = "a b".into();
        assert!(!cuts(&blanks));
        let mut tokenizer = vocabulary("gpt-2").tokenizer().unwrap();
        tokenizer.with_pre_tokenizer(Some(tokenizers::pre_tokenizers::whitespace::Whitespace {}));
        assert!(!cuts_at_blanks(&tokenizer));
    }

    proptest! {
        #[test]
        fn ids_are_those_of_the_whole_text(
            pre in prop::sample::select(vec!["gpt-2", "smollm", "llama-bpe", "qwen2"]),
            prefix in any::<bool>(),
            texts in prop::collection::vec("([ab '.,!12é\n\t\u{a0}]|<x>| a){0,40}", 1..8),
        ) {
            let vocabulary = Vocabulary { add_space_prefix: prefix, ..vocabulary(pre) };
            let encoder = Encoder::new(vocabulary.tokenizer().unwrap(), 1);
            for text in texts.iter().chain(&texts) {
                let whole = encoder.tokenizer().encode_fast(text.as_str(), false).unwrap();
                prop_assert_eq!(encoder.ids(text).unwrap(), whole.get_ids());
            }
        }
    }
}
