//! The three forms of the scan against each other, and its gradients against differences.

use super::*;
use crate::train::philox::Philox;

struct Case {
    shape: Shape,
    xbc: Vec<f32>,
    a: Vec<f32>,
}

fn case(seq: usize, chunk: usize, resets: &[usize]) -> Case {
    let shape = Shape { batch: 2, seq, heads: 2, width: 3, state: 5, chunk };
    let mut xbc = vec![0.0; shape.tokens() * shape.row()];
    Philox::new(1, "xbc").fill_normal(1.0, &mut xbc);
    let mut a = vec![0.0; shape.heads * shape.tokens()];
    Philox::new(1, "a").fill_uniform(0.3, 1.0, &mut a);
    for (i, a) in a.iter_mut().enumerate() {
        let position = i % seq;
        if position == 0 || (i / seq % 2 == 1 && resets.contains(&position)) {
            *a = 0.0;
        }
    }
    Case { shape, xbc, a }
}

fn scan(case: &Case) -> (Vec<f32>, Vec<f32>) {
    let mut y = vec![f32::NAN; case.shape.tokens() * case.shape.inner()];
    let mut states = vec![0.0; case.shape.states()];
    let mut scratch = Scratch::new(case.shape);
    forward(case.shape, &case.xbc, &case.a, &mut y, &mut states, &mut scratch);
    (y, states)
}

/// The recurrence in f64, from the definition; returns Σ y·w.
fn exact(case: &Case, w: &[f32], x_add: (usize, f64), log_a_add: (usize, f64)) -> f64 {
    let s = case.shape;
    let x = |i: usize| f64::from(case.xbc[i]) + if i == x_add.0 { x_add.1 } else { 0.0 };
    let mut total = 0.0;
    for (sequence, head) in heads(s) {
        let mut state = vec![0.0; s.state * s.width];
        for token in sequence * s.seq..(sequence + 1) * s.seq {
            let at = head * s.tokens() + token;
            let change = if at == log_a_add.0 { log_a_add.1.exp() } else { 1.0 };
            let a = f64::from(case.a[at]) * change;
            for n in 0..s.state {
                let b = x(token * s.row() + s.b_at(head) + n);
                let c = x(token * s.row() + s.c_at(head) + n);
                for p in 0..s.width {
                    let cell = &mut state[n * s.width + p];
                    *cell = a * *cell + b * x(token * s.row() + head * s.width + p);
                    let y_at = token * s.inner() + head * s.width + p;
                    total += c * *cell * f64::from(w[y_at]);
                }
            }
        }
    }
    total
}

const NONE: (usize, f64) = (usize::MAX, 0.0);

#[test]
fn matrix_scan_and_step_agree() {
    for (seq, chunk) in [(1, 4), (7, 4), (16, 4), (33, 8), (20, 64)] {
        let case = case(seq, chunk, &[1, 5, 8, 13]);
        let s = case.shape;
        let (y, states) = scan(&case);
        let mut m = vec![0.0; seq * seq];
        for (sequence, head) in heads(s) {
            matrix(s, (sequence, head), &case.xbc, &case.a, &mut m);
            for l in 0..seq {
                let token = sequence * seq + l;
                for p in 0..s.width {
                    let x =
                        |k: usize| case.xbc[(sequence * seq + k) * s.row() + head * s.width + p];
                    let by_matrix: f32 = (0..seq).map(|k| m[l * seq + k] * x(k)).sum();
                    let by_scan = y[token * s.inner() + head * s.width + p];
                    assert!((by_matrix - by_scan).abs() < 1e-5 * (1.0 + by_scan.abs()));
                }
            }
        }
        let size = s.state * s.width;
        for sequence in 0..s.batch {
            let mut state = vec![0.0; s.heads * size];
            let mut out = vec![0.0; s.inner()];
            for token in sequence * seq..(sequence + 1) * seq {
                let a: Vec<f32> = (0..s.heads).map(|h| case.a[h * s.tokens() + token]).collect();
                step(s, &case.xbc[token * s.row()..][..s.row()], &a, &mut state, &mut out);
                for (a, b) in out.iter().zip(&y[token * s.inner()..]) {
                    assert!((a - b).abs() < 1e-5 * (1.0 + b.abs()), "step {a} scan {b}");
                }
            }
            for head in 0..s.heads {
                let last = ((sequence * s.heads + head) * (s.chunks() + 1) + s.chunks()) * size;
                for (a, b) in state[head * size..][..size].iter().zip(&states[last..]) {
                    assert!((a - b).abs() < 1e-5 * (1.0 + b.abs()), "state {a} {b}");
                }
            }
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for (seq, chunk) in [(6, 16), (13, 4)] {
        let case = case(seq, chunk, &[3, 4, 8]);
        let s = case.shape;
        let (y, states) = scan(&case);
        let mut w = vec![0.0; y.len()];
        Philox::new(1, "w").fill_normal(1.0, &mut w);
        let saved = Saved { xbc: &case.xbc, a_hn: &case.a, y_nd: &y, states: &states };
        let mut d_xbc = vec![f32::NAN; case.xbc.len()];
        let mut d_log_a = vec![f32::NAN; case.a.len()];
        backward(s, &w, saved, &mut d_xbc, &mut d_log_a, &mut Scratch::new(s));
        let h = 1e-5;
        for (i, got) in d_xbc.iter().enumerate() {
            let want =
                (exact(&case, &w, (i, h), NONE) - exact(&case, &w, (i, -h), NONE)) / (2.0 * h);
            assert!(
                (f64::from(*got) - want).abs() < 2e-5 * (1.0 + want.abs()),
                "{i}: {got} {want}"
            );
        }
        for (i, got) in d_log_a.iter().enumerate() {
            let want =
                (exact(&case, &w, NONE, (i, h)) - exact(&case, &w, NONE, (i, -h))) / (2.0 * h);
            assert!(
                (f64::from(*got) - want).abs() < 5e-5 * (1.0 + want.abs()),
                "{i}: {got} {want}"
            );
        }
    }
}
