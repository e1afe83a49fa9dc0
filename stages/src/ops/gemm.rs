//! Matrix products over strided views: thin, checked wrappers around the `gemm` crate.

use gemm::Parallelism;

/// A strided matrix inside a slice: element `(i, j)` is `data[i * row + j * col]`.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row: usize,
    pub(super) col: usize,
}

impl<'a> Mat<'a> {
    /// A row-major `[rows, cols]` matrix, rows `stride` apart. `data` may be longer than needed.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Mat<'a> {
        let mat = Mat { data, rows, cols, row: stride, col: 1 };
        assert!(span(rows, cols, stride, 1) <= data.len(), "matrix reaches out of its slice");
        mat
    }

    /// Its transpose, without moving anything.
    pub fn t(self) -> Mat<'a> {
        Mat { rows: self.cols, cols: self.rows, row: self.col, col: self.row, ..self }
    }
}

fn span(rows: usize, cols: usize, row: usize, col: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row + (cols - 1) * col + 1 }
}

/// `out = beta * out + alpha * a · b`, `out` row-major with rows `stride` apart. With `beta` 0
/// `out` is not read. One thread, no allocation after the thread's first call.
pub fn gemm(out: &mut [f32], stride: usize, beta: f32, alpha: f32, a: Mat, b: Mat) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert_eq!(k, b.rows, "inner dimensions differ");
    assert!(span(m, n, stride, 1) <= out.len(), "product reaches out of its slice");
    #[cfg(target_arch = "x86_64")]
    if super::gemm_avx512::available() {
        // SAFETY: both inputs were checked when they were made, `out` just now.
        return unsafe { super::gemm_avx512::gemm(out, stride, beta, alpha, a, b) };
    }
    portable(out, stride, beta, alpha, a, b);
}

fn portable(out: &mut [f32], stride: usize, beta: f32, alpha: f32, a: Mat, b: Mat) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    // SAFETY: both inputs were checked against their slices when they were made (the transpose
    // spans the same elements), `out` just now; `out` is borrowed mutably, so nothing overlaps.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            stride as isize,
            beta != 0.0,
            a.data.as_ptr(),
            a.col as isize,
            a.row as isize,
            b.data.as_ptr(),
            b.col as isize,
            b.row as isize,
            beta,
            alpha,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// `y = x · Wᵀ`: `x_ni` `[n, inputs]`, `w_oi` `[outputs, inputs]`, `y_no` `[n, outputs]`.
pub fn linear(
    n: usize,
    inputs: usize,
    outputs: usize,
    x_ni: &[f32],
    w_oi: &[f32],
    y_no: &mut [f32],
) {
    let (x, w) = (Mat::new(x_ni, n, inputs, inputs), Mat::new(w_oi, outputs, inputs, inputs));
    gemm(y_no, outputs, 0.0, 1.0, x, w.t());
}

/// `y += x · Wᵀ`, otherwise as [`linear`] (for adding into a residual stream).
pub fn linear_add(
    n: usize,
    inputs: usize,
    outputs: usize,
    x_ni: &[f32],
    w_oi: &[f32],
    y_no: &mut [f32],
) {
    let (x, w) = (Mat::new(x_ni, n, inputs, inputs), Mat::new(w_oi, outputs, inputs, inputs));
    gemm(y_no, outputs, 1.0, 1.0, x, w.t());
}

/// `dx = dy · W` (overwritten).
pub fn linear_dx(
    n: usize,
    inputs: usize,
    outputs: usize,
    dy_no: &[f32],
    w_oi: &[f32],
    dx_ni: &mut [f32],
) {
    let (dy, w) = (Mat::new(dy_no, n, outputs, outputs), Mat::new(w_oi, outputs, inputs, inputs));
    gemm(dx_ni, inputs, 0.0, 1.0, dy, w);
}

/// `dW += dyᵀ · x`.
pub fn linear_dw(
    n: usize,
    inputs: usize,
    outputs: usize,
    dy_no: &[f32],
    x_ni: &[f32],
    dw_oi: &mut [f32],
) {
    let (dy, x) = (Mat::new(dy_no, n, outputs, outputs), Mat::new(x_ni, n, inputs, inputs));
    gemm(dw_oi, inputs, 1.0, 1.0, dy.t(), x);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let next = |i: u32| ((i.wrapping_mul(2_654_435_761) ^ seed) >> 8) as f32 / 1e7 - 0.8;
        (0..n as u32).map(next).collect()
    }

    fn naive(a: Mat, b: Mat) -> Vec<f32> {
        let at = |m: &Mat, i, j| m.data[i * m.row + j * m.col] as f64;
        let cell = |i, j| (0..a.cols).map(|k| at(&a, i, k) * at(&b, k, j)).sum::<f64>() as f32;
        (0..a.rows)
            .flat_map(|i| (0..b.cols).map(move |j| (i, j)))
            .map(|(i, j)| cell(i, j))
            .collect()
    }

    type Product = fn(&mut [f32], usize, f32, f32, Mat, Mat);

    fn check(product: Product, (m, n, k): (usize, usize, usize), x: &[f32], y: &[f32]) {
        let left = [Mat::new(x, m, k, k + 2), Mat::new(x, k, m, m + 1).t()];
        let right = [Mat::new(y, k, n, n), Mat::new(y, n, k, k + 3).t()];
        for (a, b) in left.iter().flat_map(|a| right.iter().map(move |b| (*a, *b))) {
            for (beta, alpha) in [(0.0, 1.0), (1.0, 2.0), (0.25, -1.0)] {
                let stride = n + 1;
                let before = if beta == 0.0 { f32::NAN } else { 0.5 };
                let mut out = vec![before; m * stride];
                product(&mut out, stride, beta, alpha, a, b);
                for (i, want) in naive(a, b).into_iter().enumerate() {
                    let got = out[i / n * stride + i % n];
                    let want = if beta == 0.0 { alpha * want } else { 0.5 * beta + alpha * want };
                    let size = (k as f32).sqrt();
                    assert!((got - want).abs() < 1e-4 * size, "{m}×{n}×{k}: {got} {want}");
                }
                assert!(out[n].to_bits() == before.to_bits(), "a gap between rows was written");
            }
        }
    }

    #[test]
    fn products_match_a_naive_sum_for_every_transposition_stride_and_tail() {
        let (x, y) = (numbers(140_000, 1), numbers(140_000, 2));
        for (m, n, k) in [(1, 1, 1), (5, 7, 3), (16, 17, 19), (3, 1, 24), (7, 64, 16), (100, 33, 9)]
        {
            check(gemm, (m, n, k), &x, &y);
            check(portable, (m, n, k), &x, &y);
        }
        for (m, n, k) in [(6, 65, 300), (13, 260, 257), (98, 48, 513), (2, 300, 2)] {
            check(gemm, (m, n, k), &x, &y);
        }
    }

    #[test]
    fn a_row_has_the_same_bits_alone_and_among_others() {
        let (x, y) = (numbers(20_000, 1), numbers(20_000, 2));
        let (m, n, k) = (130, 70, 40);
        let mut all = vec![0.0; m * n];
        gemm(&mut all, n, 0.0, 1.0, Mat::new(&x, m, k, k), Mat::new(&y, n, k, k).t());
        for i in [0, 5, 77, 129] {
            let mut one = vec![0.0; n];
            gemm(&mut one, n, 0.0, 1.0, Mat::new(&x[i * k..], 1, k, k), Mat::new(&y, n, k, k).t());
            assert_eq!(one, all[i * n..][..n]);
        }
    }
}
