//! `sample_teacher`: documents that a model writes itself: text in its own distribution, without
//! limit.
//!
//! Document i depends on the seed and i alone, so the bytes depend on no thread count.

use std::io::{BufWriter, Write as _};
use std::sync::atomic::Ordering;

use anyhow::{Context as _, Result, anyhow, ensure};
use engine::stage::{Context, Cpu, In, Out, Ports, Stage};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use crate::data::corpus::parallel;
use crate::data::document::Document;
use crate::data::separator::separator;
use crate::models::decode::Decoder;
use crate::models::{Model, Params as Weights};
use crate::ops::vector::{exp_sum, max};
use crate::train::device::Device;
use crate::train::philox::Philox;

/// The stage.
pub struct SampleTeacher;

/// How much is written, and how freely.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Stop after the document that makes so many tokens.
    pub tokens: u64,
    /// Longest document, in tokens.
    pub document: usize,
    /// Of the softmax that tokens are drawn from; 1 is the model's own distribution.
    pub temperature: f64,
    /// The token that begins a document, as in `teacher`.
    pub separator: Option<String>,
    /// Decides what is written.
    pub seed: u64,
    /// Where to compute.
    pub device: Device,
}

impl Default for Params {
    fn default() -> Params {
        Params {
            tokens: 1_000_000,
            document: 256,
            temperature: 1.0,
            separator: None,
            seed: 17,
            device: Device::Auto,
        }
    }
}

/// Documents between two looks at the total, at most.
const WAVE: u64 = 64;
/// Tokens that end a document, beside the separator.
const ENDS: [&str; 4] = ["</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>"];

impl Stage for SampleTeacher {
    const NAME: &'static str = "sample_teacher";
    const VERSION: u32 = 3;
    const DOC: &'static str = "Lets a model write documents: text in its own distribution.";
    const CPU: Cpu = Cpu::All;
    const GPU: bool = true;
    type Params = Params;

    fn ports() -> Ports {
        const INPUTS: &[In] = &[
            In::one("model", "the model that writes").tensors(),
            In::one("tokenizer", "its tokenizer"),
        ];
        const OUTPUTS: &[Out] = &[Out::one("text", "text.jsonl", "documents as JSON lines")];
        Ports { inputs: INPUTS, outputs: OUTPUTS }
    }

    fn check(params: &Params) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
        let mut refuse = |name: &str, what: &str| wrong.push((name.to_string(), what.to_string()));
        if params.tokens == 0 {
            refuse("tokens", "must be at least 1");
        }
        if params.document < 2 {
            refuse("document", "must be at least 2");
        }
        if !(params.temperature.is_finite() && params.temperature > 0.0) {
            refuse("temperature", "must be more than 0");
        }
        wrong
    }

    fn run(params: &Params, ctx: &mut Context) -> Result<()> {
        let (model, weights) = Model::load(&ctx.tensors("model")?).context("input `model`")?;
        let tokenizer = crate::tokenize::load(ctx.path("tokenizer")?)?;
        let (known, vocab) = (tokenizer.get_vocab_size(true), model.config.vocab);
        ensure!(known <= vocab, "the tokenizer has {known} tokens, but the model only {vocab}");
        let (_, first) = separator(&tokenizer, params.separator.as_deref())?;
        let ends = ENDS.iter().filter_map(|name| tokenizer.token_to_id(name));
        let ends: Vec<u32> = ends.chain([first]).collect();
        #[cfg(any(feature = "cuda", feature = "emulate"))]
        if params.device == Device::Cuda {
            return on_gpu(params, ctx, (&model, &weights), &tokenizer, (first, &ends));
        }
        params.device.require_cpu(SampleTeacher::NAME)?;
        let writer = Author { params, model: &model, weights: &weights, first, ends, known };
        let path = ctx.output("text")?;
        let mut out = BufWriter::new(std::fs::File::create(&path)?);
        let (mut written, mut documents, mut next) = (0u64, 0u64, 0u64);
        while written < params.tokens {
            ctx.check_cancelled()?;
            let cancel = ctx.cancel_flag();
            // No more than are wanted for sure, so that little is written in vain.
            let sure = (params.tokens - written).div_ceil(params.document as u64);
            let wave = next..next + sure.max(ctx.threads() as u64).min(WAVE);
            let one = |i| (!cancel.load(Ordering::Relaxed)).then(|| writer.document(i));
            let texts: Vec<Option<Vec<u32>>> =
                parallel(ctx.threads(), || wave.clone().into_par_iter().map(one).collect())?;
            next = wave.end;
            for tokens in texts {
                let Some(tokens) = tokens else {
                    ctx.check_cancelled()?;
                    continue;
                };
                if written >= params.tokens {
                    break;
                }
                written += tokens.len() as u64;
                documents += 1;
                line(&mut out, &tokenizer, &tokens)?;
            }
            ctx.progress(written.min(params.tokens), params.tokens, "tokens");
        }
        out.flush().with_context(|| format!("cannot write {}", path.display()))?;
        ctx.note(format!("{documents} documents of {written} tokens"));
        Ok(())
    }
}

/// The same documents on a GPU, up to the errors of bf16.
#[cfg(any(feature = "cuda", feature = "emulate"))]
fn on_gpu(
    params: &Params,
    ctx: &mut Context,
    (model, weights): (&Model, &Weights),
    tokenizer: &Tokenizer,
    (first, ends): (u32, &[u32]),
) -> Result<()> {
    use crate::gpu::decode::{Writing, batch_of, sample};

    let writing = Writing {
        seed: params.seed,
        document: params.document,
        temperature: params.temperature as f32,
        first,
        ends,
        known: tokenizer.get_vocab_size(true),
        batch: batch_of(&model.config, params.document, params.tokens / params.document as u64 + 1),
    };
    let path = ctx.output("text")?;
    let mut out = BufWriter::new(std::fs::File::create(&path)?);
    let (mut written, mut documents) = (0u64, 0u64);
    sample(&crate::gpu::open()?, model, &weights.flat, &writing, |complete| {
        ctx.check_cancelled()?;
        for tokens in complete {
            if written < params.tokens {
                written += tokens.len() as u64;
                documents += 1;
                line(&mut out, tokenizer, &tokens)?;
            }
        }
        ctx.progress(written.min(params.tokens), params.tokens, "tokens");
        Ok(written < params.tokens)
    })?;
    out.flush().with_context(|| format!("cannot write {}", path.display()))?;
    ctx.note(format!("{documents} documents of {written} tokens"));
    Ok(())
}

fn line(out: &mut impl std::io::Write, tokenizer: &Tokenizer, tokens: &[u32]) -> Result<()> {
    let text = tokenizer.decode(tokens, true).map_err(|e| anyhow!("cannot decode: {e}"))?;
    serde_json::to_writer(&mut *out, &Document::plain(text))?;
    Ok(out.write_all(b"\n")?)
}

struct Author<'a> {
    params: &'a Params,
    model: &'a Model,
    weights: &'a Weights,
    first: u32,
    ends: Vec<u32>,
    /// Tokens that the tokenizer can turn to text; a model may be padded.
    known: usize,
}

impl Author<'_> {
    /// The tokens of document `i`, without separator and end.
    fn document(&self, i: u64) -> Vec<u32> {
        let mut chances = vec![0.0; self.params.document];
        Philox::new(self.params.seed, &format!("document.{i}")).fill_uniform(
            0.0,
            1.0,
            &mut chances,
        );
        let mut decoder = Decoder::new(self.model, &self.weights.flat);
        let (mut tokens, mut last) = (Vec::new(), self.first);
        for chance in chances {
            let mut logits = decoder.read(&[last])[..self.known].to_vec();
            last = draw(&mut logits, self.params.temperature as f32, chance);
            if self.ends.contains(&last) {
                break;
            }
            tokens.push(last);
        }
        tokens
    }
}

/// The token at `chance` (in 0..1) of the distribution's sum.
fn draw(logits: &mut [f32], temperature: f32, chance: f32) -> u32 {
    logits.iter_mut().for_each(|logit| *logit /= temperature);
    let largest = max(logits);
    let mut left = chance * exp_sum(logits, largest);
    for (token, weight) in logits.iter().enumerate() {
        left -= weight;
        if left < 0.0 {
            return token as u32;
        }
    }
    // Rounding ate the rest: the last token that has any weight.
    logits.iter().rposition(|weight| *weight > 0.0).unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_drawn_as_often_as_their_probability() {
        let logits = [0.0f32, 1.0, -2.0, f32::NEG_INFINITY, 3.0];
        let mut counts = [0.0; 5];
        for i in 0..10_000 {
            let mut own = logits;
            counts[draw(&mut own, 2.0, i as f32 / 10_000.0) as usize] += 1e-4;
        }
        let weights = logits.map(|logit| (logit / 2.0).exp());
        let sum: f32 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(weights) {
            assert!((count - weight / sum).abs() < 2e-4, "{counts:?}");
        }
        assert_eq!(draw(&mut [0.0, f32::NEG_INFINITY], 1.0, 1.0), 0);
    }
}
