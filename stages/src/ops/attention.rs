//! Causal softmax attention with grouped key/value heads, over rotated q and k. Keeps the
//! probabilities A and the log-sum-exp of every row: the way back and phase 1 need them.
//!
//! Query rows go in tiles, each against the keys it can see, so about a third of the square is
//! never computed. Knows no projections.

use std::ops::Range;

use super::Dims;
use super::gemm::{Mat, gemm};
use super::vector::{dot, exp_sum, max, scale, vectorised};

/// Query rows of a tile.
const TILE: usize = 64;

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads; query head `h` uses `h / (query / kv)`.
    pub kv: usize,
    /// Width of a head.
    pub dim: usize,
}

impl Heads {
    /// Width of a row of `qkv`: all query heads, then key heads, then value heads.
    pub fn row(self) -> usize {
        (self.query + 2 * self.kv) * self.dim
    }

    /// Width of a row of the context.
    pub fn width(self) -> usize {
        self.query * self.dim
    }

    fn offsets(self, head: usize) -> (usize, usize, usize) {
        let kv = head / (self.query / self.kv);
        let (k, v) = (self.query + kv, self.query + self.kv + kv);
        (head * self.dim, k * self.dim, v * self.dim)
    }

    fn scale(self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

/// What [`forward`] leaves: every buffer is overwritten whole.
pub struct Out<'a> {
    /// A, `[batch, head, seq, seq]`; zero wherever a row cannot look. Where it has only
    /// [`scratch_len`] elements, each tile takes the place of the one before.
    pub probs_bhll: &'a mut [f32],
    /// Log of the sum of the exponentials of the scaled scores, `[batch, head, seq]`.
    pub lse_bhl: &'a mut [f32],
    /// A·v, `[tokens, query heads · dim]`.
    pub ctx_nd: &'a mut [f32],
}

/// One tile: query rows and the keys that any of them sees, all within a sequence.
struct Tile<'a> {
    rows: Range<usize>,
    keys: Range<usize>,
    starts: &'a [u32],
}

fn tiles(starts_l: &[u32]) -> impl Iterator<Item = Tile<'_>> {
    let seq = starts_l.len();
    (0..seq).step_by(TILE).map(move |first| {
        let last = seq.min(first + TILE);
        Tile {
            rows: first..last,
            keys: starts_l[first] as usize..last,
            starts: &starts_l[first..last],
        }
    })
}

/// `qkv_nr` (rows of [`Heads::row`], q and k already rotated) → A, log-sum-exp and context.
pub fn forward(dims: Dims, heads: Heads, starts_n: &[u32], qkv_nr: &[f32], out: Out) {
    let (seq, row, width) = (dims.seq, heads.row(), heads.width());
    assert_eq!(qkv_nr.len(), dims.tokens() * row, "shapes differ");
    let Out { probs_bhll, lse_bhl, ctx_nd } = out;
    let kept = probs_bhll.len() == dims.batch * heads.query * seq * seq;
    each_tile(dims, heads, starts_n, |b, h, at, tile| {
        let first = if kept { (at * seq + tile.rows.start) * seq } else { 0 };
        let probs = &mut probs_bhll[first..][..tile.rows.len() * seq];
        let lse = &mut lse_bhl[at * seq..][..seq];
        let qkv = &qkv_nr[b * seq * row..][..seq * row];
        probabilities(heads, h, &tile, qkv, row, probs, lse);
        let (q, _, v) = heads.offsets(h);
        let Tile { rows, keys, .. } = tile;
        let a = Mat::new(&probs[keys.start..], rows.len(), keys.len(), seq);
        let vs = Mat::new(&qkv[keys.start * row + v..], keys.len(), heads.dim, row);
        gemm(&mut ctx_nd[(b * seq + rows.start) * width + q..], width, 0.0, 1.0, a, vs);
    });
}

/// A and log-sum-exp alone, bit for bit those of [`forward`], from rows of rotated query heads
/// and key heads that are `row` apart.
pub fn matrices(
    dims: Dims,
    heads: Heads,
    starts_n: &[u32],
    (qk_nr, row): (&[f32], usize),
    probs_bhll: &mut [f32],
    lse_bhl: &mut [f32],
) {
    let seq = dims.seq;
    assert!(row >= (heads.query + heads.kv) * heads.dim, "rows are too short for q and k");
    assert_eq!(qk_nr.len(), dims.tokens() * row, "shapes differ");
    each_tile(dims, heads, starts_n, |b, h, at, tile| {
        let first = (at * seq + tile.rows.start) * seq;
        let probs = &mut probs_bhll[first..][..tile.rows.len() * seq];
        let lse = &mut lse_bhl[at * seq..][..seq];
        probabilities(heads, h, &tile, &qk_nr[b * seq * row..][..seq * row], row, probs, lse);
    });
}

/// Calls `work` with sequence, head, their joint number, and tile.
fn each_tile(
    dims: Dims,
    heads: Heads,
    starts_n: &[u32],
    mut work: impl FnMut(usize, usize, usize, Tile),
) {
    for b in 0..dims.batch {
        for h in 0..heads.query {
            for tile in tiles(&starts_n[b * dims.seq..][..dims.seq]) {
                work(b, h, b * heads.query + h, tile);
            }
        }
    }
}

/// Rows of A (`probs`, those of the tile) and of the log-sum-exp (all of the sequence) of one tile
/// of head `h` of one sequence.
fn probabilities(
    heads: Heads,
    h: usize,
    tile: &Tile,
    qk: &[f32],
    row: usize,
    probs: &mut [f32],
    lse: &mut [f32],
) {
    let (q, k, _) = heads.offsets(h);
    let Tile { rows, keys, starts } = tile;
    let seq = lse.len();
    let queries = Mat::new(&qk[rows.start * row + q..], rows.len(), heads.dim, row);
    let ks = Mat::new(&qk[keys.start * row + k..], keys.len(), heads.dim, row);
    gemm(&mut probs[keys.start..], seq, 0.0, heads.scale(), queries, ks.t());
    softmax(probs, seq, rows.start, starts, &mut lse[rows.clone()]);
}

/// Rows `first..` of scores → probabilities in place, zero outside each row's window.
fn softmax(tile: &mut [f32], seq: usize, first: usize, starts: &[u32], lse: &mut [f32]) {
    vectorised(|| {
        let rows = tile.chunks_exact_mut(seq).zip(starts).zip(lse).enumerate();
        for (i, ((row, start), lse)) in rows {
            let (before, rest) = row.split_at_mut(*start as usize);
            let (window, after) = rest.split_at_mut(first + i + 1 - *start as usize);
            before.fill(0.0);
            after.fill(0.0);
            let largest = max(window);
            let sum = exp_sum(window, largest);
            scale(window, 1.0 / sum);
            *lse = largest + sum.ln();
        }
    });
}

/// What [`backward`] needs of the forward pass, and room for one tile.
pub struct Back<'a> {
    /// As given to [`forward`].
    pub qkv_nr: &'a [f32],
    /// As [`forward`] left it.
    pub probs_bhll: &'a [f32],
    /// As [`forward`] left it.
    pub ctx_nd: &'a [f32],
    /// Scratch of [`scratch_len`].
    pub scratch: &'a mut [f32],
}

/// Elements of [`Back::scratch`] for sequences of `seq`.
pub fn scratch_len(seq: usize) -> usize {
    TILE.min(seq) * seq
}

/// `d_ctx_nd` → `d_qkv_nr` (overwritten; gradients of rotated q and k).
pub fn backward(
    dims: Dims,
    heads: Heads,
    starts_n: &[u32],
    d_ctx_nd: &[f32],
    back: Back,
    d_qkv_nr: &mut [f32],
) {
    let (seq, row, dim, width) = (dims.seq, heads.row(), heads.dim, heads.width());
    assert_eq!(d_qkv_nr.len(), dims.tokens() * row, "shapes differ");
    d_qkv_nr.fill(0.0);
    each_tile(dims, heads, starts_n, |b, h, at, Tile { rows, keys, .. }| {
        let qkv = &back.qkv_nr[b * seq * row..][..seq * row];
        let d_qkv = &mut d_qkv_nr[b * seq * row..][..seq * row];
        let ctx = &back.ctx_nd[b * seq * width..][..seq * width];
        let d_ctx = &d_ctx_nd[b * seq * width..][..seq * width];
        let probs = &back.probs_bhll[at * seq * seq..][..seq * seq];
        let (q, k, v) = heads.offsets(h);
        let (m, n) = (rows.len(), keys.len());
        let span = rows.start * width..rows.end * width;
        let d_c = Mat::new(&d_ctx[span.start + q..], m, dim, width);
        let a = &probs[rows.start * seq..rows.end * seq];
        let a_mat = Mat::new(&a[keys.start..], m, n, seq);
        gemm(&mut d_qkv[keys.start * row + v..], row, 1.0, 1.0, a_mat.t(), d_c);
        let d_s = &mut back.scratch[..m * n];
        let vs = Mat::new(&qkv[keys.start * row + v..], n, dim, row);
        gemm(d_s, n, 0.0, 1.0, d_c, vs.t());
        let context = (&ctx[span.clone()], &d_ctx[span.clone()]);
        softmax_back(d_s, &a[keys.start..], seq, context, q..q + dim, width);
        let d_s = Mat::new(d_s, m, n, n);
        let ks = Mat::new(&qkv[keys.start * row + k..], n, dim, row);
        gemm(&mut d_qkv[rows.start * row + q..], row, 0.0, heads.scale(), d_s, ks);
        let queries = Mat::new(&qkv[rows.start * row + q..], m, dim, row);
        gemm(&mut d_qkv[keys.start * row + k..], row, 1.0, heads.scale(), d_s.t(), queries);
    });
}

/// `d_s = a · (d_p - Σ a · d_p)`, in place of `d_p`; the sum is that of `ctx · d_ctx` of the head.
fn softmax_back(
    d_s: &mut [f32],
    a: &[f32],
    seq: usize,
    (ctx, d_ctx): (&[f32], &[f32]),
    head: Range<usize>,
    width: usize,
) {
    let n = d_s.len() * width / ctx.len();
    vectorised(|| {
        for (i, d_s) in d_s.chunks_exact_mut(n).enumerate() {
            let at = i * width;
            let (c, d) = (&ctx[at..at + width][head.clone()], &d_ctx[at..at + width][head.clone()]);
            let pull = dot(c, d);
            for (d_s, a) in d_s.iter_mut().zip(&a[i * seq..][..n]) {
                *d_s = a * (*d_s - pull);
            }
        }
    });
}
