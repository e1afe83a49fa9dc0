//! Sums in a fixed order.

use stages::gpu::ops::reduce::{
    SUM_PARTIALS, column_partials, column_sums, fill, reduce_rows, scale, sum,
};

use crate::support::{close, devices, full, half, normal, poison, read_full, same};

/// Column sums of `x`, `[n, stride]`, times `scale`, plus 1.
fn columns(x: &[f32], stride: usize, columns: usize, scale: f64) -> Vec<f32> {
    let column = |c: usize| x.chunks(stride).map(|row| f64::from(row[c])).sum::<f64>();
    (0..columns).map(|c| (1.0 + scale * column(c)) as f32).collect()
}

#[test]
fn rows_into_two_outputs() {
    for (rows, split, cols) in [(1, 1, 3), (33, 31, 64), (264, 576, 600), (400, 40, 41)] {
        let x = normal(1, rows * cols, 1.0);
        let wanted = columns(&x, cols, cols, 0.5);
        let mut bits = Vec::new();
        for gpu in devices() {
            let partials = full(&gpu, &x);
            let (a, b) = (full(&gpu, &vec![1.0; split]), full(&gpu, &vec![1.0; cols - split]));
            reduce_rows(&gpu, rows, partials.all(), (a.all(), Some(b.all())), 0.5, true);
            let got = [read_full(&gpu, a.all()), read_full(&gpu, b.all())].concat();
            close("sums", &got, &wanted, 1e-5);
            bits.push(got);
        }
        same("sums", &bits);
    }
}

#[test]
fn gradient_of_a_bias() {
    for (n, cols) in [(1, 8), (333, 264), (1000, 2048)] {
        let stride = cols + 16;
        let x = normal(1, n * stride, 1.0);
        let mut bits = Vec::new();
        for gpu in devices() {
            let (gx, out) = (half(&gpu, &x), full(&gpu, &vec![1.0; cols]));
            let partials = poison(&gpu, column_partials(n, cols));
            column_sums(&gpu, n, (gx.all(), stride), partials.all(), out.all());
            let got = read_full(&gpu, out.all());
            close("sums", &got, &columns(&x, stride, cols, 1.0), 1e-5);
            bits.push(got);
        }
        same("sums", &bits);
    }
}

#[test]
fn one_sum_and_maps() {
    for n in [1, 255, 70_001] {
        let x = normal(1, n, 1.0);
        let total: f64 = x.iter().map(|v| f64::from(*v)).sum();
        let mut bits = Vec::new();
        for gpu in devices() {
            let (gx, partials) = (full(&gpu, &x), poison(&gpu, SUM_PARTIALS));
            let out = poison(&gpu, 1);
            sum(&gpu, gx.all(), partials.all(), out.all(), 0.5, false);
            sum(&gpu, gx.all(), partials.all(), out.all(), 1.0, true);
            let got = read_full(&gpu, out.all());
            close("sum", &got, &[(1.5 * total) as f32], 1e-5);
            bits.push(got);
            fill(&gpu, gx.all(), 2.5);
            scale(&gpu, gx.all(), 3.0);
            assert!(read_full(&gpu, gx.all()).iter().all(|v| *v == 7.5));
        }
        same("sum", &bits);
    }
}
