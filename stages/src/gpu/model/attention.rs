//! The attention mixer over its places on the device; see [`crate::models::attention`].

use half::bf16;

use super::Scene;
use super::linear::Linear;
use super::room::Room;
use crate::gpu::gemm::Mat;
use crate::gpu::launch::{Gpu, Slice};
use crate::gpu::ops::{attention as op, rope};
use crate::gpu::weights::Bank;
use crate::models::attention;
use crate::ops::attention::Heads;

/// Sizes and places of an attention mixer.
#[derive(Clone, Copy)]
pub struct Attention {
    /// Sizes of the heads.
    pub heads: Heads,
    /// q, k and v projections as one.
    pub qkv: Linear,
    /// The output projection.
    pub o: Linear,
}

/// Activations of an attention mixer.
#[derive(Clone, Copy)]
pub struct Acts {
    /// Rows of q heads, k heads, v heads; q and k rotated.
    pub qkv_nr: Slice<bf16>,
    /// Log-sum-exp of every row of scaled scores, `[batch, head, seq]`.
    pub lse_bhl: Slice<f32>,
    /// A·v, `[n, heads · dim]`.
    pub ctx_nd: Slice<bf16>,
}

impl Attention {
    /// With gradients if `learn`.
    pub fn new(of: &attention::Attention, bank: &Bank, learn: bool) -> Attention {
        Attention {
            heads: of.heads(),
            qkv: Linear::new(of.qkv, bank, learn),
            o: Linear::new(of.o, bank, learn),
        }
    }

    fn turn(&self, gpu: &Gpu, scene: Scene, qkv_nr: Slice<bf16>, back: bool) {
        let (n, turned) = (scene.dims.tokens(), self.heads.query + self.heads.kv);
        let at = rope::Positions { seq: scene.dims.seq, first: 0, before: None };
        rope::rope(gpu, (qkv_nr, self.heads.row()), n, turned, scene.rope, at, back);
    }

    /// `out = add + mixer(x)`.
    pub fn forward(&self, gpu: &Gpu, scene: Scene, x: Mat, acts: Acts, (out, add): (Mat, Mat)) {
        let (n, width) = (scene.dims.tokens(), self.heads.width());
        let qkv = Mat::new(acts.qkv_nr, self.heads.row());
        self.qkv.forward(gpu, "attention.qkv", n, (x, qkv), None);
        self.turn(gpu, scene, acts.qkv_nr, false);
        let (rows, to) = ((acts.qkv_nr, self.heads.row()), (acts.ctx_nd, width));
        let lse_bhl = acts.lse_bhl.range(0..n * self.heads.query);
        op::forward(gpu, scene.dims, self.heads, scene.starts_n, rows, to, lse_bhl);
        let ctx = Mat::new(acts.ctx_nd, width);
        self.o.forward(gpu, "attention.o", n, (ctx, out), Some(add));
    }

    /// See [`super::ssm::Ssm::backward`].
    pub fn backward(
        &self,
        gpu: &Gpu,
        scene: Scene,
        (x, acts): (Mat, Acts),
        d_out: Mat,
        d_x: Option<Mat>,
        room: &Room,
    ) {
        let (n, width) = (scene.dims.tokens(), self.heads.width());
        let ctx = Mat::new(acts.ctx_nd, width);
        self.o.backward_weight(gpu, "attention.o.dw", n, (d_out, ctx), room);
        let d_ctx = Mat::new(room.d_ctx_nd.all(), width);
        self.o.backward_input(gpu, "attention.o.dx", n, (d_out, d_ctx), false);
        let back = op::Back {
            qkv_nr: (acts.qkv_nr, self.heads.row()),
            ctx_nd: (acts.ctx_nd, width),
            lse_bhl: acts.lse_bhl,
            delta_bhl: room.delta_bhl.all(),
        };
        let d_qkv = room.d_qkv_nr.all();
        let (d_ctx_nd, d_rows) = ((d_ctx.at, width), (d_qkv, self.heads.row()));
        op::backward(gpu, scene.dims, self.heads, scene.starts_n, d_ctx_nd, back, d_rows);
        self.turn(gpu, scene, d_qkv, true);
        let d_qkv = Mat::new(d_qkv, self.heads.row());
        self.qkv.backward_weight(gpu, "attention.qkv.dw", n, (d_qkv, x), room);
        if let Some(d_x) = d_x {
            self.qkv.backward_input(gpu, "attention.qkv.dx", n, (d_qkv, d_x), false);
        }
    }
}
