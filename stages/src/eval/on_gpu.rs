//! The same evaluation with models on a GPU: what [`super::runner`] and [`super::likelihood`] ask, put
//! to [`crate::gpu::phases::evaluate`]. Weights go there once.

use anyhow::Result;
use engine::stage::Context;

use super::likelihood::{Batch, Item, Likelihood, answer};
use super::runner::{Loaded, Runner, SequenceScore, Who, Work};
use super::score::{Agreement, Loss};
use crate::gpu::launch::Gpu;
use crate::gpu::model::whole::check;
use crate::gpu::phases::evaluate::{Asker, Placed, Said, Text};
use crate::gpu::weights::Frozen;
use crate::ops::Dims;

/// Inputs are filled up to a multiple of this: every length has products of its own to be planned.
const WIDTH: usize = 32;

/// Both models' weights on a device.
pub(super) struct Weights {
    gpu: Gpu,
    student: Frozen,
    teacher: Option<Frozen>,
}

impl Weights {
    pub(super) fn new(gpu: &Gpu, student: &Loaded, teacher: Option<&Loaded>) -> Result<Weights> {
        let place = |loaded: &Loaded| {
            check(&loaded.model.config)?;
            Frozen::new(gpu, &loaded.model, &loaded.params.flat)
        };
        let teacher = teacher.map(place).transpose()?;
        Ok(Weights { gpu: gpu.clone(), student: place(student)?, teacher })
    }

    /// See [`Runner::scores`].
    pub(super) fn scores(
        &self,
        models: &Runner,
        work: Work,
        ctx: &mut Context,
        unit: &str,
    ) -> Result<Vec<SequenceScore>> {
        let mut placed: Vec<Placed> = vec![(&models.student.model, &self.student.bank)];
        if let (Some(loaded), Some(weights)) = (models.teacher, &self.teacher) {
            placed.push((&loaded.model, &weights.bank));
        }
        let seq = work.shard.seq();
        let most = Dims { batch: work.batch.min(work.sequences), seq };
        let mut text = Text::new(&self.gpu, &placed, most, work.hidden && placed.len() == 2)?;
        let mut scores = Vec::with_capacity(work.sequences);
        for batch in 0..work.batches() {
            ctx.check_cancelled()?;
            let (dims, tokens_n) = work.tokens(batch);
            let said = text.run(dims, &tokens_n)?;
            scores.extend((0..dims.batch).map(|i| sequence(&said, i * seq, seq)));
            work.progress(ctx, batch + 1, unit);
        }
        Ok(scores)
    }

    /// See [`Runner::likelihoods`].
    pub(super) fn likelihoods(
        &self,
        (loaded, who): (&Loaded, Who),
        items: &[Item],
        budget: usize,
        ctx: &mut Context,
        unit: &str,
    ) -> Result<Vec<Likelihood>> {
        let weights = match who {
            Who::Student => &self.student,
            Who::Teacher => self.teacher.as_ref().expect("there is a teacher"),
        };
        let placed = (&loaded.model, &weights.bank);
        answer(loaded.model.config.vocab, items, budget, ctx, unit, |ctx, batches, done| {
            let tokens = batches.iter().map(|batch| dims(batch).tokens()).max().unwrap_or(0);
            let seq = batches.iter().map(|batch| dims(batch).seq).max().unwrap_or(0);
            if tokens == 0 {
                return Ok(Vec::new());
            }
            let mut asker = Asker::new(&self.gpu, placed, tokens, seq)?;
            let mut found = Vec::with_capacity(batches.len());
            for (number, batch) in batches.iter().enumerate() {
                ctx.check_cancelled()?;
                found.push(ask(&mut asker, batch, items)?);
                done(ctx, number);
            }
            Ok(found)
        })
    }
}

fn dims(batch: &Batch) -> Dims {
    let (count, width) = batch.size();
    Dims { batch: count, seq: width.next_multiple_of(WIDTH) }
}

/// All items of a batch with their likelihoods.
fn ask(asker: &mut Asker, batch: &Batch, items: &[Item]) -> Result<Vec<(usize, Likelihood)>> {
    let dims = dims(batch);
    let served = || batch.served(dims.seq);
    let asked: Vec<(u32, u32)> = served()
        .flat_map(|(item, first)| {
            items[item].asked().map(move |(row, token)| ((first + row) as u32, token))
        })
        .collect();
    let mut said = asker.run(dims, &batch.tokens(dims.seq), &asked)?.into_iter();
    let mut one = |item: usize| {
        let (mut nats, mut greedy) = (0.0, true);
        for (ln_p, first) in said.by_ref().take(items[item].asked().count()) {
            nats += f64::from(ln_p);
            greedy &= first;
        }
        (item, Likelihood { nats: nats as f32, greedy })
    };
    Ok(served().map(|(item, _)| one(item)).collect())
}

/// What was said of the sequence whose first row is `first`.
fn sequence(said: &Said, first: usize, seq: usize) -> SequenceScore {
    let (all, scored) = (first..first + seq, first..first + seq - 1);
    let tokens = scored.len() as u64;
    let loss = |ln_p: &Vec<f32>| {
        let nats = ln_p[scored.clone()].iter().map(|ln_p| -f64::from(*ln_p)).sum();
        Loss { nats, tokens }
    };
    let right = |side: usize| said.first.get(side).map_or(Vec::new(), |r| r[all.clone()].to_vec());
    let agreement = match said.kl_n.is_empty() {
        true => Agreement::default(),
        false => Agreement {
            kl: said.kl_n[scored.clone()].iter().sum(),
            same: said.same_n[scored.clone()].iter().filter(|same| **same).count() as u64,
            tokens,
        },
    };
    SequenceScore {
        student: loss(&said.ln_p[0]),
        teacher: said.ln_p.get(1).map_or_else(Loss::default, loss),
        agreement,
        right: [right(0), right(1)],
        distances: said.distances.iter().map(|of| of[all.clone()].to_vec()).collect(),
    }
}
