//! What mixers do between products: convolution, scan, attention, and the loss of phase 1.

use anyhow::Result;
use half::bf16;

use super::{Bench, Mixer, Work, bytes, halves};
use crate::gpu::bench::count;
use crate::gpu::launch::Buf;
use crate::gpu::ops::{attention as attend, conv, orient as op, rope, ssd};
use crate::ops::attention::Heads;

/// The convolution over x, B and C.
pub(super) fn convolution(bench: &mut Bench) -> Result<()> {
    let (gpu, n, dims) = (bench.gpu.clone(), bench.n(), bench.dims);
    let (mixer, taps) = (Mixer::of(&bench.student), bench.student.d_conv);
    let channels = mixer.channels();
    let shape = conv::Shape { dims, channels, taps, stride: mixer.rows() };
    let all = 0..channels;
    let (proj, d_proj) =
        (bench.sheet.half(n * mixer.rows())?, gpu.alloc::<bf16>("gradients", n * mixer.rows())?);
    let xbc = bench.sheet.half(n * channels)?;
    let (w, b) = (bench.sheet.full(channels * taps, 0.5)?, bench.sheet.full(channels, 0.5)?);
    let (d_w, d_b) =
        (gpu.zeros::<f32>("gradients", channels * taps)?, gpu.zeros::<f32>("gradients", channels)?);
    let partials = gpu.alloc::<f32>("partial sums", conv::partials(shape, all.clone()))?;
    let starts = bench.starts_n.all();
    bench.op("conv", halves(2 * n * channels), || {
        let params = (w.all(), b.all());
        conv::forward(&gpu, shape, all.clone(), proj.all(), params, starts, xbc.all());
    })?;
    bench.op("conv back", halves(3 * n * channels), || {
        let sums = conv::Sums { partials: partials.all(), d_w_ck: d_w.all(), d_bias_c: d_b.all() };
        let seen = (proj.all(), w.all(), starts);
        let to = d_proj.all();
        conv::backward(&gpu, shape, all.clone(), xbc.all(), seen, None, to, Some(sums));
    })
}

/// The scan with skip and gate, as in training.
pub(super) fn scan(bench: &mut Bench) -> Result<()> {
    let (gpu, n, dims) = (bench.gpu.clone(), bench.n(), bench.dims);
    let mixer = Mixer::of(&bench.student);
    let (inner, channels, rows, heads) =
        (mixer.inner(), mixer.channels(), mixer.rows(), mixer.heads);
    let shape = ssd::Shape {
        batch: dims.batch,
        seq: dims.seq,
        heads,
        width: mixer.width,
        state: mixer.state,
        proj_stride: rows,
        a_stride: mixer.a_stride(),
    };
    let half = |len: usize| bench.sheet.half(len);
    let (proj, xbc, d_gated) = (half(n * rows)?, half(n * channels)?, half(n * inner)?);
    let room = |len: usize| gpu.alloc::<bf16>("a scan", len);
    let states_len = ssd::states(dims, heads, mixer.width, mixer.state);
    let (gated, y, states) = (room(n * inner)?, room(n * inner)?, room(states_len)?);
    let (d_xbc, d_proj) = (room(n * channels)?, room(n * rows)?);
    let full = |len: usize| bench.sheet.full(len, 1.0);
    let (a, d_h, z_bias) = (full(n * mixer.a_stride())?, full(heads)?, full(inner)?);
    let parts = |len: usize| gpu.alloc::<f32>("partial sums", len);
    let (z_parts, d_parts) = (parts(dims.batch * inner)?, parts(dims.batch * heads)?);
    let inputs = ssd::Inputs {
        xbc_nc: xbc.all(),
        proj_nr: proj.all(),
        a_log_nh: a.all(),
        d_h: d_h.all(),
        z_bias: z_bias.all(),
        starts_n: bench.starts_n.all(),
    };
    let read = n * (channels + inner);
    bench.op("scan", bytes(read + 2 * n * inner + states_len, n * heads), || {
        let (y_nd, states) = (Some(y.all()), Some(states.all()));
        let out = ssd::Out { gated_nd: gated.all(), y_nd, states, last_state: None };
        ssd::forward(&gpu, shape, inputs, out);
    })?;
    let read = read + 2 * n * inner + states_len;
    let written = n * (rows - channels) + n * channels;
    bench.op("scan back", bytes(read + written, n * heads), || {
        let saved = ssd::Saved { y_nd: y.all(), states: states.all() };
        let grads = ssd::Grads {
            d_xbc_nc: d_xbc.all(),
            d_proj_nr: d_proj.all(),
            d_z_bias_parts: z_parts.all(),
            d_d_parts: d_parts.all(),
        };
        ssd::backward(&gpu, shape, d_gated.all(), inputs, saved, grads);
    })
}

fn heads_of(bench: &Bench) -> Heads {
    let config = &bench.teacher;
    Heads { query: config.heads, kv: config.kv_heads, dim: config.head_dim }
}

/// Attention of the teacher, and its way back, which hybrids need.
pub(super) fn attention(bench: &mut Bench) -> Result<()> {
    let (gpu, n, dims, heads) = (bench.gpu.clone(), bench.n(), bench.dims, heads_of(bench));
    let rotary = bench.teacher.rotary_dim.unwrap_or(heads.dim);
    let (row, width) = (heads.row(), heads.width());
    let (qkv, d_ctx) = (bench.sheet.half(n * row)?, bench.sheet.half(n * width)?);
    let (ctx, d_qkv) =
        (gpu.alloc::<bf16>("a context", n * width)?, gpu.alloc::<bf16>("gradients", n * row)?);
    let stats = || gpu.alloc::<f32>("log-sum-exps", n * heads.query);
    let (lse, delta) = (stats()?, stats()?);
    let starts = bench.starts_n.all();
    let flops = count::attention(&bench.teacher, n, dims.seq);
    bench.op("attention", Work::Flops(flops), || {
        attend::forward(&gpu, dims, heads, starts, (qkv.all(), row), (ctx.all(), width), lse.all());
    })?;
    bench.op("attention back", Work::Flops(2.5 * flops), || {
        let back = attend::Back {
            qkv_nr: (qkv.all(), row),
            ctx_nd: (ctx.all(), width),
            lse_bhl: lse.all(),
            delta_bhl: delta.all(),
        };
        attend::backward(&gpu, dims, heads, starts, (d_ctx.all(), width), back, (d_qkv.all(), row));
    })?;
    let angles = bench.sheet.full(dims.seq * rotary / 2, 1.0)?;
    let turned = heads.query + heads.kv;
    bench.op("rope", halves(2 * n * turned * rotary), || {
        let (cos, sin) = (angles.all(), angles.all());
        let table = rope::Table { cos, sin, dim: heads.dim, rotary };
        let positions = rope::Positions { seq: dims.seq, first: 0, before: None };
        rope::rope(&gpu, (qkv.all(), row), n, turned, table, positions, false);
    })
}

/// Buffers of phase 1's loss.
struct Room {
    qkv: Buf<bf16>,
    lse: Buf<f32>,
    xbc: Buf<bf16>,
    d_xbc: Buf<bf16>,
    a: Buf<f32>,
    d_proj: Buf<bf16>,
    d_h: Buf<f32>,
    /// Sums of log decays, and products of rows and of columns.
    sums: [Buf<f32>; 3],
    partials: Buf<f32>,
    /// Norm, factor, ‖A‖ and gradient of the skip.
    pairs: [Buf<f32>; 4],
}

impl Room {
    fn new(bench: &Bench, shape: op::Shape, mixer: Mixer) -> Result<Room> {
        let (gpu, n) = (&bench.gpu, bench.n());
        let (row, heads) = (heads_of(bench).row(), mixer.heads);
        let sums = || gpu.zeros::<f32>("sums", n * heads);
        let pair = || gpu.zeros::<f32>("norms", shape.pairs());
        let room = Room {
            qkv: bench.sheet.half(n * row)?,
            lse: sums()?,
            xbc: bench.sheet.half(n * mixer.channels())?,
            d_xbc: gpu.alloc("gradients", n * mixer.channels())?,
            a: bench.sheet.full(n * mixer.a_stride(), 1.0)?,
            d_proj: gpu.alloc("gradients", n * mixer.rows())?,
            d_h: bench.sheet.full(heads, 1.0)?,
            sums: [sums()?, sums()?, sums()?],
            partials: gpu.alloc("partial sums", shape.partials())?,
            pairs: [pair()?, pair()?, pair()?, pair()?],
        };
        let (heads, width) = (heads_of(bench), heads_of(bench).width());
        let ctx = gpu.alloc::<bf16>("a context", n * width)?;
        let (from, to) = ((room.qkv.all(), row), (ctx.all(), width));
        attend::forward(gpu, bench.dims, heads, bench.starts_n.all(), from, to, room.lse.all());
        Ok(room)
    }

    fn inputs(&self, bench: &Bench, mixer: Mixer) -> op::Inputs {
        let heads = heads_of(bench);
        op::Inputs {
            teacher: op::Teacher {
                q: self.qkv.all(),
                k: self.qkv.all().from(heads.width()),
                stride: heads.row(),
                lse_bhl: self.lse.all(),
            },
            student: op::Student {
                b: self.xbc.all().from(mixer.inner()),
                c: self.xbc.all().from(mixer.inner() + mixer.heads * mixer.state),
                stride: mixer.channels(),
                cs_bhl: self.sums[0].all(),
                d_h: self.d_h.all(),
            },
            starts_n: bench.starts_n.all(),
        }
    }
}

/// The loss of phase 1: A and M, and of them dC or dB, are T/2 positions a token on average.
pub(super) fn orient(bench: &mut Bench) -> Result<()> {
    let (gpu, n, dims) = (bench.gpu.clone(), bench.n(), bench.dims);
    let (mixer, heads) = (Mixer::of(&bench.student), heads_of(bench));
    let shape = op::Shape {
        batch: dims.batch,
        seq: dims.seq,
        heads: heads.query,
        kv_heads: heads.kv,
        dim: heads.dim,
        state: mixer.state,
    };
    let room = Room::new(bench, shape, mixer)?;
    let inputs = room.inputs(bench, mixer);
    let [cs, rowdot, coldot] = room.sums.each_ref().map(Buf::all);
    let (a, stride, partials) = (room.a.all(), mixer.a_stride(), room.partials.all());
    bench.op("orient sums of decays", bytes(0, 2 * n * mixer.heads), || {
        op::decay_cumsum(&gpu, shape, (a, stride), cs);
    })?;
    let per_token = dims.seq * mixer.heads * (heads.dim + 2 * mixer.state);
    let flops = Work::Flops((n * per_token) as f64);
    let (channels, b_at) = (mixer.channels(), mixer.inner());
    let d_xbc = room.d_xbc.all();
    let (db, dc) = (d_xbc.from(b_at), d_xbc.from(b_at + mixer.heads * mixer.state));
    bench.op("orient rows", flops, || {
        op::rows(&gpu, shape, inputs, (dc, channels), rowdot, partials);
    })?;
    bench.op("orient columns", flops, || {
        op::columns(&gpu, shape, inputs, (db, channels), coldot);
    })?;
    let [norm_bh, factor_bh, attention_bh, d_d_bh] = room.pairs.each_ref().map(Buf::all);
    let norms = op::Norms { norm_bh, factor_bh, attention_bh };
    let decay = op::Decay {
        rowdot_bhl: rowdot,
        coldot_bhl: coldot,
        a_log_nh: a,
        a_stride: stride,
        d_proj: room.d_proj.all(),
        proj_stride: mixer.rows(),
        a_column: mixer.a_at(),
        d_d_bh,
    };
    let starts = bench.starts_n.all();
    bench.op("orient finish", bytes(n * stride, 3 * n * mixer.heads), || {
        op::finish(&gpu, shape, partials, 1e-3, norms, starts, Some(decay));
    })
}
