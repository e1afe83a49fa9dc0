//! `pipe export-run`: what other tools read of a run.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::support::Project;

/// A small training with a curve, an evaluation, and a command beside.
fn trained() -> Project {
    let project = Project::with(
        "params: { updates: 6 }
steps:
  corpus: { stage: text, with: { documents: 60 } }
  tokenizer: { stage: train_tokenizer, in: { text: corpus.text }, with: { vocab: 300 } }
  tokens: { stage: tokenize, in: { text: corpus.text, tokenizer: tokenizer.tokenizer }, with: { seq: 16, holdout: 0.2 } }
  teacher:
    stage: pretrain
    in: { tokens: tokens.train, holdout: tokens.holdout }
    with: { device: cpu, layers: 1, d_model: 8, heads: 1, ffn: 8, updates: \"${params.updates}\" }
",
    );
    project.run(&[]);
    project
}

fn export(project: &Project, args: &[&str]) {
    let ran = project.pipe(&[&["export-run"], args].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
}

#[test]
fn a_trace_has_a_slice_for_every_step_that_ran() {
    let project = trained();
    export(&project, &["--to", "trace", "-o", "t.json"]);
    let trace: Value = serde_json::from_str(&project.read("t.json")).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let of = |phase: &str| events.iter().filter(|e| e["ph"] == phase).collect::<Vec<_>>();
    let names: BTreeSet<&str> = of("X").iter().map(|e| e["name"].as_str().unwrap()).collect();
    assert_eq!(names, BTreeSet::from(["corpus", "tokenizer", "tokens", "teacher"]));
    assert!(of("X").iter().all(|e| e["dur"].as_i64().unwrap() >= 0 && e["tid"].as_i64() > Some(0)));
    assert!(of("C").iter().any(|e| e["name"] == "teacher loss"), "{events:#?}");
}

/// What the Trace Event Format asks of every kind of event that we write.
#[test]
fn a_trace_is_well_formed() {
    let project = trained();
    // A second run has cached steps beside those that run.
    project.run(&["--set", "updates=8"]);
    for run in ["@1", "@2"] {
        export(&project, &[run, "--to", "trace", "-o", "t.json"]);
        let trace: Value = serde_json::from_str(&project.read("t.json")).unwrap();
        let events = trace["traceEvents"].as_array().unwrap();
        let mut lanes: BTreeMap<i64, Vec<(i64, i64)>> = BTreeMap::new();
        let mut named = BTreeSet::new();
        let mut counters = Vec::new();
        for event in events {
            assert!(event["name"].is_string() && event["pid"].is_u64(), "{event}");
            let tid = || event["tid"].as_i64().unwrap();
            let ts = || event["ts"].as_i64().filter(|ts| *ts >= 0).unwrap();
            match event["ph"].as_str().unwrap() {
                "M" if event["name"] == "thread_name" => {
                    assert!(named.insert(tid()), "a lane is named once: {event}");
                }
                "M" => assert!(event["args"]["name"].is_string(), "{event}"),
                "X" => {
                    let end = ts() + event["dur"].as_i64().filter(|dur| *dur >= 0).unwrap();
                    lanes.entry(tid()).or_default().push((ts(), end));
                }
                "C" => {
                    counters.push(ts());
                    let values = event["args"].as_object().unwrap();
                    assert!(!values.is_empty() && values.values().all(Value::is_number), "{event}");
                }
                "i" => assert!(ts() >= 0 && event["s"] == "p", "{event}"),
                other => panic!("a phase that nobody asked for: {other}"),
            }
        }
        assert!(counters.is_sorted(), "{counters:?}");
        for (lane, slices) in lanes {
            assert!(named.contains(&lane), "lane {lane} has a name");
            assert!(
                slices.is_sorted() && slices.windows(2).all(|w| w[0].1 <= w[1].0),
                "{slices:?}"
            );
        }
    }
}

#[test]
fn lines_of_json_have_every_value() {
    let project = trained();
    export(&project, &["--to", "jsonl", "-o", "m.jsonl"]);
    let text = project.read("m.jsonl");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let course = lines.iter().filter(|l| l["metric"] == "loss" && l["at"].is_u64()).count();
    assert!(course > 0, "{text}");
    assert!(
        lines.iter().any(|l| l["metric"] == "final.holdout_loss" && l["at"].is_null()),
        "{text}"
    );
    // A run that found all cached tells the same curve.
    project.run(&[]);
    export(&project, &["--to", "jsonl", "-o", "again.jsonl"]);
    assert!(
        project
            .read("again.jsonl")
            .lines()
            .any(|l| l.contains("\"metric\":\"loss\"") && l.contains("\"at\""))
    );
}

/// Reads event files as TensorBoard does, from the published formats: `(tag, step, value)`.
fn scalars(dir: &Path) -> Vec<(String, u64, f32)> {
    let mut found = Vec::new();
    for item in std::fs::read_dir(dir).unwrap().flatten() {
        let bytes = std::fs::read(item.path()).unwrap();
        let mut rest = &bytes[..];
        let mut first = true;
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let data = &rest[12..12 + length];
            match std::mem::take(&mut first) {
                true => assert!(data.ends_with(b"brain.Event:2")),
                false => event(data, &mut found),
            }
            rest = &rest[16 + length..];
        }
    }
    found
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0, 0);
    loop {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        value |= u64::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            return value;
        }
    }
}

/// Fields of a message: number, and a number or bytes.
fn fields(mut bytes: &[u8]) -> Vec<(u64, u64, &[u8])> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let (number, length) = match key & 7 {
            0 => (varint(&mut bytes), 0),
            1 => (0, 8),
            2 => (0, varint(&mut bytes) as usize),
            _ => (0, 4),
        };
        found.push((key >> 3, number, &bytes[..length]));
        bytes = &bytes[length..];
    }
    found
}

fn event(data: &[u8], found: &mut Vec<(String, u64, f32)>) {
    let all = fields(data);
    let step = all.iter().find(|f| f.0 == 2).map_or(0, |f| f.1);
    for summary in all.iter().filter(|f| f.0 == 5) {
        for value in fields(summary.2) {
            let parts = fields(value.2);
            let tag = parts.iter().find(|f| f.0 == 1).unwrap().2;
            let number = parts.iter().find(|f| f.0 == 2).unwrap().2;
            let number = f32::from_le_bytes(number.try_into().unwrap());
            found.push((String::from_utf8(tag.to_vec()).unwrap(), step, number));
        }
    }
}

#[test]
fn event_files_of_tensorboard_hold_the_curve() {
    let project = trained();
    export(&project, &["--to", "tensorboard", "-o", "boards"]);
    let found = scalars(&project.path().join("boards/teacher"));
    let curve: Vec<_> = found.iter().filter(|(tag, ..)| tag == "loss").collect();
    assert!(!curve.is_empty() && curve.iter().all(|(_, _, loss)| *loss > 0.0), "{found:?}");
    assert!(found.iter().any(|(tag, ..)| tag == "result/final.holdout_loss"), "{found:?}");
    let again = project.pipe(&["export-run", "--to", "tensorboard", "-o", "boards"]);
    assert!(again.code == Some(2) && again.stderr.contains("is not empty"), "{}", again.stderr);
}

#[test]
fn a_crate_describes_itself_and_every_file_in_it() {
    let project = trained();
    export(
        &project,
        &["--to", "ro-crate", "-o", "crate", "--license", "https://spdx.org/licenses/MIT"],
    );
    let crate_: Value =
        serde_json::from_str(&project.read("crate/ro-crate-metadata.json")).unwrap();
    assert_eq!(crate_["@context"], "https://w3id.org/ro/crate/1.1/context");
    let graph = crate_["@graph"].as_array().unwrap();
    let ids: Vec<&str> = graph.iter().map(|e| e["@id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), ids.iter().collect::<BTreeSet<_>>().len(), "each once");
    let entity = |id: &str| graph.iter().find(|e| e["@id"] == id).unwrap();
    assert_eq!(entity("ro-crate-metadata.json")["about"]["@id"], "./");
    let root = entity("./");
    for field in ["name", "description", "datePublished", "license", "hasPart"] {
        assert!(!root[field].is_null(), "{field}");
    }
    for file in graph.iter().filter(|e| e["@type"] == "File") {
        let path = project.path().join("crate").join(file["@id"].as_str().unwrap());
        assert!(path.is_file(), "{}", path.display());
        assert!(
            root["hasPart"]
                .as_array()
                .unwrap()
                .contains(&serde_json::json!({ "@id": file["@id"] }))
        );
    }
    let action = entity("#step-teacher");
    assert_eq!(action["@type"], "CreateAction");
    for list in [&action["object"], &action["result"]] {
        for item in list.as_array().unwrap() {
            assert!(ids.contains(&item["@id"].as_str().unwrap()), "{item} is described");
        }
    }
    assert!(action["startTime"].as_str().unwrap().ends_with("+00:00"));
}
