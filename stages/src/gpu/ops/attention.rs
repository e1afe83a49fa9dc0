//! Causal softmax attention: see `kernels/attention*.cu` and, on the CPU, [`crate::ops::attention`].
//! For one new token a sequence, [`append`] and [`decode`] over a [`Cache`].

use half::bf16;

use crate::gpu::launch::{Gpu, Slice};
use crate::launch;
use crate::ops::Dims;
use crate::ops::attention::Heads;

/// Rows of a block.
const ROWS: usize = 128;
/// Query heads of a block that decodes.
const DECODED: usize = 8;

/// Rows of bf16 and the distance between them.
pub type Rows = (Slice<bf16>, usize);

fn fit((at, stride): Rows, rows: usize, width: usize) {
    assert!(stride.is_multiple_of(8) && at.address().is_multiple_of(16), "rows are not aligned");
    assert!(width <= stride && (rows - 1) * stride + width <= at.len(), "rows are too short");
}

fn check(dims: Dims, heads: Heads, starts_n: Slice<u32>) {
    assert!(dims.tokens() > 0 && heads.kv > 0 && heads.query.is_multiple_of(heads.kv));
    assert_eq!(starts_n.len(), dims.tokens(), "a start for every token");
}

macro_rules! kernel {
    ($name:literal, $dim:expr) => {
        match $dim {
            32 => concat!($name, "_d32"),
            64 => concat!($name, "_d64"),
            128 => concat!($name, "_d128"),
            dim => panic!("no kernel for heads of {dim}"),
        }
    };
}

fn threads(dim: usize) -> usize {
    if dim == 128 { 256 } else { 128 }
}

/// Blocks for all rows of `heads` heads.
fn blocks(dims: Dims, heads: usize) -> usize {
    dims.batch * heads * dims.seq.div_ceil(ROWS)
}

/// `qkv_nr` (rotated q and k) → context `ctx_nd` and log-sum-exp `lse_bhl [batch, heads, seq]`.
pub fn forward(
    gpu: &Gpu,
    dims: Dims,
    heads: Heads,
    starts_n: Slice<u32>,
    qkv_nr: Rows,
    ctx_nd: Rows,
    lse_bhl: Slice<f32>,
) {
    check(dims, heads, starts_n);
    fit(qkv_nr, dims.tokens(), heads.row());
    fit(ctx_nd, dims.tokens(), heads.width());
    assert_eq!(lse_bhl.len(), dims.tokens() * heads.query);
    launch!(gpu, kernel!("attention_forward", heads.dim), grid: [blocks(dims, heads.query), 1, 1],
        block: threads(heads.dim), shared: 768 * heads.dim + 512;
        qkv_nr.0, qkv_nr.1 as i32, starts_n, ctx_nd.0, ctx_nd.1 as i32, lse_bhl,
        dims.batch as i32, dims.seq as i32, heads.query as i32, heads.kv as i32);
}

/// What [`backward`] needs of the forward pass, and room.
#[derive(Clone, Copy)]
pub struct Back {
    /// As given to [`forward`].
    pub qkv_nr: Rows,
    /// As [`forward`] left it.
    pub ctx_nd: Rows,
    /// As [`forward`] left it.
    pub lse_bhl: Slice<f32>,
    /// Scratch of the same size.
    pub delta_bhl: Slice<f32>,
}

/// `d_ctx_nd` → `d_qkv_nr` (overwritten; gradients of rotated q and k).
pub fn backward(
    gpu: &Gpu,
    dims: Dims,
    heads: Heads,
    starts_n: Slice<u32>,
    d_ctx_nd: Rows,
    back: Back,
    d_qkv_nr: Rows,
) {
    let Back { qkv_nr, ctx_nd, lse_bhl, delta_bhl } = back;
    let Heads { query, kv, dim } = heads;
    check(dims, heads, starts_n);
    fit(qkv_nr, dims.tokens(), heads.row());
    fit(d_qkv_nr, dims.tokens(), heads.row());
    fit(ctx_nd, dims.tokens(), heads.width());
    fit(d_ctx_nd, dims.tokens(), heads.width());
    assert_eq!(lse_bhl.len(), dims.tokens() * query);
    assert_eq!(delta_bhl.len(), dims.tokens() * query);
    launch!(gpu, "attention_backward_delta",
        grid: [dims.seq.div_ceil(2048 / dim), query, dims.batch], block: 256, shared: 0;
        ctx_nd.0, ctx_nd.1 as i32, d_ctx_nd.0, d_ctx_nd.1 as i32, delta_bhl,
        dims.seq as i32, query as i32, dim as i32);
    let parts = [
        (kernel!("attention_backward_keys", dim), kv, 1024 * dim + 1536),
        (kernel!("attention_backward_queries", dim), query, 512 * dim + 512),
    ];
    for (name, count, shared) in parts {
        launch!(gpu, name, grid: [blocks(dims, count), 1, 1], block: threads(dim), shared: shared;
            qkv_nr.0, qkv_nr.1 as i32, starts_n, d_ctx_nd.0, d_ctx_nd.1 as i32, lse_bhl, delta_bhl,
            d_qkv_nr.0, d_qkv_nr.1 as i32, dims.batch as i32, dims.seq as i32,
            query as i32, kv as i32);
    }
}

/// Remembered keys and values.
#[derive(Clone, Copy)]
pub struct Cache {
    /// Rotated keys, `[batch, kv heads, capacity, dim]`.
    pub k: Slice<bf16>,
    /// Values, likewise.
    pub v: Slice<bf16>,
    /// Positions there is room for.
    pub capacity: usize,
    /// How many are held: of every sequence, or one number for all.
    pub length: Slice<i32>,
}

impl Cache {
    fn check(self, batch: usize, heads: Heads) {
        assert!(batch > 0 && heads.kv > 0 && heads.query.is_multiple_of(heads.kv));
        assert!(matches!(heads.dim, 32 | 64 | 128), "no kernel for heads of {}", heads.dim);
        let elements = batch * heads.kv * self.capacity * heads.dim;
        assert!(self.k.len() == elements && self.v.len() == elements, "the cache has another size");
        assert!(
            self.length.len() == 1 || self.length.len() == batch,
            "a length for each or for all"
        );
    }

    fn step(self) -> i32 {
        i32::from(self.length.len() > 1)
    }
}

/// Writes k and v of `tokens` new positions of each sequence (`qkv_nr`: `batch · tokens` rows, rotated)
/// behind those held. The length stays: see [`advance`].
pub fn append(gpu: &Gpu, batch: usize, tokens: usize, heads: Heads, qkv_nr: Rows, cache: Cache) {
    if tokens == 0 {
        return;
    }
    cache.check(batch, heads);
    fit(qkv_nr, batch * tokens, heads.row());
    let chunks = batch * tokens * heads.kv * heads.dim / 4;
    launch!(gpu, "kv_append", grid: [chunks.div_ceil(256), 1, 1], block: 256, shared: 0;
        qkv_nr.0, qkv_nr.1 as i32, cache.k, cache.v, cache.length, cache.step(), batch as i32,
        tokens as i32, heads.query as i32, heads.kv as i32, heads.dim as i32, cache.capacity as i32);
}

/// Adds `tokens` to every length.
pub fn advance(gpu: &Gpu, length: Slice<i32>, tokens: usize) {
    launch!(gpu, "kv_advance", grid: [length.len().div_ceil(256), 1, 1], block: 256, shared: 0;
        length, length.len() as i32, tokens as i32);
}

/// Into how many parts [`decode`] cuts a cache: enough blocks for every multiprocessor, and parts
/// of no more than 1024 positions while that makes no more than 256.
pub fn splits(batch: usize, heads: Heads, capacity: usize) -> usize {
    let blocks = batch * heads.kv * (heads.query / heads.kv).div_ceil(DECODED);
    let wanted = capacity.div_ceil(1024).max(800usize.div_ceil(blocks));
    wanted.min(capacity.div_ceil(128)).clamp(1, 256)
}

/// Length of the scratch of [`decode`]: for the contexts of the parts, and for their sums.
pub fn scratch(batch: usize, heads: Heads, splits: usize) -> [usize; 2] {
    [batch * heads.width() * splits, batch * heads.query * splits * 2]
}

/// Context `[batch, heads · dim]` of one query a sequence (the q columns of `qkv_nr`, rotated) over
/// the positions held and `extra` behind them: 1 between [`append`] and [`advance`].
pub fn decode(
    gpu: &Gpu,
    batch: usize,
    heads: Heads,
    qkv_nr: Rows,
    (cache, extra): (Cache, usize),
    (parts, sums): (Slice<f32>, Slice<f32>),
    out_nd: Rows,
) {
    cache.check(batch, heads);
    fit(qkv_nr, batch, heads.width());
    fit(out_nd, batch, heads.width());
    let Heads { query, kv, dim } = heads;
    let splits = sums.len() / (batch * query * 2);
    assert!(splits > 0 && [parts.len(), sums.len()] == scratch(batch, heads, splits));
    let head_blocks = kv * (query / kv).div_ceil(DECODED);
    launch!(gpu, kernel!("attention_decode", dim), grid: [splits, head_blocks, batch], block: 128,
        shared: 128 * (dim + 2);
        qkv_nr.0, qkv_nr.1 as i32, cache.k, cache.v, cache.length, cache.step(), extra as i32,
        parts, sums, query as i32, kv as i32, cache.capacity as i32);
    launch!(gpu, "attention_decode_combine", grid: [query, batch, 1], block: 128,
        shared: 4 * (splits + 136);
        parts, sums, out_nd.0, out_nd.1 as i32, query as i32, dim as i32, splits as i32);
}
