//! The pipelines of real teachers, end to end on tiny random models of their families.

use std::fmt::Write as _;
use std::path::Path;

use crate::support::Project;

/// A checkpoint of transformers (see `stages/tests/fixtures/make_models.py`) with a tokenizer of
/// single characters, 96 of them as the checkpoint has.
fn checkpoint(project: &Project, fixture: &str) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("stages/tests/fixtures/models");
    let to = project.path().join("teacher");
    std::fs::create_dir_all(&to).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(from.join(fixture).join(name), to.join(name)).unwrap();
    }
    let mut vocab = String::from(r#""<|endoftext|>": 0, "<unk>": 1"#);
    for (id, c) in (2..96).zip(' '..) {
        write!(vocab, ", {}: {id}", serde_json::json!(c.to_string())).unwrap();
    }
    let tokenizer = format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [{{"id": 0, "content": "<|endoftext|>", "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false, "special": true}}],
        "pre_tokenizer": {{"type": "Split", "pattern": {{"Regex": "(?s)."}},
            "behavior": "Isolated", "invert": false}},
        "post_processor": null, "decoder": {{"type": "Fuse"}},
        "model": {{"type": "WordLevel", "unk_token": "<unk>", "vocab": {{{vocab}}}}}}}"#
    );
    project.write("teacher/tokenizer.json", &tokenizer);
    let piqa =
        r#"{"goal": "To open a door,", "sol1": "turn the handle.", "sol2": "sing.", "label": 0}"#;
    project.write("tasks/piqa.jsonl", &format!("{piqa}\n{piqa}\n"));
    project.write("tasks/lambada_openai.jsonl", "{\"text\": \"One and one makes two\"}\n");
}

/// Runs `pipelines/{file}` with its `cpu` profile, made tinier, and gives the evaluation.
fn evaluation(file: &str, fixture: &str, steps: usize, more: &[&str]) -> serde_json::Value {
    let project = Project::new();
    checkpoint(&project, fixture);
    let pipelines = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    std::fs::copy(pipelines.join(file), project.path().join("p.yaml")).unwrap();
    let mut args = vec!["--profile", "cpu"];
    let sets = [
        "teacher=./teacher",
        "tasks=./tasks/*.jsonl",
        "seq=32",
        "tokens=20e3",
        "layers=[1]",
        "orient.updates=3",
        "align.updates=3",
        "distill.updates=3",
        "orient.batch=128",
        "align.batch=128",
        "distill.batch=128",
        "evaluate.sequences=4",
    ];
    sets.iter().chain(more).for_each(|set| args.extend(["--set", set]));
    assert_eq!(project.run(&args), format!("0 cached, {steps} ran"), "{file}");
    assert_eq!(project.run(&args), format!("{steps} cached, 0 ran"), "{file}");
    let shown = project.pipe(&[&["show", "evaluate", "--json"], &args[..]].concat());
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap();
    shown["metrics"].clone()
}

#[test]
fn every_pipeline_of_a_real_teacher_runs_to_the_end() {
    for (file, fixture, steps, more) in [
        ("smollm2.yaml", "llama", 12, &[][..]),
        ("smollm2.yaml", "qwen2", 12, &[]),
        ("phi-mamba.yaml", "phi", 8, &[]),
        ("hybrid-phi-mamba.yaml", "phi", 8, &["keep=[0]", "layers=[]"]),
        ("llamba-1b.yaml", "llama", 8, &["layers=[]"]),
    ] {
        let metrics = evaluation(file, fixture, steps, more);
        let nats = |side: &str| metrics[side]["nats"].as_f64().unwrap();
        assert!(nats("student") > 0.0 && nats("teacher") > 0.0, "{file}: {metrics}");
        let tasks: Vec<&str> = metrics["tasks"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| t["task"].as_str().unwrap())
            .collect();
        assert_eq!(tasks, ["lambada_openai", "piqa"], "{file}");
    }
}
