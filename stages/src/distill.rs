//! Phase 3 of MOHAWK: the whole student learns the teacher's distribution of the next token.
//!
//! The loss is soft cross-entropy against the teacher's full logits, which are formed for a few
//! tokens at a time beside the student's, so none outlive their chunk. Everything is trained unless
//! `train: mixers`. Temperature 1. Hard labels (the text's next token) only if `labels` gives them a
//! share, as in Hinton et al. 2015, section 2; MOHAWK has none. With cached top-k `logits` (an
//! ablation) the teacher runs for the held-out figures only.

mod on_cpu;

use anyhow::{Context as _, Result, ensure};
use engine::stage::{Context, Cpu, In, Out, Ports, Stage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::data::shard::TokenShard;
use crate::models::params::Entry;
use crate::models::{MixerKind, Model, Part, Trained};
#[cfg(any(feature = "cuda", feature = "emulate"))]
use crate::ops::Dims;
use crate::ops::cross_entropy::Soft;
use crate::train::adamw::Group;
use crate::train::device::Device;
use crate::train::layer::groups;
use crate::train::learner::Learner;
use crate::train::logits::TopLogits;
use crate::train::run::{Course, Curve, Split, drive, rounded};
use crate::train::schedule::Wsd;
use on_cpu::Phase;

/// What is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Train {
    /// Every parameter.
    #[default]
    All,
    /// The mixers that replaced attention; all else stays the teacher's.
    Mixers,
}

/// Parameters of `distill`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// What is trained.
    pub train: Train,
    /// Optimiser steps.
    pub updates: u64,
    /// Tokens an update; a multiple of twice the sequence length.
    pub batch: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// What the rate of the weights that came from the teacher is multiplied by: of all but the
    /// mixers that replaced attention.
    pub transferred: f64,
    /// Share of the gradient that is of the text's own next token, from 0 (the teacher alone, as MOHAWK
    /// has it) to below 1. The figures of curve and report are against the teacher alone.
    #[serde(skip_serializing_if = "is_zero")]
    #[schemars(extend("default" = 0.0))]
    pub labels: f64,
    /// Fraction of the updates in which the rate rises.
    pub warmup: f64,
    /// Fraction of the updates in which the rate falls, at the end.
    pub decay: f64,
    /// Decoupled weight decay of matrices.
    pub weight_decay: f64,
    /// Largest norm of the gradient.
    pub clip: f64,
    /// Decides the order of sequences.
    pub seed: u64,
    /// Use only so many sequences of the tokens; 0 for all.
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
            train: Train::All,
            updates: 1600,
            batch: 1024,
            lr: 3e-3,
            transferred: 1.0,
            labels: 0.0,
            warmup: 0.05,
            decay: 0.2,
            weight_decay: 0.1,
            clip: 1.0,
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

/// A share of none is not written down: keys made before there was one stay what they are.
fn is_zero(share: &f64) -> bool {
    *share == 0.0
}

/// The stage.
pub struct Distill;

impl Stage for Distill {
    const NAME: &'static str = "distill";
    const VERSION: u32 = 3;
    const DOC: &'static str = "Phase 3: trains the whole student on the teacher's logits.";
    const CPU: Cpu = Cpu::All;
    const GPU: bool = true;
    type Params = Params;

    fn ports() -> Ports {
        const INPUTS: &[In] = &[
            In::one("student", "the model to train").tensors(),
            In::one("teacher", "the model to imitate").tensors(),
            In::one("tokens", "token sequences to learn from").optional(),
            In::one("logits", "cached top-k logits, instead of `tokens`").tensors().optional(),
            In::one("sampled", "the sequences that `logits` are of").tensors().optional(),
        ];
        const OUTPUTS: &[Out] = &[
            Out::one("model", "model.safetensors", "the trained student"),
            Out::one("metrics", "metrics.json", "loss curve, and divergence before and after"),
        ];
        Ports { inputs: INPUTS, outputs: OUTPUTS }
    }

    fn check(params: &Params) -> Vec<(String, String)> {
        let Params { lr, warmup, decay, updates, transferred, labels, .. } = *params;
        let mut wrong = crate::train::run::check(lr, warmup, decay, updates);
        if !(transferred.is_finite() && transferred > 0.0) {
            let what = "must be a positive number; to train none of them, say `train: mixers`";
            wrong.push(("transferred".into(), what.into()));
        }
        if !(0.0..1.0).contains(&labels) {
            let what = "must be at least 0 and below 1; to learn from text alone, take `pretrain`";
            wrong.push(("labels".into(), what.into()));
        }
        wrong
    }

    fn run(params: &Params, ctx: &mut Context) -> Result<()> {
        let (teacher, weights) =
            Model::load(&ctx.tensors("teacher")?).context("input `teacher`")?;
        let data = Data::open(ctx, teacher.config.vocab)?;
        let sequences = match params.sequences {
            0 => data.len(),
            limit => data.len().min(limit),
        };
        let split = Split::of(sequences, data.seq(), params.batch, params.held_out)?;
        let (student, learner, trained) = student(params, ctx, &teacher)?;
        #[cfg(any(feature = "cuda", feature = "emulate"))]
        if params.device == Device::Cuda {
            let (teacher, student) = ((teacher, weights), (student, learner));
            return on_gpu(params, ctx, teacher, student, trained, (data, split));
        }
        params.device.require_cpu(Distill::NAME)?;
        let (learning, data) = ((student, learner, trained), (data, params.labels as f32));
        let mut phase = Phase::new((teacher, weights), learning, data, &split, ctx.threads());
        let before = phase.held_out(&split);
        let curve = drive(ctx, &course(params, &split), &mut phase)?;
        let after = phase.held_out(&split);
        finish(ctx, (&phase.student, &phase.learner), &curve, (before, after), &split)
    }
}

fn course(params: &Params, split: &Split) -> Course {
    let rate = Wsd::new(params.lr, params.updates, params.warmup, params.decay);
    split.course(rate, params.seed, (params.checkpoint_every, params.metrics_every))
}

/// The model of input `student` with what is trained of it.
fn student(params: &Params, ctx: &Context, teacher: &Model) -> Result<(Model, Learner, Trained)> {
    let (student, start) = Model::load(&ctx.tensors("student")?).context("input `student`")?;
    let (t, s) = (&teacher.config, &student.config);
    ensure!(
        t.vocab == s.vocab,
        "the teacher has a vocabulary of {}, the student one of {}",
        t.vocab,
        s.vocab
    );
    let trained = match params.train {
        Train::All => Trained::ALL,
        Train::Mixers => Trained::MIXERS,
    };
    let mixers = params.train == Train::Mixers;
    let replaced = |part| matches!(part, Part::Mixer(l) if s.layers[l] == MixerKind::Ssm);
    let own = groups(&student.layout, params.weight_decay, |entry: &Entry| replaced(entry.part));
    let others =
        groups(&student.layout, params.weight_decay, |e: &Entry| !mixers && !replaced(e.part));
    let scale = params.transferred as f32;
    let mut groups: Vec<Group> =
        others.into_iter().map(|group| Group { scale, ..group }).chain(own).collect();
    groups.sort_by_key(|group| group.range.start);
    // Runs alike are one: the gradient's norm is summed run by run.
    groups.dedup_by(|next, last| {
        let alike = next.decay == last.decay && next.scale == last.scale;
        let joined = alike && last.range.end == next.range.start;
        if joined {
            last.range.end = next.range.end;
        }
        joined
    });
    let learner = Learner::new("student", start.flat, groups, params.clip);
    Ok((student, learner, trained))
}

/// Writes the student and metrics.
fn finish(
    ctx: &mut Context,
    (student, learner): (&Model, &Learner),
    curve: &Curve,
    (before, after): (Soft, Soft),
    split: &Split,
) -> Result<()> {
    let last = report(learner, before, after, split);
    let mut weights = crate::models::Params::zeros(&student.layout);
    weights.flat.copy_from_slice(&learner.params);
    student.save(&ctx.output("model")?, &weights)?;
    std::fs::write(ctx.output("metrics")?, serde_json::to_vec_pretty(&curve.to_json(last))?)?;
    Ok(())
}

/// The phase on a GPU, from the same start.
#[cfg(any(feature = "cuda", feature = "emulate"))]
fn on_gpu(
    params: &Params,
    ctx: &mut Context,
    (teacher, weights): (Model, crate::models::Params),
    (student, mut learner): (Model, Learner),
    trained: Trained,
    (data, split): (Data, Split),
) -> Result<()> {
    use crate::gpu::phases::{distill, micro_batch};

    let Data::Streamed(shard) = data else {
        anyhow::bail!(
            "on a GPU the teacher runs alongside: connect `tokens` instead of `logits`, or set \
             `device: cpu`"
        )
    };
    let config = &student.config;
    let micro = micro_batch(config, params.micro_batch, split.batch, split.seq)?;
    let dims = Dims { batch: micro, seq: split.seq };
    let read = Box::new(move |i: usize, out: &mut [u32]| shard.copy_to(i, out));
    let (gpu, teacher) = (crate::gpu::open()?, (&teacher, &weights));
    let start = (&student, &learner);
    let aim = distill::Aim { batch: split.batch, dims, labels: params.labels as f32 };
    let mut driver = distill::driver(&gpu, teacher, start, trained, read, aim)?;
    let held: Vec<usize> = split.held_out().concat();
    let before = driver.work.held_out(&mut driver.batch, &held)?;
    let curve = drive(ctx, &course(params, &split), &mut driver)?;
    let after = driver.work.held_out(&mut driver.batch, &held)?;
    driver.learners.give_back(std::iter::once(&mut learner))?;
    finish(ctx, (&student, &learner), &curve, (before, after), &split)
}

/// What is learned from.
enum Data {
    /// Tokens; the teacher runs alongside.
    Streamed(TokenShard),
    /// Tokens with the teacher's most likely ones.
    Cached(TopLogits),
}

impl Data {
    fn open(ctx: &Context, vocab: usize) -> Result<Data> {
        if ctx.has("logits") {
            ensure!(ctx.has("sampled"), "`logits` needs `sampled`, the `tokens` cached with them");
            let (logits, sampled) = (ctx.tensors("logits")?, ctx.tensors("sampled")?);
            return Ok(Data::Cached(
                TopLogits::open(logits, sampled, vocab).context("input `logits`")?,
            ));
        }
        ensure!(ctx.has("tokens"), "connect `tokens`, or `logits` and `sampled` of a cache");
        let shard = TokenShard::open(ctx.path("tokens")?)?;
        let has = shard.vocab();
        ensure!(
            has <= vocab,
            "the tokens are of a vocabulary of {has}, the teacher's is {vocab}; take both from one \
             tokenizer"
        );
        Ok(Data::Streamed(shard))
    }

    fn len(&self) -> usize {
        match self {
            Data::Streamed(shard) => shard.len(),
            Data::Cached(top) => top.len(),
        }
    }

    fn seq(&self) -> usize {
        match self {
            Data::Streamed(shard) => shard.seq(),
            Data::Cached(top) => top.seq(),
        }
    }

    fn copy_to(&self, sequence: usize, out: &mut [u32]) {
        match self {
            Data::Streamed(shard) => shard.copy_to(sequence, out),
            Data::Cached(top) => top.tokens(sequence, out),
        }
    }
}

fn report(learner: &Learner, before: Soft, after: Soft, split: &Split) -> Value {
    let tokens = (split.held * split.seq) as f64;
    let mean = |soft: Soft| {
        json!({
            "cross_entropy": rounded(soft.cross_entropy / tokens),
            "divergence": rounded((soft.cross_entropy - soft.entropy) / tokens),
        })
    };
    json!({
        "loss": "soft cross-entropy",
        "teacher_entropy": rounded(after.entropy / tokens),
        "before": mean(before),
        "after": mean(after),
        "skipped": learner.guard.skipped,
    })
}
