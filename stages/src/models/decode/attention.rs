//! Attention over remembered keys and values.

use std::ops::Range;

use rayon::prelude::*;

use crate::models::attention::Attention;
use crate::ops::attention::Heads;
use crate::ops::gemm::{Mat, gemm};
use crate::ops::many;
use crate::ops::rope::Table;
use crate::ops::vector::{dot, exp_sum, max, scale, vectorised};

/// Tokens for which there is room at least when there has to be more.
const ROOM: usize = 64;

/// Keys and values of the document so far.
#[derive(Clone)]
pub struct KvCache {
    heads: Heads,
    tokens: usize,
    /// Of each key/value head: rotated keys, then values, `[tokens, dim]` each.
    sides: Vec<[Vec<f32>; 2]>,
}

impl KvCache {
    /// Nothing remembered.
    pub fn new(heads: Heads) -> KvCache {
        KvCache { heads, tokens: 0, sides: vec![[Vec::new(), Vec::new()]; heads.kv] }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.sides.iter().flatten().map(|side| side.capacity() * size_of::<f32>()).sum()
    }

    /// Bytes of `tokens` tokens.
    pub fn bytes_of(heads: Heads, tokens: usize) -> usize {
        heads.kv.saturating_mul(2 * heads.dim * size_of::<f32>()).saturating_mul(tokens)
    }

    /// Room for `tokens` more. A list that is full would double; of the longest texts a quarter more
    /// has to do.
    fn reserve(&mut self, tokens: usize) {
        let more = tokens.max((self.tokens / 4).max(ROOM)) * self.heads.dim;
        for side in self.sides.iter_mut().flatten() {
            if side.capacity() < (self.tokens + tokens) * self.heads.dim {
                side.reserve_exact(more);
            }
        }
    }

    /// `tokens` more that are all zero, and counted; and room for some after them.
    pub fn pretend(&mut self, tokens: usize) {
        self.reserve(tokens + ROOM);
        let len = (self.tokens + tokens) * self.heads.dim;
        self.sides.iter_mut().flatten().for_each(|side| side.resize(len, 0.0));
        self.tokens += tokens;
    }

    fn forget(&mut self) {
        self.tokens = 0;
        self.sides.iter_mut().flatten().for_each(Vec::clear);
    }
}

/// *Adds* the output of attention for the normed `x_nd` to `out_nd`; `rope` has as many positions
/// as there are tokens. If `fresh`, a document begins with the first of them.
pub fn run(
    mixer: &Attention,
    params: &[f32],
    rope: &Table,
    fresh: bool,
    x_nd: &[f32],
    out_nd: &mut [f32],
    cache: &mut KvCache,
) {
    let (n, heads) = (rope.len(), mixer.heads());
    let mut qkv_nr = vec![0.0; n * heads.row()];
    many::linear(n, x_nd, mixer.qkv.w.of(params), &mut qkv_nr, false);
    mixer.qkv.add_bias(params, &mut qkv_nr);
    rope.rotate(&mut qkv_nr, heads.row(), heads.query + heads.kv, n, false);
    if fresh {
        cache.forget();
    }
    let before = cache.tokens;
    cache.reserve(n);
    cache.tokens += n;
    let (group, dim) = (heads.query / heads.kv, heads.dim);
    let context = |(kv, side): (usize, &mut [Vec<f32>; 2])| {
        let at = [heads.query + kv, heads.query + heads.kv + kv].map(|head| head * dim);
        for row in qkv_nr.chunks_exact(heads.row()) {
            side[0].extend_from_slice(&row[at[0]..][..dim]);
            side[1].extend_from_slice(&row[at[1]..][..dim]);
        }
        let queries = Queries { qkv_nr: &qkv_nr, heads, n, before };
        let group = kv * group..(kv + 1) * group;
        match n {
            1 => queries.one(group, side),
            _ => group.map(|head| queries.context(head, side)).collect(),
        }
    };
    // Little memory is read faster by one thread than shared out.
    let contexts: Vec<Vec<f32>> = match cache.tokens * n * dim < 1 << 14 {
        true => cache.sides.iter_mut().enumerate().flat_map(context).collect(),
        false => cache.sides.par_iter_mut().enumerate().flat_map_iter(context).collect(),
    };
    let mut ctx_nd = vec![0.0; n * heads.width()];
    for (token, row) in ctx_nd.chunks_exact_mut(heads.width()).enumerate() {
        for (head, context) in row.chunks_exact_mut(dim).zip(&contexts) {
            head.copy_from_slice(&context[token * dim..][..dim]);
        }
    }
    many::linear(n, &ctx_nd, mixer.o.w.of(params), out_nd, true);
    mixer.o.add_bias(params, out_nd);
}

/// The rows that ask.
struct Queries<'a> {
    qkv_nr: &'a [f32],
    heads: Heads,
    n: usize,
    before: usize,
}

impl Queries<'_> {
    /// A·v of one query head, `[n, dim]`.
    fn context(&self, head: usize, [keys, values]: &[Vec<f32>; 2]) -> Vec<f32> {
        let (n, dim, row) = (self.n, self.heads.dim, self.heads.row());
        let total = self.before + n;
        let (mut scores, mut out) = (vec![0.0; n * total], vec![0.0; n * dim]);
        let queries = Mat::new(&self.qkv_nr[head * dim..], n, dim, row);
        let keys = Mat::new(keys, total, dim, dim);
        gemm(&mut scores, total, 0.0, self.factor(), queries, keys.t());
        vectorised(|| {
            for (i, row) in scores.chunks_exact_mut(total).enumerate() {
                softmax(row, self.before + i + 1);
            }
        });
        let (a, v) = (Mat::new(&scores, n, total, total), Mat::new(values, total, dim, dim));
        gemm(&mut out, dim, 0.0, 1.0, a, v);
        out
    }

    /// The same of one token, for all query heads that share keys and values: these are what has
    /// to be read from memory, so they are read once.
    fn one(&self, group: Range<usize>, [keys, values]: &[Vec<f32>; 2]) -> Vec<Vec<f32>> {
        let (dim, total, factor) = (self.heads.dim, self.before + 1, self.factor());
        let queries = &self.qkv_nr[group.start * dim..group.end * dim];
        let mut scores = vec![0.0; group.len() * total];
        let mut out = vec![vec![0.0; dim]; group.len()];
        vectorised(|| {
            for (at, key) in keys.chunks_exact(dim).enumerate() {
                for (head, query) in queries.chunks_exact(dim).enumerate() {
                    scores[head * total + at] = factor * dot(key, query);
                }
            }
            scores.chunks_exact_mut(total).for_each(|row| softmax(row, total));
            for (at, value) in values.chunks_exact(dim).enumerate() {
                for (head, out) in out.iter_mut().enumerate() {
                    let a = scores[head * total + at];
                    for (out, value) in out.iter_mut().zip(value) {
                        *out += a * value;
                    }
                }
            }
        });
        out
    }

    fn factor(&self) -> f32 {
        1.0 / (self.heads.dim as f32).sqrt()
    }
}

/// Probabilities of the first `seen` scores; the others become 0.
#[inline(always)]
fn softmax(row: &mut [f32], seen: usize) {
    let (seen, later) = row.split_at_mut(seen);
    let largest = max(seen);
    let sum = exp_sum(seen, largest);
    scale(seen, 1.0 / sum);
    later.fill(0.0);
}
