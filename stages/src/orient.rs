//! Phase 1 of MOHAWK: every layer's mixing matrix is brought close to the teacher's attention.
//!
//! Each layer reads the teacher's own input of that layer, so layers are independent: each has its
//! own clip, optimiser step and reaction to NaN, and a step over all layers gives what steps over
//! single layers give. Trained are B, C, A_log, their convolution and D. Cost: a teacher pass and,
//! per layer, the tiles of M and A twice.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use engine::stage::{Context, Cpu, In, Out, Ports, Stage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::models::params::Entry;
use crate::models::start::{Start, from_attention, scale_heads};
use crate::models::transfer::{Sizes, student_config};
use crate::models::{Config, Mixer, Part, ssm};
use crate::ops::Dims;
use crate::ops::orient::{Sums, Teacher};
use crate::train::device::Device;
use crate::train::layer::{self, Layer, Training, start};
use crate::train::learner::Learner;
use crate::train::run::{Course, Curve, SHARDS, Split, Trainer, drive, each_shard, rounded};
use crate::train::schedule::Wsd;
use crate::train::source::{Feed, Seen, Source, Want};

/// Parameters of `orient`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Numbers of the layers to orient, from 0; all when empty.
    pub layers: Vec<usize>,
    /// Without `layers`: numbers of the layers that keep the teacher's attention (a hybrid).
    pub keep_attention: Vec<usize>,
    /// Optimiser steps.
    pub updates: u64,
    /// Tokens an update; a multiple of twice the sequence length.
    pub batch: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Fraction of the updates in which the rate rises.
    pub warmup: f64,
    /// Fraction of the updates in which the rate falls, at the end.
    pub decay: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Largest norm of a layer's gradient.
    pub clip: f64,
    /// State size N of a student's head.
    pub d_state: usize,
    /// Taps of the convolution.
    pub d_conv: usize,
    /// Chunk length of the scan.
    pub chunk: usize,
    /// Where the mixers begin.
    pub init: Start,
    /// Decides random weights and the order of sequences.
    pub seed: u64,
    /// Without `signals`: use so many sequences of the tokens, chosen by `seed`; 0 for all.
    pub sequences: usize,
    /// Sequences kept apart, at the end, for figures before and after.
    pub held_out: usize,
    /// Updates between checkpoints; 0 for none.
    pub checkpoint_every: u64,
    /// Updates between points of the curve.
    pub metrics_every: u64,
    /// Where to train.
    pub device: Device,
    /// Tokens that a GPU works on at a time (it adds gradients up over a batch); 0: by the size of the
    /// model.
    pub micro_batch: usize,
}

impl Default for Params {
    fn default() -> Params {
        Params {
            layers: Vec::new(),
            keep_attention: Vec::new(),
            updates: 600,
            batch: 1024,
            lr: 3e-3,
            warmup: 0.05,
            decay: 0.2,
            weight_decay: 0.1,
            clip: 1.0,
            d_state: 32,
            d_conv: 4,
            chunk: 32,
            init: Start::Default,
            seed: 17,
            sequences: 0,
            held_out: 16,
            checkpoint_every: 200,
            metrics_every: 20,
            device: Device::Auto,
            micro_batch: 0,
        }
    }
}

/// The stage.
pub struct Orient;

impl Stage for Orient {
    const NAME: &'static str = "orient";
    const VERSION: u32 = 3;
    const DOC: &'static str =
        "Phase 1: trains the mixing matrix of each layer towards the teacher's attention.";
    const CPU: Cpu = Cpu::All;
    const GPU: bool = true;
    type Params = Params;

    fn ports() -> Ports {
        const INPUTS: &[In] = &[
            In::one("teacher", "the transformer to imitate").tensors(),
            In::one("tokens", "token sequences to compare on").optional(),
            In::many("signals", "cached signals of the layers, instead of `tokens`")
                .tensors()
                .optional(),
        ];
        const OUTPUTS: &[Out] = &[
            Out::many("mixer", "mixer.safetensors", "a mixer for each layer"),
            Out::one("metrics", "metrics.json", "loss curve, and distances before and after"),
        ];
        Ports { inputs: INPUTS, outputs: OUTPUTS }
    }

    fn check(params: &Params) -> Vec<(String, String)> {
        crate::train::run::check(params.lr, params.warmup, params.decay, params.updates)
    }

    fn run(params: &Params, ctx: &mut Context) -> Result<()> {
        let mut source = Source::open(ctx, Want::Attention, params.sequences, params.seed)?;
        let split = Split::of(source.sequences(), source.seq(), params.batch, params.held_out)?;
        let sizes = Sizes { state: params.d_state, taps: params.d_conv, chunk: params.chunk };
        let config = student_config(&source.model.config, sizes, &[]);
        config.check()?;
        let layers = layers(params, &source, &config)?;
        source.only(layers.iter().map(|layer| layer.number));
        #[cfg(any(feature = "cuda", feature = "emulate"))]
        if params.device == Device::Cuda {
            return on_gpu(params, ctx, source, (&config, layers), &split);
        }
        params.device.require_cpu(Orient::NAME)?;
        let mut phase = Phase::new(source, &config, layers, split.clone(), ctx.threads());
        if params.init == Start::Attention {
            phase.scale_starts(&split);
        }
        let before = phase.held_out(&split);
        let curve = drive(ctx, &course(params, &split), &mut phase)?;
        let after = phase.held_out(&split);
        finish(ctx, &config, &phase.layers, &curve, (&before, &after))
    }
}

fn course(params: &Params, split: &Split) -> Course {
    let rate = Wsd::new(params.lr, params.updates, params.warmup, params.decay);
    split.course(rate, params.seed, (params.checkpoint_every, params.metrics_every))
}

/// The layers to orient, at their starts (but for the scale of `init: attention`).
fn layers(params: &Params, source: &Source, config: &Config) -> Result<Vec<Layer>> {
    let numbers = layer::numbers(&params.layers, &params.keep_attention, config.layers.len())?;
    let mut layers: Vec<Layer> = Vec::new();
    let training = Training { decay: params.weight_decay, clip: params.clip };
    for number in numbers {
        let teacher = (&source.model, &source.params);
        source.ensure_layer(number)?;
        ensure!(
            layers.iter().all(|l| l.number != number),
            "layer {number} is listed twice in `layers`"
        );
        let (block, mut weights) = start(config, number, params.seed, teacher)?;
        params.init.apply(layer::ssm(&block), &mut weights.flat, (params.seed, number));
        if let (Start::Attention, Mixer::Attention(attention)) =
            (params.init, &source.model.blocks[number].mixer)
        {
            let teacher = &source.params.flat;
            from_attention(layer::ssm(&block), &mut weights.flat, attention, teacher)?;
        }
        layers.push(Layer::new(number, block, weights, training, trained));
    }
    Ok(layers)
}

/// Writes mixers and metrics.
fn finish(
    ctx: &mut Context,
    config: &Config,
    layers: &[Layer],
    curve: &Curve,
    (before, after): (&[Sums], &[Sums]),
) -> Result<()> {
    for layer in layers {
        let path = ctx.output_item("mixer", layer.number as u32)?;
        layer.save(&path, config, |part| part == Part::Mixer(layer.number))?;
    }
    let last = report(layers, before, after);
    std::fs::write(ctx.output("metrics")?, serde_json::to_vec_pretty(&curve.to_json(last))?)?;
    Ok(())
}

/// The phase on a GPU, from the same starts.
#[cfg(any(feature = "cuda", feature = "emulate"))]
fn on_gpu(
    params: &Params,
    ctx: &mut Context,
    mut source: Source,
    (config, mut layers): (&Config, Vec<Layer>),
    split: &Split,
) -> Result<()> {
    use crate::gpu::phases::{micro_batch, orient};

    if params.init == Start::Attention {
        // Two sequences say how large B and C have to be; the CPU asks them.
        let few = Split { batch: SHARDS, ..split.clone() };
        let mut phase = Phase::new(source, config, layers, few.clone(), ctx.threads());
        phase.scale_starts(&few);
        (source, layers) = (phase.source, phase.layers);
    }
    let micro = micro_batch(config, params.micro_batch, split.batch, split.seq)?;
    let gpu = crate::gpu::open()?;
    let mut driver = orient::driver(&gpu, source, config, &layers, (split.batch, micro))?;
    let held: Vec<usize> = split.held_out().concat();
    let before = driver.work.held_out(&mut driver.batch, &held)?;
    let curve = drive(ctx, &course(params, split), &mut driver)?;
    let after = driver.work.held_out(&mut driver.batch, &held)?;
    driver.learners.give_back(layers.iter_mut().map(|layer| &mut layer.learner))?;
    finish(ctx, config, &layers, &curve, (&before, &after))
}

struct Phase {
    source: Source,
    threads: usize,
    layers: Vec<Layer>,
    shards: Vec<Shard>,
    weight: f32,
}

struct Shard {
    dims: Dims,
    feed: Feed,
    x_nd: Vec<f32>,
    inv_n: Vec<f32>,
    saved: ssm::Saved,
    scratch: ssm::Scratch,
    grads: Vec<Vec<f32>>,
    sums: Vec<Sums>,
}

/// Whether phase 1 trains the entry.
pub(crate) fn trained(entry: &Entry) -> bool {
    let ends = [".B", ".C", ".A_log", "conv1d.weight", "conv1d.bias", "D"];
    matches!(entry.part, Part::Mixer(_)) && ends.iter().any(|end| entry.name.ends_with(end))
}

impl Phase {
    fn new(
        source: Source,
        config: &Config,
        layers: Vec<Layer>,
        split: Split,
        threads: usize,
    ) -> Phase {
        let dims = Dims { batch: split.batch / SHARDS, seq: split.seq };
        let shard = |_| {
            let mixer = layers[0].ssm();
            Shard {
                dims,
                feed: source.feed(dims.batch),
                x_nd: vec![0.0; dims.tokens() * config.d_model],
                inv_n: vec![0.0; dims.tokens()],
                saved: mixer.saved(dims),
                scratch: mixer.scratch(dims),
                grads: layers.iter().map(|layer| vec![0.0; layer.layout.len()]).collect(),
                sums: vec![Sums::default(); layers.len()],
            }
        };
        let shards = (0..SHARDS).map(shard).collect();
        let weight = 1.0 / (split.batch * config.heads) as f32;
        Phase { source, threads, layers, shards, weight }
    }

    /// Runs one shard over `sequences`; with gradients when `learn`.
    fn work(
        source: &Source,
        layers: &[Layer],
        weight: f32,
        shard: &mut Shard,
        sequences: &[usize],
        learn: bool,
    ) {
        let Shard { dims, feed, x_nd, inv_n, saved, scratch, grads, sums } = shard;
        source.attention(feed, sequences, |seen: Seen, teacher: Teacher| {
            let Some(at) = layers.iter().position(|layer| layer.number == seen.layer) else {
                return;
            };
            let (layer, params) = (&layers[at], &layers[at].learner.params);
            layer.block.norm1.forward(params, seen.u_nd, x_nd, inv_n);
            let scene = source.model.scene(*dims, seen.starts_n);
            let grads = learn.then(|| {
                grads[at].fill(0.0);
                &mut grads[at][..]
            });
            let mixer = layer.ssm();
            mixer.forward_matrix(params, scene, x_nd, saved);
            sums[at] = mixer.orient(params, scene, x_nd, teacher, weight, saved, scratch, grads);
        });
    }

    /// Mean distance and ‖A‖ of each layer on the held-out sequences.
    fn held_out(&mut self, split: &Split) -> Vec<Sums> {
        let mut totals = vec![Sums::default(); self.layers.len()];
        let Phase { source, threads, layers, shards, weight } = self;
        for batch in split.held_out() {
            each_shard(*threads, shards, |i, shard| {
                let own = &batch[i * shard.dims.batch..][..shard.dims.batch];
                Phase::work(source, layers, *weight, shard, own, false);
            });
            for shard in shards.iter() {
                for (total, sums) in totals.iter_mut().zip(&shard.sums) {
                    total.distance += sums.distance;
                    total.attention += sums.attention;
                }
            }
        }
        let count = (split.held * self.source.model.config.heads) as f64;
        let mean = |sums: Sums| Sums {
            distance: sums.distance / count,
            attention: sums.attention / count,
        };
        totals.into_iter().map(mean).collect()
    }

    /// `init: attention`: scales B and C of each head by what one batch asks for.
    fn scale_starts(&mut self, split: &Split) {
        let Phase { source, layers, shards, .. } = self;
        let Shard { dims, feed, x_nd, inv_n, saved, .. } = &mut shards[0];
        let seq = split.seq;
        let sequences: Vec<usize> = (0..dims.batch).collect();
        let mut products = BTreeMap::new();
        source.attention(feed, &sequences, |seen, teacher| {
            let Some(layer) = layers.iter().find(|layer| layer.number == seen.layer) else {
                return;
            };
            let (mixer, params) = (layer.ssm(), &layer.learner.params);
            layer.block.norm1.forward(params, seen.u_nd, x_nd, inv_n);
            mixer.forward_matrix(params, source.model.scene(*dims, seen.starts_n), x_nd, saved);
            let shape = mixer.shape(*dims);
            let mut sums = vec![(0.0, 0.0); shape.heads];
            for (sequence, head) in
                (0..dims.batch).flat_map(|b| (0..shape.heads).map(move |h| (b, h)))
            {
                let m = mixer.matrix(params, *dims, (sequence, head), saved);
                let a = teacher.matrix(shape, seen.starts_n, (sequence, head));
                for i in 0..seq * seq {
                    sums[head].0 += f64::from(m[i]) * f64::from(a[i]);
                    sums[head].1 += f64::from(m[i]) * f64::from(m[i]);
                }
            }
            products.insert(seen.layer, sums);
        });
        for layer in layers {
            let mixer = layer::ssm(&layer.block);
            scale_heads(mixer, &mut layer.learner.params, &products[&layer.number]);
        }
    }
}

fn report(layers: &[Layer], before: &[Sums], after: &[Sums]) -> Value {
    let one = |((layer, before), after): ((&Layer, &Sums), &Sums)| {
        json!({
            "layer": layer.number,
            "before": rounded(before.distance),
            "after": rounded(after.distance),
            "attention": rounded(after.attention),
            "skipped": layer.learner.guard.skipped,
        })
    };
    let layers: Vec<Value> = layers.iter().zip(before).zip(after).map(one).collect();
    json!({ "loss": "mean Frobenius distance", "layers": layers })
}

impl Trainer for Phase {
    fn update(
        &mut self,
        ctx: &Context,
        update: u64,
        rate: f32,
        sequences: &[usize],
    ) -> Result<Vec<(String, f64)>> {
        let Phase { source, threads, layers, shards, weight } = self;
        each_shard(*threads, shards, |i, shard| {
            let own = &sequences[i * shard.dims.batch..][..shard.dims.batch];
            Phase::work(source, layers, *weight, shard, own, true);
        });
        let mut values = Vec::new();
        let mut total = 0.0;
        for (at, layer) in layers.iter_mut().enumerate() {
            let sum = |pick: fn(&Sums) -> f64| {
                shards.iter().map(|shard| pick(&shard.sums[at])).sum::<f64>() * f64::from(*weight)
            };
            let loss = sum(|sums| sums.distance);
            let grads = shards.iter().map(|shard| &shard.grads[at][..]);
            layer.learner.step(ctx, update, rate, loss, grads)?;
            values.push((format!("loss.{}", layer.number), loss));
            values.push((format!("attention.{}", layer.number), sum(|sums| sums.attention)));
            total += loss;
        }
        values.push(("loss".into(), total / layers.len() as f64));
        Ok(values)
    }

    fn learners(&mut self) -> Vec<&mut Learner> {
        self.layers.iter_mut().map(|layer| &mut layer.learner).collect()
    }
}
