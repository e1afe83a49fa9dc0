//! What a batch of sequences remembers: keys and values of attention, states of Discrete Mamba-2.

use anyhow::Result;
use bytemuck::Pod;
use half::bf16;

use super::Room;
use crate::gpu::launch::{Buf, Gpu, Slice};
use crate::gpu::model::ssm::Ssm;
use crate::gpu::ops::attention::Cache;
use crate::gpu::ops::ssm_step::State;
use crate::models::{Config, MixerKind};
use crate::ops::attention::Heads;
use crate::train::philox::Philox;

/// Random values that a long memory is filled with, over and over.
const RANDOM: usize = 1 << 20;

/// Keys and values are bf16, windows and states f32.
pub struct Memory {
    batch: usize,
    capacity: usize,
    /// Of each attention layer: keys, then values, `[batch, kv heads, capacity, dim]`.
    caches: Vec<[Buf<bf16>; 2]>,
    /// Layers that have a state.
    states: usize,
    /// `[layers, batch, channels, taps − 1]`.
    window: Buf<f32>,
    /// `[layers, batch, heads, width, state]`.
    state: Buf<f32>,
}

/// Elements of a layer's window and state, of one sequence.
fn state_len(config: &Config) -> [usize; 2] {
    let channels = config.d_inner() + 2 * config.heads * config.d_state;
    [channels * (config.d_conv - 1), config.d_inner() * config.d_state]
}

fn count(config: &Config, kind: MixerKind) -> usize {
    config.layers.iter().filter(|layer| **layer == kind).count()
}

/// Sizes of attention's heads.
pub(super) fn heads(config: &Config) -> Heads {
    Heads { query: config.heads, kv: config.kv_heads, dim: config.head_dim }
}

/// Bytes of keys and values, and of states, of `batch` texts of `tokens` tokens.
pub fn bytes_of(config: &Config, batch: usize, tokens: usize) -> [usize; 2] {
    let attention = count(config, MixerKind::Attention) * 2 * size_of::<bf16>();
    let [window, state] = state_len(config);
    let ssm = count(config, MixerKind::Ssm) * (window + state) * size_of::<f32>();
    let texts = tokens.saturating_mul(batch);
    [texts.saturating_mul(attention * config.d_kv()), ssm.saturating_mul(batch)]
}

impl Memory {
    /// Nothing remembered.
    pub fn new(gpu: &Gpu, config: &Config, room: Room) -> Result<Memory> {
        let Room { batch, capacity, .. } = room;
        let (len, what) = (batch * config.d_kv() * capacity, "keys and values");
        let caches = (0..count(config, MixerKind::Attention))
            .map(|_| Ok([gpu.alloc(what, len)?, gpu.alloc(what, len)?]));
        let states = count(config, MixerKind::Ssm);
        let [window, state] = state_len(config).map(|len| len * states * batch);
        Ok(Memory {
            batch,
            capacity,
            caches: caches.collect::<Result<_>>()?,
            states,
            window: gpu.zeros("windows of convolutions", window)?,
            state: gpu.zeros("states", state)?,
        })
    }

    /// The cache of the `at`-th attention layer.
    pub fn cache(&self, at: usize, length: Slice<i32>) -> Cache {
        let [k, v] = &self.caches[at];
        Cache { k: k.all(), v: v.all(), capacity: self.capacity, length }
    }

    /// The state of the `at`-th layer that has one.
    pub fn state(&self, at: usize, mixer: &Ssm) -> State {
        let part = |all: &Buf<f32>, len: usize| {
            let len = len * self.batch;
            all.all().range(at * len..(at + 1) * len)
        };
        State {
            window: part(&self.window, mixer.channels() * (mixer.taps - 1)),
            state: part(&self.state, mixer.inner() * mixer.state),
        }
    }

    /// Windows and states of all layers and how many layers these are.
    pub fn states(&self) -> Option<(usize, Slice<f32>, Slice<f32>)> {
        (self.states > 0).then(|| (self.states, self.window.all(), self.state.all()))
    }

    /// Bytes of keys and values, and of states.
    pub fn bytes(&self) -> [usize; 2] {
        let caches: usize = self.caches.iter().flatten().map(Buf::len).sum();
        let states = self.window.len() + self.state.len();
        [caches * size_of::<bf16>(), states * size_of::<f32>()]
    }

    /// Fills everything with random values.
    pub fn fill(&self, gpu: &Gpu) -> Result<()> {
        let mut values = vec![0.0; RANDOM];
        Philox::new(0, "memory").fill_normal(1.0, &mut values);
        let half: Vec<bf16> = values.iter().map(|value| bf16::from_f32(*value)).collect();
        self.caches.iter().flatten().for_each(|cache| scatter(gpu, cache.all(), &half));
        [&self.window, &self.state].into_iter().for_each(|to| scatter(gpu, to.all(), &values));
        gpu.status()
    }
}

/// Fills `to` with `values`, over and over.
fn scatter<T: Pod>(gpu: &Gpu, to: Slice<T>, values: &[T]) {
    let mut done = to.len().min(values.len());
    gpu.upload(to.range(0..done), &values[..done]);
    while done < to.len() {
        let more = done.min(to.len() - done);
        gpu.copy(to.range(0..more), to.range(done..done + more));
        done += more;
    }
}
