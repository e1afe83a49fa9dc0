//! `--set a.b=value`: one parameter of the pipeline, or one field of a step.
//!
//! `params.a.b` if that exists, else `steps.a.with.b`; the long forms always mean what they say.

use std::path::Path;

use super::layers::{FIELDS, Spec, overlay};
use super::source::{Problem, Source, Sources, Span};
use super::yaml::{self, Key, Node, Value};
use crate::diagnostic::{closest, suggest};
use crate::stage::Registry;

/// Applies one `--set`.
pub fn apply(
    spec: &mut Spec,
    text: &str,
    cwd: &Path,
    registry: &Registry,
    sources: &mut Sources,
) -> Result<(), Vec<Problem>> {
    let base = cwd.to_path_buf();
    let source =
        sources.add(Source { name: "--set".into(), text: text.into(), base, lines: false });
    let whole = Span { len: text.len() as u32, ..Span::top(source) };
    let Some((path, value)) = text.split_once('=') else {
        let problem = Problem::new(whole, format!("`--set {text}` has no value"));
        return Err(vec![problem.hint(format!("write `--set {text}=VALUE`"))]);
    };
    let value = yaml::parse(value, source, path.len() + 1)?;
    let span = Span { len: path.len() as u32, ..whole };
    let parts: Vec<&str> = path.trim().split('.').collect();
    if parts.iter().any(|part| part.is_empty()) {
        return Err(vec![Problem::new(span, format!("`{path}` is no name"))]);
    }
    let done = match parts[..] {
        ["params", ref rest @ ..] if !rest.is_empty() => set_param(spec, rest, span, value),
        ["steps", step, field, ref rest @ ..] => set_field(spec, step, field, rest, span, value),
        ["outputs", name, "to"] => set_output(spec, name, span, value),
        _ => set_short(spec, &parts, span, value, registry),
    };
    done.map_err(|problem| vec![problem])
}

fn set_short(
    spec: &mut Spec,
    parts: &[&str],
    span: Span,
    value: Node,
    registry: &Registry,
) -> Result<(), Problem> {
    let param = at(&spec.params, parts).is_some();
    let step = parts.len() >= 2 && is_parameter(spec, parts[0], parts[1], registry);
    let path = parts.join(".");
    match (param, step) {
        (true, true) => {
            let message = format!("`{path}` is both a parameter of the pipeline and of a step");
            let long = format!("steps.{}.with.{}", parts[0], parts[1..].join("."));
            Err(Problem::new(span, message).hint(format!("write `params.{path}` or `{long}`")))
        }
        (true, false) => set_param(spec, parts, span, value),
        (false, true) => {
            let rest: Vec<&str> = parts[1..].to_vec();
            set_field(spec, parts[0], "with", &rest, span, value)
        }
        (false, false) => Err(absent(spec, parts, span, registry)),
    }
}

/// Whether `step.name` can be a parameter of the step's stage.
fn is_parameter(spec: &Spec, step: &str, name: &str, registry: &Registry) -> bool {
    let Some(step) = spec.step(step) else { return false };
    if step.get("with").and_then(|with| with.get(name)).is_some() {
        return true;
    }
    parameters(step.get("stage").and_then(Node::text), registry).iter().any(|p| p == name)
}

/// The parameters of a stage.
fn parameters(stage: Option<&str>, registry: &Registry) -> Vec<String> {
    let entry = stage.filter(|name| *name != "command").and_then(|name| registry.get(name));
    let schema = entry.map(|entry| (entry.schema)());
    let properties = schema.as_ref().and_then(|s| s.get("properties")?.as_object());
    properties.map(|p| p.keys().cloned().collect()).unwrap_or_default()
}

fn set_param(spec: &mut Spec, parts: &[&str], span: Span, value: Node) -> Result<(), Problem> {
    if at(&spec.params, parts).is_none() {
        let path = format!("params.{}", parts.join("."));
        let known = leaves(&spec.params, "params");
        let hint = suggest(&path, "the pipeline's parameters", known.iter().map(String::as_str));
        return Err(Problem::new(span, format!("unknown parameter `{path}`")).maybe_hint(hint));
    }
    overlay(&mut spec.params, &nested(parts, span, value));
    Ok(())
}

fn set_field(
    spec: &mut Spec,
    name: &str,
    field: &str,
    rest: &[&str],
    span: Span,
    value: Node,
) -> Result<(), Problem> {
    if !FIELDS.contains(&field) {
        let problem = Problem::new(span, format!("a step has no field `{field}`"));
        return Err(problem.maybe_hint(suggest(field, "fields of a step", FIELDS)));
    }
    if spec.step(name).is_none() {
        return Err(spec.unknown_step(name, span));
    }
    let Some(step) = spec.step_mut(name) else { return Ok(()) };
    let mut path = vec![field];
    path.extend(rest);
    // The rest of a map that is set in part stays: only the named leaf is new.
    let over = match (step.get(field), rest) {
        (Some(old), [_, ..]) => {
            let mut merged = old.clone();
            overlay(&mut merged, &nested(rest, span, value));
            nested(&[field], span, merged)
        }
        _ => nested(&path, span, value),
    };
    let mut problems = super::source::Problems::default();
    step.overlay(&over, &mut problems);
    Ok(())
}

fn set_output(spec: &mut Spec, name: &str, span: Span, value: Node) -> Result<(), Problem> {
    match spec.outputs.iter_mut().find(|(key, _)| key.text == name) {
        Some((_, output)) => {
            overlay(output, &nested(&["to"], span, value));
            Ok(())
        }
        None => {
            let names = spec.outputs.iter().map(|(key, _)| key.text.as_str());
            let hint = suggest(name, "outputs", names);
            Err(Problem::new(span, format!("unknown output `{name}`")).maybe_hint(hint))
        }
    }
}

/// Nothing of that name, with what may have been meant.
fn absent(spec: &Spec, parts: &[&str], span: Span, registry: &Registry) -> Problem {
    let path = parts.join(".");
    let problem = Problem::new(span, format!("nothing is called `{path}`"));
    let mut known = leaves(&spec.params, "");
    for step in &spec.steps {
        let stage = step.get("stage").and_then(Node::text);
        let names = parameters(stage, registry);
        known.extend(names.iter().map(|name| format!("{}.{name}", step.name.text)));
    }
    if let Some(best) = closest(&path, known.iter().map(String::as_str)) {
        return problem.hint(format!("did you mean `{best}`?"));
    }
    match (spec.step(parts[0]), parts) {
        (Some(_), [_]) => problem.hint(format!("`{path}` is a step; write `{path}.PARAMETER=…`")),
        (Some(_), [step, field, ..]) if FIELDS.contains(field) => {
            problem.hint(format!("write `steps.{step}.{}=…`", parts[1..].join(".")))
        }
        (Some(step), _) => {
            let names = parameters(step.get("stage").and_then(Node::text), registry);
            let what = format!("parameters of `{}`", parts[0]);
            problem.maybe_hint(suggest(parts[1], &what, names.iter().map(String::as_str)))
        }
        (None, _) => {
            let steps = spec.steps.iter().map(|step| step.name.text.clone());
            let known: Vec<String> = leaves(&spec.params, "").into_iter().chain(steps).collect();
            let what = "parameters and steps";
            problem.maybe_hint(suggest(parts[0], what, known.iter().map(String::as_str)))
        }
    }
}

/// The node at a path of keys.
fn at<'a>(node: &'a Node, parts: &[&str]) -> Option<&'a Node> {
    parts.iter().try_fold(node, |node, part| match node.value {
        Value::Map(_) => node.get(part),
        _ => None,
    })
}

/// `a: { b: value }`.
fn nested(parts: &[&str], span: Span, value: Node) -> Node {
    parts.iter().rev().fold(value, |node, part| {
        let key = Key { text: part.to_string(), span };
        Node::new(Value::Map(vec![(key, node)]), span)
    })
}

fn leaves(node: &Node, path: &str) -> Vec<String> {
    match &node.value {
        Value::Map(entries) => {
            let dot = if path.is_empty() { "" } else { "." };
            entries.iter().flat_map(|(k, n)| leaves(n, &format!("{path}{dot}{}", k.text))).collect()
        }
        _ => vec![path.to_string()],
    }
}
