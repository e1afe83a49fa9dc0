//! The next token of every row of logits; see `kernels/sample.cu` and `generate/sample.rs`.

use half::bf16;

use crate::gpu::launch::{Gpu, Slice};
use crate::launch;

/// What a row of logits gives that says nothing: that has NaN or +∞, or -∞ only.
pub const NOTHING: u32 = u32::MAX;

/// How to choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Divides the logits; 0 takes the most likely token (of equals the first).
    pub temperature: f32,
    /// Draw from the so many most likely tokens; 0: from all.
    pub top_k: usize,
}

fn check((b, v): (usize, usize), logits: usize, bias: Option<Slice<f32>>, u: usize, ids: usize) {
    assert!(v > 0 && v.is_multiple_of(8) && v <= 1 << 18, "a row is a multiple of 8 logits");
    assert!(logits >= b * v && bias.is_none_or(|bias| bias.len() >= v), "too small");
    assert!(u >= b && ids >= b, "too small");
}

/// `ids_b` `[b]` from `logits` `[b, v]` (and the head's bias, `[v]`) and uniform numbers `u_b` from
/// `[0, 1)`.
pub fn rows(
    gpu: &Gpu,
    (b, v): (usize, usize),
    (logits, bias): (Slice<bf16>, Option<Slice<f32>>),
    choice: Choice,
    u_b: Slice<f32>,
    ids_b: Slice<u32>,
) {
    check((b, v), logits.len(), bias, u_b.len(), ids_b.len());
    launch!(gpu, "sample_rows", grid: [b, 1, 1], block: 1024, shared: 0;
        logits, bias, u_b, ids_b, v as i32, choice.temperature, choice.top_k.min(v) as i32);
}

/// The same of f32 logits.
pub fn rows_f32(
    gpu: &Gpu,
    (b, v): (usize, usize),
    (logits, bias): (Slice<f32>, Option<Slice<f32>>),
    choice: Choice,
    u_b: Slice<f32>,
    ids_b: Slice<u32>,
) {
    check((b, v), logits.len(), bias, u_b.len(), ids_b.len());
    launch!(gpu, "sample_rows_f32", grid: [b, 1, 1], block: 1024, shared: 0;
        logits, bias, u_b, ids_b, v as i32, choice.temperature, choice.top_k.min(v) as i32);
}
