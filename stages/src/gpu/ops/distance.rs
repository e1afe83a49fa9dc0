//! The loss of phase 2 on the device; twin of [`crate::ops::distance`].

use half::bf16;

use super::norm::{Rows, sized};
use super::reduce::int;
use crate::gpu::launch::{Gpu, Slice};
use crate::launch;

/// Where the gradient goes.
#[derive(Clone, Copy, Debug)]
pub struct Gradient {
    /// `[n, d]`.
    pub d_s_nd: Slice<bf16>,
    /// Factor of the sum of distances: 1/tokens for the mean.
    pub weight: f32,
    /// Whether it is added to what is there.
    pub add: bool,
}

/// Of every row of `s_nd` and `t_nd`, bf16 `[n, d]`: ‖s − t‖₂ and ‖t‖₂, f32 `[n]`, and the gradient.
/// `dims` is (n, d). The sum over tokens is [`super::reduce::sum`]'s.
pub fn distances(
    gpu: &Gpu,
    dims: (usize, usize),
    (s_nd, t_nd): (Slice<bf16>, Slice<bf16>),
    distance_n: Option<Slice<f32>>,
    norm_n: Option<Slice<f32>>,
    gradient: Option<Gradient>,
) {
    let (n, d) = dims;
    let d_s_nd = gradient.map(|gradient| gradient.d_s_nd);
    let all = [Some(s_nd), Some(t_nd), d_s_nd];
    assert!(all.iter().flatten().all(|slice| slice.len() >= n * d), "shapes differ");
    let fits = [distance_n, norm_n].iter().flatten().all(|slice| slice.len() >= n);
    assert!(fits, "shapes differ");
    let (weight, add) = gradient.map_or((0.0, false), |gradient| (gradient.weight, gradient.add));
    let rows = Rows::new(d);
    launch!(gpu, sized!("distance")[rows.size], grid: [rows.blocks(n, rows.resident()), 1, 1],
        block: rows.threads, shared: 0; distance_n, norm_n, d_s_nd, s_nd, t_nd, int(n), int(d),
        weight, i32::from(add));
}
