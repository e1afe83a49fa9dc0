//! The pipeline file: words, then every field from the schema that editors get.

use std::fmt::Write as _;

use serde_json::Value;

use super::{head, sentence};

/// What no type can say: references, values, what is laid over what.
const WORDS: &str = include_str!("file.md");

pub fn page() -> String {
    let schema = engine::spec::schema(&super::super::REGISTRY);
    let mut out = head("The pipeline file") + WORDS;
    let step = &schema["$defs"]["step"]["properties"];
    for (title, fields) in [
        ("Fields of the file", &schema["properties"]),
        ("Fields of a step", step),
        ("Fields of `resources`", &step["resources"]["properties"]),
        ("Fields of a profile", &schema["$defs"]["profile"]["properties"]),
        (
            "Fields of an output",
            &schema["properties"]["outputs"]["additionalProperties"]["properties"],
        ),
    ] {
        let _ = write!(out, "\n## {title}\n\n");
        for (name, field) in fields.as_object().into_iter().flatten() {
            let told = field["description"].as_str().unwrap_or_default();
            let _ = writeln!(out, "- `{name}` ({}): {}", kind(field), sentence(told));
        }
    }
    out
}

fn kind(field: &Value) -> String {
    if let Some(options) = field["anyOf"].as_array() {
        let mut kinds: Vec<String> = options.iter().map(kind).collect();
        kinds.dedup();
        return kinds.join(" or ");
    }
    let word = |kind: &str| match kind {
        "object" => "map".to_string(),
        "array" => "list".to_string(),
        "string" => "text".to_string(),
        "integer" => "whole number".to_string(),
        "boolean" => "`true` or `false`".to_string(),
        other => other.to_string(),
    };
    match &field["type"] {
        Value::String(kind) => word(kind),
        Value::Array(kinds) => {
            kinds.iter().filter_map(Value::as_str).map(word).collect::<Vec<_>>().join(" or ")
        }
        _ => "text".into(),
    }
}
