//! Decoding token by token against the CPU's decoder, and the loop around it against itself.

use half::bf16;
use stages::gpu::decode::{self, Decoder, Room, Token, Turn, Writing};
use stages::gpu::launch::Gpu;
use stages::gpu::ops::sample::Choice;
use stages::models::{
    Biases, Config, Family, MixerKind, MlpKind, Model, NormKind, Params, Wiring, decode as cpu,
};
use stages::train::philox::Philox;

use crate::support::devices;

const GREEDY: Choice = Choice { temperature: 0.0, top_k: 0 };
const KNOWN: usize = 37;
const SEPARATOR: u32 = 3;

fn llama() -> Config {
    Config {
        vocab: 40,
        d_model: 64,
        layers: vec![MixerKind::Attention; 2],
        heads: 4,
        kv_heads: 2,
        head_dim: 32,
        ffn: 96,
        rope_theta: 100.0,
        tied: true,
        separator: Some(SEPARATOR),
        d_state: 16,
        ..Config::default()
    }
}

fn phi() -> Config {
    Config {
        family: Family::Phi,
        wiring: Wiring::Parallel,
        norm: NormKind::Layer,
        mlp: MlpKind::Gelu,
        bias: Biases { qkv: true, out: true, mlp: true, head: true },
        rotary_dim: Some(16),
        kv_heads: 4,
        tied: false,
        separator: None,
        ..llama()
    }
}

/// Transformers, students, hybrids; and GELU without a bias.
fn all() -> Vec<(&'static str, Config)> {
    use MixerKind::{Attention, Ssm};
    let with = |config: Config, layers: &[MixerKind]| Config { layers: layers.to_vec(), ..config };
    let plain = Config {
        family: Family::Qwen2,
        mlp: MlpKind::Gelu,
        bias: Biases { qkv: true, ..Biases::default() },
        ..llama()
    };
    vec![
        ("llama", llama()),
        ("phi", phi()),
        ("plain gelu", plain),
        ("student", with(llama(), &[Ssm, Ssm])),
        ("parallel student", with(phi(), &[Ssm, Ssm])),
        ("hybrid", with(llama(), &[Ssm, Attention, Ssm])),
        ("parallel hybrid", with(phi(), &[Attention, Ssm])),
    ]
}

/// Far from their start, and as bf16 holds them.
fn weights(model: &Model) -> Params {
    let mut params = model.init(5);
    for (i, value) in params.flat.iter_mut().enumerate() {
        *value = bf16::from_f32(*value * 1.5 + 0.05 * (i as f32 * 0.7).sin()).to_f32();
    }
    params
}

fn decoder(gpu: &Gpu, model: &Model, params: &Params, choice: Choice, batch: usize) -> Decoder {
    let room = Room { batch, capacity: 24, turns: 7 };
    Decoder::new(gpu, model, &params.flat, room, choice, KNOWN).unwrap()
}

/// What sequence `b` reads in turn `t`: texts that begin at turns of their own.
fn token(t: usize, b: usize) -> Token {
    let id = ((t * 7 + b * 11 + 5) % KNOWN) as u32;
    if t == 0 || t == 4 * b { Token::Begin(id) } else { Token::Read(id) }
}

const TURNS: usize = 12;
const BATCH: usize = 3;

/// Logits and choices of all turns.
fn texts(mut decoder: Decoder) -> (Vec<f32>, Vec<u32>) {
    let (mut logits, mut chosen) = (Vec::new(), Vec::new());
    for t in 0..TURNS {
        let turn = |_, b| Turn { token: token(t, b), chance: 0.0 };
        chosen.extend(decoder.run(1, turn).unwrap());
        logits.extend(decoder.logits().unwrap());
    }
    (logits, chosen)
}

/// Logits of all turns, those that are known.
fn wanted(model: &Model, params: &Params) -> Vec<f32> {
    let mut texts: Vec<_> = (0..BATCH).map(|_| cpu::Decoder::new(model, &params.flat)).collect();
    let mut all = Vec::new();
    for t in 0..TURNS {
        for (b, text) in texts.iter_mut().enumerate() {
            let id = match token(t, b) {
                Token::Begin(id) => {
                    *text = cpu::Decoder::new(model, &params.flat);
                    id
                }
                Token::Read(id) => id,
                Token::Chosen => unreachable!(),
            };
            all.extend(&text.read(&[id])[..KNOWN]);
        }
    }
    all
}

/// The error of each row of known logits, as a part of the root mean square of all.
fn errors(got: &[f32], wanted: &[f32]) -> Vec<f64> {
    let mean = |sum: f64, len: usize| (sum / len as f64).sqrt();
    let rms = mean(wanted.iter().map(|w| f64::from(w * w)).sum(), wanted.len());
    let row = |(got, wanted): (&[f32], &[f32])| {
        let off = got.iter().zip(wanted).map(|(g, w)| f64::from(g - w).powi(2));
        mean(off.sum(), KNOWN) / rms
    };
    assert_eq!(got.len(), wanted.len());
    got.chunks(KNOWN).zip(wanted.chunks(KNOWN)).map(row).collect()
}

/// What bf16 may do to each row: the errors of the CPU itself with weights that are off by normal
/// numbers of its precision, 2⁻⁹. Rows differ in how much they feel.
fn felt(model: &Model, wanted_rows: &[f32]) -> Vec<f64> {
    const SEEDS: u64 = 4;
    let mut squares = vec![0.0; wanted_rows.len() / KNOWN];
    for seed in 0..SEEDS {
        let mut params = weights(model);
        let mut off = vec![0.0; params.flat.len()];
        Philox::new(seed, "off").fill_normal(1.0 / 512.0, &mut off);
        params.flat.iter_mut().zip(&off).for_each(|(value, off)| *value *= 1.0 + off);
        let rows = errors(&wanted(model, &params), wanted_rows);
        squares.iter_mut().zip(rows).for_each(|(sum, row)| *sum += row * row / SEEDS as f64);
    }
    squares.into_iter().map(f64::sqrt).collect()
}

#[test]
fn decode_gives_the_logits_of_the_cpu() {
    for (what, config) in all() {
        let (model, v) = (Model::new(config).unwrap(), 40);
        let params = weights(&model);
        let wanted = wanted(&model, &params);
        let results: Vec<_> = devices()
            .iter()
            .map(|gpu| texts(decoder(gpu, &model, &params, GREEDY, BATCH)))
            .collect();
        let (logits, chosen) = &results[0];
        let known: Vec<f32> = logits.chunks(v).flat_map(|row| row[..KNOWN].to_vec()).collect();
        let felt = felt(&model, &wanted);
        for (row, (off, felt)) in errors(&known, &wanted).into_iter().zip(felt).enumerate() {
            let (turn, b) = (row / BATCH, row % BATCH);
            assert!(
                off <= 3.0 * felt,
                "{what}, turn {turn} of {b}: {off:.4}, bf16 makes {felt:.4}"
            );
        }
        assert!(logits.chunks(v).all(|row| row[KNOWN..].iter().all(|x| *x == f32::NEG_INFINITY)));
        let mut clear = 0;
        for (row, id) in wanted.chunks(KNOWN).zip(chosen) {
            let mut order: Vec<usize> = (0..KNOWN).collect();
            order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
            if row[order[0]] - row[order[1]] > 0.1 * (1.0 + row[order[0]].abs()) {
                assert_eq!(order[0], *id as usize, "{what}");
                clear += 1;
            }
        }
        assert!(clear > 5, "{what}: only {clear} clear margins");
        for other in &results[1..] {
            assert!(other == &results[0], "{what}: bits depend on the order of threads");
        }
    }
}

#[test]
fn decode_with_a_graph_and_without_gives_equal_bits() {
    for (what, config) in all() {
        let model = Model::new(config).unwrap();
        let params = weights(&model);
        let gpu = &devices()[0];
        let make = || decoder(gpu, &model, &params, GREEDY, BATCH);
        let first = texts(make());
        assert!(first == texts(make()), "{what}: two runs differ");
        assert!(first == texts(make().without_graph()), "{what}: a graph changes bits");
    }
}

#[test]
fn decode_reads_what_it_chose() {
    let choice = Choice { temperature: 1.0, top_k: 0 };
    let chance = |t: usize, b: usize| ((t * 5 + b * 3 + 1) % 17) as f32 / 17.0;
    for (what, config) in all() {
        let model = Model::new(config).unwrap();
        let params = weights(&model);
        let gpu = &devices()[0];
        let mut free = decoder(gpu, &model, &params, choice, BATCH);
        let mut led = decoder(gpu, &model, &params, choice, BATCH);
        let mut before = Vec::new();
        for from in [0, 5, 10] {
            let script = |t: usize, b: usize| Turn {
                token: if from + t == 0 { Token::Begin(9) } else { Token::Chosen },
                chance: chance(from + t, b),
            };
            let chosen = free.run(5, script).unwrap();
            let script = |t: usize, b: usize| {
                let token = match t {
                    _ if from + t == 0 => Token::Begin(9),
                    0 => Token::Read(before[b]),
                    _ => Token::Read(chosen[(t - 1) * BATCH + b]),
                };
                Turn { token, chance: chance(from + t, b) }
            };
            assert_eq!(led.run(5, script).unwrap(), chosen, "{what}");
            before = chosen[4 * BATCH..].to_vec();
        }
        assert_eq!(free.logits().unwrap(), led.logits().unwrap(), "{what}");
    }
}

#[test]
fn decode_of_long_texts_is_filled_and_has_an_end() {
    for (what, config) in all() {
        let attends = config.layers.contains(&MixerKind::Attention);
        let model = Model::new(config).unwrap();
        let params = weights(&model);
        let gpu = &devices()[0];
        let mut decoder = decoder(gpu, &model, &params, GREEDY, 2);
        decoder.fill(20).unwrap();
        let turn = |_, _| Turn { token: Token::Read(1), chance: 0.0 };
        decoder.run(4, turn).unwrap();
        assert!(decoder.logits().unwrap()[..KNOWN].iter().all(|x| x.is_finite()), "{what}");
        let [caches, states] = decoder.memory().bytes();
        assert_eq!([caches, states], decode::bytes_of(&model.config, 2, 24));
        let end = decoder.run(1, turn);
        assert_eq!(end.is_err(), attends, "{what}");
        let speed = decode::measure(gpu, &model, &params.flat, 2, (9, true), 1).unwrap();
        assert!(speed.rate > 0.0 && speed.traffic >= speed.weights + speed.remembered);
    }
    assert!(decode::copy_bandwidth(&devices()[0], 4096).unwrap() > 0.0);
}

/// Complete documents, in order, at least `count`.
fn written(gpu: &Gpu, model: &Model, params: &Params, batch: usize, count: usize) -> Vec<Vec<u32>> {
    let writing = Writing {
        seed: 17,
        document: 9,
        temperature: 0.8,
        first: SEPARATOR,
        ends: &[5, SEPARATOR],
        known: KNOWN,
        batch,
    };
    let mut all = Vec::new();
    decode::sample(gpu, model, &params.flat, &writing, |documents| {
        all.extend(documents);
        Ok(all.len() < count)
    })
    .unwrap();
    all.truncate(count);
    all
}

#[test]
fn decode_writes_documents_in_order_as_the_cpu_draws_them() {
    for (what, config) in all() {
        let model = Model::new(config).unwrap();
        let params = weights(&model);
        let gpu = &devices()[0];
        let documents = written(gpu, &model, &params, 3, 8);
        assert_eq!(documents, written(gpu, &model, &params, 5, 8), "{what}: depends on the batch");
        for (i, document) in documents.iter().enumerate() {
            let mut chances = vec![0.0; 9];
            Philox::new(17, &format!("document.{i}")).fill_uniform(0.0, 1.0, &mut chances);
            let mut reader = cpu::Decoder::new(&model, &params.flat);
            let mut last = SEPARATOR;
            for (token, chance) in document.iter().zip(chances) {
                assert!(*token != 5 && *token != SEPARATOR && (*token as usize) < KNOWN);
                let logits = reader.read(&[last])[..KNOWN].to_vec();
                let weights: Vec<f32> = logits.iter().map(|x| (x / 0.8).exp()).collect();
                let sum: f32 = weights.iter().sum();
                let before: f32 = weights[..*token as usize].iter().sum::<f32>() / sum;
                let after = before + weights[*token as usize] / sum;
                assert!(before - 0.03 <= chance && chance <= after + 0.03, "{what}, {i}");
                last = *token;
            }
            assert!(document.len() <= 9);
        }
    }
}

/// The stage itself: whole documents on both devices, the same bytes twice.
#[test]
fn the_stage_writes_documents_on_both_devices() {
    use engine::stage::{Context, Stage as _};
    use stages::sample_teacher::{Params, SampleTeacher};
    use stages::train::device::Device;
    use stages::train_tokenizer::{self, TrainTokenizer};

    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, device| {
        let (text, model) = (dir.path().join("text.jsonl"), dir.path().join("model.safetensors"));
        let tokenizer = dir.path().join("tokenizer/tokenizer.json");
        if !model.exists() {
            let line = r#"{"text": "a cat sat on a mat and a dog ran to a man in a van"}"#;
            std::fs::write(&text, format!("{line}\n").repeat(20)).unwrap();
            let at = dir.path().join("tokenizer-step");
            let mut ctx = Context::local::<TrainTokenizer>(&at, &[("text", &[&*text])]);
            let params = train_tokenizer::Params { vocab: 264, ..Default::default() };
            TrainTokenizer::run(&params, &mut ctx).unwrap();
            std::fs::create_dir_all(tokenizer.parent().unwrap()).unwrap();
            std::fs::copy(&ctx.made()[0].path, &tokenizer).unwrap();
            let config = Config { vocab: 264, separator: Some(0), ..llama() };
            let teacher = Model::new(config).unwrap();
            teacher.save(&model, &teacher.init(3)).unwrap();
        }
        let inputs: [(&str, &[&std::path::Path]); 2] =
            [("model", &[&*model]), ("tokenizer", &[&*tokenizer])];
        let mut ctx = Context::local::<SampleTeacher>(&dir.path().join(name), &inputs);
        let params = Params { tokens: 120, document: 24, device, ..Default::default() };
        SampleTeacher::run(&params, &mut ctx).unwrap();
        std::fs::read_to_string(&ctx.made()[0].path).unwrap()
    };
    let (cpu, gpu) = (run("cpu", Device::Cpu), run("gpu", Device::Cuda));
    assert_eq!(gpu, run("again", Device::Cuda), "a second run wrote other documents");
    assert!(cpu.lines().count() >= 5 && gpu.lines().count() >= 5, "{cpu}{gpu}");
    assert!(gpu.lines().all(|line| line.starts_with("{\"text\":")), "{gpu}");
}
