//! The Discrete Mamba-2 mixer: projections, convolution, scan and gate, forward and backward.
//!
//! ```text
//! [x|B|C|z|A_log] = in_proj n      x, B, C pass a causal convolution, without activation
//! y = scan(x, B, C, sigmoid(−A_log)) + D x,      out = out_proj(y · SiLU(z + z_bias))
//! ```
//!
//! `in_proj` is five parameters in memory and one tensor in files. Sources: MOHAWK (2408.10189)
//! and goombalab/phi-mamba at b2e405f for names and shapes.

use super::config::Config;
use super::mixer::Scene;
use super::params::{Builder, Init, Part, Piece, Slot};
use crate::ops::gemm::{Mat, gemm, linear, linear_add, linear_dw, linear_dx};
use crate::ops::vector::{sigmoid, vectorised};
use crate::ops::{Dims, conv, gate, many, orient, ssd};

/// SiLU of this is 1: an open gate.
const OPEN: f32 = 1.278_464_5;

/// Slots of a Discrete Mamba-2 mixer.
#[derive(Clone, Debug)]
pub struct Ssm {
    d_model: usize,
    heads: usize,
    width: usize,
    state: usize,
    taps: usize,
    chunk: usize,
    /// x, B, C, z and A_log rows as one matrix.
    pub in_proj: Slot,
    /// Rows of B and C.
    pub bc: Slot,
    /// Rows of A_log, one a head.
    pub a_log: Slot,
    /// Rows of z, which make the gate.
    pub z: Slot,
    /// Added to z before the gate.
    pub z_bias: Slot,
    /// `[channels of x, B, C; taps]`, oldest tap first.
    pub conv: Slot,
    /// One a channel.
    pub conv_bias: Slot,
    /// The skip, one a head.
    pub d: Slot,
    /// The output projection.
    pub out: Slot,
}

/// Activations that the backward passes and phase 1 need.
pub struct Saved {
    /// Rows x, B, C, z, A_log before the convolution.
    pub proj_nr: Vec<f32>,
    /// Rows x, B, C after the convolution.
    pub xbc_nc: Vec<f32>,
    /// Decays, `[heads, tokens]`.
    pub a_hn: Vec<f32>,
    y_nd: Vec<f32>,
    gated_nd: Vec<f32>,
    states: Vec<f32>,
    taps: Vec<f32>,
    scan: ssd::Scratch,
}

/// Buffers of the backward passes, shared by all mixers.
pub struct Scratch {
    d_proj_nr: Vec<f32>,
    d_xbc_nc: Vec<f32>,
    d_gated_nd: Vec<f32>,
    dy_nd: Vec<f32>,
    d_log_a_hn: Vec<f32>,
    taps: Vec<f32>,
    scan: ssd::Scratch,
    orient: orient::Scratch,
}

/// State of decoding: the last inputs of the convolution and the scan's state. Its size depends on
/// no text.
#[derive(Clone, Debug)]
pub struct State {
    window: Vec<f32>,
    scan: Vec<f32>,
}

impl State {
    /// Bytes held.
    pub fn bytes(&self) -> usize {
        (self.window.capacity() + self.scan.capacity()) * size_of::<f32>()
    }
}

impl Ssm {
    /// Declares `{prefix}{in_proj.weight, z_bias, conv1d.weight, conv1d.bias, D, out_proj.weight}`
    /// with the start that training begins from: identity convolution, open gate, D = 0.
    pub fn declare(config: &Config, layer: usize, prefix: &str, builder: &mut Builder) -> Ssm {
        let (d, inner, heads) = (config.d_model, config.d_inner(), config.heads);
        let (state, taps, part) = (config.d_state, config.d_conv, Part::Mixer(layer));
        let linear = Init::Uniform(1.0 / (d as f32).sqrt());
        let piece = |suffix, rows, init| Piece { suffix, rows, decay: suffix != ".A_log", init };
        let pieces = [
            piece(".x", inner, linear),
            piece(".B", heads * state, linear),
            piece(".C", heads * state, linear),
            piece(".z", inner, Init::Constant(0.0)),
            piece(".A_log", heads, linear),
        ];
        let rows = pieces.iter().map(|piece| piece.rows).sum();
        let name = format!("{prefix}in_proj.weight");
        let [x, b, c, z, a_log] = builder.joined(name, vec![rows, d], d, part, &pieces)[..] else {
            unreachable!("five pieces were given")
        };
        let channels = inner + 2 * heads * state;
        let mut vector = |name: &str, len, value| {
            builder.vector(format!("{prefix}{name}"), len, part, Init::Constant(value))
        };
        let z_bias = vector("z_bias", inner, OPEN);
        let conv_bias = vector("conv1d.bias", channels, 0.0);
        let skip = vector("D", heads, 0.0);
        let kernel = Piece { suffix: "", rows: channels, decay: false, init: Init::LastTap };
        let name = format!("{prefix}conv1d.weight");
        let conv = builder.joined(name, vec![channels, 1, taps], taps, part, &[kernel])[0];
        // Kaiming uniform with a = √5, over the root of the depth as GPT-2 rescales.
        let bound = 1.0 / ((inner * config.layers.len()) as f32).sqrt();
        let name = format!("{prefix}out_proj.weight");
        let out = builder.matrix(name, d, inner, part, Init::Uniform(bound));
        Ssm {
            d_model: d,
            heads,
            width: config.head_dim,
            state,
            taps,
            chunk: config.chunk,
            in_proj: x.join(b).join(c).join(z).join(a_log),
            bc: b.join(c),
            a_log,
            z,
            z_bias,
            conv,
            conv_bias,
            d: skip,
            out,
        }
    }

    /// Sizes of the scan of `dims`.
    pub fn shape(&self, dims: Dims) -> ssd::Shape {
        let Ssm { heads, width, state, chunk, .. } = *self;
        ssd::Shape { batch: dims.batch, seq: dims.seq, heads, width, state, chunk }
    }

    fn inner(&self) -> usize {
        self.heads * self.width
    }

    fn channels(&self) -> usize {
        self.conv.rows
    }

    /// Columns of z and of A_log in a row of the projection.
    fn z_at(&self) -> usize {
        self.channels()
    }

    fn a_log_at(&self) -> usize {
        self.channels() + self.inner()
    }

    fn conv_shape(&self, dims: Dims) -> conv::Shape {
        let stride = self.in_proj.rows;
        conv::Shape { dims, channels: self.channels(), taps: self.taps, stride }
    }

    fn gate_shape(&self, tokens: usize) -> gate::Shape {
        gate::Shape {
            tokens,
            heads: self.heads,
            width: self.width,
            x_stride: self.channels(),
            z_stride: self.in_proj.rows,
        }
    }

    /// Buffers for `dims`.
    pub fn saved(&self, dims: Dims) -> Saved {
        let (n, shape) = (dims.tokens(), self.shape(dims));
        Saved {
            proj_nr: vec![0.0; n * self.in_proj.rows],
            xbc_nc: vec![0.0; n * self.channels()],
            a_hn: vec![0.0; n * self.heads],
            y_nd: vec![0.0; n * self.inner()],
            gated_nd: vec![0.0; n * self.inner()],
            states: vec![0.0; shape.states()],
            taps: vec![0.0; self.conv.len()],
            scan: ssd::Scratch::new(shape),
        }
    }

    /// Buffers for the backward passes of `dims`.
    pub fn scratch(&self, dims: Dims) -> Scratch {
        let n = dims.tokens();
        Scratch {
            d_proj_nr: vec![0.0; n * self.in_proj.rows],
            d_xbc_nc: vec![0.0; n * self.channels()],
            d_gated_nd: vec![0.0; n * self.inner()],
            dy_nd: vec![0.0; n * self.inner()],
            d_log_a_hn: vec![0.0; n * self.heads],
            taps: vec![0.0; 2 * self.conv.len()],
            scan: ssd::Scratch::new(self.shape(dims)),
            orient: orient::Scratch::new(dims.seq),
        }
    }

    /// See [`super::mixer::Mixer::forward`].
    pub fn forward(
        &self,
        params: &[f32],
        scene: Scene,
        x_nd: &[f32],
        out_nd: &mut [f32],
        saved: &mut Saved,
    ) {
        let (n, d) = (scene.dims.tokens(), self.d_model);
        linear(n, d, self.in_proj.rows, x_nd, self.in_proj.of(params), &mut saved.proj_nr);
        self.convolve(params, scene, saved);
        let Saved { xbc_nc, a_hn, y_nd, states, scan, .. } = saved;
        ssd::forward(self.shape(scene.dims), xbc_nc, a_hn, y_nd, states, scan);
        let inputs = self.gate_inputs(params, &saved.y_nd, &saved.xbc_nc, &saved.proj_nr);
        gate::forward(self.gate_shape(n), inputs, &mut saved.gated_nd);
        linear_add(n, self.inner(), d, &saved.gated_nd, self.out.of(params), out_nd);
    }

    /// What phase 1 compares: B, C (after the convolution) and the decays, in `saved`; x, z and
    /// what follows them are not computed.
    pub fn forward_matrix(&self, params: &[f32], scene: Scene, x_nd: &[f32], saved: &mut Saved) {
        let (n, d, row) = (scene.dims.tokens(), self.d_model, self.in_proj.rows);
        let x = Mat::new(x_nd, n, d, d);
        for (slot, at) in [(self.bc, self.inner()), (self.a_log, self.a_log_at())] {
            let w = Mat::new(slot.of(params), slot.rows, d, d);
            gemm(&mut saved.proj_nr[at..], row, 0.0, 1.0, x, w.t());
        }
        self.convolve(params, scene, saved);
    }

    fn convolve(&self, params: &[f32], scene: Scene, saved: &mut Saved) {
        let Saved { proj_nr, xbc_nc, a_hn, taps, .. } = saved;
        let (w, bias) = (self.conv.of(params), self.conv_bias.of(params));
        conv::forward(self.conv_shape(scene.dims), proj_nr, w, bias, scene.starts_n, xbc_nc, taps);
        let a_log = &proj_nr[self.a_log_at()..];
        gate::decays(scene.dims.seq, self.in_proj.rows, a_log, scene.starts_n, a_hn);
    }

    fn gate_inputs<'a>(
        &self,
        params: &'a [f32],
        y_nd: &'a [f32],
        xbc: &'a [f32],
        proj: &'a [f32],
    ) -> gate::Inputs<'a> {
        let (d_h, z_bias) = (self.d.of(params), self.z_bias.of(params));
        gate::Inputs { y_nd, x: xbc, z: &proj[self.z_at()..], d_h, z_bias }
    }

    /// See [`super::mixer::Mixer::backward`].
    #[expect(clippy::too_many_arguments, reason = "a backward pass touches this many buffers")]
    pub fn backward(
        &self,
        params: &[f32],
        scene: Scene,
        x_nd: &[f32],
        d_out_nd: &[f32],
        d_x_nd: &mut [f32],
        saved: &Saved,
        scratch: &mut Scratch,
        grads: Option<&mut [f32]>,
    ) {
        let (n, d, row) = (scene.dims.tokens(), self.d_model, self.in_proj.rows);
        linear_dx(n, self.inner(), d, d_out_nd, self.out.of(params), &mut scratch.d_gated_nd);
        match grads {
            Some(grads) => {
                linear_dw(n, self.inner(), d, d_out_nd, &saved.gated_nd, self.out.of_mut(grads));
                self.back_to_projection(params, scene, saved, scratch, grads);
                linear_dw(n, d, row, &scratch.d_proj_nr, x_nd, self.in_proj.of_mut(grads));
            }
            None => {
                let mut unwanted = vec![0.0; params.len()];
                self.back_to_projection(params, scene, saved, scratch, &mut unwanted);
            }
        }
        linear_dx(n, d, row, &scratch.d_proj_nr, self.in_proj.of(params), d_x_nd);
    }

    /// From `scratch.d_gated_nd` to `scratch.d_proj_nr`, adding the gradients of z_bias, D and the
    /// convolution.
    fn back_to_projection(
        &self,
        params: &[f32],
        scene: Scene,
        saved: &Saved,
        scratch: &mut Scratch,
        grads: &mut [f32],
    ) {
        let n = scene.dims.tokens();
        let Scratch { d_proj_nr, d_xbc_nc, d_gated_nd, dy_nd, d_log_a_hn, scan, .. } = scratch;
        let inputs = self.gate_inputs(params, &saved.y_nd, &saved.xbc_nc, &saved.proj_nr);
        let (gate, dz) = (self.gate_shape(n), &mut d_proj_nr[self.z_at()..]);
        gate::backward(gate, d_gated_nd, inputs, dy_nd, dz, self.z_bias.of_mut(grads));
        let Saved { xbc_nc: xbc, a_hn, y_nd, states, .. } = saved;
        let forward = ssd::Saved { xbc, a_hn, y_nd, states };
        ssd::backward(self.shape(scene.dims), dy_nd, forward, d_xbc_nc, d_log_a_hn, scan);
        gate::skip_backward(gate, dy_nd, inputs, d_xbc_nc, self.d.of_mut(grads));
        self.back_through_conv(params, scene, saved, scratch, 0, grads);
    }

    /// From `scratch.d_xbc_nc` (channels from `first` on) and `scratch.d_log_a_hn` to the
    /// projection.
    fn back_through_conv(
        &self,
        params: &[f32],
        scene: Scene,
        saved: &Saved,
        scratch: &mut Scratch,
        first: usize,
        grads: &mut [f32],
    ) {
        let Scratch { d_proj_nr, d_xbc_nc, d_log_a_hn, taps, .. } = scratch;
        let d_a_log = &mut d_proj_nr[self.a_log_at()..];
        let (n, row) = (scene.dims.tokens(), self.in_proj.rows);
        gate::decays_backward(row, n, d_log_a_hn, &saved.a_hn, d_a_log);
        let (w_ck, starts_n) = (self.conv.of(params), scene.starts_n);
        let forward = conv::Saved { x: &saved.proj_nr, w_ck, starts_n };
        let (shape, range) = (self.conv_shape(scene.dims), first..self.channels());
        let both = two(grads, self.conv, self.conv_bias);
        conv::backward(shape, range, d_xbc_nc, forward, d_proj_nr, both, taps);
    }

    /// The loss of phase 1 after [`Ssm::forward_matrix`]. With `grads`, those of B, C, A_log, D
    /// and the convolution of B and C are added, for a mean of weight `weight` (one over the
    /// sequences times heads of the whole batch).
    #[expect(clippy::too_many_arguments, reason = "a backward pass touches this many buffers")]
    pub fn orient(
        &self,
        params: &[f32],
        scene: Scene,
        x_nd: &[f32],
        teacher: orient::Teacher,
        weight: f32,
        saved: &Saved,
        scratch: &mut Scratch,
        grads: Option<&mut [f32]>,
    ) -> orient::Sums {
        let (n, d, row) = (scene.dims.tokens(), self.d_model, self.in_proj.rows);
        let (shape, starts_n) = (self.shape(scene.dims), scene.starts_n);
        let (xbc, a_hn, d_h) = (&saved.xbc_nc, &saved.a_hn, self.d.of(params));
        let student = orient::Student { xbc, a_hn, d_h };
        let Some(grads) = grads else {
            return orient::loss(shape, starts_n, teacher, student, None, &mut scratch.orient);
        };
        let Scratch { d_xbc_nc, d_log_a_hn, orient, .. } = scratch;
        let d_d_h = self.d.of_mut(grads);
        let gradient = orient::Gradient { weight, d_xbc: d_xbc_nc, d_log_a_hn, d_d_h };
        let sums = orient::loss(shape, starts_n, teacher, student, Some(gradient), orient);
        self.back_through_conv(params, scene, saved, scratch, self.inner(), grads);
        for (slot, at) in [(self.bc, self.inner()), (self.a_log, self.a_log_at())] {
            let d_proj = Mat::new(&scratch.d_proj_nr[at..], n, slot.rows, row);
            gemm(slot.of_mut(grads), d, 1.0, 1.0, d_proj.t(), Mat::new(x_nd, n, d, d));
        }
        sums
    }

    /// The `[seq, seq]` matrix of one sequence and head with its skip, after
    /// [`Ssm::forward_matrix`]. For looking at.
    pub fn matrix(
        &self,
        params: &[f32],
        dims: Dims,
        at: (usize, usize),
        saved: &Saved,
    ) -> Vec<f32> {
        let mut out = vec![0.0; dims.seq * dims.seq];
        ssd::matrix(self.shape(dims), at, &saved.xbc_nc, &saved.a_hn, &mut out);
        for l in 0..dims.seq {
            out[l * dims.seq + l] += self.d.of(params)[at.1];
        }
        out
    }

    /// Bytes of a [`State`], without having one.
    pub fn state_bytes(&self) -> usize {
        (self.conv.len() + self.heads * self.state * self.width) * size_of::<f32>()
    }

    /// A fresh state for [`Ssm::run`].
    pub fn state(&self) -> State {
        State {
            window: vec![0.0; self.conv.len()],
            scan: vec![0.0; self.heads * self.state * self.width],
        }
    }

    /// *Adds* the mixer's output for `n` more tokens to `out_nd`, by the recurrence; `fresh` forgets
    /// what came before them.
    pub fn run(
        &self,
        params: &[f32],
        n: usize,
        fresh: bool,
        x_nd: &[f32],
        out_nd: &mut [f32],
        state: &mut State,
    ) {
        let (rows, channels, inner) = (self.in_proj.rows, self.channels(), self.inner());
        if fresh {
            state.window.fill(0.0);
            state.scan.fill(0.0);
        }
        let mut proj_nr = vec![0.0; n * rows];
        many::linear(n, x_nd, self.in_proj.of(params), &mut proj_nr, false);
        let (mut xbc_nc, mut y_nd) = (vec![0.0; n * channels], vec![0.0; n * inner]);
        let (w, bias) = (self.conv.of(params), self.conv_bias.of(params));
        let one = self.shape(Dims { batch: 1, seq: 1 });
        let mut a_h = vec![0.0; self.heads];
        vectorised(|| {
            let tokens = xbc_nc.chunks_exact_mut(channels).zip(y_nd.chunks_exact_mut(inner));
            for (proj, (xbc, y)) in proj_nr.chunks_exact(rows).zip(tokens) {
                conv::step(self.taps, &proj[..channels], w, bias, &mut state.window, xbc);
                for (a, a_log) in a_h.iter_mut().zip(&proj[self.a_log_at()..]) {
                    *a = sigmoid(-a_log);
                }
                ssd::step(one, xbc, &a_h, &mut state.scan, y);
            }
        });
        let mut gated_nd = vec![0.0; n * inner];
        let inputs = self.gate_inputs(params, &y_nd, &xbc_nc, &proj_nr);
        gate::forward(self.gate_shape(n), inputs, &mut gated_nd);
        many::linear(n, &gated_nd, self.out.of(params), out_nd, true);
    }
}

/// Two slots of a buffer at once.
fn two(flat: &mut [f32], a: Slot, b: Slot) -> (&mut [f32], &mut [f32]) {
    if a.offset < b.offset {
        let (low, high) = flat.split_at_mut(b.offset);
        (&mut low[a.range()], &mut high[..b.len()])
    } else {
        let (low, high) = flat.split_at_mut(a.offset);
        (&mut high[..a.len()], &mut low[b.range()])
    }
}

#[cfg(test)]
mod tests;
