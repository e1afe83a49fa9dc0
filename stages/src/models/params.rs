//! All parameters of a model in one flat f32 buffer, with names. Gradients and optimiser moments
//! use the same layout. Knows no model and no optimiser.
//!
//! A *file tensor* is what a published checkpoint holds; it consists of one or more *entries* that
//! lie one after the other in memory (`in_proj.weight` is x, B, C, z, A_log), so that parts can be
//! trained, decayed and initialised apart while one product still covers them all.

use std::ops::Range;
use std::sync::Arc;

use crate::train::philox::Philox;

/// A matrix (or a vector, `rows` = 1) in the flat buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// First element.
    pub offset: usize,
    /// Rows, the output dimension of a weight.
    pub rows: usize,
    /// Columns, the input dimension of a weight.
    pub cols: usize,
}

impl Slot {
    /// Elements.
    pub fn len(self) -> usize {
        self.rows * self.cols
    }

    /// Whether it holds nothing.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Where it lies.
    pub fn range(self) -> Range<usize> {
        self.offset..self.offset + self.len()
    }

    /// Its elements in `flat` (weights, gradients, a moment).
    pub fn of(self, flat: &[f32]) -> &[f32] {
        &flat[self.range()]
    }

    /// The same, mutable.
    pub fn of_mut(self, flat: &mut [f32]) -> &mut [f32] {
        &mut flat[self.range()]
    }

    /// This slot and `next`, which must follow it at once, as one matrix.
    pub fn join(self, next: Slot) -> Slot {
        assert!(
            self.cols == next.cols && self.range().end == next.offset,
            "slots are not adjacent"
        );
        Slot { rows: self.rows + next.rows, ..self }
    }
}

/// What an entry belongs to; freezing, per-layer clips and weight transfer select by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Token embedding (and the head, when tied).
    Embedding,
    /// A norm of block `0`.
    Norm(usize),
    /// The mixer of a block.
    Mixer(usize),
    /// The MLP of a block.
    Mlp(usize),
    /// The norm before the head.
    FinalNorm,
    /// The head, when not tied.
    Head,
}

impl Part {
    /// The block it is in, if it is in one.
    pub fn layer(self) -> Option<usize> {
        match self {
            Part::Norm(layer) | Part::Mixer(layer) | Part::Mlp(layer) => Some(layer),
            Part::Embedding | Part::FinalNorm | Part::Head => None,
        }
    }
}

/// How an entry starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// The same value everywhere.
    Constant(f32),
    /// Gaussian of this standard deviation, mean 0.
    Normal(f32),
    /// Uniform in ±bound.
    Uniform(f32),
    /// Convolution `[channels, taps]` that passes the current token: last tap 1, others 0.
    LastTap,
}

/// One named parameter.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Unique name, `model.layers.0.mlp.up_proj.weight` or `….in_proj.B`.
    pub name: String,
    /// Where it lies.
    pub slot: Slot,
    /// What it belongs to.
    pub part: Part,
    /// Whether weight decay applies (matrices yes; norms, biases, conv, D, A_log no).
    pub decay: bool,
    /// How it starts.
    pub init: Init,
}

/// One tensor as it is named and shaped in files: a run of entries.
#[derive(Clone, Debug)]
pub struct FileTensor {
    /// Published name.
    pub name: String,
    /// Published shape.
    pub shape: Vec<usize>,
    /// Where its elements lie in the flat buffer.
    pub range: Range<usize>,
    /// What it belongs to.
    pub part: Part,
}

/// Names and places of all parameters of a model.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    entries: Vec<Entry>,
    files: Vec<FileTensor>,
    len: usize,
}

/// A run of the flat buffer that is trained with or without weight decay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Where.
    pub range: Range<usize>,
    /// Whether weight decay applies.
    pub decay: bool,
}

impl Layout {
    /// Elements of the flat buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no parameter.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All entries in memory order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// All tensors as files have them, in memory order.
    pub fn files(&self) -> &[FileTensor] {
        &self.files
    }

    /// The entry called `name`.
    pub fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// The selected entries as runs, neighbours with the same decay merged: what an optimiser
    /// step or a clip walks over.
    pub fn spans(&self, select: impl Fn(&Entry) -> bool) -> Vec<Span> {
        let mut spans: Vec<Span> = Vec::new();
        for entry in self.entries.iter().filter(|entry| select(entry)) {
            let range = entry.slot.range();
            match spans.last_mut() {
                Some(last) if last.range.end == range.start && last.decay == entry.decay => {
                    last.range.end = range.end;
                }
                _ => spans.push(Span { range, decay: entry.decay }),
            }
        }
        spans
    }
}

/// Builds a [`Layout`] while the parts of a model declare what they need.
#[derive(Default)]
pub struct Builder {
    layout: Layout,
}

/// One part of a joined file tensor, see [`Builder::joined`].
pub struct Piece {
    /// Appended to the file tensor's name.
    pub suffix: &'static str,
    /// Its rows.
    pub rows: usize,
    /// Whether weight decay applies.
    pub decay: bool,
    /// How it starts.
    pub init: Init,
}

impl Builder {
    /// A weight `[rows, cols]`, decayed.
    pub fn matrix(
        &mut self,
        name: String,
        rows: usize,
        cols: usize,
        part: Part,
        init: Init,
    ) -> Slot {
        let piece = Piece { suffix: "", rows, decay: true, init };
        self.joined(name, vec![rows, cols], cols, part, &[piece])[0]
    }

    /// A vector of `len`, not decayed.
    pub fn vector(&mut self, name: String, len: usize, part: Part, init: Init) -> Slot {
        let piece = Piece { suffix: "", rows: 1, decay: false, init };
        self.joined(name, vec![len], len, part, &[piece])[0]
    }

    /// A bias of `len`, not decayed, one row each so that neighbours can be joined.
    pub fn column(&mut self, name: String, len: usize, part: Part, init: Init) -> Slot {
        let piece = Piece { suffix: "", rows: len, decay: false, init };
        self.joined(name, vec![len], 1, part, &[piece])[0]
    }

    /// One file tensor of `shape` made of `pieces` of `cols` columns, one below the other; gives
    /// a slot for each. A bias made of pieces has `cols` 1.
    pub fn joined(
        &mut self,
        name: String,
        shape: Vec<usize>,
        cols: usize,
        part: Part,
        pieces: &[Piece],
    ) -> Vec<Slot> {
        let start = self.layout.len;
        let mut slots = Vec::new();
        for piece in pieces {
            let slot = Slot { offset: self.layout.len, rows: piece.rows, cols };
            let name = format!("{name}{}", piece.suffix);
            let entry = Entry { name, slot, part, decay: piece.decay, init: piece.init };
            self.layout.entries.push(entry);
            self.layout.len += slot.len();
            slots.push(slot);
        }
        let range = start..self.layout.len;
        assert_eq!(shape.iter().product::<usize>(), range.len(), "shape of `{name}`");
        self.layout.files.push(FileTensor { name, shape, range, part });
        slots
    }

    /// The finished layout.
    pub fn finish(self) -> Arc<Layout> {
        Arc::new(self.layout)
    }
}

/// Values for every parameter of a layout: weights, gradients, or a moment.
#[derive(Clone, Debug)]
pub struct Params {
    layout: Arc<Layout>,
    /// The flat buffer.
    pub flat: Vec<f32>,
}

impl Params {
    /// All zero.
    pub fn zeros(layout: &Arc<Layout>) -> Params {
        Params { layout: layout.clone(), flat: vec![0.0; layout.len()] }
    }

    /// Fresh values; those of an entry depend on `seed` and its name alone.
    pub fn random(layout: &Arc<Layout>, seed: u64) -> Params {
        let mut params = Params::zeros(layout);
        for entry in layout.entries() {
            let random = Philox::new(seed, &entry.name);
            let out = entry.slot.of_mut(&mut params.flat);
            match entry.init {
                Init::Constant(value) => out.fill(value),
                Init::Normal(std) => random.fill_normal(std, out),
                Init::Uniform(bound) => random.fill_uniform(-bound, bound, out),
                Init::LastTap => {
                    let last = |row: &mut [f32]| row[entry.slot.cols - 1] = 1.0;
                    out.chunks_exact_mut(entry.slot.cols).for_each(last);
                }
            }
        }
        params
    }

    /// Names and places.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The values of `slot`.
    pub fn get(&self, slot: Slot) -> &[f32] {
        slot.of(&self.flat)
    }

    /// The values of `slot`, mutable.
    pub fn get_mut(&mut self, slot: Slot) -> &mut [f32] {
        slot.of_mut(&mut self.flat)
    }

    /// The values of the entry called `name`.
    pub fn named(&self, name: &str) -> Option<&[f32]> {
        self.layout.get(name).map(|entry| entry.slot.of(&self.flat))
    }

    /// Copies every file tensor of `from` that has the same name and shape here and is selected;
    /// gives how many were copied. Weight transfer between models of the same naming.
    pub fn copy_from(&mut self, from: &Params, select: impl Fn(&FileTensor) -> bool) -> usize {
        let mut copied = 0;
        for to in self.layout.files.iter().filter(|file| select(file)) {
            let same = |f: &&FileTensor| f.name == to.name && f.shape == to.shape;
            if let Some(found) = from.layout.files.iter().find(same) {
                self.flat[to.range.clone()].copy_from_slice(&from.flat[found.range.clone()]);
                copied += 1;
            }
        }
        copied
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_lie_together_and_spans_merge_neighbours_of_equal_decay() {
        let mut builder = Builder::default();
        builder.vector("norm".into(), 3, Part::Norm(0), Init::Constant(1.0));
        let piece = |suffix, rows, decay| Piece { suffix, rows, decay, init: Init::Constant(0.0) };
        let pieces = [piece(".x", 2, true), piece(".B", 1, true), piece(".A_log", 1, false)];
        let slots = builder.joined("in".into(), vec![4, 3], 3, Part::Mixer(0), &pieces);
        let layout = builder.finish();
        assert_eq!(slots[0].join(slots[1]).join(slots[2]), Slot { offset: 3, rows: 4, cols: 3 });
        assert_eq!(layout.len(), 15);
        let mixer = layout.spans(|entry| entry.part == Part::Mixer(0));
        let span = |range, decay| Span { range, decay };
        assert_eq!(mixer, [span(3..12, true), span(12..15, false)]);
        assert_eq!(layout.get("in.B").unwrap().slot, slots[1]);
    }
}
