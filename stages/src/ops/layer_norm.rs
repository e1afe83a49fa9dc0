//! LayerNorm: `y = (x − mean) · rsqrt(var + eps) · w + b`, row by row. Knows no model.

use super::vector::{dot, sum, vectorised};

/// `x_nd`, `w_d`, `b_d` → `y_nd`, and the factor of every row in `inv_n` for the way back. The
/// variance is that of the row itself (divided by d), as torch has it.
pub fn forward(
    x_nd: &[f32],
    w_d: &[f32],
    b_d: &[f32],
    eps: f32,
    y_nd: &mut [f32],
    inv_n: &mut [f32],
) {
    let d = w_d.len();
    assert!(x_nd.len() == y_nd.len() && x_nd.len() == inv_n.len() * d, "shapes differ");
    vectorised(|| {
        let rows = x_nd.chunks_exact(d).zip(y_nd.chunks_exact_mut(d));
        for ((x, y), inv) in rows.zip(inv_n) {
            let mean = sum(x) / d as f32;
            for (y, x) in y.iter_mut().zip(x) {
                *y = x - mean;
            }
            *inv = 1.0 / (dot(y, y) / d as f32 + eps).sqrt();
            for ((y, w), b) in y.iter_mut().zip(w_d).zip(b_d) {
                *y = *y * *inv * w + b;
            }
        }
    });
}

/// *Adds* the input gradient to `d_x_nd` and, if wanted, the gradients of weight and bias.
/// With x̂ = (x − mean) · inv and g = dy · w: `dx = inv · (g − mean(g) − x̂ · mean(g · x̂))`.
pub fn backward(
    d_y_nd: &[f32],
    x_nd: &[f32],
    w_d: &[f32],
    inv_n: &[f32],
    d_x_nd: &mut [f32],
    mut weights: Option<(&mut [f32], &mut [f32])>,
) {
    let d = w_d.len();
    assert!(x_nd.len() == d_y_nd.len() && x_nd.len() == inv_n.len() * d, "shapes differ");
    assert_eq!(x_nd.len(), d_x_nd.len(), "shapes differ");
    vectorised(|| {
        let (mut g, mut hat) = (vec![0.0; d], vec![0.0; d]);
        let rows = x_nd.chunks_exact(d).zip(d_y_nd.chunks_exact(d));
        for (((x, d_y), d_x), inv) in rows.zip(d_x_nd.chunks_exact_mut(d)).zip(inv_n) {
            let mean = sum(x) / d as f32;
            for i in 0..d {
                g[i] = d_y[i] * w_d[i];
                hat[i] = (x[i] - mean) * inv;
            }
            let (level, pull) = (sum(&g) / d as f32, dot(&g, &hat) / d as f32);
            for i in 0..d {
                d_x[i] += inv * (g[i] - level - hat[i] * pull);
            }
            if let Some((d_w, d_b)) = &mut weights {
                for i in 0..d {
                    d_w[i] += d_y[i] * hat[i];
                    d_b[i] += d_y[i];
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::philox::Philox;

    const D: usize = 7;
    const EPS: f32 = 1e-3;

    fn normal(name: &str, n: usize) -> Vec<f32> {
        let mut out = vec![0.0; n];
        Philox::new(9, name).fill_normal(1.5, &mut out);
        out
    }

    /// Σ weight · LayerNorm in f64.
    fn loss(x: &[f32], w: &[f32], b: &[f32], weight: &[f32]) -> f64 {
        let row = |(x, weight): (&[f32], &[f32])| -> f64 {
            let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
            let mean = x.iter().sum::<f64>() / D as f64;
            let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / D as f64;
            let y = |i: usize| {
                (x[i] - mean) / (var + f64::from(EPS)).sqrt() * f64::from(w[i]) + f64::from(b[i])
            };
            (0..D).map(|i| y(i) * f64::from(weight[i])).sum()
        };
        x.chunks(D).zip(weight.chunks(D)).map(row).sum()
    }

    #[test]
    fn forward_and_gradients_are_those_of_the_definition() {
        let (x, w, b) = (normal("x", 3 * D), normal("w", D), normal("b", D));
        let weight = normal("l", 3 * D);
        let (mut y, mut inv) = (vec![f32::NAN; 3 * D], vec![f32::NAN; 3]);
        forward(&x, &w, &b, EPS, &mut y, &mut inv);
        let total: f64 = y.iter().zip(&weight).map(|(y, l)| f64::from(y * l)).sum();
        assert!((total - loss(&x, &w, &b, &weight)).abs() < 1e-4);
        let (mut dx, mut dw, mut db) = (vec![1.0; 3 * D], vec![1.0; D], vec![1.0; D]);
        backward(&weight, &x, &w, &inv, &mut dx, Some((&mut dw, &mut db)));
        let check = |got: &[f32], at: &dyn Fn(usize, f32) -> f64| {
            for (i, got) in got.iter().enumerate() {
                let slope = (at(i, 1e-2) - at(i, -1e-2)) / 2e-2;
                assert!((f64::from(got - 1.0) - slope).abs() < 2e-3, "{i}: {got} {slope}");
            }
        };
        let moved = |v: &[f32], i: usize, by: f32| {
            let mut v = v.to_vec();
            v[i] += by;
            v
        };
        check(&dx, &|i, by| loss(&moved(&x, i, by), &w, &b, &weight));
        check(&dw, &|i, by| loss(&x, &moved(&w, i, by), &b, &weight));
        check(&db, &|i, by| loss(&x, &w, &moved(&b, i, by), &weight));
    }
}
