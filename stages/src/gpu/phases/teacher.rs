//! The teacher on the device: alongside, one pass for all layers, or from cached signals.

use anyhow::Result;
use half::bf16;

use crate::gpu::batch::Batch;
use crate::gpu::launch::{Buf, Gpu, Slice};
use crate::gpu::model::Scene;
use crate::gpu::model::whole::{Angles, Forward, Whole, check};
use crate::gpu::weights::{Bank, Frozen};
use crate::models::{Model, Params, Trained};
use crate::ops::Dims;
use crate::ops::attention::Heads;

/// A model that only goes forward.
pub struct Teacher {
    /// Its pass.
    pub forward: Forward,
    /// Its parameters.
    pub weights: Frozen,
    /// Sizes of its heads.
    pub heads: Heads,
    angles: Angles,
}

/// What a layer in training sees of the teacher.
#[derive(Clone, Copy)]
pub struct Seen {
    /// The layer's number.
    pub layer: usize,
    /// Residual stream before the block.
    pub u_nd: Slice<bf16>,
    /// Residual stream after it.
    pub next_nd: Slice<bf16>,
    /// The block's normed input, where the teacher made it.
    pub x1_nd: Option<Slice<bf16>>,
    /// Residual stream with the mixer's output, likewise.
    pub mid_nd: Option<Slice<bf16>>,
    /// Rotated q, then k, in rows `stride` apart.
    pub qkv_nr: Slice<bf16>,
    /// The distance.
    pub stride: usize,
    /// Log-sum-exp of the scaled scores.
    pub lse_bhl: Slice<f32>,
}

/// What a teacher that is visited has to be made with: a layer in training reads what one block made
/// while the next one runs.
pub const TURNS: usize = 2;

/// Frozen everywhere.
pub const FROZEN: Trained = Trained {
    embedding: false,
    norms: false,
    mixers: false,
    attention: false,
    mlps: false,
    head: false,
};

impl Teacher {
    /// Uploads `params` of `model`, with room for passes of `dims`; `turns` as in [`Forward::new`].
    pub fn new(
        gpu: &Gpu,
        model: &Model,
        params: &Params,
        dims: Dims,
        turns: usize,
    ) -> Result<Teacher> {
        check(&model.config)?;
        let weights = Frozen::new(gpu, model, &params.flat)?;
        let whole = Whole::new(model, &weights.bank, FROZEN);
        let config = &model.config;
        let heads = Heads { query: config.heads, kv: config.kv_heads, dim: config.head_dim };
        Ok(Teacher {
            forward: Forward::new(gpu, whole, dims, turns)?,
            weights,
            heads,
            angles: Angles::new(gpu, model, dims.seq)?,
        })
    }

    /// Its parameters.
    pub fn bank(&self) -> &Bank {
        &self.weights.bank
    }

    /// What all blocks see of `batch`.
    pub fn scene(&self, batch: &Batch) -> Scene {
        Scene { dims: batch.dims(), starts_n: batch.starts_n(), rope: self.angles.all() }
    }

    /// Runs `batch` through the first `count` blocks; `visit` sees each with attention. Unless
    /// `whole`, the last block's output is not wanted and not made. What `visit` queues runs beside
    /// the teacher's next block.
    pub fn visit(
        &self,
        gpu: &Gpu,
        batch: &Batch,
        (count, whole): (usize, bool),
        mut visit: impl FnMut(Seen),
    ) {
        let (scene, mut beside) = (self.scene(batch), Vec::new());
        self.forward.begin(gpu, batch);
        for layer in 0..count {
            if let Some(before) = layer.checked_sub(TURNS) {
                gpu.after(&beside[before]);
            }
            let (u_nd, next_nd, acts) = match whole || layer + 1 < count {
                true => self.forward.block(gpu, scene, layer),
                false => self.forward.mixer(gpu, scene, layer),
            };
            // The layer in training beside the teacher's next one.
            beside.push(gpu.beside(|| {
                if let Some(attention) = acts.attention() {
                    visit(Seen {
                        layer,
                        u_nd,
                        next_nd,
                        x1_nd: Some(acts.x1_nd.all()),
                        mid_nd: Some(acts.mid_nd.all()),
                        qkv_nr: attention.qkv_nr,
                        stride: self.heads.row(),
                        lse_bhl: attention.lse_bhl,
                    });
                }
            }));
        }
        beside.iter().for_each(|work| gpu.after(work));
    }
}

/// Buffers for one layer's cached signals.
pub struct Cached {
    u_nd: Buf<bf16>,
    next_nd: Buf<bf16>,
    qk_nr: Buf<bf16>,
    lse_bhl: Buf<f32>,
    stride: usize,
}

impl Cached {
    /// Room for `dims` of a teacher with `heads` and width `d`.
    pub fn new(gpu: &Gpu, heads: Heads, d: usize, dims: Dims) -> Result<Cached> {
        let (n, stride) = (dims.tokens(), (heads.query + heads.kv) * heads.dim);
        Ok(Cached {
            u_nd: gpu.alloc("cached hidden states", n * d)?,
            next_nd: gpu.alloc("cached hidden states", n * d)?,
            qk_nr: gpu.alloc("cached queries and keys", n * stride)?,
            lse_bhl: gpu.alloc("cached log-sum-exps", n * heads.query)?,
            stride,
        })
    }

    /// Uploads one layer's signals, those that are given; waits for it.
    pub fn send(&self, gpu: &Gpu, layer: usize, signals: &crate::train::source::Layer) -> Seen {
        let half = |to: &Buf<bf16>, values: &[f32]| {
            let values: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
            gpu.upload(to.all().range(0..values.len()), &values);
        };
        half(&self.u_nd, &signals.u_nd);
        half(&self.next_nd, &signals.next_nd);
        half(&self.qk_nr, &signals.qk_nr);
        gpu.upload(self.lse_bhl.all().range(0..signals.lse_bhl.len()), &signals.lse_bhl);
        Seen {
            layer,
            u_nd: self.u_nd.all(),
            next_nd: self.next_nd.all(),
            x1_nd: None,
            mid_nd: None,
            qkv_nr: self.qk_nr.all(),
            stride: self.stride,
            lse_bhl: self.lse_bhl.all(),
        }
    }
}
