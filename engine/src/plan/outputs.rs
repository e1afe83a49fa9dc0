//! `outputs:`: what to copy where after a run.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use super::build::World;
use super::{Output, Source, inputs};
use crate::diagnostic::suggest;
use crate::spec::scope::Scope;
use crate::spec::source::{Problem, Problems, Span};
use crate::spec::yaml::{Key, Node, Value};

/// All outputs; sources are in declared order still.
pub fn outputs(world: &World<'_>, problems: &mut Problems) -> Vec<Output> {
    let scope = Scope { params: Some(world.params), ..Scope::default() };
    let mut all = Vec::new();
    let mut taken: HashMap<PathBuf, (Span, &str)> = HashMap::new();
    for (key, node) in &world.spec.outputs {
        let filled = scope.fill(node, problems);
        let Some(output) = output(world, key, &filled, problems) else { continue };
        let span = filled.get("to").map_or(key.span, Node::here);
        if let Some((first, name)) = taken.insert(plain(&output.to), (span, &key.text)) {
            let message = format!("outputs `{name}` and `{}` go to the same path", key.text);
            problems.push(Problem::new(span, message).related(first, format!("`{name}`")));
        }
        all.push(output);
    }
    all
}

fn output(world: &World<'_>, key: &Key, node: &Node, problems: &mut Problems) -> Option<Output> {
    let example = "write `{ from: step.port, to: path }`";
    let Some(entries) = node.entries() else {
        let message =
            format!("output `{}` takes `from` and `to`, not {}", key.text, node.describe());
        problems.push(Problem::new(node.here(), message).hint(example));
        return None;
    };
    for (field, _) in entries {
        if !["from", "to"].contains(&field.text.as_str()) {
            let problem =
                Problem::new(field.span, format!("unknown field `{}` of an output", field.text));
            problems.push(problem.maybe_hint(suggest(&field.text, "fields", ["from", "to"])));
        }
    }
    let mut field = |name: &str| {
        let found = node.get(name).filter(|node| !node.is_null());
        if found.is_none() {
            let problem = Problem::new(key.span, format!("output `{}` has no `{name}`", key.text));
            problems.push(problem.hint(example));
        }
        found
    };
    let (from, to) = (field("from"), field("to"));
    let (from, to) = (from?, to?);
    let sources = inputs::sources(world, from, problems)?;
    let source = match &sources[..] {
        [source @ Source::Step { .. }] => source.clone(),
        [_] => {
            let problem = Problem::new(
                from.here(),
                format!("output `{}` takes an output of a step", key.text),
            );
            problems.push(problem.hint(example));
            return None;
        }
        several => {
            let message =
                format!("output `{}` takes one artifact, not {}", key.text, several.len());
            problems
                .push(Problem::new(from.here(), message).hint("give each an output of its own"));
            return None;
        }
    };
    let target = match &to.value {
        Value::Scalar { text, .. } if !text.is_empty() => text,
        Value::Broken => return None,
        _ => {
            let message = format!("`to` takes a path, not {}", to.describe());
            problems.push(Problem::new(to.here(), message));
            return None;
        }
    };
    let to = inputs::absolute(target, world.cwd);
    Some(Output { name: key.text.clone(), source, to, place: world.sources.place(key.span) })
}

/// The path with `..` undone by name, to tell whether two mean the same.
pub(crate) fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            part => plain.push(part),
        }
    }
    plain
}
