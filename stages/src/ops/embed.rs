//! Token embedding: rows gathered, and gradients scattered in token order (so bits are fixed).

use super::vector::vectorised;

/// `x_nd[i] = w_vd[tokens_n[i]]`.
pub fn forward(d: usize, tokens_n: &[u32], w_vd: &[f32], x_nd: &mut [f32]) {
    assert_eq!(x_nd.len(), tokens_n.len() * d, "shapes differ");
    for (token, x) in tokens_n.iter().zip(x_nd.chunks_exact_mut(d)) {
        x.copy_from_slice(&w_vd[*token as usize * d..][..d]);
    }
}

/// `d_w_vd[tokens_n[i]] += d_x_nd[i]`, in the order of `i`.
pub fn backward(d: usize, tokens_n: &[u32], d_x_nd: &[f32], d_w_vd: &mut [f32]) {
    assert_eq!(d_x_nd.len(), tokens_n.len() * d, "shapes differ");
    vectorised(|| {
        for (token, d_x) in tokens_n.iter().zip(d_x_nd.chunks_exact(d)) {
            let row = &mut d_w_vd[*token as usize * d..][..d];
            for (w, x) in row.iter_mut().zip(d_x) {
                *w += *x;
            }
        }
    });
}
