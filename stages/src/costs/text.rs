//! What stages that read text take: their time grows with its bytes.

use engine::stage::cost::{Artifact, Cost, Costed, Known};

use super::about::About;
use crate::tokenize::{Params, Tokenize};
use crate::train_tokenizer::{self, TrainTokenizer};

impl Costed for TrainTokenizer {
    fn cost(params: &train_tokenizer::Params, known: &Known) -> Option<Cost> {
        let text = known.bytes("text");
        // A tokenizer always has as many tokens as are asked for.
        let about = About::Tokenizer { vocab: params.vocab };
        Some(Cost {
            work: text.map(|bytes| bytes.min(params.bytes_max) as f64),
            read: text,
            makes: [("tokenizer".to_string(), vec![about.made(None, true)])].into(),
            ..Cost::default()
        })
    }
}

impl Costed for Tokenize {
    fn cost(params: &Params, known: &Known) -> Option<Cost> {
        let text = known.bytes("text");
        let tokenizer = known.one("tokenizer")?;
        let vocab = match About::of(tokenizer) {
            Some(About::Tokenizer { vocab }) => Some(vocab),
            _ => None,
        };
        let about = About::Tokens { vocab, seq: params.seq, sequences: None };
        let made = |port: &str| {
            let shard =
                Artifact { sure: tokenizer.sure || vocab.is_none(), ..about.made(None, true) };
            (port.to_string(), vec![shard])
        };
        Some(Cost {
            // With a limit it may stop before the end of the text.
            work: text.filter(|_| params.tokens_max.is_none()).map(|bytes| bytes as f64),
            read: text.map(|bytes| bytes + tokenizer.bytes.unwrap_or(0)),
            makes: ["train", "holdout", "answers"].map(made).into(),
            ..Cost::default()
        })
    }
}
