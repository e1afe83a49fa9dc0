//! The attention mixer: projections and rotary positions around [`ops::attention`].

use super::config::Config;
use super::linear::Linear;
use super::mixer::Scene;
use super::params::{Builder, Init, Part};
use crate::ops::Dims;
use crate::ops::attention::{self as op, Heads};

/// Slots of an attention mixer.
pub struct Attention {
    heads: Heads,
    /// q, k and v projections as one (they lie one after the other).
    pub qkv: Linear,
    /// The output projection.
    pub o: Linear,
}

/// Activations that the backward pass and phase 1 need.
pub struct Saved {
    heads: Heads,
    /// Rows of q heads, k heads, v heads; q and k rotated.
    pub qkv_nr: Vec<f32>,
    /// A per query head, `[batch, head, seq, seq]`; of a pass that keeps no matrices a tile's.
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

    /// Declares `{prefix}{q,k,v,o}_proj` (Phi calls the last `dense`).
    pub fn declare(
        config: &Config,
        layer: usize,
        prefix: &str,
        builder: &mut Builder,
    ) -> Attention {
        let heads = Heads { query: config.heads, kv: config.kv_heads, dim: config.head_dim };
        let (inner, kv, part) = (config.d_inner(), config.d_kv(), Part::Mixer(layer));
        let named = |name: &str, rows| (format!("{prefix}{name}"), rows);
        let parts = [named("q_proj", inner), named("k_proj", kv), named("v_proj", kv)];
        let how = (part, Init::Normal(config.init_std()), config.bias.qkv);
        let qkv = Linear::declare(&parts, config.d_model, how, builder);
        let how = (part, Init::Normal(config.init_std_out()), config.bias.out);
        let o = Linear::declare(&[named(config.out_name(), config.d_model)], inner, how, builder);
        Attention { heads, qkv, o }
    }

    /// Buffers for `dims`; all of A only if `matrices`.
    pub fn saved(&self, dims: Dims, matrices: bool) -> Saved {
        let (n, rows) = (dims.tokens(), dims.tokens() * self.heads.query);
        let probs = if matrices { rows * dims.seq } else { op::scratch_len(dims.seq) };
        Saved {
            heads: self.heads,
            qkv_nr: vec![0.0; n * self.heads.row()],
            probs_bhll: vec![0.0; probs],
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
        let (n, heads) = (scene.dims.tokens(), self.heads);
        self.qkv.forward(params, n, x_nd, &mut saved.qkv_nr);
        let turned = heads.query + heads.kv;
        scene.rope.rotate(&mut saved.qkv_nr, heads.row(), turned, scene.dims.seq, false);
        let out = op::Out {
            probs_bhll: &mut saved.probs_bhll,
            lse_bhl: &mut saved.lse_bhl,
            ctx_nd: &mut saved.ctx_nd,
        };
        op::forward(scene.dims, heads, scene.starts_n, &saved.qkv_nr, out);
        self.o.forward_add(params, n, &saved.ctx_nd, out_nd);
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
        let (n, heads) = (scene.dims.tokens(), self.heads);
        let Heads { query, kv, .. } = heads;
        self.o.backward_input(params, n, d_out_nd, &mut scratch.d_ctx_nd);
        let back = op::Back {
            qkv_nr: &saved.qkv_nr,
            probs_bhll: &saved.probs_bhll,
            ctx_nd: &saved.ctx_nd,
            scratch: &mut scratch.tile,
        };
        let d_qkv = &mut scratch.d_qkv_nr;
        op::backward(scene.dims, heads, scene.starts_n, &scratch.d_ctx_nd, back, d_qkv);
        scene.rope.rotate(d_qkv, heads.row(), query + kv, scene.dims.seq, true);
        self.qkv.backward_input(params, n, d_qkv, d_x_nd);
        if let Some(grads) = grads {
            self.qkv.backward_weight(n, d_qkv, x_nd, grads);
            self.o.backward_weight(n, d_out_nd, &saved.ctx_nd, grads);
        }
    }
}
