//! The choice of tokens against the running sum of weights in f64.

use stages::gpu::ops::sample::{Choice, NOTHING, rows, rows_f32};

use crate::support::{devices, full, half, normal, poison};

fn right(x: &[f32], choice: Choice, u: f32, id: usize) {
    let Choice { temperature, top_k } = choice;
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|a, b| x[*b].total_cmp(&x[*a]).then(a.cmp(b)));
    if temperature == 0.0 {
        return assert_eq!(id, order[0]);
    }
    let kept = &order[..if top_k == 0 { x.len() } else { top_k.min(x.len()) }];
    assert!(kept.contains(&id), "{id} is cut");
    let weight = |at: &usize| (f64::from(x[*at] - x[order[0]]) / f64::from(temperature)).exp();
    let total: f64 = kept.iter().map(weight).sum();
    let before: f64 = kept.iter().filter(|at| **at < id).map(weight).sum();
    let (place, slack) = (f64::from(u) * total, 3e-6 * total);
    let after = before + weight(&id);
    assert!(before - slack <= place && place <= after + slack, "{before} {place} {after}");
}

#[test]
fn greedy_and_drawn() {
    let choice = |temperature, top_k| Choice { temperature, top_k };
    let choices = [choice(0.0, 0), choice(1.0, 0), choice(0.7, 40), choice(1.3, 3)];
    for (v, few) in [(8, false), (264, true), (5000, true), (5000, false)] {
        let b = 6;
        let mut x = normal(1, b * v, 2.0);
        if few {
            x.iter_mut().for_each(|x| *x = x.round() + 0.0);
        }
        x[(b - 1) * v + 3] = f32::NAN;
        let bias = normal(2, v, 1.0);
        let u = [0.0, 0.999_999_9, 0.25, 0.5, 0.75, 0.5];
        for gpu in devices() {
            let (gx, gx_f32, gu) = (half(&gpu, &x), full(&gpu, &x), full(&gpu, &u));
            let (gb, ids) = (full(&gpu, &bias), poison(&gpu, b));
            for choice in choices {
                rows(&gpu, (b, v), (gx.all(), Some(gb.all())), choice, gu.all(), ids.all());
                let got = gpu.download(ids.all()).unwrap();
                rows_f32(&gpu, (b, v), (gx_f32.all(), None), choice, gu.all(), ids.all());
                let plain = gpu.download(ids.all()).unwrap();
                assert_eq!((got[b - 1], plain[b - 1]), (NOTHING, NOTHING));
                for (i, row) in x.chunks(v).enumerate().take(b - 1) {
                    let sum: Vec<f32> = row.iter().zip(&bias).map(|(x, b)| x + b).collect();
                    right(&sum, choice, u[i], got[i] as usize);
                    right(row, choice, u[i], plain[i] as usize);
                }
            }
        }
    }
}
