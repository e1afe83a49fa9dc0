//! The fields of a `command` step: `run`, `out`, `env`, `secrets`.
//!
//! Fills in what is known now. `${in.…}`, `${out.…}`, `${checkpoint}` and `${scratch}` stay as they
//! are for the worker, and a literal `${` stays written `$${` so that it can tell.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde_json::{Value as Json, json};

use super::build::{Group, World};
use super::step::{Told, command_ports, resolve};
use crate::spec::layers::{NAME_RULE, StepSpec, is_name};
use crate::spec::scope::{Late, Scope};
use crate::spec::source::{Problem, Problems};
use crate::spec::yaml::{Key, Node, Value};
use crate::stage::Entry;

/// Parameters and ports of one instance.
pub fn told(
    world: &World<'_>,
    group: &Group<'_>,
    entry: &Entry,
    scope: &Scope<'_>,
    problems: &mut Problems,
) -> Told {
    let spec = group.spec;
    let before = problems.len();
    let inputs: Vec<String> = spec
        .get("in")
        .and_then(Node::entries)
        .unwrap_or_default()
        .iter()
        .filter(|(_, node)| !node.is_null())
        .map(|(key, _)| key.text.clone())
        .collect();
    let outputs: Vec<String> = command_ports(spec).into_iter().map(|(name, _)| name).collect();
    let late = Some(Late { inputs: &inputs, outputs: &outputs });
    let out = out(spec, scope, problems);
    let env = env(spec, &Scope { late, ..*scope }, problems);
    let run = run(spec, &Scope { late, env: &env, ..*scope }, problems);
    let texts: BTreeMap<&str, &str> =
        env.iter().filter_map(|(key, node)| Some((key.text.as_str(), node.text()?))).collect();
    let params =
        json!({ "run": run, "out": Json::Object(out.iter().map(file).collect()), "env": texts });
    let mut told = Told { params: Json::Null, ..Told::default() };
    for field in ["run", "out", "env"] {
        if let Some(node) = spec.get(field) {
            told.origins.insert(field.into(), world.sources.place(node.span));
            told.uses.extend(super::uses::uses(field, node, scope, world.sources));
        }
    }
    let named =
        |(port, file): (String, Option<String>)| (port.clone(), false, file.unwrap_or(port));
    told.ports = out.into_iter().map(named).collect();
    if problems.len() == before {
        told.params = resolve(entry, params, &spec.fields, spec.name.span, problems);
    }
    told
}

fn file((port, file): &(String, Option<String>)) -> (String, Json) {
    (port.clone(), json!(file))
}

/// The arguments. One text is a program for `sh`.
fn run(spec: &StepSpec, scope: &Scope<'_>, problems: &mut Problems) -> Vec<String> {
    let Some(field) = spec.get("run") else {
        let problem =
            Problem::new(spec.name.span, format!("command `{}` has no `run`", spec.name.text));
        problems.push(problem.hint("write `run: [program, argument, …]`"));
        return Vec::new();
    };
    let whole = match field.text() {
        Some(text) if text.starts_with("${") && text.ends_with('}') => {
            Some(scope.fill(field, problems))
        }
        _ => None,
    };
    let arguments = match whole.as_ref().map_or(&field.value, |node| &node.value) {
        // `run: "${params.arguments}"`
        Value::Seq(items) if whole.is_some() => items.clone(),
        Value::Seq(items) => scope.arguments(items, problems),
        Value::Scalar { .. } => {
            let flags = ["sh", "-c"].map(|text| Node::plain(text, field.span));
            let items: Vec<Node> = flags.into_iter().chain([field.clone()]).collect();
            scope.arguments(&items, problems)
        }
        Value::Broken => return Vec::new(),
        _ => {
            let message = format!("`run` takes a list of arguments, not {}", field.describe());
            problems.push(
                Problem::new(field.here(), message).hint("write `run: [program, argument, …]`"),
            );
            return Vec::new();
        }
    };
    if arguments.is_empty() {
        problems.push(Problem::new(field.here(), "`run` names no program"));
    }
    let mut texts = Vec::with_capacity(arguments.len());
    for argument in &arguments {
        match argument.text() {
            Some(text) => texts.push(text.to_string()),
            None if matches!(argument.value, Value::Broken) => {}
            None => {
                let message = format!("an argument is a text, not {}", argument.describe());
                problems.push(Problem::new(argument.here(), message));
            }
        }
    }
    texts
}

/// Output ports and their file names.
fn out(
    spec: &StepSpec,
    scope: &Scope<'_>,
    problems: &mut Problems,
) -> Vec<(String, Option<String>)> {
    let Some(field) = spec.get("out") else { return Vec::new() };
    let mut ports: Vec<(Key, Node)> = Vec::new();
    match &field.value {
        Value::Seq(items) => {
            for item in items {
                match item.text() {
                    Some(text) => {
                        let key = Key { text: text.to_string(), span: item.span };
                        ports.push((key, Node::new(Value::Null, item.span)));
                    }
                    None => {
                        let message =
                            format!("`out` takes names of ports, not {}", item.describe());
                        problems.push(Problem::new(item.here(), message));
                    }
                }
            }
        }
        Value::Map(entries) => ports = entries.clone(),
        _ => {
            let message = format!("`out` takes a list or a map of ports, not {}", field.describe());
            let name = field.text().unwrap_or("text");
            problems
                .push(Problem::new(field.here(), message).hint(format!("write `out: [{name}]`")));
        }
    }
    let mut out: Vec<(String, Option<String>)> = Vec::new();
    for (key, node) in ports {
        if !is_name(&key.text) {
            let message = format!("`{}` cannot name a port", key.text);
            problems.push(Problem::new(key.span, message).hint(NAME_RULE));
        }
        if out.iter().any(|(port, _)| *port == key.text) {
            problems.push(Problem::new(key.span, format!("output `{}` is there twice", key.text)));
            continue;
        }
        let filled = scope.fill(&node, problems);
        let file = file_name(&key, &filled, problems);
        let used = file.clone().unwrap_or_else(|| key.text.clone());
        if let Some((other, _)) = out.iter().find(|(port, f)| f.as_ref().unwrap_or(port) == &used) {
            let message = format!("outputs `{other}` and `{}` are both `{used}`", key.text);
            problems.push(Problem::new(filled.here(), message));
        }
        out.push((key.text, file));
    }
    out
}

/// The name of an output's file, which stays inside `out/`.
fn file_name(key: &Key, node: &Node, problems: &mut Problems) -> Option<String> {
    let text = match &node.value {
        Value::Null | Value::Broken => return None,
        Value::Scalar { text, .. } => text,
        _ => {
            let message =
                format!("output `{}` takes a file name, not {}", key.text, node.describe());
            problems.push(Problem::new(node.here(), message));
            return None;
        }
    };
    let mut parts = Path::new(text).components();
    if matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None))
        && !text.ends_with('/')
    {
        return Some(text.clone());
    }
    let message =
        format!("output `{}` takes a file name without directories, not `{text}`", key.text);
    problems.push(Problem::new(node.here(), message).hint("it is made under `out/`"));
    None
}

/// The variables, filled in.
fn env(spec: &StepSpec, scope: &Scope<'_>, problems: &mut Problems) -> Vec<(Key, Node)> {
    let Some(field) = spec.get("env") else { return Vec::new() };
    let Some(entries) = field.entries() else {
        let message = format!("`env` takes a map, not {}", field.describe());
        problems.push(Problem::new(field.here(), message).hint("write `env: { NAME: value }`"));
        return Vec::new();
    };
    let mut env = Vec::with_capacity(entries.len());
    for (key, node) in entries {
        if !is_variable(&key.text) {
            let message = format!("`{}` cannot name an environment variable", key.text);
            problems.push(Problem::new(key.span, message));
        }
        let filled = scope.fill(node, problems);
        if filled.text().is_none() && !matches!(filled.value, Value::Broken) {
            let message =
                format!("variable `{}` takes a text, not {}", key.text, filled.describe());
            problems.push(Problem::new(filled.here(), message));
        }
        env.push((key.clone(), filled));
    }
    env
}

/// `secrets:` names of variables that are passed through.
pub fn secrets(spec: &StepSpec, problems: &mut Problems) -> Vec<String> {
    let Some(field) = spec.get("secrets") else { return Vec::new() };
    let items = match &field.value {
        Value::Seq(items) => items.as_slice(),
        _ => std::slice::from_ref(field),
    };
    let mut secrets = Vec::new();
    for item in items {
        match item.text().filter(|text| is_variable(text)) {
            Some(name) => {
                let env = spec.get("env").and_then(|env| env.get(name));
                if let Some(env) = env {
                    let problem = Problem::new(
                        item.span,
                        format!("`{name}` is both in `secrets` and in `env`"),
                    );
                    problems.push(problem.related(env.span, "in `env`"));
                }
                secrets.push(name.to_string());
            }
            None => {
                let message =
                    format!("`secrets` takes names of variables, not {}", item.describe());
                let hint =
                    "a secret's value is never written in a pipeline, nor `${…}` in its name";
                problems.push(Problem::new(item.here(), message).hint(hint));
            }
        }
    }
    secrets
}

fn is_variable(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
}
