//! RMSNorm: `y = x · rsqrt(mean(x²) + eps) · w`, row by row. Knows no model.

use super::vector::{dot, sum_of, vectorised};

/// `x_nd`, `w_d` → `y_nd`, and the factor of every row in `inv_n` for the way back.
pub fn forward(x_nd: &[f32], w_d: &[f32], eps: f32, y_nd: &mut [f32], inv_n: &mut [f32]) {
    let d = w_d.len();
    assert!(x_nd.len() == y_nd.len() && x_nd.len() == inv_n.len() * d, "shapes differ");
    vectorised(|| {
        let rows = x_nd.chunks_exact(d).zip(y_nd.chunks_exact_mut(d));
        for ((x, y), inv) in rows.zip(inv_n) {
            *inv = 1.0 / (dot(x, x) / d as f32 + eps).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(w_d) {
                *y = x * *inv * w;
            }
        }
    });
}

/// *Adds* the input gradient to `d_x_nd` (it meets the residual's there) and, if wanted, the
/// weight gradient to `d_w_d`.
pub fn backward(
    d_y_nd: &[f32],
    x_nd: &[f32],
    w_d: &[f32],
    inv_n: &[f32],
    d_x_nd: &mut [f32],
    d_w_d: Option<&mut [f32]>,
) {
    let d = w_d.len();
    assert!(x_nd.len() == d_y_nd.len() && x_nd.len() == inv_n.len() * d, "shapes differ");
    assert_eq!(x_nd.len(), d_x_nd.len(), "shapes differ");
    vectorised(|| {
        let rows = x_nd.chunks_exact(d).zip(d_y_nd.chunks_exact(d));
        for (((x, d_y), d_x), inv) in rows.zip(d_x_nd.chunks_exact_mut(d)).zip(inv_n) {
            let mut through = 0.0;
            // Σ d_y · w · x without a buffer for d_y · w: blocks of the vector's own length.
            for ((x, d_y), w) in x.chunks(256).zip(d_y.chunks(256)).zip(w_d.chunks(256)) {
                let mut product = [0.0; 256];
                for ((p, a), b) in product.iter_mut().zip(d_y).zip(w) {
                    *p = a * b;
                }
                through += sum_of(&product[..x.len()], x, |a, b| a * b);
            }
            let pull = through * inv * inv * inv / d as f32;
            for (((d_x, d_y), x), w) in d_x.iter_mut().zip(d_y).zip(x).zip(w_d) {
                *d_x += d_y * w * inv - x * pull;
            }
        }
        if let Some(d_w) = d_w_d {
            let rows = x_nd.chunks_exact(d).zip(d_y_nd.chunks_exact(d));
            for ((x, d_y), inv) in rows.zip(inv_n) {
                for ((d_w, d_y), x) in d_w.iter_mut().zip(d_y).zip(x) {
                    *d_w += d_y * (x * inv);
                }
            }
        }
    });
}
