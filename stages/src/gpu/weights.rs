//! Parameters on the device: where each tensor of a host layout lies, as bf16 for products and as
//! f32 for everything else.
//!
//! What a block declares together (q, k and v; x, B, C, z and A_log) stays together as one unit;
//! units begin at multiples of 64 elements, and an `in_proj` is filled up with rows of zeros so
//! that its A_log part has a multiple of 8.

use std::ops::Range;

use anyhow::Result;
use half::bf16;

use super::launch::{Buf, Gpu, Slice};
use crate::models::norm::Norm;
use crate::models::{Block, Mixer, Model, Slot, linear, ssm::Ssm};

/// Elements that a unit's place is a multiple of.
const ALIGN: usize = 64;
/// Rows that the A_log part of an `in_proj` is filled up to a multiple of.
pub const PAD: usize = 8;

/// One tensor, or several that lie together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Where it lies in the host's flat buffer.
    pub host: Range<usize>,
    /// Where it lies on the device.
    pub at: usize,
    /// Elements there, more than on the host where it is filled up.
    pub len: usize,
    /// Whether it is a matrix, so that frozen models need it as bf16 only.
    pub matrix: bool,
    /// Where it lies among the f32 values: `at` if trained, else counted over vectors only.
    pub full: usize,
}

/// Where all tensors of one layout lie.
#[derive(Clone, Debug, Default)]
pub struct Places {
    units: Vec<Unit>,
}

/// Gathers units in the order of their places on the host.
#[derive(Default)]
struct Gather {
    slots: Vec<(Slot, bool, usize)>,
}

impl Gather {
    fn matrix(&mut self, slot: Slot) {
        self.slots.push((slot, true, slot.len()));
    }

    fn vector(&mut self, slot: Slot) {
        self.slots.push((slot, false, slot.len()));
    }

    fn linear(&mut self, linear: linear::Linear) {
        self.matrix(linear.w);
        linear.b.into_iter().for_each(|b| self.vector(b));
    }

    fn norm(&mut self, norm: Norm) {
        self.vector(norm.w);
        norm.b.into_iter().for_each(|b| self.vector(b));
    }

    fn ssm(&mut self, ssm: &Ssm) {
        self.slots.push((ssm.in_proj, true, rows(ssm) * ssm.in_proj.cols));
        for slot in [ssm.z_bias, ssm.conv_bias, ssm.d, ssm.conv] {
            self.vector(slot);
        }
        self.matrix(ssm.out);
    }

    fn block(&mut self, block: &Block) {
        self.norm(block.norm1);
        match &block.mixer {
            Mixer::Attention(attention) => {
                self.linear(attention.qkv);
                self.linear(attention.o);
            }
            Mixer::Ssm(ssm) => self.ssm(ssm),
        }
        block.norm2.into_iter().for_each(|norm| self.norm(norm));
        self.linear(block.mlp.into);
        self.linear(block.mlp.out);
    }

    fn places(self, base: usize, keep: impl Fn(Slot) -> bool) -> Places {
        let (mut at, mut full) = (base, 0);
        let mut units = Vec::new();
        for (slot, matrix, len) in self.slots.into_iter().filter(|(slot, ..)| keep(*slot)) {
            units.push(Unit { host: slot.range(), at, len, matrix, full });
            let room = len.next_multiple_of(ALIGN);
            at += room;
            full += if matrix { 0 } else { room };
        }
        Places { units }
    }
}

/// Rows of an `in_proj` on the device.
pub fn rows(ssm: &Ssm) -> usize {
    let heads = ssm.a_log.rows;
    ssm.in_proj.rows - heads + heads.next_multiple_of(PAD)
}

impl Places {
    /// Of all of a model.
    pub fn of_model(model: &Model, base: usize) -> Places {
        let mut gather = Gather::default();
        gather.matrix(model.embedding());
        model.blocks.iter().for_each(|block| gather.block(block));
        gather.norm(model.final_norm());
        let head = model.head();
        if head.w != model.embedding() {
            gather.matrix(head.w);
        }
        head.b.into_iter().for_each(|b| gather.vector(b));
        gather.places(base, |_| true)
    }

    /// Of the tensors of a block that `keep` picks.
    pub fn of_block(block: &Block, base: usize, keep: impl Fn(Slot) -> bool) -> Places {
        let mut gather = Gather::default();
        gather.block(block);
        gather.places(base, keep)
    }

    /// The tensors.
    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    /// The end of the last one on the device.
    pub fn end(&self) -> usize {
        self.units.last().map_or(0, |unit| (unit.at + unit.len).next_multiple_of(ALIGN))
    }

    fn full_end(&self) -> usize {
        let ends = self.units.iter().filter(|unit| !unit.matrix);
        ends.map(|unit| (unit.full + unit.len).next_multiple_of(ALIGN)).max().unwrap_or(0)
    }

    /// The unit that `slot` lies in, and how far.
    pub fn find(&self, slot: Slot) -> Option<(&Unit, usize)> {
        let inside = |unit: &&Unit| {
            unit.host.start <= slot.offset && slot.range().end <= unit.host.end && !slot.is_empty()
        };
        self.units.iter().find(inside).map(|unit| (unit, slot.offset - unit.host.start))
    }

    /// Runs on the device of the host's `range`, which may span several units.
    pub fn runs(&self, range: Range<usize>) -> Vec<Range<usize>> {
        let mut runs = Vec::new();
        for unit in &self.units {
            let (start, end) = (range.start.max(unit.host.start), range.end.min(unit.host.end));
            if start < end {
                let first = unit.at + start - unit.host.start;
                runs.push(first..first + end - start);
            }
        }
        runs
    }

    /// Copies the host's values into device order, `out[0]` being the device's element `base`.
    pub fn scatter(&self, host: &[f32], base: usize, out: &mut [f32]) {
        for unit in &self.units {
            let from = &host[unit.host.clone()];
            out[unit.at - base..][..from.len()].copy_from_slice(from);
        }
    }

    /// Copies values of the device back; what has no place there stays as it is.
    pub fn gather(&self, device: &[f32], base: usize, out: &mut [f32]) {
        for unit in &self.units {
            let to = &mut out[unit.host.clone()];
            let len = to.len();
            to.copy_from_slice(&device[unit.at - base..][..len]);
        }
    }
}

/// Parameters as ops take them.
#[derive(Clone)]
pub struct Bank {
    places: Places,
    half: Slice<bf16>,
    full: Slice<f32>,
    grads: Option<Slice<f32>>,
    /// Whether `full` holds all units at their own places, or vectors only.
    trained: bool,
    /// What serves slots that have no place here (frozen parts of a block in training).
    other: Option<Box<dyn Fallback>>,
}

/// Finds what a frozen part of a block is in the teacher.
pub trait Fallback {
    /// The bf16 values of `slot`.
    fn half(&self, slot: Slot) -> Slice<bf16>;
    /// The f32 values of `slot`.
    fn full(&self, slot: Slot) -> Slice<f32>;
    /// A copy.
    fn boxed(&self) -> Box<dyn Fallback>;
}

impl Clone for Box<dyn Fallback> {
    fn clone(&self) -> Self {
        self.boxed()
    }
}

/// A block's tensors in its teacher, pair by pair.
#[derive(Clone)]
pub struct Twin {
    bank: Bank,
    pairs: Vec<(Slot, Slot)>,
}

impl Twin {
    /// `own`'s norms and MLP as `teacher`'s, whose parameters are `bank`.
    pub fn new(own: &Block, teacher: &Block, bank: &Bank) -> Twin {
        let mut pairs = Vec::new();
        let mut norm = |a: Norm, b: Norm| {
            pairs.push((a.w, b.w));
            pairs.extend(a.b.zip(b.b));
        };
        norm(own.norm1, teacher.norm1);
        if let Some((a, b)) = own.norm2.zip(teacher.norm2) {
            norm(a, b);
        }
        for (a, b) in [(own.mlp.into, teacher.mlp.into), (own.mlp.out, teacher.mlp.out)] {
            pairs.push((a.w, b.w));
            pairs.extend(a.b.zip(b.b));
        }
        Twin { bank: bank.clone(), pairs }
    }

    fn twin(&self, slot: Slot) -> Slot {
        let found = self.pairs.iter().find(|(own, _)| *own == slot);
        found.expect("only mixers have no counterpart in the teacher").1
    }
}

impl Fallback for Twin {
    fn half(&self, slot: Slot) -> Slice<bf16> {
        self.bank.half(self.twin(slot))
    }

    fn full(&self, slot: Slot) -> Slice<f32> {
        self.bank.full(self.twin(slot))
    }

    fn boxed(&self) -> Box<dyn Fallback> {
        Box::new(self.clone())
    }
}

impl Bank {
    /// Trained parameters that lie in `half`, `full` and `grads` at their places.
    pub fn trained(
        places: Places,
        half: Slice<bf16>,
        full: Slice<f32>,
        grads: Slice<f32>,
        other: Option<Box<dyn Fallback>>,
    ) -> Bank {
        Bank { places, half, full, grads: Some(grads), trained: true, other }
    }

    /// The bf16 values of `slot`, and of the rows that fill its unit up.
    pub fn half(&self, slot: Slot) -> Slice<bf16> {
        match (self.places.find(slot), &self.other) {
            (Some((unit, off)), _) => self.half.range(unit.at + off..unit.at + unit.len),
            (None, Some(other)) => other.half(slot),
            (None, None) => unreachable!("a parameter that has no place"),
        }
    }

    /// The f32 values of `slot`; of a frozen model only vectors have them.
    pub fn full(&self, slot: Slot) -> Slice<f32> {
        match (self.places.find(slot), &self.other) {
            (Some((unit, off)), _) => {
                assert!(self.trained || !unit.matrix, "a frozen matrix is bf16 only");
                let at = if self.trained { unit.at } else { unit.full };
                self.full.range(at + off..at + unit.len)
            }
            (None, Some(other)) => other.full(slot),
            (None, None) => unreachable!("a parameter that has no place"),
        }
    }

    /// The gradient of `slot`, if it has one.
    pub fn grad(&self, slot: Slot) -> Option<Slice<f32>> {
        let (unit, off) = self.places.find(slot)?;
        self.grads.map(|grads| grads.range(unit.at + off..unit.at + unit.len))
    }
}

/// A model that is not trained.
pub struct Frozen {
    /// Its parameters.
    pub bank: Bank,
    _half: Buf<bf16>,
    _full: Buf<f32>,
}

impl Frozen {
    /// Uploads `params` of `model`.
    pub fn new(gpu: &Gpu, model: &Model, params: &[f32]) -> Result<Frozen> {
        let places = Places::of_model(model, 0);
        let mut half = vec![bf16::ZERO; places.end()];
        let mut full = vec![0.0; places.full_end()];
        for unit in places.units() {
            let from = &params[unit.host.clone()];
            for (to, value) in half[unit.at..].iter_mut().zip(from) {
                *to = bf16::from_f32(*value);
            }
            if !unit.matrix {
                full[unit.full..][..from.len()].copy_from_slice(from);
            }
        }
        let half = gpu.buf("the frozen model's weights", &half)?;
        let full = gpu.buf("the frozen model's vectors", &full)?;
        let (h, f) = (half.all(), full.all());
        let bank = Bank { places, half: h, full: f, grads: None, trained: false, other: None };
        Ok(Frozen { bank, _half: half, _full: full })
    }
}
