//! Linear maps of a few tokens by every thread of the current rayon pool: for decoding, where one
//! token has to read all weights. Bits do not depend on the number of threads, but those of one
//! token are not those of many.

use rayon::prelude::*;

use super::gemm;
use super::vector::{dot, vectorised};

/// Products smaller than this are not worth a second thread.
const WORTH: usize = 1 << 16;

/// `y = x · Wᵀ`, or `y += x · Wᵀ` if `add`: `x_ni` `[n, inputs]`, `w_oi` `[outputs, inputs]`,
/// `y_no` `[n, outputs]`.
pub fn linear(n: usize, x_ni: &[f32], w_oi: &[f32], y_no: &mut [f32], add: bool) {
    let (inputs, outputs) = (x_ni.len() / n, y_no.len() / n);
    assert_eq!(w_oi.len(), inputs * outputs, "shapes differ");
    let alone = inputs * outputs * n < WORTH;
    if n == 1 {
        let rows = if alone { outputs } else { (1usize << 14).div_ceil(inputs).max(8) };
        let work = |(y_o, w_oi): (&mut [f32], &[f32])| product(x_ni, w_oi, y_o, add);
        match alone {
            true => work((y_no, w_oi)),
            false => y_no.par_chunks_mut(rows).zip(w_oi.par_chunks(rows * inputs)).for_each(work),
        }
        return;
    }
    let tokens = if alone { n } else { n.div_ceil(rayon::current_num_threads()) };
    let work = |(y_no, x_ni): (&mut [f32], &[f32])| {
        let n = x_ni.len() / inputs;
        match add {
            true => gemm::linear_add(n, inputs, outputs, x_ni, w_oi, y_no),
            false => gemm::linear(n, inputs, outputs, x_ni, w_oi, y_no),
        }
    };
    match alone {
        true => work((y_no, x_ni)),
        false => {
            y_no.par_chunks_mut(tokens * outputs)
                .zip(x_ni.par_chunks(tokens * inputs))
                .for_each(work);
        }
    }
}

/// Rows of a matrix times one vector.
fn product(x_i: &[f32], w_oi: &[f32], y_o: &mut [f32], add: bool) {
    vectorised(|| {
        for (y, w) in y_o.iter_mut().zip(w_oi.chunks_exact(x_i.len())) {
            let value = dot(w, x_i);
            *y = if add { *y + value } else { value };
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_and_many_tokens_give_the_products_of_plain_sums() {
        for (n, inputs, outputs) in [(1, 3, 5), (1, 300, 700), (7, 64, 33), (40, 96, 130)] {
            let number = |i: usize| ((i * 7919) % 101) as f32 / 50.0 - 1.0;
            let x: Vec<f32> = (0..n * inputs).map(number).collect();
            let w: Vec<f32> = (0..inputs * outputs).map(|i| number(i + 13)).collect();
            for add in [false, true] {
                let mut y = vec![0.5; n * outputs];
                linear(n, &x, &w, &mut y, add);
                for (at, got) in y.iter().enumerate() {
                    let (x, w) = (&x[at / outputs * inputs..], &w[at % outputs * inputs..]);
                    let want: f64 =
                        (0..inputs).map(|i| f64::from(x[i]) * f64::from(w[i])).sum::<f64>()
                            + if add { 0.5 } else { 0.0 };
                    assert!((f64::from(*got) - want).abs() < 1e-3, "{n} {at}: {got} {want}");
                }
            }
        }
    }
}
