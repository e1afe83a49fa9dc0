//! Between f32 and bf16, and rows by number.

use half::bf16;

use super::reduce::int;
use crate::gpu::launch::{Gpu, Slice};
use crate::launch;

/// `x` → `out`, to nearest.
pub fn to_bf16(gpu: &Gpu, x: Slice<f32>, out: Slice<bf16>) {
    assert_eq!(x.len(), out.len(), "lengths differ");
    launch!(gpu, "cast_to_bf16", grid: [x.len().div_ceil(4096), 1, 1], block: 256, shared: 0; out,
        x, x.len() as i64);
}

/// `x` → `out`.
pub fn to_f32(gpu: &Gpu, x: Slice<bf16>, out: Slice<f32>) {
    assert_eq!(x.len(), out.len(), "lengths differ");
    launch!(gpu, "cast_to_f32", grid: [x.len().div_ceil(4096), 1, 1], block: 256, shared: 0; out,
        x, x.len() as i64);
}

/// Row `i` of `out` is row `index_n[i]` of `x`, `d` columns of both; the pairs are a matrix and the
/// elements from one of its rows to the next. The caller answers for the numbers.
pub fn gather_rows(
    gpu: &Gpu,
    d: usize,
    (x, x_stride): (Slice<bf16>, usize),
    index_n: Slice<u32>,
    (out, out_stride): (Slice<bf16>, usize),
) {
    let n = index_n.len();
    let whole = [d, x_stride, out_stride].iter().all(|size| size.is_multiple_of(8));
    assert!(whole && x_stride >= d && out_stride >= d, "rows are not of whole vectors");
    assert!(out.len() + out_stride >= n * out_stride + d, "shapes differ");
    int(n * d / 8);
    launch!(gpu, "gather_rows", grid: [(n * d / 8).div_ceil(256), 1, 1], block: 256, shared: 0;
        out, x, index_n, int(n), int(d), int(out_stride), int(x_stride));
}
