//! Matrix orientation against the CPU: the loss, every gradient, and the held-out sums.

use stages::gpu::launch::Gpu;
use stages::gpu::ops::orient::{self, Decay, Inputs, Norms, Shape, Student, Teacher};
use stages::ops::{orient as cpu, ssd};

use crate::support::{close, devices, full, half, normal, poison, read, read_full, same, starts};

const WIDTH: usize = 8;
const A_COLUMN: usize = 8;

struct Case {
    shape: Shape,
    starts: Vec<u32>,
    qkv: Vec<f32>,
    lse: Vec<f32>,
    xbc: Vec<f32>,
    a_log: Vec<f32>,
    d: Vec<f32>,
}

impl Case {
    fn new(shape: Shape, documents: bool) -> Case {
        let Shape { batch, seq, heads, kv_heads, dim, state } = shape;
        let tokens = shape.tokens();
        let mut case = Case {
            shape,
            starts: starts(batch, seq, documents),
            qkv: normal(1, tokens * (heads + 2 * kv_heads) * dim, 1.0),
            lse: Vec::new(),
            xbc: normal(2, tokens * heads * (WIDTH + 2 * state), 0.5 * (state as f32).powf(-0.25)),
            a_log: normal(3, tokens * heads, 1.0).iter().map(|a| a - 3.0).collect(),
            d: normal(4, heads, 0.5),
        };
        for pair in 0..batch * heads {
            for l in 0..seq {
                let since = case.starts[pair / heads * seq + l] as usize;
                let sum: f64 = (since..=l).map(|s| case.score(pair, l, s).exp()).sum();
                case.lse.push(sum.ln() as f32);
            }
        }
        case
    }

    fn stride(&self) -> usize {
        (self.shape.heads + 2 * self.shape.kv_heads) * self.shape.dim
    }

    fn score(&self, pair: usize, l: usize, s: usize) -> f64 {
        let Shape { seq, heads, kv_heads, dim, .. } = self.shape;
        let (token, head) = (pair / heads * seq, pair % heads);
        let q = &self.qkv[(token + l) * self.stride() + head * dim..][..dim];
        let key = heads * dim + head / (heads / kv_heads) * dim;
        let k = &self.qkv[(token + s) * self.stride() + key..][..dim];
        let dot: f64 = q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
        dot / (dim as f64).sqrt()
    }

    fn scan(&self) -> ssd::Shape {
        let Shape { batch, seq, heads, state, .. } = self.shape;
        ssd::Shape { batch, seq, heads, width: WIDTH, state, chunk: 64 }
    }

    fn weight(&self) -> f32 {
        1.0 / self.shape.pairs() as f32
    }
}

/// The loss and ‖A‖ (both twice: with gradients and without), dB and dC as one, dA_log, dD.
struct Results {
    sums: Vec<f32>,
    d_bc: Vec<f32>,
    d_a_log: Vec<f32>,
    d_d: Vec<f32>,
}

fn on_cpu(case: &Case) -> Results {
    let (shape, scan) = (case.shape, case.scan());
    let (heads, tokens, row) = (shape.heads, shape.tokens(), scan.row());
    let mut a_hn = vec![0.0; heads * tokens];
    for (n, start) in case.starts.iter().enumerate() {
        for head in 0..heads {
            let decay = 1.0 / (1.0 + case.a_log[n * heads + head].exp());
            a_hn[head * tokens + n] = if *start as usize == n % shape.seq { 0.0 } else { decay };
        }
    }
    let (mut d_xbc, mut d_log_a) = (vec![0.0; case.xbc.len()], vec![0.0; a_hn.len()]);
    let mut d_d = vec![0.0; heads];
    let teacher = cpu::Teacher::Qk {
        q: &case.qkv,
        q_stride: case.stride(),
        k: &case.qkv[heads * shape.dim..],
        k_stride: case.stride(),
        lse_bhl: &case.lse,
        kv_heads: shape.kv_heads,
        dim: shape.dim,
    };
    let student = cpu::Student { xbc: &case.xbc, a_hn: &a_hn, d_h: &case.d };
    let gradient = cpu::Gradient {
        weight: case.weight(),
        d_xbc: &mut d_xbc,
        d_log_a_hn: &mut d_log_a,
        d_d_h: &mut d_d,
    };
    let mut scratch = cpu::Scratch::new(shape.seq);
    let sums = cpu::loss(scan, &case.starts, teacher, student, Some(gradient), &mut scratch);
    let scaled = |sum: f64| (sum * f64::from(case.weight())) as f32;
    let sums = [sums.distance, sums.attention, sums.distance, sums.attention].map(scaled).to_vec();
    let d_bc = d_xbc.chunks(row).flat_map(|row| row[scan.inner()..].to_vec()).collect();
    let d_a_log = (0..tokens * heads).map(|i| {
        let change = d_log_a[i % heads * tokens + i / heads];
        -change / (1.0 + (-case.a_log[i]).exp())
    });
    Results { sums, d_bc, d_a_log: d_a_log.collect(), d_d }
}

fn on_gpu(gpu: &Gpu, case: &Case) -> Results {
    let (shape, scan) = (case.shape, case.scan());
    let Shape { heads, state, .. } = shape;
    let (tokens, pairs, row, inner) = (shape.tokens(), shape.pairs(), scan.row(), scan.inner());
    let c_at = inner + heads * state;
    let (qkv, lse) = (half(gpu, &case.qkv), full(gpu, &case.lse));
    let (xbc, d, a_log) = (half(gpu, &case.xbc), full(gpu, &case.d), full(gpu, &case.a_log));
    let starts = gpu.buf("starts", &case.starts).unwrap();
    let [cs, rowdot, coldot] = [0; 3].map(|_| poison::<f32>(gpu, pairs * shape.seq));
    let [norm, factor, attention, d_d_bh] = [0; 4].map(|_| poison::<f32>(gpu, pairs));
    let (partials, out) = (poison::<f32>(gpu, shape.partials()), full(gpu, &[0.0; 4]));
    let (d_xbc, d_d) = (poison(gpu, tokens * row), full(gpu, &vec![1.0; heads]));
    let proj_stride = A_COLUMN + heads.next_multiple_of(8) + 8;
    let d_proj = poison(gpu, tokens * proj_stride);

    let k = qkv.all().from(heads * shape.dim);
    let teacher = Teacher { q: qkv.all(), k, stride: case.stride(), lse_bhl: lse.all() };
    let (b, c) = (xbc.all().from(inner), xbc.all().from(c_at));
    let student = Student { b, c, stride: row, cs_bhl: cs.all(), d_h: d.all() };
    let inputs = Inputs { teacher, student, starts_n: starts.all() };
    let norms =
        Norms { norm_bh: norm.all(), factor_bh: factor.all(), attention_bh: attention.all() };
    let decay = Decay {
        rowdot_bhl: rowdot.all(),
        coldot_bhl: coldot.all(),
        a_log_nh: a_log.all(),
        a_stride: heads,
        d_proj: d_proj.all(),
        proj_stride,
        a_column: A_COLUMN,
        d_d_bh: d_d_bh.all(),
    };
    let (starts, weight, all) = (starts.all(), case.weight(), partials.all());
    orient::decay_cumsum(gpu, shape, (a_log.all(), heads), cs.all());
    orient::sums(gpu, shape, inputs, all);
    orient::finish(gpu, shape, all, weight, norms, starts, None);
    orient::total(gpu, shape, norms, weight, (out.all().range(2..3), out.all().range(3..4)), None);
    gpu.fill(all, 0xff);
    let (dc, db) = ((d_xbc.all().from(c_at), row), (d_xbc.all().from(inner), row));
    orient::rows(gpu, shape, inputs, dc, rowdot.all(), all);
    orient::columns(gpu, shape, inputs, db, coldot.all());
    orient::finish(gpu, shape, all, weight, norms, starts, Some(decay));
    let skips = Some((d_d_bh.all(), d_d.all()));
    orient::total(gpu, shape, norms, weight, (out.all().range(0..1), out.all().range(1..2)), skips);

    let factors = read_full(gpu, factor.all());
    let mut d_bc = Vec::new();
    for (n, of_n) in read(gpu, d_xbc.all()).chunks(row).enumerate() {
        assert!(of_n[..inner].iter().all(|v| v.is_nan()), "a column of x was written");
        let scaled = of_n[inner..].iter().enumerate();
        d_bc.extend(scaled.map(|(i, v)| v * factors[n / shape.seq * heads + i / state % heads]));
    }
    let mut d_a_log = Vec::new();
    for of_n in read(gpu, d_proj.all()).chunks(proj_stride) {
        assert!(of_n[..A_COLUMN].iter().all(|v| v.is_nan()), "a column before A_log was written");
        assert!(of_n[A_COLUMN + heads..].iter().all(|v| *v == 0.0), "padding is not zero");
        d_a_log.extend_from_slice(&of_n[A_COLUMN..][..heads]);
    }
    let d_d = read_full(gpu, d_d.all()).iter().map(|v| v - 1.0).collect();
    Results { sums: read_full(gpu, out.all()), d_bc, d_a_log, d_d }
}

fn compare(shape: Shape, documents: bool) {
    let case = Case::new(shape, documents);
    let wanted = on_cpu(&case);
    let got: Vec<Results> = devices().iter().map(|gpu| on_gpu(gpu, &case)).collect();
    for got in &got {
        close("loss", &got.sums, &wanted.sums, 1e-4);
        close("dB, dC", &got.d_bc, &wanted.d_bc, 2e-2);
        close("dA_log", &got.d_a_log, &wanted.d_a_log, 2e-2);
        close("dD", &got.d_d, &wanted.d_d, 1e-3);
    }
    let all = |of: fn(&Results) -> &Vec<f32>| got.iter().map(|r| of(r).clone()).collect::<Vec<_>>();
    same("loss", &all(|r| &r.sums));
    same("dB, dC", &all(|r| &r.d_bc));
    same("dA_log", &all(|r| &r.d_a_log));
    same("dD", &all(|r| &r.d_d));
}

#[test]
fn odd_lengths_heads_and_documents() {
    let shape = Shape { batch: 1, seq: 1, heads: 1, kv_heads: 1, dim: 64, state: 64 };
    compare(shape, false);
    compare(Shape { batch: 3, seq: 37, heads: 2, ..shape }, true);
    compare(Shape { seq: 300, heads: 3, ..shape }, false);
    compare(Shape { batch: 2, seq: 333, heads: 4, kv_heads: 2, ..shape }, true);
    // More pairs than run together.
    compare(Shape { seq: 129, heads: 34, kv_heads: 17, dim: 32, state: 16, ..shape }, true);
}

#[test]
fn every_size() {
    for dim in [32, 64, 128] {
        for state in [16, 32, 64, 128] {
            let shape = Shape { batch: 1, seq: 165, heads: 2, kv_heads: 1, dim, state };
            compare(shape, dim == state);
        }
    }
}
