//! One token of a mixer for a batch of sequences: convolution, step of the scan, skip and gate; see
//! `kernels/ssm_step.cu` and, on the CPU, `step` of [`crate::ops::conv`] and [`crate::ops::ssd`].

use half::bf16;

use super::reduce::int;
use crate::gpu::launch::{Gpu, Slice};
use crate::launch;

/// Sizes of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Width P of a head.
    pub width: usize,
    /// State size N of a head: 16, 32, 64 or 128.
    pub state: usize,
    /// Taps of the convolution.
    pub taps: usize,
    /// Distance between rows of the projection.
    pub proj_stride: usize,
    /// Distance between rows of A_log.
    pub a_stride: usize,
}

impl Shape {
    fn inner(self) -> usize {
        self.heads * self.width
    }

    fn channels(self) -> usize {
        self.inner() + 2 * self.heads * self.state
    }
}

/// Parameters.
#[derive(Clone, Copy, Debug)]
pub struct Params {
    /// `[channels, taps]`, oldest tap first.
    pub w_ck: Slice<f32>,
    /// `[channels]`.
    pub bias_c: Slice<f32>,
    /// `[heads]`.
    pub d_h: Slice<f32>,
    /// `[inner]`.
    pub z_bias: Slice<f32>,
}

/// What sequences remember; zeros for a fresh start.
#[derive(Clone, Copy, Debug)]
pub struct State {
    /// The last inputs of the convolution, oldest first, `[batch, channels, taps − 1]`.
    pub window: Slice<f32>,
    /// `[batch, heads, width, state]`, as [`super::ssd::Out::last_state`].
    pub state: Slice<f32>,
}

/// `gated_nd` `[batch, inner]` from the token's projection `proj_nr` (x | B | C | z before the
/// convolution, `[batch, proj_stride]`) and `a_log_nh` `[batch, a_stride]`; `state` is moved on.
pub fn step(
    gpu: &Gpu,
    shape: Shape,
    (proj_nr, a_log_nh): (Slice<bf16>, Slice<f32>),
    params: Params,
    state: State,
    gated_nd: Slice<bf16>,
) {
    let Shape { batch, heads, width, state: n, taps, proj_stride, a_stride } = shape;
    let (channels, inner) = (shape.channels(), shape.inner());
    assert!(taps > 0 && heads > 0 && batch > 0, "nothing to do");
    assert!(proj_stride >= channels + inner && a_stride >= heads, "rows are too short");
    let wide = proj_nr.len() + proj_stride >= batch * proj_stride + channels + inner;
    let narrow = a_log_nh.len() + a_stride >= batch * a_stride + heads;
    assert!(wide && narrow, "shapes differ");
    let Params { w_ck, bias_c, d_h, z_bias } = params;
    assert!(w_ck.len() >= channels * taps && bias_c.len() >= channels, "shapes differ");
    assert!(d_h.len() >= heads && z_bias.len() >= inner, "shapes differ");
    assert!(state.window.len() >= batch * channels * (taps - 1), "shapes differ");
    assert!(state.state.len() >= batch * inner * n, "shapes differ");
    assert!(state.state.address().is_multiple_of(16), "rows are not aligned");
    assert!(gated_nd.len() >= batch * inner, "shapes differ");
    let name = match n {
        16 => "ssm_step_n16",
        32 => "ssm_step_n32",
        64 => "ssm_step_n64",
        128 => "ssm_step_n128",
        _ => panic!("no step for a state of {n}"),
    };
    launch!(gpu, name, grid: [heads, batch, 1], block: 128, shared: 4 * (width + 2 * n);
        proj_nr, a_log_nh, w_ck, bias_c, d_h, z_bias, state.window, state.state, gated_nd,
        int(heads), int(width), int(taps), int(proj_stride), int(a_stride));
}
