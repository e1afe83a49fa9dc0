//! A norm of either kind over its slots. Knows no place in a model.

use super::config::{Config, NormKind};
use super::params::{Builder, Init, Part, Slot};
use crate::ops::{layer_norm, norm};

/// Where a norm's parameters lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    pub(crate) eps: f32,
    /// The factor of every dimension.
    pub w: Slot,
    /// What LayerNorm adds; RMSNorm has none.
    pub b: Option<Slot>,
}

impl Norm {
    /// Declares `{prefix}weight`, and `{prefix}bias` for LayerNorm.
    pub fn declare(config: &Config, prefix: &str, part: Part, builder: &mut Builder) -> Norm {
        let mut vector = |name: &str, value| {
            let name = format!("{prefix}{name}");
            builder.vector(name, config.d_model, part, Init::Constant(value))
        };
        let w = vector("weight", 1.0);
        let b = (config.norm == NormKind::Layer).then(|| vector("bias", 0.0));
        Norm { eps: config.norm_eps as f32, w, b }
    }

    /// `x_nd` → `y_nd`; `inv_n` is for the way back.
    pub fn forward(&self, params: &[f32], x_nd: &[f32], y_nd: &mut [f32], inv_n: &mut [f32]) {
        let w = self.w.of(params);
        match self.b {
            None => norm::forward(x_nd, w, self.eps, y_nd, inv_n),
            Some(b) => layer_norm::forward(x_nd, w, b.of(params), self.eps, y_nd, inv_n),
        }
    }

    /// *Adds* the input gradient to `d_x_nd` and, with `grads`, those of the parameters.
    pub fn backward(
        &self,
        params: &[f32],
        d_y_nd: &[f32],
        (x_nd, inv_n): (&[f32], &[f32]),
        d_x_nd: &mut [f32],
        grads: Option<&mut [f32]>,
    ) {
        let w = self.w.of(params);
        match self.b {
            None => {
                let d_w = grads.map(|grads| self.w.of_mut(grads));
                norm::backward(d_y_nd, x_nd, w, inv_n, d_x_nd, d_w);
            }
            Some(b) => {
                let both = grads.map(|grads| {
                    let (low, high) = grads.split_at_mut(b.offset);
                    (&mut low[self.w.range()], &mut high[..b.len()])
                });
                layer_norm::backward(d_y_nd, x_nd, w, inv_n, d_x_nd, both);
            }
        }
    }
}
