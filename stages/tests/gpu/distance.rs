//! The loss of phase 2.

use stages::gpu::ops::distance::{Gradient, distances};
use stages::ops::distance;

use crate::support::{close, devices, half, normal, poison, read, read_full, same};

fn case(n: usize, d: usize) {
    let (s, mut t, old) = (normal(1, n * d, 1.0), normal(2, n * d, 2.0), normal(3, n * d, 0.5));
    if n > 1 {
        // Agreement is no singularity.
        t[d..2 * d].copy_from_slice(&s[d..2 * d]);
    }
    let zero = vec![0.0; n * d];
    let norms: Vec<f32> = distance::distances(d, &t, &zero).map(|v| v as f32).collect();
    let plain: Vec<f32> = distance::distances(d, &s, &t).map(|v| v as f32).collect();
    let mut d_s = vec![0.0; n * d];
    let total = distance::loss(d, &s, &t, 0.5, Some(&mut d_s));
    let added: Vec<f32> = d_s.iter().zip(&old).map(|(a, b)| a + b).collect();
    let mut bits = Vec::new();
    for gpu in devices() {
        let (gs, gt) = (half(&gpu, &s), half(&gpu, &t));
        let (far, norm) = (poison(&gpu, n), poison(&gpu, n));
        let pair = (gs.all(), gt.all());
        distances(&gpu, (n, d), pair, Some(far.all()), Some(norm.all()), None);
        close("distance", &read_full(&gpu, far.all()), &plain, 1e-5);
        close("norm", &read_full(&gpu, norm.all()), &norms, 1e-5);
        let (fresh, onto) = (poison(&gpu, n * d), half(&gpu, &old));
        let into = |d_s_nd, add| Some(Gradient { d_s_nd, weight: 0.5, add });
        distances(&gpu, (n, d), pair, Some(far.all()), None, into(fresh.all(), false));
        let got: f64 = read_full(&gpu, far.all()).iter().map(|v| f64::from(*v)).sum();
        assert!((got - total).abs() < 1e-5 * total + 2e-6, "{got} instead of {total}");
        close("gradient", &read(&gpu, fresh.all()), &d_s, 5e-3);
        distances(&gpu, (n, d), pair, None, None, into(onto.all(), true));
        close("added", &read(&gpu, onto.all()), &added, 5e-3);
        bits.push([read(&gpu, fresh.all()), read_full(&gpu, far.all())].concat());
    }
    same("distance", &bits);
}

#[test]
fn values_and_gradients_at_every_width() {
    for (n, d) in [(67, 576), (33, 8), (9, 1000), (7, 2048), (5, 3080), (3, 8192), (2, 16384)] {
        case(n, d);
    }
}
