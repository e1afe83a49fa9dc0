//! RMSNorm and LayerNorm on the device; twin of [`crate::ops::norm`] and [`crate::ops::layer_norm`].

use half::bf16;

use super::reduce::{MULTIPROCESSORS, int, reduce_rows};
use crate::gpu::launch::{Gpu, Slice};
use crate::launch;

/// Kernels over rows come in these sizes: warps a row, and vectors of eight a thread.
const SIZES: [(usize, usize); 6] = [(1, 3), (2, 2), (4, 2), (8, 2), (16, 2), (16, 4)];

/// How a kernel over rows of some width is launched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    /// Which of the kernel's sizes.
    pub size: usize,
    vectors: usize,
    /// Threads of a block.
    pub threads: usize,
    /// Rows that a block works on at once.
    pub groups: usize,
}

impl Rows {
    /// For rows of `d` elements.
    pub fn new(d: usize) -> Rows {
        assert!(d > 0 && d.is_multiple_of(8), "a width of {d} is no multiple of 8");
        let found = SIZES.iter().position(|(warps, vectors)| d <= 256 * warps * vectors);
        let size = found.unwrap_or_else(|| panic!("kernels take rows up to 16384, not {d}"));
        let (warps, vectors) = SIZES[size];
        let threads = 256.max(32 * warps);
        Rows { size, vectors, threads, groups: threads / (32 * warps) }
    }

    /// Blocks for `n` rows if `resident` threads fit on a multiprocessor.
    pub fn blocks(self, n: usize, resident: usize) -> usize {
        n.div_ceil(self.groups).min(MULTIPROCESSORS * resident / self.threads)
    }

    /// Threads that fit on a multiprocessor, as the kernels are compiled.
    pub fn resident(self) -> usize {
        [1024, 768, 512][self.vectors - 2]
    }
}

/// `sized!("name")[rows.size]`: the names of a kernel over rows.
macro_rules! sized {
    ($name:literal) => {
        [
            concat!($name, "_1w3v"),
            concat!($name, "_2w2v"),
            concat!($name, "_4w2v"),
            concat!($name, "_8w2v"),
            concat!($name, "_16w2v"),
            concat!($name, "_16w4v"),
        ]
    };
}
pub(super) use sized;

/// A norm's parameters, f32 `[d]`.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// The factor of every dimension.
    pub w: Slice<f32>,
    /// What LayerNorm adds; without it this is RMSNorm.
    pub b: Option<Slice<f32>>,
    /// Added to the mean square.
    pub eps: f32,
}

/// What the way back needs of every row, f32 `[n]`.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// 1/√(mean square + eps).
    pub inv_n: Slice<f32>,
    /// The mean; LayerNorm only.
    pub mean_n: Option<Slice<f32>>,
}

/// `x_nd` → `y_nd`, bf16 `[n, d]`; `dims` is (n, d).
pub fn forward(
    gpu: &Gpu,
    dims: (usize, usize),
    norm: Norm,
    x_nd: Slice<bf16>,
    y_nd: Slice<bf16>,
    saved: Option<Saved>,
) {
    let (n, d) = check(dims, norm, saved);
    assert!(x_nd.len() >= n * d && y_nd.len() >= n * d, "shapes differ");
    let rows = Rows::new(d);
    let (inv_n, mean_n) = (saved.map(|s| s.inv_n), saved.and_then(|s| s.mean_n));
    let grid = |resident| [rows.blocks(n, resident), 1, 1];
    let (w, eps) = (norm.w, norm.eps);
    match norm.b {
        None => launch!(gpu, sized!("rms_forward")[rows.size], grid: grid(rows.resident()),
            block: rows.threads, shared: 0; y_nd, inv_n, x_nd, w, int(n), int(d), eps),
        Some(b) => launch!(gpu, sized!("layer_forward")[rows.size], grid: grid(rows.resident()),
            block: rows.threads, shared: 0; y_nd, mean_n, inv_n, x_nd, w, b, int(n), int(d), eps),
    }
}

/// Gradients of a norm's output and input, bf16 `[n, d]`.
#[derive(Clone, Copy, Debug)]
pub struct Gradients {
    /// Of the output.
    pub d_y_nd: Slice<bf16>,
    /// Added to it: what a second reader of the output gives back.
    pub d_y2_nd: Option<Slice<bf16>>,
    /// What the input gets besides, added to `d_x_nd`.
    pub d_residual_nd: Option<Slice<bf16>>,
    /// Of the input, overwritten; may be the same as `d_residual_nd`.
    pub d_x_nd: Slice<bf16>,
}

/// Gradients of a norm's parameters, added to.
#[derive(Clone, Copy, Debug)]
pub struct Sums {
    /// Scratch of [`partials`] elements.
    pub partials: Slice<f32>,
    /// Of the factors.
    pub d_w: Slice<f32>,
    /// Of what LayerNorm adds.
    pub d_b: Option<Slice<f32>>,
}

/// Elements of scratch that [`backward`] needs for the gradients of the parameters.
pub fn partials((n, d): (usize, usize), layer: bool) -> usize {
    backward_blocks(n, d) * d * if layer { 2 } else { 1 }
}

fn backward_blocks(n: usize, d: usize) -> usize {
    Rows::new(d).blocks(n, 512)
}

/// From `d_y_nd` to `d_x_nd` and, with `sums`, to the parameters.
pub fn backward(
    gpu: &Gpu,
    dims: (usize, usize),
    norm: Norm,
    x_nd: Slice<bf16>,
    saved: Saved,
    gradients: Gradients,
    sums: Option<Sums>,
) {
    let (n, d) = check(dims, norm, Some(saved));
    let Gradients { d_y_nd, d_y2_nd, d_residual_nd, d_x_nd } = gradients;
    let all = [Some(x_nd), Some(d_y_nd), Some(d_x_nd), d_y2_nd, d_residual_nd];
    assert!(all.iter().flatten().all(|slice| slice.len() >= n * d), "shapes differ");
    let (rows, blocks) = (Rows::new(d), backward_blocks(n, d));
    let fetched = rows.vectors < 4 && d_residual_nd.is_some();
    let streams = 2 + usize::from(d_y2_nd.is_some()) + usize::from(fetched);
    let shared = rows.threads * 32 * rows.vectors * streams;
    let part = sums.map(|sums| {
        assert!(sums.d_w.len() == d && sums.d_b.is_none_or(|d_b| d_b.len() == d), "shapes differ");
        assert_eq!(sums.d_b.is_some(), norm.b.is_some(), "the norms are of two kinds");
        assert!(sums.partials.len() >= partials((n, d), norm.b.is_some()), "too little scratch");
        sums.partials
    });
    let (w, inv_n) = (norm.w, saved.inv_n);
    match saved.mean_n {
        Some(mean_n) if norm.b.is_some() => {
            launch!(gpu, sized!("layer_backward")[rows.size], grid: [blocks, 1, 1],
                block: rows.threads, shared: shared; d_x_nd, d_residual_nd, d_y_nd, d_y2_nd, x_nd,
                mean_n, inv_n, w, part, int(n), int(d));
        }
        _ => launch!(gpu, sized!("rms_backward")[rows.size], grid: [blocks, 1, 1],
            block: rows.threads, shared: shared; d_x_nd, d_residual_nd, d_y_nd, d_y2_nd, x_nd,
            inv_n, w, part, int(n), int(d)),
    }
    if let Some(Sums { partials, d_w, d_b }) = sums {
        reduce_rows(gpu, blocks, partials, (d_w, d_b), 1.0, true);
    }
}

fn check((n, d): (usize, usize), norm: Norm, saved: Option<Saved>) -> (usize, usize) {
    assert!(norm.w.len() == d && norm.b.is_none_or(|b| b.len() == d), "shapes differ");
    if let Some(Saved { inv_n, mean_n }) = saved {
        assert_eq!(mean_n.is_some(), norm.b.is_some(), "LayerNorm has means, RMSNorm has none");
        assert!(inv_n.len() >= n && mean_n.is_none_or(|m| m.len() >= n), "shapes differ");
    }
    (n, d)
}
