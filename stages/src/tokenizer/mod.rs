//! Tokenizers of pretrained models, from whatever their authors ship, to the one form that every stage
//! reads: a `tokenizer.json`. Knows no texts and no model weights.

mod bpe;
pub mod cached;
pub mod directory;
pub mod gguf;
pub mod llama2c;

use serde::Serialize;

/// What a model's authors say about its special tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct About {
    /// Stands before a text.
    pub bos: Option<u32>,
    /// Any of these ends a text; the most authoritative first, none twice.
    pub eos: Vec<u32>,
    /// Fills up batches.
    pub pad: Option<u32>,
    /// Stands for what the vocabulary lacks.
    pub unk: Option<u32>,
    /// Whether `bos` is to be put before every text; `None` where nothing says so.
    pub add_bos: Option<bool>,
    /// The Jinja template of conversations.
    pub chat_template: Option<String>,
}
