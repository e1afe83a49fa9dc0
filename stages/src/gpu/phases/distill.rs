//! Phase 3 on the device; see [`crate::distill`]. Logits exist for a part of the tokens at a time,
//! the teacher's beside the student's, and never as f32.

use anyhow::Result;
use half::bf16;

use super::teacher::Teacher;
use super::{Driver, Work};
use crate::gpu::batch::Batch;
use crate::gpu::launch::{Buf, Gpu, Slice};
use crate::gpu::learners::{Learners, Member};
use crate::gpu::model::Scene;
use crate::gpu::model::whole::{Pass, Whole, check, rows};
use crate::gpu::ops::adamw::Record;
use crate::gpu::ops::cross_entropy::{self, Rows};
use crate::gpu::ops::reduce;
use crate::gpu::weights::Places;
use crate::models::{Model, Params, Trained};
use crate::ops::Dims;
use crate::ops::cross_entropy::Soft;
use crate::train::learner::Learner;

/// Where the tokens of a sequence come from.
pub type Tokens = Box<dyn Fn(usize, &mut [u32])>;

/// Teacher and student, and the buffers between them.
pub struct Distill {
    gpu: Gpu,
    teacher: Teacher,
    student: Pass,
    tokens: Tokens,
    separator: Option<u32>,
    teacher_nv: Buf<bf16>,
    student_nv: Buf<bf16>,
    /// Cross-entropy and entropy of each token.
    out_n2: Buf<f32>,
    rows: usize,
    weight: f32,
    labels: f32,
}

/// What an update is.
#[derive(Clone, Copy, Debug)]
pub struct Aim {
    /// Sequences,
    pub batch: usize,
    /// their length, and how many there are at a time.
    pub dims: Dims,
    /// Share of the gradient that is of the text's own next token.
    pub labels: f32,
}

/// Makes a trainer of `student`; its start is in `learner`.
pub fn driver(
    gpu: &Gpu,
    (teacher, weights): (&Model, &Params),
    (student, learner): (&Model, &Learner),
    trained: Trained,
    tokens: Tokens,
    Aim { batch, dims, labels }: Aim,
) -> Result<Driver<Distill>> {
    check(&student.config)?;
    let member = Member {
        name: learner.name.clone(),
        host: learner.params.clone(),
        places: Places::of_model(student, 0),
        groups: learner.groups.clone(),
    };
    let learners = Learners::new(gpu, vec![member], learner.clip)?;
    let whole = Whole::new(student, &learners.bank(0, None), trained);
    let (n, v) = (dims.tokens(), student.config.vocab);
    let rows = rows(v, n);
    let work = Distill {
        gpu: gpu.clone(),
        teacher: Teacher::new(gpu, teacher, weights, dims, 1)?,
        tokens,
        separator: student.config.separator,
        teacher_nv: gpu.alloc("the teacher's logits", rows * v)?,
        student_nv: gpu.alloc("the student's logits", rows * v)?,
        out_n2: gpu.alloc("losses of tokens", 2 * n)?,
        // Last: with little room left it keeps less.
        student: Pass::new(gpu, whole, dims)?,
        rows,
        weight: 1.0 / (batch * dims.seq) as f32,
        labels,
    };
    let mut driver = Driver::new(gpu, work, learners, dims)?;
    if labels > 0.0 {
        driver.batch.want_targets()?;
    }
    Ok(driver)
}

impl Distill {
    /// See [`Pass::recomputes`].
    pub fn recomputes(&self) -> bool {
        self.student.recomputes()
    }

    /// Forward, loss and, if `learn`, gradients; `sums` gets loss and entropy, weighted.
    fn pass(&self, batch: &Batch, sums: (Slice<f32>, Slice<f32>), learn: bool) {
        let Distill { gpu, teacher, student, .. } = self;
        let scene = teacher.scene(batch);
        teacher.forward.all(gpu, scene, batch);
        let scene = Scene { rope: scene.rope, ..scene };
        student.forward(gpu, scene, batch);
        let n = scene.dims.tokens();
        for first in (0..n).step_by(self.rows) {
            self.compare(batch, first..n.min(first + self.rows), learn);
        }
        let out = self.out_n2.all();
        reduce::reduce_rows(gpu, n, out, (sums.0, Some(sums.1)), self.weight, true);
        if learn {
            student.backward(gpu, scene, batch);
        }
    }

    fn compare(&self, batch: &Batch, chunk: std::ops::Range<usize>, learn: bool) {
        let Distill { gpu, teacher, student, .. } = self;
        let v = student.whole.config.vocab;
        let t_nv = self.teacher_nv.all().range(0..chunk.len() * v);
        let s_nv = self.student_nv.all().range(0..chunk.len() * v);
        let of_teacher = &teacher.forward;
        of_teacher.whole.logits(gpu, of_teacher.final_nd.all(), chunk.clone(), t_nv);
        student.whole.logits(gpu, student.final_nd.all(), chunk.clone(), s_nv);
        let at = Rows { rows: chunk.len(), v, weight: self.weight, factor: None, learn };
        let (s, t) = ((s_nv, student.whole.head.full_b), (t_nv, of_teacher.whole.head.full_b));
        let out = self.out_n2.all().range(2 * chunk.start..2 * chunk.end);
        let labels =
            (self.labels > 0.0).then(|| (batch.targets_n().range(chunk.clone()), self.labels));
        cross_entropy::soft(gpu, at, s, t, None, labels, out);
        if learn {
            student.head_backward(gpu, chunk, s_nv);
        }
    }

    /// Sums over `sequences`, a multiple of a micro-batch.
    pub fn held_out(&mut self, batch: &mut Batch, sequences: &[usize]) -> Result<Soft> {
        let sums: Buf<f32> = self.gpu.zeros("held-out figures", 2)?;
        let all = sums.all();
        for part in sequences.chunks(batch.dims().batch) {
            self.send(batch, part)?;
            self.pass(batch, (all.range(0..1), all.range(1..2)), false);
        }
        let found = self.gpu.download(all)?;
        let sum = |value: f32| f64::from(value) / f64::from(self.weight);
        Ok(Soft { cross_entropy: sum(found[0]), entropy: sum(found[1]) })
    }
}

impl Work for Distill {
    fn send(&mut self, batch: &mut Batch, sequences: &[usize]) -> Result<()> {
        batch.send(self.separator, true, |i, out| (self.tokens)(sequences[i], out))
    }

    fn queue(&self, batch: &Batch, learners: &Learners) {
        self.pass(batch, (learners.loss(0), learners.extra(0)), true);
    }

    fn values(&self, _: &Learners, row: &[Record]) -> Vec<(String, f64)> {
        let [record] = row else { unreachable!("there is one student") };
        let (loss, entropy) = (f64::from(record.loss), f64::from(record.extra));
        vec![
            ("loss".into(), loss),
            ("divergence".into(), loss - entropy),
            ("gradient".into(), f64::from(record.norm)),
        ]
    }
}
