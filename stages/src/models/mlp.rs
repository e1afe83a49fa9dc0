//! The MLP of a block, gated or not, over its slots. Knows no norm and no residual stream.

use super::config::{Config, Family, MlpKind};
use super::linear::Linear;
use super::params::{Builder, Init, Part};
use crate::ops::{gelu, many, mlp};

/// Slots of an MLP.
#[derive(Clone, Copy, Debug)]
pub struct Mlp {
    pub(crate) kind: MlpKind,
    pub(crate) ffn: usize,
    /// Gate and up projections as one, or fc1.
    pub into: Linear,
    /// The projection back to the model's width.
    pub out: Linear,
}

/// Activations that the way back needs.
pub struct Saved {
    into_nw: Vec<f32>,
    act_nf: Vec<f32>,
}

/// Buffers of the backward pass.
pub struct Scratch {
    d_into_nw: Vec<f32>,
    d_act_nf: Vec<f32>,
}

impl Mlp {
    /// Declares `{prefix}mlp.{gate,up,down}_proj` (or `fc1`, `fc2`).
    pub fn declare(config: &Config, layer: usize, prefix: &str, builder: &mut Builder) -> Mlp {
        let (d, f, part, bias) = (config.d_model, config.ffn, Part::Mlp(layer), config.bias.mlp);
        let (first, last): (&[&str], &str) = match (config.mlp, config.family) {
            (MlpKind::Swiglu, _) => (&["gate_proj", "up_proj"], "down_proj"),
            (MlpKind::Gelu, Family::Phi) => (&["fc1"], "fc2"),
            (MlpKind::Gelu, _) => (&["up_proj"], "down_proj"),
        };
        let named = |name: &str, rows| (format!("{prefix}mlp.{name}"), rows);
        let parts: Vec<_> = first.iter().map(|name| named(name, f)).collect();
        let how = |std| (part, Init::Normal(std), bias);
        let into = Linear::declare(&parts, d, how(config.init_std()), builder);
        let out = Linear::declare(&[named(last, d)], f, how(config.init_std_out()), builder);
        Mlp { kind: config.mlp, ffn: f, into, out }
    }

    /// Buffers for `n` tokens.
    pub fn saved(&self, n: usize) -> Saved {
        Saved { into_nw: vec![0.0; n * self.into.outputs()], act_nf: vec![0.0; n * self.ffn] }
    }

    /// Buffers of the backward pass for `n` tokens.
    pub fn scratch(&self, n: usize) -> Scratch {
        Scratch { d_into_nw: vec![0.0; n * self.into.outputs()], d_act_nf: vec![0.0; n * self.ffn] }
    }

    /// *Adds* the output for the normed input `x_nd` to `out_nd`.
    pub fn forward_add(
        &self,
        params: &[f32],
        n: usize,
        x_nd: &[f32],
        out_nd: &mut [f32],
        saved: &mut Saved,
    ) {
        let Saved { into_nw, act_nf } = saved;
        self.into.forward(params, n, x_nd, into_nw);
        match self.kind {
            MlpKind::Swiglu => mlp::forward(self.ffn, into_nw, act_nf),
            MlpKind::Gelu => gelu::forward(into_nw, act_nf),
        }
        self.out.forward_add(params, n, act_nf, out_nd);
    }

    /// *Adds* the output to `out_nd` by all threads, for decoding.
    pub fn run(&self, params: &[f32], n: usize, x_nd: &[f32], out_nd: &mut [f32]) {
        let (mut into_nw, mut act_nf) =
            (vec![0.0; n * self.into.outputs()], vec![0.0; n * self.ffn]);
        many::linear(n, x_nd, self.into.w.of(params), &mut into_nw, false);
        self.into.add_bias(params, &mut into_nw);
        match self.kind {
            MlpKind::Swiglu => mlp::forward(self.ffn, &into_nw, &mut act_nf),
            MlpKind::Gelu => gelu::forward(&into_nw, &mut act_nf),
        }
        many::linear(n, &act_nf, self.out.w.of(params), out_nd, true);
        self.out.add_bias(params, out_nd);
    }

    /// From the gradient of the output to that of the normed input (`d_x_nd`, overwritten) and,
    /// with `grads`, to those of the weights (added).
    #[expect(clippy::too_many_arguments, reason = "a backward pass touches this many buffers")]
    pub fn backward(
        &self,
        params: &[f32],
        n: usize,
        x_nd: &[f32],
        d_out_nd: &[f32],
        d_x_nd: &mut [f32],
        saved: &Saved,
        scratch: &mut Scratch,
        grads: Option<&mut [f32]>,
    ) {
        let Scratch { d_into_nw, d_act_nf } = scratch;
        self.out.backward_input(params, n, d_out_nd, d_act_nf);
        match self.kind {
            MlpKind::Swiglu => mlp::backward(self.ffn, d_act_nf, &saved.into_nw, d_into_nw),
            MlpKind::Gelu => gelu::backward(d_act_nf, &saved.into_nw, d_into_nw),
        }
        if let Some(grads) = grads {
            self.out.backward_weight(n, d_out_nd, &saved.act_nf, grads);
            self.into.backward_weight(n, d_into_nw, x_nd, grads);
        }
        self.into.backward_input(params, n, d_into_nw, d_x_nd);
    }
}
