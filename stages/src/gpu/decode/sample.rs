//! Documents that a model writes, many side by side.
//!
//! Document `i` is drawn by the random numbers of its own number, as on the CPU, and documents are
//! told in the order of their numbers. One that is over makes room for the next at the next look of
//! the host.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use super::memory::bytes_of;
use super::{Decoder, Room, Token, Turn};
use crate::gpu::launch::Gpu;
use crate::gpu::ops::sample::{Choice, NOTHING};
use crate::models::{Config, Model};
use crate::train::philox::Philox;

/// Turns between two looks, at most.
const TURNS: usize = 32;
/// Documents side by side, at most, and the bytes that they may remember.
const MOST: usize = 512;
const BYTES: usize = 8 << 30;

/// What is written, and how.
#[derive(Clone, Copy, Debug)]
pub struct Writing<'a> {
    /// Decides what is written.
    pub seed: u64,
    /// Longest document, in tokens.
    pub document: usize,
    /// Of the softmax that tokens are drawn from.
    pub temperature: f32,
    /// The token that begins a document, which is not told.
    pub first: u32,
    /// Tokens that end one; they are not told either.
    pub ends: &'a [u32],
    /// Tokens that may be written: the first of the vocabulary.
    pub known: usize,
    /// Documents side by side; see [`batch_of`].
    pub batch: usize,
}

/// How many documents of at most `document` tokens to write side by side, where about `wanted` are
/// needed. Depends on no device, so that bits do not.
pub fn batch_of(config: &Config, document: usize, wanted: u64) -> usize {
    let [caches, states] = bytes_of(config, 1, document + TURNS);
    let fit = (BYTES / (caches + states).max(1)).clamp(1, MOST);
    let wanted = usize::try_from(wanted).unwrap_or(MOST).clamp(1, MOST);
    // A power of two: the last one that fits and is not far more than wanted.
    let most = 1 << fit.ilog2();
    wanted.next_power_of_two().min(most)
}

/// A document in the making.
struct Draft {
    number: u64,
    chances: Vec<f32>,
    /// Turns made for it.
    at: usize,
    tokens: Vec<u32>,
    over: bool,
}

impl Draft {
    fn new(writing: &Writing, number: u64) -> Draft {
        let mut chances = vec![0.0; writing.document];
        let random = Philox::new(writing.seed, &format!("document.{number}"));
        random.fill_uniform(0.0, 1.0, &mut chances);
        Draft { number, chances, at: 0, tokens: Vec::new(), over: false }
    }

    /// What it does `later` turns from now; after its end it goes on and nobody listens.
    fn turn(&self, first: u32, later: usize) -> Turn {
        let at = self.at + later;
        let token = if at == 0 { Token::Begin(first) } else { Token::Chosen };
        Turn { token, chance: self.chances.get(at).copied().unwrap_or(0.0) }
    }

    fn hear(&mut self, writing: &Writing, token: u32) -> Result<()> {
        if self.over {
            return Ok(());
        }
        ensure!(
            token != NOTHING,
            "document {} breaks off after {} tokens: the model's logits are NaN or infinite, its \
             weights are broken or its training has diverged",
            self.number,
            self.tokens.len()
        );
        if writing.ends.contains(&token) {
            self.over = true;
            return Ok(());
        }
        self.tokens.push(token);
        self.over = self.tokens.len() >= writing.document;
        Ok(())
    }
}

/// Lets `model` write documents 0, 1, … until `hear` says no. It gets the documents that became
/// complete, in order and without a gap, at every look: maybe none.
pub fn sample(
    gpu: &Gpu,
    model: &Model,
    params: &[f32],
    writing: &Writing,
    mut hear: impl FnMut(Vec<Vec<u32>>) -> Result<bool>,
) -> Result<()> {
    let turns = TURNS.min(writing.document).max(1);
    let room = Room { batch: writing.batch, capacity: writing.document + turns, turns };
    let choice = Choice { temperature: writing.temperature, top_k: 0 };
    let mut decoder = Decoder::new(gpu, model, params, room, choice, writing.known)?;
    let mut drafts: Vec<Draft> =
        (0..writing.batch as u64).map(|number| Draft::new(writing, number)).collect();
    let (mut next, mut told) = (writing.batch as u64, 0);
    let mut complete = BTreeMap::new();
    loop {
        let chosen = decoder.run(turns, |later, b| drafts[b].turn(writing.first, later))?;
        for row in chosen.chunks(writing.batch) {
            for (draft, token) in drafts.iter_mut().zip(row) {
                draft.hear(writing, *token)?;
            }
        }
        for draft in &mut drafts {
            draft.at += turns;
            if draft.over {
                let old = std::mem::replace(draft, Draft::new(writing, next));
                complete.insert(old.number, old.tokens);
                next += 1;
            }
        }
        let mut documents = Vec::new();
        while let Some(tokens) = complete.remove(&told) {
            documents.push(tokens);
            told += 1;
        }
        if !hear(documents)? {
            return Ok(());
        }
    }
}
