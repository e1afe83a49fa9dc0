//! The scan with skip and gate, and a step of decoding, against the CPU's.

use stages::gpu::launch::Gpu;
use stages::gpu::ops::ssd::{Grads, Inputs, Out, Saved, Shape, backward, forward, states};
use stages::gpu::ops::ssm_step;
use stages::ops::{Dims, conv, gate, ssd};

use crate::support::{close, devices, full, half, normal, poison, read, read_full, same, starts};

/// Values of a mixer: what the scan reads, and the gradient of what it makes.
struct Values {
    xbc: Vec<f32>,
    z: Vec<f32>,
    a_log: Vec<f32>,
    d: Vec<f32>,
    z_bias: Vec<f32>,
    d_gated: Vec<f32>,
    starts: Vec<u32>,
}

/// Results, in the order in which they are compared.
const NAMES: [&str; 8] = ["gated", "y", "last state", "d_xbc", "d_z", "d_a_log", "d_z_bias", "d_d"];
type Results = [Vec<f32>; 8];

fn inner(shape: Shape) -> usize {
    shape.heads * shape.width
}

fn channels(shape: Shape) -> usize {
    inner(shape) + 2 * shape.heads * shape.state
}

fn values(shape: Shape, bias: f32, documents: bool) -> Values {
    let n = shape.batch * shape.seq;
    let mut a_log = normal(3, n * shape.heads, 1.5);
    a_log.iter_mut().for_each(|a| *a += bias);
    Values {
        xbc: normal(1, n * channels(shape), 0.7),
        z: normal(2, n * inner(shape), 1.0),
        a_log,
        d: normal(4, shape.heads, 1.0),
        z_bias: normal(5, inner(shape), 1.0),
        d_gated: normal(6, n * inner(shape), 1.0),
        starts: starts(shape.batch, shape.seq, documents),
    }
}

/// Rows `width` wide of `x` from column `at` of rows `stride` apart; the rest is NaN.
fn spread(x: &[f32], width: usize, at: usize, stride: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / width * stride];
    for (to, from) in out.chunks_mut(stride).zip(x.chunks(width)) {
        to[at..at + width].copy_from_slice(from);
    }
    out
}

fn columns(x: &[f32], stride: usize, range: std::ops::Range<usize>) -> Vec<f32> {
    x.chunks(stride).flat_map(|row| row[range.clone()].to_vec()).collect()
}

fn on_cpu(shape: Shape, v: &Values) -> Results {
    let Shape { batch, seq, heads, width, state, .. } = shape;
    let (n, inner, channels) = (batch * seq, inner(shape), channels(shape));
    let scan = ssd::Shape { batch, seq, heads, width, state, chunk: 16 };
    let gates = gate::Shape { tokens: n, heads, width, x_stride: channels, z_stride: inner };
    let mut a_hn = vec![0.0; heads * n];
    gate::decays(seq, heads, &v.a_log, &v.starts, &mut a_hn);
    let (mut y, mut kept) = (vec![0.0; n * inner], vec![0.0; scan.states()]);
    let mut scratch = ssd::Scratch::new(scan);
    ssd::forward(scan, &v.xbc, &a_hn, &mut y, &mut kept, &mut scratch);
    let inputs = gate::Inputs { y_nd: &y, x: &v.xbc, z: &v.z, d_h: &v.d, z_bias: &v.z_bias };
    let mut gated = vec![0.0; n * inner];
    gate::forward(gates, inputs, &mut gated);
    let mut with_skip = y.clone();
    for (i, y) in with_skip.iter_mut().enumerate() {
        *y += v.d[i % inner / width] * v.xbc[i / inner * channels + i % inner];
    }
    // The CPU's states are state × width.
    let size = state * width;
    let mut last = Vec::new();
    for pair in kept.chunks(size * (scan.chunks() + 1)) {
        let end = &pair[size * scan.chunks()..];
        last.extend((0..size).map(|i| end[i % state * width + i / state]));
    }
    let (mut dy, mut dz) = (vec![0.0; n * inner], vec![0.0; n * inner]);
    let (mut d_z_bias, mut d_d) = (vec![0.0; inner], vec![0.0; heads]);
    gate::backward(gates, &v.d_gated, inputs, &mut dy, &mut dz, &mut d_z_bias);
    let (mut d_xbc, mut d_log_a) = (vec![0.0; n * channels], vec![0.0; heads * n]);
    let saved = ssd::Saved { xbc: &v.xbc, a_hn: &a_hn, y_nd: &y, states: &kept };
    ssd::backward(scan, &dy, saved, &mut d_xbc, &mut d_log_a, &mut scratch);
    gate::skip_backward(gates, &dy, inputs, &mut d_xbc, &mut d_d);
    let mut d_a_log = vec![0.0; n * heads];
    gate::decays_backward(heads, n, &d_log_a, &a_hn, &mut d_a_log);
    [gated, with_skip, last, d_xbc, dz, d_a_log, d_z_bias, d_d]
}

fn on_gpu(gpu: &Gpu, shape: Shape, v: &Values) -> Results {
    let Shape { batch, seq, heads, width, state, proj_stride, a_stride } = shape;
    let (n, inner, channels) = (batch * seq, inner(shape), channels(shape));
    let (xbc, proj) = (half(gpu, &v.xbc), half(gpu, &spread(&v.z, inner, channels, proj_stride)));
    let a_log = full(gpu, &spread(&v.a_log, heads, 0, a_stride));
    let (d, z_bias) = (full(gpu, &v.d), full(gpu, &v.z_bias));
    let starts = gpu.buf("test", &v.starts).unwrap();
    let inputs = Inputs {
        xbc_nc: xbc.all(),
        proj_nr: proj.all(),
        a_log_nh: a_log.all(),
        d_h: d.all(),
        z_bias: z_bias.all(),
        starts_n: starts.all(),
    };
    let (gated, y) = (poison(gpu, n * inner), poison(gpu, n * inner));
    let kept = poison(gpu, states(Dims { batch, seq }, heads, width, state));
    let last = poison(gpu, batch * inner * state);
    let out = Out { gated_nd: gated.all(), y_nd: None, states: None, last_state: None };
    forward(gpu, shape, inputs, out);
    let lean = read(gpu, gated.all());
    gpu.fill(gated.all(), 0xff);
    let (y_nd, states) = (Some(y.all()), Some(kept.all()));
    forward(gpu, shape, inputs, Out { y_nd, states, last_state: Some(last.all()), ..out });
    same("forward", &[lean, read(gpu, gated.all())]);

    let (d_gated, d_xbc) = (half(gpu, &v.d_gated), poison(gpu, n * channels));
    let d_proj = poison(gpu, n * proj_stride);
    let (d_z_bias, d_d) = (poison(gpu, batch * inner), poison(gpu, batch * heads));
    let grads = Grads {
        d_xbc_nc: d_xbc.all(),
        d_proj_nr: d_proj.all(),
        d_z_bias_parts: d_z_bias.all(),
        d_d_parts: d_d.all(),
    };
    let saved = Saved { y_nd: y.all(), states: kept.all() };
    backward(gpu, shape, d_gated.all(), inputs, saved, grads);
    let d_proj = read(gpu, d_proj.all());
    let part = |range| columns(&d_proj, proj_stride, range);
    let a_at = channels + inner;
    assert!(part(0..channels).iter().all(|v| v.is_nan()), "wrote too much");
    assert!(part(a_at + heads..proj_stride).iter().all(|v| *v == 0.0), "the filling is not zero");
    let total = |parts: Vec<f32>| {
        let columns = parts.len() / batch;
        (0..columns)
            .map(|c| parts.iter().skip(c).step_by(columns).sum::<f32>())
            .collect::<Vec<f32>>()
    };
    [
        read(gpu, gated.all()),
        read(gpu, y.all()),
        read_full(gpu, last.all()),
        read(gpu, d_xbc.all()),
        part(channels..a_at),
        part(a_at..a_at + heads),
        total(read_full(gpu, d_z_bias.all())),
        total(read_full(gpu, d_d.all())),
    ]
}

fn case(dims: Dims, heads: usize, (width, state): (usize, usize), bias: f32, documents: bool) {
    let Dims { batch, seq } = dims;
    let rows = heads * (2 * width + 2 * state) + heads;
    let (proj_stride, a_stride) = (rows.next_multiple_of(8) + 8, heads.next_multiple_of(8));
    let shape = Shape { batch, seq, heads, width, state, proj_stride, a_stride };
    let v = values(shape, bias, documents);
    let wanted = on_cpu(shape, &v);
    let all: Vec<Results> = devices().iter().map(|gpu| on_gpu(gpu, shape, &v)).collect();
    for (i, name) in NAMES.iter().enumerate() {
        let results: Vec<Vec<f32>> = all.iter().map(|results| results[i].clone()).collect();
        same(name, &results);
        if *name == "d_d" {
            // A sum that may cancel: measured against its terms.
            let most = 0.01 * ((batch * seq * width) as f32).sqrt();
            let off = results[0].iter().zip(&wanted[i]).map(|(g, w)| (g - w).abs());
            assert!(off.clone().all(|off| off < most), "d_d: {:?}", off.collect::<Vec<_>>());
            continue;
        }
        close(name, &results[0], &wanted[i], 4e-2);
    }
}

#[test]
fn lengths_documents_and_decays() {
    for (batch, seq) in [(1, 1), (3, 63), (1, 64), (2, 65), (1, 200)] {
        for (bias, documents) in [(-4.0, false), (0.0, true), (-8.0, true), (3.0, false)] {
            case(Dims { batch, seq }, 2, (64, 64), bias, documents);
        }
    }
    case(Dims { batch: 3, seq: 130 }, 9, (64, 64), -2.0, true);
}

#[test]
fn all_sizes() {
    for width in [32, 64, 128] {
        for state in [16, 32, 64, 128] {
            case(Dims { batch: 1, seq: 140 }, 1, (width, state), -3.0, state == 32);
        }
    }
}

#[test]
fn wide_blocks() {
    // Enough heads for blocks of 64 columns.
    case(Dims { batch: 12, seq: 70 }, 11, (64, 32), -3.0, true);
}

/// Steps from the state after a prefix are the scan of the whole.
#[test]
fn steps_follow_the_cpu() {
    for (batch, heads, width, state, taps) in
        [(1, 9, 64, 64, 4), (3, 2, 32, 16, 1), (2, 1, 128, 128, 3)]
    {
        let one = ssd::Shape { batch: 1, seq: 1, heads, width, state, chunk: 1 };
        let (inner, channels) = (one.inner(), one.row());
        let proj_stride = (channels + inner + heads).next_multiple_of(8);
        let a_stride = heads.next_multiple_of(8);
        let shape = ssm_step::Shape { batch, heads, width, state, taps, proj_stride, a_stride };
        let (w, bias) = (normal(1, channels * taps, 0.5), normal(2, channels, 0.3));
        let (d, z_bias) = (normal(3, heads, 1.0), normal(4, inner, 1.0));
        let (mut windows, mut scans) =
            (vec![vec![0.0; channels * taps]; batch], vec![vec![0.0; inner * state]; batch]);
        let gpus = devices();
        let memory: Vec<_> = gpus
            .iter()
            .map(|gpu| {
                let window = full(gpu, &vec![0.0; (batch * channels * (taps - 1)).max(1)]);
                (window, full(gpu, &vec![0.0; batch * inner * state]))
            })
            .collect();
        for token in 0..6 {
            let (proj, a_log) = (
                normal(10 + token, batch * proj_stride, 1.0),
                normal(20 + token, batch * a_stride, 2.0),
            );
            let mut wanted = Vec::new();
            for b in 0..batch {
                let row = &proj[b * proj_stride..][..channels + inner];
                let (mut xbc, mut y, mut out) =
                    (vec![0.0; channels], vec![0.0; inner], vec![0.0; inner]);
                conv::step(taps, &row[..channels], &w, &bias, &mut windows[b], &mut xbc);
                let a: Vec<f32> =
                    a_log[b * a_stride..][..heads].iter().map(|a| 1.0 / (1.0 + a.exp())).collect();
                ssd::step(one, &xbc, &a, &mut scans[b], &mut y);
                let gates =
                    gate::Shape { tokens: 1, heads, width, x_stride: channels, z_stride: inner };
                let inputs = gate::Inputs {
                    y_nd: &y,
                    x: &xbc,
                    z: &row[channels..],
                    d_h: &d,
                    z_bias: &z_bias,
                };
                gate::forward(gates, inputs, &mut out);
                wanted.extend(out);
            }
            let mut results = Vec::new();
            for (gpu, (window, scan)) in gpus.iter().zip(&memory) {
                let (g_proj, g_a_log) = (half(gpu, &proj), full(gpu, &a_log));
                let (g_w, g_bias) = (full(gpu, &w), full(gpu, &bias));
                let (g_d, g_z_bias) = (full(gpu, &d), full(gpu, &z_bias));
                let params = ssm_step::Params {
                    w_ck: g_w.all(),
                    bias_c: g_bias.all(),
                    d_h: g_d.all(),
                    z_bias: g_z_bias.all(),
                };
                let state = ssm_step::State { window: window.all(), state: scan.all() };
                let gated = poison(gpu, batch * inner);
                let token = (g_proj.all(), g_a_log.all());
                ssm_step::step(gpu, shape, token, params, state, gated.all());
                results.push(read(gpu, gated.all()));
            }
            close("step", &results[0], &wanted, 1e-2);
            same("step", &results);
        }
    }
}
