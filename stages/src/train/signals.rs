//! Cached teacher signals of one layer: what [`Writer`](crate::models::file::Writer) files hold
//! and how they are read back. Knows no loss.
//!
//! | tensor | shape | when |
//! |---|---|---|
//! | `starts` | `[sequence, seq]` u16 | always: where each token's document starts |
//! | `hidden`, `next` | `[sequence, seq, d_model]` | hidden: before and after the block, un-normed |
//! | `qk` | `[sequence, seq, heads + kv_heads, head_dim]` | attention `qk`: rotated |
//! | `lse` | `[sequence, heads, seq]` f32 | attention: log-sum-exp of the scaled scores |
//! | `matrix` | `[sequence, heads, seq·(seq+1)/2]` | attention `matrix`: lower triangle by rows |

use anyhow::{Context as _, Result, ensure};
use engine::tensors::{Tensors, View};
use safetensors::Dtype;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::models::file::read_f32;
use crate::ops::Dims;
use crate::ops::attention::{Heads, matrices};

/// How attention is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AttentionForm {
    /// Rotated q and k, from which the matrices are made again: small, and exact to the stored
    /// number type.
    #[default]
    Qk,
    /// The lower triangle of every matrix: for short sequences, and to look at.
    Matrix,
}

/// What a signal file says about itself, as JSON in its metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// The layer it is of.
    pub layer: usize,
    /// Sequences in it.
    pub sequences: usize,
    /// Tokens of each.
    pub seq: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether hidden states are in it.
    pub hidden: bool,
    /// Whether and how attention is in it.
    pub attention: Option<AttentionForm>,
}

impl Shape {
    /// Heads as ops take them.
    pub fn heads(&self) -> Heads {
        Heads { query: self.heads, kv: self.kv_heads, dim: self.head_dim }
    }

    /// Elements of a sequence in the tensor called `name`.
    pub fn per_sequence(&self, name: &str) -> Vec<usize> {
        match name {
            "starts" => vec![self.seq],
            "qk" => vec![self.seq, self.heads + self.kv_heads, self.head_dim],
            "lse" => vec![self.heads, self.seq],
            "matrix" => vec![self.heads, self.seq * (self.seq + 1) / 2],
            _ => vec![self.seq, self.d_model],
        }
    }

    /// Names and shapes of the file's tensors; values other than `starts` and `lse` are `dtype`.
    pub fn specs(&self, dtype: Dtype) -> Vec<(String, Dtype, Vec<usize>)> {
        let mut names = vec![("starts", Dtype::U16)];
        if self.hidden {
            names.extend([("hidden", dtype), ("next", dtype)]);
        }
        match self.attention {
            Some(AttentionForm::Qk) => names.extend([("qk", dtype), ("lse", Dtype::F32)]),
            Some(AttentionForm::Matrix) => names.extend([("matrix", dtype), ("lse", Dtype::F32)]),
            None => {}
        }
        let spec = |(name, dtype): (&str, Dtype)| {
            let shape = [vec![self.sequences], self.per_sequence(name)].concat();
            (name.to_string(), dtype, shape)
        };
        names.into_iter().map(spec).collect()
    }
}

/// The signals of one layer, mapped.
pub struct Signals {
    tensors: Tensors,
    /// What is in it.
    pub shape: Shape,
}

impl Signals {
    /// Checks names and shapes of a file that `cache_teacher` made.
    pub fn open(tensors: Tensors) -> Result<Signals> {
        let text = tensors.metadata("signals").context("the file has no teacher signals")?;
        let shape: Shape = serde_json::from_str(text).context("its `signals` cannot be read")?;
        ensure!(shape.seq > 0 && shape.kv_heads > 0, "its `signals` name impossible sizes");
        for (name, _, dims) in shape.specs(Dtype::F32) {
            let view = tensors.get(&name).with_context(|| format!("tensor `{name}` is missing"))?;
            ensure!(view.shape == dims, "tensor `{name}` is {:?}, expected {dims:?}", view.shape);
        }
        Ok(Signals { tensors, shape })
    }

    fn row(&self, name: &str, sequence: usize) -> Result<View<'_>> {
        let view = self.tensors.get(name);
        let view = view.with_context(|| format!("the signals were cached without `{name}`"))?;
        ensure!(sequence < self.shape.sequences, "sequence {sequence} of {}", self.shape.sequences);
        let bytes = view.bytes.len() / self.shape.sequences;
        Ok(View { bytes: &view.bytes[sequence * bytes..][..bytes], ..view })
    }

    /// Tensor `name` of a sequence as f32.
    pub fn values(&self, name: &str, sequence: usize, out: &mut [f32]) -> Result<()> {
        self.copy(name, sequence, out)
    }

    /// Values that a sequence's attention is stored in.
    pub fn attention_len(&self) -> usize {
        let name = match self.shape.attention {
            Some(AttentionForm::Qk) => "qk",
            Some(AttentionForm::Matrix) => "matrix",
            None => return 0,
        };
        self.shape.per_sequence(name).iter().product()
    }

    fn copy(&self, name: &str, sequence: usize, out: &mut [f32]) -> Result<()> {
        let want: usize = self.shape.per_sequence(name).iter().product();
        ensure!(out.len() == want, "`{name}` has {want} values, not {}", out.len());
        read_f32(name, self.row(name, sequence)?, out)
    }

    /// Where each token's document starts.
    pub fn starts(&self, sequence: usize, out_l: &mut [u32]) -> Result<()> {
        let view = self.row("starts", sequence)?;
        for (to, b) in out_l.iter_mut().zip(view.bytes.chunks_exact(2)) {
            *to = u32::from(u16::from_le_bytes([b[0], b[1]]));
        }
        Ok(())
    }

    /// The residual stream before the block, `[seq, d_model]`.
    pub fn hidden(&self, sequence: usize, out_ld: &mut [f32]) -> Result<()> {
        self.copy("hidden", sequence, out_ld)
    }

    /// The residual stream after the block, un-normed, `[seq, d_model]`.
    pub fn next(&self, sequence: usize, out_ld: &mut [f32]) -> Result<()> {
        self.copy("next", sequence, out_ld)
    }

    /// A and its log-sum-exp, `[heads, seq, seq]` and `[heads, seq]`. From q and k stored as f32
    /// they equal the teacher's bit for bit. `starts_l` is from [`Signals::starts`]; `qk` is scratch
    /// that grows once.
    pub fn attention(
        &self,
        sequence: usize,
        starts_l: &[u32],
        qk: &mut Vec<f32>,
        probs_hll: &mut [f32],
        lse_hl: &mut [f32],
    ) -> Result<()> {
        let shape = &self.shape;
        let dims = Dims { batch: 1, seq: shape.seq };
        match shape.attention {
            Some(AttentionForm::Qk) => {
                let row = (shape.heads + shape.kv_heads) * shape.head_dim;
                qk.resize(shape.seq * row, 0.0);
                self.copy("qk", sequence, qk)?;
                matrices(dims, shape.heads(), starts_l, (qk, row), probs_hll, lse_hl);
                Ok(())
            }
            _ => {
                let half = shape.seq * (shape.seq + 1) / 2;
                qk.resize(shape.heads * half, 0.0);
                self.copy("matrix", sequence, qk)?;
                unpack(shape.seq, qk, probs_hll);
                self.copy("lse", sequence, lse_hl)
            }
        }
    }
}

/// Lower triangles, row after row, to full matrices.
fn unpack(seq: usize, packed: &[f32], full: &mut [f32]) {
    let half = seq * (seq + 1) / 2;
    for (packed, full) in packed.chunks_exact(half).zip(full.chunks_exact_mut(seq * seq)) {
        for (i, row) in full.chunks_exact_mut(seq).enumerate() {
            row[..=i].copy_from_slice(&packed[i * (i + 1) / 2..][..=i]);
            row[i + 1..].fill(0.0);
        }
    }
}

/// Full matrices to lower triangles, row after row.
pub fn pack(seq: usize, full: &[f32], packed: &mut Vec<f32>) {
    packed.clear();
    for full in full.chunks_exact(seq * seq) {
        for (i, row) in full.chunks_exact(seq).enumerate() {
            packed.extend_from_slice(&row[..=i]);
        }
    }
}
