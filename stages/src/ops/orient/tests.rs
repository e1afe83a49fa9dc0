//! The orient loss and its gradients against the definition in f64.

use super::*;
use crate::train::philox::Philox;

const KV: usize = 1;
const DIM: usize = 6;

struct Case {
    shape: ssd::Shape,
    starts: Vec<u32>,
    q: Vec<f32>,
    k: Vec<f32>,
    lse: Vec<f32>,
    packed: Vec<f32>,
    xbc: Vec<f32>,
    a: Vec<f32>,
    d: Vec<f32>,
}

fn normal(name: &str, n: usize) -> Vec<f32> {
    let mut out = vec![0.0; n];
    Philox::new(8, name).fill_normal(1.0, &mut out);
    out
}

fn case(seq: usize) -> Case {
    let shape = ssd::Shape { batch: 2, seq, heads: 2, width: 3, state: 5, chunk: 8 };
    let tokens = shape.tokens();
    let start = |n: usize| if n >= seq && n % seq >= 3 { 3 } else { 0 };
    let mut case = Case {
        shape,
        starts: (0..tokens).map(start).collect(),
        q: normal("q", tokens * 2 * DIM),
        k: normal("k", tokens * KV * DIM),
        lse: Vec::new(),
        packed: Vec::new(),
        xbc: normal("xbc", tokens * shape.row()).iter().map(|v| v * 0.5).collect(),
        a: vec![0.0; 2 * tokens],
        d: vec![0.25, -0.5],
    };
    Philox::new(8, "a").fill_uniform(0.5, 1.0, &mut case.a);
    for head in 0..2 {
        for n in 0..tokens {
            if case.starts[n] as usize == n % seq {
                case.a[head * tokens + n] = 0.0;
            }
        }
    }
    for (b, h) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        for l in 0..seq {
            let scores: Vec<f64> = (0..=l).map(|s| score(&case, b, h, l, s)).collect();
            let lse = scores.iter().map(|s| s.exp()).sum::<f64>().ln();
            case.lse.push(lse as f32);
            case.packed.extend(scores.iter().map(|s| (s - lse).exp() as f32));
        }
    }
    case
}

fn score(case: &Case, b: usize, h: usize, l: usize, s: usize) -> f64 {
    let token = b * case.shape.seq;
    if s < case.starts[token + l] as usize {
        return f64::NEG_INFINITY;
    }
    let q = &case.q[(token + l) * 2 * DIM + h * DIM..][..DIM];
    let k = &case.k[(token + s) * DIM..][..DIM];
    q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() / (DIM as f64).sqrt()
}

fn qk(case: &Case) -> Teacher<'_> {
    let (q_stride, k_stride) = (2 * DIM, DIM);
    let (q, k, lse_bhl) = (&case.q, &case.k, &case.lse);
    Teacher::Qk { q, q_stride, k, k_stride, lse_bhl, kv_heads: KV, dim: DIM }
}

fn student(case: &Case) -> Student<'_> {
    Student { xbc: &case.xbc, a_hn: &case.a, d_h: &case.d }
}

/// The loss from its definition, in f64; `log_a` is added to the logarithm of one decay.
fn exact(case: &Case, log_a: (usize, f64)) -> f64 {
    let s = case.shape;
    let mut total = 0.0;
    for (b, h) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let mut square = 1e-12;
        let triangle = &case.packed[(b * 2 + h) * (s.seq * (s.seq + 1) / 2)..];
        for l in 0..s.seq {
            for k in 0..=l {
                let (tl, tk) = (b * s.seq + l, b * s.seq + k);
                let of = |t: usize, at: usize| &case.xbc[t * s.row() + at..][..s.state];
                let pairs = of(tl, s.c_at(h)).iter().zip(of(tk, s.b_at(h)));
                let mut m: f64 = pairs.map(|(c, b)| f64::from(*c) * f64::from(*b)).sum();
                for t in tk + 1..=tl {
                    let at = h * s.tokens() + t;
                    let change = if at == log_a.0 { log_a.1.exp() } else { 1.0 };
                    m *= f64::from(case.a[at]) * change;
                }
                if l == k {
                    m += f64::from(case.d[h]);
                }
                square += (m - f64::from(triangle[l * (l + 1) / 2 + k])).powi(2);
            }
        }
        total += square.sqrt();
    }
    total
}

#[test]
fn both_sources_of_attention_give_the_loss_of_the_definition() {
    for seq in [1, 5, 32, 45] {
        let case = case(seq);
        let mut scratch = Scratch::new(seq);
        let want = exact(&case, (usize::MAX, 0.0));
        for teacher in [qk(&case), Teacher::Packed(&case.packed)] {
            let got = loss(case.shape, &case.starts, teacher, student(&case), None, &mut scratch);
            assert!((got.distance - want).abs() < 1e-5 * want, "{} {want}", got.distance);
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let mut case = case(37);
    let s = case.shape;
    let mut d_xbc = vec![7.0; case.xbc.len()];
    let (mut d_log_a, mut d_d) = (vec![f32::NAN; case.a.len()], vec![1.0; 2]);
    let gradient =
        Gradient { weight: 0.5, d_xbc: &mut d_xbc, d_log_a_hn: &mut d_log_a, d_d_h: &mut d_d };
    let mut scratch = Scratch::new(37);
    loss(s, &case.starts, qk(&case), student(&case), Some(gradient), &mut scratch);
    let close = |got: f32, up: f64, down: f64, width: f64| {
        let want = 0.5 * (up - down) / width;
        assert!((f64::from(got) - want).abs() < 1e-4 * (0.1 + want.abs()), "{got} {want}");
    };
    for i in (0..case.xbc.len()).filter(|i| i % s.row() < s.inner() || i % 3 == 0) {
        if i % s.row() < s.inner() {
            assert_eq!(d_xbc[i], 7.0, "a column of x was written");
            continue;
        }
        let kept = case.xbc[i];
        let mut at = |value: f32| {
            case.xbc[i] = value;
            exact(&case, (usize::MAX, 0.0))
        };
        let (high, low) = (kept + 1.0 / 256.0, kept - 1.0 / 256.0);
        close(d_xbc[i], at(high), at(low), f64::from(high) - f64::from(low));
        case.xbc[i] = kept;
    }
    for (i, got) in d_log_a.iter().enumerate() {
        close(*got, exact(&case, (i, 1e-4)), exact(&case, (i, -1e-4)), 2e-4);
    }
    for (head, got) in d_d.iter().enumerate() {
        let kept = case.d[head];
        let mut at = |value: f32| {
            case.d[head] = value;
            exact(&case, (usize::MAX, 0.0))
        };
        close(got - 1.0, at(kept + 1.0 / 256.0), at(kept - 1.0 / 256.0), 1.0 / 128.0);
        case.d[head] = kept;
    }
}
