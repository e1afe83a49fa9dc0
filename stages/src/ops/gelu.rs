//! GELU by its tanh approximation ("gelu_new", Hendrycks and Gimpel 2016):
//! `½ x (1 + tanh(√(2/π) (x + 0.044715 x³)))`, and the same as `x · sigmoid(2 …)`.

use super::vector::{sigmoid, vectorised};

/// 2 √(2/π).
const SCALE: f32 = 1.595_769_2;
const CUBIC: f32 = 0.044_715;

/// `x_nf` → `y_nf`.
pub fn forward(x_nf: &[f32], y_nf: &mut [f32]) {
    assert_eq!(x_nf.len(), y_nf.len(), "shapes differ");
    vectorised(|| {
        for (y, x) in y_nf.iter_mut().zip(x_nf) {
            *y = x * sigmoid(SCALE * (x + CUBIC * x * x * x));
        }
    });
}

/// `d_y_nf` → `d_x_nf` (overwritten).
pub fn backward(d_y_nf: &[f32], x_nf: &[f32], d_x_nf: &mut [f32]) {
    assert!(x_nf.len() == d_y_nf.len() && x_nf.len() == d_x_nf.len(), "shapes differ");
    vectorised(|| {
        for ((d_x, d_y), x) in d_x_nf.iter_mut().zip(d_y_nf).zip(x_nf) {
            let s = sigmoid(SCALE * (x + CUBIC * x * x * x));
            let inner = SCALE * (1.0 + 3.0 * CUBIC * x * x);
            *d_x = d_y * (s + x * s * (1.0 - s) * inner);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_slopes_are_those_of_the_tanh_formula() {
        let x: Vec<f32> = (-60..60).map(|i| i as f32 * 0.1).collect();
        let gelu = |x: f64| {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        };
        let (mut y, mut d) = (vec![0.0; 120], vec![0.0; 120]);
        forward(&x, &mut y);
        backward(&[1.0; 120], &x, &mut d);
        for ((x, y), d) in x.iter().zip(&y).zip(&d) {
            let x = f64::from(*x);
            assert!((f64::from(*y) - gelu(x)).abs() < 2e-6, "{x}: {y}");
            let slope = (gelu(x + 1e-4) - gelu(x - 1e-4)) / 2e-4;
            assert!((f64::from(*d) - slope).abs() < 1e-5, "{x}: {d} {slope}");
        }
    }
}
