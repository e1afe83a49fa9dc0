//! The recurrence of Discrete Mamba-2 in three forms: matrix, chunked scan with gradients, step.
//!
//! ```text
//! S_t = a_t S_{t-1} + B_t x_tᵀ,   y_t = C_tᵀ S_t                 (S is state × width, S_{-1} = 0)
//! y = M x,   M[l,s] = (C_l·B_s) Π_{k in (s,l]} a_k   for s ≤ l
//! ```
//!
//! Decays come as `a = sigmoid(−A_log)` itself, 0 at the first token of a document: that forgets
//! the state and masks the matrix alike. Products of decays are formed one factor at a time, never
//! as a difference of cumulative sums, so they are exact to rounding for any decay. The skip
//! `D x` is the gate's (see [`crate::ops::gate`]). Sources: Dao and Gu, "Transformers are SSMs"
//! (2405.21060), section 6, for the chunks; `dlog a` by the row and column sums of dM∘M.

use crate::ops::gemm::{Mat, gemm};
use crate::ops::vector::{dot, vectorised};

/// Below this a product of decays counts as zero; keeps denormals, slow on most machines, out.
const TINY: f32 = 1e-30;

/// Sizes of a scan. A row of `xbc` is `x [heads·width] | B [heads·state] | C [heads·state]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// Positions of each.
    pub seq: usize,
    /// Heads.
    pub heads: usize,
    /// Width P of a head.
    pub width: usize,
    /// State size N of a head.
    pub state: usize,
    /// Positions that are worked on as one matrix; any length, `seq` need not be a multiple.
    pub chunk: usize,
}

impl Shape {
    /// Tokens in all.
    pub fn tokens(self) -> usize {
        self.batch * self.seq
    }

    /// Width of all heads.
    pub fn inner(self) -> usize {
        self.heads * self.width
    }

    /// Length of a row of `xbc`.
    pub fn row(self) -> usize {
        self.inner() + 2 * self.heads * self.state
    }

    /// Column of B of `head` in `xbc`.
    pub fn b_at(self, head: usize) -> usize {
        self.inner() + head * self.state
    }

    /// Column of C of `head` in `xbc`.
    pub fn c_at(self, head: usize) -> usize {
        self.inner() + (self.heads + head) * self.state
    }

    /// Chunks of a sequence, the last one maybe shorter.
    pub fn chunks(self) -> usize {
        self.seq.div_ceil(self.chunk)
    }

    /// Length of the states that [`forward`] saves: `[batch, heads, chunks + 1, state, width]`,
    /// entry `c` entering chunk `c`, the last one leaving the sequence.
    pub fn states(self) -> usize {
        self.batch * self.heads * (self.chunks() + 1) * self.state * self.width
    }
}

/// Room for the work on one chunk.
#[derive(Clone, Debug)]
pub struct Scratch {
    mix: Vec<f32>,
    decay: Vec<f32>,
    grad: Vec<f32>,
    rows: Vec<f32>,
    first: Vec<f32>,
    carry: [Vec<f32>; 2],
}

impl Scratch {
    /// Room for scans of `shape`.
    pub fn new(shape: Shape) -> Scratch {
        let (q, state) = (shape.chunk.min(shape.seq), shape.state * shape.width);
        Scratch {
            mix: vec![0.0; q * q],
            decay: vec![0.0; q * q],
            grad: vec![0.0; q * q],
            rows: vec![0.0; q * shape.state.max(shape.width)],
            first: vec![0.0; q],
            carry: [vec![0.0; state], vec![0.0; state]],
        }
    }
}

/// One chunk of one head: where it starts and how long it is.
#[derive(Clone, Copy)]
struct Chunk {
    shape: Shape,
    head: usize,
    token: usize,
    len: usize,
}

impl Chunk {
    fn x<'a>(&self, rows: &'a [f32]) -> Mat<'a> {
        self.at(rows, self.head * self.shape.width, self.shape.width)
    }

    fn b<'a>(&self, rows: &'a [f32]) -> Mat<'a> {
        self.at(rows, self.shape.b_at(self.head), self.shape.state)
    }

    fn c<'a>(&self, rows: &'a [f32]) -> Mat<'a> {
        self.at(rows, self.shape.c_at(self.head), self.shape.state)
    }

    fn at<'a>(&self, rows: &'a [f32], column: usize, cols: usize) -> Mat<'a> {
        let row = self.shape.row();
        Mat::new(&rows[self.token * row + column..], self.len, cols, row)
    }

    /// The head's columns of a `[tokens, inner]` buffer.
    fn y<'a>(&self, y: &'a [f32]) -> Mat<'a> {
        Mat::new(&y[self.y_at()..], self.len, self.shape.width, self.shape.inner())
    }

    fn y_at(&self) -> usize {
        self.token * self.shape.inner() + self.head * self.shape.width
    }

    fn decays<'a>(&self, a_hn: &'a [f32]) -> &'a [f32] {
        &a_hn[self.head * self.shape.tokens() + self.token..][..self.len]
    }
}

/// `y_nd` (overwritten, without the skip) from `xbc` and the decays `a_hn` `[heads, tokens]`; saves
/// `states` for the gradient. The states entering the sequences are read from `states` (entry 0 of
/// each sequence and head): zero them for a fresh start.
pub fn forward(
    shape: Shape,
    xbc: &[f32],
    a_hn: &[f32],
    y_nd: &mut [f32],
    states: &mut [f32],
    scratch: &mut Scratch,
) {
    let size = shape.state * shape.width;
    for (sequence, head) in heads(shape) {
        let first = (sequence * shape.heads + head) * (shape.chunks() + 1);
        for (i, chunk) in chunks(shape, sequence, head).enumerate() {
            let (before, after) =
                states[(first + i) * size..(first + i + 2) * size].split_at_mut(size);
            let q = chunk.len;
            let (x, b, c) = (chunk.x(xbc), chunk.b(xbc), chunk.c(xbc));
            gemm(&mut scratch.mix, q, 0.0, 1.0, c, b.t());
            vectorised(|| decay_rows(chunk.decays(a_hn), &mut scratch.decay, &mut scratch.first));
            vectorised(|| multiply(&mut scratch.mix[..q * q], &scratch.decay[..q * q]));
            let y = &mut y_nd[chunk.y_at()..];
            gemm(y, shape.inner(), 0.0, 1.0, Mat::new(&scratch.mix, q, q, q), x);
            let zero = before.iter().all(|s| *s == 0.0);
            if !zero {
                scale_rows(
                    &mut scratch.rows,
                    xbc,
                    &chunk,
                    shape.c_at(head),
                    shape.state,
                    &scratch.first,
                );
                let rows = Mat::new(&scratch.rows, q, shape.state, shape.state);
                gemm(
                    y,
                    shape.inner(),
                    1.0,
                    1.0,
                    rows,
                    Mat::new(before, shape.state, shape.width, shape.width),
                );
            }
            let last = &scratch.decay[(q - 1) * q..q * q];
            scale_rows(&mut scratch.rows, xbc, &chunk, head * shape.width, shape.width, last);
            let rows = Mat::new(&scratch.rows, q, shape.width, shape.width);
            gemm(after, shape.width, 0.0, 1.0, b.t(), rows);
            let kept = scratch.first[q - 1];
            if !zero && kept != 0.0 {
                after.iter_mut().zip(before.iter()).for_each(|(to, from)| *to += kept * from);
            }
        }
    }
}

/// Everything that [`backward`] reads.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// What [`forward`] was given.
    pub xbc: &'a [f32],
    /// What [`forward`] was given.
    pub a_hn: &'a [f32],
    /// What [`forward`] made.
    pub y_nd: &'a [f32],
    /// What [`forward`] made, from fresh starts (entering states of zero).
    pub states: &'a [f32],
}

/// Gradients of `xbc` and of the *logarithms* of the decays, both overwritten, from `dy_nd`. Those
/// of decays that are 0 by a document's start are 0.
pub fn backward(
    shape: Shape,
    dy_nd: &[f32],
    saved: Saved,
    d_xbc: &mut [f32],
    d_log_a_hn: &mut [f32],
    scratch: &mut Scratch,
) {
    let size = shape.state * shape.width;
    for (sequence, head) in heads(shape) {
        let first = (sequence * shape.heads + head) * (shape.chunks() + 1);
        let [mut leaving, mut entering] = std::mem::take(&mut scratch.carry);
        leaving.fill(0.0);
        for (i, chunk) in chunks(shape, sequence, head).enumerate().rev() {
            let state = &saved.states[(first + i) * size..][..size];
            let d_leaving = (i + 1 < shape.chunks()).then_some(&leaving[..]);
            let ends = Ends { state: (i > 0).then_some(state), d_leaving };
            chunk_backward(&chunk, dy_nd, saved, ends, &mut entering, d_xbc, scratch);
            std::mem::swap(&mut leaving, &mut entering);
        }
        scratch.carry = [leaving, entering];
    }
    vectorised(|| log_decays(shape, dy_nd, saved, d_xbc, d_log_a_hn));
}

/// What crosses the borders of a chunk; `None` is zero.
#[derive(Clone, Copy)]
struct Ends<'a> {
    state: Option<&'a [f32]>,
    d_leaving: Option<&'a [f32]>,
}

fn chunk_backward(
    chunk: &Chunk,
    dy_nd: &[f32],
    saved: Saved,
    ends: Ends,
    d_entering: &mut [f32],
    d_xbc: &mut [f32],
    scratch: &mut Scratch,
) {
    let Chunk { shape, head, token, len: q } = *chunk;
    let (width, state, row) = (shape.width, shape.state, shape.row());
    let Scratch { mix, decay, grad, rows, first, .. } = scratch;
    let (x, b, c, dy) =
        (chunk.x(saved.xbc), chunk.b(saved.xbc), chunk.c(saved.xbc), chunk.y(dy_nd));
    gemm(mix, q, 0.0, 1.0, c, b.t());
    gemm(grad, q, 0.0, 1.0, dy, x.t());
    vectorised(|| {
        decay_rows(chunk.decays(saved.a_hn), decay, first);
        multiply(&mut mix[..q * q], &decay[..q * q]);
        multiply(&mut grad[..q * q], &decay[..q * q]);
    });
    let at = |column: usize| token * row + column;
    let (x_at, b_at, c_at) = (at(head * width), at(shape.b_at(head)), at(shape.c_at(head)));
    let d_mix = Mat::new(grad, q, q, q);
    gemm(&mut d_xbc[x_at..], row, 0.0, 1.0, Mat::new(mix, q, q, q).t(), dy);
    gemm(&mut d_xbc[b_at..], row, 0.0, 1.0, d_mix.t(), c);
    gemm(&mut d_xbc[c_at..], row, 0.0, 1.0, d_mix, b);
    if let Some(d_leaving) = ends.d_leaving {
        let d_leaving = Mat::new(d_leaving, state, width, width);
        let last = &decay[(q - 1) * q..q * q];
        scale_rows(rows, saved.xbc, chunk, shape.b_at(head), state, last);
        gemm(&mut d_xbc[x_at..], row, 1.0, 1.0, Mat::new(rows, q, state, state), d_leaving);
        scale_rows(rows, saved.xbc, chunk, head * width, width, last);
        gemm(&mut d_xbc[b_at..], row, 1.0, 1.0, Mat::new(rows, q, width, width), d_leaving.t());
    }
    let Some(entering) = ends.state else { return };
    for (l, to) in rows.chunks_exact_mut(width).take(q).enumerate() {
        let from = &dy_nd[chunk.y_at() + l * shape.inner()..][..width];
        to.iter_mut().zip(from).for_each(|(to, from)| *to = first[l] * from);
    }
    let scaled = Mat::new(rows, q, width, width);
    gemm(&mut d_xbc[c_at..], row, 1.0, 1.0, scaled, Mat::new(entering, state, width, width).t());
    gemm(d_entering, width, 0.0, 1.0, c.t(), scaled);
    if let Some(d_leaving) = ends.d_leaving {
        let kept = first[q - 1];
        d_entering.iter_mut().zip(d_leaving).for_each(|(to, from)| *to += kept * from);
    }
}

/// dlog a_k = Σ_{j≥k} (dy_j·y_j − x_j·dx_j) within the document: rows less columns of dM∘M, of
/// which those before k and those after it meet in k.
#[inline(always)]
fn log_decays(shape: Shape, dy_nd: &[f32], saved: Saved, d_xbc: &[f32], d_log_a_hn: &mut [f32]) {
    for (sequence, head) in heads(shape) {
        let mut sum = 0.0f64;
        for token in (sequence * shape.seq..(sequence + 1) * shape.seq).rev() {
            let y_at = token * shape.inner() + head * shape.width;
            let x_at = token * shape.row() + head * shape.width;
            let y = dot(&dy_nd[y_at..][..shape.width], &saved.y_nd[y_at..][..shape.width]);
            let x = dot(&d_xbc[x_at..][..shape.width], &saved.xbc[x_at..][..shape.width]);
            sum += f64::from(y) - f64::from(x);
            let at = head * shape.tokens() + token;
            if saved.a_hn[at] == 0.0 {
                sum = 0.0;
            }
            d_log_a_hn[at] = sum as f32;
        }
    }
}

/// The `[seq, seq]` matrix of one head and sequence, without the skip: what the scan multiplies
/// `x` by. For looking at and for tests; training never forms it whole.
pub fn matrix(
    shape: Shape,
    (sequence, head): (usize, usize),
    xbc: &[f32],
    a_hn: &[f32],
    out: &mut [f32],
) {
    let (token, t) = (sequence * shape.seq, shape.seq);
    let whole = Chunk { shape, head, token, len: t };
    let (mut decay, mut first) = (vec![0.0; t * t], vec![0.0; t]);
    decay_rows(whole.decays(a_hn), &mut decay, &mut first);
    gemm(out, t, 0.0, 1.0, whole.c(xbc), whole.b(xbc).t());
    multiply(&mut out[..t * t], &decay);
}

/// One token: `state` `[heads, state, width]` is moved on, `y` `[inner]` overwritten (without the
/// skip), from a row of `xbc` and the token's decays.
#[inline(always)]
pub fn step(shape: Shape, xbc_row: &[f32], a_h: &[f32], state: &mut [f32], y: &mut [f32]) {
    for head in 0..shape.heads {
        let x = &xbc_row[head * shape.width..][..shape.width];
        let b = &xbc_row[shape.b_at(head)..][..shape.state];
        let c = &xbc_row[shape.c_at(head)..][..shape.state];
        let y = &mut y[head * shape.width..][..shape.width];
        y.fill(0.0);
        let size = shape.state * shape.width;
        let rows = state[head * size..][..size].chunks_exact_mut(shape.width);
        for ((s, b), c) in rows.zip(b).zip(c) {
            for ((s, x), y) in s.iter_mut().zip(x).zip(y.iter_mut()) {
                *s = a_h[head] * *s + b * x;
                *y += c * *s;
            }
        }
    }
}

/// Moves a row of products of decays on by one token: multiplies what is there by `a`, flushing
/// what is too small to matter.
#[inline(always)]
pub fn decay_by(row: &mut [f32], a: f32) {
    for value in row {
        let next = *value * a;
        *value = if next < TINY { 0.0 } else { next };
    }
}

/// `decay[l, s]` = Π a over (s, l], 1 on the diagonal, 0 above; `first[l]` = Π a over [0, l].
#[inline(always)]
fn decay_rows(a: &[f32], decay: &mut [f32], first: &mut [f32]) {
    let q = a.len();
    let mut from_start = [1.0];
    for l in 0..q {
        let (done, row) = decay.split_at_mut(l * q);
        let row = &mut row[..q];
        if l > 0 {
            row[..l].copy_from_slice(&done[(l - 1) * q..][..l]);
            decay_by(&mut row[..l], a[l]);
        }
        row[l] = 1.0;
        row[l + 1..].fill(0.0);
        decay_by(&mut from_start, a[l]);
        first[l] = from_start[0];
    }
}

#[inline(always)]
fn multiply(to: &mut [f32], by: &[f32]) {
    to.iter_mut().zip(by).for_each(|(to, by)| *to *= by);
}

/// `out[l] = by[l] · xbc[token + l, column..column + cols]`.
fn scale_rows(out: &mut [f32], xbc: &[f32], chunk: &Chunk, column: usize, cols: usize, by: &[f32]) {
    let row = chunk.shape.row();
    for (l, to) in out.chunks_exact_mut(cols).take(chunk.len).enumerate() {
        let from = &xbc[(chunk.token + l) * row + column..][..cols];
        to.iter_mut().zip(from).for_each(|(to, from)| *to = by[l] * from);
    }
}

fn heads(shape: Shape) -> impl Iterator<Item = (usize, usize)> {
    (0..shape.batch).flat_map(move |sequence| (0..shape.heads).map(move |head| (sequence, head)))
}

fn chunks(
    shape: Shape,
    sequence: usize,
    head: usize,
) -> impl DoubleEndedIterator<Item = Chunk> + ExactSizeIterator {
    (0..shape.chunks()).map(move |i| Chunk {
        shape,
        head,
        token: sequence * shape.seq + i * shape.chunk,
        len: shape.chunk.min(shape.seq - i * shape.chunk),
    })
}

#[cfg(test)]
mod tests;
