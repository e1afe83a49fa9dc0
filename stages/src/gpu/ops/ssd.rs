//! The scan of Discrete Mamba-2 with skip and gate: see `kernels/ssd_forward.cu`,
//! `kernels/ssd_backward.cu` and, on the CPU, [`crate::ops::ssd`] and [`crate::ops::gate`].

use half::bf16;

use super::reduce::{MULTIPROCESSORS, int};
use crate::gpu::launch::{Gpu, Slice};
use crate::launch;
use crate::ops::Dims;

/// Positions of a chunk.
const CHUNK: usize = 64;

/// Sizes of a scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// Positions of each.
    pub seq: usize,
    /// Heads.
    pub heads: usize,
    /// Width P of a head: 32, 64 or 128.
    pub width: usize,
    /// State size N of a head: 16, 32, 64 or 128.
    pub state: usize,
    /// Distance between rows of the projection.
    pub proj_stride: usize,
    /// Distance between rows of A_log.
    pub a_stride: usize,
}

impl Shape {
    fn tokens(self) -> usize {
        self.batch * self.seq
    }

    fn inner(self) -> usize {
        self.heads * self.width
    }

    fn channels(self) -> usize {
        self.inner() + 2 * self.heads * self.state
    }

    fn states(self) -> usize {
        states(Dims { batch: self.batch, seq: self.seq }, self.heads, self.width, self.state)
    }
}

/// Elements of the states that enter chunks.
pub fn states(dims: Dims, heads: usize, width: usize, state: usize) -> usize {
    dims.batch * heads * dims.seq.div_ceil(CHUNK) * width * state
}

/// What both directions read.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// Rows x | B | C after the convolution, `[n, channels]`.
    pub xbc_nc: Slice<bf16>,
    /// Rows of the projection, z at column `channels`.
    pub proj_nr: Slice<bf16>,
    /// `[n, a_stride]`.
    pub a_log_nh: Slice<f32>,
    /// `[heads]`.
    pub d_h: Slice<f32>,
    /// `[inner]`.
    pub z_bias: Slice<f32>,
    /// `[n]`.
    pub starts_n: Slice<u32>,
}

/// What [`forward`] writes.
#[derive(Clone, Copy, Debug)]
pub struct Out {
    /// `[n, inner]`.
    pub gated_nd: Slice<bf16>,
    /// Scan and skip before the gate, `[n, inner]`.
    pub y_nd: Option<Slice<bf16>>,
    /// The states that enter chunks: [`states`] elements.
    pub states: Option<Slice<bf16>>,
    /// The state after the last token, `[batch, heads, width, state]`.
    pub last_state: Option<Slice<f32>>,
}

/// What [`backward`] needs of [`forward`].
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// As [`Out::y_nd`].
    pub y_nd: Slice<bf16>,
    /// As [`Out::states`].
    pub states: Slice<bf16>,
}

/// What [`backward`] writes.
#[derive(Clone, Copy, Debug)]
pub struct Grads {
    /// `[n, channels]`.
    pub d_xbc_nc: Slice<bf16>,
    /// Rows of the projection: columns from z on (those of A_log and of the filling too).
    pub d_proj_nr: Slice<bf16>,
    /// Sums over each sequence for z_bias, `[batch, inner]`.
    pub d_z_bias_parts: Slice<f32>,
    /// The same for D, `[batch, heads]`.
    pub d_d_parts: Slice<f32>,
}

fn check(shape: Shape, inputs: Inputs) {
    let n = shape.tokens();
    let Shape { heads, proj_stride, a_stride, .. } = shape;
    let rows = |len: usize, stride: usize, width: usize| {
        stride >= width && len + stride >= n * stride + width
    };
    assert!(n > 0 && heads > 0 && a_stride >= heads, "shapes differ");
    assert!(proj_stride.is_multiple_of(8), "rows are not of whole vectors");
    assert!(inputs.xbc_nc.len() >= n * shape.channels(), "shapes differ");
    let wide = shape.channels() + shape.inner();
    assert!(rows(inputs.proj_nr.len(), proj_stride, wide), "rows are too short");
    assert!(rows(inputs.a_log_nh.len(), a_stride, heads), "rows are too short");
    assert!(inputs.d_h.len() >= heads && inputs.z_bias.len() >= shape.inner(), "shapes differ");
    assert!(inputs.starts_n.len() >= n, "a start for every token");
    let aligned = [inputs.xbc_nc.address(), inputs.proj_nr.address(), inputs.z_bias.address()];
    assert!(aligned.iter().all(|at| at.is_multiple_of(16)), "rows are not aligned");
}

macro_rules! kernel {
    ($way:literal, ($width:expr, $state:expr): $($p:literal $n:literal),*) => {
        match ($width, $state) {
            $(($p, $n) => concat!("ssd_", $way, "_p", $p, "_n", $n),)*
            (width, state) => panic!("no scan for heads of {width} with a state of {state}"),
        }
    };
}

/// Columns of a head that a block has: fewer where there would be too few blocks.
fn tile(shape: Shape) -> usize {
    let blocks = shape.batch * shape.heads * (shape.width / 64);
    if blocks < MULTIPROCESSORS { 32 } else { 64 }
}

/// `out` from fresh starts.
pub fn forward(gpu: &Gpu, shape: Shape, inputs: Inputs, out: Out) {
    check(shape, inputs);
    let Shape { batch, seq, heads, width, state, proj_stride, a_stride } = shape;
    assert!([32, 64, 128].contains(&width), "no scan for heads of {width}");
    let size = shape.tokens() * shape.inner();
    assert!(out.gated_nd.len() >= size, "shapes differ");
    assert!(out.y_nd.is_none_or(|y_nd| y_nd.len() >= size), "shapes differ");
    assert!(out.states.is_none_or(|states| states.len() >= shape.states()), "shapes differ");
    let last = batch * heads * width * state;
    assert!(out.last_state.is_none_or(|state| state.len() >= last), "shapes differ");
    let p = tile(shape);
    let name = kernel!("forward", (p, state):
        32 16, 32 32, 32 64, 32 128, 64 16, 64 32, 64 64, 64 128);
    let shared = 256 * (p + 2 * state) + 4 * p * state + 2048 + 4 * p;
    let Inputs { xbc_nc, proj_nr, a_log_nh, d_h, z_bias, starts_n } = inputs;
    launch!(gpu, name, grid: [heads, batch, width / p], block: 128, shared: shared;
        xbc_nc, proj_nr, a_log_nh, d_h, z_bias, starts_n, out.gated_nd, out.y_nd, out.states,
        out.last_state, int(heads), int(width), int(seq), int(proj_stride), int(a_stride));
}

/// `grads` (overwritten) from `d_gated_nd`, `[n, inner]`.
pub fn backward(
    gpu: &Gpu,
    shape: Shape,
    d_gated_nd: Slice<bf16>,
    inputs: Inputs,
    saved: Saved,
    grads: Grads,
) {
    check(shape, inputs);
    let Shape { batch, seq, heads, width, state, proj_stride, a_stride } = shape;
    let (n, inner) = (shape.tokens(), shape.inner());
    assert!(d_gated_nd.len() >= n * inner && saved.y_nd.len() >= n * inner, "shapes differ");
    assert!(saved.states.len() >= shape.states(), "shapes differ");
    assert!(grads.d_xbc_nc.len() >= n * shape.channels(), "shapes differ");
    assert!(proj_stride >= shape.channels() + inner + heads, "rows are too short");
    assert!(grads.d_proj_nr.len() >= n * proj_stride, "shapes differ");
    assert!(grads.d_z_bias_parts.len() >= batch * inner, "too little room");
    assert!(grads.d_d_parts.len() >= batch * heads, "too little room");
    let name = kernel!("backward", (width, state): 32 16, 32 32, 32 64, 32 128, 64 16, 64 32,
        64 64, 64 128, 128 16, 128 32, 128 64, 128 128);
    // Where a head is large, twice the warps share its columns.
    let h = if state >= 64 && width * state >= 8192 { 2 } else { 1 };
    let tiles = 512 * state + 4 * width * state + 128 * width * (1 + h);
    let shared = tiles + 8192 * h + 1024 + 512 * (2 * h + 1) + 32 * h;
    let Inputs { xbc_nc, proj_nr, a_log_nh, d_h, z_bias, starts_n } = inputs;
    let Grads { d_xbc_nc, d_proj_nr, d_z_bias_parts, d_d_parts } = grads;
    launch!(gpu, name, grid: [heads, batch, 1], block: 128 * h, shared: shared;
        d_gated_nd, saved.y_nd, xbc_nc, proj_nr, a_log_nh, saved.states, d_h, z_bias, starts_n,
        d_xbc_nc, d_proj_nr, d_z_bias_parts, d_d_parts, int(heads), int(seq), int(proj_stride),
        int(a_stride));
}
