//! The norm of a gradient, summed in an order that never changes, and the factor that clips it.
//!
//! Knows slices only. The order depends on the lengths alone: not on threads, nor on the
//! instruction set.

const BLOCK: usize = 4096;
const LANES: usize = 16;

/// Sum of squares of `values`: sixteen f32 lanes in blocks of 4096, blocks added in pairs in f64.
/// Not finite iff a value is not (or its square overflows).
pub fn sum_of_squares(values: &[f32]) -> f64 {
    let arch = pulp::Arch::new();
    arch.dispatch(|| tree(values))
}

/// The Euclidean norm of all `parts` together, in their order.
pub fn norm<'a>(parts: impl IntoIterator<Item = &'a [f32]>) -> f64 {
    parts.into_iter().map(sum_of_squares).sum::<f64>().sqrt()
}

/// What to multiply gradients of norm `norm` by so that it is at most `limit`; `None` if the norm
/// is not finite, that is, if the update must be skipped.
pub fn factor(norm: f64, limit: f64) -> Option<f32> {
    if !norm.is_finite() {
        return None;
    }
    Some(if norm > limit { (limit / norm) as f32 } else { 1.0 })
}

#[inline(always)]
fn tree(values: &[f32]) -> f64 {
    // A binary counter of partial sums: entry i holds the sum of 2^i blocks.
    let mut partial = [0.0f64; 48];
    for (blocks, block) in values.chunks(BLOCK).enumerate() {
        let level = blocks.trailing_ones() as usize;
        let mut sum = lanes(block);
        for smaller in &mut partial[..level] {
            sum += *smaller;
            *smaller = 0.0;
        }
        partial[level] = sum;
    }
    partial.iter().sum()
}

#[inline(always)]
fn lanes(block: &[f32]) -> f64 {
    let mut sums = [0.0f32; LANES];
    let mut chunks = block.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += value * value;
        }
    }
    let tail: f64 = chunks.remainder().iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    sums.iter().map(|s| f64::from(*s)).sum::<f64>() + tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_like_f64_at_every_length() {
        for n in [0, 1, 15, 16, 17, 4096, 4097, 50_001] {
            let values: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 9.0).collect();
            let exact: f64 = values.iter().map(|v| f64::from(*v).powi(2)).sum();
            let got = sum_of_squares(&values);
            assert!((got - exact).abs() <= 1e-6 * exact, "{n}: {got} {exact}");
        }
    }

    #[test]
    fn clips_to_the_limit_and_sees_what_is_not_finite() {
        assert_eq!(factor(norm([&[3.0f32, 4.0][..], &[0.0][..]]), 1.0), Some(0.2));
        assert_eq!(factor(0.5, 1.0), Some(1.0));
        assert_eq!(factor(norm([&[1.0, f32::NAN][..]]), 1.0), None);
        assert_eq!(factor(norm([&[f32::INFINITY][..]]), 1.0), None);
    }
}
