//! Runs one or two models over a shard, on several threads or on a GPU; what comes back depends on
//! no thread.

use anyhow::Result;
use engine::stage::{Context, Stage as _};

use super::likelihood::{Item, Likelihood, likelihoods};
use super::score::{Agreement, Loss, distances, likeliest};
use super::spread::spread;
use crate::data::shard::TokenShard;
use crate::models::{Keep, Model, Params, Pass};
use crate::ops::Dims;
use crate::train::device::Device;

/// Rows whose logits are held at a time.
pub(super) const ROWS: usize = 128;

/// A model and its weights.
pub struct Loaded {
    /// Its structure.
    pub model: Model,
    /// Its weights.
    pub params: Params,
}

/// What both models did on one sequence.
#[derive(Clone, Debug, Default)]
pub struct SequenceScore {
    /// The student's loss.
    pub student: Loss,
    /// The teacher's, if there is one.
    pub teacher: Loss,
    /// How far they agree.
    pub agreement: Agreement,
    /// Whether each finds the token that follows likeliest, after every position (never after the last
    /// one).
    pub right: [Vec<bool>; 2],
    /// After each block, at every position: how far the hidden states are apart.
    pub distances: Vec<Vec<f32>>,
}

/// Which of the models.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The model evaluated.
    Student,
    /// The one it is compared with.
    Teacher,
}

/// The models, and what runs them.
pub struct Runner<'a> {
    /// The model evaluated.
    pub student: &'a Loaded,
    /// The one it is compared with.
    pub teacher: Option<&'a Loaded>,
    place: Place,
}

enum Place {
    Cpu,
    /// Weights are on the device all the time.
    #[cfg(any(feature = "cuda", feature = "emulate"))]
    Gpu(Box<super::on_gpu::Weights>),
}

/// What is to be measured.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// The text.
    pub shard: &'a TokenShard,
    /// Number of sequences to look at, from the first.
    pub sequences: usize,
    /// Sequences of one forward pass. Bits depend on it, so it is a parameter.
    pub batch: usize,
    /// Whether hidden states are compared; both models must have the same sizes.
    pub hidden: bool,
}

impl<'a> Runner<'a> {
    /// Where `device` says.
    pub fn on(
        device: Device,
        student: &'a Loaded,
        teacher: Option<&'a Loaded>,
    ) -> Result<Runner<'a>> {
        #[cfg(any(feature = "cuda", feature = "emulate"))]
        if device == Device::Cuda {
            return Runner::gpu(&crate::gpu::open()?, student, teacher);
        }
        device.require_cpu(crate::evaluate::Evaluate::NAME)?;
        Ok(Runner::cpu(student, teacher))
    }

    /// On the step's threads.
    pub fn cpu(student: &'a Loaded, teacher: Option<&'a Loaded>) -> Runner<'a> {
        Runner { student, teacher, place: Place::Cpu }
    }

    /// On a GPU.
    #[cfg(any(feature = "cuda", feature = "emulate"))]
    pub fn gpu(
        gpu: &crate::gpu::launch::Gpu,
        student: &'a Loaded,
        teacher: Option<&'a Loaded>,
    ) -> Result<Runner<'a>> {
        let weights = super::on_gpu::Weights::new(gpu, student, teacher)?;
        Ok(Runner { student, teacher, place: Place::Gpu(Box::new(weights)) })
    }

    /// Scores every sequence, in order.
    pub fn scores(&self, work: Work, ctx: &mut Context, unit: &str) -> Result<Vec<SequenceScore>> {
        match &self.place {
            Place::Cpu => scores(self, work, ctx, unit),
            #[cfg(any(feature = "cuda", feature = "emulate"))]
            Place::Gpu(weights) => weights.scores(self, work, ctx, unit),
        }
    }

    /// One model's likelihood of every item, in their order. `budget` is the tokens of one pass.
    pub fn likelihoods(
        &self,
        who: Who,
        items: &[Item],
        budget: usize,
        ctx: &mut Context,
        unit: &str,
    ) -> Result<Vec<Likelihood>> {
        let loaded = match who {
            Who::Student => self.student,
            Who::Teacher => self.teacher.expect("asked only where there is one"),
        };
        match &self.place {
            Place::Cpu => likelihoods(loaded, items, budget, ctx, unit),
            #[cfg(any(feature = "cuda", feature = "emulate"))]
            Place::Gpu(weights) => weights.likelihoods((loaded, who), items, budget, ctx, unit),
        }
    }
}

impl Work<'_> {
    /// How many passes there are.
    pub(super) fn batches(&self) -> usize {
        self.sequences.div_ceil(self.batch)
    }

    /// The tokens of pass `batch`.
    pub(super) fn tokens(&self, batch: usize) -> (Dims, Vec<u32>) {
        let (seq, first) = (self.shard.seq(), batch * self.batch);
        let count = self.batch.min(self.sequences - first);
        let mut tokens_n = vec![0; count * seq];
        for (i, tokens) in tokens_n.chunks_exact_mut(seq).enumerate() {
            self.shard.copy_to(first + i, tokens);
        }
        (Dims { batch: count, seq }, tokens_n)
    }

    /// Tells that so many passes ended.
    pub(super) fn progress(&self, ctx: &mut Context, finished: usize, unit: &str) {
        let sequences = (finished * self.batch).min(self.sequences);
        ctx.progress(sequences as u64, self.sequences as u64, unit);
    }
}

fn scores(
    models: &Runner,
    work: Work,
    ctx: &mut Context,
    unit: &str,
) -> Result<Vec<SequenceScore>> {
    let (student, teacher) = (models.student, models.teacher);
    let start = || {
        let mut thread = Thread::new(student, teacher, work);
        move |batch| thread.batch(batch)
    };
    let mut finished = 0;
    let done = |ctx: &mut Context, _| {
        finished += 1;
        work.progress(ctx, finished, unit);
    };
    Ok(spread(ctx, work.batches(), start, done)?.into_iter().flatten().collect())
}

/// One thread's buffers.
struct Thread<'a> {
    work: Work<'a>,
    student: Side<'a>,
    teacher: Option<Side<'a>>,
}

/// One model's buffers.
pub(super) struct Side<'a> {
    loaded: &'a Loaded,
    pass: Pass,
    logits_nv: Vec<f32>,
}

impl<'a> Side<'a> {
    /// Buffers for sequences of `dims`.
    pub(super) fn new(loaded: &'a Loaded, dims: Dims) -> Side<'a> {
        let pass = loaded.model.pass(dims, Keep::Nothing);
        Side { loaded, pass, logits_nv: vec![0.0; ROWS * loaded.model.config.vocab] }
    }

    /// Runs sequences through all blocks.
    pub(super) fn forward(&mut self, dims: Dims, tokens_n: &[u32]) {
        if self.pass.dims() != dims {
            self.pass = self.loaded.model.pass(dims, Keep::Nothing);
        }
        self.pass.tokens_n.copy_from_slice(tokens_n);
        self.loaded.model.forward(&self.loaded.params.flat, &mut self.pass, |_, _, _| {});
    }

    /// Logits of at most [`ROWS`] rows.
    pub(super) fn logits(&mut self, rows: std::ops::Range<usize>) -> &[f32] {
        let Side { loaded, pass, logits_nv } = self;
        let logits_nv = &mut logits_nv[..rows.len() * loaded.model.config.vocab];
        loaded.model.logits(&loaded.params.flat, pass, rows, logits_nv);
        logits_nv
    }
}

impl<'a> Thread<'a> {
    fn new(student: &'a Loaded, teacher: Option<&'a Loaded>, work: Work<'a>) -> Thread<'a> {
        let dims = Dims { batch: work.batch.min(work.sequences), seq: work.shard.seq() };
        let side = |loaded| Side::new(loaded, dims);
        Thread { work, student: side(student), teacher: teacher.map(side) }
    }

    fn batch(&mut self, batch: usize) -> Vec<SequenceScore> {
        let (dims, tokens_n) = self.work.tokens(batch);
        let seq = dims.seq;
        self.student.forward(dims, &tokens_n);
        if let Some(teacher) = &mut self.teacher {
            teacher.forward(dims, &tokens_n);
        }
        let sequences = tokens_n.chunks_exact(seq).enumerate();
        sequences.map(|(i, tokens)| self.sequence(i * seq, tokens)).collect()
    }

    /// Scores the sequence whose first row is `first`.
    fn sequence(&mut self, first: usize, tokens: &[u32]) -> SequenceScore {
        let mut score = SequenceScore::default();
        for start in (0..tokens.len()).step_by(ROWS) {
            let end = (start + ROWS).min(tokens.len());
            let rows = first + start..first + end;
            let nexts = (start..end).map(|at| tokens.get(at + 1).copied());
            let student_nv = self.student.logits(rows.clone());
            let v = student_nv.len() / rows.len();
            for (logits_v, next) in student_nv.chunks_exact(v).zip(nexts.clone()) {
                score.right[0].push(Some(likeliest(logits_v) as u32) == next);
                next.into_iter().for_each(|next| score.student.add(logits_v, next));
            }
            let Some(teacher) = &mut self.teacher else { continue };
            let pairs = teacher.logits(rows).chunks_exact(v).zip(student_nv.chunks_exact(v));
            for ((teacher_v, student_v), next) in pairs.zip(nexts) {
                score.right[1].push(Some(likeliest(teacher_v) as u32) == next);
                let Some(next) = next else { continue };
                score.teacher.add(teacher_v, next);
                score.agreement.add(teacher_v, student_v);
            }
        }
        if let (Some(teacher), true) = (&self.teacher, self.work.hidden) {
            let width = self.student.loaded.model.config.d_model;
            let span = first * width..(first + tokens.len()) * width;
            let pairs = teacher.pass.hidden.iter().zip(&self.student.pass.hidden).skip(1);
            let apart = |(t, s): (&Vec<f32>, &Vec<f32>)| {
                distances(&t[span.clone()], &s[span.clone()], width)
            };
            score.distances = pairs.map(apart).collect();
        }
        score
    }
}
