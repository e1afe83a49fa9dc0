//! The attention mixer: projections and rotary positions around [`ops::attention`].

use super::config::Config;
use super::mixer::Scene;
use super::params::{Builder, Init, Part, Slot};
use crate::ops::Dims;
use crate::ops::attention::{self as op, Heads};
use crate::ops::gemm::{linear, linear_add, linear_dw, linear_dx};

/// Slots of an attention mixer.
pub struct Attention {
    heads: Heads,
    d_model: usize,
    /// q, k and v projections as one matrix (they lie one after the other).
    pub qkv: Slot,
    /// The output projection.
    pub o: Slot,
}

/// Activations that the backward pass and phase 1 need.
pub struct Saved {
    heads: Heads,
    /// Rows of q heads, k heads, v heads; q and k rotated.
    pub qkv_nr: Vec<f32>,
    /// A per query head, `[batch, head, seq, seq]`.
    pub probs_bhll: Vec<f32>,
    /// Log-sum-exp of every row of scaled scores, `[batch, head, seq]`.
    pub lse_bhl: Vec<f32>,
    ctx_nd: Vec<f32>,
}

/// Buffers of the backward pass.
pub struct Scratch {
    d_ctx_nd: Vec<f32>,
    d_qkv_nr: Vec<f32>,
    tile: Vec<f32>,
}

impl Saved {
    /// Sizes of the heads.
    pub fn heads(&self) -> Heads {
        self.heads
    }
}

impl Attention {
    /// Sizes of the heads.
    pub fn heads(&self) -> Heads {
        self.heads
    }

    /// Declares `{prefix}{q,k,v,o}_proj.weight`.
    pub fn declare(
        config: &Config,
        layer: usize,
        prefix: &str,
        builder: &mut Builder,
    ) -> Attention {
        let heads = Heads { query: config.heads, kv: config.kv_heads, dim: config.head_dim };
        let (d, part) = (config.d_model, Part::Mixer(layer));
        let init = Init::Normal(config.init_std());
        let mut matrix = |name: &str, rows, cols, init| {
            builder.matrix(format!("{prefix}{name}_proj.weight"), rows, cols, part, init)
        };
        let q = matrix("q", config.d_inner(), d, init);
        let k = matrix("k", config.d_kv(), d, init);
        let v = matrix("v", config.d_kv(), d, init);
        let o = matrix("o", d, config.d_inner(), Init::Normal(config.init_std_out()));
        Attention { heads, d_model: d, qkv: q.join(k).join(v), o }
    }

    /// Buffers for `dims`.
    pub fn saved(&self, dims: Dims) -> Saved {
        let (n, rows) = (dims.tokens(), dims.tokens() * self.heads.query);
        Saved {
            heads: self.heads,
            qkv_nr: vec![0.0; n * self.heads.row()],
            probs_bhll: vec![0.0; rows * dims.seq],
            lse_bhl: vec![0.0; rows],
            ctx_nd: vec![0.0; n * self.heads.width()],
        }
    }

    /// Buffers for the backward pass of `dims`.
    pub fn scratch(&self, dims: Dims) -> Scratch {
        let n = dims.tokens();
        Scratch {
            d_ctx_nd: vec![0.0; n * self.heads.width()],
            d_qkv_nr: vec![0.0; n * self.heads.row()],
            tile: vec![0.0; op::scratch_len(dims.seq)],
        }
    }

    /// See [`super::mixer::Mixer::forward`].
    pub fn forward(
        &self,
        params: &[f32],
        scene: Scene,
        x_nd: &[f32],
        out_nd: &mut [f32],
        saved: &mut Saved,
    ) {
        let (n, d, heads) = (scene.dims.tokens(), self.d_model, self.heads);
        linear(n, d, heads.row(), x_nd, self.qkv.of(params), &mut saved.qkv_nr);
        let turned = heads.query + heads.kv;
        scene.rope.rotate(&mut saved.qkv_nr, heads.row(), turned, scene.dims.seq, false);
        let out = op::Out {
            probs_bhll: &mut saved.probs_bhll,
            lse_bhl: &mut saved.lse_bhl,
            ctx_nd: &mut saved.ctx_nd,
        };
        op::forward(scene.dims, heads, scene.starts_n, &saved.qkv_nr, out);
        linear_add(n, heads.width(), d, &saved.ctx_nd, self.o.of(params), out_nd);
    }

    /// See [`super::mixer::Mixer::backward`].
    #[expect(clippy::too_many_arguments, reason = "a backward pass touches this many buffers")]
    pub fn backward(
        &self,
        params: &[f32],
        scene: Scene,
        x_nd: &[f32],
        d_out_nd: &[f32],
        d_x_nd: &mut [f32],
        saved: &Saved,
        scratch: &mut Scratch,
        grads: Option<&mut [f32]>,
    ) {
        let (n, d, heads) = (scene.dims.tokens(), self.d_model, self.heads);
        let Heads { query, kv, .. } = heads;
        linear_dx(n, heads.width(), d, d_out_nd, self.o.of(params), &mut scratch.d_ctx_nd);
        let back = op::Back {
            qkv_nr: &saved.qkv_nr,
            probs_bhll: &saved.probs_bhll,
            ctx_nd: &saved.ctx_nd,
            scratch: &mut scratch.tile,
        };
        let d_qkv = &mut scratch.d_qkv_nr;
        op::backward(scene.dims, heads, scene.starts_n, &scratch.d_ctx_nd, back, d_qkv);
        scene.rope.rotate(d_qkv, heads.row(), query + kv, scene.dims.seq, true);
        linear_dx(n, d, heads.row(), d_qkv, self.qkv.of(params), d_x_nd);
        if let Some(grads) = grads {
            linear_dw(n, d, heads.row(), d_qkv, x_nd, self.qkv.of_mut(grads));
            linear_dw(n, heads.width(), d, d_out_nd, &saved.ctx_nd, self.o.of_mut(grads));
        }
    }
}
