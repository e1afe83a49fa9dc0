//! What `generate` and `chat` share: a model and its words in memory, the sampler, the last line.

use std::hash::{BuildHasher, Hasher};
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use engine::tensors::Tensors;
use stages::generate::about::Words;
use stages::generate::sample::Sampling;
use stages::generate::{Limits, Reason};
use stages::models::{Model, Params};

use super::Wrong;
use super::model_of::{self, ModelFiles};
use crate::cli::{OfModel, Speech};
use crate::out;

/// A model with its words.
pub struct Speaker {
    pub model: Model,
    pub params: Params,
    pub words: Words,
    pub sampling: Sampling,
}

impl Speaker {
    /// Reads the model called `name`, after what was given to choose tokens by is checked.
    pub fn open(name: &str, of: &OfModel, speech: &Speech) -> Result<Speaker> {
        let sampling = sampling(speech);
        sampling.check().map_err(|error| Wrong(error.to_string()))?;
        let files = model_of::find(name, of)?;
        let Some(tokenizer) = speech.tokenizer.as_ref().or(files.tokenizer.as_ref()) else {
            bail!(Wrong(format!(
                "there is no tokenizer for `{name}`\nhint: name one with `--tokenizer FILE`"
            )));
        };
        let (model, params) = load(&files)?;
        let config = &model.config;
        let words = Words::open(tokenizer, files.about.as_deref(), config.vocab, config.separator)?;
        Ok(Speaker { model, params, words, sampling })
    }

    /// When a text is over.
    pub fn limits(&self, most: u64, stops: &[String], endless: bool) -> Limits {
        let ends = if endless { Vec::new() } else { self.words.ends.clone() };
        Limits { tokens: usize::try_from(most).unwrap_or(usize::MAX), ends, stops: stops.to_vec() }
    }
}

/// Reads a model file.
pub fn load(files: &ModelFiles) -> Result<(Model, Params)> {
    let read = |path: &Path| Model::load(&Tensors::open(path)?);
    read(&files.model).with_context(|| format!("cannot read the model of `{}`", files.name))
}

fn sampling(speech: &Speech) -> Sampling {
    Sampling {
        temperature: speech.temperature,
        top_k: speech.top_k,
        top_p: speech.top_p,
        min_p: speech.min_p,
        repetition_penalty: speech.repetition_penalty,
        window: speech.repetition_window,
        seed: speech.seed.unwrap_or_else(any_seed),
    }
}

/// Another seed every time, short enough to be typed again.
fn any_seed() -> u64 {
    std::hash::RandomState::new().build_hasher().finish() >> 40
}

/// How fast, and what it took.
pub struct Stats {
    pub prompt_tokens: usize,
    pub prompt_seconds: f64,
    pub tokens: usize,
    pub seconds: f64,
    pub state_bytes: usize,
}

impl Stats {
    /// Tokens read per second.
    pub fn prompt_rate(&self) -> Option<f64> {
        rate(self.prompt_tokens, self.prompt_seconds)
    }

    /// Tokens made per second. The first one came with the prompt.
    pub fn rate(&self) -> Option<f64> {
        rate(self.tokens.saturating_sub(1), self.seconds)
    }

    /// As one line.
    pub fn line(&self) -> String {
        let per_second =
            |rate: Option<f64>| rate.map_or(String::new(), |rate| format!(" ({rate:.1} tokens/s)"));
        format!(
            "{} tokens{}, prompt {}{}, state {}",
            self.tokens,
            per_second(self.rate()),
            self.prompt_tokens,
            per_second(self.prompt_rate()),
            out::bytes(self.state_bytes as u64)
        )
    }
}

fn rate(tokens: usize, seconds: f64) -> Option<f64> {
    (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds)
}

/// Why a text is over, in a word or two.
pub fn reason(reason: &Reason) -> String {
    match reason {
        Reason::Tokens => "max tokens".into(),
        Reason::End => "end of text".into(),
        Reason::Stop(text) => format!("stop {text:?}"),
        Reason::Interrupted => "interrupted".into(),
    }
}
