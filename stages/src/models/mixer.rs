//! The seam between a block and its sequence mixer: every kind declares its tensors and runs
//! forward and backward over its own buffers. A new kind is one arm of each enum.

use super::attention::{self, Attention};
use super::config::{Config, MixerKind};
use super::params::Builder;
use super::ssm::{self, Ssm};
use crate::ops::Dims;
use crate::ops::rope::Table;

/// What all mixers of a pass see besides their own input.
#[derive(Clone, Copy)]
pub struct Scene<'a> {
    /// Batch and length of the shard.
    pub dims: Dims,
    /// Position of each token's document start, see [`crate::ops`].
    pub starts_n: &'a [u32],
    /// Rotary tables of the model.
    pub rope: &'a Table,
}

/// A sequence mixer: which parameters, not their values.
pub enum Mixer {
    /// Causal softmax attention.
    Attention(Attention),
    /// Discrete Mamba-2.
    Ssm(Ssm),
}

/// Activations of one mixer that its backward pass (or phase 1) needs.
pub enum Saved {
    /// Of attention: rotated q and k, A, log-sum-exp.
    Attention(attention::Saved),
    /// Of Discrete Mamba-2: projections, decays, states.
    Ssm(Box<ssm::Saved>),
}

/// Buffers that all mixers of a pass share, one after the other.
#[derive(Default)]
pub struct Scratch {
    attention: Option<attention::Scratch>,
    ssm: Option<ssm::Scratch>,
}

impl Saved {
    /// Those of attention, if that is what it is.
    pub fn attention(&self) -> Option<&attention::Saved> {
        match self {
            Saved::Attention(saved) => Some(saved),
            Saved::Ssm(_) => None,
        }
    }
}

impl Mixer {
    /// Declares the tensors of layer `layer`, named `{prefix}….weight`.
    pub fn declare(config: &Config, layer: usize, prefix: &str, builder: &mut Builder) -> Mixer {
        match config.layers[layer] {
            MixerKind::Attention => {
                Mixer::Attention(Attention::declare(config, layer, prefix, builder))
            }
            MixerKind::Ssm => Mixer::Ssm(Ssm::declare(config, layer, prefix, builder)),
        }
    }

    /// What it is.
    pub fn kind(&self) -> MixerKind {
        match self {
            Mixer::Attention(_) => MixerKind::Attention,
            Mixer::Ssm(_) => MixerKind::Ssm,
        }
    }

    /// Buffers for `dims`; attention keeps its matrices only if `matrices`.
    pub fn saved(&self, dims: Dims, matrices: bool) -> Saved {
        match self {
            Mixer::Attention(mixer) => Saved::Attention(mixer.saved(dims, matrices)),
            Mixer::Ssm(mixer) => Saved::Ssm(Box::new(mixer.saved(dims))),
        }
    }

    /// Makes sure that `scratch` has what this kind's backward pass needs.
    pub fn reserve(&self, dims: Dims, scratch: &mut Scratch) {
        match self {
            Mixer::Attention(mixer) => {
                scratch.attention.get_or_insert_with(|| mixer.scratch(dims));
            }
            Mixer::Ssm(mixer) => {
                scratch.ssm.get_or_insert_with(|| mixer.scratch(dims));
            }
        }
    }

    /// *Adds* the mixer's output for the normed input `x_nd` to `out_nd` (which holds the residual
    /// stream, or zeros). `params` is the flat buffer.
    pub fn forward(
        &self,
        params: &[f32],
        scene: Scene,
        x_nd: &[f32],
        out_nd: &mut [f32],
        saved: &mut Saved,
    ) {
        match (self, saved) {
            (Mixer::Attention(mixer), Saved::Attention(saved)) => {
                mixer.forward(params, scene, x_nd, out_nd, saved);
            }
            (Mixer::Ssm(mixer), Saved::Ssm(saved)) => {
                mixer.forward(params, scene, x_nd, out_nd, saved);
            }
            _ => unreachable!("a mixer met the buffers of another kind"),
        }
    }

    /// From the gradient of the output to that of the normed input (`d_x_nd`, overwritten) and,
    /// if `grads` is given, to those of the mixer's parameters (added to the flat buffer).
    #[expect(clippy::too_many_arguments, reason = "a backward pass touches this many buffers")]
    pub fn backward(
        &self,
        params: &[f32],
        scene: Scene,
        x_nd: &[f32],
        d_out_nd: &[f32],
        d_x_nd: &mut [f32],
        saved: &mut Saved,
        scratch: &mut Scratch,
        grads: Option<&mut [f32]>,
    ) {
        match (self, saved) {
            (Mixer::Attention(mixer), Saved::Attention(saved)) => {
                let scratch = scratch.attention.as_mut().expect("reserved for every mixer");
                mixer.backward(params, scene, x_nd, d_out_nd, d_x_nd, saved, scratch, grads);
            }
            (Mixer::Ssm(mixer), Saved::Ssm(saved)) => {
                let scratch = scratch.ssm.as_mut().expect("reserved for every mixer");
                mixer.backward(params, scene, x_nd, d_out_nd, d_x_nd, saved, scratch, grads);
            }
            _ => unreachable!("a mixer met the buffers of another kind"),
        }
    }
}
