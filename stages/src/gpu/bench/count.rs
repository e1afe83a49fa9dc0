//! How much arithmetic a token needs at least, in FLOPs; what an implementation computes twice is
//! counted once, and what only moves bytes (norms, convolution, activations, AdamW) not at all.
//!
//! Of a matrix of N elements, forward is 2N, and so is each of the two gradients. Attention sees
//! half of the positions on average: Q·Kᵀ and A·V are T·width each, and its gradients two and a half times
//! that. The scan in chunks of Q = 64, of width P and state N a head: C·Bᵀ 2QN, with x 2QP, and
//! 4NP for the states; backward twice that. Then
//!
//! ```text
//! teacher         Σ 2(qkv + o + mlp) + attention               teacher-logits   + 2 head
//! orient          teacher + Σ 4(B, C, A_log of in_proj) + 3 T·N·heads     M, dC and dB
//! align           teacher + Σ 4 in_proj + 6 out_proj + 4 mlp + 3 scan     frozen norm and MLP;
//!                 no mlp where it is beside the mixer: it adds the same to both outputs
//! distill         teacher-logits + 3 (Σ 2(in_proj + out_proj + mlp) + scan + 2 head)
//! ```
//!
//! At SmolLM2's sizes distill is 1.28 GFLOP a token.

use super::phases::Phase;
use crate::models::{Config, MlpKind, Wiring};

/// Positions of a chunk of the scan.
const CHUNK: usize = 64;

/// FLOPs a token of `phase` with sequences of `seq`.
pub fn flops(phase: Phase, student: &Config, seq: usize) -> f64 {
    let c = student;
    let (d, inner, layers) = (c.d_model, c.d_inner(), c.layers.len());
    let mlp = d * c.ffn * if c.mlp == MlpKind::Swiglu { 3 } else { 2 };
    let attention = d * (inner + 2 * c.d_kv()) + inner * d;
    let teacher = layers * (2 * (attention + mlp) + 2 * seq * inner);
    let head = 2 * d * c.vocab;
    let matrix = (2 * c.heads * c.d_state + c.heads) * d;
    let into = matrix + 2 * inner * d;
    let out = inner * d;
    let (p, n) = (c.head_dim, c.d_state);
    let scan = c.heads * (2 * CHUNK * (n + p) + 4 * n * p);
    let total = match phase {
        Phase::Teacher => teacher,
        Phase::TeacherLogits => teacher + head,
        Phase::Orient => teacher + layers * (4 * matrix + 3 * seq * n * c.heads),
        Phase::Align => {
            let through = if c.wiring == Wiring::Sequential { 4 * mlp } else { 0 };
            teacher + layers * (4 * into + 6 * out + through + 3 * scan)
        }
        Phase::Distill => {
            let student = layers * (2 * (into + out + mlp) + scan) + head;
            teacher + head + 3 * student
        }
    };
    total as f64
}

/// FLOPs of causal attention over `n` tokens, forward.
pub(super) fn attention(config: &Config, n: usize, seq: usize) -> f64 {
    2.0 * n as f64 * seq as f64 * config.d_inner() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::bench::subject::Subject;

    #[test]
    fn distilling_smollm2_takes_1_28_gflop_a_token() {
        let subject = Subject::named("smollm2").unwrap();
        let found = flops(Phase::Distill, &subject.student(), subject.seq) / 1e9;
        assert!((found - 1.28).abs() < 0.005, "{found}");
    }
}
