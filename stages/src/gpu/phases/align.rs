//! Phase 2 on the device; see [`crate::align`]. Layers share all buffers, and where norms are the
//! teacher's the normed input is the teacher's own.

use anyhow::{Result, bail};
use half::bf16;

use super::teacher::{Cached, Seen, TURNS, Teacher};
use super::{Driver, Work, apart};
use crate::align::Target;
use crate::gpu::batch::Batch;
use crate::gpu::launch::{Buf, Gpu, Slice};
use crate::gpu::learners::Learners;
use crate::gpu::model::acts::Acts;
use crate::gpu::model::block::Block;
use crate::gpu::model::room::Room;
use crate::gpu::model::whole::check;
use crate::gpu::ops::adamw::Record;
use crate::gpu::ops::{distance, reduce};
use crate::models::{Config, Trained};
use crate::ops::Dims;
use crate::train::layer::Layer;
use crate::train::source::{Source, Want};

/// Layers in training, and the buffers that they share.
pub struct Align {
    gpu: Gpu,
    source: Source,
    teacher: Teacher,
    target: Target,
    trained: Trained,
    depth: usize,
    layers: Vec<(usize, Block)>,
    cached: Option<Cached>,
    pending: Vec<crate::train::source::Layer>,
    acts: Acts,
    /// The teacher's own mixer on cached inputs, where it is compared with.
    teacher_acts: Option<Acts>,
    room: Room,
    out_nd: Buf<bf16>,
    d_nd: Buf<bf16>,
    distance_n: Buf<f32>,
    norm_n: Buf<f32>,
    partials: Buf<f32>,
    weight: f32,
}

/// Figures of a layer on held-out text: distances of tokens, and ‖s − t‖/‖t‖ of each.
#[derive(Clone, Debug, Default)]
pub struct HeldOut {
    /// Σ of what is compared.
    pub sum: f64,
    /// Of each token, in order.
    pub relative: Vec<f32>,
}

/// Makes a trainer of `layers` for updates of `batch` sequences, `micro` of them at a time.
pub fn driver(
    gpu: &Gpu,
    source: Source,
    config: &Config,
    layers: &[Layer],
    (batch, micro): (usize, usize),
    (target, train_mlp): (Target, bool),
) -> Result<Driver<Align>> {
    check(config)?;
    let dims = Dims { batch: micro, seq: source.seq() };
    let teacher = Teacher::new(gpu, &source.model, &source.params, dims, TURNS)?;
    let trained = Trained { norms: train_mlp, mlps: train_mlp, ..Trained::MIXERS };
    let of = (&source.model, &teacher);
    let (learners, blocks) = apart::upload(gpu, of, config, layers, trained)?;
    let n = dims.tokens();
    let wide = || gpu.alloc::<bf16>("hidden states", n * config.d_model);
    let cached = match source.cached() {
        true => Some(Cached::new(gpu, teacher.heads, config.d_model, dims)?),
        false => None,
    };
    let compares_mixer = cached.is_some() && target != Target::Block;
    let of_teacher = &teacher.forward.whole.blocks[layers[0].number];
    let depth = layers.iter().map(|layer| layer.number + 1).max().unwrap_or(0);
    let work = Align {
        gpu: gpu.clone(),
        target,
        trained,
        depth,
        cached,
        pending: Vec::new(),
        acts: Acts::new(gpu, &blocks[0].1, dims, true)?,
        teacher_acts: match compares_mixer {
            true => Some(Acts::new(gpu, of_teacher, dims, false)?),
            false => None,
        },
        room: Room::new(gpu, blocks.iter().map(|(_, block)| block), dims, None)?,
        out_nd: wide()?,
        d_nd: wide()?,
        distance_n: gpu.alloc("distances", n)?,
        norm_n: gpu.alloc("norms", n)?,
        partials: gpu.alloc("partial sums", reduce::SUM_PARTIALS)?,
        weight: 1.0 / (batch * dims.seq) as f32,
        layers: blocks,
        teacher,
        source,
    };
    Driver::new(gpu, work, learners, dims)
}

impl Align {
    /// Numbers of the layers.
    pub fn numbers(&self) -> impl Iterator<Item = usize> {
        self.layers.iter().map(|(number, _)| *number)
    }

    /// One layer: adds Σ distances · weight to `sum`, and gradients if `learn`; else relative
    /// distances are left in `distance_n` and `norm_n`.
    fn layer(&self, batch: &Batch, seen: Seen, at: usize, sum: Slice<f32>, learn: bool) {
        let Align { gpu, acts, room, trained, .. } = self;
        let (block, scene) = (&self.layers[at].1, self.teacher.scene(batch));
        let own_norms = trained.norms || seen.x1_nd.is_none();
        let x1_nd = match seen.x1_nd {
            Some(x1_nd) if !own_norms => {
                block.forward_mixer_from(gpu, scene, seen.u_nd, x1_nd, acts);
                x1_nd
            }
            _ => {
                block.forward_mixer(gpu, scene, seen.u_nd, acts);
                acts.x1_nd.all()
            }
        };
        let (wants_block, wants_mixer) =
            (self.target != Target::Mixer, self.target != Target::Block);
        let (out, d) = (self.out_nd.all(), self.d_nd.all());
        // Side by side, a frozen MLP adds the same to both outputs: they differ as the mixers do.
        let apart = block.norm2.is_none() && !trained.mlps && !trained.norms;
        let short = learn && wants_block && apart && seen.mid_nd.is_some();
        if (wants_block || !learn) && !short {
            match block.norm2 {
                None => block.forward_mlp_from(gpu, scene, x1_nd, out, acts),
                Some(_) => block.forward_mlp(gpu, scene, out, acts),
            }
        }
        if wants_block {
            let pair = match seen.mid_nd {
                Some(mid_nd) if short => (acts.mid_nd.all(), mid_nd),
                _ => (out, seen.next_nd),
            };
            self.compare(pair, sum, learn.then_some((d, false)));
            if learn && !apart {
                block.backward_mlp(gpu, scene, (x1_nd, d, d), acts, room);
            }
        }
        if wants_mixer {
            let pair = (acts.mid_nd.all(), self.teacher_mid(batch, seen));
            self.compare(pair, sum, learn.then_some((d, wants_block)));
        }
        if learn {
            let d_u = trained.norms.then_some(d);
            let after_mlp = wants_block && !apart;
            block.backward_mixer(gpu, scene, (seen.u_nd, x1_nd), (d, d_u), after_mlp, acts, room);
        } else {
            let (s_t, dims) = ((out, seen.next_nd), (scene.dims.tokens(), block.d));
            let (of, norms) = (self.distance_n.all(), self.norm_n.all());
            distance::distances(gpu, dims, s_t, Some(of), Some(norms), None);
        }
    }

    /// Adds Σ‖s − t‖ · weight to `sum`; its gradient goes to `.0` (or is added to it).
    fn compare(
        &self,
        (s_nd, t_nd): (Slice<bf16>, Slice<bf16>),
        sum: Slice<f32>,
        gradient: Option<(Slice<bf16>, bool)>,
    ) {
        let (d, of, weight) = (self.layers[0].1.d, self.distance_n.all(), self.weight);
        let dims = (s_nd.len() / d, d);
        // As on the CPU, the loss has the gradient's epsilon also where no gradient is wanted.
        let (d_s_nd, add) = gradient.unwrap_or((self.d_nd.all(), false));
        let gradient = distance::Gradient { d_s_nd, weight, add };
        distance::distances(&self.gpu, dims, (s_nd, t_nd), Some(of), None, Some(gradient));
        reduce::sum(&self.gpu, of, self.partials.all(), sum, weight, true);
    }

    fn teacher_mid(&self, batch: &Batch, seen: Seen) -> Slice<bf16> {
        seen.mid_nd.unwrap_or_else(|| {
            let acts = self.teacher_acts.as_ref().expect("made where it is compared with");
            let block = &self.teacher.forward.whole.blocks[seen.layer];
            block.forward_mixer(&self.gpu, self.teacher.scene(batch), seen.u_nd, acts);
            acts.mid_nd.all()
        })
    }

    fn every(&self, batch: &Batch, mut one: impl FnMut(Seen, usize)) {
        let place = |layer| self.layers.iter().position(|(number, _)| *number == layer);
        let mut one = |seen: Seen| {
            if let Some(at) = place(seen.layer) {
                one(seen, at);
            }
        };
        match &self.cached {
            None => self.teacher.visit(&self.gpu, batch, (self.depth, true), one),
            Some(cached) => self
                .pending
                .iter()
                .for_each(|signals| one(cached.send(&self.gpu, signals.layer, signals))),
        }
    }

    /// Figures of each layer on `sequences`, a multiple of a micro-batch.
    pub fn held_out(&mut self, batch: &mut Batch, sequences: &[usize]) -> Result<Vec<HeldOut>> {
        let size = batch.dims().batch;
        if !sequences.len().is_multiple_of(size) {
            bail!("{} held-out sequences are no multiple of {size}", sequences.len());
        }
        let count = self.layers.len();
        let sums: Buf<f32> = self.gpu.zeros("held-out figures", count)?;
        let mut found = vec![HeldOut::default(); count];
        let mut failed = Ok(());
        for part in sequences.chunks(size) {
            self.send(batch, part)?;
            self.every(batch, |seen, at| {
                self.layer(batch, seen, at, sums.all().range(at..at + 1), false);
                let pair = (|| {
                    let distances = self.gpu.download(self.distance_n.all())?;
                    Ok((distances, self.gpu.download(self.norm_n.all())?))
                })();
                match pair {
                    Ok((distances, norms)) => found[at]
                        .relative
                        .extend(distances.iter().zip(&norms).map(|(e, t)| e / t.max(1e-12))),
                    Err(error) => failed = Err::<(), anyhow::Error>(error),
                }
            });
        }
        failed?;
        let sums = self.gpu.download(sums.all())?;
        for (found, sum) in found.iter_mut().zip(sums) {
            found.sum = f64::from(sum) / f64::from(self.weight);
        }
        Ok(found)
    }
}

impl Work for Align {
    fn send(&mut self, batch: &mut Batch, sequences: &[usize]) -> Result<()> {
        if self.cached.is_some() {
            self.pending = self.source.signals(sequences, Want::Hidden, self.numbers())?;
            let first = self.pending.first().expect("a phase has a layer");
            batch.send_starts(&first.starts_n);
            return Ok(());
        }
        let separator = self.source.model.config.separator;
        batch.send(separator, false, |i, out| self.source.tokens(sequences[i], out))
    }

    fn queue(&self, batch: &Batch, learners: &Learners) {
        self.every(batch, |seen, at| self.layer(batch, seen, at, learners.loss(at), true));
    }

    fn values(&self, _: &Learners, row: &[Record]) -> Vec<(String, f64)> {
        let one =
            |(number, record): (usize, &Record)| (format!("loss.{number}"), f64::from(record.loss));
        let mut values: Vec<(String, f64)> = self.numbers().zip(row).map(one).collect();
        let total: f64 = values.iter().map(|(_, loss)| loss).sum();
        values.push(("loss".into(), total / row.len() as f64));
        values
    }

    fn recordable(&self) -> bool {
        self.cached.is_none()
    }
}
