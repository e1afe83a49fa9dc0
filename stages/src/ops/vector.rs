//! Elementwise functions that compilers can vectorise, and sums in a fixed order.
//!
//! All are `#[inline(always)]`: call them inside [`vectorised`], which picks the instruction set
//! at run time. They use no fused multiply-add and no table, so the bits are the same on all of
//! them. Knows nothing of shapes.

/// Partial sums kept by [`dot`] and its like.
pub const LANES: usize = 16;

/// Runs `work` compiled for the best instruction set that the machine has.
#[inline(always)]
pub fn vectorised<R>(work: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(work)
}

/// e^x to about 2 units in the last place; 0 below −87.3, capped near 2.4e38 above 88.3; a NaN
/// stays one. Cody and Waite reduction, polynomial of Cephes `expf`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5·2^23: adding it leaves the rounded integer in the low bits
    let x_in = x;
    let x = if x > 88.3 { 88.3 } else { x };
    let x = if x < -87.3 { -87.3 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let p = 1.987_569_1e-4 * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 5e-1;
    let y = p * (r * r) + r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x_in < -87.3 { 0.0 } else { y * power }
}

/// 1 / (1 + e^−x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// x · sigmoid(x).
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// The derivative of [`silu`] at `x`, and its value.
#[inline(always)]
pub fn silu_with_slope(x: f32) -> (f32, f32) {
    let s = sigmoid(x);
    (x * s, s * (1.0 + x * (1.0 - s)))
}

/// Σ aᵢ·bᵢ over the shorter of both, in [`LANES`] lanes added in order.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    let mut sums = [0.0f32; LANES];
    let (mut left, mut right) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (x, y) in (&mut left).zip(&mut right) {
        for i in 0..LANES {
            sums[i] += x[i] * y[i];
        }
    }
    let mut total = 0.0;
    for (x, y) in left.remainder().iter().zip(right.remainder()) {
        total += x * y;
    }
    fold(sums) + total
}

/// Σ aᵢ in the same order as [`dot`].
#[inline(always)]
pub fn sum(a: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let mut chunks = a.chunks_exact(LANES);
    for x in &mut chunks {
        for i in 0..LANES {
            sums[i] += x[i];
        }
    }
    fold(sums) + chunks.remainder().iter().sum::<f32>()
}

/// Adds the lanes as a binary tree.
#[inline(always)]
pub fn fold(mut sums: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}

/// Sum of `f(x, y)` over pairs, in fixed lanes.
#[inline(always)]
pub fn sum_of(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (mut xs, mut ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    for (a, b) in (&mut xs).zip(&mut ys) {
        for i in 0..LANES {
            lanes[i] += f(a[i], b[i]);
        }
    }
    let tail = xs.remainder().iter().zip(ys.remainder());
    for (lane, (a, b)) in lanes.iter_mut().zip(tail) {
        *lane += f(*a, *b);
    }
    fold(lanes)
}

/// Largest element; -∞ of none. A NaN among them may be passed over.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let mut chunks = x.chunks_exact(LANES);
    for chunk in &mut chunks {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = larger(*lane, *value);
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, larger)
}

/// `x = e^(x - shift)` in place; gives the sum.
#[inline(always)]
pub fn exp_sum(x: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let mut chunks = x.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for i in 0..LANES {
            chunk[i] = exp(chunk[i] - shift);
            lanes[i] += chunk[i];
        }
    }
    // The rest as one full vector: scalar exponentials would cost more than all the others.
    let rest = chunks.into_remainder();
    if !rest.is_empty() {
        let mut padded = [f32::NEG_INFINITY; LANES];
        padded[..rest.len()].copy_from_slice(rest);
        for value in &mut padded {
            *value = exp(*value - shift);
        }
        rest.copy_from_slice(&padded[..rest.len()]);
        for (lane, value) in lanes.iter_mut().zip(rest.iter()) {
            *lane += *value;
        }
    }
    fold(lanes)
}

/// `x = e^(x - shift)` in place; gives the sum, and the sum of `e^(x - shift) · (x - shift)`.
#[inline(always)]
pub fn exp_sums(x: &mut [f32], shift: f32) -> (f32, f32) {
    let (mut sums, mut weighted) = ([0.0; LANES], [0.0; LANES]);
    for chunk in x.chunks_mut(LANES) {
        let mut full = [-87.0; LANES];
        for (f, c) in full.iter_mut().zip(chunk.iter()) {
            *f = *c - shift;
        }
        let mut powers = full;
        for p in &mut powers {
            *p = exp(*p);
        }
        chunk.copy_from_slice(&powers[..chunk.len()]);
        for i in 0..chunk.len() {
            sums[i] += powers[i];
            weighted[i] += powers[i] * full[i];
        }
    }
    (fold(sums), fold(weighted))
}

/// `x *= factor`.
#[inline(always)]
pub fn scale(x: &mut [f32], factor: f32) {
    for value in x {
        *value *= factor;
    }
}

/// Adds `row` to every row of `rows`.
pub fn add_rows(rows: &mut [f32], row: &[f32]) {
    vectorised(|| {
        for to in rows.chunks_exact_mut(row.len()) {
            for (to, b) in to.iter_mut().zip(row) {
                *to += b;
            }
        }
    });
}

/// Adds every row of `rows` to `sum`, first to last.
pub fn add_columns(rows: &[f32], sum: &mut [f32]) {
    vectorised(|| {
        for row in rows.chunks_exact(sum.len()) {
            for (to, b) in sum.iter_mut().zip(row) {
                *to += b;
            }
        }
    });
}

/// `sum += part`.
pub fn add(sum: &mut [f32], part: &[f32]) {
    assert_eq!(sum.len(), part.len(), "lengths differ");
    vectorised(|| {
        for (s, p) in sum.iter_mut().zip(part) {
            *s += *p;
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_a_few_units_in_the_last_place() {
        let mut x = -87.0f32;
        while x < 88.0 {
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got / want - 1.0).abs() < 3e-7, "{x}: {got} {want}");
            x += 0.0137;
        }
        assert_eq!((exp(0.0), exp(-90.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan() && exp(f32::INFINITY) > 1e38);
    }

    #[test]
    fn vectorised_and_plain_give_the_same_bits() {
        let x: Vec<f32> = (0..1003).map(|i| i as f32 * 0.01 - 5.0).collect();
        let mut fast = vec![0.0; x.len()];
        vectorised(|| fast.iter_mut().zip(&x).for_each(|(y, x)| *y = silu(*x)));
        for (y, x) in fast.iter().zip(&x) {
            assert_eq!(y.to_bits(), silu(*x).to_bits());
        }
        assert_eq!(vectorised(|| dot(&x, &fast)).to_bits(), dot(&x, &fast).to_bits());
    }

    #[test]
    fn slope_of_silu_is_its_difference_quotient() {
        for i in -40..40 {
            let x = i as f32 * 0.2;
            let (_, slope) = silu_with_slope(x);
            let f = |x: f64| x / (1.0 + (-x).exp());
            let quotient = (f(f64::from(x) + 1e-4) - f(f64::from(x) - 1e-4)) / 2e-4;
            assert!((f64::from(slope) - quotient).abs() < 1e-5);
        }
    }

    #[test]
    fn sums_maxima_and_exponentials_agree_at_every_length_and_instruction_set() {
        for n in 0..70 {
            let x: Vec<f32> = (0..n).map(|i| ((i * 37 % 41) as f32 - 20.0) / 7.0).collect();
            let y: Vec<f32> = x.iter().rev().copied().collect();
            let exact: f64 = x.iter().zip(&y).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            assert!((f64::from(dot(&x, &y)) - exact).abs() < 1e-4);
            assert_eq!(max(&x), x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let (mut plain, mut fast) = (x.clone(), x.clone());
            let sums = (exp_sum(&mut plain, 1.5), vectorised(|| exp_sum(&mut fast, 1.5)));
            assert_eq!((sums.0.to_bits(), &plain), (sums.1.to_bits(), &fast));
            for (e, x) in plain.iter().zip(&x) {
                assert!((e / (x - 1.5).exp() - 1.0).abs() < 1e-6);
            }
        }
    }
}
