//! `tokenize`: documents to token shards: training, held out, and held-out documents with answers.
//!
//! The documents of some chunks of the mapped text are encoded in parallel and written in order, so the
//! bytes depend on no thread count; memory is a few chunks.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, ensure};
use engine::stage::{Context, In, Out, Ports, Stage};
use rayon::prelude::*;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokenizers::{Encoding, Tokenizer};

use crate::data::corpus::Corpus;
use crate::data::document::Document;
use crate::data::random::{fraction, hash};
use crate::data::separator::separator;
use crate::data::shard::{Answer, ShardWriter};
use crate::tokenizer::cached;

/// The stage.
pub struct Tokenize;

/// How tokens are cut and what is held out.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// Tokens of a sequence.
    pub seq: usize,
    /// Share of documents that no training sees, chosen by a hash of their bytes.
    pub holdout: f64,
    /// Stop after the document that makes so many training tokens.
    pub tokens_max: Option<u64>,
    /// The tokenizer's special token to put before every document; by default `<|endoftext|>`,
    /// `<|begin_of_text|>`, `<s>` or `<bos>`, whichever it has first.
    pub separator: Option<String>,
}

impl Default for Params {
    fn default() -> Params {
        Params { seq: 128, holdout: 0.02, tokens_max: None, separator: None }
    }
}

impl Stage for Tokenize {
    const NAME: &'static str = "tokenize";
    const VERSION: u32 = 1;
    const DOC: &'static str =
        "Encodes documents, packs them to sequences, and holds some of them out.";
    type Params = Params;

    fn ports() -> Ports {
        const INPUTS: &[In] = &[
            In::many("text", "Documents as JSON lines."),
            In::one("tokenizer", "A `tokenizer.json`."),
        ];
        const OUTPUTS: &[Out] = &[
            Out::one("train", "train.bin", "Token shard to train on."),
            Out::one("holdout", "holdout.bin", "Token shard of held-out documents."),
            Out::one("answers", "answers.bin", "Held-out documents that ask, with their answers."),
        ];
        Ports { inputs: INPUTS, outputs: OUTPUTS }
    }

    fn check(params: &Params) -> Vec<(String, String)> {
        let mut wrong = Vec::new();
        if params.seq < 2 || params.seq > 1 << 20 {
            wrong.push(("seq".into(), format!("is {}, not in 2..=1048576", params.seq)));
        }
        if !(0.0..=0.5).contains(&params.holdout) {
            wrong.push(("holdout".into(), format!("is {}, not in 0..=0.5", params.holdout)));
        }
        wrong
    }

    fn run(params: &Params, ctx: &mut Context) -> Result<()> {
        let tokenizer = load(ctx.path("tokenizer")?)?;
        let corpora = Corpus::open_all(ctx.inputs("text"))?;
        let mut shards = Shards::create(params, &tokenizer, ctx)?;
        let texts = cached::Encoder::new(tokenizer, ctx.threads());
        let encoder = Encoder { texts: &texts, holdout: params.holdout };
        let total: u64 = corpora.iter().map(Corpus::bytes).sum();
        // One pool for all: what its threads know lives as long as they.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(ctx.threads()).build();
        let pool = pool.context("cannot start threads")?;
        let (mut done, wave) = (0, ctx.threads().max(1) * 2);
        'all: for corpus in &corpora {
            for chunks in corpus.chunks().chunks(wave) {
                ctx.check_cancelled()?;
                ctx.progress(done, total, "bytes");
                let documents = pool.install(|| encoder.encode_all(corpus, chunks))?;
                if shards.write(&documents, params.tokens_max)? {
                    break 'all;
                }
                done += chunks.iter().map(|chunk| chunk.len() as u64).sum::<u64>();
            }
        }
        ctx.progress(total, total, "bytes");
        let note = shards.finish(params)?;
        ctx.note(note);
        Ok(())
    }
}

/// Reads a `tokenizer.json`.
pub fn load(path: &Path) -> Result<Tokenizer> {
    Tokenizer::from_file(path).map_err(|error| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        anyhow!("`{name}` is no valid tokenizer: {error}")
    })
}

/// A document's tokens, and its answers in token positions.
struct Encoded {
    held_out: bool,
    tokens: Vec<u32>,
    answers: Vec<TokenAnswer>,
}

struct TokenAnswer {
    span: Range<usize>,
    fact: Range<usize>,
    candidates: u32,
    copy: bool,
}

struct Encoder<'a> {
    texts: &'a cached::Encoder,
    holdout: f64,
}

impl Encoder<'_> {
    /// The chunks' documents, in order. Threads share them one by one, so that none waits for another
    /// to end a long chunk.
    fn encode_all(&self, corpus: &Corpus, chunks: &[Range<usize>]) -> Result<Vec<Encoded>> {
        let lines: Vec<_> = chunks.iter().flat_map(|chunk| corpus.lines(chunk.clone())).collect();
        lines.into_par_iter().map(|(_, document)| self.encode(&document()?)).collect()
    }

    /// What is held out depends on the text alone, so that equal documents go the same way.
    fn encode(&self, document: &Document) -> Result<Encoded> {
        let held_out = fraction(hash(document.text.as_bytes())) < self.holdout;
        let text = document.text.as_str();
        if !held_out || document.answers.is_empty() {
            let tokens = self.texts.ids(text)?;
            return Ok(Encoded { held_out, tokens, answers: Vec::new() });
        }
        let encoding = self.texts.tokenizer().encode(text, false);
        let encoding = encoding.map_err(|error| anyhow!("cannot encode a document: {error}"))?;
        let copy = document.kind == "refrain";
        let answers = document.answers.iter().filter_map(|question| {
            Some(TokenAnswer {
                span: token_span(&encoding, question.span)?,
                fact: token_span(&encoding, question.fact_span)?,
                candidates: question.candidates as u32,
                copy,
            })
        });
        Ok(Encoded { held_out, answers: answers.collect(), tokens: encoding.get_ids().to_vec() })
    }
}

/// The tokens that share a byte with `span`; offsets are in order.
fn token_span(encoding: &Encoding, span: [usize; 2]) -> Option<Range<usize>> {
    let offsets = encoding.get_offsets();
    let start = offsets.partition_point(|(_, end)| *end <= span[0]);
    let end = offsets.partition_point(|(start, _)| *start < span[1]);
    (start < end).then_some(start..end)
}

/// The three outputs.
struct Shards {
    train: ShardWriter,
    holdout: ShardWriter,
    answers: ShardWriter,
    seq: u64,
    documents: u64,
    questions: u32,
}

impl Shards {
    fn create(params: &Params, tokenizer: &Tokenizer, ctx: &mut Context) -> Result<Shards> {
        let vocab = tokenizer.get_vocab_size(true);
        let (_, separator) = separator(tokenizer, params.separator.as_deref())?;
        let mut create = |port: &str| -> Result<ShardWriter> {
            ShardWriter::create(&ctx.output(port)?, vocab, params.seq, separator)
        };
        Ok(Shards {
            train: create("train")?,
            holdout: create("holdout")?,
            answers: create("answers")?,
            seq: params.seq as u64,
            documents: 0,
            questions: 0,
        })
    }

    /// Appends documents; true once there are enough training tokens.
    fn write(&mut self, documents: &[Encoded], tokens_max: Option<u64>) -> Result<bool> {
        for document in documents {
            self.documents += 1;
            if !document.held_out {
                self.train.document(&document.tokens)?;
                if tokens_max.is_some_and(|most| self.train.written() >= most) {
                    return Ok(true);
                }
                continue;
            }
            self.holdout.document(&document.tokens)?;
            if !document.answers.is_empty() {
                self.ask(document)?;
            }
        }
        Ok(false)
    }

    /// Appends a document with answers; those whose fact is in another sequence do not count.
    fn ask(&mut self, document: &Encoded) -> Result<()> {
        let (sequence, position) = self.answers.document(&document.tokens)?;
        let first = sequence * self.seq + u64::from(position);
        for answer in &document.answers {
            let place =
                |at: usize| ((first + at as u64) / self.seq, (first + at as u64) % self.seq);
            let (fact_sequence, fact_start) = place(answer.fact.start);
            let (sequence, last) = place(answer.span.end - 1);
            if fact_sequence != sequence {
                continue;
            }
            self.answers.answer(Answer {
                sequence: u32::try_from(sequence).context("too many sequences with answers")?,
                start: (last as usize + 1 - answer.span.len()) as u32,
                end: last as u32 + 1,
                fact_start: fact_start as u32,
                fact_end: fact_start as u32 + answer.fact.len() as u32,
                candidates: answer.candidates,
                copy: u32::from(answer.copy),
                document: self.questions,
            });
        }
        self.questions += 1;
        Ok(())
    }

    /// Ends the files; nothing to train on or nothing held out is an error.
    fn finish(self, params: &Params) -> Result<String> {
        let (documents, seq) = (self.documents, self.seq);
        let (train, held_out) = (self.train.written(), self.holdout.written());
        let (train_sequences, _) = self.train.finish()?;
        let (sequences, _) = self.holdout.finish()?;
        let (_, answers) = self.answers.finish()?;
        ensure!(
            train_sequences > 0,
            "{documents} documents make {train} training tokens, less than one sequence of {seq}; \
             give more text or a smaller `seq`"
        );
        ensure!(
            sequences > 0 || params.holdout == 0.0,
            "of {documents} documents {held_out} tokens are held out, less than one sequence of \
             {seq}; give more text, a smaller `seq` or a larger `holdout`"
        );
        Ok(format!(
            "{documents} documents: {train_sequences} sequences to train on, {sequences} held out, \
             {answers} answers"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_become_the_tokens_they_touch() {
        let ids = vec![1, 2, 3];
        let offsets = vec![(0, 3), (4, 7), (7, 8)];
        let none = || vec![0; 3];
        let words = vec![None; 3];
        let tokens = vec![String::new(); 3];
        let encoding = Encoding::new(
            ids,
            none(),
            tokens,
            words,
            offsets,
            none(),
            none(),
            vec![],
            Default::default(),
        );
        assert_eq!(token_span(&encoding, [4, 7]), Some(1..2));
        assert_eq!(token_span(&encoding, [2, 8]), Some(0..3));
        assert_eq!(token_span(&encoding, [3, 4]), None);
        assert_eq!(token_span(&encoding, [7, 8]), Some(2..3));
    }
}
