//! Text token by token on the device, for a batch of sequences at once; twin of
//! [`crate::models::decode`].
//!
//! ```text
//! memory  keys and values, states      turns   what is read, chosen and told to the host
//! step    one token through the model  sample  documents that a model writes
//! speed   what a token costs
//! ```
//!
//! A turn takes in one token of every sequence and chooses the one that follows, all on the device:
//! it is recorded once as a graph and replayed, and the host looks at what was chosen every so many
//! turns. What a sequence reads in a turn is what it chose, or what the host says; so prompts are
//! taken in token by token, and sequences need not be of one length. (Prompts in one pass forward
//! are still to come.) A text begins where the host says so, and at the model's separator.

mod memory;
mod sample;
mod speed;
mod step;
mod turns;

use anyhow::{Result, ensure};

use super::launch::{Gpu, Graph};
use super::model::whole::check;
use super::ops::sample::Choice;
use crate::models::{Config, MixerKind, Model};

pub use memory::{Memory, bytes_of};
pub use sample::{Writing, batch_of, sample};
pub use speed::{Speed, copy_bandwidth, measure};
pub use turns::{Token, Turn};

/// Tokens for which angles of rotary positions are made at most.
const LONGEST: usize = 1 << 22;

/// How much is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Sequences side by side.
    pub batch: usize,
    /// Tokens that a text may have; without attention there is no limit.
    pub capacity: usize,
    /// Turns between two looks of the host, at most.
    pub turns: usize,
}

/// A model in the middle of a batch of texts.
pub struct Decoder {
    gpu: Gpu,
    room: Room,
    step: step::Step,
    graph: Option<Graph>,
    /// Whether turns are recorded.
    record: bool,
    /// Turns made at all.
    made: u64,
    /// Upper bounds of what sequences hold: they may have begun anew by themselves.
    held: Vec<usize>,
    milliseconds: f32,
}

impl Decoder {
    /// Uploads `params` of `model`. Tokens are chosen by `choice` among the first `known`.
    pub fn new(
        gpu: &Gpu,
        model: &Model,
        params: &[f32],
        room: Room,
        choice: Choice,
        known: usize,
    ) -> Result<Decoder> {
        check(&model.config)?;
        let known_some = known > 0 && known <= model.config.vocab;
        ensure!(known_some, "there are {} tokens to choose from, not {known}", model.config.vocab);
        ensure!(room.batch > 0 && room.turns > 0 && room.capacity > 0, "nothing can be decoded");
        ensure!(
            room.capacity <= LONGEST || !attends(&model.config),
            "with attention a text has at most {LONGEST} tokens"
        );
        Ok(Decoder {
            gpu: gpu.clone(),
            step: step::Step::new(gpu, model, params, room, choice, known)?,
            graph: None,
            record: true,
            made: 0,
            held: vec![0; room.batch],
            milliseconds: 0.0,
            room,
        })
    }

    /// Queues every turn op by op from now on, instead of recording one.
    pub fn without_graph(mut self) -> Decoder {
        self.record = false;
        self
    }

    /// How much there is room for.
    pub fn room(&self) -> Room {
        self.room
    }

    /// What sequences remember.
    pub fn memory(&self) -> &Memory {
        self.step.memory()
    }

    /// Makes `turns` turns; `script` says what sequence `b` does in turn `t`, as `script(t, b)`.
    /// Gives what was chosen, `[turns, batch]`: [`NOTHING`](super::ops::sample::NOTHING) where
    /// logits say nothing.
    pub fn run(
        &mut self,
        turns: usize,
        mut script: impl FnMut(usize, usize) -> Turn,
    ) -> Result<Vec<u32>> {
        let Room { batch, capacity, turns: most } = self.room;
        ensure!(turns <= most, "{turns} turns at once, but there is room for {most}");
        let mut all = Vec::with_capacity(turns * batch);
        for turn in 0..turns {
            for (b, held) in self.held.iter_mut().enumerate() {
                let one = script(turn, b);
                *held = 1 + if one.begins() { 0 } else { *held };
                all.push(one);
            }
            let longest = self.held.iter().max().copied().unwrap_or(0);
            ensure!(
                longest <= capacity || !self.step.attends(),
                "a text has {longest} tokens, but there is room for {capacity}"
            );
        }
        self.step.turns().send(&self.gpu, &all);
        let from = self.gpu.mark();
        for _ in 0..turns {
            self.turn()?;
        }
        let to = self.gpu.mark();
        let chosen = self.step.turns().chosen(&self.gpu, turns)?;
        self.milliseconds = self.gpu.between(from, to)?;
        Ok(chosen)
    }

    /// The first turn is queued op by op, so that libraries load what they need; then one is
    /// recorded.
    fn turn(&mut self) -> Result<()> {
        let Decoder { gpu, step, graph, .. } = self;
        if self.record && self.made > 0 && graph.is_none() {
            *graph = Some(gpu.capture("decoding", || step.queue(gpu))?);
        }
        match graph {
            Some(graph) => graph.launch(|| step.queue(gpu)),
            None => step.queue(gpu),
        }
        self.made += 1;
        Ok(())
    }

    /// Milliseconds of the device for all turns of the last [`Decoder::run`].
    pub fn milliseconds(&self) -> f32 {
        self.milliseconds
    }

    /// Logits of the last turn, `[batch, vocab]`, those that tokens are chosen by: −∞ beyond the
    /// known ones.
    pub fn logits(&self) -> Result<Vec<f32>> {
        self.step.logits(&self.gpu)
    }

    /// Pretends that every sequence has read `context` tokens, for measuring what a long text
    /// costs: what they remember is random, positions go on.
    pub fn fill(&mut self, context: usize) -> Result<()> {
        let capacity = self.room.capacity;
        ensure!(
            context <= capacity || !self.step.attends(),
            "{context} tokens, but there is room for {capacity}"
        );
        self.held.fill(context);
        self.step.memory().fill(&self.gpu)?;
        self.step.turns().set_lengths(&self.gpu, context);
        self.gpu.status()
    }

    /// Bytes of weights that a turn reads.
    pub fn weight_bytes(&self) -> usize {
        self.step.weight_bytes()
    }
}

fn attends(config: &Config) -> bool {
    config.layers.contains(&MixerKind::Attention)
}
