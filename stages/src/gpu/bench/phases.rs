//! Whole phases with made-up weights and tokens: updates are queued back to back and timed by the
//! device, as in training, where nothing waits between them either.

use anyhow::{Result, ensure};
use half::bf16;

use super::count;
use super::subject::{Subject, TRAINING};
use super::{WARM_UP, median, spans};
use crate::align::Target;
use crate::gpu::batch::Batch;
use crate::gpu::launch::{Buf, Gpu, Graph};
use crate::gpu::model::whole::rows;
use crate::gpu::phases::teacher::Teacher;
use crate::gpu::phases::{Driver, Work, align, distill, micro_batch, orient};
use crate::models::{Part, Trained};
use crate::ops::Dims;
use crate::train::layer::groups;
use crate::train::learner::Learner;
use crate::train::source::Source;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The teacher's forward pass, to the last norm.
    Teacher,
    /// The same to the logits.
    TeacherLogits,
    /// Phase 1 over all layers.
    Orient,
    /// Phase 2 over all layers, with frozen norms and MLPs.
    Align,
    /// Phase 3, everything trained.
    Distill,
}

impl Phase {
    /// All, with the names that users know them by.
    pub const ALL: [(Phase, &str); 5] = [
        (Phase::Teacher, "teacher"),
        (Phase::TeacherLogits, "teacher-logits"),
        (Phase::Orient, "orient"),
        (Phase::Align, "align"),
        (Phase::Distill, "distill"),
    ];
}

/// How much is done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Amount {
    /// Sequences of an update; 0: the subject's.
    pub batch: usize,
    /// Sequences that the device works on at a time; 0: as in training.
    pub micro_batch: usize,
    /// Timed updates.
    pub updates: usize,
}

/// What a phase took.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Sequences of an update.
    pub batch: usize,
    /// Sequences that the device worked on at a time.
    pub micro_batch: usize,
    /// Tokens of a sequence.
    pub seq: usize,
    /// Milliseconds of the median update.
    pub ms: f64,
    /// Tokens a second of it.
    pub tok_s: f64,
    /// The most memory in use, above what the opened device uses.
    pub peak_bytes: usize,
    /// FLOPs a token, see [`count`].
    pub flops: f64,
    /// The newest update's, the mean over layers; forward passes have none.
    pub loss: Option<f64>,
}

/// Something whose updates can be queued.
trait Queue {
    fn queue(&mut self, sequences: &[usize]) -> Result<()>;

    /// Waits, fails if numbers are none, and gives the newest loss.
    fn loss(&self) -> Result<Option<f64>>;
}

impl<W: Work> Queue for Driver<W> {
    fn queue(&mut self, sequences: &[usize]) -> Result<()> {
        self.queue_update(1e-4, sequences)
    }

    fn loss(&self) -> Result<Option<f64>> {
        let all = self.learners.newest()?;
        let made = all.iter().all(|record| record.loss.is_finite() && record.factor > 0.0);
        ensure!(made, "the newest update was skipped: its loss or its gradient is not finite");
        let sum: f64 = all.iter().map(|record| f64::from(record.loss)).sum();
        Ok(Some(sum / all.len() as f64))
    }
}

/// Updates times micro-batches of one, at most: a device forgets older marks.
const MOST: usize = 1000;

/// Sequences of an update and of a micro-batch, or why they cannot be.
pub fn sizes(subject: &Subject, amount: Amount) -> Result<(usize, usize)> {
    let (config, seq) = (&subject.teacher, subject.seq);
    let batch = if amount.batch > 0 { amount.batch } else { subject.batch };
    let micro = match amount.micro_batch {
        0 => micro_batch(config, 0, batch, seq)?,
        given => given,
    };
    let parts = batch / micro;
    ensure!(
        batch.is_multiple_of(micro),
        "a micro-batch of {micro} sequences does not divide the batch of {batch}"
    );
    ensure!(amount.updates * parts <= MOST, "more than {MOST} micro-batches cannot be timed");
    Ok((batch, micro))
}

/// Measures `phase` of `subject`. `free` is the device's free memory when it was opened.
pub fn measure(
    gpu: &Gpu,
    subject: &Subject,
    phase: Phase,
    amount: Amount,
    free: usize,
) -> Result<Figures> {
    let (student, seq) = (subject.student(), subject.seq);
    let (batch, micro) = sizes(subject, amount)?;
    ensure!(amount.updates > 0, "there is no update to time");
    let mut queue = open(gpu, subject, phase, (batch, micro))?;
    let mut least = free.min(gpu.memory()?.0);
    let mut marks = Vec::new();
    for update in 0..WARM_UP + amount.updates {
        let first = update % AHEAD * batch;
        let sequences: Vec<usize> = (first..first + batch).collect();
        if update == WARM_UP {
            queue.loss()?;
            least = least.min(gpu.memory()?.0);
            marks.push(gpu.mark());
        }
        queue.queue(&sequences)?;
        if update >= WARM_UP {
            marks.push(gpu.mark());
        }
    }
    let ms = median(spans(gpu, &marks)?);
    let loss = queue.loss()?;
    least = least.min(gpu.memory()?.0);
    Ok(Figures {
        batch,
        micro_batch: micro,
        seq,
        ms,
        tok_s: (batch * seq) as f64 / ms * 1e3,
        peak_bytes: free - least,
        flops: count::flops(phase, &student, seq),
        loss,
    })
}

/// Batches that differ.
const AHEAD: usize = 4;

/// Makes everything that `phase` needs.
fn open(
    gpu: &Gpu,
    subject: &Subject,
    phase: Phase,
    (batch, micro): (usize, usize),
) -> Result<Box<dyn Queue>> {
    let (model, params) = subject.make_teacher()?;
    let (seq, config) = (subject.seq, subject.student());
    let tokens = subject.make_tokens(AHEAD * batch);
    let dims = Dims { batch: micro, seq };
    Ok(match phase {
        Phase::Teacher | Phase::TeacherLogits => {
            let teacher = Teacher::new(gpu, &model, &params, dims, 1)?;
            let logits = phase == Phase::TeacherLogits;
            Box::new(ForwardOnly::new(gpu, teacher, logits, tokens, dims)?)
        }
        Phase::Orient => {
            let layers = subject.make_layers(crate::orient::trained);
            let source = Source::held(model, params, tokens, seq);
            Box::new(orient::driver(gpu, source, &config, &layers, (batch, micro))?)
        }
        Phase::Align => {
            let layers = subject.make_layers(|entry| matches!(entry.part, Part::Mixer(_)));
            let source = Source::held(model, params, tokens, seq);
            let (sizes, of) = ((batch, micro), (Target::Block, false));
            Box::new(align::driver(gpu, source, &config, &layers, sizes, of)?)
        }
        Phase::Distill => {
            let (student, start) = subject.make_student()?;
            let groups = groups(&student.layout, TRAINING.decay, |_| true);
            let learner = Learner::new("student", start.flat, groups, TRAINING.clip);
            let tokens: distill::Tokens = Box::new(move |sequence, out| {
                out.copy_from_slice(&tokens[sequence * seq..][..seq]);
            });
            let (teacher, own) = ((&model, &params), (&student, &learner));
            let aim = distill::Aim { batch, dims, labels: 0.0 };
            Box::new(distill::driver(gpu, teacher, own, Trained::ALL, tokens, aim)?)
        }
    })
}

/// A teacher alone.
struct ForwardOnly {
    gpu: Gpu,
    teacher: Teacher,
    batch: Batch,
    tokens: Vec<u32>,
    /// Of a part of the tokens at a time, if they are wanted.
    logits_nv: Option<Buf<bf16>>,
    graph: Option<Graph>,
}

impl ForwardOnly {
    fn new(
        gpu: &Gpu,
        teacher: Teacher,
        logits: bool,
        tokens: Vec<u32>,
        dims: Dims,
    ) -> Result<ForwardOnly> {
        let vocab = teacher.forward.whole.config.vocab;
        let room = || gpu.alloc("logits", rows(vocab, dims.tokens()) * vocab);
        Ok(ForwardOnly {
            gpu: gpu.clone(),
            logits_nv: logits.then(room).transpose()?,
            batch: Batch::new(gpu, dims)?,
            teacher,
            tokens,
            graph: None,
        })
    }
}

/// One micro-batch.
fn pass(gpu: &Gpu, teacher: &Teacher, batch: &Batch, logits_nv: Option<&Buf<bf16>>) {
    let (forward, n) = (&teacher.forward, batch.dims().tokens());
    forward.all(gpu, teacher.scene(batch), batch);
    if let Some(to) = logits_nv {
        let v = forward.whole.config.vocab;
        let rows = rows(v, n);
        for first in (0..n).step_by(rows) {
            let part = first..n.min(first + rows);
            let to = to.all().range(0..part.len() * v);
            forward.whole.logits(gpu, forward.final_nd.all(), part, to);
        }
    }
}

impl Queue for ForwardOnly {
    fn queue(&mut self, sequences: &[usize]) -> Result<()> {
        let ForwardOnly { gpu, teacher, batch, tokens, logits_nv, graph } = self;
        let Dims { batch: micro, seq } = batch.dims();
        for part in sequences.chunks(micro) {
            batch.send(None, false, |i, out| {
                out.copy_from_slice(&tokens[part[i] * seq..][..seq]);
            })?;
            let work = || pass(gpu, teacher, batch, logits_nv.as_ref());
            if graph.is_none() {
                *graph = Some(gpu.capture("micro-batch", work)?);
            }
            graph.as_ref().expect("just recorded").launch(work);
        }
        gpu.status()
    }

    fn loss(&self) -> Result<Option<f64>> {
        let last = match &self.logits_nv {
            Some(logits_nv) => logits_nv.all(),
            None => self.teacher.forward.final_nd.all(),
        };
        let some = self.gpu.download(last.range(0..last.len().min(1 << 16)))?;
        ensure!(some.iter().all(|v| v.is_finite()), "the pass gave numbers that are not finite");
        Ok(None)
    }
}
