//! RMSNorm and LayerNorm.

use stages::gpu::ops::norm::{Gradients, Norm, Saved, Sums, backward, forward, partials};
use stages::ops::{layer_norm, norm};

use crate::support::{close, devices, full, half, normal, poison, read, read_full, same};

const EPS: f32 = 1e-5;

/// What the CPU gives: y, inv, d_x, d_w, d_b; weight gradients are added to ones.
fn wanted(layer: bool, [x, w, b, d_y, residual]: [&[f32]; 5]) -> [Vec<f32>; 5] {
    let (d, n) = (w.len(), x.len() / w.len());
    let (mut y, mut inv, mut d_x) = (vec![0.0; n * d], vec![0.0; n], residual.to_vec());
    let (mut d_w, mut d_b) = (vec![1.0; d], vec![1.0; d]);
    if layer {
        layer_norm::forward(x, w, b, EPS, &mut y, &mut inv);
        layer_norm::backward(d_y, x, w, &inv, &mut d_x, Some((&mut d_w, &mut d_b)));
    } else {
        norm::forward(x, w, EPS, &mut y, &mut inv);
        norm::backward(d_y, x, w, &inv, &mut d_x, Some(&mut d_w));
    }
    [y, inv, d_x, d_w, d_b]
}

fn case(n: usize, d: usize, layer: bool, both: bool) {
    let [x, d_y, d_y2, residual] = [1, 2, 3, 4].map(|seed| normal(seed, n * d, 1.5));
    let (w, b) = (normal(5, d, 1.0), normal(6, d, 1.0));
    let total: Vec<f32> = d_y.iter().zip(&d_y2).map(|(a, b)| a + b).collect();
    let (total, residual) = if both { (total, residual) } else { (d_y.clone(), vec![0.0; n * d]) };
    let [y, inv, d_x, d_w, d_b] = wanted(layer, [&x, &w, &b, &total, &residual]);
    let mut bits = Vec::new();
    for gpu in devices() {
        let (gx, gw, gb) = (half(&gpu, &x), full(&gpu, &w), full(&gpu, &b));
        let norm = Norm { w: gw.all(), b: layer.then(|| gb.all()), eps: EPS };
        let (gy, g_inv, mean) = (poison(&gpu, n * d), poison(&gpu, n), poison(&gpu, n));
        let saved = Saved { inv_n: g_inv.all(), mean_n: layer.then(|| mean.all()) };
        forward(&gpu, (n, d), norm, gx.all(), gy.all(), Some(saved));
        close("y", &read(&gpu, gy.all()), &y, 5e-3);
        close("inv", &read_full(&gpu, g_inv.all()), &inv, 1e-5);
        // The gradient takes the place of the residual's.
        let (g_d_y, g_d_y2) = (half(&gpu, &d_y), half(&gpu, &d_y2));
        let g_d_x = if both { half(&gpu, &residual) } else { poison(&gpu, n * d) };
        let gradients = Gradients {
            d_y_nd: g_d_y.all(),
            d_y2_nd: both.then(|| g_d_y2.all()),
            d_residual_nd: both.then(|| g_d_x.all()),
            d_x_nd: g_d_x.all(),
        };
        let scratch = poison(&gpu, partials((n, d), layer));
        let (g_d_w, g_d_b) = (full(&gpu, &vec![1.0; d]), full(&gpu, &vec![1.0; d]));
        let d_b_out = layer.then(|| g_d_b.all());
        let sums = Sums { partials: scratch.all(), d_w: g_d_w.all(), d_b: d_b_out };
        backward(&gpu, (n, d), norm, gx.all(), saved, gradients, Some(sums));
        let got = [read(&gpu, g_d_x.all()), read_full(&gpu, g_d_w.all())];
        close("d_x", &got[0], &d_x, 5e-3);
        close("d_w", &got[1], &d_w, 1e-4);
        close("d_b", &read_full(&gpu, g_d_b.all()), &d_b, 1e-4);
        bits.push(got.concat());
    }
    same("norm", &bits);
}

#[test]
fn both_norms_at_every_width() {
    for (n, d) in [(67, 576), (33, 8), (9, 1000), (7, 2048), (5, 3080), (3, 8192), (2, 16384)] {
        for layer in [false, true] {
            case(n, d, layer, true);
            case(n, d, layer, false);
        }
    }
}
