//! What every stage of the registry owes its users: a name, docs, documented parameters, defaults.

use std::collections::BTreeSet;

use engine::stage::Entry;
use serde_json::{Value, json};

#[test]
fn names_are_unique_and_everything_is_documented() {
    let mut names = BTreeSet::new();
    for stage in stages::ALL {
        let name = stage.name;
        assert!(names.insert(name), "two stages are called `{name}`");
        assert!(name.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "`{name}`");
        assert!(stage.version > 0 && stage.doc.ends_with('.'), "`{name}` has no docs");
        let ports = (stage.ports)();
        assert!(!ports.outputs.is_empty() || name == "command", "`{name}` makes nothing");
        let docs = ports.inputs.iter().map(|port| (port.name, port.doc));
        for (port, doc) in docs.chain(ports.outputs.iter().map(|port| (port.name, port.doc))) {
            assert!(!doc.is_empty(), "port `{port}` of `{name}` has no docs");
        }
    }
}

#[test]
fn every_parameter_has_a_doc_comment() {
    for stage in stages::ALL {
        let schema = (stage.schema)();
        let nested = schema["$defs"].as_object().into_iter().flat_map(|defs| defs.values());
        for object in std::iter::once(&schema).chain(nested) {
            assert_documented(stage, object);
        }
    }
}

fn assert_documented(stage: &Entry, object: &Value) {
    for (field, schema) in object["properties"].as_object().into_iter().flatten() {
        let doc = schema["description"].as_str().unwrap_or_default();
        assert!(!doc.is_empty(), "parameter `{field}` of `{}` has no doc comment", stage.name);
    }
}

#[test]
fn defaults_resolve_to_themselves_and_strangers_are_refused() {
    for stage in stages::ALL {
        // Only `command` has a parameter without a default: what to run.
        let least = if stage.name == "command" { json!({"run": ["true"]}) } else { json!({}) };
        let resolved = (stage.resolve)(least.clone()).map_err(|e| format!("`{}`: {e}", stage.name));
        let resolved = resolved.unwrap();
        assert_eq!(resolved.complaints, [], "defaults of `{}`", stage.name);
        let again = (stage.resolve)(resolved.params.clone()).unwrap();
        assert_eq!(again.params, resolved.params, "`{}`", stage.name);
        let mut strange = least;
        strange["no_such_parameter"] = json!(1);
        let error = (stage.resolve)(strange).unwrap_err();
        assert!(error.contains("no_such_parameter"), "`{}`: {error}", stage.name);
    }
}
