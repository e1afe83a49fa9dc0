//! The Discrete Mamba-2 mixer over its places on the device; see [`crate::models::ssm`].
//!
//! Rows of the projection are x | B | C | z | A_log, filled up with zeros. A_log is projected apart,
//! into f32: decays are sensitive. Its gradient is a column of the projection's.

use std::ops::Range;

use half::bf16;

use super::Scene;
use super::linear::Linear;
use super::room::Room;
use crate::gpu::gemm::{self, Epilogue, Mat};
use crate::gpu::launch::{Gpu, Slice};
use crate::gpu::ops::{conv, reduce, ssd};
use crate::gpu::weights::{Bank, rows};
use crate::models::linear;
use crate::models::ssm;
use crate::ops::Dims;

/// Sizes and places of a mixer.
#[derive(Clone, Copy)]
pub struct Ssm {
    /// Width of the model.
    pub d_model: usize,
    /// Heads.
    pub heads: usize,
    /// Width P of a head.
    pub width: usize,
    /// State size N of a head.
    pub state: usize,
    /// Taps of the convolution.
    pub taps: usize,
    /// Rows of the projection, filled up.
    pub rows: usize,
    /// Skip of each head.
    pub d_h: Slice<f32>,
    w: Slice<bf16>,
    d_w: Option<Slice<f32>>,
    pub(in crate::gpu) z_bias: Slice<f32>,
    pub(in crate::gpu) conv_w: Slice<f32>,
    pub(in crate::gpu) conv_b: Slice<f32>,
    pub(in crate::gpu) out: Linear,
    d_z_bias: Option<Slice<f32>>,
    d_conv_w: Option<Slice<f32>>,
    d_conv_b: Option<Slice<f32>>,
    d_d_h: Option<Slice<f32>>,
}

/// Activations of a mixer.
#[derive(Clone, Copy)]
pub struct Acts {
    /// Before the convolution, `[n, rows]`.
    pub proj_nr: Slice<bf16>,
    /// A_log, `[n, heads filled up]`.
    pub a_log_nh: Slice<f32>,
    /// x, B, C after the convolution, `[n, channels]`.
    pub xbc_nc: Slice<bf16>,
    /// Scan and skip before the gate, for the way back.
    pub y_nd: Option<Slice<bf16>>,
    /// What the output projection reads.
    pub gated_nd: Slice<bf16>,
    /// States that enter chunks, for the way back.
    pub states: Option<Slice<bf16>>,
}

impl Ssm {
    /// With gradients if `learn`.
    pub fn new(of: &ssm::Ssm, bank: &Bank, learn: bool) -> Ssm {
        let full = |slot: crate::models::Slot| bank.full(slot).range(0..slot.len());
        let grad = |slot: crate::models::Slot| {
            learn.then(|| bank.grad(slot)).flatten().map(|g| g.range(0..slot.len()))
        };
        let out = linear::Linear { w: of.out, b: None };
        Ssm {
            d_model: of.in_proj.cols,
            heads: of.a_log.rows,
            width: of.out.cols / of.a_log.rows,
            state: of.bc.rows / 2 / of.a_log.rows,
            taps: of.conv.cols,
            rows: rows(of),
            d_h: full(of.d),
            w: bank.half(of.in_proj),
            d_w: learn.then(|| bank.grad(of.in_proj)).flatten(),
            z_bias: full(of.z_bias),
            conv_w: full(of.conv),
            conv_b: full(of.conv_bias),
            out: Linear::new(out, bank, learn),
            d_z_bias: grad(of.z_bias),
            d_conv_w: grad(of.conv),
            d_conv_b: grad(of.conv_bias),
            d_d_h: grad(of.d),
        }
    }

    /// Width of all heads.
    pub fn inner(&self) -> usize {
        self.heads * self.width
    }

    /// Channels of x, B and C together.
    pub fn channels(&self) -> usize {
        self.inner() + 2 * self.heads * self.state
    }

    /// Column of A_log in a row of the projection.
    pub fn a_at(&self) -> usize {
        self.channels() + self.inner()
    }

    /// Heads filled up.
    pub fn a_stride(&self) -> usize {
        self.rows - self.a_at()
    }

    /// Column of B in x | B | C.
    pub fn b_at(&self) -> usize {
        self.inner()
    }

    /// Column of C.
    pub fn c_at(&self) -> usize {
        self.inner() + self.heads * self.state
    }

    fn shape(&self, scene: Scene) -> ssd::Shape {
        ssd::Shape {
            batch: scene.dims.batch,
            seq: scene.dims.seq,
            heads: self.heads,
            width: self.width,
            state: self.state,
            proj_stride: self.rows,
            a_stride: self.a_stride(),
        }
    }

    /// For the convolution's kernels.
    pub fn conv_shape(&self, dims: Dims) -> conv::Shape {
        conv::Shape { dims, channels: self.channels(), taps: self.taps, stride: self.rows }
    }

    fn convolve(&self, gpu: &Gpu, scene: Scene, acts: Acts, range: Range<usize>) {
        let (shape, params) = (self.conv_shape(scene.dims), (self.conv_w, self.conv_b));
        let (from, to) = (acts.proj_nr, acts.xbc_nc);
        conv::forward(gpu, shape, range, from, params, scene.starts_n, to);
    }

    /// Columns `range` of the projection.
    pub(in crate::gpu) fn project(
        &self,
        gpu: &Gpu,
        n: usize,
        x: Mat,
        acts: Acts,
        range: Range<usize>,
    ) {
        let d = self.d_model;
        let w = self.w.from(range.start * d);
        let to = Mat::new(acts.proj_nr, self.rows).column(range.start);
        let dims = (n, d, range.len());
        gemm::linear(gpu, "ssm.in", dims, (x, to), w, (None, Epilogue::None));
    }

    pub(in crate::gpu) fn project_a(&self, gpu: &Gpu, n: usize, x: Mat, acts: Acts) {
        let (d, stride) = (self.d_model, self.a_stride());
        let w = self.w.from(self.a_at() * d);
        gemm::linear_f32(gpu, "ssm.a_log", (n, d, stride), x, w, (acts.a_log_nh, stride));
    }

    /// `out = add + mixer(x)`.
    pub fn forward(&self, gpu: &Gpu, scene: Scene, x: Mat, acts: Acts, (out, add): (Mat, Mat)) {
        let n = scene.dims.tokens();
        self.project(gpu, n, x, acts, 0..self.a_at());
        self.project_a(gpu, n, x, acts);
        self.convolve(gpu, scene, acts, 0..self.channels());
        let to = ssd::Out {
            gated_nd: acts.gated_nd,
            y_nd: acts.y_nd,
            states: acts.states,
            last_state: None,
        };
        ssd::forward(gpu, self.shape(scene), self.scan_inputs(scene, acts), to);
        let gated = Mat::new(acts.gated_nd, self.inner());
        self.out.forward(gpu, "ssm.out", n, (gated, out), Some(add));
    }

    fn scan_inputs(&self, scene: Scene, acts: Acts) -> ssd::Inputs {
        ssd::Inputs {
            xbc_nc: acts.xbc_nc,
            proj_nr: acts.proj_nr,
            a_log_nh: acts.a_log_nh,
            d_h: self.d_h,
            z_bias: self.z_bias,
            starts_n: scene.starts_n,
        }
    }

    /// What phase 1 compares: B, C after the convolution and A_log; nothing else is computed.
    pub fn forward_matrix(&self, gpu: &Gpu, scene: Scene, x: Mat, acts: Acts) {
        let n = scene.dims.tokens();
        let range = self.b_at()..self.channels();
        self.project(gpu, n, x, acts, range.clone());
        self.project_a(gpu, n, x, acts);
        self.convolve(gpu, scene, acts, range);
    }

    /// From the output's gradient to the normed input's (`d_x`, if wanted); adds those of the
    /// parameters.
    pub fn backward(
        &self,
        gpu: &Gpu,
        scene: Scene,
        (x, acts): (Mat, Acts),
        d_out: Mat,
        d_x: Option<Mat>,
        room: &Room,
    ) {
        let n = scene.dims.tokens();
        let gated = Mat::new(acts.gated_nd, self.inner());
        self.out.backward_weight(gpu, "ssm.out.dw", n, (d_out, gated), room);
        let d_gated = Mat::new(room.d_gated_nd.all(), self.inner());
        self.out.backward_input(gpu, "ssm.out.dx", n, (d_out, d_gated), false);
        self.backward_scan(gpu, scene, acts, room);
        self.backward_conv(gpu, scene, acts, 0..self.channels(), None, room);
        let (d, d_proj) = (self.d_model, Mat::new(room.d_proj_nr.all(), self.rows));
        if let Some(d_w) = self.d_w {
            gemm::linear_dw(gpu, "ssm.in.dw", (n, d, self.rows), d_proj, x, d_w);
        }
        if let Some(d_x) = d_x {
            gemm::linear_dx(gpu, "ssm.in.dx", (n, d, self.rows), d_proj, self.w, d_x, false);
        }
    }

    fn backward_scan(&self, gpu: &Gpu, scene: Scene, acts: Acts, room: &Room) {
        let (batch, inner) = (scene.dims.batch, self.inner());
        let parts = room.partials.all();
        let z_parts = parts.range(0..batch * inner);
        let d_parts = parts.range(batch * inner..batch * (inner + self.heads));
        let saved = ssd::Saved {
            y_nd: acts.y_nd.expect("a pass that goes back keeps it"),
            states: acts.states.expect("a pass that goes back keeps it"),
        };
        let to = ssd::Grads {
            d_xbc_nc: room.d_xbc_nc.all(),
            d_proj_nr: room.d_proj_nr.all(),
            d_z_bias_parts: z_parts,
            d_d_parts: d_parts,
        };
        let inputs = self.scan_inputs(scene, acts);
        ssd::backward(gpu, self.shape(scene), room.d_gated_nd.all(), inputs, saved, to);
        if let Some(to) = self.d_z_bias {
            reduce::reduce_rows(gpu, batch, z_parts, (to, None), 1.0, true);
        }
        if let Some(to) = self.d_d_h {
            reduce::reduce_rows(gpu, batch, d_parts, (to, None), 1.0, true);
        }
    }

    fn backward_conv(
        &self,
        gpu: &Gpu,
        scene: Scene,
        acts: Acts,
        range: Range<usize>,
        factor_bh: Option<Slice<f32>>,
        room: &Room,
    ) {
        let (inner, heads, state) = (self.inner(), self.heads, self.state);
        let factor = factor_bh.map(|factor_bh| conv::Factor { factor_bh, inner, heads, state });
        let sums = self.d_conv_w.zip(self.d_conv_b).map(|(d_w_ck, d_bias_c)| {
            let partials = room.partials.all();
            conv::Sums { partials, d_w_ck, d_bias_c }
        });
        let forward = (acts.proj_nr, self.conv_w, scene.starts_n);
        let (shape, d_xbc, d_proj) =
            (self.conv_shape(scene.dims), room.d_xbc_nc.all(), room.d_proj_nr.all());
        conv::backward(gpu, shape, range, d_xbc, forward, factor, d_proj, sums);
    }

    /// From unscaled gradients of B and C in `room.d_xbc_nc` and those of A_log in
    /// `room.d_proj_nr` to the parameters': the end of phase 1's way back.
    pub fn backward_matrix(
        &self,
        gpu: &Gpu,
        scene: Scene,
        (x, acts): (Mat, Acts),
        factor_bh: Slice<f32>,
        room: &Room,
    ) {
        let (n, d) = (scene.dims.tokens(), self.d_model);
        let range = self.b_at()..self.channels();
        self.backward_conv(gpu, scene, acts, range.clone(), Some(factor_bh), room);
        let Some(d_w) = self.d_w else { return };
        let d_proj = Mat::new(room.d_proj_nr.all(), self.rows);
        for (at, count) in [(range.start, range.len()), (self.a_at(), self.a_stride())] {
            let (dy, to) = (d_proj.column(at), d_w.from(at * d));
            gemm::linear_dw(gpu, "ssm.in.dw", (n, d, count), dy, x, to);
        }
    }

    /// Where the gradient of the skip is added to.
    pub fn d_d_h(&self) -> Option<Slice<f32>> {
        self.d_d_h
    }
}
