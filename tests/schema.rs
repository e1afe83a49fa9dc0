//! What editors get: the schema takes every pipeline of ours, refuses wrong ones, and describes all.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::Project;

fn schema() -> Value {
    serde_json::from_str(&Project::new().pipe(&["schema"]).stdout).unwrap()
}

/// What is wrong with `value`, by place. Knows the keywords that our schema uses and no others, so
/// that none is passed over.
fn errors(root: &Value, schema: &Value, value: &Value, at: &str) -> Vec<String> {
    let Value::Object(rules) = schema else {
        return if schema == &Value::Bool(false) {
            vec![format!("{at} may not be")]
        } else {
            vec![]
        };
    };
    let fits = |schema: &Value| errors(root, schema, value, at).is_empty();
    let no = |what: &str| vec![format!("{at}: {what}: {value}")];
    let mut found = Vec::new();
    for (word, rule) in rules {
        let list = || rule.as_array().unwrap().iter();
        found.extend(match word.as_str() {
            "$schema" | "$defs" | "title" | "description" | "default" | "format" | "then" => vec![],
            "$ref" => {
                let target = rule.as_str().unwrap().strip_prefix('#').unwrap();
                errors(root, root.pointer(target).unwrap(), value, at)
            }
            "type" if is_a(rule, value) => vec![],
            "type" => no(&format!("not {rule}")),
            "const" if rule == value => vec![],
            "const" => no("another value"),
            "enum" if list().any(|one| one == value) => vec![],
            "enum" => no("none of the values"),
            "minimum" | "maximum" => match (value.as_f64(), rule.as_f64()) {
                (Some(a), Some(b)) if (word == "minimum") == (a < b) && a != b => {
                    no("out of range")
                }
                _ => vec![],
            },
            "pattern" => match value.as_str() {
                Some(text) if !matches(rule.as_str().unwrap(), text) => no("no match"),
                _ => vec![],
            },
            "anyOf" if list().any(fits) => vec![],
            "oneOf" if list().filter(|one| fits(one)).count() == 1 => vec![],
            "anyOf" | "oneOf" => no("nothing fits"),
            "allOf" => list().flat_map(|one| errors(root, one, value, at)).collect(),
            "if" if fits(rule) => errors(root, &rules["then"], value, at),
            "if" => vec![],
            "items" => {
                let items = value.as_array().into_iter().flatten().enumerate();
                items.flat_map(|(i, one)| errors(root, rule, one, &format!("{at}[{i}]"))).collect()
            }
            "required" => match value.as_object() {
                Some(object) => list()
                    .filter(|name| !object.contains_key(name.as_str().unwrap()))
                    .map(|name| format!("{at} lacks {name}"))
                    .collect(),
                None => vec![],
            },
            "properties" => fields(root, rules, value, at),
            "additionalProperties" if rules.contains_key("properties") => vec![],
            "additionalProperties" => fields(root, rules, value, at),
            "patternProperties" => vec![],
            other => panic!("a keyword that this test does not know: {other}"),
        });
    }
    found
}

fn fields(
    root: &Value,
    rules: &serde_json::Map<String, Value>,
    value: &Value,
    at: &str,
) -> Vec<String> {
    let object = value.as_object().into_iter().flatten();
    let rule = |name: &str| {
        let own = rules.get("properties").and_then(|own| own.get(name));
        let by_pattern = || {
            let patterns = rules.get("patternProperties")?.as_object()?;
            patterns.iter().find(|(pattern, _)| matches(pattern, name)).map(|(_, rule)| rule)
        };
        own.or_else(by_pattern).or_else(|| rules.get("additionalProperties"))
    };
    let check = |(name, inner): (&String, &Value)| {
        rule(name).map(|rule| errors(root, rule, inner, &format!("{at}.{name}")))
    };
    object.filter_map(check).flatten().collect()
}

fn is_a(rule: &Value, value: &Value) -> bool {
    let one = |kind: &Value| match kind.as_str().unwrap() {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        other => panic!("a type that this test does not know: {other}"),
    };
    rule.as_array().map_or_else(|| one(rule), |kinds| kinds.iter().any(one))
}

/// The patterns of our schema, by hand.
fn matches(pattern: &str, text: &str) -> bool {
    let number =
        || !text.is_empty() && text.chars().all(|c| c.is_ascii_digit() || "-+._eE".contains(c));
    match pattern {
        "\\$\\{" => text.contains("${"),
        "\\$\\{|^[-+0-9._eE]+$" => text.contains("${") || number(),
        "^x-" => text.starts_with("x-"),
        other => panic!("a pattern that this test does not know: {other}"),
    }
}

fn check(schema: &Value, yaml: &str) -> Vec<String> {
    let value: Value = serde_yaml::from_str(yaml).unwrap();
    errors(schema, schema, &value, "")
}

fn pipelines() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let items = ["pipelines", "tests/cases"].map(|dir| fs::read_dir(root.join(dir)).unwrap());
    let files = items.into_iter().flatten().map(|item| item.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|ending| ending == "yaml")).collect()
}

#[test]
fn the_schema_takes_our_pipelines() {
    let schema = schema();
    let files = pipelines();
    assert!(files.len() > 10, "{files:?}");
    for file in files {
        let wrong = check(&schema, &fs::read_to_string(&file).unwrap());
        assert!(wrong.is_empty(), "{}: {wrong:#?}", file.display());
    }
    let starter = Project::new();
    starter.write("models/tiny/config.json", r#"{"model_type": "llama"}"#);
    starter.write("models/tiny/model.safetensors", "0123456789");
    assert_eq!(starter.pipe(&["init"]).code, Some(0));
    assert_eq!(check(&schema, &starter.read("pipeline.yaml")), [""; 0]);
}

#[test]
fn the_schema_refuses_what_check_refuses() {
    let schema = schema();
    for wrong in [
        "stpes: {}",
        "steps: { a: { with: { seed: 1 } } }",
        "steps: { a: { stage: txt } }",
        "steps: { a: { stage: text, wiht: {} } }",
        "steps: { a: { stage: text, with: { sead: 1 } } }",
        "steps: { a: { stage: text, with: { documents: many } } }",
        "steps: { a: { stage: text, in: { file: ./a.txt } } }",
        "steps: { a: { stage: tokenize, in: { text: ./a.txt } } }",
        "steps: { a: { stage: text, run: [ls] } }",
        "steps: { a: { stage: command, out: [o] } }",
        "steps: { a: { stage: text, resources: { gpus: 1 } } }",
        "steps: { a: { stage: text } }\noutputs: { o: { from: a.text } }",
        "profiles: { p: { step: {} } }\nsteps: { a: { stage: text } }",
    ] {
        assert!(!check(&schema, wrong).is_empty(), "the schema takes {wrong}");
        let project = Project::with(wrong);
        project.write("a.txt", "a");
        let mut args = vec!["check", "p.yaml"];
        // What no profile chooses is not looked at.
        args.extend(wrong.contains("profiles").then_some("--profile=p"));
        assert_eq!(project.pipe(&args).code, Some(2), "check takes {wrong}");
    }
    assert_eq!(
        check(&schema, "steps: { a: { stage: text, with: { seed: \"${params.s}\" } } }"),
        [""; 0]
    );
}

#[test]
fn an_editor_is_told_what_everything_is() {
    let schema = schema();
    let mut missing = Vec::new();
    walk(&schema, "", &mut missing);
    assert!(missing.is_empty(), "no description: {missing:#?}");
    let documents = &schema["$defs"]["with_text"]["properties"]["documents"];
    assert_eq!(documents["default"], 40_000, "{documents}");
    let stages = schema["$defs"]["step"]["properties"]["stage"]["anyOf"].as_array().unwrap();
    assert!(stages.iter().any(|one| one["const"] == "distill" && one["description"].is_string()));
}

/// Names of properties without a description.
fn walk(schema: &Value, at: &str, missing: &mut Vec<String>) {
    if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
        // A branch of `if` narrows what is described already.
        let narrows = at.contains(".if") || at.contains(".then");
        for (name, rule) in properties {
            if rule.get("description").is_none() && !narrows {
                missing.push(format!("{at}.{name}"));
            }
        }
    }
    match schema {
        Value::Object(object) => {
            object.iter().for_each(|(name, inner)| walk(inner, &format!("{at}.{name}"), missing));
        }
        Value::Array(items) => {
            items.iter().for_each(|inner| walk(inner, at, missing));
        }
        _ => {}
    }
}
