//! Norms, MLP activations, embedding, losses, optimiser.

use anyhow::Result;
use half::bf16;

use super::{Bench, Work, bytes, halves};
use crate::gpu::bench::subject::{Subject, TRAINING};
use crate::gpu::launch::Buf;
use crate::gpu::model::whole::rows;
use crate::gpu::ops::{adamw, cross_entropy, distance, embed, mlp as op, norm};
use crate::models::{MlpKind, Model, NormKind};
use crate::train::adamw::Rule;
use crate::train::layer::groups;

/// The norms of the model, backward as in a block: beside a residual stream.
pub(super) fn norms(bench: &mut Bench) -> Result<()> {
    let (gpu, n, d) = (bench.gpu.clone(), bench.n(), bench.teacher.d_model);
    let layer = bench.teacher.norm == NormKind::Layer;
    let names = match layer {
        true => ["layer norm", "layer norm back", "layer norm back, trained"],
        false => ["rms norm", "rms norm back", "rms norm back, trained"],
    };
    let (x, y, residual) =
        (bench.sheet.half(n * d)?, bench.sheet.half(n * d)?, bench.sheet.half(n * d)?);
    let vector = || gpu.zeros::<f32>("a norm", d);
    let (w, b, d_w, d_b) = (bench.sheet.full(d, 1.0)?, vector()?, vector()?, vector()?);
    let (inv, mean) = (gpu.alloc::<f32>("factors", n)?, gpu.alloc::<f32>("means", n)?);
    let partials = gpu.alloc::<f32>("partial sums", norm::partials((n, d), layer))?;
    let of = |buf: &Buf<f32>| layer.then(|| buf.all());
    let params = norm::Norm { w: w.all(), b: of(&b), eps: 1e-5 };
    let saved = norm::Saved { inv_n: inv.all(), mean_n: of(&mean) };
    let stats = if layer { 2 * n } else { n };
    bench.op(names[0], bytes(2 * n * d, stats), || {
        norm::forward(&gpu, (n, d), params, x.all(), y.all(), Some(saved));
    })?;
    let gradients = norm::Gradients {
        d_y_nd: y.all(),
        d_y2_nd: None,
        d_residual_nd: Some(residual.all()),
        d_x_nd: residual.all(),
    };
    let sums = norm::Sums { partials: partials.all(), d_w: d_w.all(), d_b: of(&d_b) };
    for (name, sums) in [(names[1], None), (names[2], Some(sums))] {
        // The residual stream's gradient would grow without bound.
        gpu.fill(residual.all(), 0);
        bench.op(name, bytes(4 * n * d, stats), || {
            norm::backward(&gpu, (n, d), params, x.all(), saved, gradients, sums);
        })?;
    }
    Ok(())
}

/// The activation of the MLP.
pub(super) fn mlp(bench: &mut Bench) -> Result<()> {
    let (gpu, n, f) = (bench.gpu.clone(), bench.n(), bench.teacher.ffn);
    let dims = (n, f);
    let gated = bench.teacher.mlp == MlpKind::Swiglu;
    let wide = if gated { 2 * f } else { f };
    let (into, h) = (bench.sheet.half(n * wide)?, bench.sheet.half(n * f)?);
    let d_into = gpu.alloc::<bf16>("gradients", n * wide)?;
    let (into, h, d_into) = (into.all(), h.all(), d_into.all());
    match gated {
        true => {
            bench.op("swiglu", halves(3 * n * f), || op::swiglu_forward(&gpu, dims, into, h))?;
            bench.op("swiglu back", halves(5 * n * f), || {
                op::swiglu_backward(&gpu, dims, h, into, d_into, None);
            })
        }
        false => {
            bench.op("gelu", halves(2 * n * f), || op::gelu_forward(&gpu, dims, into, None, h))?;
            bench.op("gelu back", halves(3 * n * f), || {
                op::gelu_backward(&gpu, dims, h, (into, None), d_into, None);
            })
        }
    }
}

/// The embedding, on random tokens.
pub(super) fn embedding(bench: &mut Bench) -> Result<()> {
    let (gpu, n) = (bench.gpu.clone(), bench.n());
    let (d, v) = (bench.teacher.d_model, bench.teacher.vocab);
    let tokens = crate::gpu::bench::subject::tokens(n, v);
    let order = embed::order(&tokens);
    let mut distinct = tokens.clone();
    distinct.sort_unstable();
    distinct.dedup();
    let (ids, order) = (gpu.buf("tokens", &tokens)?, gpu.buf("their order", &order)?);
    let (w, x) = (bench.sheet.half(v * d)?, gpu.alloc::<bf16>("hidden states", n * d)?);
    let rows = distinct.len() * d;
    bench.op("embed", bytes(rows + n * d, n), || {
        embed::forward(&gpu, (n, d, v), ids.all(), w.all(), x.all());
    })?;
    let partials = gpu.alloc::<f32>("partial sums", embed::partial(n, d))?;
    let d_w = gpu.zeros::<f32>("gradients", v * d)?;
    bench.op("embed back", bytes(n * d, 2 * rows + 2 * n), || {
        let at = (ids.all(), order.all());
        embed::backward(&gpu, (n, d, v), at, x.all(), partials.all(), d_w.all());
    })
}

/// The losses of phases 2 and 3, with gradients.
pub(super) fn losses(bench: &mut Bench) -> Result<()> {
    let (gpu, n) = (bench.gpu.clone(), bench.n());
    let (d, v) = (bench.teacher.d_model, bench.teacher.vocab);
    let (s, t) = (bench.sheet.half(n * d)?, bench.sheet.half(n * d)?);
    let (d_s, of) = (gpu.alloc::<bf16>("gradients", n * d)?, gpu.alloc::<f32>("distances", n)?);
    bench.op("distance", bytes(3 * n * d, n), || {
        let to = distance::Gradient { d_s_nd: d_s.all(), weight: 1e-3, add: false };
        distance::distances(&gpu, (n, d), (s.all(), t.all()), Some(of.all()), None, Some(to));
    })?;
    drop((s, t, d_s));
    let rows = rows(v, n);
    let (s, t) = (bench.sheet.half(rows * v)?, bench.sheet.half(rows * v)?);
    let bias = bench.sheet.full(v, 0.1)?;
    let bias = bench.teacher.bias.head.then(|| bias.all());
    let out = gpu.alloc::<f32>("losses", 2 * rows)?;
    bench.op("cross entropy", bytes(3 * rows * v, 2 * rows), || {
        let at = cross_entropy::Rows { rows, v, weight: 1.0, factor: None, learn: true };
        cross_entropy::soft(&gpu, at, (s.all(), bias), (t.all(), bias), None, None, out.all());
    })
}

/// Clip and AdamW of the whole student as one learner: gradients are read twice and zeroed, masters
/// and moments read and written, bf16 weights written.
pub(super) fn optimiser(bench: &mut Bench, subject: &Subject) -> Result<()> {
    let gpu = bench.gpu.clone();
    let layout = Model::new(subject.student())?.layout;
    let len = layout.len();
    let updates = adamw::Updates::new(
        &gpu,
        &[groups(&layout, TRAINING.decay, |_| true)],
        Rule::default(),
        TRAINING.clip as f32,
        1,
    )?;
    let (params, grads) = (bench.sheet.full(len, 0.1)?, bench.sheet.full(len, 1e-3)?);
    let moment = || gpu.zeros::<f32>("moments", len);
    let (m, v) = (moment()?, moment()?);
    let shadow = gpu.alloc::<bf16>("weights", len)?;
    let (rate, slot) = (gpu.buf("rate", &[1e-4f32])?, gpu.zeros::<u32>("slot", 1)?);
    let flat = adamw::Flat {
        params: params.all(),
        grads: grads.all(),
        m: m.all(),
        v: v.all(),
        shadow: Some(shadow.all()),
    };
    bench.op("clip and adamw", Work::Bytes(38.0 * len as f64), || {
        updates.step(&gpu, flat, None, (rate.all(), slot.all()), true);
    })
}
