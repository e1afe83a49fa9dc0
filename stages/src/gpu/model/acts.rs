//! Activations of blocks: buffers that are made once for a batch of fixed size.

use anyhow::Result;
use half::bf16;

use super::attention;
use super::block::{Block, Mixer};
use super::mlp;
use super::norm::Stats;
use super::ssm;
use crate::gpu::launch::{Buf, Gpu, Slice};
use crate::gpu::ops::ssd;
use crate::ops::Dims;

/// Activations of a block.
pub struct Acts {
    /// Normed input of the mixer (side by side: of the MLP too).
    pub x1_nd: Buf<bf16>,
    pub(super) stats1: Stats,
    /// The mixer's own.
    pub mixer: MixerActs,
    /// The residual stream with the mixer's output.
    pub mid_nd: Buf<bf16>,
    pub(super) x2_nd: Option<Buf<bf16>>,
    pub(super) stats2: Option<Stats>,
    into_nw: Option<Buf<bf16>>,
    act_nf: Buf<bf16>,
}

/// Activations of a mixer.
pub enum MixerActs {
    /// Of attention.
    Attention(Attention),
    /// Of Discrete Mamba-2.
    Ssm(Box<Ssm>),
}

/// Buffers of attention.
pub struct Attention {
    qkv_nr: Buf<bf16>,
    lse_bhl: Buf<f32>,
    ctx_nd: Buf<bf16>,
}

/// Buffers of Discrete Mamba-2.
pub struct Ssm {
    proj_nr: Buf<bf16>,
    a_log_nh: Buf<f32>,
    xbc_nc: Buf<bf16>,
    y_nd: Option<Buf<bf16>>,
    gated_nd: Buf<bf16>,
    states: Option<Buf<bf16>>,
}

impl Attention {
    /// As ops take them.
    pub fn all(&self) -> attention::Acts {
        attention::Acts {
            qkv_nr: self.qkv_nr.all(),
            lse_bhl: self.lse_bhl.all(),
            ctx_nd: self.ctx_nd.all(),
        }
    }
}

impl Ssm {
    /// For `mixer` and `dims`; with what the way back needs if `back`.
    pub fn new(gpu: &Gpu, mixer: &ssm::Ssm, dims: Dims, back: bool) -> Result<Ssm> {
        let (n, what) = (dims.tokens(), "activations of a mixer");
        let states = ssd::states(dims, mixer.heads, mixer.width, mixer.state);
        let kept = |len: usize| back.then(|| gpu.alloc(what, len)).transpose();
        Ok(Ssm {
            proj_nr: gpu.alloc(what, n * mixer.rows)?,
            a_log_nh: gpu.alloc(what, n * mixer.a_stride())?,
            xbc_nc: gpu.alloc(what, n * mixer.channels())?,
            y_nd: kept(n * mixer.inner())?,
            gated_nd: gpu.alloc(what, n * mixer.inner())?,
            states: kept(states)?,
        })
    }

    /// As ops take them.
    pub fn all(&self) -> ssm::Acts {
        ssm::Acts {
            proj_nr: self.proj_nr.all(),
            a_log_nh: self.a_log_nh.all(),
            xbc_nc: self.xbc_nc.all(),
            y_nd: self.y_nd.as_ref().map(Buf::all),
            gated_nd: self.gated_nd.all(),
            states: self.states.as_ref().map(Buf::all),
        }
    }
}

impl Acts {
    /// For `block` and `dims`; with what the way back needs if `back`.
    pub fn new(gpu: &Gpu, block: &Block, dims: Dims, back: bool) -> Result<Acts> {
        let (n, d, what) = (dims.tokens(), block.d, "activations of a block");
        let wide = || gpu.alloc::<bf16>(what, n * d);
        let mixer = match &block.mixer {
            Mixer::Attention(mixer) => MixerActs::Attention(Attention {
                qkv_nr: gpu.alloc(what, n * mixer.heads.row())?,
                lse_bhl: gpu.alloc(what, n * mixer.heads.query)?,
                ctx_nd: gpu.alloc(what, n * mixer.heads.width())?,
            }),
            Mixer::Ssm(mixer) => MixerActs::Ssm(Box::new(Ssm::new(gpu, mixer, dims, back)?)),
        };
        let into = block.mlp.keeps_into(back).then_some(n * block.mlp.into.outputs);
        Ok(Acts {
            x1_nd: wide()?,
            stats1: block.norm1.stats(gpu, n)?,
            mixer,
            mid_nd: wide()?,
            x2_nd: block.norm2.map(|_| wide()).transpose()?,
            stats2: block.norm2.map(|norm| norm.stats(gpu, n)).transpose()?,
            into_nw: into.map(|len| gpu.alloc(what, len)).transpose()?,
            act_nf: gpu.alloc(what, n * block.mlp.ffn)?,
        })
    }

    /// The MLP's, as ops take them.
    pub fn mlp(&self) -> mlp::Acts {
        mlp::Acts { into_nw: self.into_nw.as_ref().map(Buf::all), act_nf: self.act_nf.all() }
    }

    /// Those of attention, if that is what the mixer is.
    pub fn attention(&self) -> Option<attention::Acts> {
        match &self.mixer {
            MixerActs::Attention(acts) => Some(acts.all()),
            MixerActs::Ssm(_) => None,
        }
    }

    /// What the MLP reads.
    pub(super) fn mlp_input(&self) -> Slice<bf16> {
        self.x2_nd.as_ref().unwrap_or(&self.x1_nd).all()
    }
}
