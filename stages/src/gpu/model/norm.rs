//! A norm over its places on the device; see [`crate::models::norm`].

use half::bf16;

use super::room::Room;
use crate::gpu::launch::{Buf, Gpu, Slice};
use crate::gpu::ops::norm as op;
use crate::gpu::weights::Bank;
use crate::models::norm;

/// Where factor and, of LayerNorm, offset lie.
#[derive(Clone, Copy)]
pub struct Norm {
    d: usize,
    eps: f32,
    w: Slice<f32>,
    b: Option<Slice<f32>>,
    d_w: Option<Slice<f32>>,
    d_b: Option<Slice<f32>>,
}

/// What the way back needs of each token.
pub struct Stats {
    inv_n: Buf<f32>,
    mean_n: Option<Buf<f32>>,
}

impl Norm {
    /// With gradients if `learn`.
    pub fn new(of: norm::Norm, bank: &Bank, learn: bool) -> Norm {
        let d = of.w.len();
        let full = |slot| bank.full(slot).range(0..d);
        let grad = |slot| learn.then(|| bank.grad(slot)).flatten().map(|g| g.range(0..d));
        Norm {
            d,
            eps: of.eps,
            w: full(of.w),
            b: of.b.map(full),
            d_w: grad(of.w),
            d_b: of.b.and_then(grad),
        }
    }

    /// Room for the statistics of `n` tokens.
    pub fn stats(&self, gpu: &Gpu, n: usize) -> anyhow::Result<Stats> {
        let mean = || gpu.alloc("means of norms", n);
        Ok(Stats {
            inv_n: gpu.alloc("factors of norms", n)?,
            mean_n: self.b.map(|_| mean()).transpose()?,
        })
    }

    fn params(&self) -> op::Norm {
        op::Norm { w: self.w, b: self.b, eps: self.eps }
    }

    /// `x_nd` → `y_nd`.
    pub fn forward(&self, gpu: &Gpu, n: usize, x_nd: Slice<bf16>, y_nd: Slice<bf16>, to: &Stats) {
        op::forward(gpu, (n, self.d), self.params(), x_nd, y_nd, Some(to.saved()));
    }

    /// `d_x_nd = residual_nd + ` the input's gradient, of `d_y_nd` and `d_y2_nd` together; adds
    /// those of the parameters.
    #[expect(clippy::too_many_arguments, reason = "a backward pass touches this many buffers")]
    pub fn backward(
        &self,
        gpu: &Gpu,
        n: usize,
        d_y_nd: Slice<bf16>,
        d_y2_nd: Option<Slice<bf16>>,
        (x_nd, stats): (Slice<bf16>, &Stats),
        residual_nd: Option<Slice<bf16>>,
        d_x_nd: Slice<bf16>,
        room: &Room,
    ) {
        let of = op::Gradients { d_y_nd, d_y2_nd, d_residual_nd: residual_nd, d_x_nd };
        let sums = self.d_w.map(|d_w| {
            let partials = room.partials.all();
            op::Sums { partials, d_w, d_b: self.d_b }
        });
        op::backward(gpu, (n, self.d), self.params(), x_nd, stats.saved(), of, sums);
    }
}

impl Stats {
    fn saved(&self) -> op::Saved {
        op::Saved { inv_n: self.inv_n.all(), mean_n: self.mean_n.as_ref().map(Buf::all) }
    }
}
