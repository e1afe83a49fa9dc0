//! The blocks of a model on the device, in the same parts as [`crate::models`].
//!
//! A part holds where its parameters lie; activations lie in buffers that are made once
//! ([`acts::Acts`], one a block or one for all), and what a way back needs for a moment lies in one
//! [`room::Room`]. Nothing here waits for the device.

pub mod acts;
pub mod attention;
pub mod block;
pub mod linear;
pub mod mlp;
pub mod norm;
pub mod room;
pub mod ssm;
pub mod whole;

use crate::gpu::launch::Slice;
use crate::gpu::ops::rope::Table;
use crate::ops::Dims;

/// What all parts of a pass see besides their own input.
#[derive(Clone, Copy)]
pub struct Scene {
    /// Sequences and positions.
    pub dims: Dims,
    /// For each token the position of its document's first, `[n]`.
    pub starts_n: Slice<u32>,
    /// Angles of the rotary part.
    pub rope: Table,
}
