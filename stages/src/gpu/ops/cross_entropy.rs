//! Cross-entropy over rows of logits; see `kernels/cross_entropy.cu` and [`crate::ops::cross_entropy`].

use half::bf16;

use crate::gpu::launch::{Gpu, Slice};
use crate::launch;

/// Blocks that run at once: one a multiprocessor of an H100. Any number is right.
const MULTIPROCESSORS: usize = 132;

/// Rows of logits and what becomes of them.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// How many.
    pub rows: usize,
    /// Logits of each: a multiple of 8.
    pub v: usize,
    /// Factor of the gradient,
    pub weight: f32,
    /// and, if given, one more that is on the device: 1 element.
    pub factor: Option<Slice<f32>>,
    /// Whether logits become their gradient; else they stay.
    pub learn: bool,
}

impl Rows {
    /// Checks the sizes of logits and a bias.
    pub(super) fn check(&self, logits: Slice<bf16>, bias: Option<Slice<f32>>) {
        let Rows { rows, v, .. } = *self;
        assert!(v > 0 && v.is_multiple_of(8), "a row of logits is a multiple of 8");
        assert!(logits.len() >= rows * v, "the buffer of logits is too small");
        assert!(bias.is_none_or(|b| b.len() >= v), "the bias is too small");
        assert!(self.factor.is_none_or(|f| !f.is_empty()), "the factor is missing");
    }

    /// Slots of hard targets and top-k: the fewest that hold a row, as part of a kernel's name.
    pub(super) fn slots(&self) -> usize {
        [2, 4, 8, 12].into_iter().find(|n| n * 512 * 8 >= self.v).unwrap_or(13)
    }

    /// Grid of hard targets and top-k: two blocks a multiprocessor.
    pub(super) fn grid(&self) -> [usize; 3] {
        [self.rows.min(2 * MULTIPROCESSORS), 1, 1]
    }
}

/// Soft targets: `out_n` `[rows, 2]` gets cross-entropy and entropy; `s_nv` (of the student) becomes
/// `weight · (q - p)`. Rows where `scored_n` is 0 count nothing. Biases, `[v]`, are added to logits.
/// `labels`: `[rows]` tokens and their share λ, for `weight · (q - (1 - λ) p - λ onehot)` in rows whose
/// token is not [`crate::ops::cross_entropy::IGNORE`]; what `out_n` gets is without them.
pub fn soft(
    gpu: &Gpu,
    at: Rows,
    (s_nv, bias_s): (Slice<bf16>, Option<Slice<f32>>),
    (t_nv, bias_t): (Slice<bf16>, Option<Slice<f32>>),
    scored_n: Option<Slice<u8>>,
    labels: Option<(Slice<u32>, f32)>,
    out_n: Slice<f32>,
) {
    at.check(s_nv, bias_s);
    at.check(t_nv, bias_t);
    let Rows { rows, v, weight, factor, learn } = at;
    assert!(scored_n.is_none_or(|s| s.len() >= rows) && out_n.len() >= 2 * rows, "too small");
    assert!(labels.is_none_or(|(tokens, _)| tokens.len() >= rows), "labels are missing");
    let (labels_n, share) = (labels.map(|(tokens, _)| tokens), labels.map_or(0.0, |(_, s)| s));
    let slots = [1, 2, 4, 6].into_iter().find(|n| n * 1024 * 8 >= v).unwrap_or(7);
    let name = match slots {
        1 => "cross_entropy_soft_n1",
        2 => "cross_entropy_soft_n2",
        4 => "cross_entropy_soft_n4",
        6 => "cross_entropy_soft_n6",
        _ => "cross_entropy_soft_n7",
    };
    let grid = [rows.min(MULTIPROCESSORS), 1, 1];
    launch!(gpu, name, grid: grid, block: 1024, shared: slots * (32 << 10);
        s_nv, t_nv, bias_s, bias_t, scored_n, labels_n, share, weight, factor, out_n,
        rows as i32, v as i32, i32::from(learn));
}

/// Hard targets: `out_n` `[rows]` gets `-ln q[target]`; `logits_nv` becomes `weight · (q - onehot)`.
/// Rows whose target is [`crate::ops::cross_entropy::IGNORE`] count nothing.
pub fn hard(
    gpu: &Gpu,
    at: Rows,
    (logits_nv, bias): (Slice<bf16>, Option<Slice<f32>>),
    targets_n: Slice<u32>,
    out_n: Slice<f32>,
) {
    at.check(logits_nv, bias);
    let Rows { rows, v, weight, factor, learn } = at;
    assert!(targets_n.len() >= rows && out_n.len() >= rows, "too small");
    let name = match at.slots() {
        2 => "cross_entropy_hard_n2",
        4 => "cross_entropy_hard_n4",
        8 => "cross_entropy_hard_n8",
        12 => "cross_entropy_hard_n12",
        _ => "cross_entropy_hard_n13",
    };
    launch!(gpu, name, grid: at.grid(), block: 512, shared: at.slots() * (8 << 10);
        logits_nv, targets_n, bias, weight, factor, out_n,
        rows as i32, v as i32, i32::from(learn));
}
