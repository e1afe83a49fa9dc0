//! Norms, clipping and AdamW of one or many learners; see `kernels/adamw.cu` and
//! [`crate::train::adamw`].

use std::ops::Range;

use anyhow::Result;
use bytemuck::{Pod, Zeroable};
use half::bf16;

use crate::gpu::launch::{Buf, Gpu, Slice};
use crate::launch;
use crate::train::adamw::{Group, Rule};

/// Most parameters of a chunk: a block's work.
const MOST: usize = 8192;

/// A piece of a learner's group, as in the kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
struct Chunk {
    offset: u64,
    len: u32,
    learner: u32,
    decay: f32,
    scale: f32,
}

/// What became of an update.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Record {
    /// The learner's loss.
    pub loss: f32,
    /// Norm of its gradient before clipping.
    pub norm: f32,
    /// A second figure of the phase, or 0.
    pub extra: f32,
    /// What gradients were multiplied by; 0 if loss or norm was not finite and nothing was updated.
    pub factor: f32,
}

/// Flat buffers with equal offsets.
#[derive(Clone, Copy, Debug)]
pub struct Flat {
    /// Master weights.
    pub params: Slice<f32>,
    /// Sums of gradients.
    pub grads: Slice<f32>,
    /// First moments.
    pub m: Slice<f32>,
    /// Second moments.
    pub v: Slice<f32>,
    /// Weights as products read them.
    pub shadow: Option<Slice<bf16>>,
}

/// The optimiser of a number of learners, without their buffers.
pub struct Updates {
    rule: Rule,
    clip: f32,
    learners: usize,
    chunks: Buf<Chunk>,
    end: usize,
    first_i: Buf<u32>,
    partial: Buf<f64>,
    steps_i: Buf<[u64; 3]>,
    /// Updates made, of each learner.
    pub made_i: Buf<u32>,
    /// Updates skipped.
    pub skipped_i: Buf<u32>,
    /// Records, `[slots, learners]`.
    pub history: Buf<Record>,
    slots: usize,
}

impl Updates {
    /// `groups_i[i]` are learner i's, in offsets of the flat buffers, with gradients clipped to norm
    /// `clip`. Records are kept of `slots` updates.
    pub fn new(
        gpu: &Gpu,
        groups_i: &[Vec<Group>],
        rule: Rule,
        clip: f32,
        slots: usize,
    ) -> Result<Updates> {
        let (mut chunks, mut first_i) = (Vec::new(), vec![0u32]);
        for (learner, groups) in groups_i.iter().enumerate() {
            for Group { range, decay, scale } in groups {
                chunks.extend(range.clone().step_by(MOST).map(|at| Chunk {
                    offset: at as u64,
                    len: (range.end - at).min(MOST) as u32,
                    learner: learner as u32,
                    decay: *decay,
                    scale: *scale,
                }));
            }
            first_i.push(chunks.len() as u32);
        }
        let learners = groups_i.len();
        Ok(Updates {
            rule,
            clip,
            learners,
            end: groups_i.iter().flatten().map(|g| g.range.end).max().unwrap_or(0),
            partial: gpu.alloc("partial norms", chunks.len())?,
            steps_i: gpu.zeros("the optimiser's factors", learners)?,
            made_i: gpu.zeros("counts of updates", learners)?,
            skipped_i: gpu.zeros("counts of updates", learners)?,
            history: gpu.zeros("the history of updates", slots * learners)?,
            chunks: gpu.buf("the optimiser's chunks", &chunks)?,
            first_i: gpu.buf("the optimiser's chunks", &first_i)?,
            slots,
        })
    }

    /// One update of every learner whose norm and loss (of `figures`: losses and second figures, one
    /// each; none: always) are finite,
    /// at rate `lr`, 1 element; its record goes to row `slot`, 1 element, of the history. Then
    /// gradients are 0 if `zero`. Waits for nothing, so it can be recorded.
    pub fn step(
        &self,
        gpu: &Gpu,
        flat: Flat,
        figures: Option<(Slice<f32>, Slice<f32>)>,
        (lr, slot): (Slice<f32>, Slice<u32>),
        zero: bool,
    ) {
        let Flat { params, grads, m, v, shadow } = flat;
        let long = [params.len(), grads.len(), m.len(), v.len()];
        assert!(long.iter().all(|len| *len >= self.end), "a buffer is too small");
        assert!(shadow.is_none_or(|s| s.len() >= self.end), "the shadow is too small");
        let (loss_i, extra_i) = (figures.map(|f| f.0), figures.map(|f| f.1));
        let enough = |of: Option<Slice<f32>>| of.is_none_or(|l| l.len() >= self.learners);
        assert!(enough(loss_i) && enough(extra_i), "a loss is missing");
        assert!(!lr.is_empty() && !slot.is_empty(), "rate or slot is missing");
        let Rule { beta1, beta2, eps } = self.rule;
        let (chunks, steps_i, partial) =
            (self.chunks.all(), self.steps_i.all(), self.partial.all());
        let blocks = [chunks.len(), 1, 1];
        launch!(gpu, "grad_norm_partial", grid: blocks, block: 256, shared: 0;
            chunks, grads, partial);
        launch!(gpu, "clip_factors", grid: [self.learners, 1, 1], block: 256, shared: 0;
            partial, self.first_i.all(), loss_i, extra_i, self.clip, beta1, beta2, self.made_i.all(),
            self.skipped_i.all(), steps_i, self.history.all(), slot, self.slots as i32);
        launch!(gpu, "adamw_update", grid: blocks, block: 256, shared: 0;
            chunks, steps_i, lr, beta1, beta2, eps, params, grads, m, v, shadow, i32::from(zero));
    }

    /// The records of updates in `slots`, `[slots, learners]`; waits for them.
    pub fn records(&self, gpu: &Gpu, slots: Range<usize>) -> Result<Vec<Record>> {
        let range = slots.start * self.learners..slots.end * self.learners;
        gpu.download(self.history.all().range(range))
    }
}
