//! Our benchmarks against lm-evaluation-harness 0.4.13: what it did on a hundred documents a task
//! with SmolLM2-135M-Instruct (`fixtures/make_harness.py`) is in `fixtures/harness`.
//!
//! Scoring is compared always, texts where `PIPE_TEST_DATA` has the documents, token ids where there
//! is the model's tokenizer too. The likelihoods of our own model take minutes: by hand, see
//! [`likelihoods_are_those_of_the_harness`].

#![expect(clippy::print_stderr, reason = "a skipped test says so")]

use std::path::{Path, PathBuf};

use engine::stage::{Context, Stage};
use engine::tensors::Tensors;
use flate2::Crc;
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value;
use stages::eval::likelihood::{Likelihood, likelihoods};
use stages::eval::runner::Loaded;
use stages::eval::tasks::encode::Encoder;
use stages::eval::tasks::results::{Outcome, TaskFigures, judge};
use stages::eval::tasks::{Document, Kind, Request, TASKS, Task};
use stages::evaluate::{Evaluate, Params};
use stages::models::Model;
use stages::teacher::Teacher;

/// What the harness did on a task.
#[derive(Deserialize)]
struct Fixture {
    results: std::collections::BTreeMap<String, f64>,
    whole: Whole,
    documents: Vec<Row>,
}

/// Digests of more than the documents that were scored.
#[derive(Deserialize)]
struct Whole {
    documents: usize,
    requests: usize,
    texts: String,
    encoded: usize,
    ids: String,
}

/// Right choice, accuracies, choices.
#[derive(Deserialize)]
struct Row(usize, u8, Option<u8>, Vec<Choice>);

/// Likelihood, greedy, tokens of context and continuation, characters, digest of the tokens.
#[derive(Deserialize)]
struct Choice(f32, u8, usize, usize, usize, String);

fn fixture(task: &Task) -> Option<Fixture> {
    let name = format!("tests/fixtures/harness/{}.json", task.name);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    // The validation split is scored as the test split is.
    let text = std::fs::read(path).ok().filter(|_| task.name != "openbookqa_validation")?;
    Some(serde_json::from_slice(&text).unwrap())
}

fn fixtures() -> Vec<(&'static Task, Fixture)> {
    let found: Vec<_> = TASKS.iter().filter_map(|task| Some((task, fixture(task)?))).collect();
    assert_eq!(found.len(), 8);
    found
}

fn data() -> Option<PathBuf> {
    let found = std::env::var_os("PIPE_TEST_DATA").map(|data| PathBuf::from(data).join("eval"));
    if found.is_none() {
        eprintln!("skipped: PIPE_TEST_DATA is not set");
    }
    found
}

/// The GGUF file of SmolLM2-135M-Instruct, where there is one.
fn teacher() -> Option<PathBuf> {
    let found = std::env::var_os("PIPE_TEST_TEACHER").map(PathBuf::from);
    if found.is_none() {
        eprintln!("skipped: PIPE_TEST_TEACHER is not set");
    }
    found
}

/// With BOS for empty contexts, as the model's files say.
fn encoder(length: usize) -> Option<Encoder> {
    let tokenizer = stages::foreign::open(&teacher()?, None).unwrap().tokenizer.unwrap();
    let bos = tokenizer.token_to_id("<|im_start|>");
    Some(Encoder::new(tokenizer, bos, length).unwrap())
}

fn digest(ids: &[u32]) -> String {
    let mut crc = Crc::new();
    ids.iter().for_each(|id| crc.update(&id.to_le_bytes()));
    format!("{:08x}", crc.sum())
}

#[test]
fn the_same_likelihoods_give_the_same_accuracies() {
    for (task, fixture) in fixtures() {
        let mut outcomes: Vec<Outcome> = Vec::new();
        for (number, Row(gold, acc, acc_norm, choices)) in fixture.documents.iter().enumerate() {
            let empty = || Request { context: String::new(), continuation: String::new() };
            let document = Document {
                requests: choices.iter().map(|_| empty()).collect(),
                lengths: choices.iter().map(|choice| choice.4).collect(),
                gold: *gold,
            };
            let of = |choice: &Choice| Likelihood { nats: choice.0, greedy: choice.1 == 1 };
            let likelihoods: Vec<Likelihood> = choices.iter().map(of).collect();
            let outcome = judge(task.kind, &document, &likelihoods);
            let place = format!("{} {number}", task.name);
            assert_eq!(outcome.acc, *acc == 1, "{place}");
            assert!(acc_norm.is_none_or(|norm| outcome.acc_norm == (norm == 1)), "{place}");
            outcomes.push(outcome);
        }
        assert_eq!(outcomes.len(), 100);
        let found = serde_json::to_value(TaskFigures::of(task.kind, &outcomes)).unwrap();
        for (name, wanted) in &fixture.results {
            let found = found[name].as_f64().unwrap_or_else(|| panic!("{}: no {name}", task.name));
            // The harness draws samples for the error of a perplexity.
            let near = if name == "perplexity_stderr" { 0.2 } else { 1e-5 };
            let apart = (found - wanted).abs() / wanted;
            assert!(apart < near, "{} {name}: {found}, the harness has {wanted}", task.name);
        }
        let given = found.as_object().unwrap().iter().filter(|(_, value)| !value.is_null());
        assert_eq!(given.count(), fixture.results.len(), "{}", task.name);
    }
}

#[test]
fn documents_become_the_same_requests() {
    let Some(data) = data() else { return };
    for (task, fixture) in fixtures() {
        let documents = task.read(&data.join(format!("{}.jsonl", task.name)), None).unwrap();
        let requests = || documents.iter().flat_map(|document| &document.requests);
        let mut crc = Crc::new();
        for Request { context, continuation } in requests() {
            crc.update(format!("{context}\0{continuation}\0").as_bytes());
        }
        let Whole { documents: count, requests: asked, texts, .. } = &fixture.whole;
        assert_eq!((documents.len(), requests().count()), (*count, *asked), "{}", task.name);
        assert_eq!(format!("{:08x}", crc.sum()), *texts, "{}", task.name);
        for (document, Row(gold, _, _, choices)) in documents.iter().zip(&fixture.documents) {
            let lengths: Vec<usize> = choices.iter().map(|choice| choice.4).collect();
            assert_eq!((document.gold, &document.lengths), (*gold, &lengths), "{}", task.name);
        }
    }
}

#[test]
fn requests_become_the_same_tokens() {
    let (Some(data), Some(encoder)) = (data(), encoder(8192)) else { return };
    for (task, fixture) in fixtures() {
        let path = data.join(format!("{}.jsonl", task.name));
        let documents = task.read(&path, Some(500)).unwrap();
        let (mut all, mut encoded) = (Crc::new(), 0);
        for (number, document) in documents.iter().enumerate() {
            for (choice, request) in document.requests.iter().enumerate() {
                let pair = encoder.pair(&request.context, &request.continuation).unwrap();
                let digest = digest(&[pair.0.clone(), pair.1.clone()].concat());
                all.update(digest.as_bytes());
                encoded += 1;
                let Some(Row(.., choices)) = fixture.documents.get(number) else { continue };
                let Choice(_, _, context, continuation, _, wanted) = &choices[choice];
                let place = format!("{} {number} {choice}", task.name);
                assert_eq!((pair.0.len(), pair.1.len()), (*context, *continuation), "{place}");
                assert_eq!(digest, *wanted, "{place}");
            }
        }
        let whole = (fixture.whole.encoded, fixture.whole.ids);
        assert_eq!((encoded, format!("{:08x}", all.sum())), whole, "{}", task.name);
    }
}

/// Context, continuation, longest input, likelihood, greedy, tokens of both.
#[derive(Deserialize)]
struct Edge(String, String, usize, f32, u8, Vec<u32>, Vec<u32>);

fn edges() -> Vec<Edge> {
    serde_json::from_str(include_str!("../fixtures/harness/edges.json")).unwrap()
}

#[test]
fn odd_pairs_become_the_same_tokens() {
    for Edge(context, continuation, length, _, _, before, after) in edges() {
        let Some(encoder) = encoder(length) else { return };
        let pair = encoder.pair(&context, &continuation).unwrap();
        assert_eq!(pair, (before, after), "{context:?} {continuation:?}");
    }
}

/// Every likelihood beside the harness'. By hand, minutes in release:
/// `PIPE_TEST_TEACHER=FILE.gguf cargo test --release -p stages -- --ignored of_the_harness`
#[test]
#[ignore = "takes minutes, and SmolLM2-135M-Instruct as PIPE_TEST_TEACHER"]
fn likelihoods_are_those_of_the_harness() {
    let data = data().expect("PIPE_TEST_DATA");
    let read = tempfile::tempdir().unwrap();
    let mut ctx = Context::local::<Teacher>(read.path(), &[("model", &[&teacher().unwrap()])]);
    Teacher::run(&Default::default(), &mut ctx).unwrap();
    let model = read.path().join("out/model/model.safetensors");
    let tokenizer = read.path().join("out/tokenizer/tokenizer.json");
    let files: Vec<PathBuf> =
        fixtures().iter().map(|(task, _)| data.join(format!("{}.jsonl", task.name))).collect();
    let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let out = tempfile::tempdir().unwrap();
    let inputs: &[(&str, &[&Path])] =
        &[("model", &[&model]), ("tokenizer", &[&tokenizer]), ("tasks", &files)];
    let mut ctx = Context::local::<Evaluate>(out.path(), inputs);
    ctx.set_threads(std::thread::available_parallelism().map_or(2, usize::from));
    let params = Params { limit: Some(100), ..Params::default() };
    Evaluate::run(&params, &mut ctx).unwrap();
    let lines = std::fs::read_to_string(out.path().join("out/scores/scores.jsonl")).unwrap();
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    odd_pairs(&model);
    for (task, fixture) in fixtures() {
        let own = lines.iter().filter(|line| line["task"] == task.name);
        compare(task, &fixture, &own.collect::<Vec<_>>());
    }
}

fn odd_pairs(path: &Path) {
    let (model, params) = Model::load(&Tensors::open(path).unwrap()).unwrap();
    let (loaded, out) = (Loaded { model, params }, tempfile::tempdir().unwrap());
    for Edge(context, continuation, length, nats, greedy, ..) in edges() {
        let request = Request { context, continuation };
        let item = encoder(length).unwrap().item(&request).unwrap();
        let mut ctx = Context::local::<Evaluate>(out.path(), &[]);
        let own = likelihoods(&loaded, &[item], length, &mut ctx, "pairs").unwrap()[0];
        eprintln!("{request:?}: {own:?}, the harness has {nats}");
        assert!((own.nats - nats).abs() < 3e-4 && own.greedy == (greedy == 1));
    }
}

fn compare(task: &Task, fixture: &Fixture, lines: &[&Value]) {
    assert_eq!(lines.len(), fixture.documents.len(), "{}", task.name);
    let (mut most, mut right, mut greedy) = (0f32, [0, 0], 0);
    for (number, (line, Row(gold, acc, acc_norm, choices))) in
        lines.iter().zip(&fixture.documents).enumerate()
    {
        let own: Vec<(f32, bool)> = serde_json::from_value(line["student"].clone()).unwrap();
        assert_eq!(own.len(), choices.len(), "{} {number}", task.name);
        for ((nats, hit), choice) in own.iter().zip(choices) {
            most = most.max((nats - choice.0).abs());
            greedy += usize::from(*hit != (choice.1 == 1));
        }
        let document = Document {
            requests: Vec::new(),
            lengths: choices.iter().map(|choice| choice.4).collect(),
            gold: *gold,
        };
        let likelihoods: Vec<Likelihood> =
            own.iter().map(|(nats, greedy)| Likelihood { nats: *nats, greedy: *greedy }).collect();
        let outcome = judge(task.kind, &document, &likelihoods);
        right[0] += u8::from(outcome.acc);
        right[1] += acc;
        let norm = acc_norm.is_some_and(|norm| outcome.acc_norm != (norm == 1));
        if norm || outcome.acc != (*acc == 1) {
            eprintln!("{} {number}: another answer, {own:?}", task.name);
        }
    }
    eprintln!("{}: {right:?} right, log-likelihoods {most:e} apart, {greedy} greedy", task.name);
    assert!(most < 3e-4 && right[0] == right[1], "{}", task.name);
}

/// A line that some task takes.
const LINES: [&str; 7] = [
    r#"{"text":"a b c"}"#,
    r#"{"activity_label":"x","ctx_a":"A [b] c.","ctx_b":"he","endings":["e [title] f","g"],"label":"1"}"#,
    r#"{"goal":"g","sol1":"a","sol2":"b","label":1}"#,
    r#"{"question":"q","choices":{"text":["x","y"],"label":["A","B"]},"answerKey":"B"}"#,
    r#"{"question_stem":"q","choices":{"text":["x","y"],"label":["A","B"]},"answerKey":" B"}"#,
    r#"{"sentence":"a _ b","option1":"x","option2":"y","answer":"2"}"#,
    r#"{"passage":"p","question":"q","answer":true}"#,
];

#[test]
fn every_task_takes_its_own_lines_alone() {
    for (task, taken) in TASKS.iter().zip([0, 1, 2, 3, 3, 5, 6, 4, 4]) {
        for (number, line) in LINES.iter().enumerate() {
            let found = task.document(line.as_bytes());
            assert_eq!(found.is_ok(), number == taken, "{} {line}", task.name);
            let Ok(document) = found else { continue };
            let cloze = task.kind == Kind::Cloze;
            assert_eq!(document.gold, usize::from(!cloze), "{}", task.name);
        }
    }
}

#[test]
fn what_is_wrong_is_told_with_file_and_line() {
    let dir = tempfile::tempdir().unwrap();
    let error = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let read = |task: &Task| task.read(&path, None);
        format!("{:#}", Task::of_file(name).and_then(read).unwrap_err())
    };
    let good = LINES[2];
    let cases = [
        (
            "piqa.jsonl",
            format!("{good}\n\n{{\"goal\":\"g\"}}"),
            "`piqa.jsonl`, line 3: missing field `sol1`",
        ),
        ("piqa.jsonl", good.replace("\"label\":1", "\"label\":2"), "answer 2 is none of 2 choices"),
        ("arc_easy.jsonl", LINES[3].replace("\"B\"}", "\"C\"}"), "no choice is labelled `C`"),
        ("arc_easy.jsonl", LINES[3].replace("[\"A\",", "["), "2 texts and 1 labels"),
        ("winogrande.jsonl", LINES[5].replace('_', ""), "`sentence` has no `_`"),
        ("winogrande.jsonl", LINES[5].replace("\"2\"", "\"3\""), "`answer` is `3`"),
        ("boolq.jsonl", LINES[6].replace(",\"answer\":true", ""), "missing field `answer`"),
        ("hellaswag.jsonl", LINES[1].replace("\"1\"", "\"\""), "`label` is ``"),
        ("lambada_openai.jsonl", "\n \n".into(), "`lambada_openai.jsonl` has no document"),
        ("squad.jsonl", good.into(), "lambada_openai.jsonl, hellaswag.jsonl, piqa.jsonl"),
    ];
    for (name, text, wanted) in cases {
        let found = error(name, &text);
        assert!(found.contains(wanted), "{found}");
    }
    let many = format!("[{}]", vec!["\"x\""; 1000].join(","));
    let text = LINES[3].replace("[\"x\",\"y\"]", &many).replace("[\"A\",\"B\"]", &many);
    let found = error("arc_easy.jsonl", &text.replace("\"B\"", "\"x\""));
    assert!(found.contains("1000 choices are more than 64"), "{found}");
}

proptest! {
    #[test]
    fn hostile_lines_never_panic(
        line in 0..LINES.len(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<Vec<u8>>()), 1..4),
        noise in any::<Vec<u8>>(),
    ) {
        let mut bytes = LINES[line].as_bytes().to_vec();
        for (at, put) in edits {
            let at = at.index(bytes.len());
            bytes.splice(at..(at + 1).min(bytes.len()), put);
            if bytes.is_empty() {
                bytes.push(b'{');
            }
        }
        for task in TASKS {
            let _ = task.document(&noise);
            if let Ok(document) = task.document(&bytes) {
                prop_assert!(document.gold < document.requests.len());
                prop_assert_eq!(document.lengths.len(), document.requests.len());
            }
        }
    }

    #[test]
    fn hostile_texts_never_panic(a in "\\PC*|[\\[\\] \n_ß]*", b in "\\PC*|[\\[\\] \n_]*") {
        let quoted = |text: &str| serde_json::to_string(text).unwrap();
        let (a, b) = (quoted(&a), quoted(&b));
        let lines = [
            format!("{{\"text\":{a}}}"),
            format!("{{\"activity_label\":{a},\"ctx_a\":{b},\"ctx_b\":{a},\"endings\":[{b},{a}],\"label\":1}}"),
            format!("{{\"sentence\":{a},\"option1\":{b},\"option2\":{a},\"answer\":\"1\"}}"),
        ];
        for task in TASKS {
            for line in &lines {
                let _ = task.document(line.as_bytes());
            }
        }
    }
}
