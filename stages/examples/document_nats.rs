//! Mean loss of a model over documents, each alone and cut to so many tokens after its separator:
//!
//! ```text
//! cargo run --release -p stages --example document_nats -- model.gguf valid.jsonl [documents] [tokens]
//! ```

#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::path::Path;

use anyhow::{Context as _, Result, anyhow};
use stages::data::separator::separator;
use stages::foreign;
use stages::models::{Keep, Model, Params};
use stages::ops::Dims;
use stages::ops::cross_entropy;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, texts, rest @ ..] = &args[..] else {
        return Err(anyhow!("usage: document_nats MODEL TEXTS.jsonl [DOCUMENTS] [TOKENS]"));
    };
    let number = |at: usize, otherwise: usize| rest.get(at).map_or(Ok(otherwise), |n| n.parse());
    let (documents, most) = (number(0, 60)?, number(1, 400)?);
    let foreign = foreign::open(Path::new(model), None)?;
    let (model, weights) = load(&foreign)?;
    let tokenizer = foreign.tokenizer.as_ref().context("the model has no tokenizer")?;
    let (_, first) = separator(tokenizer, None)?;
    let (mut nats, mut count, mut bytes) = (0.0, 0, 0);
    for line in std::fs::read_to_string(texts)?.lines().take(documents) {
        let document: serde_json::Value = serde_json::from_str(line)?;
        let text = document["text"].as_str().context("a line without `text`")?;
        let ids = tokenizer.encode(text, false).map_err(|e| anyhow!("{e}"))?;
        let own = ids.get_ids();
        let own = &own[..own.len().min(most)];
        let tokens = [&[first], own].concat();
        bytes += ids.get_offsets()[own.len() - 1].1;
        nats += loss(&model, &weights, &tokens);
        count += own.len();
    }
    let per = nats / count as f64;
    let bits = nats / std::f64::consts::LN_2 / bytes as f64;
    println!("{count} tokens: {per:.4} nats, perplexity {:.2}, {bits:.3} bits a byte", per.exp());
    Ok(())
}

/// The weights by our names, as the stage `teacher` writes them.
fn load(foreign: &foreign::Foreign) -> Result<(Model, Params)> {
    let model = Model::new(foreign.config.clone())?;
    let mut params = Params::zeros(&model.layout);
    for file in model.layout.files() {
        let origin = foreign.origin(&file.name);
        let out = &mut params.flat[file.range.clone()];
        foreign.checkpoint.read_f32(&origin.name, out)?;
        if let Some(heads) = origin.paired_heads {
            stages::formats::unpermute_rows(heads, model.config.head_dim, out)?;
        }
    }
    Ok((model, params))
}

/// Σ −ln p of all tokens but the first.
fn loss(model: &Model, weights: &Params, tokens: &[u32]) -> f64 {
    let (n, v) = (tokens.len() - 1, model.config.vocab);
    let mut pass = model.pass(Dims { batch: 1, seq: n }, Keep::Nothing);
    pass.tokens_n.copy_from_slice(&tokens[..n]);
    model.forward(&weights.flat, &mut pass, |_, _, _| {});
    let mut logits = vec![0.0; n * v];
    model.logits(&weights.flat, &pass, 0..n, &mut logits);
    cross_entropy::hard(v, &mut logits, &tokens[1..], 1.0)
}
