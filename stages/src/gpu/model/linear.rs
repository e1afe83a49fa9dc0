//! A linear map over its places on the device; see [`crate::models::linear`].

use half::bf16;

use super::room::Room;
use crate::gpu::gemm::{self, Epilogue, Mat};
use crate::gpu::launch::{Gpu, Slice};
use crate::gpu::ops::reduce;
use crate::gpu::weights::Bank;
use crate::models::linear;

/// Where weight and bias lie.
#[derive(Clone, Copy)]
pub struct Linear {
    /// Input width.
    pub inputs: usize,
    /// Output width.
    pub outputs: usize,
    /// The weight.
    pub w: Slice<bf16>,
    /// The bias as products add it.
    pub b: Option<Slice<bf16>>,
    /// The bias as everything else adds it.
    pub full_b: Option<Slice<f32>>,
    d_w: Option<Slice<f32>>,
    d_b: Option<Slice<f32>>,
}

impl Linear {
    /// With gradients if `learn`.
    pub fn new(of: linear::Linear, bank: &Bank, learn: bool) -> Linear {
        let grad = |slot| learn.then(|| bank.grad(slot)).flatten();
        Linear {
            inputs: of.inputs(),
            outputs: of.outputs(),
            w: bank.half(of.w),
            b: of.b.map(|b| bank.half(b)),
            full_b: of.b.map(|b| bank.full(b)),
            d_w: grad(of.w),
            d_b: of.b.and_then(grad),
        }
    }

    fn dims(&self, n: usize) -> (usize, usize, usize) {
        (n, self.inputs, self.outputs)
    }

    /// `y = x Wᵀ + b`, and `add` added to that.
    pub fn forward(
        &self,
        gpu: &Gpu,
        name: &'static str,
        n: usize,
        (x, y): (Mat, Mat),
        add: Option<Mat>,
    ) {
        let bias = self.b.map_or(Epilogue::None, |b| Epilogue::Bias(b.address()));
        gemm::linear(gpu, name, self.dims(n), (x, y), self.w, (add, bias));
    }

    /// `y = gelu(x Wᵀ + b)`.
    pub fn forward_gelu(&self, gpu: &Gpu, name: &'static str, n: usize, (x, y): (Mat, Mat)) {
        let bias = self.b.expect("GELU follows a bias").address();
        gemm::linear(gpu, name, self.dims(n), (x, y), self.w, (None, Epilogue::GeluBias(bias)));
    }

    /// The input's gradient, added to what is there if `add`.
    pub fn backward_input(
        &self,
        gpu: &Gpu,
        name: &'static str,
        n: usize,
        (dy, dx): (Mat, Mat),
        add: bool,
    ) {
        gemm::linear_dx(gpu, name, self.dims(n), dy, self.w, dx, add);
    }

    /// Adds the gradients of weight and bias, where they are trained.
    pub fn backward_weight(
        &self,
        gpu: &Gpu,
        name: &'static str,
        n: usize,
        (dy, x): (Mat, Mat),
        room: &Room,
    ) {
        if let Some(d_w) = self.d_w {
            gemm::linear_dw(gpu, name, self.dims(n), dy, x, d_w);
        }
        if let Some(d_b) = self.d_b {
            let d_b = d_b.range(0..self.outputs);
            reduce::column_sums(gpu, n, (dy.at, dy.stride), room.partials.all(), d_b);
        }
    }
}
