//! What happens between the tokens of a batch of sequences; see `kernels/decode.cu`.

use super::reduce::int;
use crate::gpu::launch::{Gpu, Slice};
use crate::launch;

/// In [`Turns::given`]: the sequence reads what it chose in the turn before.
pub const CHOSEN: u32 = u32::MAX;
/// In [`Turns::given`], beside a token: a text begins with it.
pub const FRESH: u32 = 1 << 31;

/// Blocks of a sequence's state in a layer in [`forget`]; they seldom have anything to do.
const FORGETTING: usize = 4;

/// What the host says about the next turns, and what came of them.
#[derive(Clone, Copy)]
pub struct Turns {
    /// What each sequence reads, `[turns, batch]`.
    pub given: Slice<u32>,
    /// Uniform numbers to choose by, `[turns, batch]`.
    pub chances: Slice<f32>,
    /// What each sequence chose, `[turns, batch]`.
    pub history: Slice<u32>,
    /// Turns made, one number.
    pub turn: Slice<i32>,
}

/// What a turn works with, `[batch]` each.
#[derive(Clone, Copy)]
pub struct Now {
    /// Tokens that are read.
    pub ids: Slice<u32>,
    /// Uniform numbers to choose by.
    pub chance: Slice<f32>,
    /// 1 where a text begins.
    pub fresh: Slice<u32>,
    /// Tokens that are chosen.
    pub chosen: Slice<u32>,
    /// Tokens that attention remembers.
    pub length: Slice<i32>,
}

fn check(turns: Turns, now: Now) -> usize {
    let (batch, all) = (now.ids.len(), turns.given.len());
    let parts = [now.chance.len(), now.fresh.len(), now.chosen.len(), now.length.len()];
    assert!(batch > 0 && parts.iter().all(|len| *len == batch), "shapes differ");
    let same = turns.chances.len() == all && turns.history.len() == all;
    assert!(same && all.is_multiple_of(batch) && turns.turn.len() == 1, "shapes differ");
    batch
}

/// Begins a turn. The caller makes no more of them than there is room for.
pub fn begin(gpu: &Gpu, turns: Turns, now: Now, separator: Option<u32>) {
    let batch = check(turns, now);
    let separator = separator.map_or(-1, |token| int(token as usize));
    launch!(gpu, "decode_begin", grid: [1, 1, 1], block: 256, shared: 0;
        turns.given, turns.chances, turns.turn, now.chosen, now.ids, now.chance, now.fresh,
        now.length, separator, int(batch));
}

/// Ends it.
pub fn end(gpu: &Gpu, turns: Turns, now: Now) {
    let batch = check(turns, now);
    launch!(gpu, "decode_end", grid: [1, 1, 1], block: 256, shared: 0;
        now.chosen, turns.history, now.length, turns.turn, int(batch));
}

/// Zeros `window` and `state`, `[layers, batch, …]` each, of sequences that begin a text.
pub fn forget(gpu: &Gpu, layers: usize, fresh: Slice<u32>, window: Slice<f32>, state: Slice<f32>) {
    let rows = layers * fresh.len();
    assert!(rows > 0 && window.len().is_multiple_of(rows) && state.len().is_multiple_of(rows));
    launch!(gpu, "decode_forget", grid: [FORGETTING, fresh.len(), layers], block: 256, shared: 0;
        fresh, window, state, int(window.len() / rows), int(state.len() / rows));
}
