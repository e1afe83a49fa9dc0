//! One block: norms, mixer and MLP, wired one after the other (Llama: `m = u + mixer(norm1(u))`,
//! `out = m + mlp(norm2(m))`) or side by side (Phi: `out = u + mixer(norm1(u)) + mlp(norm1(u))`).

use super::config::{Config, MixerKind, Wiring};
use super::mixer::{self, Mixer, Scene};
use super::mlp::{self, Mlp};
use super::norm::Norm;
use super::params::{Builder, Part};
use crate::ops::Dims;
use crate::ops::vector::add;

/// Which parameters get gradients; work for the others is skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trained {
    /// The token embedding (of a tied model: also as the head).
    pub embedding: bool,
    /// All norms.
    pub norms: bool,
    /// The mixers that replace attention.
    pub mixers: bool,
    /// The mixers that are attention.
    pub attention: bool,
    /// The MLPs.
    pub mlps: bool,
    /// The head of a model that is not tied.
    pub head: bool,
}

impl Trained {
    /// Everything.
    pub const ALL: Trained = Trained {
        embedding: true,
        norms: true,
        mixers: true,
        attention: true,
        mlps: true,
        head: true,
    };
    /// The new mixers only, as in phases 1 and 2.
    pub const MIXERS: Trained = Trained {
        embedding: false,
        norms: false,
        mixers: true,
        attention: false,
        mlps: false,
        head: false,
    };

    /// Whether the mixer of a block of this kind gets gradients.
    pub fn mixer(self, kind: MixerKind) -> bool {
        match kind {
            MixerKind::Attention => self.attention,
            MixerKind::Ssm => self.mixers,
        }
    }

    /// The first block that a gradient has to pass: what is below trains nothing.
    pub fn first_block(self, layers: &[MixerKind]) -> usize {
        if self.embedding || self.norms || self.mlps {
            return 0;
        }
        layers.iter().position(|kind| self.mixer(*kind)).unwrap_or(layers.len())
    }
}

/// Slots of a block.
pub struct Block {
    d: usize,
    /// The norm before the mixer (and, side by side, before the MLP).
    pub norm1: Norm,
    /// The mixer.
    pub mixer: Mixer,
    /// The norm before the MLP, unless it shares the mixer's.
    pub norm2: Option<Norm>,
    /// The MLP.
    pub mlp: Mlp,
}

/// Activations of a block that its backward pass needs.
pub struct Saved {
    /// Normed input of the mixer.
    pub x1_nd: Vec<f32>,
    inv1_n: Vec<f32>,
    /// The mixer's own.
    pub mixer: mixer::Saved,
    /// The residual stream with the mixer's output.
    pub mid_nd: Vec<f32>,
    x2_nd: Vec<f32>,
    inv2_n: Vec<f32>,
    mlp: mlp::Saved,
}

/// Buffers of the backward pass, shared by all blocks.
pub struct Scratch {
    d_x_nd: Vec<f32>,
    /// Side by side: what the MLP gives back to the norm they share.
    d_shared_nd: Option<Vec<f32>>,
    /// Whether it did since the last [`Block::backward_mixer`].
    shared: bool,
    mlp: mlp::Scratch,
    mixer: mixer::Scratch,
}

impl Block {
    /// Declares the tensors of layer `layer` under `{prefix}` (`model.layers.0.`).
    pub fn declare(config: &Config, layer: usize, prefix: &str, builder: &mut Builder) -> Block {
        let norm = |builder: &mut Builder, name: &str| {
            Norm::declare(config, &format!("{prefix}{name}."), Part::Norm(layer), builder)
        };
        let norm1 = norm(builder, "input_layernorm");
        let mixer = Mixer::declare(config, layer, &config.mixer_prefix(layer), builder);
        let norm2 = match config.wiring {
            Wiring::Sequential => Some(norm(builder, "post_attention_layernorm")),
            Wiring::Parallel => None,
        };
        let mlp = Mlp::declare(config, layer, prefix, builder);
        Block { d: config.d_model, norm1, mixer, norm2, mlp }
    }

    /// Buffers for `dims`; with what the backward pass needs if `back`.
    pub fn saved(&self, dims: Dims, back: bool) -> Saved {
        let n = dims.tokens();
        let own = if self.norm2.is_some() { n } else { 0 };
        Saved {
            x1_nd: vec![0.0; n * self.d],
            inv1_n: vec![0.0; n],
            mixer: self.mixer.saved(dims, back),
            mid_nd: vec![0.0; n * self.d],
            x2_nd: vec![0.0; own * self.d],
            inv2_n: vec![0.0; own],
            mlp: self.mlp.saved(n),
        }
    }

    /// Buffers for the backward pass of `dims`; [`Mixer::reserve`] adds those of other kinds.
    pub fn scratch(&self, dims: Dims) -> Scratch {
        let n = dims.tokens();
        let mut scratch = Scratch {
            d_x_nd: vec![0.0; n * self.d],
            d_shared_nd: self.norm2.is_none().then(|| vec![0.0; n * self.d]),
            shared: false,
            mlp: self.mlp.scratch(n),
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
        self.norm1.forward(params, u_nd, x1_nd, inv1_n);
        mid_nd.copy_from_slice(u_nd);
        self.mixer.forward(params, scene, x1_nd, mid_nd, mixer);
    }

    /// The MLP after [`Block::forward_mixer`]: `out = mid + mlp(…)`.
    pub fn forward_mlp(&self, params: &[f32], out_nd: &mut [f32], saved: &mut Saved) {
        let Saved { x1_nd, mid_nd, x2_nd, inv1_n, inv2_n, mlp, .. } = saved;
        out_nd.copy_from_slice(mid_nd);
        let x_nd = match self.norm2 {
            None => x1_nd,
            Some(norm) => {
                norm.forward(params, mid_nd, x2_nd, inv2_n);
                x2_nd
            }
        };
        self.mlp.forward_add(params, inv1_n.len(), x_nd, out_nd, mlp);
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

    /// Turns the gradient of the block's output, `d_nd`, into that of [`Saved::mid_nd`]; what a
    /// shared norm gets from the MLP waits in `scratch` for [`Block::backward_mixer`].
    pub fn backward_mlp(
        &self,
        params: &[f32],
        d_nd: &mut [f32],
        saved: &Saved,
        scratch: &mut Scratch,
        trained: Trained,
        grads: &mut [f32],
    ) {
        let n = saved.inv1_n.len();
        let Scratch { d_x_nd, d_shared_nd, shared, mlp, .. } = scratch;
        let own = trained.mlps.then_some(&mut *grads);
        match (self.norm2, d_shared_nd) {
            (Some(norm), _) => {
                self.mlp.backward(params, n, &saved.x2_nd, d_nd, d_x_nd, &saved.mlp, mlp, own);
                let own = trained.norms.then_some(grads);
                norm.backward(params, d_x_nd, (&saved.mid_nd, &saved.inv2_n), d_nd, own);
            }
            (None, Some(d_x_nd)) => {
                self.mlp.backward(params, n, &saved.x1_nd, d_nd, d_x_nd, &saved.mlp, mlp, own);
                *shared = true;
            }
            (None, None) => unreachable!("the scratch is of a block that is wired otherwise"),
        }
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
        let Scratch { d_x_nd, d_shared_nd, shared, mixer, .. } = scratch;
        let own = trained.mixer(self.mixer.kind()).then_some(&mut *grads);
        let x_nd = &saved.x1_nd;
        self.mixer.backward(params, scene, x_nd, d_nd, d_x_nd, &mut saved.mixer, mixer, own);
        if let (true, Some(from_mlp)) = (std::mem::take(shared), d_shared_nd) {
            add(d_x_nd, from_mlp);
        }
        let own = trained.norms.then_some(grads);
        self.norm1.backward(params, d_x_nd, (u_nd, &saved.inv1_n), d_nd, own);
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
