//! Depthwise causal convolution on the device; twin of [`crate::ops::conv`].

use std::ops::Range;

use half::bf16;

use super::reduce::{MULTIPROCESSORS, int, reduce_rows};
use crate::gpu::launch::{Gpu, Slice};
use crate::launch;
pub use crate::ops::conv::Shape;

/// A factor of the gradients of B and C, one a sequence and head.
#[derive(Clone, Copy, Debug)]
pub struct Factor {
    /// `[batch · heads]`.
    pub factor_bh: Slice<f32>,
    /// Channels of x, which have no factor; B and C follow.
    pub inner: usize,
    /// Heads.
    pub heads: usize,
    /// Channels of B (and of C) a head.
    pub state: usize,
}

/// Gradients of the parameters, added to.
#[derive(Clone, Copy, Debug)]
pub struct Sums {
    /// Scratch of [`partials`] elements.
    pub partials: Slice<f32>,
    /// `[channels, taps]`.
    pub d_w_ck: Slice<f32>,
    /// `[channels]`.
    pub d_bias_c: Slice<f32>,
}

/// `channels` of `xbc_nc` (bf16 `[tokens, shape.channels]`) from the same columns of `proj_nr` (bf16
/// `[tokens, shape.stride]`); `w_ck` and `bias_c` are f32 `[channels, taps]` and `[channels]`.
pub fn forward(
    gpu: &Gpu,
    shape: Shape,
    channels: Range<usize>,
    proj_nr: Slice<bf16>,
    (w_ck, bias_c): (Slice<f32>, Slice<f32>),
    starts_n: Slice<u32>,
    xbc_nc: Slice<bf16>,
) {
    let n = check(shape, &channels, proj_nr, xbc_nc, w_ck, starts_n);
    assert_eq!(bias_c.len(), shape.channels, "shapes differ");
    let name = if shape.taps <= 4 { "conv_forward_4" } else { "conv_forward_8" };
    launch!(gpu, name, grid: [channels.len().div_ceil(256), n.div_ceil(256), 1], block: 256,
        shared: 0; xbc_nc, proj_nr, w_ck, bias_c, starts_n, int(n), int(shape.dims.seq),
        int(shape.channels), int(shape.stride), int(shape.taps), int(channels.start),
        int(channels.end));
}

/// Blocks along the tokens, and tokens of each of a block's four warps, of [`backward`].
fn ranges(shape: Shape, channels: usize) -> (usize, usize) {
    let n = shape.dims.tokens();
    let most = (3 * MULTIPROCESSORS).div_euclid(channels.div_ceil(256).max(1)).max(1);
    let range = n.div_ceil(4 * most).max(16).next_multiple_of(4);
    (n.div_ceil(4 * range), range)
}

/// Elements of scratch that [`backward`] needs for the gradients of the parameters.
pub fn partials(shape: Shape, channels: Range<usize>) -> usize {
    ranges(shape, channels.len()).0 * channels.len() * (shape.taps + 1)
}

/// From `channels` of `d_xbc_nc` to the same columns of `d_proj_nr` (the others are left alone) and,
/// with `sums`, to the parameters of these channels.
#[expect(clippy::too_many_arguments, reason = "a convolution touches this many buffers")]
pub fn backward(
    gpu: &Gpu,
    shape: Shape,
    channels: Range<usize>,
    d_xbc_nc: Slice<bf16>,
    (proj_nr, w_ck, starts_n): (Slice<bf16>, Slice<f32>, Slice<u32>),
    factor: Option<Factor>,
    d_proj_nr: Slice<bf16>,
    sums: Option<Sums>,
) {
    let n = check(shape, &channels, proj_nr, d_xbc_nc, w_ck, starts_n);
    check(shape, &channels, d_proj_nr, d_xbc_nc, w_ck, starts_n);
    let (blocks, range) = ranges(shape, channels.len());
    let part = sums.map(|sums| {
        let needed = partials(shape, channels.clone());
        assert!(sums.partials.len() >= needed, "too little scratch");
        sums.partials
    });
    let (inner, heads, state) = match factor {
        None => (shape.channels, 1, 1),
        Some(Factor { factor_bh, inner, heads, state }) => {
            assert_eq!(inner + 2 * heads * state, shape.channels, "shapes differ");
            assert!(state.is_multiple_of(8) && inner.is_multiple_of(8), "not of whole vectors");
            assert!(factor_bh.len() >= shape.dims.batch * heads, "shapes differ");
            (inner, heads, state)
        }
    };
    let factor_bh = factor.map(|factor| factor.factor_bh);
    let name = if shape.taps <= 4 { "conv_backward_4" } else { "conv_backward_8" };
    launch!(gpu, name, grid: [channels.len().div_ceil(256), blocks, 1], block: 128, shared: 0;
        d_proj_nr, part, d_xbc_nc, proj_nr, w_ck, starts_n, factor_bh, int(n),
        int(shape.dims.seq), int(shape.channels), int(shape.stride), int(shape.taps),
        int(channels.start), int(channels.end), int(inner), int(heads), int(state), int(range));
    if let Some(Sums { partials, d_w_ck, d_bias_c }) = sums {
        let d_w_ck = d_w_ck.range(channels.start * shape.taps..channels.end * shape.taps);
        let out = (d_w_ck, Some(d_bias_c.range(channels)));
        reduce_rows(gpu, blocks, partials, out, 1.0, true);
    }
}

/// Tokens, if all sizes fit.
fn check(
    shape: Shape,
    channels: &Range<usize>,
    proj_nr: Slice<bf16>,
    xbc_nc: Slice<bf16>,
    w_ck: Slice<f32>,
    starts_n: Slice<u32>,
) -> usize {
    let n = shape.dims.tokens();
    let vectors = [channels.start, channels.end, shape.channels, shape.stride];
    assert!(vectors.iter().all(|size| size.is_multiple_of(8)), "rows are not of whole vectors");
    assert!(channels.start <= channels.end && channels.end <= shape.channels, "{channels:?}");
    assert!((1..=8).contains(&shape.taps), "kernels take 1 to 8 taps, not {}", shape.taps);
    assert_eq!(w_ck.len(), shape.channels * shape.taps, "shapes differ");
    assert!(starts_n.len() >= n && xbc_nc.len() >= n * shape.channels, "shapes differ");
    let (rows, used) = (proj_nr.len() + shape.stride, n * shape.stride + shape.channels);
    assert!(shape.stride >= shape.channels && rows >= used, "shapes differ");
    n
}
