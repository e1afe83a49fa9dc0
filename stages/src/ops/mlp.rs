//! The gate of a SwiGLU MLP: `act = silu(gate) · up`. The products around it are plain `linear`s.

use super::vector::{sigmoid, vectorised};

/// `gu_n2f` (a row: gate, then up) → `act_nf`.
pub fn forward(f: usize, gu_n2f: &[f32], act_nf: &mut [f32]) {
    assert!(gu_n2f.len() == 2 * act_nf.len() && act_nf.len().is_multiple_of(f), "shapes differ");
    vectorised(|| {
        for (gu, act) in gu_n2f.chunks_exact(2 * f).zip(act_nf.chunks_exact_mut(f)) {
            let (gate, up) = gu.split_at(f);
            for ((a, g), u) in act.iter_mut().zip(gate).zip(up) {
                *a = g * sigmoid(*g) * u;
            }
        }
    });
}

/// `d_act_nf` → `d_gu_n2f` (overwritten).
pub fn backward(f: usize, d_act_nf: &[f32], gu_n2f: &[f32], d_gu_n2f: &mut [f32]) {
    assert!(gu_n2f.len() == 2 * d_act_nf.len() && gu_n2f.len() == d_gu_n2f.len(), "shapes differ");
    vectorised(|| {
        let rows = gu_n2f.chunks_exact(2 * f).zip(d_gu_n2f.chunks_exact_mut(2 * f));
        for ((gu, d_gu), d_act) in rows.zip(d_act_nf.chunks_exact(f)) {
            let ((gate, up), (d_gate, d_up)) = (gu.split_at(f), d_gu.split_at_mut(f));
            let gates = gate.iter().zip(up).zip(d_act);
            for (((g, u), d), (d_g, d_u)) in gates.zip(d_gate.iter_mut().zip(d_up)) {
                let s = sigmoid(*g);
                *d_u = d * (g * s);
                *d_g = d * u * (s * (1.0 + g * (1.0 - s)));
            }
        }
    });
}
