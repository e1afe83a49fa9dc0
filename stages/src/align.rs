//! Phase 2 of MOHAWK: every block's output is brought close to the teacher's.
//!
//! Each block reads the teacher's own input of that layer (never the student's stream), so layers
//! are independent as in phase 1. The loss is the mean over tokens of the Euclidean distance, not
//! squared. By default the block's norms and MLP are the teacher's and stay frozen.

use anyhow::{Context as _, Result, ensure};
use engine::stage::{Context, Cpu, In, Out, Ports, Stage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::models::params::Entry;
use crate::models::start::Start;
use crate::models::transfer::{Sizes, student_config};
use crate::models::{Block, Config, Part, Trained, block, file};
use crate::ops::{Dims, distance};
use crate::train::device::Device;
use crate::train::layer::{self, Layer, Training, describe, start};
use crate::train::learner::Learner;
use crate::train::run::{Course, Curve, SHARDS, Split, Trainer, drive, each_shard, rounded};
use crate::train::schedule::Wsd;
use crate::train::source::{Feed, Seen, Source, Want};

/// What is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The output of the whole block.
    #[default]
    Block,
    /// The output of the mixer.
    Mixer,
    /// Both, added.
    Both,
}

/// Parameters of `align`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Numbers of the layers to align; all that `mixers` brings when empty (without `mixers`: all
    /// layers of the teacher).
    pub layers: Vec<usize>,
    /// Without `layers` and `mixers`: numbers of the layers that keep the teacher's attention (a
    /// hybrid).
    pub keep_attention: Vec<usize>,
    /// What is compared with the teacher.
    pub target: Target,
    /// Whether the block's norms and MLP are trained too.
    pub train_mlp: bool,
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
    /// Without `mixers`: state size N of a student's head.
    pub d_state: usize,
    /// Without `mixers`: taps of the convolution.
    pub d_conv: usize,
    /// Without `mixers`: chunk length of the scan.
    pub chunk: usize,
    /// Without `mixers`: where the mixers begin (not `attention`).
    pub init: Start,
    /// Decides the order of sequences (and random weights, without `mixers`).
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
            target: Target::Block,
            train_mlp: false,
            updates: 500,
            batch: 1024,
            lr: 2e-3,
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
pub struct Align;

impl Stage for Align {
    const NAME: &'static str = "align";
    const VERSION: u32 = 3;
    const DOC: &'static str = "Phase 2: trains each block's output towards the teacher's.";
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
            In::many("mixers", "oriented mixers; fresh ones without them").tensors().optional(),
        ];
        const OUTPUTS: &[Out] = &[
            Out::many("block", "block.safetensors", "a block for each layer"),
            Out::one("metrics", "metrics.json", "loss curve, and distances before and after"),
        ];
        Ports { inputs: INPUTS, outputs: OUTPUTS }
    }

    fn check(params: &Params) -> Vec<(String, String)> {
        let Params { lr, warmup, decay, updates, .. } = *params;
        let mut found = crate::train::run::check(lr, warmup, decay, updates);
        if params.init == Start::Attention {
            let what = "`attention` is a start of `orient`; here it may be any other";
            found.push(("init".into(), what.into()));
        }
        found
    }

    fn run(params: &Params, ctx: &mut Context) -> Result<()> {
        let mut source = Source::open(ctx, Want::Hidden, params.sequences, params.seed)?;
        let split = Split::of(source.sequences(), source.seq(), params.batch, params.held_out)?;
        let (config, layers) = layers(params, ctx, &source)?;
        source.only(layers.iter().map(|layer| layer.number));
        #[cfg(any(feature = "cuda", feature = "emulate"))]
        if params.device == Device::Cuda {
            return on_gpu(params, ctx, source, (&config, layers), &split);
        }
        params.device.require_cpu(Align::NAME)?;
        let mut phase = Phase::new(params, source, &config, layers, &split, ctx.threads());
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

/// Writes blocks and metrics.
fn finish(
    ctx: &mut Context,
    config: &Config,
    layers: &[Layer],
    curve: &Curve,
    (before, after): (&[Figures], &[Figures]),
) -> Result<()> {
    for layer in layers {
        let path = ctx.output_item("block", layer.number as u32)?;
        layer.save(&path, config, |_| true)?;
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
    source: Source,
    (config, mut layers): (&Config, Vec<Layer>),
    split: &Split,
) -> Result<()> {
    use crate::gpu::phases::align::{HeldOut, driver};

    let micro =
        crate::gpu::phases::micro_batch(config, params.micro_batch, split.batch, split.seq)?;
    let (gpu, how) = (crate::gpu::open()?, (params.target, params.train_mlp));
    let mut driver = driver(&gpu, source, config, &layers, (split.batch, micro), how)?;
    let held: Vec<usize> = split.held_out().concat();
    let figures = |of: HeldOut| {
        let all = of.relative.iter().copied().enumerate();
        Figures::new(of.sum / (held.len() * split.seq) as f64, all, split.seq)
    };
    let found = driver.work.held_out(&mut driver.batch, &held)?;
    let before: Vec<Figures> = found.into_iter().map(figures).collect();
    let curve = drive(ctx, &course(params, split), &mut driver)?;
    let found = driver.work.held_out(&mut driver.batch, &held)?;
    let after: Vec<Figures> = found.into_iter().map(figures).collect();
    driver.learners.give_back(layers.iter_mut().map(|layer| &mut layer.learner))?;
    finish(ctx, config, &layers, &curve, (&before, &after))
}

/// The student's configuration and the blocks to train: with the mixers of phase 1, or fresh ones.
fn layers(params: &Params, ctx: &Context, source: &Source) -> Result<(Config, Vec<Layer>)> {
    let (teacher, training) = (
        (&source.model, &source.params),
        Training { decay: params.weight_decay, clip: params.clip },
    );
    let select = |entry: &Entry| params.train_mlp || matches!(entry.part, Part::Mixer(_));
    let mut mixers = Vec::new();
    for (_, tensors) in ctx.tensors_list("mixers")? {
        let (config, number) = describe(&tensors).context("input `mixers`")?;
        mixers.push((number, config, tensors));
    }
    let sizes = Sizes { state: params.d_state, taps: params.d_conv, chunk: params.chunk };
    let config = match mixers.first() {
        Some((_, config, _)) => config.clone(),
        None => student_config(&source.model.config, sizes, &[]),
    };
    config.check()?;
    let numbers = match (&params.layers[..], mixers.is_empty()) {
        ([], false) => mixers.iter().map(|(number, ..)| *number).collect(),
        (given, _) => layer::numbers(given, &params.keep_attention, config.layers.len())?,
    };
    let mut layers: Vec<Layer> = Vec::new();
    for number in numbers {
        ensure!(layers.iter().all(|l| l.number != number), "layer {number} is there twice");
        source.ensure_layer(number)?;
        let (block, mut weights) = start(&config, number, params.seed, teacher)?;
        params.init.apply(layer::ssm(&block), &mut weights.flat, (params.seed, number));
        if !mixers.is_empty() {
            let found = mixers.iter().find(|(n, ..)| *n == number);
            let (_, own, tensors) = found.with_context(|| {
                format!("`layers` asks for layer {number}, but no artifact of `mixers` holds it")
            })?;
            ensure!(*own == config, "the mixers of `mixers` are of different students");
            file::load(&mut weights, tensors, |file| file.part == Part::Mixer(number))
                .with_context(|| format!("mixer of layer {number}"))?;
        }
        layers.push(Layer::new(number, block, weights, training, select));
    }
    Ok((config, layers))
}

struct Phase {
    target: Target,
    trained: Trained,
    source: Source,
    threads: usize,
    layers: Vec<Layer>,
    shards: Vec<Shard>,
    weight: f32,
}

struct Shard {
    dims: Dims,
    feed: Feed,
    saved: block::Saved,
    scratch: block::Scratch,
    teacher: block::Saved,
    out_nd: Vec<f32>,
    d_nd: Vec<f32>,
    d_mid_nd: Vec<f32>,
    grads: Vec<Vec<f32>>,
    /// Of each layer: Σ of distances.
    sums: Vec<f64>,
    /// Of each layer, held-out only: ‖s − t‖/‖t‖ of every token.
    relative: Vec<Vec<f32>>,
}

/// Figures of a layer on held-out text.
#[derive(Clone, Copy, Debug)]
struct Figures {
    distance: f64,
    median: f64,
    first: f64,
}

impl Figures {
    /// From the mean of what is compared and the relative distances of tokens, each with its number
    /// in sequences of `seq`.
    fn new(distance: f64, relative: impl Iterator<Item = (usize, f32)>, seq: usize) -> Figures {
        let (first, rest): (Vec<_>, Vec<_>) = relative.partition(|(i, _)| i.is_multiple_of(seq));
        let median = |of: Vec<(usize, f32)>| median(of.into_iter().map(|(_, v)| v).collect());
        Figures { distance, median: median(rest), first: median(first) }
    }
}

impl Phase {
    fn new(
        params: &Params,
        source: Source,
        config: &Config,
        layers: Vec<Layer>,
        split: &Split,
        threads: usize,
    ) -> Phase {
        let dims = Dims { batch: split.batch / SHARDS, seq: split.seq };
        let wide = || vec![0.0; dims.tokens() * config.d_model];
        let shard = |_| {
            let block = &layers[0].block;
            Shard {
                dims,
                feed: source.feed(dims.batch),
                saved: block.saved(dims, true),
                scratch: block.scratch(dims),
                teacher: source.model.blocks[layers[0].number].saved(dims, false),
                out_nd: wide(),
                d_nd: wide(),
                d_mid_nd: wide(),
                grads: layers.iter().map(|layer| vec![0.0; layer.layout.len()]).collect(),
                sums: vec![0.0; layers.len()],
                relative: vec![Vec::new(); layers.len()],
            }
        };
        let shards = (0..SHARDS).map(shard).collect();
        let weight = 1.0 / (split.batch * split.seq) as f32;
        let mlp = params.train_mlp;
        let trained = Trained { norms: mlp, mlps: mlp, ..Trained::MIXERS };
        Phase { target: params.target, trained, source, threads, layers, shards, weight }
    }

    /// Runs one shard; `learn` forms gradients, else relative distances are collected.
    fn work(&self, layers: &[Layer], shard: &mut Shard, sequences: &[usize], learn: bool) {
        let Shard { dims, feed, saved, scratch, teacher, out_nd, d_nd, d_mid_nd, .. } = shard;
        let Shard { grads, sums, relative, .. } = shard;
        let (source, trained, d) = (&self.source, self.trained, self.source.model.config.d_model);
        source.hidden(feed, sequences, |Seen { layer, starts_n, u_nd }, target_nd| {
            let Some(at) = layers.iter().position(|l| l.number == layer) else { return };
            let (block, params): (&Block, &[f32]) = (&layers[at].block, &layers[at].learner.params);
            let scene = source.model.scene(*dims, starts_n);
            block.forward_mixer(params, scene, u_nd, saved);
            sums[at] = 0.0;
            let wants_mixer = self.target != Target::Block;
            if wants_mixer {
                let own = &source.model.blocks[layer];
                own.forward_mixer(&source.params.flat, scene, u_nd, teacher);
                let (s, t) = (&saved.mid_nd, &teacher.mid_nd);
                sums[at] += distance::loss(d, s, t, self.weight, Some(&mut d_mid_nd[..]));
            }
            let wants_block = self.target != Target::Mixer;
            if wants_block || !learn {
                block.forward_mlp(params, out_nd, saved);
            }
            if !learn {
                relative_distances(d, out_nd, target_nd, &mut relative[at]);
            }
            if wants_block {
                sums[at] += distance::loss(d, out_nd, target_nd, self.weight, Some(&mut d_nd[..]));
            }
            if !learn {
                return;
            }
            let grads = &mut grads[at];
            grads.fill(0.0);
            match wants_block {
                true => block.backward_mlp(params, d_nd, saved, scratch, trained, grads),
                false => d_nd.fill(0.0),
            }
            if wants_mixer {
                crate::ops::vector::add(d_nd, d_mid_nd);
            }
            block.backward_mixer(params, scene, u_nd, d_nd, saved, scratch, trained, grads);
        });
    }

    fn each_shard(&mut self, sequences: &[usize], learn: bool) {
        let mut shards = std::mem::take(&mut self.shards);
        each_shard(self.threads, &mut shards, |i, shard| {
            let own = &sequences[i * shard.dims.batch..][..shard.dims.batch];
            self.work(&self.layers, shard, own, learn);
        });
        self.shards = shards;
    }

    /// Figures of each layer on the held-out sequences.
    fn held_out(&mut self, split: &Split) -> Vec<Figures> {
        let mut totals = vec![0.0; self.layers.len()];
        for shard in &mut self.shards {
            shard.relative.iter_mut().for_each(Vec::clear);
        }
        for batch in split.held_out() {
            self.each_shard(&batch, false);
            for shard in &self.shards {
                totals.iter_mut().zip(&shard.sums).for_each(|(total, sum)| *total += sum);
            }
        }
        let tokens = (split.held * split.seq) as f64;
        let figures = |(at, total): (usize, f64)| {
            let all = self.shards.iter().flat_map(|s| s.relative[at].iter().copied().enumerate());
            Figures::new(total / tokens, all, split.seq)
        };
        totals.into_iter().enumerate().map(figures).collect()
    }
}

fn report(layers: &[Layer], before: &[Figures], after: &[Figures]) -> Value {
    let one = |((layer, before), after): ((&Layer, &Figures), &Figures)| {
        let both = |pick: fn(&Figures) -> f64| json!({ "before": rounded(pick(before)), "after": rounded(pick(after)) });
        json!({
            "layer": layer.number,
            "distance": both(|f| f.distance),
            "relative_median": both(|f| f.median),
            "relative_median_of_position_0": both(|f| f.first),
            "skipped": layer.learner.guard.skipped,
        })
    };
    let layers: Vec<Value> = layers.iter().zip(before).zip(after).map(one).collect();
    json!({ "loss": "mean distance of tokens", "layers": layers })
}

/// ‖s − t‖/‖t‖ of each token, appended.
fn relative_distances(d: usize, s_nd: &[f32], t_nd: &[f32], out: &mut Vec<f32>) {
    let zero = vec![0.0; t_nd.len()];
    let norms = distance::distances(d, t_nd, &zero);
    out.extend(
        distance::distances(d, s_nd, t_nd).zip(norms).map(|(e, t)| (e / t.max(1e-12)) as f32),
    );
}

/// The middle value (the lower one of two); 0 of none.
fn median(mut values: Vec<f32>) -> f64 {
    values.sort_by(f32::total_cmp);
    let middle = values.len().saturating_sub(1) / 2;
    values.get(middle).map_or(0.0, |v| f64::from(*v))
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
        let Phase { layers, shards, weight, .. } = self;
        let mut values = Vec::new();
        let mut total = 0.0;
        for (at, layer) in layers.iter_mut().enumerate() {
            let sum: f64 = shards.iter().map(|shard| shard.sums[at]).sum();
            let loss = sum * f64::from(*weight);
            let grads = shards.iter().map(|shard| &shard.grads[at][..]);
            layer.learner.step(ctx, update, rate, loss, grads)?;
            values.push((format!("loss.{}", layer.number), loss));
            total += loss;
        }
        values.push(("loss".into(), total / layers.len() as f64));
        Ok(values)
    }

    fn learners(&mut self) -> Vec<&mut Learner> {
        self.layers.iter_mut().map(|layer| &mut layer.learner).collect()
    }
}
