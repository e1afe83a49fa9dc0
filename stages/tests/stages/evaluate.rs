//! `evaluate` from outside, on small untrained models.

use std::path::{Path, PathBuf};

use engine::stage::{Context, Stage};
use serde_json::Value;
use stages::data::shard::{Answer, ShardWriter};
use stages::eval::matrices::Pictures;
use stages::evaluate::{Evaluate, Params};
use stages::models::{Config, MixerKind, Model};
use tempfile::TempDir;

const VOCAB: usize = 40;
const SEQ: usize = 24;

fn config(vocab: usize, layers: usize) -> Config {
    Config {
        vocab,
        d_model: 16,
        layers: vec![MixerKind::Attention; layers],
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

struct Case {
    dir: TempDir,
    tokens: PathBuf,
}

impl Case {
    /// A shard of 11 sequences in which everything is said twice, with an answer in each.
    fn new() -> Case {
        let dir = tempfile::tempdir().unwrap();
        let tokens = dir.path().join("answers.bin");
        let mut writer = ShardWriter::create(&tokens, VOCAB, SEQ, 0).unwrap();
        for sequence in 0..11 {
            let words: Vec<u32> = (1..SEQ as u32).map(|i| 1 + (i * 7 + sequence) % 39).collect();
            writer.document(&words).unwrap();
            writer.answer(Answer {
                sequence,
                start: 10 + sequence,
                end: 12 + sequence,
                fact_start: 2,
                fact_end: 4,
                candidates: 4,
                copy: sequence % 2,
                document: sequence,
            });
        }
        writer.finish().unwrap();
        Case { dir, tokens }
    }

    fn model(&self, name: &str, config: Config, seed: u64) -> PathBuf {
        let path = self.dir.path().join(name);
        let model = Model::new(config).unwrap();
        model.save(&path, &model.init(seed)).unwrap();
        path
    }

    fn run(
        &self,
        params: &Params,
        model: &Path,
        teacher: Option<&Path>,
        threads: usize,
    ) -> anyhow::Result<String> {
        let out = tempfile::tempdir_in(self.dir.path()).unwrap();
        let mut inputs: Vec<(&str, Vec<&Path>)> = vec![("model", vec![model])];
        inputs.extend(["tokens", "answers"].map(|port| (port, vec![self.tokens.as_path()])));
        inputs.extend(teacher.map(|teacher| ("teacher", vec![teacher])));
        let inputs: Vec<(&str, &[&Path])> = inputs.iter().map(|(p, v)| (*p, &v[..])).collect();
        let mut ctx = Context::local::<Evaluate>(out.path(), &inputs);
        ctx.set_threads(threads);
        Evaluate::run(params, &mut ctx)?;
        Ok(std::fs::read_to_string(&ctx.made()[0].path)?)
    }
}

#[test]
fn a_model_agrees_with_itself() {
    let case = Case::new();
    let model = case.model("a.safetensors", config(VOCAB, 2), 1);
    let text = case.run(&Params::default(), &model, Some(&model), 2).unwrap();
    let found: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(found["kind"], "evaluation");
    assert_eq!(found["student"], found["teacher"]);
    assert_eq!(
        (&found["agreement"]["top1"], &found["agreement"]["kl"]),
        (&1.0.into(), &0.0.into())
    );
    assert_eq!(found["ratios"]["perplexity"], 1.0);
    assert_eq!(found["layers"].as_array().unwrap().len(), 2);
    assert_eq!(found["layers"][1]["distance"], 0.0);
    let student = &found["student"];
    assert_eq!((&student["answers"], &student["copy_tokens"]), (&6.into(), &10.into()));
    assert_eq!((&student["chance"], &student["tokens"]), (&0.25.into(), &(11 * 23).into()));
    let perplexity = student["perplexity"].as_f64().unwrap();
    assert!((20.0..200.0).contains(&perplexity), "{perplexity}");
}

#[test]
fn bytes_do_not_depend_on_threads() {
    let case = Case::new();
    let model = case.model("a.safetensors", config(VOCAB, 2), 1);
    let teacher = case.model("b.safetensors", config(VOCAB, 2), 2);
    let params = Params { batch: 2, ..Params::default() };
    let one = case.run(&params, &model, Some(&teacher), 1).unwrap();
    assert_eq!(one, case.run(&params, &model, Some(&teacher), 4).unwrap());
    let found: Value = serde_json::from_str(&one).unwrap();
    assert!(found["agreement"]["kl"].as_f64().unwrap() > 0.0);
    assert!(found["layers"][0]["distance"].as_f64().unwrap() > 0.1);
    let fewer = Params { sequences: 3, ..params };
    let found: Value = serde_json::from_str(&case.run(&fewer, &model, None, 2).unwrap()).unwrap();
    assert_eq!(
        (&found["student"]["tokens"], &found["student"]["answers"]),
        (&69.into(), &2.into())
    );
    assert_eq!((&found["teacher"], &found["layers"]), (&Value::Null, &serde_json::json!([])));
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let case = Case::new();
    let error = |params: &Params, model: &Path, teacher: Option<&Path>| {
        format!("{:#}", case.run(params, model, teacher, 2).unwrap_err())
    };
    let model = case.model("a.safetensors", config(VOCAB, 2), 1);
    let small = case.model("b.safetensors", config(30, 2), 1);
    let params = Params::default();
    let text = error(&params, &small, None);
    assert_eq!(text, "`tokens` has a vocabulary of 40, the model one of 30");
    let large = case.model("c.safetensors", config(50, 2), 1);
    assert_eq!(error(&params, &model, Some(&large)), "the model has 40 tokens, its teacher 50");
    let strict = Params { min_recall: Some(0.9), ..Params::default() };
    let text = error(&strict, &model, None);
    assert!(text.contains("is below `min_recall` 0.9 (guessing gives 0.25)"), "{text}");
    assert!(error(&params, &case.tokens, None).contains("no valid safetensors file"));
    // Models of other depth are compared by what they say alone.
    let deep = case.model("d.safetensors", config(VOCAB, 3), 1);
    let text = case.run(&params, &model, Some(&deep), 2).unwrap();
    let found: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(found["layers"], serde_json::json!([]));
}

/// The lower triangle of one side of a pair.
fn rows(pair: &Value, side: &str) -> Vec<Vec<f64>> {
    let rows = pair[side].as_array().unwrap();
    let row = |row: &Value| row.as_str().unwrap().split(' ').map(|x| x.parse().unwrap()).collect();
    rows.iter().map(row).collect()
}

#[test]
fn mixing_matrices_stand_beside_attention() {
    let case = Case::new();
    let teacher = case.model("t.safetensors", config(VOCAB, 3), 1);
    let kinds = [MixerKind::Ssm, MixerKind::Attention, MixerKind::Ssm];
    let student = Config { layers: kinds.to_vec(), ..config(VOCAB, 3) };
    let student = case.model("s.safetensors", student, 2);
    let found = |params: &Params| -> Value {
        let text = case.run(params, &student, Some(&teacher), 2).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["matrices"].clone()
    };
    let all = found(&Params::default());
    let names: Vec<_> = all.as_array().unwrap().iter().map(|p| (&p["layer"], &p["head"])).collect();
    let wanted = [(0, 0), (0, 1), (2, 0), (2, 1)].map(|(l, h)| (Value::from(l), Value::from(h)));
    assert_eq!(names, wanted.iter().map(|(l, h)| (l, h)).collect::<Vec<_>>());
    for pair in all.as_array().unwrap() {
        let (a, m) = (rows(pair, "teacher"), rows(pair, "student"));
        assert_eq!((a.len(), m.len()), (SEQ, SEQ), "the text has no more tokens");
        let (mut apart, mut size) = (0.0, 0.0);
        for (l, (a, m)) in a.iter().zip(&m).enumerate() {
            assert_eq!((a.len(), m.len()), (l + 1, l + 1));
            // Attention sums to one: 1000, but for rounding.
            assert!((a.iter().sum::<f64>() - 1e3).abs() < 0.5 * (l + 1) as f64 + 1e-9, "{a:?}");
            apart += a.iter().zip(m).map(|(a, m)| (m - a) * (m - a)).sum::<f64>();
            size += a.iter().map(|a| a * a).sum::<f64>();
        }
        let distance = pair["distance"].as_f64().unwrap();
        assert!((distance - (apart / size).sqrt()).abs() < 2e-2 * distance, "{distance}");
    }
    let some = |layers: &[usize], heads: &[usize], tokens| Params {
        pictures: Pictures { layers: layers.to_vec(), heads: heads.to_vec(), tokens },
        ..Params::default()
    };
    let one = found(&some(&[2], &[1], 5));
    assert_eq!(one.as_array().unwrap().len(), 1);
    // Causal: a shorter text has the same rows.
    assert_eq!(rows(&one[0], "student"), rows(&all[3], "student")[..5]);
    assert_eq!(found(&some(&[], &[0], 0)), Value::Null);
    let error = case.run(&some(&[1], &[0], 5), &student, Some(&teacher), 2).unwrap_err();
    assert!(error.to_string().contains("layer 1 is none in which attention was replaced"));
    assert!(Evaluate::check(&some(&[0], &[0], 4000))[0].0 == "pictures.tokens");
}
