//! What stages take that train: pretraining and the three phases.
//!
//! Memory that is certain: the weights of all models, and of what is trained gradients of every part
//! of a batch, their sum and two moments. On a device 18 bytes a trained parameter (master, gradient
//! and moments in f32, shadow in bf16) and 2 a frozen one.

use engine::stage::cost::{Amount, Artifact, Cost, Costed, Known};

use super::about::{About, model, tokens};
use super::files;
use super::sizes::{self, F32, PROGRAM, Sizes, block, mixing_of, on_device};
use super::teacher::amount;
use crate::align::{self, Align, Target};
use crate::distill::{self, Distill, Train};
use crate::models::transfer::{Sizes as Mixers, student_config};
use crate::models::{Config, MixerKind, Part};
use crate::orient::{self, Orient};
use crate::pretrain::{self, Pretrain};
use crate::train::device::Device;
use crate::train::run::{SHARDS, Split};

/// Bytes of a trained parameter on a device.
const TRAINED: u64 = 18;
/// Bytes of a frozen one.
const FROZEN: u64 = 2;
/// Bytes of an activation on a device.
const ACTIVATION: u64 = 2;
/// What lowers the memory of a step that trains on the host.
const HOST: &str =
    "train fewer layers in a step, or take a smaller model or a machine with more memory";
/// The same on a device.
const ON_DEVICE: &str =
    "lower `micro_batch`, train fewer layers in a step, or take a device with more memory";

/// What is held in memory, in numbers of f32.
struct Held {
    /// Weights that stay as they are, and whether all of them are on the device.
    frozen: u64,
    alongside: bool,
    /// Weights of what is trained, all parts.
    own: u64,
    /// Those of them that are trained.
    trained: u64,
    /// Activations of a whole batch on the host.
    batch: u64,
    /// Activations of a token, and tokens that a device works on at a time.
    on_device: Option<(u64, u64)>,
}

impl Held {
    /// Host and device.
    fn amounts(&self, device: Device, sure: bool) -> (Amount, Amount) {
        let weights = self.frozen + self.own;
        if device == Device::Cuda {
            let frozen = if self.alongside { FROZEN * self.frozen } else { 0 };
            let least = TRAINED * self.trained + frozen;
            let (each, tokens) = self.on_device.unwrap_or_default();
            let likely = least + ACTIVATION * each * tokens;
            let host = amount(PROGRAM + F32 * weights, F32 * weights, sure, HOST);
            return (host, amount(likely, least, sure, ON_DEVICE));
        }
        let shards = SHARDS as u64;
        let least = F32 * (weights + shards * self.own + 3 * self.trained);
        (amount(PROGRAM + least + F32 * self.batch, least, sure, HOST), Amount::default())
    }
}

/// The cost of a step that trains and leaves `written` bytes of weights behind, as many
/// (`weights`) numbers.
fn cost(
    (flops, read): (f64, Option<u64>),
    (memory, device): (Amount, Amount),
    (written, weights, sure): (u64, u64, bool),
    checkpoint: u64,
) -> Cost {
    let least = F32 * weights;
    Cost {
        flops: Some(flops),
        work: Some(flops),
        read,
        written: Some(written),
        memory,
        device,
        disk: amount(written + checkpoint, least, sure, "make room, by `pipe cache gc` say"),
        ..Cost::default()
    }
}

/// Bytes of a checkpoint of `own` weights with their moments; 0 if none is made.
fn checkpoint(every: u64, updates: u64, own: u64) -> u64 {
    if every > 0 && updates > every { 3 * F32 * own } else { 0 }
}

impl Costed for Pretrain {
    fn cost(params: &pretrain::Params, known: &Known) -> Option<Cost> {
        let shard = tokens(known, "tokens");
        let vocab = shard.and_then(|shard| shard.vocab);
        // Without its vocabulary a model has at least all its other parameters.
        let config = |vocab| Config {
            vocab,
            d_model: params.d_model,
            layers: vec![MixerKind::Attention; params.layers],
            heads: params.heads,
            kv_heads: params.kv_heads.unwrap_or(params.heads),
            head_dim: params.d_model / params.heads.max(1),
            ffn: params.ffn,
            norm_eps: params.norm_eps,
            rope_theta: params.rope_theta,
            tied: params.tied,
            separator: params.mask_documents.then_some(0),
            ..Config::default()
        };
        let config = config(vocab.unwrap_or(1));
        let sizes = Sizes::of(&config)?;
        let (own, seq) = (sizes.parameters(), shard.map_or(1, |shard| shard.seq));
        let tokens = params.batch * seq;
        let each = sizes.pass(seq, true);
        let at_a_time = on_device(&config, params.device, (0, params.batch, seq));
        let held = Held {
            frozen: 0,
            alongside: false,
            own,
            trained: own,
            batch: each * tokens as u64,
            on_device: at_a_time.map(|tokens| (each, tokens)),
        };
        let (mut memory, mut device) = held.amounts(params.device, true);
        if params.device != Device::Cuda {
            // Weights, two moments, and the gradients of each part, of which one becomes their sum.
            let parts = if params.updates == 0 { 0 } else { 2 + SHARDS.min(params.batch) as u64 };
            memory.least = F32 * own * (1 + parts);
        }
        if params.updates == 0 {
            device.least = 0;
        }
        let lower = "lower `d_model`, `ffn` or `layers`, or take a machine with more memory";
        (memory.lower, device.lower) = (lower.into(), lower.into());
        let Some((shard, _)) = shard.zip(vocab) else {
            (memory.likely, device.likely) = (None, None);
            return Some(Cost { memory, device, ..Cost::default() });
        };
        let held_out = super::about::tokens(known, "holdout").map_or(0, |holdout| {
            holdout.count.unwrap_or(params.holdout_sequences).min(params.holdout_sequences)
        });
        let forward = sizes.forward(seq);
        let flops = 3.0 * forward * params.updates as f64 * tokens as f64
            + forward * (held_out * seq) as f64;
        let read = 2 * params.updates * tokens as u64;
        let (bytes, sure) = (files::model(&config)?, shard.sure);
        let kept = checkpoint(params.checkpoint_every, params.updates, own);
        let made = About::Model(config).made(Some(bytes), sure);
        Some(Cost {
            makes: [("model".to_string(), vec![made])].into(),
            ..cost((flops, Some(read)), (memory, device), (bytes, own, sure), kept)
        })
    }
}

/// What phases 1 and 2 learn from.
struct Lesson {
    split: Split,
    /// Whether the teacher runs alongside.
    streamed: bool,
    /// Bytes that are read of a token, in all layers together.
    token_bytes: u64,
    sure: bool,
}

impl Lesson {
    fn new(known: &Known, sequences: usize, batch: usize, held_out: usize) -> Option<Lesson> {
        let (seq, count, sure, streamed) = match known.all("signals") {
            [] => {
                let shard = tokens(known, "tokens")?;
                let all = shard.count.unwrap_or(usize::MAX);
                let chosen = if sequences == 0 { all } else { sequences.min(all) };
                (shard.seq, chosen, shard.sure && shard.count.is_some(), true)
            }
            [first, ..] => match About::of(first)? {
                About::Signals(shape) => (shape.seq, shape.sequences, first.sure, false),
                _ => return None,
            },
        };
        let split = match Split::of(count, seq, batch, held_out) {
            Ok(split) => split,
            // Too few sequences: the step will say so.
            Err(_) => return None,
        };
        let signals = known.bytes("signals").filter(|_| !streamed);
        let token_bytes = match signals {
            Some(bytes) => bytes / (count * seq).max(1) as u64,
            None => 2,
        };
        Some(Lesson { split, streamed, token_bytes, sure })
    }

    /// Tokens that go through in training, and in figures before and after.
    fn tokens(&self, updates: u64) -> (f64, f64) {
        let Split { held, batch, seq, .. } = self.split;
        (updates as f64 * (batch * seq) as f64, 2.0 * (held * seq) as f64)
    }

    fn read(&self, updates: u64, models: Option<u64>) -> Option<u64> {
        let (train, figures) = self.tokens(updates);
        Some(models? + ((train + figures) * self.token_bytes as f64) as u64)
    }
}

/// The layers to train of a teacher with `layers`.
fn numbers(given: &[usize], kept: &[usize], layers: usize) -> Vec<usize> {
    match given {
        [] => (0..layers).filter(|layer| !kept.contains(layer)).collect(),
        given => given.to_vec(),
    }
}

impl Costed for Orient {
    fn cost(params: &orient::Params, known: &Known) -> Option<Cost> {
        let (config, sure) = model(known, "teacher")?;
        let teacher = Sizes::of(&config)?;
        let lesson = Lesson::new(known, params.sequences, params.batch, params.held_out)?;
        let sure = sure && lesson.sure;
        let mixers = Mixers { state: params.d_state, taps: params.d_conv, chunk: params.chunk };
        let student = student_config(&config, mixers, &[]);
        let seq = lesson.split.seq;
        let layers = numbers(&params.layers, &params.keep_attention, config.layers.len());
        let (mut own, mut trained, mut written, mut weights) = (0, 0, 0, 0);
        let (mut forward, mut back, mut makes) = (0.0, 0.0, Vec::new());
        for number in &layers {
            let (_, layout) = block(&student, *number)?;
            let of = |part| part == Part::Mixer(*number);
            let learns = layout.entries().iter().filter(|entry| orient::trained(entry));
            own += layout.len() as u64;
            trained += learns.clone().map(|entry| entry.slot.len() as u64).sum::<u64>();
            let matrices: f64 =
                learns.filter(|e| e.decay).map(|entry| entry.slot.len() as f64).sum();
            // Tiles of M and A, and of M's gradient twice; half of each, since they are causal.
            let (m, a) = (config.heads * student.d_state, config.heads * config.head_dim);
            forward += 2.0 * matrices + (seq * (m + a)) as f64;
            back += 4.0 * matrices + (2 * seq * m) as f64;
            let bytes = files::layer(&student, *number, |file| of(file.part))?;
            written += bytes;
            let mine = layout.entries().iter().filter(|entry| of(entry.part));
            weights += mine.map(|entry| entry.slot.len() as u64).sum::<u64>();
            let about = About::Layer { config: student.clone(), number: *number };
            makes.push(Artifact { index: Some(*number as u32), ..about.made(Some(bytes), sure) });
        }
        let depth = layers.iter().max().map_or(0, |last| last + 1);
        let alongside = if lesson.streamed { teacher.blocks(depth, seq) } else { 0.0 };
        let (train, figures) = lesson.tokens(params.updates);
        let flops = train * (alongside + forward + back) + figures * (alongside + forward);
        let held = held(params.device, params.micro_batch, &lesson, &teacher, (own, trained));
        let kept = checkpoint(params.checkpoint_every, params.updates, own);
        let read = lesson.read(params.updates, known.bytes("teacher"));
        let amounts = held.amounts(params.device, sure);
        Some(Cost {
            makes: [("mixer".to_string(), makes)].into(),
            ..cost((flops, read), amounts, (written, weights, sure), kept)
        })
    }
}

/// What phases 1 and 2 hold, which train `trained` of `own` numbers.
fn held(
    device: Device,
    micro_batch: usize,
    lesson: &Lesson,
    teacher: &Sizes,
    (own, trained): (u64, u64),
) -> Held {
    let Split { batch, seq, .. } = lesson.split;
    let each = 2 * teacher.pass(seq, false);
    let tokens = on_device(&teacher.config, device, (micro_batch, batch, seq));
    Held {
        frozen: teacher.parameters(),
        alongside: lesson.streamed,
        own,
        trained,
        batch: each * (batch * seq) as u64,
        on_device: tokens.map(|tokens| (each, tokens)),
    }
}

impl Costed for Align {
    fn cost(params: &align::Params, known: &Known) -> Option<Cost> {
        let (config, sure) = model(known, "teacher")?;
        let teacher = Sizes::of(&config)?;
        let lesson = Lesson::new(known, params.sequences, params.batch, params.held_out)?;
        let sure = sure && lesson.sure && known.all("mixers").iter().all(|mixer| mixer.sure);
        let mut mixers = Vec::new();
        for mixer in known.all("mixers") {
            match About::of(mixer)? {
                About::Layer { config, number } => mixers.push((config, number)),
                _ => return None,
            }
        }
        let sizes = Mixers { state: params.d_state, taps: params.d_conv, chunk: params.chunk };
        let student = match mixers.first() {
            Some((config, _)) => config.clone(),
            None => student_config(&config, sizes, &[]),
        };
        let layers = match (&params.layers[..], &mixers[..]) {
            ([], [_, ..]) => mixers.iter().map(|(_, number)| *number).collect(),
            (given, _) => numbers(given, &params.keep_attention, config.layers.len()),
        };
        let seq = lesson.split.seq;
        let (mut own, mut trained, mut written) = (0, 0, 0);
        let (mut forward, mut back, mut makes) = (0.0, 0.0, Vec::new());
        for number in &layers {
            let (_, layout) = block(&student, *number)?;
            let mixer = |part| part == Part::Mixer(*number);
            let learns = |part| params.train_mlp || mixer(part);
            let runs = |part| params.target != Target::Mixer || mixer(part);
            own += layout.len() as u64;
            let entries = layout.entries().iter().filter(|entry| learns(entry.part));
            trained += entries.map(|entry| entry.slot.len() as u64).sum::<u64>();
            let mixing = mixing_of(&student, MixerKind::Ssm, seq);
            let through = 2.0 * sizes::matrices(&layout, runs);
            forward += through + mixing;
            back += through + 2.0 * mixing + 2.0 * sizes::matrices(&layout, learns);
            let bytes = files::layer(&student, *number, |_| true)?;
            written += bytes;
            let about = About::Layer { config: student.clone(), number: *number };
            makes.push(Artifact { index: Some(*number as u32), ..about.made(Some(bytes), sure) });
        }
        let depth = layers.iter().max().map_or(0, |last| last + 1);
        let alongside = if lesson.streamed { teacher.blocks(depth, seq) } else { 0.0 };
        let (train, figures) = lesson.tokens(params.updates);
        let flops = train * (alongside + forward + back) + figures * (alongside + forward);
        let held = held(params.device, params.micro_batch, &lesson, &teacher, (own, trained));
        let kept = checkpoint(params.checkpoint_every, params.updates, own);
        let models = known.bytes("teacher").zip(known.bytes("mixers")).map(|(a, b)| a + b);
        let amounts = held.amounts(params.device, sure);
        let read = lesson.read(params.updates, models);
        Some(Cost {
            makes: [("block".to_string(), makes)].into(),
            ..cost((flops, read), amounts, (written, own, sure), kept)
        })
    }
}

impl Costed for Distill {
    fn cost(params: &distill::Params, known: &Known) -> Option<Cost> {
        let (teacher, teacher_sure) = model(known, "teacher")?;
        let (student, student_sure) = model(known, "student")?;
        let (teacher, student) = (Sizes::of(&teacher)?, Sizes::of(&student)?);
        let cached = known.has("logits");
        let (seq, data_sure) = match cached {
            true => match About::of(known.one("logits")?)? {
                About::Logits { seq, .. } => (seq, known.one("logits")?.sure),
                _ => return None,
            },
            false => tokens(known, "tokens").map(|shard| (shard.seq, shard.sure))?,
        };
        let sure = teacher_sure && student_sure && data_sure;
        // How many sequences there are decides which are seen, not how many.
        let split = Split::of(usize::MAX, seq, params.batch, params.held_out).ok()?;
        let batch = split.batch * seq;
        let (own, mixers) = (student.parameters(), params.train == Train::Mixers);
        let (forward, taught) = (student.forward(seq), teacher.forward(seq));
        let back = match mixers {
            true => forward + 2.0 * student.matrices(|part| matches!(part, Part::Mixer(_))),
            false => 2.0 * forward,
        };
        let alongside = if cached { 0.0 } else { taught };
        let train = params.updates as f64 * batch as f64;
        let figures = 2.0 * (split.held * seq) as f64;
        let flops = train * (forward + back + alongside) + figures * (forward + taught);
        let at_a_time =
            on_device(&student.config, params.device, (params.micro_batch, split.batch, seq));
        let each = student.pass(seq, true);
        let held = Held {
            frozen: teacher.parameters(),
            alongside: true,
            own,
            trained: if mixers { student.mixers() } else { own },
            batch: (each + teacher.pass(seq, false)) * batch as u64,
            on_device: at_a_time.map(|tokens| (each, tokens)),
        };
        let (mut memory, device) = held.amounts(params.device, sure);
        if !mixers {
            memory.lower =
                "set `train: mixers`, or take a smaller model or a machine with more memory".into();
        }
        let bytes = files::model(&student.config)?;
        let kept = checkpoint(params.checkpoint_every, params.updates, own);
        let models = known.bytes("teacher").zip(known.bytes("student")).map(|(a, b)| a + b);
        let read = models.map(|models| models + (2.0 * (train + figures)) as u64);
        let made = About::Model(student.config.clone()).made(Some(bytes), sure);
        Some(Cost {
            makes: [("model".to_string(), vec![made])].into(),
            ..cost((flops, read), (memory, device), (bytes, own, sure), kept)
        })
    }
}
