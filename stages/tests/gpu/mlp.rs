//! SwiGLU, GELU, and sums of activations.

use stages::gpu::ops::mlp::{
    add, add_bias, gelu_backward, gelu_forward, swiglu_backward, swiglu_forward,
};
use stages::ops::{gelu, mlp};

use crate::support::{close, devices, full, half, normal, poison, read};

const SHAPES: [(usize, usize); 3] = [(1, 8), (37, 24), (5, 1536)];

#[test]
fn swiglu() {
    for (n, f) in SHAPES {
        let (gate_up, d_h) = (normal(1, 2 * n * f, 2.0), normal(2, n * f, 1.0));
        let (mut h, mut d_gate_up) = (vec![0.0; n * f], vec![0.0; 2 * n * f]);
        mlp::forward(f, &gate_up, &mut h);
        mlp::backward(f, &d_h, &gate_up, &mut d_gate_up);
        for gpu in devices() {
            let (g_gate_up, g_d_h) = (half(&gpu, &gate_up), half(&gpu, &d_h));
            let (g_h, again) = (poison(&gpu, n * f), poison(&gpu, n * f));
            let g_d = poison(&gpu, 2 * n * f);
            swiglu_forward(&gpu, (n, f), g_gate_up.all(), g_h.all());
            close("h", &read(&gpu, g_h.all()), &h, 5e-3);
            let (from, h_again) = (g_gate_up.all(), Some(again.all()));
            swiglu_backward(&gpu, (n, f), g_d_h.all(), from, g_d.all(), h_again);
            close("d_gate_up", &read(&gpu, g_d.all()), &d_gate_up, 5e-3);
            assert_eq!(read(&gpu, again.all()), read(&gpu, g_h.all()), "not the same activation");
            // In place.
            swiglu_backward(&gpu, (n, f), g_d_h.all(), from, from, None);
            assert_eq!(read(&gpu, from), read(&gpu, g_d.all()), "not the same gradient");
        }
    }
}

#[test]
fn gelu_with_and_without_a_bias() {
    for (n, f) in SHAPES {
        let (pre, d_h, bias) = (normal(1, n * f, 2.0), normal(2, n * f, 1.0), normal(3, f, 1.0));
        for biased in [false, true] {
            let x = |(i, v): (usize, &f32)| if biased { v + bias[i % f] } else { *v };
            let x: Vec<f32> = pre.iter().enumerate().map(x).collect();
            let (mut h, mut d_pre) = (vec![0.0; n * f], vec![0.0; n * f]);
            gelu::forward(&x, &mut h);
            gelu::backward(&d_h, &x, &mut d_pre);
            for gpu in devices() {
                let (g_pre, g_d, gb) = (half(&gpu, &pre), half(&gpu, &d_h), full(&gpu, &bias));
                let (g_h, again) = (poison(&gpu, n * f), poison(&gpu, n * f));
                let gb = biased.then(|| gb.all());
                gelu_forward(&gpu, (n, f), g_pre.all(), gb, g_h.all());
                close("h", &read(&gpu, g_h.all()), &h, 5e-3);
                let (from, h_again) = ((g_pre.all(), gb), Some(again.all()));
                gelu_backward(&gpu, (n, f), g_d.all(), from, g_d.all(), h_again);
                close("d_pre", &read(&gpu, g_d.all()), &d_pre, 5e-3);
                assert_eq!(read(&gpu, again.all()), read(&gpu, g_h.all()), "not the same");
            }
        }
    }
}

#[test]
fn sums_of_activations() {
    for (n, f) in SHAPES {
        let (a, b, bias) = (normal(1, n * f, 2.0), normal(2, n * f, 1.0), normal(3, f, 1.0));
        let sum: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
        let biased: Vec<f32> = a.iter().enumerate().map(|(i, a)| a + bias[i % f]).collect();
        for gpu in devices() {
            let (ga, gb, g_bias) = (half(&gpu, &a), half(&gpu, &b), full(&gpu, &bias));
            add(&gpu, ga.all(), gb.all(), gb.all());
            close("a + b", &read(&gpu, gb.all()), &sum, 5e-3);
            add_bias(&gpu, (n, f), ga.all(), g_bias.all());
            close("a + bias", &read(&gpu, ga.all()), &biased, 5e-3);
        }
    }
}
