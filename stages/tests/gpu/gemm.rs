//! Products and their variants against plain sums.

use stages::gpu::gemm::{Epilogue, Mat, linear, linear_dw, linear_dx, linear_f32};

use crate::support::{close, devices, full, half, normal, poison, read, read_full};

fn product(
    n: usize,
    o: usize,
    k: usize,
    x: impl Fn(usize, usize) -> f32,
    w: impl Fn(usize, usize) -> f32,
) -> Vec<f32> {
    let at = |i: usize| {
        let (row, column) = (i / o, i % o);
        (0..k).map(|j| f64::from(x(row, j)) * f64::from(w(j, column))).sum::<f64>() as f32
    };
    (0..n * o).map(at).collect()
}

#[test]
fn every_form_of_a_linear_map() {
    let (n, i, o) = (37, 24, 40);
    let (x, w, dy) = (normal(1, n * i, 1.0), normal(2, o * i, 0.5), normal(3, n * o, 1.0));
    let bias = normal(4, o, 1.0);
    for gpu in devices() {
        let (gx, gw, gdy, gb) =
            (half(&gpu, &x), half(&gpu, &w), half(&gpu, &dy), half(&gpu, &bias));
        let y = poison(&gpu, n * o);
        let dims = (n, i, o);
        let (mx, my) = (Mat::new(gx.all(), i), Mat::new(y.all(), o));
        linear(&gpu, "y", dims, (mx, my), gw.all(), (None, Epilogue::Bias(gb.all().address())));
        let plain = product(n, o, i, |r, j| x[r * i + j], |j, c| w[c * i + j]);
        let wanted: Vec<f32> = plain.iter().enumerate().map(|(at, v)| v + bias[at % o]).collect();
        close("y + bias", &read(&gpu, y.all()), &wanted, 1e-2);
        linear(&gpu, "y", dims, (mx, my), gw.all(), (Some(Mat::new(gdy.all(), o)), Epilogue::None));
        let wanted: Vec<f32> = plain.iter().zip(&dy).map(|(v, d)| v + d).collect();
        close("y + dy", &read(&gpu, y.all()), &wanted, 1e-2);
        let wide = poison(&gpu, n * (o + 8));
        linear_f32(&gpu, "y32", dims, mx, gw.all(), (wide.all(), o + 8));
        let got = read_full(&gpu, wide.all());
        let rows: Vec<f32> = got.chunks(o + 8).flat_map(|row| row[..o].to_vec()).collect();
        close("y32", &rows, &plain, 1e-5);
        let dx = poison(&gpu, n * i);
        let mdy = Mat::new(gdy.all(), o);
        linear_dx(&gpu, "dx", dims, mdy, gw.all(), Mat::new(dx.all(), i), false);
        let wanted = product(n, i, o, |r, j| dy[r * o + j], |j, c| w[j * i + c]);
        close("dx", &read(&gpu, dx.all()), &wanted, 1e-2);
        let dw = full(&gpu, &vec![1.0; o * i]);
        linear_dw(&gpu, "dw", dims, mdy, mx, dw.all());
        let wanted = product(o, i, n, |r, j| dy[j * o + r], |j, c| x[j * i + c]);
        let wanted: Vec<f32> = wanted.iter().map(|v| v + 1.0).collect();
        close("dw", &read_full(&gpu, dw.all()), &wanted, 1e-5);
    }
}
