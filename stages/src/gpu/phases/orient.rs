//! Phase 1 on the device; see [`crate::orient`]. The teacher's pass and every layer's loss and
//! gradients are one queue of work: no T×T matrix exists, and layers share all buffers.

use anyhow::{Result, bail};
use half::bf16;

use super::teacher::{Cached, Seen, TURNS, Teacher};
use super::{Driver, Work, apart};
use crate::gpu::batch::Batch;
use crate::gpu::gemm::Mat;
use crate::gpu::launch::{Buf, Gpu, Slice};
use crate::gpu::learners::Learners;
use crate::gpu::model::acts;
use crate::gpu::model::block::Block;
use crate::gpu::model::norm::Stats;
use crate::gpu::model::room::Room;
use crate::gpu::model::whole::check;
use crate::gpu::ops::adamw::Record;
use crate::gpu::ops::orient as op;
use crate::models::{Config, Trained};
use crate::ops::Dims;
use crate::ops::orient::Sums;
use crate::train::layer::Layer;
use crate::train::source::{Source, Want};

/// Layers in training, and the buffers that they share.
pub struct Orient {
    gpu: Gpu,
    source: Source,
    teacher: Teacher,
    depth: usize,
    /// Number and block of each layer.
    layers: Vec<(usize, Block)>,
    cached: Option<Cached>,
    pending: Vec<crate::train::source::Layer>,
    x1_nd: Buf<bf16>,
    stats: Stats,
    acts: acts::Ssm,
    room: Room,
    shape: op::Shape,
    partials: Buf<f32>,
    cs_bhl: Buf<f32>,
    rowdot_bhl: Buf<f32>,
    coldot_bhl: Buf<f32>,
    /// Norm, factor, ‖A‖ and gradient of the skip of each sequence and head.
    pairs: [Buf<f32>; 4],
    weight: f32,
}

/// Makes a trainer of `layers` for updates of `batch` sequences, `micro` of them at a time.
pub fn driver(
    gpu: &Gpu,
    source: Source,
    config: &Config,
    layers: &[Layer],
    (batch, micro): (usize, usize),
) -> Result<Driver<Orient>> {
    check(config)?;
    let dims = Dims { batch: micro, seq: source.seq() };
    let teacher = Teacher::new(gpu, &source.model, &source.params, dims, TURNS)?;
    let of = (&source.model, &teacher);
    let (learners, blocks) = apart::upload(gpu, of, config, layers, Trained::MIXERS)?;
    let mixer = *blocks[0].1.ssm();
    let heads = teacher.heads;
    let shape = op::Shape {
        batch: micro,
        seq: dims.seq,
        heads: heads.query,
        kv_heads: heads.kv,
        dim: heads.dim,
        state: mixer.state,
    };
    let (n, pairs) = (dims.tokens(), shape.pairs());
    let rows = || gpu.alloc::<f32>("sums of rows", pairs * dims.seq);
    let pair = || gpu.alloc::<f32>("norms", pairs);
    let cached = match source.cached() {
        true => Some(Cached::new(gpu, heads, config.d_model, dims)?),
        false => None,
    };
    let depth = layers.iter().map(|layer| layer.number + 1).max().unwrap_or(0);
    let work = Orient {
        gpu: gpu.clone(),
        depth,
        cached,
        pending: Vec::new(),
        x1_nd: gpu.alloc("a normed input", n * config.d_model)?,
        stats: blocks[0].1.norm1.stats(gpu, n)?,
        acts: acts::Ssm::new(gpu, &mixer, dims, false)?,
        room: Room::of_matrix(gpu, &mixer, dims)?,
        shape,
        partials: gpu.alloc("partial sums", shape.partials())?,
        cs_bhl: rows()?,
        rowdot_bhl: rows()?,
        coldot_bhl: rows()?,
        pairs: [pair()?, pair()?, pair()?, pair()?],
        weight: 1.0 / (batch * heads.query) as f32,
        layers: blocks,
        teacher,
        source,
    };
    Driver::new(gpu, work, learners, dims)
}

impl Orient {
    /// Numbers of the layers.
    pub fn numbers(&self) -> impl Iterator<Item = usize> {
        self.layers.iter().map(|(number, _)| *number)
    }

    /// One layer: its loss (and ‖A‖) into `sums`, and its gradients if `learn`.
    fn layer(
        &self,
        batch: &Batch,
        seen: Seen,
        at: usize,
        sums: (Slice<f32>, Slice<f32>),
        learn: bool,
    ) {
        let Orient { gpu, shape, room, .. } = self;
        let (block, scene) = (&self.layers[at].1, self.teacher.scene(batch));
        let (mixer, acts) = (block.ssm(), self.acts.all());
        let x1_nd = seen.x1_nd.unwrap_or_else(|| {
            let x1_nd = self.x1_nd.all();
            block.norm1.forward(gpu, scene.dims.tokens(), seen.u_nd, x1_nd, &self.stats);
            x1_nd
        });
        let x = Mat::new(x1_nd, block.d);
        mixer.forward_matrix(gpu, scene, x, acts);
        let (a_log, stride) = (acts.a_log_nh, mixer.a_stride());
        op::decay_cumsum(gpu, *shape, (a_log, stride), self.cs_bhl.all());
        let inputs = self.inputs(scene.starts_n, seen, block, acts.xbc_nc);
        let [norm_bh, factor_bh, attention_bh, d_d_bh] = self.pairs.each_ref().map(Buf::all);
        let norms = op::Norms { norm_bh, factor_bh, attention_bh };
        let partials = self.partials.all();
        let (rowdot_bhl, coldot_bhl) = (self.rowdot_bhl.all(), self.coldot_bhl.all());
        let channels = mixer.channels();
        let decay = op::Decay {
            rowdot_bhl,
            coldot_bhl,
            a_log_nh: a_log,
            a_stride: stride,
            d_proj: room.d_proj_nr.all(),
            proj_stride: mixer.rows,
            a_column: mixer.a_at(),
            d_d_bh,
        };
        match learn {
            true => {
                let d_xbc = room.d_xbc_nc.all();
                let (dc, db) = (d_xbc.from(mixer.c_at()), d_xbc.from(mixer.b_at()));
                op::rows(gpu, *shape, inputs, (dc, channels), rowdot_bhl, partials);
                op::columns(gpu, *shape, inputs, (db, channels), coldot_bhl);
            }
            false => op::sums(gpu, *shape, inputs, partials),
        }
        let decay = learn.then_some(decay);
        op::finish(gpu, *shape, partials, self.weight, norms, scene.starts_n, decay);
        let skips = mixer.d_d_h().filter(|_| learn).map(|d_d_h| (d_d_bh, d_d_h));
        op::total(gpu, *shape, norms, self.weight, sums, skips);
        if learn {
            mixer.backward_matrix(gpu, scene, (x, acts), factor_bh, room);
        }
    }

    fn inputs(
        &self,
        starts_n: Slice<u32>,
        seen: Seen,
        block: &Block,
        xbc_nc: Slice<bf16>,
    ) -> op::Inputs {
        let (mixer, heads) = (block.ssm(), self.teacher.heads);
        op::Inputs {
            teacher: op::Teacher {
                q: seen.qkv_nr,
                k: seen.qkv_nr.from(heads.query * heads.dim),
                stride: seen.stride,
                lse_bhl: seen.lse_bhl,
            },
            student: op::Student {
                b: xbc_nc.from(mixer.b_at()),
                c: xbc_nc.from(mixer.c_at()),
                stride: mixer.channels(),
                cs_bhl: self.cs_bhl.all(),
                d_h: mixer.d_h,
            },
            starts_n,
        }
    }

    /// Every layer of the batch at hand.
    fn every(&self, batch: &Batch, sums: impl Fn(usize) -> (Slice<f32>, Slice<f32>), learn: bool) {
        let place = |layer| self.layers.iter().position(|(number, _)| *number == layer);
        let one = |seen: Seen| {
            if let Some(at) = place(seen.layer) {
                self.layer(batch, seen, at, sums(at), learn);
            }
        };
        match &self.cached {
            None => self.teacher.visit(&self.gpu, batch, (self.depth, false), one),
            Some(cached) => self
                .pending
                .iter()
                .for_each(|signals| one(cached.send(&self.gpu, signals.layer, signals))),
        }
    }

    /// Mean distance and ‖A‖ of each layer on `sequences`, a multiple of a micro-batch.
    pub fn held_out(&mut self, batch: &mut Batch, sequences: &[usize]) -> Result<Vec<Sums>> {
        let count = self.layers.len();
        let sums: Buf<f32> = self.gpu.zeros("held-out figures", 2 * count)?;
        let size = batch.dims().batch;
        if !sequences.len().is_multiple_of(size) {
            bail!("{} held-out sequences are no multiple of {size}", sequences.len());
        }
        for part in sequences.chunks(size) {
            self.send(batch, part)?;
            let all = sums.all();
            self.every(
                batch,
                |at| (all.range(at..at + 1), all.range(count + at..count + at + 1)),
                false,
            );
        }
        let found = self.gpu.download(sums.all())?;
        // They were weighted for an update.
        let scale =
            1.0 / (f64::from(self.weight) * (sequences.len() * self.teacher.heads.query) as f64);
        let mean = |at: usize| Sums {
            distance: f64::from(found[at]) * scale,
            attention: f64::from(found[count + at]) * scale,
        };
        Ok((0..count).map(mean).collect())
    }
}

impl Work for Orient {
    fn send(&mut self, batch: &mut Batch, sequences: &[usize]) -> Result<()> {
        if self.cached.is_some() {
            self.pending = self.source.signals(sequences, Want::Attention, self.numbers())?;
            let first = self.pending.first().expect("a phase has a layer");
            batch.send_starts(&first.starts_n);
            return Ok(());
        }
        let separator = self.source.model.config.separator;
        batch.send(separator, false, |i, out| self.source.tokens(sequences[i], out))
    }

    fn queue(&self, batch: &Batch, learners: &Learners) {
        self.every(batch, |at| (learners.loss(at), learners.extra(at)), true);
    }

    fn values(&self, _: &Learners, row: &[Record]) -> Vec<(String, f64)> {
        let mut values = Vec::new();
        for (number, record) in self.numbers().zip(row) {
            values.push((format!("loss.{number}"), f64::from(record.loss)));
            values.push((format!("attention.{number}"), f64::from(record.extra)));
        }
        let total: f64 = row.iter().map(|record| f64::from(record.loss)).sum();
        values.push(("loss".into(), total / row.len() as f64));
        values
    }

    fn recordable(&self) -> bool {
        self.cached.is_none()
    }
}
