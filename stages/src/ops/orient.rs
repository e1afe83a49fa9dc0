//! The loss of phase 1: the distance of the mixer's matrix to the teacher's attention, in tiles.
//!
//! ```text
//! loss = mean over (sequence, head) of sqrt(Σ (M − A)² + 1e-12)
//! M[l,s] = (C_l·B_s) Π a over (s, l] + D [l = s],   A = softmax(Q Kᵀ / √dim), causal
//! ```
//!
//! A is exact: it is formed again from rotated Q and K and the log-sum-exp of each row. Memory is
//! tile × seq, never seq × seq. One pass serves loss and gradients: they are linear in 1/norm, so
//! they are formed from M − A and scaled once the norm is known. Source of the formulas: MOHAWK
//! (2408.10189) stage 1; `dlog a` from row and column sums of dM∘M, which are C·dC and B·dB.

use crate::ops::gemm::{Mat, gemm};
use crate::ops::ssd;
use crate::ops::vector::{LANES, dot, exp, fold, vectorised};

/// Rows of a tile.
const TILE: usize = 32;
/// Below this a product of decays counts as zero (no denormals).
const TINY: f32 = 1e-30;

/// The teacher's attention of the tokens at hand.
#[derive(Clone, Copy)]
pub enum Teacher<'a> {
    /// What A is made of.
    Qk {
        /// Rotated queries: rows of `heads · dim`, `q_stride` apart.
        q: &'a [f32],
        /// Distance between rows of `q`.
        q_stride: usize,
        /// Rotated keys: rows of `kv_heads · dim`, `k_stride` apart.
        k: &'a [f32],
        /// Distance between rows of `k`.
        k_stride: usize,
        /// Log-sum-exp of the scaled scores, `[batch, heads, seq]`.
        lse_bhl: &'a [f32],
        /// Key heads; query head `h` uses `h / (heads / kv_heads)`.
        kv_heads: usize,
        /// Width of a query or key.
        dim: usize,
    },
    /// A itself: lower triangles by rows, `[batch, heads, seq · (seq + 1) / 2]`.
    Packed(&'a [f32]),
}

impl Teacher<'_> {
    /// A of one sequence and head, `[seq, seq]`. For looking at, and for starts.
    pub fn matrix(
        &self,
        shape: ssd::Shape,
        starts_n: &[u32],
        (sequence, head): (usize, usize),
    ) -> Vec<f32> {
        let (seq, mut scratch) = (shape.seq, Scratch::new(shape.seq));
        let starts_l = &starts_n[sequence * seq..][..seq];
        let mut out = vec![0.0; seq * seq];
        for first in (0..seq).step_by(TILE) {
            let tile = Tile::new(starts_l, first);
            attention(shape, (sequence, head), tile, *self, &mut scratch);
            for i in 0..tile.rows {
                let (l, window) = tile.row(i);
                let window = window.start..window.end + 1;
                let row = &scratch.target[i * tile.keys..][window.clone()];
                out[l * seq + tile.key..][window].copy_from_slice(row);
            }
        }
        out
    }
}

/// The student's side.
#[derive(Clone, Copy)]
pub struct Student<'a> {
    /// Rows `x | B | C` after the convolution (x is not read).
    pub xbc: &'a [f32],
    /// Decays, `[heads, tokens]`, 0 where documents start.
    pub a_hn: &'a [f32],
    /// Skip of each head.
    pub d_h: &'a [f32],
}

/// Where gradients go.
pub struct Gradient<'a> {
    /// 1 / (sequences · heads) of the whole batch.
    pub weight: f32,
    /// Columns of B and C are overwritten, those of x left alone.
    pub d_xbc: &'a mut [f32],
    /// Gradient of the logarithms of the decays, overwritten.
    pub d_log_a_hn: &'a mut [f32],
    /// Gradient of the skips, added to.
    pub d_d_h: &'a mut [f32],
}

/// Sums over sequences and heads.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sums {
    /// Σ ‖M − A‖: divide by their number for the loss.
    pub distance: f64,
    /// Σ ‖A‖: what M = 0 would score.
    pub attention: f64,
}

/// Room for one tile.
#[derive(Clone, Debug)]
pub struct Scratch {
    target: Vec<f32>,
    mix: Vec<f32>,
    decay: Vec<f32>,
}

impl Scratch {
    /// Room for sequences of `seq`.
    pub fn new(seq: usize) -> Scratch {
        let tile = TILE.min(seq) * seq;
        Scratch { target: vec![0.0; tile], mix: vec![0.0; tile], decay: vec![0.0; seq] }
    }
}

/// A tile: rows `first..first + rows` of one sequence and head, against the keys any of them sees.
#[derive(Clone, Copy)]
struct Tile<'a> {
    starts_l: &'a [u32],
    first: usize,
    rows: usize,
    key: usize,
    keys: usize,
}

impl<'a> Tile<'a> {
    fn new(starts_l: &'a [u32], first: usize) -> Tile<'a> {
        let rows = TILE.min(starts_l.len() - first);
        let key = starts_l[first] as usize;
        Tile { starts_l, first, rows, key, keys: first + rows - key }
    }

    /// Row `i`: its position, and its window within the tile's keys without the diagonal.
    fn row(&self, i: usize) -> (usize, std::ops::Range<usize>) {
        let l = self.first + i;
        (l, self.starts_l[l] as usize - self.key..l - self.key)
    }
}

#[derive(Clone, Copy, Default)]
struct Squares {
    distance: f64,
    attention: f64,
    trace: f64,
}

/// The loss's sums and, if wanted, its gradients. `starts_n` as in [`crate::ops`].
pub fn loss(
    shape: ssd::Shape,
    starts_n: &[u32],
    teacher: Teacher,
    student: Student,
    mut gradient: Option<Gradient>,
    scratch: &mut Scratch,
) -> Sums {
    let mut sums = Sums::default();
    for sequence in 0..shape.batch {
        let starts_l = &starts_n[sequence * shape.seq..][..shape.seq];
        for head in 0..shape.heads {
            let at = (sequence, head);
            let mut all = Squares::default();
            if let Some(gradient) = &mut gradient {
                zero_keys(shape, at, gradient.d_xbc);
            }
            for first in (0..shape.seq).step_by(TILE) {
                let tile = Tile::new(starts_l, first);
                attention(shape, at, tile, teacher, scratch);
                let part = compare(shape, at, tile, student, scratch);
                all.distance += part.distance;
                all.attention += part.attention;
                all.trace += part.trace;
                if let Some(gradient) = &mut gradient {
                    spread(shape, at, tile, student, scratch, gradient.d_xbc);
                }
            }
            let norm = (all.distance + 1e-12).sqrt();
            sums.distance += norm;
            sums.attention += all.attention.sqrt();
            if let Some(gradient) = &mut gradient {
                let scale = f64::from(gradient.weight) / norm;
                gradient.d_d_h[head] += (all.trace * scale) as f32;
                finish(shape, at, student, scale as f32, gradient);
            }
        }
    }
    sums
}

/// Fills the tile of A, row by row, within each row's window.
fn attention(
    shape: ssd::Shape,
    (sequence, head): (usize, usize),
    tile: Tile,
    teacher: Teacher,
    scratch: &mut Scratch,
) {
    let (token, keys) = (sequence * shape.seq, tile.keys);
    let rows = scratch.target[..tile.rows * keys].chunks_exact_mut(keys).enumerate();
    match teacher {
        Teacher::Qk { q, q_stride, k, k_stride, lse_bhl, kv_heads, dim } => {
            let kv = head / (shape.heads / kv_heads);
            let q = &q[(token + tile.first) * q_stride + head * dim..];
            let k = &k[(token + tile.key) * k_stride + kv * dim..];
            let (q, k) = (Mat::new(q, tile.rows, dim, q_stride), Mat::new(k, keys, dim, k_stride));
            gemm(&mut scratch.target, keys, 0.0, 1.0 / (dim as f32).sqrt(), q, k.t());
            let lse_l = &lse_bhl[(sequence * shape.heads + head) * shape.seq..][..shape.seq];
            vectorised(|| {
                let rows = scratch.target[..tile.rows * keys].chunks_exact_mut(keys).enumerate();
                for (i, row) in rows {
                    let (l, window) = tile.row(i);
                    // Whole vectors: what lies beyond the diagonal is never read.
                    let end = (window.end + 1).next_multiple_of(LANES).min(keys);
                    for value in &mut row[window.start..end] {
                        *value = exp(*value - lse_l[l]);
                    }
                }
            });
        }
        Teacher::Packed(matrices) => {
            let size = shape.seq * (shape.seq + 1) / 2;
            let matrix = &matrices[(sequence * shape.heads + head) * size..][..size];
            for (i, row) in rows {
                let (l, window) = tile.row(i);
                let from = l * (l + 1) / 2 + tile.key;
                let window = window.start..window.end + 1;
                row[window.clone()]
                    .copy_from_slice(&matrix[from + window.start..from + window.end]);
            }
        }
    }
}

/// Forms M in the tile, sums squares of M − A, and leaves (M − A)∘L in `scratch.mix`.
fn compare(
    shape: ssd::Shape,
    (sequence, head): (usize, usize),
    tile: Tile,
    student: Student,
    scratch: &mut Scratch,
) -> Squares {
    let (token, keys, row) = (sequence * shape.seq, tile.keys, shape.row());
    let c = &student.xbc[(token + tile.first) * row + shape.c_at(head)..];
    let b = &student.xbc[(token + tile.key) * row + shape.b_at(head)..];
    let (c, b) = (Mat::new(c, tile.rows, shape.state, row), Mat::new(b, keys, shape.state, row));
    gemm(&mut scratch.mix, keys, 0.0, 1.0, c, b.t());
    let a_l = &student.a_hn[head * shape.tokens() + token..][..shape.seq];
    vectorised(|| {
        let mut all = Squares::default();
        let mixes = scratch.mix[..tile.rows * keys].chunks_exact_mut(keys);
        for (i, (mix, target)) in mixes.zip(scratch.target.chunks_exact(keys)).enumerate() {
            let (l, window) = tile.row(i);
            let decay = &mut scratch.decay[tile.key..][window.clone()];
            let (distance, attention) =
                compare_row(&mut mix[window.clone()], &target[window.clone()], decay, a_l[l]);
            scratch.decay[l] = 1.0;
            mix[..window.start].fill(0.0);
            mix[window.end + 1..].fill(0.0);
            let (m, a) = (&mut mix[window.end], target[window.end]);
            *m += student.d_h[head] - a;
            all.trace += f64::from(*m);
            all.distance += f64::from(distance) + f64::from(*m * *m);
            all.attention += f64::from(attention) + f64::from(a * a);
        }
        all
    })
}

/// One row left of the diagonal: `mix` C·B → (M − A)∘L; gives Σ(M − A)² and ΣA².
#[inline(always)]
fn compare_row(mix: &mut [f32], target: &[f32], decay: &mut [f32], a: f32) -> (f32, f32) {
    let (mut distance, mut attention) = ([0.0f32; LANES], [0.0f32; LANES]);
    let n = mix.len();
    let mut at = 0;
    while at + LANES <= n {
        let (m, d) = (&mut mix[at..at + LANES], &mut decay[at..at + LANES]);
        let t = &target[at..at + LANES];
        for i in 0..LANES {
            one(&mut m[i], t[i], &mut d[i], a, &mut distance[i], &mut attention[i]);
        }
        at += LANES;
    }
    for i in at..n {
        let lane = i - at;
        one(&mut mix[i], target[i], &mut decay[i], a, &mut distance[lane], &mut attention[lane]);
    }
    (fold(distance), fold(attention))
}

#[inline(always)]
fn one(
    mix: &mut f32,
    target: f32,
    decay: &mut f32,
    a: f32,
    distance: &mut f32,
    attention: &mut f32,
) {
    let next = *decay * a;
    let next = if next < TINY { 0.0 } else { next };
    let error = *mix * next - target;
    *decay = next;
    *mix = error * next;
    *distance += error * error;
    *attention += target * target;
}

/// Adds the tile's share of dB and writes its rows of dC, both still without 1/norm.
fn spread(
    shape: ssd::Shape,
    (sequence, head): (usize, usize),
    tile: Tile,
    student: Student,
    scratch: &Scratch,
    d_xbc: &mut [f32],
) {
    let (token, keys, row) = (sequence * shape.seq, tile.keys, shape.row());
    let c_at = (token + tile.first) * row + shape.c_at(head);
    let b_at = (token + tile.key) * row + shape.b_at(head);
    let mix = Mat::new(&scratch.mix, tile.rows, keys, keys);
    let b = Mat::new(&student.xbc[b_at..], keys, shape.state, row);
    gemm(&mut d_xbc[c_at..], row, 0.0, 1.0, mix, b);
    let c = Mat::new(&student.xbc[c_at..], tile.rows, shape.state, row);
    gemm(&mut d_xbc[b_at..], row, 1.0, 1.0, mix.t(), c);
}

fn zero_keys(shape: ssd::Shape, (sequence, head): (usize, usize), d_xbc: &mut [f32]) {
    for token in sequence * shape.seq..(sequence + 1) * shape.seq {
        d_xbc[token * shape.row() + shape.b_at(head)..][..shape.state].fill(0.0);
    }
}

/// Scales dB and dC of one sequence and head, and forms the gradient of its decays.
fn finish(
    shape: ssd::Shape,
    (sequence, head): (usize, usize),
    student: Student,
    scale: f32,
    gradient: &mut Gradient,
) {
    vectorised(|| {
        let mut sum = 0.0f64;
        for token in (sequence * shape.seq..(sequence + 1) * shape.seq).rev() {
            let mut products = [0.0; 2];
            for (product, column) in products.iter_mut().zip([shape.c_at(head), shape.b_at(head)]) {
                let at = token * shape.row() + column;
                let d = &mut gradient.d_xbc[at..][..shape.state];
                d.iter_mut().for_each(|d| *d *= scale);
                *product = dot(d, &student.xbc[at..][..shape.state]);
            }
            sum += f64::from(products[0]) - f64::from(products[1]);
            let at = head * shape.tokens() + token;
            if student.a_hn[at] == 0.0 {
                sum = 0.0;
            }
            gradient.d_log_a_hn[at] = sum as f32;
        }
    });
}

#[cfg(test)]
mod tests;
