//! What a token costs after a long text: time, memory, and the bytes that have to be moved.

use anyhow::{Result, ensure};
use half::bf16;

use super::memory::bytes_of;
use super::{Decoder, Room, Token, Turn};
use crate::gpu::launch::Gpu;
use crate::gpu::ops::sample::Choice;
use crate::models::Model;
use crate::train::philox::Philox;

/// Turns of one timing.
const TURNS: usize = 8;

/// What a turn costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Milliseconds of the device for one token of every sequence: the median.
    pub milliseconds: f64,
    /// Tokens a second, of all sequences together.
    pub rate: f64,
    /// Bytes of keys and values and of states after so many tokens.
    pub remembered: usize,
    /// Bytes of weights.
    pub weights: usize,
    /// Bytes that have to move for a turn: weights, keys and values once, states there and back.
    pub traffic: usize,
}

impl Speed {
    /// Bytes a second.
    pub fn bandwidth(&self) -> f64 {
        self.traffic as f64 / (self.milliseconds / 1e3)
    }
}

/// Measures at least `tokens` turns of `batch` sequences after `context` tokens, which are read if
/// `read` and else pretended.
pub fn measure(
    gpu: &Gpu,
    model: &Model,
    params: &[f32],
    batch: usize,
    (context, read): (usize, bool),
    tokens: usize,
) -> Result<Speed> {
    let (config, vocab) = (&model.config, model.config.vocab);
    let timings = tokens.div_ceil(TURNS).max(1);
    // One more: the first meets memory that nobody touched, and is recorded in.
    let capacity = context.saturating_add((timings + 1) * TURNS);
    let room = Room { batch, capacity, turns: TURNS };
    let choice = Choice { temperature: 1.0, top_k: 0 };
    let mut decoder = Decoder::new(gpu, model, params, room, choice, vocab)?;
    let random = Philox::new(0, "bench");
    // Not the separator: a model forgets at it.
    let token = |at: usize| {
        let token = random.block(at as u64)[0] % vocab as u32;
        if Some(token) == config.separator { (token + 1) % vocab as u32 } else { token }
    };
    let turns = |decoder: &mut Decoder, count: usize, from: usize| {
        let word = |turn: usize, b: usize| token((from + turn).wrapping_mul(batch) + b);
        decoder.run(count, |turn, b| Turn { token: Token::Read(word(turn, b)), chance: 0.5 })
    };
    match read {
        true => {
            for first in (0..context).step_by(TURNS) {
                turns(&mut decoder, TURNS.min(context - first), first)?;
            }
        }
        false => decoder.fill(context)?,
    }
    let mut times = Vec::new();
    for timing in 0..=timings {
        turns(&mut decoder, TURNS, context + timing * TURNS)?;
        times.push(f64::from(decoder.milliseconds()) / TURNS as f64);
    }
    times.remove(0);
    times.sort_by(f64::total_cmp);
    let milliseconds = times[times.len() / 2].max(1e-9);
    let [caches, states] = bytes_of(config, batch, context);
    Ok(Speed {
        milliseconds,
        rate: batch as f64 / (milliseconds / 1e3),
        remembered: caches + states,
        weights: decoder.weight_bytes(),
        traffic: decoder.weight_bytes() + caches + 2 * states,
    })
}

/// Bytes a second that the device copies from and to its memory (each byte counts twice), measured
/// with `bytes`: the median of several copies.
pub fn copy_bandwidth(gpu: &Gpu, bytes: usize) -> Result<f64> {
    const COPIES: usize = 4;
    let len = bytes / size_of::<bf16>();
    ensure!(len > 0, "nothing to copy");
    let (from, to) = (gpu.zeros::<bf16>("a copy", len)?, gpu.zeros::<bf16>("a copy", len)?);
    let mut times = Vec::new();
    for _ in 0..7 {
        let start = gpu.mark();
        (0..COPIES).for_each(|_| gpu.copy(from.all(), to.all()));
        let end = gpu.mark();
        gpu.passed(end)?;
        times.push(f64::from(gpu.between(start, end)?) / 1e3);
    }
    times.remove(0);
    times.sort_by(f64::total_cmp);
    let moved = 2 * COPIES * len * size_of::<bf16>();
    Ok(moved as f64 / times[times.len() / 2].max(1e-12))
}
