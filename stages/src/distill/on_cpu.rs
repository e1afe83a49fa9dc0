//! The phase on the CPU: the slow twin of [`crate::gpu::phases::distill`]. A batch is cut into a fixed
//! number of shards, whose sums and gradients are added up in their order.

use anyhow::Result;
use engine::stage::Context;

use super::Data;
use crate::models::{Keep, Model, Params as Weights, Pass, Trained};
use crate::ops::Dims;
use crate::ops::cross_entropy::{IGNORE, Soft, hard, harden, soft, successors};
use crate::ops::top_k;
use crate::ops::vector::add;
use crate::train::learner::Learner;
use crate::train::logits::{Targets, TopLogits};
use crate::train::run::{SHARDS, Split, Trainer, each_shard};

/// Logits that exist at a time, for each of teacher and student, in elements.
const CHUNK: usize = 1 << 16;

/// Teacher and student side by side.
pub(super) struct Phase {
    teacher: Model,
    weights: Weights,
    pub(super) student: Model,
    pub(super) learner: Learner,
    trained: Trained,
    data: Data,
    threads: usize,
    shards: Vec<Shard>,
    weight: f32,
    labels: f32,
}

struct Shard {
    teacher: Pass,
    student: Pass,
    grads: Vec<f32>,
    sums: Soft,
    teacher_nv: Vec<f32>,
    student_nv: Vec<f32>,
    targets: Targets,
    /// Of a row: k values for its top-k loss, and one for each token for hard labels.
    scratch: Vec<f32>,
    /// The token that follows each, where labels have a share.
    labels_n: Vec<u32>,
}

impl Phase {
    /// `labels`: their share of the gradient.
    pub(super) fn new(
        (teacher, weights): (Model, Weights),
        (student, learner, trained): (Model, Learner, Trained),
        (data, labels): (Data, f32),
        split: &Split,
        threads: usize,
    ) -> Phase {
        let (t, s) = (&teacher.config, &student.config);
        let dims = Dims { batch: split.batch / SHARDS, seq: split.seq };
        let rows = rows(s.vocab, dims.tokens());
        let shard = |_| Shard {
            teacher: teacher.pass(dims, Keep::Nothing),
            student: student.pass(dims, Keep::Backward),
            grads: vec![0.0; student.layout.len()],
            sums: Soft::default(),
            teacher_nv: vec![0.0; rows * t.vocab],
            student_nv: vec![0.0; rows * s.vocab],
            targets: Targets::default(),
            scratch: Vec::new(),
            labels_n: vec![IGNORE; dims.tokens()],
        };
        let shards = (0..SHARDS).map(shard).collect();
        let weight = 1.0 / (split.batch * split.seq) as f32;
        Phase { teacher, weights, student, learner, trained, data, threads, shards, weight, labels }
    }

    /// Runs one shard; forms gradients when `learn`.
    fn work(&self, shard: &mut Shard, sequences: &[usize], learn: bool) {
        let (seq, params) = (self.data.seq(), &self.learner.params);
        for (i, out) in sequences.iter().zip(shard.student.tokens_n.chunks_exact_mut(seq)) {
            self.data.copy_to(*i, out);
        }
        if learn && self.labels > 0.0 {
            successors(seq, &shard.student.tokens_n, &mut shard.labels_n);
        }
        self.student.forward(params, &mut shard.student, |_, _, _| {});
        shard.sums = Soft::default();
        shard.grads.fill(0.0);
        match &self.data {
            Data::Cached(top) if learn => self.learn_top(top, shard, sequences),
            _ => self.compare(shard, learn),
        }
        if learn {
            let Shard { student, grads, .. } = shard;
            self.student.backward(params, student, self.trained, grads);
        }
    }

    /// The loss against the teacher's full logits.
    fn compare(&self, shard: &mut Shard, learn: bool) {
        let Shard { teacher, student, grads, sums, teacher_nv, student_nv, labels_n, .. } = shard;
        let params = &self.learner.params;
        teacher.tokens_n.copy_from_slice(&student.tokens_n);
        self.teacher.forward(&self.weights.flat, teacher, |_, _, _| {});
        let (v, n) = (self.student.config.vocab, teacher.tokens_n.len());
        let step = rows(v, n);
        let scored = vec![true; step];
        for first in (0..n).step_by(step) {
            let chunk = first..n.min(first + step);
            let (t, s) = (&mut teacher_nv[..chunk.len() * v], &mut student_nv[..chunk.len() * v]);
            self.teacher.logits(&self.weights.flat, teacher, chunk.clone(), t);
            self.student.logits(params, student, chunk.clone(), s);
            let part = soft(v, s, t, &scored[..chunk.len()], self.weight);
            sums.cross_entropy += part.cross_entropy;
            sums.entropy += part.entropy;
            if learn {
                if self.labels > 0.0 {
                    harden(v, s, t, &labels_n[chunk.clone()], self.weight * self.labels);
                }
                self.student.head_backward(params, student, chunk, s, self.trained, grads);
            }
        }
    }

    /// The loss against cached top-k logits, sequence by sequence; what is known of the entropy is
    /// that of the k and of the rest as one.
    fn learn_top(&self, top: &TopLogits, shard: &mut Shard, sequences: &[usize]) {
        let Shard { student, grads, sums, student_nv, targets, scratch, labels_n, .. } = shard;
        let (params, k, v) = (&self.learner.params, top.k(), self.student.config.vocab);
        let (seq, step) = (top.seq(), rows(v, student.tokens_n.len()));
        scratch.resize(k + v, 0.0);
        for (at, sequence) in sequences.iter().enumerate() {
            top.targets(*sequence, targets);
            for first in (0..seq).step_by(step) {
                let chunk = first..seq.min(first + step);
                let tokens = at * seq + chunk.start..at * seq + chunk.end;
                let logits = &mut student_nv[..chunk.len() * v];
                self.student.logits(params, student, tokens.clone(), logits);
                for (l, row) in chunk.zip(logits.chunks_exact_mut(v)) {
                    let (ids, log_p) =
                        (&targets.ids_lk[l * k..][..k], &targets.log_p_lk[l * k..][..k]);
                    let (tail, label) = (targets.tail_l[l], labels_n[at * seq + l]);
                    sums.cross_entropy += self.learn_row(row, (ids, log_p, tail), label, scratch);
                    let p_log_p = |log_p: &half::f16| {
                        let log_p = f64::from(log_p.to_f32());
                        log_p.exp() * log_p
                    };
                    let rest = f64::from(tail.max(1e-30));
                    sums.entropy -= log_p.iter().map(p_log_p).sum::<f64>() + rest * rest.ln();
                }
                self.student.head_backward(params, student, tokens, logits, self.trained, grads);
            }
        }
    }

    /// One row of these: logits become their gradient. Gives the loss against the teacher.
    fn learn_row(
        &self,
        logits_v: &mut [f32],
        of_teacher: (&[u32], &[half::f16], f32),
        label: u32,
        scratch: &mut [f32],
    ) -> f64 {
        let (own_k, hard_v) = scratch.split_at_mut(of_teacher.0.len());
        if self.labels == 0.0 || label == IGNORE {
            return top_k::soft(logits_v, of_teacher, self.weight, own_k);
        }
        hard_v.copy_from_slice(logits_v);
        hard(logits_v.len(), hard_v, &[label], self.weight * self.labels);
        let loss = top_k::soft(logits_v, of_teacher, self.weight * (1.0 - self.labels), own_k);
        add(logits_v, hard_v);
        loss
    }

    fn each_shard(&mut self, sequences: &[usize], learn: bool) {
        let mut shards = std::mem::take(&mut self.shards);
        each_shard(self.threads, &mut shards, |i, shard| {
            let batch = shard.teacher.dims().batch;
            self.work(shard, &sequences[i * batch..][..batch], learn);
        });
        self.shards = shards;
    }

    fn sums(&self) -> Soft {
        let sum = |pick: fn(&Soft) -> f64| self.shards.iter().map(|s| pick(&s.sums)).sum();
        Soft { cross_entropy: sum(|s| s.cross_entropy), entropy: sum(|s| s.entropy) }
    }

    /// Sums over the held-out sequences.
    pub(super) fn held_out(&mut self, split: &Split) -> Soft {
        let mut total = Soft::default();
        for batch in split.held_out() {
            self.each_shard(&batch, false);
            let sums = self.sums();
            total.cross_entropy += sums.cross_entropy;
            total.entropy += sums.entropy;
        }
        total
    }
}

/// Tokens whose logits exist at a time: never so few that a product with the head is spent on
/// reading its weights.
fn rows(vocab: usize, tokens: usize) -> usize {
    (CHUNK / vocab).max(128).min(tokens)
}

impl Trainer for Phase {
    fn update(
        &mut self,
        ctx: &Context,
        update: u64,
        rate: f32,
        sequences: &[usize],
    ) -> Result<Vec<(String, f64)>> {
        self.each_shard(sequences, true);
        let Soft { cross_entropy, entropy } = self.sums();
        let loss = cross_entropy * f64::from(self.weight);
        let grads = self.shards.iter().map(|shard| &shard.grads[..]);
        let norm = self.learner.step(ctx, update, rate, loss, grads)?;
        let divergence = loss - entropy * f64::from(self.weight);
        Ok(vec![
            ("loss".into(), loss),
            ("divergence".into(), divergence),
            ("gradient".into(), norm),
        ])
    }

    fn learners(&mut self) -> Vec<&mut Learner> {
        vec![&mut self.learner]
    }
}
