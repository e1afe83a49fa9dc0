//! What sequences read and choose, turn by turn, and how the host sees it.

use anyhow::Result;

use super::Room;
use crate::gpu::launch::{Buf, Gpu};
use crate::gpu::ops::decode as op;
use crate::gpu::ops::sample::NOTHING;

/// What a sequence reads in a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// This one, with which a text begins: what was before is forgotten.
    Begin(u32),
    /// This one.
    Read(u32),
    /// What it chose in the turn before.
    Chosen,
}

/// What a sequence does in a turn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Turn {
    /// What it reads.
    pub token: Token,
    /// The uniform number, in `[0, 1)`, that it chooses by.
    pub chance: f32,
}

impl Turn {
    /// Whether a text begins, as far as the host knows.
    pub fn begins(self) -> bool {
        matches!(self.token, Token::Begin(_))
    }
}

/// The buffers.
pub struct Turns {
    batch: usize,
    given: Buf<u32>,
    chances: Buf<f32>,
    history: Buf<u32>,
    turn: Buf<i32>,
    ids: Buf<u32>,
    chance: Buf<f32>,
    fresh: Buf<u32>,
    chosen: Buf<u32>,
    length: Buf<i32>,
}

impl Turns {
    /// Nothing read, nothing chosen.
    pub fn new(gpu: &Gpu, room: Room) -> Result<Turns> {
        let (batch, all, what) = (room.batch, room.batch * room.turns, "tokens of turns");
        Ok(Turns {
            batch,
            given: gpu.zeros(what, all)?,
            chances: gpu.zeros(what, all)?,
            history: gpu.zeros(what, all)?,
            turn: gpu.zeros(what, 1)?,
            ids: gpu.zeros(what, batch)?,
            chance: gpu.zeros(what, batch)?,
            fresh: gpu.zeros(what, batch)?,
            chosen: gpu.buf(what, &vec![NOTHING; batch])?,
            length: gpu.zeros(what, batch)?,
        })
    }

    /// What the host and the device tell each other, as ops take it.
    pub fn all(&self) -> op::Turns {
        op::Turns {
            given: self.given.all(),
            chances: self.chances.all(),
            history: self.history.all(),
            turn: self.turn.all(),
        }
    }

    /// What a turn works with, as ops take it.
    pub fn now(&self) -> op::Now {
        op::Now {
            ids: self.ids.all(),
            chance: self.chance.all(),
            fresh: self.fresh.all(),
            chosen: self.chosen.all(),
            length: self.length.all(),
        }
    }

    /// Says what sequences do in the next turns, `[turns, batch]`.
    pub fn send(&self, gpu: &Gpu, turns: &[Turn]) {
        let word = |turn: &Turn| match turn.token {
            Token::Begin(token) => token | op::FRESH,
            Token::Read(token) => token & !op::FRESH,
            Token::Chosen => op::CHOSEN,
        };
        let given: Vec<u32> = turns.iter().map(word).collect();
        let chances: Vec<f32> = turns.iter().map(|turn| turn.chance).collect();
        gpu.upload(self.given.all().range(0..given.len()), &given);
        gpu.upload(self.chances.all().range(0..chances.len()), &chances);
        gpu.fill(self.turn.all(), 0);
    }

    /// What sequences chose in the first `turns` turns since; waits for them.
    pub fn chosen(&self, gpu: &Gpu, turns: usize) -> Result<Vec<u32>> {
        gpu.download(self.history.all().range(0..turns * self.batch))
    }

    /// Sets how many tokens each sequence holds.
    pub fn set_lengths(&self, gpu: &Gpu, tokens: usize) {
        // Without attention, where alone a text may be longer, nobody reads it.
        let length = i32::try_from(tokens).unwrap_or(i32::MAX / 2);
        gpu.upload(self.length.all(), &vec![length; self.batch]);
    }
}
