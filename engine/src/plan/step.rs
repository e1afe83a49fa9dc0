//! The fields of one step, for each of its instances.

use std::collections::BTreeMap;

use serde_json::Value as Json;

use super::build::{Group, World, selected};
use super::reference::parse;
use super::{Place, Port, Resources, Step, Text, Use, command, device, inputs};
use crate::diagnostic::suggest;
use crate::spec::layers::{StepSpec, is_name};
use crate::spec::scope::Scope;
use crate::spec::source::{Problem, Problems, Span};
use crate::spec::typed::Typed;
use crate::spec::value;
use crate::spec::yaml::{Key, Node, Value};
use crate::stage::Entry;

/// What a stage is told, and where it was written.
#[derive(Clone, Default)]
pub struct Told {
    /// Canonical parameters.
    pub params: Json,
    /// Where each was set.
    pub origins: BTreeMap<String, Place>,
    /// Parameters of the pipeline within texts.
    pub uses: Vec<Use>,
    /// Output ports with file names.
    pub ports: Vec<(String, bool, String)>,
}

/// Appends all instances of `group`.
pub fn instances(
    world: &World<'_>,
    group: &Group<'_>,
    steps: &mut Vec<Step>,
    problems: &mut Problems,
) {
    if group.entry.is_some() {
        misplaced(group, problems);
    }
    // What does not name the matrix is the same for all instances.
    let varies = ["with", "run", "out", "env"]
        .iter()
        .any(|field| group.spec.get(field).is_some_and(|node| mentions(node, "matrix")));
    let mut same: Option<Told> = None;
    let first = steps.len();
    for row in 0..group.matrix.rows.len() {
        let coords: Vec<(String, Node)> =
            group.matrix.axes.iter().cloned().zip(group.matrix.rows[row].iter().cloned()).collect();
        let removed = &group.spec.removed;
        let scope =
            Scope { params: Some(world.params), matrix: &coords, removed, ..Scope::default() };
        let ports = ports(world, group, &scope, problems);
        let told = match &same {
            Some(told) => told.clone(),
            None => {
                let told = told(world, group, &scope, problems);
                if !varies {
                    same = Some(told.clone());
                }
                told
            }
        };
        let mut step = common(world, group, row, &scope, ports, told, problems);
        if let Some(before) = steps[first..].last() {
            share(&mut step, before);
        }
        steps.push(step);
        if problems.enough() {
            return;
        }
    }
}

/// What a step has in common with the instance before is held once.
fn share(step: &mut Step, before: &Step) {
    step.group.clone_from(&before.group);
    step.stage.clone_from(&before.stage);
    step.params.like(&before.params);
    step.ports.like(&before.ports);
    step.origins.like(&before.origins);
    step.uses.like(&before.uses);
    step.resources.like(&before.resources);
    step.secrets.like(&before.secrets);
    if step.auto == before.auto {
        step.auto.clone_from(&before.auto);
    }
    for (port, before) in step.inputs.iter_mut().zip(&before.inputs) {
        if port.name == before.name {
            port.name.clone_from(&before.name);
        }
    }
    for ((axis, _), (before, _)) in step.coords.iter_mut().zip(&before.coords) {
        axis.clone_from(before);
    }
}

/// Whether a `${root.…}` stands somewhere in a node.
fn mentions(node: &Node, root: &str) -> bool {
    match &node.value {
        Value::Scalar { text, .. } => text.contains("${") && text.contains(root),
        Value::Seq(items) => items.iter().any(|item| mentions(item, root)),
        Value::Map(entries) => entries.iter().any(|(_, node)| mentions(node, root)),
        _ => false,
    }
}

/// Fields that the step's stage does not have.
fn misplaced(group: &Group<'_>, problems: &mut Problems) {
    let (wrong, hint): (&[&str], _) = match group.is_command() {
        true => (&["with"], "a `command` takes `run`, `out`, `env` and `secrets`"),
        false => (&["run", "out", "env", "secrets"], "it belongs to `stage: command`"),
    };
    for (key, node) in group.spec.fields.entries().unwrap_or_default() {
        if wrong.contains(&key.text.as_str()) && !node.is_null() {
            let stage = group.entry.map_or("", |entry| entry.name);
            let message = format!("stage `{stage}` has no field `{}`", key.text);
            problems.push(Problem::new(key.span, message).hint(hint));
        }
    }
}

/// Output ports of a command, as its `out:` names them.
pub fn command_ports(spec: &StepSpec) -> Vec<(String, bool)> {
    let names = |node: &Node| match &node.value {
        Value::Seq(items) => items.iter().filter_map(Node::text).map(str::to_string).collect(),
        Value::Map(entries) => entries.iter().map(|(key, _)| key.text.clone()).collect(),
        _ => Vec::new(),
    };
    let names: Vec<String> = spec.get("out").map(names).unwrap_or_default();
    names.into_iter().map(|name| (name, false)).collect()
}

/// The connected input ports.
fn ports(
    world: &World<'_>,
    group: &Group<'_>,
    scope: &Scope<'_>,
    problems: &mut Problems,
) -> Vec<Port> {
    let scope = Scope { reference: true, ..*scope };
    let mut connected = Vec::new();
    let mut given: Vec<&str> = Vec::new();
    let field = group.spec.get("in");
    let entries = field.map(Node::entries);
    if let (Some(None), Some(node)) = (&entries, field) {
        let message = format!("`in` takes ports, not {}", node.describe());
        problems.push(Problem::new(node.here(), message).hint("write `in: { port: step.port }`"));
        return connected;
    }
    for (key, node) in entries.flatten().unwrap_or_default() {
        let filled = scope.fill(node, problems);
        if !filled.is_null() {
            given.push(&key.text);
        }
        let Some((list, named)) = shape(group, key, problems) else { continue };
        let Some(sources) = inputs::sources(world, &filled, problems) else { continue };
        if !list && sources.len() > 1 {
            let message = format!(
                "input `{}` takes one artifact, but {} are connected",
                key.text,
                sources.len()
            );
            let problem = Problem::new(filled.here(), message);
            problems.push(problem.hint("choose one: `step[VALUE].port`"));
            continue;
        }
        let empty = matches!(&filled.value, Value::Seq(items) if items.is_empty());
        if empty && !group.is_command() {
            given.pop();
        }
        if !sources.is_empty() {
            let place = world.sources.place(filled.span);
            connected.push(Port { name: key.text.as_str().into(), named, list, place, sources });
        }
    }
    // Most have one.
    connected.shrink_to_fit();
    let Some(entry) = group.entry.filter(|_| !group.is_command()) else {
        connected.sort_by(|a, b| a.name.cmp(&b.name));
        return connected;
    };
    let declared = (entry.ports)().inputs;
    for port in declared.iter().filter(|port| port.required && !given.contains(&port.name)) {
        problems.push(missing(world, group, port.name, port.doc));
    }
    connected.sort_by_key(|port| declared.iter().position(|d| port.name == d.name));
    connected
}

/// Whether a port takes a list, and whether names matter; of a command, always.
fn shape(group: &Group<'_>, key: &Key, problems: &mut Problems) -> Option<(bool, bool)> {
    let entry = group.entry?;
    if entry.name == "command" {
        if !is_name(&key.text) {
            let message = format!("`{}` cannot name a port", key.text);
            problems.push(Problem::new(key.span, message).hint(crate::spec::layers::NAME_RULE));
        }
        return Some((true, true));
    }
    let declared = (entry.ports)().inputs;
    let port = declared.iter().find(|port| port.name == key.text);
    if port.is_none() {
        let message = format!("stage `{}` has no input `{}`", entry.name, key.text);
        let none = || Some("it takes none".to_string());
        let hint = suggest(&key.text, "inputs", declared.iter().map(|port| port.name));
        problems.push(Problem::new(key.span, message).maybe_hint(hint.or_else(none)));
    }
    port.map(|port| (port.list, port.named))
}

fn missing(world: &World<'_>, group: &Group<'_>, port: &str, doc: &str) -> Problem {
    let source = world.groups.iter().find_map(|other| {
        let has = other.ports.iter().flatten().any(|(name, _)| name == port);
        let select = if other.matrix.axes.is_empty() { "" } else { "[*]" };
        (has && other.name() != group.name()).then(|| format!("{}{select}.{port}", other.name()))
    });
    let source = source.unwrap_or_else(|| "step.port".into());
    let message = format!("step `{}` needs input `{port}` ({doc})", group.name());
    Problem::new(group.spec.name.span, message).hint(format!("add `{port}: {source}` under `in`"))
}

/// The stage's parameters, checked and canonical.
fn told(world: &World<'_>, group: &Group<'_>, scope: &Scope<'_>, problems: &mut Problems) -> Told {
    let Some(entry) = group.entry else { return Told::default() };
    if entry.name == "command" {
        return command::told(world, group, entry, scope, problems);
    }
    let span = group.spec.name.span;
    let nothing = Node::new(Value::Null, span);
    let filled = scope.fill(group.spec.get("with").unwrap_or(&nothing), problems);
    let mut told = Told {
        ports: (entry.ports)()
            .outputs
            .iter()
            .map(|o| (o.name.into(), o.list, o.file.into()))
            .collect(),
        ..Told::default()
    };
    let place = |(key, node): &(Key, Node)| (key.text.clone(), world.sources.place(node.span));
    told.origins = filled.entries().unwrap_or_default().iter().map(place).collect();
    let checked =
        Typed::new(entry.name, &world.schemas[entry.name]).params(&filled, span, problems);
    if let Some(params) = checked {
        told.params = resolve(entry, params, &filled, span, problems);
    }
    told
}

/// Canonical parameters, with the stage's own complaints.
pub fn resolve(
    entry: &Entry,
    params: Json,
    node: &Node,
    span: Span,
    problems: &mut Problems,
) -> Json {
    match (entry.resolve)(params) {
        Ok(resolved) => {
            for (name, complaint) in resolved.complaints {
                let at = name.split(['.', '[']).next().unwrap_or(&name);
                let at = node.get(at);
                let message = format!("parameter `{name}`: {complaint}");
                let problem = Problem::new(at.map_or(span, Node::here), message);
                problems.push(match at.filter(|at| at.via.is_some()) {
                    Some(at) => problem.related(at.span, "the value is from here"),
                    None => problem,
                });
            }
            resolved.params
        }
        Err(message) => {
            let message = format!("stage `{}` refuses its parameters: {message}", entry.name);
            problems.push(Problem::new(span, message));
            Json::Null
        }
    }
}

/// The step itself.
fn common(
    world: &World<'_>,
    group: &Group<'_>,
    row: usize,
    scope: &Scope<'_>,
    inputs: Vec<Port>,
    mut told: Told,
    problems: &mut Problems,
) -> Step {
    let spec = group.spec;
    let mut resources = resources(spec, scope, problems);
    let auto = device::settle(world, group, &mut told.params, &mut resources, problems);
    let coords =
        scope.matrix.iter().map(|(axis, node)| (axis.as_str().into(), value::json(node))).collect();
    Step {
        name: format!("{}{}", group.name(), group.matrix.suffix(row)),
        group: group.name().into(),
        coords,
        stage: group.entry.map_or("", |entry| entry.name).into(),
        params: told.params.into(),
        inputs,
        after: after(world, group, scope, problems),
        ports: told.ports.into(),
        resources: resources.into(),
        retries: scalar(spec, "retries", scope, problems, "a whole number up to 1000", |text| {
            value::integer(text).filter(|n| (0..=1000).contains(n)).map(|n| n as u32)
        })
        .unwrap_or(0),
        timeout_s: scalar(
            spec,
            "timeout",
            scope,
            problems,
            "a duration: `90` (seconds), `10m`, `2h`",
            value::duration,
        ),
        cache: scalar(spec, "cache", scope, problems, "`true` or `false`", value::boolean)
            .unwrap_or(true),
        secrets: command::secrets(spec, problems).into(),
        place: world.sources.place(spec.name.span),
        origins: told.origins.into(),
        uses: told.uses.into(),
        auto: auto.map(Text::from),
    }
}

/// A field that is one scalar of some form.
fn scalar<T>(
    spec: &StepSpec,
    field: &str,
    scope: &Scope<'_>,
    problems: &mut Problems,
    want: &str,
    read: impl Fn(&str) -> Option<T>,
) -> Option<T> {
    read_scalar(spec.get(field)?, field, scope, problems, want, read)
}

fn read_scalar<T>(
    node: &Node,
    field: &str,
    scope: &Scope<'_>,
    problems: &mut Problems,
    want: &str,
    read: impl Fn(&str) -> Option<T>,
) -> Option<T> {
    let filled = scope.fill(node, problems);
    if matches!(filled.value, Value::Broken | Value::Null) {
        return None;
    }
    let value = filled.text().and_then(read);
    if value.is_none() {
        let message = format!("`{field}` takes {want}, not {}", filled.describe());
        problems.push(Problem::new(filled.here(), message));
    }
    value
}

fn resources(spec: &StepSpec, scope: &Scope<'_>, problems: &mut Problems) -> Resources {
    let mut resources = Resources::default();
    let Some(field) = spec.get("resources") else { return resources };
    let Some(entries) = field.entries() else {
        let message = format!("`resources` takes a map, not {}", field.describe());
        problems.push(
            Problem::new(field.here(), message).hint("write `resources: { gpu: 1, vram: 8GiB }`"),
        );
        return resources;
    };
    let count = |text: &str| value::integer(text).and_then(|n| u32::try_from(n).ok());
    let (number, size) = ("a whole number", "a size: `8GiB`, `500MB` or bytes");
    for (key, node) in entries {
        let name = key.text.as_str();
        match name {
            "cpu" => {
                let cpu = |text: &str| count(text).filter(|n| *n > 0);
                resources.cpu =
                    read_scalar(node, name, scope, problems, "a whole number above 0", cpu);
            }
            "gpu" => {
                resources.gpu = read_scalar(node, name, scope, problems, number, count).unwrap_or(0)
            }
            "memory" => {
                resources.memory =
                    read_scalar(node, name, scope, problems, size, value::bytes).unwrap_or(0);
            }
            "vram" => {
                resources.vram =
                    read_scalar(node, name, scope, problems, size, value::bytes).unwrap_or(0);
            }
            "gpu_type" => {
                let word = |text: &str| is_name(text).then(|| text.to_string());
                let want = "the name of a type of GPU, such as `a100`";
                resources.gpu_type = read_scalar(node, name, scope, problems, want, word);
            }
            "time" => {
                let want = "a duration: `90` (seconds), `10m`, `2h`";
                resources.time_s = read_scalar(node, name, scope, problems, want, value::duration);
            }
            _ => {
                let problem = Problem::new(key.span, format!("unknown resource `{name}`"));
                let known = ["cpu", "gpu", "gpu_type", "memory", "time", "vram"];
                let hint = suggest(name, "resources", known);
                problems.push(problem.maybe_hint(hint));
            }
        }
    }
    resources
}

/// Steps that must be done before this one, though nothing flows.
fn after(
    world: &World<'_>,
    group: &Group<'_>,
    scope: &Scope<'_>,
    problems: &mut Problems,
) -> Vec<usize> {
    let Some(field) = group.spec.get("after") else { return Vec::new() };
    let scope = Scope { reference: true, ..*scope };
    let filled = scope.fill(field, problems);
    let items = match &filled.value {
        Value::Seq(items) => items.as_slice(),
        _ => std::slice::from_ref(&filled),
    };
    let mut after = Vec::new();
    for item in items {
        match item.text().map(parse) {
            Some(Ok(reference)) if reference.port.is_none() => {
                // Without a selector, all of a matrix: nothing has to be chosen here.
                let reference = match reference.select {
                    None => super::reference::Reference { select: Some("*"), ..reference },
                    Some(_) => reference,
                };
                if let Some((other, selected)) = selected(world, &reference, item, problems) {
                    after.extend(selected.rows.iter().map(|row| other.first + row));
                }
            }
            Some(Err(message)) => problems.push(Problem::new(item.here(), message)),
            _ if matches!(item.value, Value::Broken | Value::Null) => {}
            _ => {
                let message = format!("`after` takes names of steps, not {}", item.describe());
                problems.push(
                    Problem::new(item.here(), message)
                        .hint("write `after: [step]`, without a port"),
                );
            }
        }
    }
    after.sort_unstable();
    after.dedup();
    after
}
