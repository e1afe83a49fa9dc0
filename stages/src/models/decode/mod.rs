//! Text token by token: a model with what it remembers of the text so far.
//!
//! A student's memory has a fixed size; attention keeps keys and values of everything since the
//! document began. Tokens may come one by one or many at once (a prompt): what follows is the same
//! up to rounding. Knows no sampling.

mod attention;

use super::block::Block;
use super::config::Wiring;
use super::mixer::Mixer;
use super::model::Model;
use super::ssm;
use crate::ops::rope::Table;
use crate::ops::{embed, many};

pub use attention::KvCache;

/// Tokens that are taken in at once.
const CHUNK: usize = 256;

/// A model in the middle of a text; a copy goes on from there by itself.
#[derive(Clone)]
pub struct Decoder<'a> {
    model: &'a Model,
    params: &'a [f32],
    memory: Vec<Memory>,
    frequencies: Vec<f64>,
    position: usize,
    logits_v: Vec<f32>,
}

/// What one block remembers.
#[derive(Clone)]
enum Memory {
    Attention(KvCache),
    Ssm(ssm::State),
}

impl<'a> Decoder<'a> {
    /// At the beginning of a text.
    pub fn new(model: &'a Model, params: &'a [f32]) -> Decoder<'a> {
        let memory = |block: &Block| match &block.mixer {
            Mixer::Attention(mixer) => Memory::Attention(KvCache::new(mixer.heads())),
            Mixer::Ssm(mixer) => Memory::Ssm(mixer.state()),
        };
        let memory = model.blocks.iter().map(memory).collect();
        let logits_v = vec![0.0; model.config.vocab];
        let frequencies = model.config.rope().frequencies();
        Decoder { model, params, memory, frequencies, position: 0, logits_v }
    }

    /// Tokens taken in so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes that grow, or do not, with the text.
    pub fn bytes(&self) -> usize {
        let one = |memory: &Memory| match memory {
            Memory::Attention(cache) => cache.bytes(),
            Memory::Ssm(state) => state.bytes(),
        };
        self.memory.iter().map(one).sum()
    }

    /// Bytes that a text of `tokens` tokens will need, without having them.
    pub fn bytes_after(model: &Model, tokens: usize) -> usize {
        let one = |block: &Block| match &block.mixer {
            Mixer::Attention(mixer) => KvCache::bytes_of(mixer.heads(), tokens),
            Mixer::Ssm(mixer) => mixer.state_bytes(),
        };
        model.blocks.iter().map(one).fold(0, usize::saturating_add)
    }

    /// Pretends to have read `tokens` tokens that say nothing, for measuring what a long text
    /// costs: keys and values are zero, positions go on.
    pub fn pretend(&mut self, tokens: usize) {
        for memory in &mut self.memory {
            if let Memory::Attention(cache) = memory {
                cache.pretend(tokens);
            }
        }
        self.position += tokens;
    }

    /// Takes in `tokens`, at least one, and gives the logits of what follows the last, `[vocab]`.
    pub fn read(&mut self, tokens: &[u32]) -> &[f32] {
        assert!(!tokens.is_empty(), "there is nothing to read");
        let mut last = Vec::new();
        let mut rest = tokens;
        while !rest.is_empty() {
            // A separator begins a chunk, so that forgetting happens between chunks only.
            let separates = |token: &u32| Some(*token) == self.model.config.separator;
            let next = rest.iter().skip(1).position(separates).map_or(rest.len(), |at| at + 1);
            let (chunk, after) = rest.split_at(next.min(CHUNK));
            last = self.chunk(chunk, separates(&chunk[0]));
            rest = after;
        }
        let Decoder { model, params, logits_v, .. } = self;
        let (norm, head) = (model.final_norm(), model.head());
        let mut normed = vec![0.0; last.len()];
        norm.forward(params, &last, &mut normed, &mut [0.0]);
        many::linear(1, &normed, head.w.of(params), logits_v, false);
        head.add_bias(params, logits_v);
        logits_v
    }

    /// The residual stream after the last block at the last of `tokens`.
    fn chunk(&mut self, tokens: &[u32], fresh: bool) -> Vec<f32> {
        let (n, d) = (tokens.len(), self.model.config.d_model);
        let mut u_nd = vec![0.0; n * d];
        embed::forward(d, tokens, self.model.embedding().of(self.params), &mut u_nd);
        let rope = Table::with(self.position, n, self.model.config.head_dim, &self.frequencies);
        for (block, memory) in self.model.blocks.iter().zip(&mut self.memory) {
            run_block(
                self.model.config.wiring,
                block,
                self.params,
                &rope,
                fresh,
                memory,
                &mut u_nd,
            );
        }
        self.position += n;
        u_nd.split_off((n - 1) * d)
    }
}

/// One block over some tokens, in place.
fn run_block(
    wiring: Wiring,
    block: &Block,
    params: &[f32],
    rope: &Table,
    fresh: bool,
    memory: &mut Memory,
    u_nd: &mut [f32],
) {
    let n = rope.len();
    let (mut x_nd, mut inv_n) = (vec![0.0; u_nd.len()], vec![0.0; n]);
    block.norm1.forward(params, u_nd, &mut x_nd, &mut inv_n);
    match (&block.mixer, memory) {
        (Mixer::Attention(mixer), Memory::Attention(cache)) => {
            attention::run(mixer, params, rope, fresh, &x_nd, u_nd, cache);
        }
        (Mixer::Ssm(mixer), Memory::Ssm(state)) => {
            mixer.run(params, n, fresh, &x_nd, u_nd, state);
        }
        _ => unreachable!("a mixer met the memory of another kind"),
    }
    if let (Wiring::Sequential, Some(norm)) = (wiring, block.norm2) {
        norm.forward(params, u_nd, &mut x_nd, &mut inv_n);
    }
    block.mlp.run(params, n, &x_nd, u_nd);
}
