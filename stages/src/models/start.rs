//! Where a student's mixer begins: the project's start, the paper's, or the teacher's attention.

use anyhow::{Result, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::attention::Attention;
use super::params::Slot;
use super::ssm::Ssm;
use crate::train::philox::Philox;

/// How a mixer that replaces attention begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// Identity convolution, open gate, D = 0, the rest random.
    #[default]
    Default,
    /// The same with D = 1, as the paper's authors start.
    Paper,
    /// x, B, C and the output projection from the teacher's v, k, q and o.
    Attention,
    /// As default, with a gate that is random and has no bias, as in Mamba-2 itself.
    RandomGate,
    /// As default, with decays that differ widely between tokens: A_log has four times its weights,
    /// so that some of what is seen stays longer than a token or two.
    WideDecay,
}

/// What [`Start::WideDecay`] multiplies the rows of A_log by.
const WIDE: f32 = 4.0;

impl Start {
    /// Turns `Default` values of layer `number` in `params` into this start's, except for
    /// [`Start::Attention`].
    pub fn apply(self, ssm: &Ssm, params: &mut [f32], (seed, number): (u64, usize)) {
        match self {
            Start::Default | Start::Attention => {}
            Start::Paper => ssm.d.of_mut(params).fill(1.0),
            Start::RandomGate => {
                let bound = 1.0 / (ssm.z.cols as f32).sqrt();
                let random = Philox::new(seed, &format!("gate of layer {number}"));
                random.fill_uniform(-bound, bound, ssm.z.of_mut(params));
                ssm.z_bias.of_mut(params).fill(0.0);
            }
            Start::WideDecay => ssm.a_log.of_mut(params).iter_mut().for_each(|w| *w *= WIDE),
        }
    }
}

/// Copies the projections of `attention` into `ssm`, each key and value head to all query heads of
/// its group. Of C, rows beyond the head's width become 0 (B keeps its random ones, so that they
/// can learn). Needs a state at least as wide as a head.
pub fn from_attention(
    ssm: &Ssm,
    params: &mut [f32],
    attention: &Attention,
    teacher: &[f32],
) -> Result<()> {
    let heads = attention.heads();
    let (dim, d) = (heads.dim, attention.qkv.inputs());
    let state = ssm.bc.rows / 2 / heads.query;
    ensure!(
        state >= dim,
        "`init: attention` needs a `d_state` of at least the head's width, {dim}, not {state}"
    );
    let rows = |first: usize, n: usize| Slot {
        offset: attention.qkv.w.offset + first * d,
        rows: n,
        cols: d,
    };
    let part =
        |first: usize, n: usize| Slot { offset: ssm.in_proj.offset + first * d, rows: n, cols: d };
    let inner = heads.width();
    for head in 0..heads.query {
        let kv = head / (heads.query / heads.kv);
        let [q, k, v] =
            [head, heads.query + kv, heads.query + heads.kv + kv].map(|h| rows(h * dim, dim));
        part(head * dim, dim).of_mut(params).copy_from_slice(v.of(teacher));
        let b = inner + head * state;
        let c = inner + (heads.query + head) * state;
        part(b, dim).of_mut(params).copy_from_slice(k.of(teacher));
        part(c, dim).of_mut(params).copy_from_slice(q.of(teacher));
        part(c + dim, state - dim).of_mut(params).fill(0.0);
    }
    ssm.out.of_mut(params).copy_from_slice(attention.o.w.of(teacher));
    Ok(())
}

/// Scales B and C of every head by √s, s = ⟨M,A⟩/⟨M,M⟩ clamped to be positive: raw copies explode.
pub fn scale_heads(ssm: &Ssm, params: &mut [f32], products_h: &[(f64, f64)]) {
    let d = ssm.in_proj.cols;
    let (heads, state) = (products_h.len(), ssm.bc.rows / 2 / products_h.len());
    for (head, (ma, mm)) in products_h.iter().enumerate() {
        let s = if *mm > 0.0 { (ma / mm).max(1e-4) } else { 1.0 };
        for first in [head * state, (heads + head) * state] {
            let slot = Slot { offset: ssm.bc.offset + first * d, rows: state, cols: d };
            slot.of_mut(params).iter_mut().for_each(|w| *w *= s.sqrt() as f32);
        }
    }
}
