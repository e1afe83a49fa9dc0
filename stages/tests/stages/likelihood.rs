//! Likelihoods of continuations, benchmarks and probes on small untrained models.

use std::path::{Path, PathBuf};

use engine::stage::{Context, Stage};
use serde_json::{Value, json};
use stages::eval::likelihood::{Item, Likelihood, likelihoods};
use stages::eval::runner::Loaded;
use stages::evaluate::{Evaluate, Params};
use stages::models::{Config, Keep, MixerKind, Model};
use stages::ops::Dims;
use tempfile::TempDir;
use tokenizers::Tokenizer;

fn config(vocab: usize, layers: [MixerKind; 2]) -> Config {
    Config {
        vocab,
        d_model: 16,
        layers: layers.to_vec(),
        heads: 2,
        kv_heads: 2,
        head_dim: 8,
        ffn: 24,
        norm_eps: 1e-5,
        rope_theta: 1e4,
        tied: true,
        separator: Some(0),
        d_state: 8,
        d_conv: 4,
        chunk: 8,
        ..Config::default()
    }
}

/// By its seed a transformer, its student or a hybrid.
fn loaded(vocab: usize, seed: u64) -> Loaded {
    let layers = match seed % 3 {
        0 => [MixerKind::Attention; 2],
        1 => [MixerKind::Ssm; 2],
        _ => [MixerKind::Ssm, MixerKind::Attention],
    };
    let model = Model::new(config(vocab, layers)).unwrap();
    let params = model.init(seed);
    Loaded { model, params }
}

fn context(dir: &TempDir, threads: usize) -> Context {
    let mut ctx = Context::local::<Evaluate>(dir.path(), &[]);
    ctx.set_threads(threads);
    ctx
}

/// Items of many lengths; some inputs are equal, some begin others.
fn items(length: usize) -> Vec<Item> {
    let mut items = Vec::new();
    for i in 0..23u32 {
        let text: Vec<u32> = (0..40).map(|at| 1 + (at * 7 + i / 4 * 5) % 39).collect();
        let (context, asked) = (3 + (i as usize * 11) % 30, 1 + i as usize % 4);
        items.push(Item::new(&text[..context], &text[context..context + asked], length).unwrap());
        items.push(Item::new(&text[..context], &[i % 40], length).unwrap());
    }
    items
}

/// The same one by one: a whole pass for each, without anything that is shared or padded.
fn alone(loaded: &Loaded, context: &[u32], continuation: &[u32]) -> Likelihood {
    let all = [context, continuation].concat();
    let seq = all.len() - 1;
    let mut pass = loaded.model.pass(Dims { batch: 1, seq }, Keep::Nothing);
    pass.tokens_n.copy_from_slice(&all[..seq]);
    loaded.model.forward(&loaded.params.flat, &mut pass, |_, _, _| {});
    let vocab = loaded.model.config.vocab;
    let mut logits = vec![0.0; seq * vocab];
    loaded.model.logits(&loaded.params.flat, &pass, 0..seq, &mut logits);
    let (mut nats, mut greedy) = (0.0, true);
    for (at, token) in continuation.iter().enumerate() {
        let row = &logits[(context.len() + at - 1) * vocab..][..vocab];
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        nats += f64::from(row[*token as usize]) - sum.ln();
        greedy &= row.iter().all(|x| *x <= row[*token as usize]);
    }
    Likelihood { nats: nats as f32, greedy }
}

fn near(a: Likelihood, b: Likelihood) -> bool {
    (a.nats - b.nats).abs() < 1e-5 && a.greedy == b.greedy
}

#[test]
fn batched_is_as_one_by_one() {
    for seed in [1, 2, 3] {
        batched_as_one_by_one(&loaded(40, seed));
    }
}

fn batched_as_one_by_one(model: &Loaded) {
    let dir = tempfile::tempdir().unwrap();
    let items = items(64);
    let all = likelihoods(model, &items, 128, &mut context(&dir, 2), "items").unwrap();
    for budget in [1, 17, 100_000] {
        let found = likelihoods(model, &items, budget, &mut context(&dir, 3), "items").unwrap();
        assert!(all.iter().zip(&found).all(|(a, b)| near(*a, *b)), "{budget}");
    }
    let text: Vec<u32> = (0..40).map(|at| 1 + (at * 7) % 39).collect();
    for (i, asked) in [(0usize, 1usize), (1, 2), (2, 3), (3, 4)] {
        let context = 3 + (i * 11) % 30;
        let wanted = alone(model, &text[..context], &text[context..context + asked]);
        assert!(near(all[2 * i], wanted), "{i}: {:?} {wanted:?}", all[2 * i]);
        assert!(near(all[2 * i + 1], alone(model, &text[..context], &[i as u32])), "{i}");
    }
    assert!(all.iter().any(|l| l.nats < -2.0) && all.iter().all(|l| l.nats < 0.0));
}

#[test]
fn bits_depend_on_no_thread() {
    let (dir, model) = (tempfile::tempdir().unwrap(), loaded(40, 4));
    let run = |threads| {
        let all = likelihoods(&model, &items(64), 96, &mut context(&dir, threads), "items");
        all.unwrap().iter().map(|l| (l.nats.to_bits(), l.greedy)).collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(4));
}

#[test]
fn long_inputs_lose_their_beginning() {
    let (dir, model) = (tempfile::tempdir().unwrap(), loaded(40, 5));
    let text: Vec<u32> = (0..30).map(|at| 1 + (at * 11) % 39).collect();
    let ask = |item: Item| likelihoods(&model, &[item], 64, &mut context(&dir, 1), "").unwrap()[0];
    let cut = Item::new(&text[..26], &text[26..], 9).unwrap();
    assert_eq!(cut.len(), 9);
    assert!(near(ask(cut), alone(&model, &text[20..26], &text[26..])));
    let barely = Item::new(&text[..26], &text[26..], 4).unwrap();
    assert!(near(ask(barely), alone(&model, &text[25..26], &text[26..])));
    for (context, continuation, wanted) in [
        (&text[..26], &text[25..], "has 5 tokens, `max_length` is 4"),
        (&text[..0], &text[..1], "no context"),
        (&text[..1], &text[..0], "no token of its own"),
    ] {
        let error = Item::new(context, continuation, 4).unwrap_err().to_string();
        assert!(error.contains(wanted), "{error}");
    }
    let strange = Item::new(&[1, 40], &[2], 9).unwrap();
    let error = likelihoods(&model, &[strange], 9, &mut context(&dir, 1), "").unwrap_err();
    assert_eq!(error.to_string(), "token 40 is asked of a model that has 40");
}

/// Bytes as tokens 1 to 256, after a special token.
fn tokenizer(dir: &Path) -> PathBuf {
    let mut bytes: Vec<char> = (0..256u32).map(|b| char::from_u32(b).unwrap()).collect();
    // GPT-2's names of bytes: those that cannot be seen are moved behind.
    let mut moved = 256;
    for (byte, name) in bytes.iter_mut().enumerate() {
        if !matches!(byte, 33..=126 | 161..=172 | 174..=255) {
            *name = char::from_u32(moved).unwrap();
            moved += 1;
        }
    }
    let vocab: serde_json::Map<String, Value> =
        bytes.iter().enumerate().map(|(i, c)| (c.to_string(), json!(i + 1))).collect();
    let mut vocab = vocab;
    vocab.insert("<|bos|>".into(), json!(0));
    let special = json!({"id": 0, "content": "<|bos|>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true});
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": false});
    let file = json!({"version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special], "normalizer": null, "pre_tokenizer": level,
        "post_processor": null, "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []}});
    let path = dir.join("tokenizer.json");
    std::fs::write(&path, file.to_string()).unwrap();
    let made = Tokenizer::from_file(&path).unwrap();
    assert_eq!(made.encode("a \n", false).unwrap().get_ids(), [98, 33, 11]);
    path
}

struct Case {
    dir: TempDir,
    files: Vec<(&'static str, PathBuf)>,
}

impl Case {
    fn new() -> Case {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: String| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let piqa = |i: usize| json!({"goal": format!("goal {i}"), "sol1": "a".repeat(1 + i % 5), "sol2": "bc", "label": i % 2});
        let lambada =
            |i: usize| json!({"text": if i == 2 { "alone".into() } else { format!("word {i}") }});
        let lines = |of: &dyn Fn(usize) -> Value| {
            (0..12).map(|i| format!("{}\n", of(i))).collect::<String>()
        };
        let files = vec![
            ("model", dir.path().join("model.safetensors")),
            ("teacher", dir.path().join("teacher.safetensors")),
            ("tokenizer", tokenizer(dir.path())),
            ("tasks", file("piqa.jsonl", lines(&piqa))),
            ("tasks", file("lambada_openai.jsonl", lines(&lambada))),
        ];
        for (seed, (_, path)) in files[..2].iter().enumerate() {
            let Loaded { model, params } = loaded(300, seed as u64);
            model.save(path, &params).unwrap();
        }
        Case { dir, files }
    }

    /// A step over all files but those at the ports `without`.
    fn context(&self, out: &Path, without: &[&str]) -> Context {
        let mut inputs: Vec<(&str, Vec<&Path>)> = Vec::new();
        for (port, path) in self.files.iter().filter(|(port, _)| !without.contains(port)) {
            match inputs.iter_mut().find(|(name, _)| name == port) {
                Some((_, paths)) => paths.push(path),
                None => inputs.push((port, vec![path])),
            }
        }
        let inputs: Vec<(&str, &[&Path])> = inputs.iter().map(|(p, v)| (*p, &v[..])).collect();
        Context::local::<Evaluate>(out, &inputs)
    }

    fn out(&self) -> TempDir {
        tempfile::tempdir_in(self.dir.path()).unwrap()
    }
}

fn made(out: &Path) -> [String; 2] {
    ["metrics/metrics.json", "scores/scores.jsonl"]
        .map(|name| std::fs::read_to_string(out.join("out").join(name)).unwrap())
}

#[test]
fn benchmarks_are_scored_for_both_models() {
    let case = Case::new();
    let out = case.out();
    let params = Params { limit: Some(10), batch_tokens: 64, ..Params::default() };
    Evaluate::run(&params, &mut case.context(out.path(), &[])).unwrap();
    let [metrics, scores] = made(out.path());
    let found: Value = serde_json::from_str(&metrics).unwrap();
    assert_eq!((&found["student"], &found["average"]), (&Value::Null, &Value::Null));
    let [piqa, lambada] = &found["tasks"].as_array().unwrap()[..] else { panic!("{metrics}") };
    assert_eq!(
        (&piqa["task"], &piqa["n"], &piqa["chance"]),
        (&json!("piqa"), &json!(10), &json!(0.5))
    );
    assert!(
        piqa["student"]["acc_norm_stderr"].is_number() && piqa["difference"]["value"].is_number()
    );
    assert_ne!(lambada["student"]["perplexity"], lambada["teacher"]["perplexity"]);
    assert!(lambada["student"]["perplexity"].as_f64().unwrap() > 300.0);
    let lines: Vec<Value> =
        scores.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 20);
    let hits = |side: &str| {
        let right = |line: &&Value| {
            let nats = |at: usize| line[side][at][0].as_f64().unwrap();
            line["task"] == "piqa" && (nats(1) > nats(0)) == (line["gold"] == 1)
        };
        lines.iter().filter(right).count() as f64 / 10.0
    };
    assert_eq!(piqa["student"]["acc"], json!(hits("student")));
    assert_eq!(piqa["teacher"]["acc"], json!(hits("teacher")));
}

#[test]
fn a_killed_evaluation_goes_on_with_the_next_task() {
    let case = Case::new();
    let params = Params { batch_tokens: 64, ..Params::default() };
    let whole = case.out();
    Evaluate::run(&params, &mut case.context(whole.path(), &[])).unwrap();
    // The second task cannot be read: both models' answers to the first one are kept.
    let cut = case.out();
    let text = std::fs::read_to_string(&case.files[4].1).unwrap();
    std::fs::write(&case.files[4].1, "{").unwrap();
    let error = Evaluate::run(&params, &mut case.context(cut.path(), &[])).unwrap_err();
    assert!(format!("{error:#}").contains("`lambada_openai.jsonl`, line 1"), "{error:#}");
    std::fs::write(&case.files[4].1, text).unwrap();
    // Two sets of answers are kept, and only the two others are asked for.
    let mut ctx = case.context(cut.path(), &[]);
    assert_eq!(ctx.checkpoint_latest().unwrap().position, 2);
    ctx.set_threads(3);
    Evaluate::run(&params, &mut ctx).unwrap();
    assert_eq!(made(whole.path()), made(cut.path()));
    assert_eq!(ctx.checkpoint_latest().unwrap().position, 4);
}

#[test]
fn probes_ask_both_models() {
    let case = Case::new();
    let out = case.out();
    let probes = json!({"recall": {"pairs": [3, 12], "queries": 6}, "needle": {"lengths": [420],
        "depths": [0.0, 1.0], "n": 3, "candidates": 2}, "seed": 7});
    let params = Params { probes: serde_json::from_value(probes).unwrap(), ..Params::default() };
    assert_eq!(Evaluate::check(&params), []);
    Evaluate::run(&params, &mut case.context(out.path(), &["tasks"])).unwrap();
    let text = std::fs::read_to_string(out.path().join("out/metrics/metrics.json")).unwrap();
    let found: Value = serde_json::from_str(&text).unwrap();
    let probes = &found["probes"];
    let chance = |row: &Value| (row["n"].as_u64().unwrap(), row["chance"].as_f64().unwrap());
    let recall = probes["recall"].as_array().unwrap();
    assert_eq!(
        recall.iter().map(|row| row["pairs"].as_u64().unwrap()).collect::<Vec<_>>(),
        [3, 12]
    );
    assert_eq!(recall.iter().map(chance).collect::<Vec<_>>(), [(6, 0.333333), (6, 0.25)]);
    let by_distance = probes["recall_by_distance"].as_array().unwrap();
    assert_eq!(by_distance.iter().map(|row| chance(row).0).sum::<u64>(), 12);
    let needle = probes["needle"].as_array().unwrap();
    assert_eq!(needle.iter().map(chance).collect::<Vec<_>>(), [(3, 0.5), (3, 0.5)]);
    assert_eq!(needle[1]["depth"], 1.0);
    assert!(
        needle[1]["student"]["chosen"].is_number() && needle[1]["teacher"]["exact"].is_number()
    );
}

#[test]
fn what_cannot_be_asked_is_refused() {
    let case = Case::new();
    let error = |params: &Params, without: &[&str]| {
        let out = case.out();
        format!("{:#}", Evaluate::run(params, &mut case.context(out.path(), without)).unwrap_err())
    };
    let params = Params::default();
    assert!(error(&params, &["tasks"]).contains("nothing to evaluate on"));
    assert!(error(&params, &["tokenizer"]).contains("connect the model's `tokenizer`"));
    let wrong = Params { prefix_token: Some("<bos>".into()), ..Params::default() };
    assert!(error(&wrong, &[]).contains("`<bos>`, which the tokenizer does not have"));
    let mut probes = params.clone();
    probes.probes.recall = Some(serde_json::from_value(json!({"pairs": [200]})).unwrap());
    let text = error(&probes, &["tasks"]);
    assert!(text.contains("200 pairs make") && text.contains("ask for fewer pairs"), "{text}");
    let mut probes = params.clone();
    probes.probes.needle = Some(serde_json::from_value(json!({"lengths": [100]})).unwrap());
    assert!(error(&probes, &["tasks"]).contains("a needle in 100 tokens has no room"));
    let Loaded { model, params: weights } = loaded(200, 1);
    model.save(&case.files[0].1, &weights).unwrap();
    let text = error(&params, &["teacher"]);
    assert!(text.contains("the tokenizer has 257 tokens, the model 200"), "{text}");
    let checked = |params: &Value| {
        Evaluate::check(&serde_json::from_value(params.clone()).unwrap()).into_iter().map(|c| c.0)
    };
    let bad = json!({"limit": 0, "max_length": 9000, "probes": {"recall": {"pairs": []},
        "needle": {"lengths": [9001], "depths": [2.0], "n": 0}}});
    let names = [
        "limit",
        "max_length",
        "probes.recall.pairs",
        "probes.needle.lengths",
        "probes.needle.depths",
        "probes.needle.n",
    ];
    assert_eq!(checked(&bad).collect::<Vec<_>>(), names);
}
