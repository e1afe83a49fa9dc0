//! Activations of the MLP and sums of activations; twin of [`crate::ops::mlp`] and
//! [`crate::ops::gelu`]. `dims` is (n, f); gradients may take the place of what they come from.

use half::bf16;

use super::reduce::int;
use crate::gpu::launch::{Gpu, Slice};
use crate::launch;

/// Blocks for `elements`, of 256 threads of two vectors of eight.
fn blocks(elements: usize) -> [usize; 3] {
    assert!(elements.is_multiple_of(8), "rows are not of whole vectors");
    int(elements / 8);
    [(elements / 8).div_ceil(512), 1, 1]
}

fn check(
    (n, f): (usize, usize),
    buffers: &[(Option<Slice<bf16>>, usize)],
    bias: Option<Slice<f32>>,
) {
    assert!(f.is_multiple_of(8), "rows are not of whole vectors");
    let fits = |(slice, times): &(Option<Slice<bf16>>, usize)| {
        slice.is_none_or(|slice| slice.len() >= times * n * f)
    };
    assert!(buffers.iter().all(fits) && bias.is_none_or(|bias| bias.len() == f), "shapes differ");
}

/// `gate_up` `[n, 2f]` (a row: gate, then up) → `h_nf`.
pub fn swiglu_forward(gpu: &Gpu, dims: (usize, usize), gate_up: Slice<bf16>, h_nf: Slice<bf16>) {
    let (n, f) = dims;
    check(dims, &[(Some(gate_up), 2), (Some(h_nf), 1)], None);
    launch!(gpu, "swiglu_forward", grid: blocks(n * f), block: 256, shared: 0; h_nf, gate_up,
        int(n), int(f));
}

/// `d_h_nf` → `d_gate_up`; with `h_nf`, the activation is written once more.
pub fn swiglu_backward(
    gpu: &Gpu,
    dims: (usize, usize),
    d_h_nf: Slice<bf16>,
    gate_up: Slice<bf16>,
    d_gate_up: Slice<bf16>,
    h_nf: Option<Slice<bf16>>,
) {
    let (n, f) = dims;
    let buffers = [(Some(d_h_nf), 1), (Some(gate_up), 2), (Some(d_gate_up), 2), (h_nf, 1)];
    check(dims, &buffers, None);
    launch!(gpu, "swiglu_backward", grid: blocks(n * f), block: 256, shared: 0; d_gate_up, h_nf,
        d_h_nf, gate_up, int(n), int(f));
}

/// `pre_nf` (+ `bias_f`) → `h_nf`.
pub fn gelu_forward(
    gpu: &Gpu,
    dims: (usize, usize),
    pre_nf: Slice<bf16>,
    bias_f: Option<Slice<f32>>,
    h_nf: Slice<bf16>,
) {
    let (n, f) = dims;
    check(dims, &[(Some(pre_nf), 1), (Some(h_nf), 1)], bias_f);
    launch!(gpu, "gelu_forward", grid: blocks(n * f), block: 256, shared: 0; h_nf, pre_nf, bias_f,
        int(n), int(f));
}

/// `d_h_nf` → `d_pre_nf`; with `h_nf`, the activation is written once more.
pub fn gelu_backward(
    gpu: &Gpu,
    dims: (usize, usize),
    d_h_nf: Slice<bf16>,
    (pre_nf, bias_f): (Slice<bf16>, Option<Slice<f32>>),
    d_pre_nf: Slice<bf16>,
    h_nf: Option<Slice<bf16>>,
) {
    let (n, f) = dims;
    let buffers = [(Some(d_h_nf), 1), (Some(pre_nf), 1), (Some(d_pre_nf), 1), (h_nf, 1)];
    check(dims, &buffers, bias_f);
    launch!(gpu, "gelu_backward", grid: blocks(n * f), block: 256, shared: 0; d_pre_nf, h_nf,
        d_h_nf, pre_nf, bias_f, int(n), int(f));
}

/// `x_nf += bias_f`, every row.
pub fn add_bias(gpu: &Gpu, dims: (usize, usize), x_nf: Slice<bf16>, bias_f: Slice<f32>) {
    let (n, f) = dims;
    check(dims, &[(Some(x_nf), 1)], Some(bias_f));
    launch!(gpu, "add_bias", grid: blocks(n * f), block: 256, shared: 0; x_nf, bias_f, int(n),
        int(f));
}

/// `out = a + b`; `out` may be either.
pub fn add(gpu: &Gpu, a: Slice<bf16>, b: Slice<bf16>, out: Slice<bf16>) {
    assert!(a.len() == out.len() && b.len() == out.len(), "shapes differ");
    launch!(gpu, "add_bf16", grid: blocks(out.len()), block: 256, shared: 0; out, a, b,
        int(out.len() / 8));
}
