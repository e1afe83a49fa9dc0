//! Pretraining on the device; see [`crate::pretrain`]. Every token but the last of a sequence is
//! scored by its successor; logits exist for a part of the tokens at a time.

use anyhow::{Result, ensure};
use half::bf16;

use super::distill::Tokens;
use super::{Driver, Work};
use crate::gpu::batch::Batch;
use crate::gpu::launch::{Buf, Gpu, Slice};
use crate::gpu::learners::{Learners, Member};
use crate::gpu::model::Scene;
use crate::gpu::model::whole::{Angles, Pass, Whole, check, rows};
use crate::gpu::ops::adamw::Record;
use crate::gpu::ops::cross_entropy::{self, Rows};
use crate::gpu::ops::reduce;
use crate::gpu::weights::Places;
use crate::models::{Model, Trained};
use crate::ops::Dims;
use crate::train::adamw::{Group, Rule};

/// A model and what its loss needs.
pub struct Pretrain {
    gpu: Gpu,
    model: Pass,
    angles: Angles,
    tokens: Tokens,
    separator: Option<u32>,
    logits_nv: Buf<bf16>,
    /// Loss of each token.
    out_n: Buf<f32>,
    partials: Buf<f32>,
    rows: usize,
    weight: f32,
}

/// How a model starts and is trained.
pub struct Start {
    /// For messages and checkpoints.
    pub name: String,
    /// All parameters.
    pub params: Vec<f32>,
    /// Those that are trained.
    pub groups: Vec<Group>,
    /// The optimiser's constants.
    pub rule: Rule,
    /// Largest norm of the gradient.
    pub clip: f64,
}

/// Makes a trainer of `model` for updates of `batch` sequences of `dims.seq`, `dims.batch` of them
/// at a time.
pub fn driver(
    gpu: &Gpu,
    model: &Model,
    start: Start,
    tokens: Tokens,
    (batch, dims): (usize, Dims),
) -> Result<Driver<Pretrain>> {
    check(&model.config)?;
    ensure!(dims.seq > 1, "sequences of one token: nothing follows it");
    let Start { name, params, groups, rule, clip } = start;
    let member = Member { name, host: params, places: Places::of_model(model, 0), groups };
    let learners = Learners::with_rule(gpu, vec![member], clip, rule)?;
    let whole = Whole::new(model, &learners.bank(0, None), Trained::ALL);
    let (n, v) = (dims.tokens(), model.config.vocab);
    let rows = rows(v, n);
    let work = Pretrain {
        gpu: gpu.clone(),
        model: Pass::new(gpu, whole, dims)?,
        angles: Angles::new(gpu, model, dims.seq)?,
        tokens,
        separator: model.config.separator,
        logits_nv: gpu.alloc("logits", rows * v)?,
        out_n: gpu.alloc("losses of tokens", n)?,
        partials: gpu.alloc("partial sums", reduce::SUM_PARTIALS)?,
        rows,
        weight: 1.0 / (batch * (dims.seq - 1)) as f32,
    };
    let mut driver = Driver::new(gpu, work, learners, dims)?;
    driver.batch.want_targets()?;
    Ok(driver)
}

impl Pretrain {
    /// Forward, loss (weighted, added to `sum`) and, if `learn`, gradients.
    fn pass(&self, batch: &Batch, sum: Slice<f32>, learn: bool) {
        let Pretrain { gpu, model, .. } = self;
        let rope = self.angles.all();
        let scene = Scene { dims: batch.dims(), starts_n: batch.starts_n(), rope };
        model.forward(gpu, scene, batch);
        let (n, v) = (scene.dims.tokens(), model.whole.config.vocab);
        for first in (0..n).step_by(self.rows) {
            let chunk = first..n.min(first + self.rows);
            let logits_nv = self.logits_nv.all().range(0..chunk.len() * v);
            model.whole.logits(gpu, model.final_nd.all(), chunk.clone(), logits_nv);
            let at = Rows { rows: chunk.len(), v, weight: self.weight, factor: None, learn };
            let logits = (logits_nv, model.whole.head.full_b);
            let targets_n = batch.targets_n().range(chunk.clone());
            let out_n = self.out_n.all().range(chunk.clone());
            cross_entropy::hard(gpu, at, logits, targets_n, out_n);
            if learn {
                model.head_backward(gpu, chunk, logits_nv);
            }
        }
        let (out_n, partials) = (self.out_n.all().range(0..n), self.partials.all());
        reduce::sum(gpu, out_n, partials, sum, self.weight, true);
        if learn {
            model.backward(gpu, scene, batch);
        }
    }

    /// Sum of the losses over `count` sequences, of which `tokens` writes one, and how many tokens
    /// were scored.
    pub fn held_out(
        &self,
        batch: &mut Batch,
        count: usize,
        tokens: impl Fn(usize, &mut [u32]),
    ) -> Result<(f64, usize)> {
        let sum: Buf<f32> = self.gpu.zeros("held-out figures", 1)?;
        let Dims { batch: size, seq } = batch.dims();
        let mut total = 0.0;
        for first in (0..count).step_by(size) {
            let here = size.min(count - first);
            batch.send_some(self.separator, false, here, |i, out| tokens(first + i, out))?;
            self.gpu.fill(sum.all(), 0);
            self.pass(batch, sum.all(), false);
            total += f64::from(self.gpu.download(sum.all())?[0]) / f64::from(self.weight);
        }
        Ok((total, count * (seq - 1)))
    }
}

impl Work for Pretrain {
    fn send(&mut self, batch: &mut Batch, sequences: &[usize]) -> Result<()> {
        batch.send(self.separator, true, |i, out| (self.tokens)(sequences[i], out))
    }

    fn queue(&self, batch: &Batch, learners: &Learners) {
        self.pass(batch, learners.loss(0), true);
    }

    fn known(&self, rate: f32) -> Vec<(String, f64)> {
        vec![("lr".into(), f64::from(rate))]
    }

    fn values(&self, _: &Learners, row: &[Record]) -> Vec<(String, f64)> {
        let [record] = row else { unreachable!("there is one model") };
        let norm = ("grad_norm".into(), f64::from(record.norm));
        match record.factor > 0.0 {
            true => vec![("loss".into(), f64::from(record.loss)), norm],
            false => vec![norm],
        }
    }
}
