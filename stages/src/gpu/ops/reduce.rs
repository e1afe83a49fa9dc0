//! Sums in a fixed order, and plain maps of f32.

use half::bf16;

use crate::gpu::launch::{Gpu, Slice};
use crate::launch;

/// Of an H100. A constant of the code, not of the machine: grids shape the order of sums.
pub(super) const MULTIPROCESSORS: usize = 132;

/// Blocks of [`sum`], at most.
const SUM_BLOCKS: usize = 256;

/// A size as kernels take it.
pub(super) fn int(size: usize) -> i32 {
    i32::try_from(size).unwrap_or_else(|_| panic!("{size} is too large for a kernel"))
}

/// `out = scale · Σ` over `rows` rows of `partials` (`[rows, columns]`), or `out += …` with `add`.
/// The columns are those of the first output, then those of the second.
pub fn reduce_rows(
    gpu: &Gpu,
    rows: usize,
    partials: Slice<f32>,
    (out, out2): (Slice<f32>, Option<Slice<f32>>),
    scale: f32,
    add: bool,
) {
    let columns = out.len() + out2.map_or(0, Slice::len);
    assert!(partials.len() >= rows * columns, "shapes differ");
    launch!(gpu, "reduce_rows", grid: [columns.div_ceil(32), 1, 1], block: 1024, shared: 0; out,
        out2, partials, int(rows), int(columns), int(columns), int(out.len()), scale,
        i32::from(add));
}

/// Blocks along the rows, and rows of each, of [`column_sums`].
fn column_blocks(n: usize, columns: usize) -> (usize, usize) {
    let most = (4 * MULTIPROCESSORS).div_euclid(columns.div_ceil(256).max(1)).max(1);
    let range = n.div_ceil(most).max(64);
    (n.div_ceil(range), range)
}

/// Elements of scratch that [`column_sums`] needs.
pub fn column_partials(n: usize, columns: usize) -> usize {
    column_blocks(n, columns).0 * columns
}

/// `out += Σ` over the `n` rows of `x`, bf16 `[n, stride]`, of its first columns: as many as `out`
/// has. The gradient of a bias.
pub fn column_sums(
    gpu: &Gpu,
    n: usize,
    (x, stride): (Slice<bf16>, usize),
    partials: Slice<f32>,
    out: Slice<f32>,
) {
    let columns = out.len();
    assert!(columns.is_multiple_of(8) && stride.is_multiple_of(8), "rows are not of whole vectors");
    assert!(stride >= columns && x.len() + stride >= n * stride + columns, "shapes differ");
    let (blocks, range) = column_blocks(n, columns);
    assert!(partials.len() >= blocks * columns, "too little scratch");
    launch!(gpu, "column_sums_partial", grid: [columns.div_ceil(256), blocks, 1], block: 256,
        shared: 0; partials, x, int(n), int(columns), int(stride), int(range));
    reduce_rows(gpu, blocks, partials, (out, None), 1.0, true);
}

/// Elements of scratch that [`sum`] needs.
pub const SUM_PARTIALS: usize = SUM_BLOCKS;

/// `out[0] = scale · Σ x`, or `out[0] += …` with `add`; the last pass is in f64.
pub fn sum(gpu: &Gpu, x: Slice<f32>, partials: Slice<f32>, out: Slice<f32>, scale: f32, add: bool) {
    let blocks = x.len().div_ceil(2048).clamp(1, SUM_BLOCKS);
    assert!(partials.len() >= blocks && !out.is_empty(), "too little room");
    launch!(gpu, "sum_partial", grid: [blocks, 1, 1], block: 256, shared: 0; partials, x,
        x.len() as i64);
    launch!(gpu, "sum_final", grid: [1, 1, 1], block: 256, shared: 0; out, partials, int(blocks),
        scale, i32::from(add));
}

/// `x = value`, everywhere.
pub fn fill(gpu: &Gpu, x: Slice<f32>, value: f32) {
    launch!(gpu, "fill_f32", grid: [x.len().div_ceil(1024), 1, 1], block: 256, shared: 0; x,
        x.len() as i64, value);
}

/// `x *= factor`.
pub fn scale(gpu: &Gpu, x: Slice<f32>, factor: f32) {
    launch!(gpu, "scale_f32", grid: [x.len().div_ceil(1024), 1, 1], block: 256, shared: 0; x,
        x.len() as i64, factor);
}
