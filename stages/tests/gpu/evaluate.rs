//! Evaluation with models on the device against the CPU.

use std::path::{Path, PathBuf};

use engine::stage::{Context, Stage};
use serde_json::Value;
use stages::data::shard::{Answer, ShardWriter, TokenShard};
use stages::eval::likelihood::{Item, Likelihood};
use stages::eval::runner::{Loaded, Runner, SequenceScore, Who, Work};
use stages::evaluate::{Evaluate, Params};
use stages::models::{Config, MixerKind, Model};
use stages::train::device::Device;

use crate::support::{close, devices, same};

const VOCAB: usize = 64;
const SEQ: usize = 40;
const COUNT: usize = 5;

fn loaded(layers: &[MixerKind], seed: u64, separator: Option<u32>) -> Loaded {
    let config = Config {
        vocab: VOCAB,
        d_model: 64,
        layers: layers.to_vec(),
        heads: 2,
        kv_heads: 2,
        head_dim: 32,
        ffn: 96,
        rope_theta: 100.0,
        tied: false,
        separator,
        d_state: 16,
        d_conv: 4,
        chunk: 16,
        ..Config::default()
    };
    let model = Model::new(config).unwrap();
    let mut params = model.init(seed);
    params.flat.iter_mut().for_each(|w| *w = half::bf16::from_f32(*w * 1.5).to_f32());
    Loaded { model, params }
}

fn student() -> Loaded {
    loaded(&[MixerKind::Ssm, MixerKind::Attention], 1, Some(0))
}

fn teacher() -> Loaded {
    loaded(&[MixerKind::Attention; 2], 2, Some(0))
}

fn shard(dir: &Path) -> PathBuf {
    let path = dir.join("tokens.bin");
    let mut writer = ShardWriter::create(&path, VOCAB, SEQ, 0).unwrap();
    for number in 0..2 * COUNT as u32 {
        let words: Vec<u32> = (1..SEQ as u32 / 2).map(|i| 1 + (i * 7 + number) % 63).collect();
        writer.document(&words).unwrap();
    }
    for sequence in 0..COUNT as u32 {
        writer.answer(Answer {
            sequence,
            start: 10 + sequence,
            end: 13 + sequence,
            fact_start: 2,
            fact_end: 4,
            candidates: 4,
            copy: sequence % 2,
            document: 2 * sequence,
        });
    }
    writer.finish().unwrap();
    path
}

fn context(dir: &Path) -> Context {
    let mut ctx = Context::local::<Evaluate>(dir, &[]);
    ctx.set_threads(2);
    ctx
}

fn scores(runner: &Runner, dir: &Path, hidden: bool) -> Vec<SequenceScore> {
    let shard = TokenShard::open(&shard(dir)).unwrap();
    let work = Work { shard: &shard, sequences: COUNT, batch: 2, hidden };
    runner.scores(work, &mut context(dir), "sequences").unwrap()
}

/// All figures of a sequence in a row.
fn figures(scores: &[SequenceScore]) -> Vec<f32> {
    let one = |score: &SequenceScore| {
        let sums = [score.student.nats, score.teacher.nats, score.agreement.kl];
        let mut all: Vec<f32> = sums.iter().map(|sum| *sum as f32).collect();
        all.extend(score.distances.iter().flatten());
        all
    };
    scores.iter().flat_map(one).collect()
}

#[test]
fn scores_are_those_of_the_cpu() {
    let (dir, student, teacher) = (tempfile::tempdir().unwrap(), student(), teacher());
    let wanted = scores(&Runner::cpu(&student, Some(&teacher)), dir.path(), true);
    let run = |gpu| {
        let runner = Runner::gpu(gpu, &student, Some(&teacher)).unwrap();
        let found = scores(&runner, dir.path(), true);
        assert_eq!(found.len(), COUNT);
        let (mut equal, mut all) = (0, 0);
        for (got, wanted) in found.iter().zip(&wanted) {
            let near = |what, got: f64, wanted: f64, most: f64| {
                assert!((got - wanted).abs() <= most, "{what}: {got} instead of {wanted}");
            };
            near("student", got.student.nats, wanted.student.nats, 5e-3 * wanted.student.nats);
            near("teacher", got.teacher.nats, wanted.teacher.nats, 5e-3 * wanted.teacher.nats);
            near("KL", got.agreement.kl, wanted.agreement.kl, 0.02 * wanted.agreement.kl);
            assert_eq!(got.agreement.tokens, wanted.agreement.tokens);
            assert!(got.agreement.same.abs_diff(wanted.agreement.same) <= 3);
            for side in 0..2 {
                assert_eq!(got.right[side].len(), SEQ);
                let pairs = got.right[side].iter().zip(&wanted.right[side]);
                equal += pairs.filter(|(a, b)| a == b).count();
                all += SEQ;
            }
            for (got, wanted) in got.distances.iter().zip(&wanted.distances) {
                close("distances", got, wanted, 1e-2);
            }
            assert_eq!(got.distances.len(), 2);
        }
        assert!(equal * 100 > all * 97, "{equal} of {all}");
        figures(&found)
    };
    same("scores", &devices().iter().map(run).collect::<Vec<_>>());
}

#[test]
fn a_model_agrees_with_itself_and_needs_no_teacher() {
    let (dir, model) = (tempfile::tempdir().unwrap(), student());
    let gpu = stages::gpu::open().unwrap();
    let both = scores(&Runner::gpu(&gpu, &model, Some(&model)).unwrap(), dir.path(), true);
    let alone = scores(&Runner::gpu(&gpu, &model, None).unwrap(), dir.path(), false);
    for (both, alone) in both.iter().zip(&alone) {
        assert_eq!((both.student, &both.right[0]), (both.teacher, &both.right[1]));
        assert_eq!((both.student, &both.right[0]), (alone.student, &alone.right[0]));
        assert!(both.agreement.kl.abs() < 1e-4 && both.agreement.same == SEQ as u64 - 1);
        assert!(both.distances.iter().flatten().all(|apart| *apart == 0.0));
        assert!(alone.right[1].is_empty() && alone.distances.is_empty());
    }
    // Other depths, other separators.
    let deep = loaded(&[MixerKind::Attention; 3], 3, None);
    let got = scores(&Runner::gpu(&gpu, &model, Some(&deep)).unwrap(), dir.path(), false);
    let wanted = scores(&Runner::cpu(&model, Some(&deep)), dir.path(), false);
    close("figures", &figures(&got), &figures(&wanted), 1e-2);
}

/// Items of many lengths; some inputs are equal, some begin others.
fn items() -> Vec<Item> {
    let mut items = Vec::new();
    for i in 0..14u32 {
        let text: Vec<u32> = (0..60).map(|at| (at * 7 + i / 4 * 5) % 64).collect();
        let (context, asked) = (3 + (i as usize * 11) % 50, 1 + i as usize % 4);
        items.push(Item::new(&text[..context], &text[context..context + asked], 48).unwrap());
        items.push(Item::new(&text[..context], &[i % 40], 48).unwrap());
    }
    items
}

#[test]
fn likelihoods_are_those_of_the_cpu() {
    let (dir, items) = (tempfile::tempdir().unwrap(), items());
    let (student, teacher) = (student(), teacher());
    let ask = |runner: &Runner, who, budget| -> Vec<Likelihood> {
        let mut ctx = context(dir.path());
        runner.likelihoods(who, &items, budget, &mut ctx, "items").unwrap()
    };
    for who in [Who::Student, Who::Teacher] {
        let wanted = ask(&Runner::cpu(&student, Some(&teacher)), who, 100);
        let run = |gpu| {
            let runner = Runner::gpu(gpu, &student, Some(&teacher)).unwrap();
            let found = ask(&runner, who, 100);
            let other = ask(&runner, who, 1000);
            let (mut equal, mut off) = (0, 0.0);
            for ((got, other), wanted) in found.iter().zip(&other).zip(&wanted) {
                let near = |got: &Likelihood| (got.nats - wanted.nats).abs() < 0.15;
                assert!(near(got) && near(other), "{got:?} {other:?} {wanted:?}");
                equal += usize::from(got.greedy == wanted.greedy);
                off += (got.nats - wanted.nats).abs() / items.len() as f32;
            }
            assert!(off < 0.05, "likelihoods are {off} nats off on average");
            assert!(equal + 1 >= items.len(), "{equal} of {}", items.len());
            found.iter().map(|likelihood| likelihood.nats).collect()
        };
        same("likelihoods", &devices().iter().map(run).collect::<Vec<_>>());
    }
}

#[test]
fn the_step_gives_the_figures_of_the_cpu() {
    let dir = tempfile::tempdir().unwrap();
    let tokens = shard(dir.path());
    let save = |name: &str, loaded: &Loaded| {
        let path = dir.path().join(name);
        loaded.model.save(&path, &loaded.params).unwrap();
        path
    };
    let (student, teacher) = (save("s.safetensors", &student()), save("t.safetensors", &teacher()));
    let run = |device| -> Value {
        let out = tempfile::tempdir_in(dir.path()).unwrap();
        let inputs: [(&str, &[&Path]); 4] = [
            ("model", &[&student]),
            ("teacher", &[&teacher]),
            ("tokens", &[&tokens]),
            ("answers", &[&tokens]),
        ];
        let mut ctx = Context::local::<Evaluate>(out.path(), &inputs);
        Evaluate::run(&Params { batch: 2, device, ..Params::default() }, &mut ctx).unwrap();
        serde_json::from_slice(&std::fs::read(&ctx.made()[0].path).unwrap()).unwrap()
    };
    let (wanted, got) = (run(Device::Cpu), run(Device::Cuda));
    for path in [
        "/student/perplexity",
        "/teacher/perplexity",
        "/ratios/perplexity",
        "/agreement/kl",
        "/layers/0/distance",
        "/layers/1/distance",
    ] {
        let [a, b] = [&wanted, &got].map(|found| found.pointer(path).unwrap().as_f64().unwrap());
        assert!((a - b).abs() < 2e-2 * a, "{path}: {b} instead of {a}");
    }
    for path in ["/student/tokens", "/student/answers", "/student/chance"] {
        assert_eq!(wanted.pointer(path), got.pointer(path), "{path}");
    }
}
