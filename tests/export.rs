//! `pipe export`: directories from outside, read back, refused, replaced.

use std::fs;
use std::path::{Path, PathBuf};

use engine::tensors::Tensors;
use serde_json::Value;
use stages::models::family::hub;
use stages::models::{Config, Family, MixerKind, published};

use crate::support::Project;

const TINY: &str = include_str!("cases/tiny.yaml");

/// The tiny pipeline, done.
fn done() -> Project {
    let project = Project::with(TINY);
    project.run(&[]);
    project
}

/// `pipe export ARGS`, which must succeed, as JSON.
fn export(project: &Project, args: &[&str]) -> Value {
    let ran = project.pipe(&[&["export"], args, &["--json"]].concat());
    assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap()
}

/// `pipe export ARGS`, which must be refused as the user's mistake, with `words`.
fn refused(project: &Project, args: &[&str], words: &[&str]) {
    let ran = project.pipe(&[&["export"], args].concat());
    assert_eq!(ran.code, Some(2), "{}{}", ran.stdout, ran.stderr);
    for word in words {
        assert!(ran.stderr.contains(word), "{word}: {}", ran.stderr);
    }
}

fn names(dir: &Path) -> Vec<String> {
    let items = fs::read_dir(dir).unwrap().flatten();
    let mut names: Vec<String> =
        items.map(|item| item.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Where the model of `step` is in the cache.
fn artifact(project: &Project, step: &str) -> PathBuf {
    let shown = project.pipe(&["show", step, "--json"]).stdout;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    let outputs = shown["outputs"].as_array().unwrap();
    let model = outputs.iter().find(|output| output["port"] == "model").unwrap();
    let cache = cache::Cache::open(project.cache()).unwrap();
    cache.path(&serde_json::from_value(model["digest"].clone()).unwrap())
}

/// The configuration that the artifact of `step` carries.
fn config(tensors: &Tensors) -> Config {
    serde_json::from_str(tensors.metadata("config").unwrap()).unwrap()
}

#[test]
fn a_student_and_its_teacher_come_back_as_they_were() {
    let project = done();
    for (step, format) in [("distill", "Llamba"), ("teacher", "Hugging Face transformers")] {
        let told = export(&project, &[step, "out/model"]);
        assert_eq!(told["format"], format);
        let dir = project.path().join("out/model");
        assert_eq!(
            names(&dir),
            [
                "README.md",
                "config.json",
                "model.safetensors",
                "provenance.json",
                "tokenizer.json",
                "tokenizer_config.json"
            ]
        );
        let stored = Tensors::open(&artifact(&project, step)).unwrap();
        let text = fs::read_to_string(dir.join("config.json")).unwrap();
        let read = published::config(&text).unwrap();
        let read = read.unwrap_or_else(|| hub::config(&text).unwrap());
        assert_eq!(read, config(&stored));
        assert_eq!(read.family, Family::Llama);
        let student = read.layers.iter().all(|kind| *kind == MixerKind::Ssm);
        assert_eq!(student, step == "distill");
        let written = Tensors::open(&dir.join("model.safetensors")).unwrap();
        assert!(written.names().eq(stored.names()));
        for name in stored.names() {
            let (a, b) = (stored.get(name).unwrap(), written.get(name).unwrap());
            assert_eq!((a.dtype, a.shape, a.bytes), (b.dtype, b.shape, b.bytes), "{name}");
        }
        let card = fs::read_to_string(dir.join("README.md")).unwrap();
        assert!(card.contains("| teacher | pretrain | "), "{card}");
        assert_eq!(card.contains("Measured by evaluate"), step == "distill", "{card}");
        assert_eq!(names(&project.path().join("out")), ["model"], "nothing else is left");
    }
    let provenance = project.read("out/model/provenance.json");
    let provenance: Value = serde_json::from_str(&provenance).unwrap();
    assert_eq!(provenance["pipeline"], "tiny");
    let steps: Vec<&Value> =
        provenance["steps"].as_array().unwrap().iter().map(|s| &s["name"]).collect();
    assert_eq!(steps, ["corpus", "tokenizer", "tokens", "teacher"]);
    assert_eq!(provenance["steps"][3]["params"]["updates"], 40);
}

#[test]
fn two_exports_at_once_leave_one_whole_directory() {
    let project = done();
    fs::create_dir(project.path().join(".model.export-1-0")).unwrap(); // of a killed export
    for _ in 0..4 {
        let both = ["distill", "teacher"].map(|step| project.start(&["export", step, "model"]));
        for child in both {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        let dir = project.path().join("model");
        let config = fs::read_to_string(dir.join("config.json")).unwrap();
        let tensors = Tensors::open(&dir.join("model.safetensors")).unwrap();
        let student = published::config(&config).unwrap().unwrap();
        let student = !student.is_transformer();
        assert_eq!(tensors.get("backbone.embedding.weight").is_some(), student);
        assert_eq!(names(&dir).len(), 6);
        assert_eq!(names(&project.path()), ["model", "p.yaml"], "nothing else is left");
    }
}

#[test]
fn types_and_sizes_and_tokenizers_are_chosen() {
    let project = done();
    let half = ["--dtype", "bf16", "--max-shard-size", "2KB"];
    let told = export(&project, &[&["teacher", "out"], &half[..]].concat());
    assert_eq!(told["dtype"], "bfloat16");
    let index: Value =
        serde_json::from_str(&project.read("out/model.safetensors.index.json")).unwrap();
    let files: std::collections::BTreeSet<&str> =
        index["weight_map"].as_object().unwrap().values().map(|v| v.as_str().unwrap()).collect();
    assert!(files.len() > 3, "{files:?}");
    for file in files {
        assert!(project.path().join("out").join(file).exists());
    }
    // Another export of one file: the old shards go with the old directory.
    export(&project, &["teacher", "out"]);
    assert!(!project.path().join("out/model.safetensors.index.json").exists());

    refused(&project, &["teacher", "out", "--dtype", "f8"], &["`f8`", "`bf16`"]);
    refused(&project, &["teacher", "out", "--max-shard-size", "big"], &["`big`"]);
    refused(&project, &["teacher", "out", "--tokenizer", "none.json"], &["none.json"]);
    let more = project
        .read("out/tokenizer.json")
        .replace("\"<|endoftext|>\": 0", "\"<|endoftext|>\": 9000");
    project.write("more.json", &more);
    let ran = project.pipe(&["export", "teacher", "out", "--tokenizer", "more.json"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("512") && ran.stderr.contains("--tokenizer"), "{}", ran.stderr);
}

#[test]
fn what_cannot_be_exported_is_refused_and_nothing_is_left() {
    let project = Project::with(TINY);
    refused(
        &project,
        &["distill", "out", "-f", "p.yaml"],
        &["not in the cache", "--until 'distill'"],
    );
    project.run(&["--until", "teacher"]);
    refused(&project, &["distill", "out"], &["not in the cache"]);
    refused(&project, &["tokens", "out"], &["no output `model`", "`train`"]);
    refused(&project, &["teecher", "out"], &["teacher"]);
    let ran = project.pipe(&["export", "tokenizer", "out", "--port", "tokenizer"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("is no model"), "{}", ran.stderr);
    assert_eq!(names(&project.path()), ["p.yaml"]);

    project.write("mine/notes.txt", "precious");
    refused(&project, &["teacher", "mine"], &["no earlier export", "provenance.json"]);
    refused(&project, &["teacher", "p.yaml"], &["it is no directory"]);
    refused(&project, &["teacher", "/"], &["no name for a directory"]);
    export(&project, &["teacher", "out"]);
    project.write("out/notes.txt", "precious");
    refused(&project, &["teacher", "out"], &["`notes.txt`"]);
    assert_eq!(project.read("out/notes.txt"), "precious");
    assert_eq!(names(&project.path()), ["mine", "out", "p.yaml"]);
}
