//! What stages take that run a model and train none.

use engine::stage::cost::{Amount, Artifact, Cost, Costed, Known};
use safetensors::Dtype;

use super::about::{About, Sequences, model, tokens};
use super::files;
use super::sizes::{F32, PROGRAM, Sizes};
use crate::assemble::{Assemble, Kept, KeptWord};
use crate::cache_teacher::{CacheTeacher, Number, Signal};
use crate::evaluate::Evaluate;
use crate::models::Config;
use crate::models::transfer::{Sizes as Mixers, student_config};
use crate::sample_teacher::SampleTeacher;
use crate::teacher::Teacher;
use crate::train::device::Device;
use crate::train::run::SHARDS;
use crate::train::signals::{AttentionForm, Shape};
use crate::{assemble, cache_teacher, evaluate, sample_teacher, teacher};

/// Bytes of a weight that is not trained on a device: bf16.
const FROZEN: u64 = 2;
/// Sequences that one part of a pass of `cache_teacher` takes at a time.
const CHUNK: usize = 4;

/// An amount of `likely` bytes of which `least` are certain if `sure`.
pub(super) fn amount(likely: u64, least: u64, sure: bool, lower: &str) -> Amount {
    let least = if sure { least } else { 0 };
    Amount { likely: Some(likely.max(least)), least, lower: lower.into() }
}

/// Weights in the host's memory, and on a device where that is used.
fn weights(parameters: u64, device: Device, sure: bool, lower: &str) -> (Amount, Amount) {
    let host = amount(PROGRAM + F32 * parameters, F32 * parameters, sure, lower);
    let frozen = FROZEN * parameters;
    let device = match device {
        Device::Cuda => amount(frozen, frozen, sure, lower),
        _ => Amount::default(),
    };
    (host, device)
}

impl Costed for Teacher {
    fn cost(params: &teacher::Params, known: &Known) -> Option<Cost> {
        let artifact = known.one("model")?;
        let Some(About::Model(config)) = About::of(artifact) else {
            return Some(Cost {
                work: artifact.bytes.map(|bytes| bytes as f64),
                ..Cost::default()
            });
        };
        // Which token parts documents is no size: what follows counts with what is here.
        let config = Config { separator: params.mask_documents.then_some(0), ..config };
        let made = About::Model(config.clone()).made(None, artifact.sure);
        let tokenizer = About::Tokenizer { vocab: config.vocab }.made(None, false);
        Some(Cost {
            work: artifact.bytes.map(|bytes| bytes as f64),
            read: artifact.bytes,
            makes: [("model".to_string(), vec![made]), ("tokenizer".to_string(), vec![tokenizer])]
                .into(),
            ..Cost::default()
        })
    }
}

impl Costed for CacheTeacher {
    fn cost(params: &cache_teacher::Params, known: &Known) -> Option<Cost> {
        let (config, model_sure) = model(known, "model")?;
        let shard = tokens(known, "tokens")?;
        let sizes = Sizes::of(&config)?;
        let sure = model_sure && shard.sure && shard.count.is_some();
        let sequences = params.sequences.min(shard.count.unwrap_or(usize::MAX));
        let kept = Holds::new(params, &config, (sequences, shard.seq))?;
        let tokens = (sequences * shard.seq) as f64;
        let head = if params.top_k > 0 { sizes.head() } else { 0.0 };
        let flops = tokens * (sizes.blocks(config.layers.len(), shard.seq) + head);
        let matrix = kept.attention == Some(AttentionForm::Matrix);
        let lower = match (matrix, kept.attention.is_some()) {
            (true, _) => "set `attention: qk`, or lower `sequences`",
            (false, true) => {
                "set `dtype: bf16`, lower `sequences`, or stream: leave `signals` out of the phases and connect `tokens`"
            }
            (false, false) => "set `dtype: bf16`, or lower `sequences`",
        };
        let (memory, device) = memory(params, &sizes, (sequences, shard.seq), sure);
        Some(Cost {
            flops: Some(flops),
            work: Some(flops),
            read: known.bytes("model").map(|bytes| bytes + 4 * tokens as u64),
            written: Some(kept.bytes),
            memory,
            device,
            disk: amount(kept.bytes, kept.bytes, sure, lower),
            makes: kept.makes(sure),
        })
    }
}

/// What a cache of signals will hold.
struct Holds {
    layers: Vec<(Shape, u64)>,
    logits: Option<(About, u64)>,
    attention: Option<AttentionForm>,
    bytes: u64,
}

impl Holds {
    fn new(
        params: &cache_teacher::Params,
        config: &Config,
        (sequences, seq): (usize, usize),
    ) -> Option<Holds> {
        let has = |signal| params.keep.contains(&signal);
        let dtype = match params.dtype {
            Number::F32 => Dtype::F32,
            Number::Bf16 => Dtype::BF16,
        };
        let attention = has(Signal::Attention).then_some(params.attention);
        let count =
            if has(Signal::Hidden) || attention.is_some() { config.layers.len() } else { 0 };
        let layer = |layer: usize| {
            let shape = Shape {
                layer,
                sequences,
                seq,
                d_model: config.d_model,
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                hidden: has(Signal::Hidden),
                attention,
            };
            let text = serde_json::to_string(&shape).ok()?;
            let bytes = files::tensors(&shape.specs(dtype), &[("signals", text)]);
            Some((shape, bytes))
        };
        let layers: Vec<(Shape, u64)> = (0..count).map(layer).collect::<Option<_>>()?;
        let logits = has(Signal::Logits).then(|| {
            let (k, vocab) = (params.top_k, config.vocab);
            let ids = if vocab > 1 << 16 { Dtype::U32 } else { Dtype::U16 };
            let wide = vec![sequences, seq, k];
            let specs = [
                ("ids".to_string(), ids, wide.clone()),
                ("log_p".to_string(), Dtype::F16, wide),
                ("tail".to_string(), Dtype::F32, vec![sequences, seq]),
            ];
            let about = serde_json::json!({
                "sequences": sequences, "seq": seq, "top_k": k, "vocab": vocab
            });
            let bytes = files::tensors(&specs, &[("top_logits", about.to_string())]);
            (About::Logits { sequences, seq }, bytes)
        });
        let taken = [
            ("sequence".to_string(), Dtype::U32, vec![sequences]),
            ("tokens".to_string(), Dtype::U32, vec![sequences, seq]),
        ];
        let all = layers.iter().map(|(_, bytes)| bytes).chain(logits.iter().map(|(_, b)| b));
        let bytes = all.sum::<u64>() + files::tensors(&taken, &[]);
        Some(Holds { layers, logits, attention, bytes })
    }

    fn makes(&self, sure: bool) -> std::collections::BTreeMap<String, Vec<Artifact>> {
        let layer = |(shape, bytes): &(Shape, u64)| Artifact {
            index: Some(shape.layer as u32),
            ..About::Signals(shape.clone()).made(Some(*bytes), sure)
        };
        let layers = self.layers.iter().map(layer).collect();
        let logits = self.logits.iter().map(|(about, bytes)| about.made(Some(*bytes), sure));
        [("layer".to_string(), layers), ("logits".to_string(), logits.collect())].into()
    }
}

/// Weights, and the buffers of those parts of a pass that are filled for sure.
fn memory(
    params: &cache_teacher::Params,
    sizes: &Sizes,
    (sequences, seq): (usize, usize),
    sure: bool,
) -> (Amount, Amount) {
    let config = &sizes.config;
    let matrix =
        params.keep.contains(&Signal::Attention) && params.attention == AttentionForm::Matrix;
    let layers = config.layers.len() as u64;
    let lower = match matrix {
        true => "set `attention: qk`",
        false => "take a smaller model, or a machine with more memory",
    };
    let (mut host, device) = weights(sizes.parameters(), params.device, sure, lower);
    if params.device == Device::Cuda {
        return (host, device);
    }
    // Sequences that are at hand at a time, in all parts.
    let held = sequences.min(CHUNK * SHARDS) as u64;
    let tokens = held * seq as u64;
    let (heads, seq) = (config.heads as u64, seq as u64);
    let hidden = (layers + 1) * config.d_model as u64 * tokens;
    let matrices = match matrix {
        // One layer's whole, and every layer's lower triangles.
        true => held * heads * (seq * seq + layers * (seq * (seq + 1) / 2)),
        false => 0,
    };
    let likely = sizes.pass(seq as usize, false) * tokens + matrices;
    host.likely = host.likely.map(|bytes| bytes + F32 * likely);
    if sure {
        host.least += F32 * (hidden + matrices);
    }
    (host, device)
}

impl Costed for SampleTeacher {
    fn cost(params: &sample_teacher::Params, known: &Known) -> Option<Cost> {
        let (config, sure) = model(known, "model")?;
        let sizes = Sizes::of(&config)?;
        // A token is mixed with those before it: on average half of a document.
        let flops = params.tokens as f64 * sizes.forward(params.document);
        let lower = "take a smaller model, or a machine with more memory";
        let (memory, device) = weights(sizes.parameters(), params.device, sure, lower);
        Some(Cost { flops: Some(flops), work: Some(flops), memory, device, ..Cost::default() })
    }
}

impl Costed for Assemble {
    fn cost(params: &assemble::Params, known: &Known) -> Option<Cost> {
        let (config, teacher_sure) = model(known, "teacher")?;
        let teacher = Sizes::of(&config)?;
        let blocks: Option<Vec<(Config, usize)>> = known
            .all("blocks")
            .iter()
            .map(|block| match About::of(block)? {
                About::Layer { config, number } => Some((config, number)),
                _ => None,
            })
            .collect();
        let blocks = blocks?;
        let sure = teacher_sure && known.all("blocks").iter().all(|block| block.sure);
        let mixers = match blocks.first() {
            Some((config, _)) => {
                Mixers { state: config.d_state, taps: config.d_conv, chunk: config.chunk }
            }
            None => Mixers { state: params.d_state, taps: params.d_conv, chunk: params.chunk },
        };
        let kept = match &params.keep_attention {
            Kept::Layers(numbers) => numbers.clone(),
            Kept::Word(KeptWord::Rest) => {
                let free = |layer: &usize| blocks.iter().all(|(_, number)| number != layer);
                (0..config.layers.len()).filter(free).collect()
            }
        };
        let student = student_config(&config, mixers, &kept);
        let bytes = files::model(&student)?;
        let both = teacher.parameters() + Sizes::of(&student)?.parameters();
        let lower = "a student of this teacher needs a machine with more memory";
        let (memory, _) = weights(both, Device::Cpu, sure, lower);
        Some(Cost {
            work: Some(both as f64),
            read: known.all_bytes(),
            written: Some(bytes),
            memory,
            disk: amount(bytes, bytes, sure, "make room"),
            makes: [("model".to_string(), vec![About::Model(student).made(Some(bytes), sure)])]
                .into(),
            ..Cost::default()
        })
    }
}

impl Costed for Evaluate {
    fn cost(params: &evaluate::Params, known: &Known) -> Option<Cost> {
        let (student, mut sure) = model(known, "model")?;
        let mut models = vec![Sizes::of(&student)?];
        if known.has("teacher") {
            let (teacher, known) = model(known, "teacher")?;
            sure &= known;
            models.push(Sizes::of(&teacher)?);
        }
        let parameters = models.iter().map(Sizes::parameters).sum();
        let lower = "evaluate it without `teacher`, or on a machine with more memory";
        let (memory, device) = weights(parameters, params.device, sure, lower);
        // What benchmarks and probes hold is not known before they are read.
        let asked = known.has("tasks") || params.probes.any();
        let flops = if asked { None } else { text_flops(params, known, &models) };
        Some(Cost {
            flops,
            work: flops,
            read: known.all_bytes(),
            memory,
            device,
            ..Cost::default()
        })
    }
}

/// Operations over the shards, if it is known how long they are.
fn text_flops(params: &evaluate::Params, known: &Known, models: &[Sizes]) -> Option<f64> {
    let mut flops = 0.0;
    for port in ["tokens", "answers"].into_iter().filter(|port| known.has(port)) {
        let Sequences { seq, count, .. } = tokens(known, port)?;
        let tokens = (count?.min(params.sequences) * seq) as f64;
        flops += tokens * models.iter().map(|model| model.forward(seq)).sum::<f64>();
    }
    Some(flops)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_stage_takes_as_many_sequences_at_a_time_as_is_counted_with() {
        let source = include_str!("../cache_teacher.rs");
        assert!(source.contains(&format!("const CHUNK: usize = {};", super::CHUNK)));
    }
}
