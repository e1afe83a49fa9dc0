//! Log-likelihoods of continuations, many at once: what every benchmark and probe asks of a model.
//! Knows tokens, no text.
//!
//! Models are causal, so what is right of a token does not matter to it: inputs are padded on the
//! right, and an input that another one begins with needs no pass of its own.

use std::ops::Range;

use anyhow::{Result, ensure};
use engine::stage::Context;

use super::runner::{Loaded, ROWS, Side};
use super::score::{likeliest, log_sum_exp};
use super::spread::spread;
use crate::ops::Dims;
use crate::ops::vector::vectorised;

/// What a model reads, and the tokens whose likelihood is asked: those that follow each of the last
/// positions of the input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    input: Vec<u32>,
    continuation: Vec<u32>,
}

/// What a model says of a continuation.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Likelihood {
    /// Sum of ln p of its tokens.
    pub nats: f32,
    /// Whether each of its tokens is the likeliest of all.
    pub greedy: bool,
}

impl Item {
    /// The last `length + 1` tokens of both, of which the last one is not read.
    pub fn new(context: &[u32], continuation: &[u32], length: usize) -> Result<Item> {
        ensure!(!context.is_empty(), "there is no context to continue");
        ensure!(!continuation.is_empty(), "the continuation has no token of its own");
        let asked = continuation.len();
        ensure!(asked <= length, "the continuation has {asked} tokens, `max_length` is {length}");
        let all = [context, continuation].concat();
        let input = all[all.len().saturating_sub(length + 1)..all.len() - 1].to_vec();
        Ok(Item { input, continuation: continuation.to_vec() })
    }

    /// Tokens that are read.
    pub fn len(&self) -> usize {
        self.input.len()
    }

    /// Never: there is always a context.
    pub fn is_empty(&self) -> bool {
        self.input.is_empty()
    }

    /// The largest token id.
    pub fn largest(&self) -> u32 {
        self.input.iter().chain(&self.continuation).copied().max().unwrap_or(0)
    }

    /// Rows of the input whose logits are needed.
    fn rows(&self) -> Range<usize> {
        self.input.len() - self.continuation.len()..self.input.len()
    }

    /// The token asked for after position `row` of the input.
    fn asked_after(&self, row: usize) -> Option<u32> {
        row.checked_sub(self.rows().start).and_then(|at| self.continuation.get(at)).copied()
    }
}

/// An input that is passed through the model, and the items that it serves.
struct Host<'a> {
    tokens: &'a [u32],
    items: Vec<usize>,
}

/// Inputs of one pass and the length they are padded to.
pub(super) struct Batch<'a> {
    hosts: &'a [Host<'a>],
    width: usize,
}

/// The inputs that are no beginning of another one, longest first.
fn hosts(items: &[Item]) -> Vec<Host<'_>> {
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by(|a, b| items[*a].input.cmp(&items[*b].input));
    let mut hosts: Vec<Host> = Vec::new();
    // Whatever begins with an input follows it in this order, and all between do so too.
    for item in order.into_iter().rev() {
        match hosts.last_mut() {
            Some(host) if host.tokens.starts_with(&items[item].input) => host.items.push(item),
            _ => hosts.push(Host { tokens: &items[item].input, items: vec![item] }),
        }
    }
    hosts.sort_by(|a, b| b.tokens.len().cmp(&a.tokens.len()).then(a.tokens.cmp(b.tokens)));
    hosts
}

/// Passes of at most `budget` tokens (a longer input goes alone), of which at most a quarter pads.
fn batches<'a>(mut hosts: &'a [Host<'a>], budget: usize) -> Vec<Batch<'a>> {
    let mut batches = Vec::new();
    while let Some(first) = hosts.first() {
        let width = first.tokens.len();
        let most = (budget / width).max(1);
        let near = |host: &&Host| host.tokens.len() * 4 >= width * 3;
        let count = hosts.iter().take(most).take_while(near).count();
        let (batch, rest) = hosts.split_at(count);
        batches.push(Batch { hosts: batch, width });
        hosts = rest;
    }
    batches
}

/// The likelihood of every item, in their order. `budget` is the tokens of one pass: bits depend on
/// it, threads do not matter. Memory is, for each thread, that of one pass and [`ROWS`] rows of logits.
pub fn likelihoods(
    loaded: &Loaded,
    items: &[Item],
    budget: usize,
    ctx: &mut Context,
    unit: &str,
) -> Result<Vec<Likelihood>> {
    answer(loaded.model.config.vocab, items, budget, ctx, unit, |ctx, batches, done| {
        let start = || {
            let mut side = None;
            move |number: usize| pass(loaded, &mut side, &batches[number], items)
        };
        spread(ctx, batches.len(), start, done)
    })
}

/// The likelihoods of the items of some batch, with their numbers.
pub(super) type Answered = Vec<(usize, Likelihood)>;

/// The frame of [`likelihoods`]: `run` answers all batches, in their order, and tells of each that it
/// has done.
pub(super) fn answer(
    vocab: usize,
    items: &[Item],
    budget: usize,
    ctx: &mut Context,
    unit: &str,
    run: impl FnOnce(
        &mut Context,
        &[Batch],
        &mut dyn FnMut(&mut Context, usize),
    ) -> Result<Vec<Answered>>,
) -> Result<Vec<Likelihood>> {
    let largest = items.iter().map(Item::largest).max().unwrap_or(0) as usize;
    ensure!(largest < vocab, "token {largest} is asked of a model that has {vocab}");
    let hosts = hosts(items);
    let batches = batches(&hosts, budget);
    let mut finished = 0;
    let mut done = |ctx: &mut Context, number: usize| {
        finished += batches[number].hosts.iter().map(|host| host.items.len()).sum::<usize>();
        ctx.progress(finished as u64, items.len() as u64, unit);
    };
    let mut found = vec![Likelihood::default(); items.len()];
    for (item, likelihood) in run(ctx, &batches, &mut done)?.into_iter().flatten() {
        found[item] = likelihood;
    }
    let broken = found.iter().any(|likelihood| !likelihood.nats.is_finite());
    ensure!(!broken, "a likelihood is no finite number: the model's weights are broken");
    Ok(found)
}

impl Batch<'_> {
    /// Inputs of the pass, and the length of the longest.
    pub(super) fn size(&self) -> (usize, usize) {
        (self.hosts.len(), self.width)
    }

    /// All inputs, each filled up to `width`.
    pub(super) fn tokens(&self, width: usize) -> Vec<u32> {
        let mut tokens_n = vec![0; self.hosts.len() * width];
        for (host, to) in self.hosts.iter().zip(tokens_n.chunks_exact_mut(width)) {
            to[..host.tokens.len()].copy_from_slice(host.tokens);
        }
        tokens_n
    }

    /// Numbers of the items that the pass serves, each with the position of its host's first token.
    #[cfg(any(feature = "cuda", feature = "emulate"))]
    pub(super) fn served(&self, width: usize) -> impl Iterator<Item = (usize, usize)> {
        let each = self.hosts.iter().enumerate();
        each.flat_map(move |(i, host)| host.items.iter().map(move |item| (*item, i * width)))
    }
}

#[cfg(any(feature = "cuda", feature = "emulate"))]
impl Item {
    /// Positions of its input and the token that is asked for after each.
    pub(super) fn asked(&self) -> impl Iterator<Item = (usize, u32)> {
        self.rows().zip(self.continuation.iter().copied())
    }
}

/// One pass: all items of a batch with their likelihoods.
fn pass<'a>(
    loaded: &'a Loaded,
    side: &mut Option<Side<'a>>,
    batch: &Batch,
    items: &[Item],
) -> Answered {
    let (count, width) = batch.size();
    let dims = Dims { batch: count, seq: width };
    let side = side.get_or_insert_with(|| Side::new(loaded, dims));
    side.forward(dims, &batch.tokens(width));
    let rows = batch.hosts.iter().enumerate();
    rows.flat_map(|(i, host)| serve(side, i * width, host, items)).collect()
}

/// The items of the host whose first row is `first`.
fn serve(side: &mut Side, first: usize, host: &Host, items: &[Item]) -> Answered {
    let mut sums = vec![(0f64, true); host.items.len()];
    for span in spans(host.items.iter().map(|item| items[*item].rows())) {
        let logits_nv = side.logits(first + span.start..first + span.end);
        let v = logits_nv.len() / span.len();
        for (row, logits_v) in span.zip(logits_nv.chunks_exact(v)) {
            let (sum, best) = (vectorised(|| log_sum_exp(logits_v)), likeliest(logits_v));
            for ((nats, greedy), item) in sums.iter_mut().zip(&host.items) {
                let Some(token) = items[*item].asked_after(row) else { continue };
                *nats += f64::from(logits_v[token as usize]) - sum;
                *greedy &= token as usize == best;
            }
        }
    }
    let likelihood = |(nats, greedy)| Likelihood { nats: nats as f32, greedy };
    host.items.iter().copied().zip(sums.into_iter().map(likelihood)).collect()
}

/// The union of `rows`, cut into pieces of at most [`ROWS`].
fn spans(rows: impl Iterator<Item = Range<usize>>) -> Vec<Range<usize>> {
    let mut all: Vec<Range<usize>> = rows.collect();
    all.sort_by_key(|range| (range.start, range.end));
    let mut merged: Vec<Range<usize>> = Vec::new();
    for range in all {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    let cut = |range: Range<usize>| {
        let end = range.end;
        range.step_by(ROWS).map(move |start| start..end.min(start + ROWS))
    };
    merged.into_iter().flat_map(cut).collect()
}
