//! What feeds an input port: references to other steps, the user's paths, the hub.

use std::path::{Path, PathBuf};

use super::build::{Group, World, selected};
use super::reference::{Reference, coordinates, parse};
use super::{Source, Text};
use crate::diagnostic::suggest;
use crate::spec::source::{Problem, Problems};
use crate::spec::yaml::{Node, Value};

/// The instances that a reference means.
pub struct Selected {
    /// Rows of the group's matrix.
    pub rows: Vec<usize>,
    /// An item of a list port, when a step without a matrix was indexed like one.
    pub item: Option<u32>,
}

/// The sources of a filled value, in order; empty when it is null. `None` when something is wrong.
pub fn sources(world: &World<'_>, node: &Node, problems: &mut Problems) -> Option<Vec<Source>> {
    match &node.value {
        Value::Null => Some(Vec::new()),
        Value::Seq(items) => {
            let mut all = Some(Vec::with_capacity(items.len()));
            for item in items {
                match (sources(world, item, problems), &mut all) {
                    (Some(some), Some(all)) => all.extend(some),
                    _ => all = None,
                }
            }
            all
        }
        Value::Scalar { text, .. } => one(world, node, text, problems),
        Value::Map(_) => {
            let message = "an input takes references and paths, not a map";
            let problem = Problem::new(node.here(), message);
            problems.push(problem.hint("write `port: step.port`, or a list of such"));
            None
        }
        Value::Broken => None,
    }
}

fn one(world: &World<'_>, node: &Node, text: &str, problems: &mut Problems) -> Option<Vec<Source>> {
    if let Some(name) = text.strip_prefix("hf:") {
        return hub(node, name, problems).map(|source| vec![source]);
    }
    if is_path(text) {
        return path(world, node, text, problems).map(|path| vec![Source::Path { path }]);
    }
    match parse(text) {
        Ok(reference) => artifacts(world, node, &reference, problems),
        Err(message) => {
            let problem = Problem::new(node.here(), message);
            problems
                .push(problem.hint(
                    "write `step.port`, or a path that starts with `./`, `../`, `/` or `~/`",
                ));
            None
        }
    }
}

/// The artifacts of a reference to a port.
fn artifacts(
    world: &World<'_>,
    node: &Node,
    reference: &Reference<'_>,
    problems: &mut Problems,
) -> Option<Vec<Source>> {
    let (group, selected) = selected(world, reference, node, problems)?;
    let Some(port) = reference.port else {
        let problem = Problem::new(
            node.here(),
            format!("`{}` names no port", node.text().unwrap_or_default()),
        );
        let ports = group.ports.iter().flatten();
        let ports: Vec<String> =
            ports.map(|(port, _)| format!("`{}.{port}`", reference.step)).collect();
        problems.push(problem.hint(format!("write {}", ports.join(" or "))));
        return None;
    };
    let ports = group.ports.as_ref()?;
    let Some((_, list)) = ports.iter().find(|(name, _)| name == port) else {
        let text = node.text().unwrap_or_default();
        let from = port.as_ptr() as usize - text.as_ptr() as usize;
        let span =
            if node.via.is_some() { node.here() } else { node.span.part(text, from, port.len()) };
        let message = format!("step `{}` has no output `{port}`", reference.step);
        let hint = suggest(port, "its outputs", ports.iter().map(|(name, _)| name.as_str()));
        problems.push(
            Problem::new(span, message).maybe_hint(hint.or(Some("it has no outputs".into()))),
        );
        return None;
    };
    let index = match item(reference, *list, &selected) {
        Ok(index) => index,
        Err((message, hint)) => {
            problems.push(Problem::new(node.here(), message).hint(hint));
            return None;
        }
    };
    let port = Text::from(port);
    let source = |&row: &usize| Source::Step { step: group.first + row, port: port.clone(), index };
    Some(selected.rows.iter().map(source).collect())
}

/// Which item of a port is meant; `None` for all.
fn item(
    reference: &Reference<'_>,
    list: bool,
    selected: &Selected,
) -> Result<Option<u32>, (String, String)> {
    let (step, port) = (reference.step, reference.port.unwrap_or_default());
    match (reference.index.map(str::trim), selected.item) {
        (None | Some("*"), Some(item)) if list => Ok(Some(item)),
        (_, Some(item)) if !list => {
            let message = format!("`{step}` has no `matrix`, and its output `{port}` is no list");
            Err((message, format!("write `{step}.{port}` without `[{item}]`")))
        }
        (None | Some("*"), _) => Ok(None),
        (Some(index), _) if !list => {
            let message = format!("output `{port}` of `{step}` is no list");
            Err((message, format!("write `{step}.{port}` without `[{index}]`")))
        }
        (Some(_), Some(item)) => {
            let message =
                format!("`{step}` has no `matrix`, so `[{item}]` already is an item of `{port}`");
            Err((message, format!("write `{step}.{port}[{item}]`")))
        }
        (Some(index), None) => index.parse().map(Some).map_err(|_| {
            let message = format!("`{index}` is no item of the list `{step}.{port}`");
            (message, format!("write a number, `{step}.{port}[0]` say, or `[*]` for all"))
        }),
    }
}

/// The instances a reference means; or what is wrong, and advice.
pub fn rows(
    group: &Group<'_>,
    reference: &Reference<'_>,
) -> Result<Selected, (String, Option<String>)> {
    let name = group.name();
    let plain = group.matrix.axes.is_empty();
    let all = Selected { rows: (0..group.matrix.rows.len()).collect(), item: None };
    match reference.select {
        None if plain => Ok(all),
        None => {
            let message = format!("`{name}` is a matrix of {} steps", group.matrix.rows.len());
            let port = reference.port.map(|port| format!(".{port}")).unwrap_or_default();
            let one = group.matrix.rows.first().map(|_| group.matrix.suffix(0)).unwrap_or_default();
            Err((
                message,
                Some(format!("write `{name}{one}{port}` for one, `{name}[*]{port}` for all")),
            ))
        }
        // So that one step over all layers and a matrix of one-layer steps have the same consumers.
        Some(select) if plain => match coordinates(select)[..] {
            [(_, None)] => Ok(all),
            [(_, Some(value))] if value.parse::<u32>().is_ok() => {
                Ok(Selected { item: value.parse().ok(), ..all })
            }
            _ => Err((
                format!("`{name}` has no `matrix` to select from"),
                Some(format!("write `{name}` without `[{select}]`")),
            )),
        },
        // A matrix that is wrong itself has been reported.
        Some(_) if group.matrix.rows.is_empty() => Ok(all),
        Some(select) => {
            let rows = group.matrix.select(name, select)?;
            Ok(Selected { rows, item: None })
        }
    }
}

/// Whether a text is a path and no reference.
pub fn is_path(text: &str) -> bool {
    ["./", "../", "/", "~/"].iter().any(|start| text.starts_with(start))
}

/// A user's path or pattern, absolute; it must have a match.
fn path(world: &World<'_>, node: &Node, text: &str, problems: &mut Problems) -> Option<PathBuf> {
    let base = &world.sources.get(node.base).base;
    let full = absolute(text, &world.cwd.join(base));
    let found = *world.found.borrow_mut().entry(full.clone()).or_insert_with(|| exists(&full));
    if found {
        return Some(full);
    }
    let pattern = text.contains(['*', '?', '[']);
    let message = match pattern {
        true => format!("no file matches `{text}`"),
        false => format!("no such file or directory: `{text}`"),
    };
    let problem = Problem::new(node.here(), message);
    let problem = match node.via {
        Some(_) => problem.related(node.span, "the value is from here"),
        None => problem,
    };
    problems.push(problem.hint(format!("looked for `{}`", full.display())));
    None
}

/// An absolute path, `~/` and `./` undone.
pub fn absolute(text: &str, base: &Path) -> PathBuf {
    let path = match (text.strip_prefix("~/"), std::env::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => base.join(text),
    };
    // `..` stays: beyond a symbolic link it is not the parent by name.
    path.components().filter(|part| *part != std::path::Component::CurDir).collect()
}

fn exists(path: &Path) -> bool {
    if path.exists() {
        return true;
    }
    let text = path.to_string_lossy();
    text.contains(['*', '?', '['])
        && glob::glob(&text).is_ok_and(|mut paths| paths.any(|path| path.is_ok()))
}

fn hub(node: &Node, name: &str, problems: &mut Problems) -> Option<Source> {
    match crate::hub::Reference::parse(name) {
        Ok(_) => Some(Source::Hub { name: name.to_string() }),
        Err(bad) => {
            let problem = Problem::new(node.here(), bad.message);
            let problem = match node.via {
                Some(_) => problem.related(node.span, "the value is from here"),
                None => problem,
            };
            problems.push(problem.hint(bad.hint));
            None
        }
    }
}
