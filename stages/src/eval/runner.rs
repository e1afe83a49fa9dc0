//! Runs one or two models over a shard on several threads; what comes back depends on no thread.

use anyhow::Result;
use engine::stage::Context;

use super::score::{Agreement, Loss, distances, likeliest};
use super::spread::spread;
use crate::data::shard::TokenShard;
use crate::models::{Keep, Model, Params, Pass};
use crate::ops::Dims;

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
    /// What each finds likeliest after every position.
    pub guesses: [Vec<u32>; 2],
    /// After each block, at every position: how far the hidden states are apart.
    pub distances: Vec<Vec<f32>>,
}

/// What is to be measured.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// The model evaluated.
    pub student: &'a Loaded,
    /// The one it is compared with.
    pub teacher: Option<&'a Loaded>,
    /// The text.
    pub shard: &'a TokenShard,
    /// Number of sequences to look at, from the first.
    pub sequences: usize,
    /// Sequences of one forward pass. Bits depend on it, so it is a parameter.
    pub batch: usize,
    /// Whether hidden states are compared; both models must have the same sizes.
    pub hidden: bool,
}

/// Scores every sequence, in order.
pub fn scores(work: Work, ctx: &mut Context, unit: &str) -> Result<Vec<SequenceScore>> {
    let batches = work.sequences.div_ceil(work.batch);
    let start = || {
        let mut runner = Runner::new(work);
        move |batch| runner.batch(batch)
    };
    let mut finished = 0;
    let done = |ctx: &mut Context, _| {
        finished += 1;
        let sequences = (finished * work.batch).min(work.sequences);
        ctx.progress(sequences as u64, work.sequences as u64, unit);
    };
    Ok(spread(ctx, batches, start, done)?.into_iter().flatten().collect())
}

/// One thread's buffers.
struct Runner<'a> {
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

impl<'a> Runner<'a> {
    fn new(work: Work<'a>) -> Runner<'a> {
        let dims = Dims { batch: work.batch.min(work.sequences), seq: work.shard.seq() };
        let side = |loaded| Side::new(loaded, dims);
        Runner { work, student: side(work.student), teacher: work.teacher.map(side) }
    }

    fn batch(&mut self, batch: usize) -> Vec<SequenceScore> {
        let seq = self.work.shard.seq();
        let first = batch * self.work.batch;
        let count = self.work.batch.min(self.work.sequences - first);
        let mut tokens_n = vec![0; count * seq];
        for (i, tokens) in tokens_n.chunks_exact_mut(seq).enumerate() {
            self.work.shard.copy_to(first + i, tokens);
        }
        let dims = Dims { batch: count, seq };
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
                score.guesses[0].push(likeliest(logits_v) as u32);
                next.into_iter().for_each(|next| score.student.add(logits_v, next));
            }
            let Some(teacher) = &mut self.teacher else { continue };
            let pairs = teacher.logits(rows).chunks_exact(v).zip(student_nv.chunks_exact(v));
            for ((teacher_v, student_v), next) in pairs.zip(nexts) {
                score.guesses[1].push(likeliest(teacher_v) as u32);
                let Some(next) = next else { continue };
                score.teacher.add(teacher_v, next);
                score.agreement.add(teacher_v, student_v);
            }
        }
        if let (Some(teacher), true) = (&self.teacher, self.work.hidden) {
            let width = self.work.student.model.config.d_model;
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
