//! One block, wired sequentially: `m = u + mixer(norm(u))`, `out = m + mlp(norm(m))`.

use super::config::Config;
use super::mixer::{self, Mixer, Scene};
use super::params::{Builder, Init, Part, Slot};
use crate::ops::gemm::{linear, linear_add, linear_dw, linear_dx};
use crate::ops::{Dims, mlp, norm};

/// Which parameters get gradients; work for the others is skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trained {
    /// The token embedding (of a tied model: also as the head).
    pub embedding: bool,
    /// All norms.
    pub norms: bool,
    /// The mixers.
    pub mixers: bool,
    /// The MLPs.
    pub mlps: bool,
    /// The head of a model that is not tied.
    pub head: bool,
}

impl Trained {
    /// Everything.
    pub const ALL: Trained =
        Trained { embedding: true, norms: true, mixers: true, mlps: true, head: true };
    /// The mixers only, as in phases 1 and 2.
    pub const MIXERS: Trained =
        Trained { embedding: false, norms: false, mixers: true, mlps: false, head: false };

    /// Whether anything outside the blocks needs a gradient that passes through the first block.
    pub fn below_blocks(self) -> bool {
        self.embedding
    }
}

/// Slots of a block.
pub struct Block {
    d: usize,
    f: usize,
    eps: f32,
    /// The norm before the mixer.
    pub norm1: Slot,
    /// The mixer.
    pub mixer: Mixer,
    /// The norm before the MLP.
    pub norm2: Slot,
    /// Gate and up projections as one matrix.
    pub gate_up: Slot,
    /// The down projection.
    pub down: Slot,
}

/// Activations of a block that its backward pass needs.
pub struct Saved {
    /// Normed input of the mixer.
    pub x1_nd: Vec<f32>,
    inv1_n: Vec<f32>,
    /// The mixer's own.
    pub mixer: mixer::Saved,
    /// The residual stream between mixer and MLP.
    pub mid_nd: Vec<f32>,
    x2_nd: Vec<f32>,
    inv2_n: Vec<f32>,
    gu_n2f: Vec<f32>,
    act_nf: Vec<f32>,
}

/// Buffers of the backward pass, shared by all blocks.
pub struct Scratch {
    d_x_nd: Vec<f32>,
    d_act_nf: Vec<f32>,
    d_gu_n2f: Vec<f32>,
    mixer: mixer::Scratch,
}

impl Block {
    /// Declares the tensors of layer `layer` under `{prefix}` (`model.layers.0.`).
    pub fn declare(config: &Config, layer: usize, prefix: &str, builder: &mut Builder) -> Block {
        let (d, f) = (config.d_model, config.ffn);
        let one = Init::Constant(1.0);
        let std = Init::Normal(config.init_std());
        let vector = |builder: &mut Builder, name: &str| {
            builder.vector(format!("{prefix}{name}.weight"), d, Part::Norm(layer), one)
        };
        let matrix = |builder: &mut Builder, name: &str, rows, cols, init| {
            let name = format!("{prefix}mlp.{name}_proj.weight");
            builder.matrix(name, rows, cols, Part::Mlp(layer), init)
        };
        let norm1 = vector(builder, "input_layernorm");
        let mixer = Mixer::declare(config, layer, &config.mixer_prefix(layer), builder);
        let norm2 = vector(builder, "post_attention_layernorm");
        let gate = matrix(builder, "gate", f, d, std);
        let up = matrix(builder, "up", f, d, std);
        let down = matrix(builder, "down", d, f, Init::Normal(config.init_std_out()));
        let eps = config.norm_eps as f32;
        Block { d, f, eps, norm1, mixer, norm2, gate_up: gate.join(up), down }
    }

    /// Buffers for `dims`.
    pub fn saved(&self, dims: Dims) -> Saved {
        let n = dims.tokens();
        Saved {
            x1_nd: vec![0.0; n * self.d],
            inv1_n: vec![0.0; n],
            mixer: self.mixer.saved(dims),
            mid_nd: vec![0.0; n * self.d],
            x2_nd: vec![0.0; n * self.d],
            inv2_n: vec![0.0; n],
            gu_n2f: vec![0.0; n * 2 * self.f],
            act_nf: vec![0.0; n * self.f],
        }
    }

    /// Buffers for the backward pass of `dims`; [`Mixer::reserve`] adds those of other kinds.
    pub fn scratch(&self, dims: Dims) -> Scratch {
        let n = dims.tokens();
        let mut scratch = Scratch {
            d_x_nd: vec![0.0; n * self.d],
            d_act_nf: vec![0.0; n * self.f],
            d_gu_n2f: vec![0.0; n * 2 * self.f],
            mixer: mixer::Scratch::default(),
        };
        self.reserve(dims, &mut scratch);
        scratch
    }

    /// Makes sure that `scratch` also serves this block's kind of mixer.
    pub fn reserve(&self, dims: Dims, scratch: &mut Scratch) {
        self.mixer.reserve(dims, &mut scratch.mixer);
    }

    /// The norm and the mixer alone: fills [`Saved::x1_nd`] and [`Saved::mid_nd`] (`u + mixer`).
    pub fn forward_mixer(&self, params: &[f32], scene: Scene, u_nd: &[f32], saved: &mut Saved) {
        let Saved { x1_nd, inv1_n, mixer, mid_nd, .. } = saved;
        norm::forward(u_nd, self.norm1.of(params), self.eps, x1_nd, inv1_n);
        mid_nd.copy_from_slice(u_nd);
        self.mixer.forward(params, scene, x1_nd, mid_nd, mixer);
    }

    /// The MLP on [`Saved::mid_nd`]: `out = mid + mlp(norm(mid))`.
    pub fn forward_mlp(&self, params: &[f32], out_nd: &mut [f32], saved: &mut Saved) {
        let Saved { mid_nd, x2_nd, inv2_n, gu_n2f, act_nf, .. } = saved;
        let n = inv2_n.len();
        norm::forward(mid_nd, self.norm2.of(params), self.eps, x2_nd, inv2_n);
        linear(n, self.d, 2 * self.f, x2_nd, self.gate_up.of(params), gu_n2f);
        mlp::forward(self.f, gu_n2f, act_nf);
        out_nd.copy_from_slice(mid_nd);
        linear_add(n, self.f, self.d, act_nf, self.down.of(params), out_nd);
    }

    /// The whole block, `u_nd` → `out_nd`.
    pub fn forward(
        &self,
        params: &[f32],
        scene: Scene,
        u_nd: &[f32],
        out_nd: &mut [f32],
        saved: &mut Saved,
    ) {
        self.forward_mixer(params, scene, u_nd, saved);
        self.forward_mlp(params, out_nd, saved);
    }

    /// Turns the gradient of the block's output, `d_nd`, into that of [`Saved::mid_nd`].
    pub fn backward_mlp(
        &self,
        params: &[f32],
        d_nd: &mut [f32],
        saved: &Saved,
        scratch: &mut Scratch,
        trained: Trained,
        grads: &mut [f32],
    ) {
        let (n, d, f) = (saved.inv2_n.len(), self.d, self.f);
        let Scratch { d_x_nd, d_act_nf, d_gu_n2f, .. } = scratch;
        linear_dx(n, f, d, d_nd, self.down.of(params), d_act_nf);
        mlp::backward(f, d_act_nf, &saved.gu_n2f, d_gu_n2f);
        if trained.mlps {
            linear_dw(n, f, d, d_nd, &saved.act_nf, self.down.of_mut(grads));
            linear_dw(n, d, 2 * f, d_gu_n2f, &saved.x2_nd, self.gate_up.of_mut(grads));
        }
        linear_dx(n, d, 2 * f, d_gu_n2f, self.gate_up.of(params), d_x_nd);
        let d_w = trained.norms.then(|| self.norm2.of_mut(grads));
        norm::backward(d_x_nd, &saved.mid_nd, self.norm2.of(params), &saved.inv2_n, d_nd, d_w);
    }

    /// Turns the gradient of [`Saved::mid_nd`], `d_nd`, into that of the block's input `u_nd`.
    #[expect(clippy::too_many_arguments, reason = "a backward pass touches this many buffers")]
    pub fn backward_mixer(
        &self,
        params: &[f32],
        scene: Scene,
        u_nd: &[f32],
        d_nd: &mut [f32],
        saved: &mut Saved,
        scratch: &mut Scratch,
        trained: Trained,
        grads: &mut [f32],
    ) {
        let Scratch { d_x_nd, mixer, .. } = scratch;
        let own = trained.mixers.then_some(&mut *grads);
        self.mixer.backward(
            params,
            scene,
            &saved.x1_nd,
            d_nd,
            d_x_nd,
            &mut saved.mixer,
            mixer,
            own,
        );
        let d_w = trained.norms.then(|| self.norm1.of_mut(grads));
        norm::backward(d_x_nd, u_nd, self.norm1.of(params), &saved.inv1_n, d_nd, d_w);
    }

    /// Turns the gradient of the block's output, `d_nd`, into that of its input, in place.
    #[expect(clippy::too_many_arguments, reason = "a backward pass touches this many buffers")]
    pub fn backward(
        &self,
        params: &[f32],
        scene: Scene,
        u_nd: &[f32],
        d_nd: &mut [f32],
        saved: &mut Saved,
        scratch: &mut Scratch,
        trained: Trained,
        grads: &mut [f32],
    ) {
        self.backward_mlp(params, d_nd, saved, scratch, trained, grads);
        self.backward_mixer(params, scene, u_nd, d_nd, saved, scratch, trained, grads);
    }
}
