//! The same on a GPU: the device runs the teacher, the host writes what it left, layer by layer.
//! Hidden states, queries and keys are bf16 there, so that both number types hold them exactly.

use anyhow::{Result, ensure};
use engine::stage::Context;
use half::bf16;
use safetensors::Dtype;

use super::{Files, Params, Signal, append};
use crate::data::shard::TokenShard;
use crate::gpu::batch::Batch;
use crate::gpu::gemm::{self, Mat};
use crate::gpu::launch::{Buf, Gpu};
use crate::gpu::model::acts::Acts;
use crate::gpu::phases::sequences;
use crate::gpu::phases::teacher::Teacher;
use crate::models::file::Writer;
use crate::models::{Model, Params as Weights};
use crate::ops::Dims;
use crate::ops::top_k::{self, TopK};
use crate::train::run::each_shard;
use crate::train::signals::{AttentionForm, Shape};

/// Bytes of logits that come to the host at a time.
const LOGIT_BYTES: usize = 256 << 20;

/// The whole step.
pub(super) fn run(
    gpu: &Gpu,
    params: &Params,
    ctx: &mut Context,
    (model, weights): (&Model, &Weights),
    shard: &TokenShard,
    chosen: &[usize],
) -> Result<()> {
    let attention = params.keep.contains(&Signal::Attention);
    ensure!(
        !attention || params.attention == AttentionForm::Qk,
        "on a GPU attention is cached as queries and keys; set `attention: qk`, or `device: cpu`"
    );
    let (config, seq) = (&model.config, shard.seq());
    let dims = Dims { batch: sequences(config, seq).min(chosen.len()), seq };
    let teacher = Teacher::new(gpu, model, weights, dims, 1)?;
    let mut batch = Batch::new(gpu, dims)?;
    let mut top = match params.top_k {
        0 => None,
        k => Some(Top::new(gpu, (model, weights), k, dims.tokens(), ctx.threads())?),
    };
    let mut files = Files::create(params, ctx, model, shard, chosen)?;
    for first in (0..chosen.len()).step_by(dims.batch) {
        ctx.check_cancelled()?;
        let part = &chosen[first..chosen.len().min(first + dims.batch)];
        let fill = |i: usize, out: &mut [u32]| shard.copy_to(part[i], out);
        batch.send_some(config.separator, false, part.len(), fill)?;
        layers(gpu, &teacher, &batch, part.len(), &mut files)?;
        if let (Some(top), Some(writer)) = (&mut top, &mut files.logits) {
            teacher.forward.end(gpu, teacher.scene(&batch));
            top.write(gpu, &teacher, part.len() * seq, writer)?;
        }
        let done = first + part.len();
        ctx.progress((done * seq) as u64, (chosen.len() * seq) as u64, "tokens");
    }
    files.layers.into_iter().try_for_each(|(_, writer)| writer.finish())?;
    files.logits.map_or(Ok(()), Writer::finish)
}

/// Runs all blocks; the signals of the first `count` sequences are written.
fn layers(
    gpu: &Gpu,
    teacher: &Teacher,
    batch: &Batch,
    count: usize,
    files: &mut Files,
) -> Result<()> {
    let Files { layers, dtype, .. } = files;
    let n = count * batch.dims().seq;
    let starts = gpu.download(batch.starts_n().range(0..n))?;
    let starts: Vec<u16> = starts.into_iter().map(|start| start as u16).collect();
    let d = teacher.forward.whole.config.d_model;
    let mut before: Option<Vec<bf16>> = None;
    teacher.forward.begin(gpu, batch);
    for layer in 0..teacher.forward.whole.blocks.len() {
        let (u_nd, next_nd, acts) = teacher.forward.block(gpu, teacher.scene(batch), layer);
        let Some((shape, writer)) = layers.get_mut(layer) else { continue };
        writer.append("starts", bytemuck::cast_slice(&starts))?;
        if shape.hidden {
            let read = |from: crate::gpu::launch::Slice<bf16>| gpu.download(from.range(0..n * d));
            let (next, known) = (read(next_nd)?, before.take());
            // The block wrote to another buffer than it read.
            let own = known.map_or_else(|| read(u_nd), Ok)?;
            append_halves(writer, "hidden", *dtype, &own)?;
            append_halves(writer, "next", *dtype, &next)?;
            before = Some(next);
        }
        if shape.attention.is_some() {
            attention(gpu, acts, shape, n, (writer, *dtype))?;
        }
    }
    Ok(())
}

fn attention(
    gpu: &Gpu,
    acts: &Acts,
    shape: &Shape,
    n: usize,
    (writer, dtype): (&mut Writer, Dtype),
) -> Result<()> {
    let (acts, heads) = (acts.attention().expect("checked: all layers have it"), shape.heads());
    let (row, qk) = (heads.row(), (heads.query + heads.kv) * heads.dim);
    let rows = gpu.download(acts.qkv_nr.range(0..n * row))?;
    let values: Vec<bf16> = rows.chunks_exact(row).flat_map(|row| &row[..qk]).copied().collect();
    append_halves(writer, "qk", dtype, &values)?;
    append(writer, "lse", Dtype::F32, &gpu.download(acts.lse_bhl.range(0..n * heads.query))?)
}

fn append_halves(writer: &mut Writer, name: &str, dtype: Dtype, values: &[bf16]) -> Result<()> {
    match dtype {
        Dtype::BF16 => writer.append(name, bytemuck::cast_slice(values)),
        _ => {
            let values: Vec<f32> = values.iter().map(|value| value.to_f32()).collect();
            writer.append(name, bytemuck::cast_slice(&values))
        }
    }
}

/// Chooses the likeliest tokens on the host's threads, from f32 logits that the device leaves.
struct Top {
    on_device: Buf<f32>,
    logits_nv: Vec<f32>,
    bias_v: Option<Vec<f32>>,
    /// One a thread, with as many of the rows at hand.
    parts: Vec<(TopK, usize)>,
    rows: usize,
    threads: usize,
}

impl Top {
    fn new(
        gpu: &Gpu,
        (model, weights): (&Model, &Weights),
        k: usize,
        n: usize,
        threads: usize,
    ) -> Result<Top> {
        let v = model.config.vocab;
        let rows = (LOGIT_BYTES / 4 / v).clamp(1, n);
        let share = rows.div_ceil(threads.max(1));
        let parts = rows.div_ceil(share);
        Ok(Top {
            on_device: gpu.alloc("logits", rows * v)?,
            logits_nv: vec![0.0; rows * v],
            bias_v: model.head().b.map(|bias| bias.of(&weights.flat).to_vec()),
            parts: (0..parts).map(|_| (TopK::new(share, v, k), 0)).collect(),
            rows,
            threads,
        })
    }

    /// Writes those of the first `n` tokens of the pass at hand.
    fn write(&mut self, gpu: &Gpu, teacher: &Teacher, n: usize, writer: &mut Writer) -> Result<()> {
        let whole = &teacher.forward.whole;
        let (d, v) = (whole.config.d_model, whole.config.vocab);
        for first in (0..n).step_by(self.rows) {
            let rows = self.rows.min(n - first);
            let x = teacher.forward.final_nd.all().range(first * d..(first + rows) * d);
            let logits = self.on_device.all().range(0..rows * v);
            gemm::linear_f32(gpu, "head", (rows, d, v), Mat::new(x, d), whole.head.w, (logits, v));
            gpu.download_to(logits, &mut self.logits_nv[..rows * v])?;
            self.choose(rows, v);
            for (top, n) in &self.parts {
                writer.append("ids", &top.id_bytes(*n))?;
                writer.append("log_p", bytemuck::cast_slice(&top.log_p_nk[..n * top.k]))?;
                writer.append("tail", bytemuck::cast_slice(&top.tail_n[..*n]))?;
            }
        }
        Ok(())
    }

    fn choose(&mut self, rows: usize, v: usize) {
        let Top { logits_nv, bias_v, parts, threads, .. } = self;
        let share = self.rows.div_ceil(parts.len());
        each_shard(*threads, parts, |part, (top, n)| {
            let first = rows.min(part * share);
            *n = share.min(rows - first);
            top_k::fill(top, *n, |rows, out| {
                let span = (first + rows.start) * v..(first + rows.end) * v;
                out.copy_from_slice(&logits_nv[span]);
                for row in out.chunks_exact_mut(v) {
                    bias_v.iter().for_each(|bias| crate::ops::vector::add(row, bias));
                }
            });
        });
    }
}
