//! Cached top-k logits of the teacher as phase 3 reads them. Knows no loss.
//!
//! Two artifacts of `cache_teacher`: `logits` (tokens, log-probabilities and what is left for the
//! rest, of every position) and `tokens` (the sequences they are of).

use anyhow::{Context as _, Result, ensure};
use engine::tensors::{Tensors, View};
use half::f16;
use safetensors::Dtype;
use serde::Deserialize;

/// Top-k logits with their sequences, mapped.
pub struct TopLogits {
    logits: Tensors,
    tokens: Tensors,
    about: About,
}

#[derive(Deserialize)]
struct About {
    sequences: usize,
    seq: usize,
    top_k: usize,
    vocab: usize,
}

/// The targets of one sequence.
#[derive(Clone, Debug, Default)]
pub struct Targets {
    /// Tokens by falling probability, `[seq, k]`.
    pub ids_lk: Vec<u32>,
    /// Their log-probabilities.
    pub log_p_lk: Vec<f16>,
    /// Probability of all other tokens together.
    pub tail_l: Vec<f32>,
}

impl TopLogits {
    /// Checks names, types, shapes and that every token is below `vocab`.
    pub fn open(logits: Tensors, tokens: Tensors, vocab: usize) -> Result<TopLogits> {
        let text = logits.metadata("top_logits").context("the file holds no top-k logits")?;
        let about: About = serde_json::from_str(text).context("its `top_logits`")?;
        let About { sequences: n, seq, top_k: k, .. } = about;
        ensure!(about.vocab == vocab, "they are of a vocabulary of {}, not {vocab}", about.vocab);
        let ids = if vocab > 1 << 16 { Dtype::U32 } else { Dtype::U16 };
        let top = TopLogits { logits, tokens, about };
        let has = |tensors: &Tensors, name: &str, dtype: Dtype, shape: &[usize]| {
            let view = tensors.get(name).with_context(|| format!("tensor `{name}` is missing"))?;
            let (d, s) = (view.dtype, view.shape);
            ensure!(d == dtype && s == shape, "`{name}` is {d:?} {s:?}, not {dtype:?} {shape:?}");
            Ok(())
        };
        has(&top.logits, "ids", ids, &[n, seq, k])?;
        has(&top.logits, "log_p", Dtype::F16, &[n, seq, k])?;
        has(&top.logits, "tail", Dtype::F32, &[n, seq])?;
        has(&top.tokens, "tokens", Dtype::U32, &[n, seq])
            .context("the logits and `sampled` are not of one `cache_teacher`")?;
        let (mut all, mut tokens) = (Targets::default(), vec![0; seq]);
        for sequence in 0..n {
            top.targets(sequence, &mut all);
            top.tokens(sequence, &mut tokens);
            let outside = all.ids_lk.iter().chain(&tokens).find(|id| **id as usize >= vocab);
            ensure!(outside.is_none(), "sequence {sequence} names token {outside:?} of {vocab}");
        }
        Ok(top)
    }

    /// Sequences there are.
    pub fn len(&self) -> usize {
        self.about.sequences
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens of each.
    pub fn seq(&self) -> usize {
        self.about.seq
    }

    /// Tokens kept of each position.
    pub fn k(&self) -> usize {
        self.about.top_k
    }

    /// The tokens of `sequence`.
    pub fn tokens(&self, sequence: usize, out: &mut [u32]) {
        let bytes = row(self.tokens.get("tokens"), sequence, self.len());
        for (to, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
            *to = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
    }

    /// What the teacher expects at every position of `sequence`.
    pub fn targets(&self, sequence: usize, out: &mut Targets) {
        let n = self.len();
        let ids = row(self.logits.get("ids"), sequence, n);
        out.ids_lk.clear();
        match self.about.vocab > 1 << 16 {
            true => {
                let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                out.ids_lk.extend(ids.chunks_exact(4).map(word));
            }
            false => {
                let word = |b: &[u8]| u32::from(u16::from_le_bytes([b[0], b[1]]));
                out.ids_lk.extend(ids.chunks_exact(2).map(word));
            }
        }
        let log_p = row(self.logits.get("log_p"), sequence, n).chunks_exact(2);
        out.log_p_lk.clear();
        out.log_p_lk.extend(log_p.map(|b| f16::from_le_bytes([b[0], b[1]])));
        let tail = row(self.logits.get("tail"), sequence, n).chunks_exact(4);
        out.tail_l.clear();
        out.tail_l.extend(tail.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
    }
}

/// The bytes of one of `n` rows of a tensor that is known to be there.
fn row(view: Option<View<'_>>, at: usize, n: usize) -> &[u8] {
    let bytes = view.expect("checked when it was opened").bytes;
    let len = bytes.len() / n;
    &bytes[at * len..][..len]
}
