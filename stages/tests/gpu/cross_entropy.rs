//! Losses over rows of logits, and what evaluation asks of them, against the f32 code.

use half::f16;
use stages::gpu::launch::{Buf, Gpu};
use stages::gpu::ops::cross_entropy::{Rows, hard, soft};
use stages::gpu::ops::{likelihood, top_k};
use stages::ops::cross_entropy::{self, IGNORE};

use crate::support::{close, devices, full, half, normal, poison, read, read_full, same};

/// Rows, vocabulary and whether there are a bias and rows that are not scored.
const CASES: [(usize, usize, bool); 4] =
    [(3, 8, false), (5, 264, true), (4, 8200, true), (3, 70_000, false)];

fn rows(rows: usize, v: usize) -> Rows {
    Rows { rows, v, weight: 0.25, factor: None, learn: true }
}

fn bias(v: usize, there: bool) -> Option<Vec<f32>> {
    there.then(|| normal(7, v, 1.0))
}

fn on(gpu: &Gpu, bias: &Option<Vec<f32>>) -> Option<Buf<f32>> {
    bias.as_ref().map(|b| full(gpu, b))
}

fn biased(logits: &[f32], bias: &Option<Vec<f32>>, v: usize) -> Vec<f32> {
    let at = |i: usize| bias.as_ref().map_or(0.0, |b| b[i % v]);
    logits.iter().enumerate().map(|(i, x)| x + at(i)).collect()
}

/// Gradients are compared row by row: what counts is the size within a row.
fn close_rows(what: &str, v: usize, got: &[f32], wanted: &[f32]) {
    for (got, wanted) in got.chunks(v).zip(wanted.chunks(v)) {
        close(what, got, wanted, 5e-3);
    }
}

#[test]
fn soft_targets() {
    for (n, v, extra) in CASES {
        let (s, t) = (normal(1, n * v, 2.0), normal(2, n * v, 2.0));
        let scored: Vec<bool> = (0..n).map(|i| !extra || i % 3 != 1).collect();
        let bias = bias(v, extra);
        let (mut dq, mut p) = (biased(&s, &bias, v), biased(&t, &bias, v));
        let sums = cross_entropy::soft(v, &mut dq, &mut p, &scored, 0.25);
        let mut mixed = dq.clone();
        let label = |i: usize| if i.is_multiple_of(3) { (i * 7919 % v) as u32 } else { IGNORE };
        let labels: Vec<u32> = (0..n).map(label).collect();
        cross_entropy::harden(v, &mut mixed, &p, &labels, 0.25 * 0.3);
        let results: Vec<_> = devices()
            .iter()
            .map(|gpu| {
                let (gs, gt, gb) = (half(gpu, &s), half(gpu, &t), on(gpu, &bias));
                let mask: Vec<u8> = scored.iter().map(|s| u8::from(*s)).collect();
                let (mask, out) = (gpu.buf("test", &mask).unwrap(), poison(gpu, 2 * n));
                let b = gb.as_ref().map(Buf::all);
                let mask = extra.then(|| mask.all());
                soft(gpu, rows(n, v), (gs.all(), b), (gt.all(), b), mask, None, out.all());
                let (again, given) = (half(gpu, &s), gpu.buf("test", &labels).unwrap());
                let (pair, given) = ((again.all(), b), Some((given.all(), 0.3)));
                soft(gpu, rows(n, v), pair, (gt.all(), b), mask, given, out.all());
                close_rows("gradient with labels", v, &read(gpu, again.all()), &mixed);
                let (slope, out) = (read(gpu, gs.all()), read_full(gpu, out.all()));
                close_rows("gradient", v, &slope, &dq);
                let sum =
                    |at: usize| out.iter().skip(at).step_by(2).map(|x| f64::from(*x)).sum::<f64>();
                assert!((sum(0) - sums.cross_entropy).abs() < 1e-4 * sums.cross_entropy.abs());
                assert!((sum(1) - sums.entropy).abs() < 1e-4 * sums.entropy.abs());
                [slope, out].concat()
            })
            .collect();
        same("soft", &results);
    }
}

#[test]
fn hard_targets() {
    for (n, v, extra) in CASES {
        let (logits, bias) = (normal(3, n * v, 2.0), bias(v, extra));
        let target = |i: usize| if extra && i % 3 == 1 { IGNORE } else { (i * 7919 % v) as u32 };
        let targets: Vec<u32> = (0..n).map(target).collect();
        let mut slope = biased(&logits, &bias, v);
        let loss = cross_entropy::hard(v, &mut slope, &targets, 0.25);
        let results: Vec<_> = devices()
            .iter()
            .map(|gpu| {
                let (g, gb, out) = (half(gpu, &logits), on(gpu, &bias), poison(gpu, n));
                let gt = gpu.buf("test", &targets).unwrap();
                hard(gpu, rows(n, v), (g.all(), gb.as_ref().map(Buf::all)), gt.all(), out.all());
                let (got, out) = (read(gpu, g.all()), read_full(gpu, out.all()));
                close_rows("gradient", v, &got, &slope);
                let sum: f64 = out.iter().map(|x| f64::from(*x)).sum();
                assert!((sum - loss).abs() < 1e-5 * loss, "{sum} {loss}");
                [got, out].concat()
            })
            .collect();
        same("hard", &results);
    }
}

#[test]
fn the_teachers_most_likely_tokens() {
    for (n, v, extra) in CASES {
        let k = if v == 8 { 3 } else { 37 };
        let (s, t, bias) = (normal(4, n * v, 2.0), normal(5, n * v, 2.0), bias(v, extra));
        let mut top = stages::ops::top_k::TopK::new(n, v, k);
        stages::ops::top_k::fill(&mut top, n, |rows, out| {
            out.copy_from_slice(&t[rows.start * v..rows.end * v]);
        });
        let (mut slope, mut losses) = (biased(&s, &bias, v), Vec::new());
        for (i, row) in slope.chunks_mut(v).enumerate() {
            let range = i * k..(i + 1) * k;
            let want = (&top.ids_nk[range.clone()], &top.log_p_nk[range], top.tail_n[i]);
            let loss = stages::ops::top_k::soft(row, want, 0.25, &mut vec![0.0; k]);
            losses.push(loss as f32);
        }
        let results: Vec<_> = devices()
            .iter()
            .map(|gpu| {
                let (g, gb, out) = (half(gpu, &s), on(gpu, &bias), poison(gpu, n));
                let ids = gpu.buf("test", &top.ids_nk).unwrap();
                let log_p = gpu.buf::<f16>("test", &top.log_p_nk).unwrap();
                let tail = full(gpu, &top.tail_n);
                let expected = top_k::Expected {
                    k,
                    ids_nk: ids.all(),
                    log_p_nk: log_p.all(),
                    tail_n: tail.all(),
                };
                let logits = (g.all(), gb.as_ref().map(Buf::all));
                top_k::soft(gpu, rows(n, v), logits, expected, None, out.all());
                let (got, out) = (read(gpu, g.all()), read_full(gpu, out.all()));
                close_rows("gradient", v, &got, &slope);
                close("loss", &out, &losses, 1e-5);
                [got, out].concat()
            })
            .collect();
        same("top k", &results);
    }
}

#[test]
fn likelihoods_and_choices() {
    for (n, v, extra) in CASES {
        let (mut a, b, bias) = (normal(6, n * v, 2.0), normal(8, n * v, 2.0), bias(v, extra));
        let targets: Vec<u32> = (0..n).map(|i| (i * 7919 % v) as u32).collect();
        // Two likeliest ones in some rows.
        for (i, row) in a.chunks_mut(v).enumerate().filter(|(i, _)| i % 2 == 0) {
            row[targets[i] as usize] = 40.0;
            row[(targets[i] as usize + v / 2) % v] = 40.0;
        }
        let (rows_a, mut nll) = (biased(&a, &bias, v), vec![0.0; n]);
        cross_entropy::nll(v, &mut rows_a.clone(), &targets, &mut nll);
        let best = |row: &[f32]| stages::generate::sample::argmax(row);
        let first_a: Vec<u32> = rows_a.chunks(v).map(best).collect();
        let first_b: Vec<u32> = b.chunks(v).map(best).collect();
        for gpu in devices() {
            let (ga, gb, bias) = (half(&gpu, &a), half(&gpu, &b), on(&gpu, &bias));
            let gt = gpu.buf("test", &targets).unwrap();
            let (out, first, equal) = (poison(&gpu, n), poison(&gpu, n), poison(&gpu, n));
            let logits = (ga.all(), bias.as_ref().map(Buf::all));
            likelihood::pick(&gpu, (n, v), logits, gt.all(), out.all(), first.all());
            likelihood::same(&gpu, (n, v), logits, (gb.all(), None), equal.all());
            let log_p: Vec<f32> = nll.iter().map(|x| -x).collect();
            close("ln p", &read_full(&gpu, out.all()), &log_p, 1e-5);
            let (first, equal) =
                (gpu.download(first.all()).unwrap(), gpu.download(equal.all()).unwrap());
            for i in 0..n {
                assert_eq!(first[i], u8::from(first_a[i] == targets[i]), "row {i} of {v}");
                assert_eq!(equal[i], u8::from(first_a[i] == first_b[i]), "row {i} of {v}");
            }
        }
    }
}
