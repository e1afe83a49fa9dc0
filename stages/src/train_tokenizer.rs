//! `train_tokenizer`: a byte-level BPE of the corpus's own words (Sennrich et al. 2016, GPT-2's
//! alphabet and word pattern), by the tokenizers crate.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, ensure};
use engine::stage::{Context, In, Out, Ports, Stage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

use crate::data::corpus::{Corpus, parallel};
use crate::data::random::{fraction, hash};

/// The stage.
pub struct TrainTokenizer;

/// The token that parts documents; always id 0.
pub const SEPARATOR: &str = "<|endoftext|>";

/// How large, and from how much text.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// Number of tokens: 1 separator, 256 bytes, the rest merges.
    pub vocab: usize,
    /// Text to look at: of a larger corpus, documents are chosen evenly to make about so many bytes.
    pub bytes_max: u64,
}

impl Default for Params {
    fn default() -> Params {
        Params { vocab: 512, bytes_max: 4 << 20 }
    }
}

impl Stage for TrainTokenizer {
    const NAME: &'static str = "train_tokenizer";
    const VERSION: u32 = 1;
    const DOC: &'static str =
        "Trains a byte-level BPE tokenizer on documents; `<|endoftext|>` is token 0.";
    type Params = Params;

    fn ports() -> Ports {
        const INPUTS: &[In] = &[In::many("text", "Documents as JSON lines.")];
        const OUTPUTS: &[Out] =
            &[Out::one("tokenizer", "tokenizer.json", "The tokenizer, as Hugging Face writes it.")];
        Ports { inputs: INPUTS, outputs: OUTPUTS }
    }

    fn check(params: &Params) -> Vec<(String, String)> {
        match params.vocab {
            0..258 => {
                vec![("vocab".into(), "must be at least 258 (256 bytes, a separator)".into())]
            }
            _ => Vec::new(),
        }
    }

    fn run(params: &Params, ctx: &mut Context) -> Result<()> {
        let texts = chosen(params, ctx)?;
        ctx.progress(0, texts.len() as u64, "documents");
        let mut tokenizer = parallel(ctx.threads(), || train(params.vocab, &texts))??;
        ctx.check_cancelled()?;
        let used = tokenizer.get_vocab_size(true);
        pad(&mut tokenizer, params.vocab)?;
        let path = ctx.output("tokenizer")?;
        save(&tokenizer, &path)?;
        ctx.progress(texts.len() as u64, texts.len() as u64, "documents");
        if used < params.vocab {
            let spare = params.vocab - used;
            ctx.note(format!("the text gave {used} tokens; {spare} more are reserved, unused"));
        }
        Ok(())
    }
}

/// Documents to train on: all of them, or a share chosen by their hash.
fn chosen(params: &Params, ctx: &Context) -> Result<Vec<String>> {
    let corpora = Corpus::open_all(ctx.inputs("text"))?;
    let total: u64 = corpora.iter().map(Corpus::bytes).sum();
    let share = params.bytes_max as f64 / total.max(1) as f64;
    let mut texts = Vec::new();
    for corpus in &corpora {
        for chunk in corpus.chunks() {
            ctx.check_cancelled()?;
            for (line, document) in corpus.lines(chunk.clone()) {
                if share >= 1.0 || fraction(hash(line)) < share {
                    texts.push(document()?.text);
                }
            }
        }
    }
    ensure!(!texts.is_empty(), "no documents to train a tokenizer on");
    Ok(texts)
}

/// Merges ties are broken by token ids, which the alphabet's order fixes, so the result depends on
/// the texts only (tested over runs and thread counts).
fn train(vocab: usize, texts: &[String]) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(BPE::default());
    // A blank before the first word makes it the same token as in mid-sentence.
    let bytes = ByteLevel::default().add_prefix_space(true);
    tokenizer.with_pre_tokenizer(Some(bytes));
    tokenizer.with_post_processor(Some(bytes));
    tokenizer.with_decoder(Some(bytes));
    let alphabet: HashSet<char> = ByteLevel::alphabet().into_iter().collect();
    let trainer = BpeTrainer::builder()
        .vocab_size(vocab)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(alphabet)
        .special_tokens(vec![AddedToken::from(SEPARATOR, true)])
        .build();
    let mut trainer = TrainerWrapper::BpeTrainer(trainer);
    tokenizer
        .train(&mut trainer, texts.iter().map(String::as_str))
        .map_err(|error| anyhow!("cannot train the tokenizer: {error}"))?;
    Ok(tokenizer)
}

/// Fills up with tokens that no text has, so that a model's shape depends on `vocab` alone.
fn pad(tokenizer: &mut Tokenizer, vocab: usize) -> Result<()> {
    let used = tokenizer.get_vocab_size(true);
    let reserved = |i: usize| AddedToken::from(format!("<|reserved_{i}|>"), true);
    let added = tokenizer.add_special_tokens((used..vocab).map(reserved));
    added.map_err(|error| anyhow!("cannot reserve tokens: {error}"))?;
    Ok(())
}

fn save(tokenizer: &Tokenizer, path: &Path) -> Result<()> {
    let text = tokenizer.to_string(true).map_err(|error| anyhow!("{error}"))?;
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
