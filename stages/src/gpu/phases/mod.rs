//! The phases of MOHAWK and pretraining on the device: what a micro-batch queues, and the loop
//! around it.
//!
//! An update is: rate and tokens go to the device, the recorded work of a micro-batch is queued as
//! often as the batch needs, then clip and optimiser step. Nothing waits; [`Driver::settle`] reads
//! losses and norms of many updates at once.

pub mod align;
pub mod apart;
pub mod distill;
pub mod evaluate;
pub mod orient;
pub mod pretrain;
pub mod teacher;

use anyhow::{Result, ensure};
use engine::stage::Context;

use super::batch::Batch;
use super::launch::{Gpu, Graph};
use super::learners::Learners;
use super::ops::adamw::Record;
use crate::models::Config;
use crate::ops::Dims;
use crate::train::checkpoint::Saved;
use crate::train::learner::{self, Learner};
use crate::train::run::{Buffers, Trainer};

/// What differs between phases.
pub trait Work {
    /// Sends what the sequences hold; the device may still work on those before.
    fn send(&mut self, batch: &mut Batch, sequences: &[usize]) -> Result<()>;

    /// Queues forward and backward of one micro-batch: gradients and losses are added up. The same
    /// work every time.
    fn queue(&self, batch: &Batch, learners: &Learners);

    /// Values of an update for the curve that are known before it is made.
    fn known(&self, _rate: f32) -> Vec<(String, f64)> {
        Vec::new()
    }

    /// The values of an update for the curve, from what it left of each learner.
    fn values(&self, learners: &Learners, row: &[Record]) -> Vec<(String, f64)>;

    /// Whether [`Work::queue`] may be recorded (it may not where it reads the host's files).
    fn recordable(&self) -> bool {
        true
    }
}

/// A phase in training.
pub struct Driver<W> {
    /// The device.
    pub gpu: Gpu,
    /// What differs.
    pub work: W,
    /// What is trained.
    pub learners: Learners,
    /// The tokens at hand.
    pub batch: Batch,
    graphs: Option<(Graph, Graph)>,
}

/// Tokens that a device works on at a time when nobody says: enough to fill it, few enough that
/// activations fit. Depends on the model alone, so that bits do not depend on the device's memory.
fn usual_tokens(config: &Config) -> usize {
    match config.d_model {
        0..1024 => 1 << 15,
        1024..2560 => 1 << 14,
        _ => 1 << 13,
    }
}

/// Sequences of a pass that only goes forward.
pub fn sequences(config: &Config, seq: usize) -> usize {
    (usual_tokens(config) / seq).max(1)
}

/// Sequences of a micro-batch: the most that divide `batch` sequences and hold at most `tokens`
/// (0: a number by the model).
pub fn micro_batch(config: &Config, tokens: usize, batch: usize, seq: usize) -> Result<usize> {
    if tokens > 0 {
        let sequences = tokens / seq;
        ensure!(
            tokens.is_multiple_of(seq) && sequences > 0 && batch.is_multiple_of(sequences),
            "`micro_batch` is {tokens} tokens, but must be a multiple of a sequence ({seq}) that \
             divides the batch ({})",
            batch * seq
        );
        return Ok(sequences);
    }
    let most = (usual_tokens(config) / seq).clamp(1, batch);
    Ok((1..=most).rev().find(|count| batch.is_multiple_of(*count)).unwrap_or(1))
}

impl<W: Work> Driver<W> {
    /// With room for micro-batches of `dims`.
    pub fn new(gpu: &Gpu, work: W, learners: Learners, dims: Dims) -> Result<Driver<W>> {
        let batch = Batch::new(gpu, dims)?;
        Ok(Driver { gpu: gpu.clone(), work, learners, batch, graphs: None })
    }

    /// Queues one update with these sequences; does not wait.
    pub fn queue_update(&mut self, rate: f32, sequences: &[usize]) -> Result<()> {
        let Driver { gpu, work, learners, batch, graphs } = self;
        learners.begin(rate)?;
        let record = work.recordable();
        for part in sequences.chunks(batch.dims().batch) {
            work.send(batch, part)?;
            if !record {
                work.queue(batch, learners);
                continue;
            }
            if graphs.is_none() {
                let micro = gpu.capture("micro-batch", || work.queue(batch, learners))?;
                let end = gpu.capture("optimiser step", || learners.finish())?;
                *graphs = Some((micro, end));
            }
            let (micro, _) = graphs.as_ref().expect("just recorded");
            micro.launch(|| work.queue(batch, learners));
        }
        match graphs {
            Some((_, end)) => end.launch(|| learners.finish()),
            None => learners.finish(),
        }
        learners.made();
        gpu.status()
    }
}

impl<W: Work> Trainer for Driver<W> {
    fn update(
        &mut self,
        _: &Context,
        _: u64,
        rate: f32,
        sequences: &[usize],
    ) -> Result<Vec<(String, f64)>> {
        self.queue_update(rate, sequences)?;
        Ok(self.work.known(rate))
    }

    fn settle(&mut self, ctx: &Context, done: u64) -> Result<Vec<Vec<(String, f64)>>> {
        let rows = self.learners.settle(ctx, done)?;
        Ok(rows.iter().map(|row| self.work.values(&self.learners, row)).collect())
    }

    fn must_settle(&self) -> bool {
        self.learners.full()
    }

    fn learners(&mut self) -> Vec<&mut Learner> {
        Vec::new()
    }

    fn healthy(&mut self) -> bool {
        self.learners.healthy()
    }

    fn facts(&mut self) -> Result<Vec<learner::Facts>> {
        self.learners.facts()
    }

    fn buffers(&mut self) -> Result<Buffers<'_>> {
        Ok(Buffers::Copied(self.learners.buffers()?))
    }

    fn restore(&mut self, saved: &Saved, facts: Vec<learner::Facts>) -> Result<()> {
        ensure!(
            facts.len() == self.learners.members().len(),
            "the checkpoint is of other learners"
        );
        self.learners.restore(saved, facts)
    }
}
