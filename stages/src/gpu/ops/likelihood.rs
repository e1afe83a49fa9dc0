//! What evaluation asks of rows of logits; see `kernels/likelihood.cu` and `eval/score.rs`.

use half::bf16;

use crate::gpu::launch::{Gpu, Slice};
use crate::launch;

type Logits = (Slice<bf16>, Option<Slice<f32>>);

fn check((logits, bias): Logits, (rows, v): (usize, usize)) {
    assert!(v > 0 && v.is_multiple_of(8), "a row of logits is a multiple of 8");
    assert!(logits.len() >= rows * v && bias.is_none_or(|b| b.len() >= v), "too small");
}

/// `out_n[i] = ln softmax(logits)[target]`, and `first_n[i]` whether no token is likelier (of equals
/// the first is the likeliest); 0 where the target is [`crate::ops::cross_entropy::IGNORE`].
pub fn pick(
    gpu: &Gpu,
    (rows, v): (usize, usize),
    logits: Logits,
    targets_n: Slice<u32>,
    out_n: Slice<f32>,
    first_n: Slice<u8>,
) {
    check(logits, (rows, v));
    assert!(targets_n.len() >= rows && out_n.len() >= rows && first_n.len() >= rows, "too small");
    launch!(gpu, "likelihood_pick", grid: [rows, 1, 1], block: 256, shared: 0;
        logits.0, logits.1, targets_n, out_n, first_n, v as i32);
}

/// `same_n[i]`: whether both find the same token likeliest.
pub fn same(gpu: &Gpu, (rows, v): (usize, usize), a: Logits, b: Logits, same_n: Slice<u8>) {
    check(a, (rows, v));
    check(b, (rows, v));
    assert!(same_n.len() >= rows, "too small");
    launch!(gpu, "likelihood_same", grid: [rows, 1, 1], block: 256, shared: 0;
        a.0, a.1, b.0, b.1, same_n, v as i32);
}
