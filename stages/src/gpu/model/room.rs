//! What a way back needs for a moment: one set of buffers for all blocks of a model.

use anyhow::Result;
use half::bf16;

use super::block::{Block, Mixer};
use super::linear::Linear;
use super::ssm::Ssm;
use crate::gpu::launch::{Buf, Gpu};
use crate::gpu::ops::{conv, norm, reduce};
use crate::ops::Dims;

/// The buffers; those that no block needs are empty.
pub struct Room {
    /// Gradient of a norm's output.
    pub d_x_nd: Buf<bf16>,
    /// The same from the mixer, where the MLP's share waits in the other.
    pub d_y_nd: Buf<bf16>,
    /// Of an MLP's activation,
    pub d_act_nf: Buf<bf16>,
    /// and of what precedes it.
    pub d_into_nw: Buf<bf16>,
    /// Of what `ssm`'s output projection reads,
    pub d_gated_nd: Buf<bf16>,
    /// of x, B, C after the convolution,
    pub d_xbc_nc: Buf<bf16>,
    /// and of the projection.
    pub d_proj_nr: Buf<bf16>,
    /// Of what attention's output projection reads,
    pub d_ctx_nd: Buf<bf16>,
    /// of q, k and v,
    pub d_qkv_nr: Buf<bf16>,
    /// and ⟨ctx, d_ctx⟩ of every row.
    pub delta_bhl: Buf<f32>,
    /// Partial sums.
    pub partials: Buf<f32>,
}

/// Sizes, gathered over blocks.
#[derive(Default)]
struct Sizes {
    d: usize,
    shared: usize,
    act: usize,
    into: usize,
    inner: usize,
    channels: usize,
    rows: usize,
    ctx: usize,
    qkv: usize,
    heads: usize,
    partials: usize,
}

impl Sizes {
    fn take(&mut self, block: &Block, dims: Dims) {
        let n = dims.tokens();
        let up = |to: &mut usize, value: usize| *to = (*to).max(value);
        up(&mut self.d, block.d);
        up(&mut self.shared, if block.norm2.is_none() { block.d } else { 0 });
        up(&mut self.act, block.mlp.ffn);
        up(&mut self.into, block.mlp.into.outputs);
        up(&mut self.partials, norm::partials((n, block.d), true));
        let widest = block.mlp.into.outputs.max(block.d);
        up(&mut self.partials, reduce::column_partials(n, widest));
        match &block.mixer {
            Mixer::Attention(mixer) => {
                up(&mut self.ctx, mixer.heads.width());
                up(&mut self.qkv, mixer.heads.row());
                up(&mut self.heads, mixer.heads.query);
                up(&mut self.partials, reduce::column_partials(n, mixer.heads.row()));
            }
            Mixer::Ssm(mixer) => {
                up(&mut self.inner, mixer.inner());
                up(&mut self.channels, mixer.channels());
                up(&mut self.rows, mixer.rows);
                up(&mut self.partials, dims.batch * (mixer.inner() + mixer.heads));
                let all = 0..mixer.channels();
                up(&mut self.partials, conv::partials(mixer.conv_shape(dims), all));
            }
        }
    }
}

impl Room {
    /// For phase 1, which goes back through convolution and projection only.
    pub fn of_matrix(gpu: &Gpu, mixer: &Ssm, dims: Dims) -> Result<Room> {
        let mut room = Room::new(gpu, std::iter::empty(), dims, None)?;
        let (n, what) = (dims.tokens(), "gradients of a mixer");
        let range = mixer.b_at()..mixer.channels();
        room.d_xbc_nc = gpu.alloc(what, n * mixer.channels())?;
        room.d_proj_nr = gpu.zeros(what, n * mixer.rows)?;
        let partials = conv::partials(mixer.conv_shape(dims), range);
        room.partials = gpu.alloc("partial sums", partials)?;
        Ok(room)
    }

    /// For `blocks` and `dims`, and for the gradient of the head's bias.
    pub fn new<'a>(
        gpu: &Gpu,
        blocks: impl Iterator<Item = &'a Block>,
        dims: Dims,
        head: Option<&Linear>,
    ) -> Result<Room> {
        let mut sizes = Sizes::default();
        blocks.for_each(|block| sizes.take(block, dims));
        let n = dims.tokens();
        if let Some(head) = head.filter(|head| head.b.is_some()) {
            let rows = super::whole::rows(head.outputs, n);
            sizes.partials = sizes.partials.max(reduce::column_partials(rows, head.outputs));
        }
        let half = |width: usize| gpu.alloc::<bf16>("gradients of activations", n * width);
        let full = |len: usize| gpu.alloc::<f32>("partial sums", len);
        let d_proj_nr = half(sizes.rows)?;
        // Phase 1 reads A_log's part with what fills it up, and writes no other columns.
        gpu.fill(d_proj_nr.all(), 0);
        Ok(Room {
            d_x_nd: half(sizes.d)?,
            d_y_nd: half(sizes.shared)?,
            d_act_nf: half(sizes.act)?,
            d_into_nw: half(sizes.into)?,
            d_gated_nd: half(sizes.inner)?,
            d_xbc_nc: half(sizes.channels)?,
            d_proj_nr,
            d_ctx_nd: half(sizes.ctx)?,
            d_qkv_nr: half(sizes.qkv)?,
            delta_bhl: full(n * sizes.heads)?,
            partials: full(sizes.partials)?,
        })
    }
}
