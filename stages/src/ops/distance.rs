//! The loss of phase 2: the mean over tokens of the Euclidean distance to the teacher's vector.
//!
//! Not squared, as in the authors' framework; accumulated in fixed lanes.

use crate::ops::vector::{LANES, fold, vectorised};

/// Adds nothing to a distance that matters, but keeps the gradient finite where both agree.
const FLOOR: f32 = 1e-12;

/// Σ over tokens of ‖s − t‖₂ (of rows of `width`). `ds`, if given, is overwritten by `weight`
/// times the gradient: give 1/tokens of the whole batch for the mean.
pub fn loss(width: usize, s_nd: &[f32], t_nd: &[f32], weight: f32, ds: Option<&mut [f32]>) -> f64 {
    assert_eq!(s_nd.len(), t_nd.len(), "student and teacher differ in length");
    vectorised(|| match ds {
        Some(ds) => {
            let rows = s_nd.chunks_exact(width).zip(t_nd.chunks_exact(width));
            let pairs = rows.zip(ds.chunks_exact_mut(width));
            pairs.map(|((s, t), ds)| with_gradient(s, t, weight, ds)).sum()
        }
        None => distances(width, s_nd, t_nd).sum(),
    })
}

/// ‖s − t‖₂ of each token in turn.
#[inline(always)]
pub fn distances<'a>(
    width: usize,
    s_nd: &'a [f32],
    t_nd: &'a [f32],
) -> impl Iterator<Item = f64> + 'a {
    let rows = s_nd.chunks_exact(width).zip(t_nd.chunks_exact(width));
    rows.map(|(s, t)| f64::from(squared(s, t)).sqrt())
}

#[inline(always)]
fn with_gradient(s: &[f32], t: &[f32], weight: f32, ds: &mut [f32]) -> f64 {
    let norm = (squared(s, t) + FLOOR).sqrt();
    let scale = weight / norm;
    for ((ds, s), t) in ds.iter_mut().zip(s).zip(t) {
        *ds = (s - t) * scale;
    }
    f64::from(norm)
}

#[inline(always)]
fn squared(s: &[f32], t: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (mut left, mut right) = (s.chunks_exact(LANES), t.chunks_exact(LANES));
    for (s, t) in (&mut left).zip(&mut right) {
        for i in 0..LANES {
            let e = s[i] - t[i];
            sums[i] += e * e;
        }
    }
    let tail = left.remainder().iter().zip(right.remainder());
    fold(sums) + tail.map(|(s, t)| (s - t) * (s - t)).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::philox::Philox;

    #[test]
    fn value_and_gradient_match_the_definition() {
        let (mut s, mut t) = (vec![0.0; 57], vec![0.0; 57]);
        Philox::new(1, "s").fill_normal(1.0, &mut s);
        Philox::new(1, "t").fill_normal(2.0, &mut t);
        let exact = |s: &[f64]| -> f64 {
            let square = |i: usize| (s[i] - f64::from(t[i])).powi(2);
            (0..3).map(|r| (r * 19..r * 19 + 19).map(square).sum::<f64>().sqrt()).sum()
        };
        let wide: Vec<f64> = s.iter().map(|x| f64::from(*x)).collect();
        let mut ds = vec![0.0; 57];
        let got = loss(19, &s, &t, 0.5, Some(&mut ds));
        assert!(
            (got - exact(&wide)).abs() < 1e-5 && (got - loss(19, &s, &t, 0.5, None)).abs() < 1e-5
        );
        for i in 0..57 {
            let (mut up, mut down) = (wide.clone(), wide.clone());
            up[i] += 1e-5;
            down[i] -= 1e-5;
            let want = 0.5 * (exact(&up) - exact(&down)) / 2e-5;
            assert!((f64::from(ds[i]) - want).abs() < 1e-5, "{} {want}", ds[i]);
        }
    }

    #[test]
    fn agreement_is_no_singularity() {
        let mut ds = vec![9.0; 4];
        loss(4, &[1.0; 4], &[1.0; 4], 1.0, Some(&mut ds));
        assert_eq!(ds, [0.0; 4]);
    }
}
