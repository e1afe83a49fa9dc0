//! The depthwise convolution.

use stages::gpu::ops::conv::{Factor, Sums, backward, forward, partials};
use stages::ops::Dims;
use stages::ops::conv::{self, Saved, Shape};

use crate::support::{close, devices, full, half, normal, poison, read, read_full, same, starts};

const HEADS: usize = 3;
const INNER: usize = 96;
const STATE: usize = 32;

/// Columns `channels` of rows `stride` apart; the others must still be poisoned.
fn columns(values: &[f32], stride: usize, channels: &std::ops::Range<usize>) -> Vec<f32> {
    for (i, value) in values.iter().enumerate() {
        let own = channels.contains(&(i % stride));
        assert!(own || value.is_nan(), "column {} was written", i % stride);
    }
    values.chunks(stride).flat_map(|row| row[channels.clone()].to_vec()).collect()
}

fn case(dims: Dims, taps: usize, documents: bool, first: usize, scaled: bool) {
    let channels = INNER + 2 * HEADS * STATE;
    let shape = Shape { dims, channels, taps, stride: channels + INNER + 8 };
    let (n, range) = (dims.tokens(), first..channels);
    let (x, d_y) = (normal(1, n * shape.stride, 1.0), normal(2, n * channels, 1.0));
    let (w, bias) = (normal(3, channels * taps, 0.5), normal(4, channels, 1.0));
    let (factor, starts) =
        (normal(5, dims.batch * HEADS, 1.0), starts(dims.batch, dims.seq, documents));
    let scaled_d_y = |i: usize| match (i % channels).checked_sub(INNER) {
        Some(c) if scaled => {
            d_y[i] * factor[i / channels / dims.seq * HEADS + c % (HEADS * STATE) / STATE]
        }
        _ => d_y[i],
    };
    let scaled_d_y: Vec<f32> = (0..n * channels).map(scaled_d_y).collect();
    let (mut y, mut d_x) = (vec![0.0; n * channels], vec![f32::NAN; n * shape.stride]);
    let (mut d_w, mut d_b) = (vec![1.0; channels * taps], vec![1.0; channels]);
    let mut scratch = vec![0.0; 2 * channels * taps];
    conv::forward(shape, &x, &w, &bias, &starts, &mut y, &mut scratch[..channels * taps]);
    let saved = Saved { x: &x, w_ck: &w, starts_n: &starts };
    let both = (&mut d_w[..], &mut d_b[..]);
    conv::backward(shape, range.clone(), &scaled_d_y, saved, &mut d_x, both, &mut scratch);
    let mut bits = Vec::new();
    for gpu in devices() {
        let (gx, g_d_y, gw, gb) =
            (half(&gpu, &x), half(&gpu, &d_y), full(&gpu, &w), full(&gpu, &bias));
        let (gs, gf) = (gpu.buf("starts", &starts).unwrap(), full(&gpu, &factor));
        let (gy, g_d_x) = (poison(&gpu, n * channels), poison(&gpu, n * shape.stride));
        forward(&gpu, shape, range.clone(), gx.all(), (gw.all(), gb.all()), gs.all(), gy.all());
        let got = columns(&read(&gpu, gy.all()), channels, &range);
        let y: Vec<f32> = y.chunks(channels).flat_map(|row| row[first..].to_vec()).collect();
        close("y", &got, &y, 5e-3);
        let scratch = poison(&gpu, partials(shape, range.clone()));
        let (g_d_w, g_d_b) = (full(&gpu, &vec![1.0; d_w.len()]), full(&gpu, &vec![1.0; channels]));
        let sums = Sums { partials: scratch.all(), d_w_ck: g_d_w.all(), d_bias_c: g_d_b.all() };
        let factor = Factor { factor_bh: gf.all(), inner: INNER, heads: HEADS, state: STATE };
        let saved = (gx.all(), gw.all(), gs.all());
        let factor = scaled.then_some(factor);
        backward(&gpu, shape, range.clone(), g_d_y.all(), saved, factor, g_d_x.all(), Some(sums));
        let got = columns(&read(&gpu, g_d_x.all()), shape.stride, &range);
        close("d_x", &got, &columns(&d_x, shape.stride, &range), 5e-3);
        let sums = [read_full(&gpu, g_d_w.all()), read_full(&gpu, g_d_b.all())];
        close("d_w", &sums[0], &d_w, 1e-4);
        close("d_bias", &sums[1], &d_b, 1e-4);
        bits.push([got, sums.concat()].concat());
    }
    same("conv", &bits);
}

#[test]
fn forward_and_backward_of_all_taps() {
    for taps in 1..=8 {
        case(Dims { batch: 3, seq: 37 }, taps, taps % 2 == 0, 0, false);
    }
}

#[test]
fn documents_parts_and_factors() {
    for (batch, seq) in [(1, 1), (1, 300), (3, 2), (3, 70)] {
        for documents in [false, true] {
            case(Dims { batch, seq }, 4, documents, INNER, true);
            case(Dims { batch, seq }, 4, documents, 0, true);
        }
    }
}
