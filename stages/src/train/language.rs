//! Next-token loss and gradients of a batch, cut into shards that run side by side. Knows no
//! optimiser and no files.

use crate::models::{Keep, Model, Params, Pass, Trained};
use crate::ops::Dims;
use crate::ops::cross_entropy::{self, IGNORE};
use crate::ops::vector::add;
use crate::train::run::{SHARDS, each_shard};

/// Bytes of logits that a shard holds at a time: they should stay in a core's cache.
const LOGIT_BYTES: usize = 256 << 10;

/// Everything that a batch of fixed size needs, made once.
pub struct Language {
    seq: usize,
    batch: usize,
    shards: Vec<Shard>,
}

struct Shard {
    pass: Pass,
    targets_n: Vec<u32>,
    logits_nv: Vec<f32>,
    grads: Params,
    loss: f64,
}

impl Language {
    /// For batches of `batch` sequences of `seq` tokens. `keep` as in [`Model::pass`].
    pub fn new(model: &Model, batch: usize, seq: usize, keep: Keep) -> Language {
        assert!(batch > 0 && seq > 1, "a batch needs a sequence, and a sequence a next token");
        let count = SHARDS.min(batch);
        let rows = (LOGIT_BYTES / 4 / model.config.vocab).clamp(1, batch.div_ceil(count) * seq);
        let shard = |i: usize| {
            let batch = batch / count + usize::from(i < batch % count);
            let dims = Dims { batch, seq };
            let grads = match keep {
                Keep::Backward => Params::zeros(&model.layout),
                Keep::Nothing | Keep::Matrices => Params::zeros(&Default::default()),
            };
            Shard {
                pass: model.pass(dims, keep),
                targets_n: vec![IGNORE; dims.tokens()],
                logits_nv: vec![0.0; rows * model.config.vocab],
                grads,
                loss: 0.0,
            }
        };
        Language { seq, batch, shards: (0..count).map(shard).collect() }
    }

    /// Sequences of a full batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens of a sequence.
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// Takes in up to [`Language::batch`] sequences: `fill` writes the tokens of sequence `i` of
    /// `count`. Every token but the last of a sequence is scored by its successor.
    pub fn load(&mut self, count: usize, mut fill: impl FnMut(usize, &mut [u32])) {
        assert!(count <= self.batch, "{count} sequences in a batch of {}", self.batch);
        let mut next = 0;
        for shard in &mut self.shards {
            let tokens = shard.pass.tokens_n.chunks_exact_mut(self.seq);
            for (tokens, targets) in tokens.zip(shard.targets_n.chunks_exact_mut(self.seq)) {
                targets.fill(IGNORE);
                if next < count {
                    fill(next, tokens);
                    targets[..self.seq - 1].copy_from_slice(&tokens[1..]);
                }
                next += 1;
            }
        }
    }

    fn scored(&self) -> usize {
        let count = |shard: &Shard| shard.targets_n.iter().filter(|t| **t != IGNORE).count();
        self.shards.iter().map(count).sum()
    }

    /// Mean loss in nats over the scored tokens that were loaded, and their number.
    pub fn loss(&mut self, model: &Model, params: &Params, threads: usize) -> (f64, usize) {
        each_shard(threads, &mut self.shards, |_, shard| shard.forward(model, params, None));
        self.mean()
    }

    /// The same, and [`Language::grads`] of all `trained` parameters.
    pub fn step(
        &mut self,
        model: &Model,
        params: &Params,
        trained: Trained,
        threads: usize,
    ) -> (f64, usize) {
        let weight = 1.0 / self.scored() as f32;
        each_shard(threads, &mut self.shards, |_, shard| {
            shard.grads.flat.fill(0.0);
            shard.forward(model, params, Some((trained, weight)));
            model.backward(&params.flat, &mut shard.pass, trained, &mut shard.grads.flat);
        });
        let (first, rest) = self.shards.split_at_mut(1);
        rest.iter().for_each(|shard| add(&mut first[0].grads.flat, &shard.grads.flat));
        self.mean()
    }

    fn mean(&self) -> (f64, usize) {
        let scored = self.scored();
        (self.shards.iter().map(|shard| shard.loss).sum::<f64>() / scored as f64, scored)
    }

    /// Gradients of the mean loss after [`Language::step`].
    pub fn grads(&self) -> &Params {
        &self.shards[0].grads
    }
}

impl Shard {
    /// Forward and the loss; with `back`, also everything up to the gradient of the final norm.
    fn forward(&mut self, model: &Model, params: &Params, back: Option<(Trained, f32)>) {
        let Shard { pass, targets_n, logits_nv, grads, loss } = self;
        let v = model.config.vocab;
        model.forward(&params.flat, pass, |_, _, _| {});
        let (step, n) = (logits_nv.len() / v, targets_n.len());
        *loss = 0.0;
        for first in (0..n).step_by(step) {
            let rows = first..n.min(first + step);
            let logits = &mut logits_nv[..rows.len() * v];
            model.logits(&params.flat, pass, rows.clone(), logits);
            let weight = back.map_or(0.0, |(_, weight)| weight);
            *loss += cross_entropy::hard(v, logits, &targets_n[rows.clone()], weight);
            if let Some((trained, _)) = back {
                model.head_backward(&params.flat, pass, rows, logits, trained, &mut grads.flat);
            }
        }
    }
}
