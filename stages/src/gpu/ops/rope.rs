//! Rotary positions in place: see `kernels/rope.cu` and, on the CPU, [`crate::ops::rope`].

use half::bf16;

use crate::gpu::launch::{Gpu, Slice};
use crate::launch;

/// Angles on the device: cosines and sines, `[positions, rotary / 2]`.
#[derive(Clone, Copy)]
pub struct Table {
    /// Cosines.
    pub cos: Slice<f32>,
    /// Sines.
    pub sin: Slice<f32>,
    /// Width of a head.
    pub dim: usize,
    /// Width of the part that turns.
    pub rotary: usize,
}

/// Where rows are.
#[derive(Clone, Copy)]
pub struct Positions {
    /// Row `i` is at `i mod seq`,
    pub seq: usize,
    /// plus this,
    pub first: usize,
    /// plus what its sequence `i / seq` has had before: `before.0[i / seq · before.1]`. The device
    /// reads it; the table must be long enough.
    pub before: Option<(Slice<i32>, usize)>,
}

/// Turns the first `heads` heads of `n` rows (`stride` apart), or turns a gradient back when `back`.
pub fn rope(
    gpu: &Gpu,
    (qkv_nr, stride): (Slice<bf16>, usize),
    n: usize,
    heads: usize,
    table: Table,
    positions: Positions,
    back: bool,
) {
    let Table { cos, sin, dim, rotary } = table;
    let Positions { seq, first, before } = positions;
    let half = rotary / 2;
    if n == 0 || heads == 0 || half == 0 {
        return;
    }
    assert!(rotary.is_multiple_of(2) && rotary <= dim, "{rotary} of {dim} elements cannot turn");
    assert!(
        dim.is_multiple_of(8) && stride.is_multiple_of(8) && qkv_nr.address().is_multiple_of(16)
    );
    assert!(
        heads * dim <= stride && (n - 1) * stride + heads * dim <= qkv_nr.len(),
        "rows too short"
    );
    assert!(cos.len() == sin.len() && cos.len() >= (first + seq.min(n)) * half, "table too short");
    if let Some((before, step)) = before {
        assert!(before.len() > (n - 1) / seq * step);
    }
    let (before, step) = before.map_or((None, 0), |(before, step)| (Some(before), step));
    let units = n * heads * if half.is_multiple_of(8) { half / 8 } else { half };
    let sign = if back { -1.0f32 } else { 1.0 };
    launch!(gpu, "rope", grid: [units.div_ceil(256).min(1 << 24), 1, 1], block: 256, shared: 0;
        qkv_nr, n as i32, stride as i32, heads as i32, dim as i32, rotary as i32, cos, sin,
        seq as i32, first as i32, sign, before, step as i32);
}
