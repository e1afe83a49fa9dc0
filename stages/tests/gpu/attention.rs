//! Attention against the CPU's: forward, backward, and one token at a time.

use stages::gpu::launch::Gpu;
use stages::gpu::ops::attention::{self, Back, Cache};
use stages::ops::Dims;
use stages::ops::attention::{self as cpu, Heads};

use crate::support::{close, devices, half, normal, poison, read, read_full, same, starts};

/// (dims, heads, documents)
const CASES: [(Dims, Heads, bool); 7] = [
    (Dims { batch: 1, seq: 1 }, Heads { query: 1, kv: 1, dim: 64 }, false),
    (Dims { batch: 3, seq: 37 }, Heads { query: 3, kv: 1, dim: 64 }, true),
    (Dims { batch: 1, seq: 129 }, Heads { query: 2, kv: 2, dim: 64 }, false),
    (Dims { batch: 2, seq: 300 }, Heads { query: 6, kv: 2, dim: 64 }, true),
    (Dims { batch: 1, seq: 333 }, Heads { query: 1, kv: 1, dim: 64 }, false),
    (Dims { batch: 3, seq: 140 }, Heads { query: 2, kv: 1, dim: 32 }, true),
    (Dims { batch: 1, seq: 200 }, Heads { query: 2, kv: 1, dim: 128 }, false),
];

/// Rows `width` wide of `x`, moved `stride` apart; what lies between is NaN.
fn spread(x: &[f32], width: usize, stride: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / width * stride];
    for (to, from) in out.chunks_mut(stride).zip(x.chunks(width)) {
        to[..width].copy_from_slice(from);
    }
    out
}

/// The reverse; what lies between must still be NaN.
#[track_caller]
fn gather(x: &[f32], width: usize, stride: usize) -> Vec<f32> {
    assert!(x.chunks(stride).all(|row| row[width..].iter().all(|v| v.is_nan())), "wrote too much");
    x.chunks(stride).flat_map(|row| row[..width].to_vec()).collect()
}

/// Context and log-sum-exp of the CPU, and its probabilities.
fn forward(dims: Dims, heads: Heads, starts_n: &[u32], qkv: &[f32]) -> [Vec<f32>; 3] {
    let pairs = dims.batch * heads.query;
    let mut probs = vec![0.0; pairs * dims.seq * dims.seq];
    let (mut lse, mut ctx) =
        (vec![0.0; pairs * dims.seq], vec![0.0; dims.tokens() * heads.width()]);
    let out = cpu::Out { probs_bhll: &mut probs, lse_bhl: &mut lse, ctx_nd: &mut ctx };
    cpu::forward(dims, heads, starts_n, qkv, out);
    [ctx, lse, probs]
}

#[test]
fn forward_and_backward() {
    for (dims, heads, documents) in CASES {
        let (n, row, width) = (dims.tokens(), heads.row(), heads.width());
        let starts_n = starts(dims.batch, dims.seq, documents);
        let (qkv, d_ctx) = (normal(1, n * row, 1.5), normal(2, n * width, 1.0));
        let [ctx, lse, probs] = forward(dims, heads, &starts_n, &qkv);
        let mut d_qkv = vec![0.0; n * row];
        let scratch = &mut vec![0.0; cpu::scratch_len(dims.seq)];
        let back = cpu::Back { qkv_nr: &qkv, probs_bhll: &probs, ctx_nd: &ctx, scratch };
        cpu::backward(dims, heads, &starts_n, &d_ctx, back, &mut d_qkv);

        let (mut ctxs, mut lses, mut grads) = (Vec::new(), Vec::new(), Vec::new());
        for gpu in devices() {
            let starts_n = gpu.buf("test", &starts_n).unwrap();
            let g_qkv = half(&gpu, &spread(&qkv, row, row + 16));
            let g_ctx = poison(&gpu, n * (width + 8));
            let (g_lse, delta) = (poison(&gpu, lse.len()), poison(&gpu, lse.len()));
            let (qkv_nr, ctx_nd) = ((g_qkv.all(), row + 16), (g_ctx.all(), width + 8));
            attention::forward(&gpu, dims, heads, starts_n.all(), qkv_nr, ctx_nd, g_lse.all());
            ctxs.push(gather(&read(&gpu, ctx_nd.0), width, width + 8));
            lses.push(read_full(&gpu, g_lse.all()));

            let g_d_ctx = half(&gpu, &spread(&d_ctx, width, width + 24));
            let g_d_qkv = poison(&gpu, n * (row + 8));
            let (d_ctx_nd, d_qkv_nr) = ((g_d_ctx.all(), width + 24), (g_d_qkv.all(), row + 8));
            let back = Back { qkv_nr, ctx_nd, lse_bhl: g_lse.all(), delta_bhl: delta.all() };
            attention::backward(&gpu, dims, heads, starts_n.all(), d_ctx_nd, back, d_qkv_nr);
            grads.push(gather(&read(&gpu, g_d_qkv.all()), row, row + 8));
        }
        close("ctx", &ctxs[0], &ctx, 2e-2);
        close("lse", &lses[0], &lse, 1e-4);
        same("ctx", &ctxs);
        same("lse", &lses);
        same("d_qkv", &grads);
        let part = |x: &[f32], from: usize, to: usize| -> Vec<f32> {
            x.chunks(row).flat_map(|row| row[from..to].to_vec()).collect()
        };
        let ends = [0, width, width + heads.kv * heads.dim, row];
        for (what, range) in ["d_q", "d_k", "d_v"].into_iter().zip(ends.windows(2)) {
            let [got, wanted] = [&grads[0], &d_qkv].map(|x| part(x, range[0], range[1]));
            if dims.seq == 1 && what != "d_v" {
                // One token alone: softmax passes nothing on to q and k.
                assert!(got.iter().all(|v| v.abs() < 1e-4), "{what}: {got:?}");
            } else {
                close(what, &got, &wanted, 5e-2);
            }
        }
    }
}

/// All tokens but the last are appended at once, the last is decoded.
fn decoded(
    gpu: &Gpu,
    dims: Dims,
    heads: Heads,
    each: bool,
    splits: usize,
    qkv: &[f32],
) -> Vec<f32> {
    let (Dims { batch, seq }, row, width) = (dims, heads.row(), heads.width());
    let capacity = seq + 3;
    let elements = batch * heads.kv * capacity * heads.dim;
    let (k, v) = (poison(gpu, elements), poison(gpu, elements));
    let length = gpu.buf("test", &vec![0i32; if each { batch } else { 1 }]).unwrap();
    let cache = Cache { k: k.all(), v: v.all(), capacity, length: length.all() };
    let rows = |range: std::ops::Range<usize>| -> Vec<f32> {
        qkv.chunks(seq * row).flat_map(|x| x[range.start * row..range.end * row].to_vec()).collect()
    };
    if seq > 1 {
        let before = half(gpu, &rows(0..seq - 1));
        attention::append(gpu, batch, seq - 1, heads, (before.all(), row), cache);
        attention::advance(gpu, length.all(), seq - 1);
    }
    let last = half(gpu, &rows(seq - 1..seq));
    attention::append(gpu, batch, 1, heads, (last.all(), row), cache);
    let [parts, sums] = attention::scratch(batch, heads, splits).map(|len| poison(gpu, len));
    let out = poison(gpu, batch * (width + 8));
    let (scratch, out_nd) = ((parts.all(), sums.all()), (out.all(), width + 8));
    attention::decode(gpu, batch, heads, (last.all(), row), (cache, 1), scratch, out_nd);
    attention::advance(gpu, length.all(), 1);
    assert!(gpu.download(length.all()).unwrap().iter().all(|length| *length == seq as i32));
    gather(&read(gpu, out.all()), width, width + 8)
}

#[test]
fn decoding() {
    let mut cases: Vec<(Dims, Heads)> = CASES.map(|(dims, heads, _)| (dims, heads)).into();
    cases.push((Dims { batch: 2, seq: 150 }, Heads { query: 20, kv: 1, dim: 64 }));
    for (at, (dims, heads)) in cases.into_iter().enumerate() {
        let qkv = normal(3, dims.tokens() * heads.row(), 1.5);
        let [ctx, ..] = forward(dims, heads, &vec![0; dims.tokens()], &qkv);
        let last = |x: &[f32]| x[x.len() - heads.width()..].to_vec();
        let wanted: Vec<f32> = ctx.chunks(dims.seq * heads.width()).flat_map(last).collect();
        let splits = [attention::splits(dims.batch, heads, dims.seq + 3), 1, 5][at % 3];
        let run = |gpu: &Gpu| decoded(gpu, dims, heads, at % 2 == 0, splits, &qkv);
        let results: Vec<_> = devices().iter().map(run).collect();
        close("decoded", &results[0], &wanted, 2e-2);
        same("decoded", &results);
    }
}
