//! Depthwise causal convolution over the channels x‖B‖C, as shifted multiply-adds.
//!
//! Taps run from oldest to newest, so the last one meets the current token; what lies before the
//! document's start counts as zero. No activation follows (Discrete Mamba-2).

use crate::ops::Dims;
use crate::ops::vector::vectorised;

/// Sizes of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Sequences and positions.
    pub dims: Dims,
    /// Channels convolved: the first so many of every input row.
    pub channels: usize,
    /// Taps.
    pub taps: usize,
    /// Distance between input rows (they are part of a wider projection).
    pub stride: usize,
}

/// `y_nc` `[tokens, channels]` (overwritten) from `x`, the first `channels` of rows `stride`
/// apart. `w_ck` is `[channels, taps]`; `taps_kc` is scratch of the same length.
pub fn forward(
    shape: Shape,
    x: &[f32],
    w_ck: &[f32],
    bias_c: &[f32],
    starts_n: &[u32],
    y_nc: &mut [f32],
    taps_kc: &mut [f32],
) {
    transpose(shape, w_ck, taps_kc);
    vectorised(|| {
        for (token, y) in
            y_nc.chunks_exact_mut(shape.channels).take(shape.dims.tokens()).enumerate()
        {
            y.copy_from_slice(bias_c);
            for back in 0..reach(shape, token, starts_n) {
                let w = &taps_kc[(shape.taps - 1 - back) * shape.channels..][..shape.channels];
                let x = &x[(token - back) * shape.stride..][..shape.channels];
                for ((y, w), x) in y.iter_mut().zip(w).zip(x) {
                    *y += w * x;
                }
            }
        }
    });
}

/// Everything that [`backward`] reads.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// What [`forward`] was given.
    pub x: &'a [f32],
    /// What [`forward`] was given.
    pub w_ck: &'a [f32],
    /// What [`forward`] was given.
    pub starts_n: &'a [u32],
}

/// From `dy_nc`: `dx` (overwritten in the same columns as `x`; the other columns of its rows are
/// left alone), `dw_ck` and `d_bias_c` (added to). `channels` is a range, so that a caller may
/// leave out channels that nothing depends on. `scratch` is twice as long as the weights.
pub fn backward(
    shape: Shape,
    channels: std::ops::Range<usize>,
    dy_nc: &[f32],
    saved: Saved,
    dx: &mut [f32],
    (dw_ck, d_bias_c): (&mut [f32], &mut [f32]),
    scratch: &mut [f32],
) {
    let (taps_kc, d_taps_kc) = scratch.split_at_mut(shape.taps * shape.channels);
    transpose(shape, saved.w_ck, taps_kc);
    d_taps_kc.fill(0.0);
    let (from, len) = (channels.start, channels.len());
    vectorised(|| {
        for token in 0..shape.dims.tokens() {
            dx[token * shape.stride + from..][..len].fill(0.0);
            let dy = &dy_nc[token * shape.channels + from..][..len];
            for (to, dy) in d_bias_c[channels.clone()].iter_mut().zip(dy) {
                *to += dy;
            }
            for back in 0..reach(shape, token, saved.starts_n) {
                let tap = (shape.taps - 1 - back) * shape.channels + from;
                let at = (token - back) * shape.stride + from;
                let (w, dw) = (&taps_kc[tap..][..len], &mut d_taps_kc[tap..][..len]);
                let (x, dx) = (&saved.x[at..][..len], &mut dx[at..][..len]);
                for i in 0..len {
                    dx[i] += w[i] * dy[i];
                    dw[i] += x[i] * dy[i];
                }
            }
        }
    });
    for channel in channels {
        for tap in 0..shape.taps {
            dw_ck[channel * shape.taps + tap] += d_taps_kc[tap * shape.channels + channel];
        }
    }
}

/// One token: `window` `[taps, channels]` holds the last inputs, oldest first; it is moved on.
#[inline(always)]
pub fn step(
    taps: usize,
    x_c: &[f32],
    w_ck: &[f32],
    bias_c: &[f32],
    window: &mut [f32],
    y_c: &mut [f32],
) {
    let channels = x_c.len();
    window.copy_within(channels.., 0);
    window[(taps - 1) * channels..].copy_from_slice(x_c);
    for (channel, y) in y_c.iter_mut().enumerate() {
        let products =
            (0..taps).map(|tap| w_ck[channel * taps + tap] * window[tap * channels + channel]);
        *y = bias_c[channel] + products.sum::<f32>();
    }
}

/// How many tokens, itself included, token `token` may look at.
#[inline(always)]
fn reach(shape: Shape, token: usize, starts_n: &[u32]) -> usize {
    let position = token % shape.dims.seq;
    shape.taps.min(position - starts_n[token] as usize + 1)
}

fn transpose(shape: Shape, w_ck: &[f32], taps_kc: &mut [f32]) {
    for (channel, w) in w_ck.chunks_exact(shape.taps).enumerate() {
        for (tap, w) in w.iter().enumerate() {
            taps_kc[tap * shape.channels + channel] = *w;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::philox::Philox;

    const SHAPE: Shape = Shape { dims: Dims { batch: 2, seq: 9 }, channels: 5, taps: 4, stride: 7 };

    fn normal(name: &str, n: usize) -> Vec<f32> {
        let mut out = vec![0.0; n];
        Philox::new(5, name).fill_normal(1.0, &mut out);
        out
    }

    fn starts() -> Vec<u32> {
        (0..18u32).map(|n| if n >= 9 && n % 9 >= 4 { 4 } else { 0 }).collect()
    }

    fn loss(x: &[f32], w: &[f32], bias: &[f32], weight: &[f32]) -> f64 {
        let starts = starts();
        let mut total = 0.0;
        for token in 0..18 {
            for c in 0..5 {
                let mut y = f64::from(bias[c]);
                for back in 0..4 {
                    if token % 9 >= starts[token] as usize + back {
                        y += f64::from(w[c * 4 + 3 - back]) * f64::from(x[(token - back) * 7 + c]);
                    }
                }
                total += y * f64::from(weight[token * 5 + c]);
            }
        }
        total
    }

    #[test]
    fn forward_is_the_definition_and_step_follows_it() {
        let (x, w, bias) = (normal("x", 126), normal("w", 20), normal("b", 5));
        let (mut y, mut scratch) = (vec![0.0; 90], vec![0.0; 20]);
        forward(SHAPE, &x, &w, &bias, &starts(), &mut y, &mut scratch);
        for i in 0..90 {
            let mut pick = vec![0.0; 90];
            pick[i] = 1.0;
            assert!((f64::from(y[i]) - loss(&x, &w, &bias, &pick)).abs() < 1e-5);
        }
        let (mut window, mut out) = (vec![0.0; 20], vec![0.0; 5]);
        for token in 0..9 {
            step(4, &x[token * 7..][..5], &w, &bias, &mut window, &mut out);
            let same = out.iter().zip(&y[token * 5..]).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(same, "token {token}");
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        let (x, w, bias, weight) =
            (normal("x", 126), normal("w", 20), normal("b", 5), normal("l", 90));
        let (mut dx, mut dw, mut db) = (vec![9.0; 126], vec![1.0; 20], vec![1.0; 5]);
        let saved = Saved { x: &x, w_ck: &w, starts_n: &starts() };
        backward(SHAPE, 0..5, &weight, saved, &mut dx, (&mut dw, &mut db), &mut [0.0; 40]);
        let check = |got: f32, up: f64, down: f64| {
            assert!(
                (f64::from(got) - (up - down) / 0.25).abs() < 1e-4,
                "{got} {}",
                (up - down) / 0.25
            );
        };
        let moved = |v: &[f32], i: usize, by: f32| {
            let mut v = v.to_vec();
            v[i] += by;
            v
        };
        for (i, got) in dx.iter().enumerate() {
            if i % 7 >= 5 {
                assert_eq!(*got, 9.0, "a foreign column was written");
                continue;
            }
            let f = |by| loss(&moved(&x, i, by), &w, &bias, &weight);
            check(*got, f(0.125), f(-0.125));
        }
        for (i, got) in dw.iter().enumerate() {
            let f = |by| loss(&x, &moved(&w, i, by), &bias, &weight);
            check(got - 1.0, f(0.125), f(-0.125));
        }
        for (i, got) in db.iter().enumerate() {
            let f = |by| loss(&x, &w, &moved(&bias, i, by), &weight);
            check(got - 1.0, f(0.125), f(-0.125));
        }
    }
}
