//! Forward and backward of every op, by hand, over plain slices. Knows no parameters by name, no
//! files, no threads.
//!
//! # Calling convention
//!
//! ```text
//! fn forward(dims: Dims, inputs: &[f32]…, out: &mut [f32], saved: &mut …)
//! fn backward(dims: Dims, d_out: &[f32], inputs and saved: &[f32]…, d_input: &mut [f32], d_weight: &mut [f32])
//! ```
//!
//! - Single-threaded and free of allocation: the caller owns every buffer, made once before the
//!   first step. Parallelism is one level up: the batch is cut into a fixed number of shards, each
//!   with its own activations and gradients, and gradients are added in shard order. So the bits
//!   do not depend on the number of threads.
//! - An input gradient (`d_x`) is *overwritten* unless its doc says that it is added to. A weight
//!   gradient (`d_w`) is always *added to*: the caller zeroes gradients once an update.
//! - Weights are `[out, in]` row-major as published files have them: `y = x · Wᵀ`.
//! - Sums run in a fixed order (fixed lanes, then a fixed tree), whatever the instruction set.
//! - Names of buffers end in shape letters: `b` batch (of the shard), `l` position, `n` = b·l
//!   tokens, `d` model width, `h` head, `p` head width, `s` state, `f` feed-forward width, `v`
//!   vocabulary. `x_nd` is `[tokens, d_model]`, row-major.
//! - Document starts: `starts_n[i]` is the position (within its sequence) of the first token of
//!   the document that token `i` belongs to. Token `i` sees positions `starts_n[i]..=i` only;
//!   all zero means that the whole window is one document.

pub mod attention;
pub mod conv;
pub mod cross_entropy;
pub mod distance;
pub mod embed;
pub mod gate;
pub mod gelu;
pub mod gemm;
#[cfg(target_arch = "x86_64")]
mod gemm_avx512;
pub mod layer_norm;
pub mod many;
pub mod mlp;
pub mod norm;
pub mod orient;
pub mod rope;
pub mod ssd;
pub mod top_k;
pub mod vector;

/// Batch and length of one shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Sequences in the shard.
    pub batch: usize,
    /// Positions of each.
    pub seq: usize,
}

impl Dims {
    /// Tokens in the shard.
    pub fn tokens(self) -> usize {
        self.batch * self.seq
    }
}
