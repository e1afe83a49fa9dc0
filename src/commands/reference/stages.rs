//! Stages with their ports and parameters.

use std::fmt::Write as _;

use engine::stage::Entry;
use serde_json::Value;

use super::{cell, head, sentence};

pub fn page() -> String {
    let mut out = head("Stages");
    out += "What a step can be. Ports are named under `in:` and after a step's name (`tokens.train`), parameters\n\
            under `with:`. A list port holds numbered artifacts, one a layer.\n\n";
    for entry in super::super::REGISTRY.0 {
        let _ = writeln!(out, "- [{}](#{}): {}", entry.name, entry.name, sentence(entry.doc));
    }
    super::super::REGISTRY.0.iter().for_each(|entry| section(entry, &mut out));
    out
}

fn section(entry: &Entry, out: &mut String) {
    let device = if entry.gpu { "on CPU or GPU" } else { "on the CPU" };
    let _ = write!(out, "\n## {}\n\n{}\n", entry.name, sentence(entry.doc));
    let _ = write!(out, "Version {}, {device}.\n\n", entry.version);
    let ports = (entry.ports)();
    let mut rows = Vec::new();
    for port in ports.inputs {
        let marks = [(port.list, "list"), (!port.required, "optional")];
        rows.push((port.name, "in", marks, port.doc));
    }
    for port in ports.outputs {
        let marks = [(port.list, "list"), (port.optional, "by the parameters")];
        rows.push((port.name, "out", marks, port.doc));
    }
    if !rows.is_empty() {
        *out += "| port | | what |\n|---|---|---|\n";
    }
    for (name, way, marks, doc) in rows {
        let marks = marks.iter().filter(|(on, _)| *on).map(|(_, name)| format!(", {name}"));
        let _ = writeln!(
            out,
            "| `{name}` | {way}{} | {} |",
            marks.collect::<String>(),
            cell(&sentence(doc))
        );
    }
    let schema = (entry.schema)();
    let fields = schema["properties"].as_object().cloned().unwrap_or_default();
    if !fields.is_empty() {
        *out += "\n| parameter | value | default | what |\n|---|---|---|---|\n";
    }
    for (name, field) in fields {
        let default = field.get("default").map_or(String::new(), |value| format!("`{value}`"));
        let told = field["description"].as_str().unwrap_or_default();
        let kind = kind(&field, &schema);
        let _ = writeln!(
            out,
            "| `{name}` | {} | {} | {} |",
            cell(&kind),
            cell(&default),
            sentence(told)
        );
    }
}

/// What a parameter takes, in words.
fn kind(field: &Value, schema: &Value) -> String {
    if let Some(name) = field["$ref"].as_str().and_then(|target| target.rsplit('/').next()) {
        return kind(&schema["$defs"][name], schema);
    }
    for choice in ["oneOf", "anyOf", "allOf"] {
        if let Some(options) = field[choice].as_array() {
            let options: Vec<String> = options.iter().map(|option| kind(option, schema)).collect();
            return options.join(" or ");
        }
    }
    if let Some(value) = field.get("const") {
        return format!("`{}`", value.as_str().map_or(value.to_string(), String::from));
    }
    if let Some(values) = field["enum"].as_array() {
        let values = values.iter().filter_map(Value::as_str).map(|value| format!("`{value}`"));
        return values.collect::<Vec<_>>().join(" or ");
    }
    let word = |kind: &str| match kind {
        "integer" => "whole number".to_string(),
        "boolean" => "`true` or `false`".to_string(),
        "string" => "text".to_string(),
        "array" => format!("list: {}", kind_of_items(field, schema)),
        "object" => "map".to_string(),
        other => other.to_string(),
    };
    match &field["type"] {
        Value::String(kind) => word(kind),
        Value::Array(kinds) => {
            let kinds: Vec<String> = kinds.iter().filter_map(Value::as_str).map(word).collect();
            kinds.join(" or ")
        }
        _ => "anything".into(),
    }
}

fn kind_of_items(field: &Value, schema: &Value) -> String {
    field.get("items").map_or("anything".into(), |items| kind(items, schema))
}
