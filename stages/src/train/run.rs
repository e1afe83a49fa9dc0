//! The parts of a training loop that every phase shares: batch order, shards, NaN guard, metrics.
//!
//! Knows no model and no loss.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use engine::stage::{Context, Diverged};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::train::checkpoint::{self, Saved};
use crate::train::learner::{self, Learner};
use crate::train::philox::Philox;
use crate::train::schedule::Wsd;

/// How many parts every batch is cut into. Fixed, so that bits do not depend on threads.
pub const SHARDS: usize = 2;

/// Which sequences each update sees: a fresh permutation of all of them every epoch.
#[derive(Clone, Debug)]
pub struct Batches {
    seed: u64,
    sequences: usize,
    batch: usize,
    epoch: Option<(u64, Vec<u32>)>,
}

impl Batches {
    /// `batch` of `sequences` sequences an update, in an order that depends on `seed` alone.
    pub fn new(seed: u64, sequences: usize, batch: usize) -> Batches {
        assert!(sequences > 0 && batch > 0, "nothing to take batches of");
        Batches { seed, sequences, batch, epoch: None }
    }

    /// The sequences of update `update`, counted from 0.
    pub fn at(&mut self, update: u64) -> Vec<usize> {
        let first = update * self.batch as u64;
        (first..first + self.batch as u64).map(|position| self.pick(position)).collect()
    }

    fn pick(&mut self, position: u64) -> usize {
        let (epoch, within) =
            (position / self.sequences as u64, (position % self.sequences as u64) as usize);
        match &self.epoch {
            Some((at, order)) if *at == epoch => order[within] as usize,
            _ => {
                let stream = Philox::new(self.seed, &format!("order.{epoch}"));
                let order = stream.permutation(self.sequences);
                let found = order[within] as usize;
                self.epoch = Some((epoch, order));
                found
            }
        }
    }
}

/// Runs `work` on every shard, on as many threads as `threads` and the shards allow.
pub fn each_shard<S: Send>(threads: usize, shards: &mut [S], work: impl Fn(usize, &mut S) + Sync) {
    if threads < 2 || shards.len() < 2 {
        return shards.iter_mut().enumerate().for_each(|(i, shard)| work(i, shard));
    }
    let share = shards.len().div_ceil(threads);
    // The pool's threads live on, and with them the buffers that products keep per thread.
    rayon::in_place_scope(|scope| {
        let work = &work;
        let mut parts = shards.chunks_mut(share).enumerate();
        let own = parts.next();
        for (part, shards) in parts {
            scope.spawn(move |_| {
                for (i, shard) in shards.iter_mut().enumerate() {
                    work(part * share + i, shard);
                }
            });
        }
        if let Some((_, shards)) = own {
            shards.iter_mut().enumerate().for_each(|(i, shard)| work(i, shard));
        }
    });
}

/// Adds `part` to `sum`, element by element.
pub fn add(sum: &mut [f32], part: &[f32]) {
    assert_eq!(sum.len(), part.len(), "lengths differ");
    pulp::Arch::new().dispatch(|| {
        for (s, p) in sum.iter_mut().zip(part) {
            *s += p;
        }
    });
}

/// Counts updates that were skipped since their loss or gradient was no number.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Guard {
    /// Skipped in all.
    pub skipped: u64,
    /// Skipped one after another, up to now.
    pub in_row: u64,
}

/// So many skipped updates one after another mean that the weights are lost.
pub const SKIPS_IN_ROW: u64 = 8;
/// So many skipped updates in all mean that the rate is too high.
pub const SKIPS: u64 = 100;

impl Guard {
    /// Notes whether update `update` of `what` was `finite`; fails with [`Diverged`] at the bound.
    pub fn note(&mut self, ctx: &Context, what: &str, update: u64, finite: bool) -> Result<()> {
        if finite {
            self.in_row = 0;
            return Ok(());
        }
        self.skipped += 1;
        self.in_row += 1;
        if self.in_row < SKIPS_IN_ROW && self.skipped < SKIPS {
            return Ok(());
        }
        let last = match ctx.checkpoint_latest() {
            Some(at) => format!("the last good checkpoint is at update {}", at.position),
            None => "there is no checkpoint yet".into(),
        };
        let Guard { skipped, in_row } = self;
        Err(Diverged(format!(
            "training of {what} diverged at update {update}: the loss or gradient was not finite \
             in {in_row} updates in a row, {skipped} in all; {last}; most likely `lr` is too high \
             or `warmup` too short, else an input holds values that are not finite"
        ))
        .into())
    }
}

/// What a training step publishes as its `metrics`: deterministic, no times.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Curve {
    points: Vec<(u64, BTreeMap<String, f64>)>,
    /// Sums since the last point (as bits: JSON might round them) and how many.
    pending: BTreeMap<String, (u64, u64)>,
}

impl Curve {
    /// Takes in the values of one update.
    pub fn add(&mut self, values: &[(String, f64)]) {
        for (name, value) in values.iter().filter(|(_, value)| value.is_finite()) {
            let (sum, count) = self.pending.entry(name.clone()).or_default();
            *sum = (f64::from_bits(*sum) + value).to_bits();
            *count += 1;
        }
    }

    /// Records the means since the last point at `update`, here and as an event.
    pub fn point(&mut self, ctx: &mut Context, update: u64) {
        let mean = |(name, (sum, count)): (String, (u64, u64))| {
            (name, rounded(f64::from_bits(sum) / count as f64))
        };
        let values: BTreeMap<String, f64> =
            std::mem::take(&mut self.pending).into_iter().map(mean).collect();
        let event: Vec<(&str, f64)> = values.iter().map(|(n, v)| (n.as_str(), *v)).collect();
        ctx.metric(update, &event);
        self.points.push((update, values));
    }

    /// Records `values` at `update` as they are, here and as an event.
    pub fn record(&mut self, ctx: &mut Context, update: u64, values: &[(&str, f64)]) {
        ctx.metric(update, values);
        let values = values.iter().filter(|(_, value)| value.is_finite());
        let values = values.map(|(name, value)| (name.to_string(), rounded(*value)));
        self.points.push((update, values.collect()));
    }

    /// The points so far.
    pub fn points(&self) -> &[(u64, BTreeMap<String, f64>)] {
        &self.points
    }

    /// The artifact: the curve and `last` (held-out figures after the last update).
    pub fn to_json(&self, last: Value) -> Value {
        json!({ "kind": "training", "curve": self.points, "final": last })
    }
}

/// How a phase goes through its updates.
#[derive(Clone, Debug)]
pub struct Course {
    /// Learning rate of each update; also says how many there are.
    pub rate: Wsd,
    /// Sequences to take batches of.
    pub sequences: usize,
    /// Sequences an update.
    pub batch: usize,
    /// Tokens of a sequence, for progress.
    pub seq: usize,
    /// Decides the order of sequences.
    pub seed: u64,
    /// Updates between checkpoints; 0 for none.
    pub checkpoint_every: u64,
    /// Updates between points of the curve.
    pub metrics_every: u64,
}

/// Which sequences are trained on and which are kept apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Split {
    /// Sequences to train on, the first ones.
    pub train: usize,
    /// Sequences kept apart, the last ones; a multiple of `batch`.
    pub held: usize,
    /// Sequences an update; a multiple of [`SHARDS`].
    pub batch: usize,
    /// Tokens of each.
    pub seq: usize,
}

impl Split {
    /// Of `sequences`, keeps at least `held_out` apart; `tokens` is the size of an update.
    pub fn of(sequences: usize, seq: usize, tokens: usize, held_out: usize) -> Result<Split> {
        let unit = SHARDS * seq;
        ensure!(
            tokens > 0 && tokens.is_multiple_of(unit),
            "`batch` is {tokens} tokens, but must be a multiple of {SHARDS} sequences of {seq}, \
             so of {unit}"
        );
        let batch = tokens / seq;
        let held = held_out.div_ceil(batch) * batch;
        ensure!(
            sequences >= held + batch,
            "there are {sequences} sequences, but a batch needs {batch} and `held_out` {held}; \
             give more text, or lower `batch` or `held_out`"
        );
        Ok(Split { train: sequences - held, held, batch, seq })
    }

    /// A way through the sequences to train on, at `rate`; `every` says how many updates lie between
    /// checkpoints and between points of the curve.
    pub fn course(&self, rate: Wsd, seed: u64, every: (u64, u64)) -> Course {
        let Split { train: sequences, batch, seq, .. } = *self;
        let (checkpoint_every, metrics_every) = every;
        Course { rate, sequences, batch, seq, seed, checkpoint_every, metrics_every }
    }

    /// The held-out sequences in batches.
    pub fn held_out(&self) -> Vec<Vec<usize>> {
        let all: Vec<usize> = (self.train..self.train + self.held).collect();
        all.chunks(self.batch).map(<[usize]>::to_vec).collect()
    }
}

/// What is wrong with the numbers of a schedule, for [`engine::stage::Stage::check`].
pub fn check(lr: f64, warmup: f64, decay: f64, updates: u64) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut need = |name: &str, good: bool, what: &str| {
        if !good {
            found.push((name.to_string(), what.to_string()));
        }
    };
    need("lr", lr.is_finite() && lr > 0.0, "must be a positive number");
    need("warmup", (0.0..=1.0).contains(&warmup), "is a fraction of the updates, from 0 to 1");
    need("decay", (0.0..=1.0).contains(&decay), "is a fraction of the updates, from 0 to 1");
    need("decay", warmup + decay <= 1.0, "and `warmup` must not exceed 1 together");
    need("updates", updates > 0, "must be at least 1");
    found
}

/// Named buffers of a checkpoint.
pub enum Buffers<'a> {
    /// In the host's memory, so that training waits until they are written.
    Here(Vec<(String, &'a [f32])>),
    /// Copies of a device's memory, which are written while training goes on.
    Copied(Vec<(String, Vec<f32>)>),
}

/// What a phase brings to [`drive`].
pub trait Trainer {
    /// One update with these sequences at this rate; gives values for the curve.
    fn update(
        &mut self,
        ctx: &Context,
        update: u64,
        rate: f32,
        sequences: &[usize],
    ) -> Result<Vec<(String, f64)>>;

    /// Where updates run ahead of the host: waits for those that were made and gives the values of
    /// each, in order. `done` updates were made in all.
    fn settle(&mut self, _ctx: &Context, _done: u64) -> Result<Vec<Vec<(String, f64)>>> {
        Ok(Vec::new())
    }

    /// Whether so many updates run ahead that they must be settled.
    fn must_settle(&self) -> bool {
        false
    }

    /// Everything that is trained, where it is in the host's memory.
    fn learners(&mut self) -> Vec<&mut Learner>;

    /// Whether no update was skipped lately, so that what there is may be kept.
    fn healthy(&mut self) -> bool {
        self.learners().iter().all(|learner| learner.guard.in_row == 0)
    }

    /// Counters that a checkpoint keeps of each learner.
    fn facts(&mut self) -> Result<Vec<learner::Facts>> {
        Ok(self.learners().iter().map(|learner| learner.facts()).collect())
    }

    /// Named buffers that a checkpoint keeps.
    fn buffers(&mut self) -> Result<Buffers<'_>> {
        let learners = self.learners().into_iter();
        Ok(Buffers::Here(learners.flat_map(|learner| (*learner).buffers()).collect()))
    }

    /// Takes a checkpoint's place.
    fn restore(&mut self, saved: &Saved, facts: Vec<learner::Facts>) -> Result<()> {
        let mut learners = self.learners();
        ensure!(facts.len() == learners.len(), "the checkpoint is of other learners");
        for (learner, facts) in learners.iter_mut().zip(facts) {
            learner.restore(saved, facts)?;
        }
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
struct Facts {
    update: u64,
    curve: Curve,
    learners: Vec<learner::Facts>,
}

/// Runs every update of `course`, from the newest checkpoint if there is one; gives the curve.
/// Interrupted and resumed equals uninterrupted, bit for bit.
pub fn drive(ctx: &mut Context, course: &Course, trainer: &mut dyn Trainer) -> Result<Curve> {
    let updates = course.rate.updates;
    let tokens = (course.batch * course.seq) as u64;
    let mut batches = Batches::new(course.seed, course.sequences, course.batch);
    let (mut curve, mut done) = restore(ctx, updates, trainer)?;
    ctx.progress(done * tokens, updates * tokens, "tokens");
    while done < updates {
        let values = trainer.update(ctx, done, course.rate.at(done), &batches.at(done))?;
        curve.add(&values);
        done += 1;
        let point =
            done.is_multiple_of(course.metrics_every.max(1)) || done == updates || done == 1;
        let due = course.checkpoint_every > 0 && done.is_multiple_of(course.checkpoint_every);
        let cancelled = ctx.cancelled();
        if point || due || cancelled || trainer.must_settle() {
            for values in trainer.settle(ctx, done)? {
                curve.add(&values);
            }
        }
        ctx.progress(done * tokens, updates * tokens, "tokens");
        if point {
            curve.point(ctx, done);
        }
        if (due || cancelled) && trainer.healthy() {
            seal(ctx, done, &curve, trainer)?;
        }
        if cancelled {
            ctx.check_cancelled()?;
        }
    }
    Ok(curve)
}

fn seal(ctx: &mut Context, update: u64, curve: &Curve, trainer: &mut dyn Trainer) -> Result<()> {
    let facts = Facts { update, curve: curve.clone(), learners: trainer.facts()? };
    match trainer.buffers()? {
        Buffers::Here(buffers) => {
            ctx.checkpoint_save(update, |dir| checkpoint::write(dir, &buffers, &facts))
        }
        Buffers::Copied(buffers) => ctx.checkpoint_save_in_background(update, move |dir| {
            let buffers: Vec<(String, &[f32])> =
                buffers.iter().map(|(name, values)| (name.clone(), &**values)).collect();
            checkpoint::write(dir, &buffers, &facts)
        }),
    }
}

fn restore(ctx: &mut Context, updates: u64, trainer: &mut dyn Trainer) -> Result<(Curve, u64)> {
    let Some(latest) = ctx.checkpoint_latest() else { return Ok((Curve::default(), 0)) };
    let saved = Saved::open(&latest.dir)?;
    let facts: Facts = saved.facts()?;
    let position = latest.position;
    ensure!(facts.update <= updates, "the checkpoint at update {position} is not one of this step");
    trainer
        .restore(&saved, facts.learners)
        .with_context(|| format!("the checkpoint at update {position} cannot be used"))?;
    ctx.note(format!("resuming after update {} of {updates}", facts.update));
    Ok((facts.curve, facts.update))
}

/// Seven significant digits: enough to read, few enough to survive JSON unchanged.
pub fn rounded(value: f64) -> f64 {
    format!("{value:.6e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_holds_each_sequence_once_in_an_order_of_its_own() {
        let mut batches = Batches::new(17, 10, 4);
        let seen: Vec<usize> = (0..5).flat_map(|u| batches.at(u)).collect();
        let (mut first, mut second) = (seen[..10].to_vec(), seen[10..].to_vec());
        assert_ne!(first, second);
        first.sort_unstable();
        second.sort_unstable();
        assert_eq!(first, (0..10).collect::<Vec<_>>());
        assert_eq!(second, first);
        assert_eq!(Batches::new(17, 10, 4).at(3), seen[12..16], "a position needs no history");
    }

    #[test]
    fn shards_are_worked_on_once_each_with_any_number_of_threads() {
        for threads in 1..5 {
            let mut shards = vec![0; 3];
            each_shard(threads, &mut shards, |i, shard| *shard += i + 1);
            assert_eq!(shards, [1, 2, 3]);
        }
    }

    #[test]
    fn rounded_values_survive_json() {
        for value in [1.0 / 3.0, 2.0f64.sqrt() * 1e-7, 123_456.789, 0.0] {
            let text = serde_json::to_string(&rounded(value)).unwrap();
            assert_eq!(serde_json::from_str::<f64>(&text).unwrap(), rounded(value));
        }
    }
}
