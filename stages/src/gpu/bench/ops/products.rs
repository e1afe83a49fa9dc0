//! The products of a model, forward and both gradients.

use anyhow::Result;

use super::{Bench, Mixer, Work, mat};
use crate::gpu::gemm::{self, Epilogue};
use crate::gpu::model::whole::rows;
use crate::models::MlpKind;

/// A linear map.
struct Map {
    /// Names of forward, input's gradient and weight's.
    names: [&'static str; 3],
    n: usize,
    inputs: usize,
    outputs: usize,
    /// Whether its output is added to the residual stream.
    adds: bool,
    bias: bool,
}

/// All linear maps of teacher and student.
pub(super) fn all(bench: &mut Bench) -> Result<()> {
    let (n, config, mixer) = (bench.n(), bench.teacher.clone(), Mixer::of(&bench.student));
    let (d, inner, f) = (config.d_model, config.d_inner(), config.ffn);
    let bias = config.bias;
    let into = if config.mlp == MlpKind::Swiglu { 2 * f } else { f };
    let map = |names, inputs, outputs, adds, bias| Map { names, n, inputs, outputs, adds, bias };
    let maps = [
        map(["qkv", "qkv dx", "qkv dw"], d, inner + 2 * config.d_kv(), false, bias.qkv),
        map(["o", "o dx", "o dw"], inner, d, true, bias.out),
        map(["ssm.in", "ssm.in dx", "ssm.in dw"], d, mixer.rows(), false, false),
        map(["ssm.out", "ssm.out dx", "ssm.out dw"], inner, d, true, false),
        map(["mlp.into", "mlp.into dx", "mlp.into dw"], d, into, false, bias.mlp),
        map(["mlp.out", "mlp.out dx", "mlp.out dw"], f, d, true, bias.mlp),
    ];
    for map in maps {
        measure(bench, &map)?;
    }
    let v = config.vocab;
    let head = map(["head", "head dx", "head dw"], d, v, false, false);
    measure(bench, &Map { n: rows(v, n), ..head })?;
    decays(bench, mixer)
}

fn measure(bench: &mut Bench, map: &Map) -> Result<()> {
    let gpu = bench.gpu.clone();
    let Map { names, n, inputs, outputs, adds, bias } = *map;
    let dims = (n, inputs, outputs);
    let (x, w, add) = (
        bench.sheet.half(n * inputs)?,
        bench.sheet.half(inputs * outputs)?,
        bench.sheet.half(n * outputs)?,
    );
    let y = bench.sheet.half(n * outputs)?;
    let dw = gpu.zeros::<f32>("gradients", inputs * outputs)?;
    let b = bench.sheet.half(outputs)?;
    let (x, w, y) = (mat(&x, inputs), w.all(), mat(&y, outputs));
    let work = Work::Flops(2.0 * n as f64 * inputs as f64 * outputs as f64);
    bench.op(names[0], work, || {
        let add = adds.then(|| mat(&add, outputs));
        let bias = if bias { Epilogue::Bias(b.all().address()) } else { Epilogue::None };
        gemm::linear(&gpu, names[0], dims, (x, y), w, (add, bias));
    })?;
    let dy = mat(&add, outputs);
    bench.op(names[1], work, || gemm::linear_dx(&gpu, names[1], dims, dy, w, x, false))?;
    bench.op(names[2], work, || gemm::linear_dw(&gpu, names[2], dims, dy, x, dw.all()))
}

/// A_log, apart and into f32.
fn decays(bench: &mut Bench, mixer: Mixer) -> Result<()> {
    let (gpu, n, d) = (bench.gpu.clone(), bench.n(), bench.teacher.d_model);
    let stride = mixer.a_stride();
    let (x, w) = (bench.sheet.half(n * d)?, bench.sheet.half(d * stride)?);
    let y = gpu.alloc::<f32>("decays", n * stride)?;
    bench.op("ssm.a_log", super::bytes(n * d, n * stride), || {
        let to = (y.all(), stride);
        gemm::linear_f32(&gpu, "ssm.a_log", (n, d, stride), mat(&x, d), w.all(), to);
    })
}
