//! Cross-entropy against a teacher's most likely tokens; see `kernels/top_k.cu` and
//! [`crate::ops::top_k`].

use half::{bf16, f16};

use super::cross_entropy::Rows;
use crate::gpu::launch::{Gpu, Slice};
use crate::launch;

/// What the teacher expects of every row.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// Tokens a row, at most 512.
    pub k: usize,
    /// Their ids, all below the vocabulary and different in a row: `[rows, k]`.
    pub ids_nk: Slice<u32>,
    /// Their log-probabilities.
    pub log_p_nk: Slice<f16>,
    /// Probability of all others together: `[rows]`.
    pub tail_n: Slice<f32>,
}

/// `out_n` `[rows]` gets the loss; `logits_nv` becomes `weight` times the gradient. Rows where
/// `scored_n` is 0 count nothing.
pub fn soft(
    gpu: &Gpu,
    at: Rows,
    (logits_nv, bias): (Slice<bf16>, Option<Slice<f32>>),
    expected: Expected,
    scored_n: Option<Slice<u8>>,
    out_n: Slice<f32>,
) {
    at.check(logits_nv, bias);
    let Rows { rows, v, weight, factor, learn } = at;
    let Expected { k, ids_nk, log_p_nk, tail_n } = expected;
    assert!(0 < k && k <= 512 && k <= v, "k is from 1 to 512");
    assert!(ids_nk.len() >= rows * k && log_p_nk.len() >= rows * k, "too few targets");
    assert!(tail_n.len() >= rows && out_n.len() >= rows, "too small");
    assert!(scored_n.is_none_or(|s| s.len() >= rows), "too small");
    let name = match at.slots() {
        2 => "top_k_soft_n2",
        4 => "top_k_soft_n4",
        8 => "top_k_soft_n8",
        12 => "top_k_soft_n12",
        _ => "top_k_soft_n13",
    };
    launch!(gpu, name, grid: at.grid(), block: 512, shared: at.slots() * (8 << 10);
        logits_nv, ids_nk, log_p_nk, tail_n, bias, scored_n, weight, factor, out_n,
        rows as i32, v as i32, k as i32, i32::from(learn));
}
