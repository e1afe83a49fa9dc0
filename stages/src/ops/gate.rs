//! The end of the mixer: skip and gate, `(y + D x) · SiLU(z + z_bias)`.
//!
//! Also the decays `a = sigmoid(−A_log)` that the scan takes. Rows of x, z and A_log are parts of
//! wider buffers; strides are given.

use crate::ops::vector::{dot, sigmoid, silu, silu_with_slope, vectorised};

/// Sizes of a gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Tokens.
    pub tokens: usize,
    /// Heads, each with its own `D`.
    pub heads: usize,
    /// Width of a head.
    pub width: usize,
    /// Distance between rows of x (the convolved x‖B‖C).
    pub x_stride: usize,
    /// Distance between rows of z (the projection).
    pub z_stride: usize,
}

impl Shape {
    fn inner(self) -> usize {
        self.heads * self.width
    }
}

/// What both directions read: `y_nd` of the scan, x and z by their first element, and `D`, `z_bias`.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// `[tokens, inner]`, what the scan gave.
    pub y_nd: &'a [f32],
    /// Rows of x, `x_stride` apart.
    pub x: &'a [f32],
    /// Rows of z, `z_stride` apart.
    pub z: &'a [f32],
    /// `[heads]`.
    pub d_h: &'a [f32],
    /// `[inner]`.
    pub z_bias: &'a [f32],
}

/// `out_nd` (overwritten).
pub fn forward(shape: Shape, inputs: Inputs, out_nd: &mut [f32]) {
    let inner = shape.inner();
    vectorised(|| {
        for (token, out) in out_nd.chunks_exact_mut(inner).take(shape.tokens).enumerate() {
            let y = &inputs.y_nd[token * inner..][..inner];
            let x = &inputs.x[token * shape.x_stride..][..inner];
            let z = &inputs.z[token * shape.z_stride..][..inner];
            for ((o, z), bias) in out.iter_mut().zip(z).zip(&inputs.z_bias[..inner]) {
                *o = silu(z + bias);
            }
            for (head, d) in inputs.d_h.iter().enumerate() {
                let at = head * shape.width..(head + 1) * shape.width;
                for ((o, y), x) in out[at.clone()].iter_mut().zip(&y[at.clone()]).zip(&x[at]) {
                    *o *= y + d * x;
                }
            }
        }
    });
}

/// From `d_out_nd`: `dy_nd`, the gradient of `y + D x` (overwritten), and `dz` (overwritten, rows
/// `z_stride` apart); `d_z_bias` is added to. The skip's own gradients follow by [`skip_backward`].
pub fn backward(
    shape: Shape,
    d_out_nd: &[f32],
    inputs: Inputs,
    dy_nd: &mut [f32],
    dz: &mut [f32],
    d_z_bias: &mut [f32],
) {
    let inner = shape.inner();
    vectorised(|| {
        for (token, dy) in dy_nd.chunks_exact_mut(inner).take(shape.tokens).enumerate() {
            let d_out = &d_out_nd[token * inner..][..inner];
            let y = &inputs.y_nd[token * inner..][..inner];
            let x = &inputs.x[token * shape.x_stride..][..inner];
            let z = &inputs.z[token * shape.z_stride..][..inner];
            let dz = &mut dz[token * shape.z_stride..][..inner];
            for (head, d) in inputs.d_h.iter().enumerate() {
                let at = head * shape.width..(head + 1) * shape.width;
                for ((dz, y), x) in dz[at.clone()].iter_mut().zip(&y[at.clone()]).zip(&x[at]) {
                    *dz = y + d * x;
                }
            }
            let bias = &inputs.z_bias[..inner];
            let d_bias = &mut d_z_bias[..inner];
            for i in 0..inner {
                let (value, slope) = silu_with_slope(z[i] + bias[i]);
                dy[i] = d_out[i] * value;
                dz[i] *= d_out[i] * slope;
                d_bias[i] += dz[i];
            }
        }
    });
}

/// The skip's share, once the scan's gradients are there: adds `D dy` to `dx` (rows `x_stride`
/// apart) and `Σ dy·x` to `d_d_h`.
pub fn skip_backward(
    shape: Shape,
    dy_nd: &[f32],
    inputs: Inputs,
    dx: &mut [f32],
    d_d_h: &mut [f32],
) {
    let inner = shape.inner();
    vectorised(|| {
        for (token, dy) in dy_nd.chunks_exact(inner).take(shape.tokens).enumerate() {
            for (head, d) in inputs.d_h.iter().enumerate() {
                let dy = &dy[head * shape.width..][..shape.width];
                let at = token * shape.x_stride + head * shape.width;
                for (dx, dy) in dx[at..][..shape.width].iter_mut().zip(dy) {
                    *dx += d * dy;
                }
                d_d_h[head] += dot(dy, &inputs.x[at..][..shape.width]);
            }
        }
    });
}

/// Decays `a_hn` `[heads, tokens]` from A_log (rows of `heads`, `stride` apart): sigmoid(−A_log),
/// and 0 at the first token of a document, where `starts_n` is the token's own position.
pub fn decays(seq: usize, stride: usize, a_log: &[f32], starts_n: &[u32], a_hn: &mut [f32]) {
    let tokens = starts_n.len();
    vectorised(|| {
        for (head, row) in a_hn.chunks_exact_mut(tokens).enumerate() {
            for (token, a) in row.iter_mut().enumerate() {
                let first = starts_n[token] as usize == token % seq;
                *a = if first { 0.0 } else { sigmoid(-a_log[token * stride + head]) };
            }
        }
    });
}

/// The gradient of A_log (overwritten, same places) from that of log a:
/// d log a / d A_log = −sigmoid(A_log) = a − 1.
pub fn decays_backward(
    stride: usize,
    tokens: usize,
    d_log_a_hn: &[f32],
    a_hn: &[f32],
    d_a_log: &mut [f32],
) {
    let rows = d_log_a_hn.chunks_exact(tokens).zip(a_hn.chunks_exact(tokens));
    for (head, (d_log_a, a)) in rows.enumerate() {
        for token in 0..tokens {
            d_a_log[token * stride + head] = d_log_a[token] * (a[token] - 1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::philox::Philox;

    const SHAPE: Shape = Shape { tokens: 5, heads: 2, width: 3, x_stride: 8, z_stride: 9 };

    fn normal(name: &str, n: usize) -> Vec<f32> {
        let mut out = vec![0.0; n];
        Philox::new(6, name).fill_normal(1.0, &mut out);
        out
    }

    /// Buffers in the order y, x, z, D, z_bias.
    fn loss(v: &[Vec<f32>; 5], w: &[f32]) -> f64 {
        let f = |x: f32| f64::from(x);
        let at = |token: usize, i: usize| {
            let z = f(v[2][token * 9 + i]) + f(v[4][i]);
            let y = f(v[0][token * 6 + i]) + f(v[3][i / 3]) * f(v[1][token * 8 + i]);
            y * z / (1.0 + (-z).exp()) * f(w[token * 6 + i])
        };
        (0..5).flat_map(|t| (0..6).map(move |i| (t, i))).map(|(t, i)| at(t, i)).sum()
    }

    #[test]
    fn gradients_match_finite_differences() {
        let v = [normal("y", 30), normal("x", 40), normal("z", 45), normal("d", 2), normal("b", 6)];
        let w = normal("w", 30);
        let inputs = Inputs { y_nd: &v[0], x: &v[1], z: &v[2], d_h: &v[3], z_bias: &v[4] };
        let mut out = vec![0.0; 30];
        forward(SHAPE, inputs, &mut out);
        let total: f64 = out.iter().zip(&w).map(|(o, w)| f64::from(*o) * f64::from(*w)).sum();
        assert!((total - loss(&v, &w)).abs() < 1e-4);
        let mut d = [vec![0.0; 30], vec![0.0; 40], vec![0.0; 45], vec![0.0; 2], vec![0.0; 6]];
        let [dy, dx, dz, dd, db] = &mut d;
        backward(SHAPE, &w, inputs, dy, dz, db);
        skip_backward(SHAPE, dy, inputs, dx, dd);
        for which in 0..5 {
            for i in 0..v[which].len() {
                let moved = |by: f32| {
                    let mut v = v.clone();
                    v[which][i] += by;
                    (loss(&v, &w), f64::from(v[which][i]))
                };
                let ((up, high), (down, low)) = (moved(5e-3), moved(-5e-3));
                let want = (up - down) / (high - low);
                let got = f64::from(d[which][i]);
                assert!(
                    (got - want).abs() < 2e-4 * (1.0 + want.abs()),
                    "{which} {i}: {got} {want}"
                );
            }
        }
    }

    #[test]
    fn decays_are_sigmoids_and_zero_where_documents_start() {
        let a_log = [0.0, -40.0, 2.0, 40.0, -1.0, 0.5];
        let mut a = vec![9.0; 6];
        decays(3, 2, &a_log, &[0, 1, 1], &mut a);
        assert_eq!(a[..2], [0.0, 0.0]);
        assert!((a[2] - 1.0 / (1.0 + (-1.0f32).exp())).abs() < 1e-6, "{a:?}");
        let mut d = vec![9.0; 6];
        decays_backward(2, 3, &[1.0; 6], &a, &mut d);
        let slope = -1.0 / (1.0 + 1.0f32.exp());
        assert!((d[4] - slope).abs() < 1e-6, "{d:?}");
    }
}
