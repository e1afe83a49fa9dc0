//! Token embedding; see `kernels/embed.cu` and [`crate::ops::embed`].

use half::bf16;

use crate::gpu::launch::{Gpu, Slice};
use crate::launch;

/// Tokens, width, vocabulary.
pub type Dims = (usize, usize, usize);

/// Tokens of a piece, see the kernel.
const PIECE: usize = 64;

/// `x_nd[i] = w_vd[ids_n[i]]`; NaN for an id that is not below the vocabulary.
pub fn forward(
    gpu: &Gpu,
    (n, d, v): Dims,
    ids_n: Slice<u32>,
    w_vd: Slice<bf16>,
    x_nd: Slice<bf16>,
) {
    assert!(d.is_multiple_of(8) && ids_n.len() >= n, "shapes differ");
    assert!(w_vd.len() >= v * d && x_nd.len() >= n * d, "shapes differ");
    launch!(gpu, "embed_forward", grid: [n.div_ceil(8), 1, 1], block: 256, shared: 0;
        w_vd, ids_n, x_nd, n as i32, d as i32, v as i32);
}

/// Token numbers by id, equal ones rising: what [`backward`] goes by.
pub fn order(ids_n: &[u32]) -> Vec<u32> {
    let mut order_n: Vec<u32> = (0..ids_n.len() as u32).collect();
    order_n.sort_by_key(|token| ids_n[*token as usize]);
    order_n
}

/// Elements of `partial` in [`backward`].
pub fn partial(n: usize, d: usize) -> usize {
    n.div_ceil(PIECE) * 2 * d
}

/// `dw_vd[ids_n[i]] += dx_nd[i]`, with `order_n` of [`order`] and room of [`partial`].
pub fn backward(
    gpu: &Gpu,
    (n, d, v): Dims,
    (ids_n, order_n): (Slice<u32>, Slice<u32>),
    dx_nd: Slice<bf16>,
    partials: Slice<f32>,
    dw_vd: Slice<f32>,
) {
    assert!(d.is_multiple_of(8) && ids_n.len() >= n && order_n.len() >= n, "shapes differ");
    assert!(dx_nd.len() >= n * d && dw_vd.len() >= v * d, "shapes differ");
    assert!(partials.len() >= partial(n, d), "too little room for partial sums");
    let block = (d / 8).next_multiple_of(32).min(256);
    let grid = [n.div_ceil(PIECE), (d / 8).div_ceil(block.max(1)), 1];
    launch!(gpu, "embed_backward", grid: grid, block: block, shared: 0;
        dx_nd, ids_n, order_n, partials, dw_vd, n as i32, d as i32, v as i32);
    launch!(gpu, "embed_backward_join", grid: grid, block: block, shared: 0;
        ids_n, order_n, partials, dw_vd, n as i32, d as i32, v as i32);
}
