//! What is known of an artifact: read from the head of its file, or foretold by the cost of the step
//! that will make it.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use engine::stage::cost::{Artifact, Known};
use engine::tensors::Tensors;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::formats::Gguf;
use crate::models::{Config, family, published};
use crate::train::signals::Shape;

/// What sizes depend on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum About {
    /// A model, in our form or another's.
    Model(Config),
    /// A mixer or a block of a student.
    Layer {
        /// The student's.
        config: Config,
        /// Which of its layers.
        number: usize,
    },
    /// A token shard.
    Tokens {
        /// Size of the vocabulary.
        vocab: Option<usize>,
        /// Tokens of a sequence.
        seq: usize,
        /// How many sequences.
        sequences: Option<usize>,
    },
    /// Cached signals of a layer.
    Signals(Shape),
    /// Cached top-k logits.
    Logits {
        /// How many sequences.
        sequences: usize,
        /// Tokens of a sequence.
        seq: usize,
    },
    /// A tokenizer.
    Tokenizer {
        /// Its tokens.
        vocab: usize,
    },
}

impl About {
    /// As what an artifact bears.
    pub fn value(&self) -> Value {
        serde_json::to_value(self).expect("sizes are plain data")
    }

    /// An artifact that will be this.
    pub fn made(&self, bytes: Option<u64>, sure: bool) -> Artifact {
        Artifact { index: None, bytes, about: self.value(), sure }
    }

    /// What is known of `artifact`.
    pub fn of(artifact: &Artifact) -> Option<About> {
        serde_json::from_value(artifact.about.clone()).ok()
    }
}

/// The model at a port, and whether that is certain.
pub fn model(known: &Known, port: &str) -> Option<(Config, bool)> {
    let artifact = known.one(port)?;
    match About::of(artifact)? {
        About::Model(config) => Some((config, artifact.sure)),
        _ => None,
    }
}

/// Sequences at a port.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sequences {
    /// Tokens of each.
    pub seq: usize,
    /// How many, if that is known.
    pub count: Option<usize>,
    /// Size of the vocabulary, if that is known.
    pub vocab: Option<usize>,
    /// Whether that is certain.
    pub sure: bool,
}

/// The token shard at a port.
pub fn tokens(known: &Known, port: &str) -> Option<Sequences> {
    let artifact = known.one(port)?;
    match About::of(artifact)? {
        About::Tokens { vocab, seq, sequences: count } => {
            Some(Sequences { seq, count, vocab, sure: artifact.sure })
        }
        _ => None,
    }
}

/// What the head of the file or directory at `path` tells; `name` is its base name.
pub fn describe(name: &str, path: &Path) -> Option<About> {
    if path.is_dir() {
        return describe("config.json", &path.join("config.json"));
    }
    match name {
        "config.json" => return published_model(&std::fs::read_to_string(path).ok()?),
        "tokenizer.json" => return tokenizer(path),
        _ => {}
    }
    let mut head = [0; 16];
    File::open(path).ok()?.read_exact(&mut head).ok()?;
    match &head {
        [b'P', b'I', b'P', b'E', b'T', b'O', b'K', b'1', ..] => shard(path),
        [b'G', b'G', b'U', b'F', ..] => {
            let file = Gguf::open(path).ok()?;
            family::gguf::config(&file).ok().map(About::Model)
        }
        // A safetensors file, or the recipe of one that the store keeps in parts.
        _ if head[8] == b'{' || head.starts_with(b"pipe-recipe") => {
            tensors(&Tensors::open(path).ok()?)
        }
        _ => None,
    }
}

fn published_model(text: &str) -> Option<About> {
    let config = match published::config(text).ok()? {
        Some(config) => config,
        None => family::hub::config(text).ok()?,
    };
    Some(About::Model(config))
}

fn tensors(tensors: &Tensors) -> Option<About> {
    if let Some(text) = tensors.metadata("signals") {
        return serde_json::from_str(text).ok().map(About::Signals);
    }
    if let Some(text) = tensors.metadata("top_logits") {
        let value: Value = serde_json::from_str(text).ok()?;
        let size = |name: &str| value.get(name)?.as_u64().map(|n| n as usize);
        return Some(About::Logits { sequences: size("sequences")?, seq: size("seq")? });
    }
    let config: Config = serde_json::from_str(tensors.metadata("config")?).ok()?;
    config.check().ok()?;
    match tensors.metadata("layer") {
        Some(number) => Some(About::Layer { config, number: number.parse().ok()? }),
        None => Some(About::Model(config)),
    }
}

/// The header of a token shard; the tokens are not looked at.
fn shard(path: &Path) -> Option<About> {
    #[derive(Deserialize)]
    struct Header {
        vocab: usize,
        seq: usize,
        sequences: usize,
    }
    const LONGEST: usize = 1 << 16;
    let mut file = File::open(path).ok()?;
    let mut start = [0; 12];
    file.read_exact(&mut start).ok()?;
    let length = u32::from_le_bytes(start[8..].try_into().expect("four bytes")) as usize;
    let mut text = vec![0; length.min(LONGEST)];
    file.read_exact(&mut text).ok()?;
    let Header { vocab, seq, sequences } = serde_json::from_slice(&text).ok()?;
    Some(About::Tokens { vocab: Some(vocab), seq, sequences: Some(sequences) })
}

/// How many tokens a `tokenizer.json` has: those of its model and those added.
fn tokenizer(path: &Path) -> Option<About> {
    #[derive(Deserialize)]
    struct Whole {
        #[serde(default)]
        added_tokens: Vec<Added>,
        model: Model,
    }
    #[derive(Deserialize)]
    struct Added {
        content: String,
    }
    #[derive(Deserialize)]
    struct Model {
        vocab: HashMap<String, IgnoredAny>,
    }
    let Whole { added_tokens, model } = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    let own = |added: &&Added| !model.vocab.contains_key(&added.content);
    let added: HashSet<&str> = added_tokens.iter().filter(own).map(|a| &*a.content).collect();
    Some(About::Tokenizer { vocab: model.vocab.len() + added.len() })
}
