//! [`Spec`] + stages → [`Plan`]: instances, their fields, what feeds what, and the order.
//!
//! Three passes, each linear: all instances of all steps; each instance's fields; the order.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::matrix::Matrix;
use super::order::order;
use super::{Plan, Source, Step, inputs, outputs, step};
use crate::diagnostic::suggest;
use crate::gpu::Gpus;
use crate::spec::layers::{Spec, StepSpec};
use crate::spec::scope::Scope;
use crate::spec::source::{Problem, Problems, Sources};
use crate::spec::yaml::{Node, Value, shorten};
use crate::stage::{Entry, Registry};

/// All that building a step may look at.
pub struct World<'a> {
    /// What was written.
    pub spec: &'a Spec,
    /// Filled parameters of the pipeline.
    pub params: &'a Node,
    /// Texts, for places and the directories that relative paths start from.
    pub sources: &'a Sources,
    /// Where outputs go.
    pub cwd: &'a Path,
    /// GPUs of the executor.
    pub gpus: &'a Gpus,
    /// In declared order.
    pub groups: Vec<Group<'a>>,
    /// Position in `groups`.
    pub by_name: HashMap<&'a str, usize>,
    /// The schema of each stage in use.
    pub schemas: HashMap<&'static str, Json>,
    /// Whether a path or pattern has a match, asked once each.
    pub found: RefCell<HashMap<PathBuf, bool>>,
}

/// One step of the file, with all its instances.
pub struct Group<'a> {
    /// As written.
    pub spec: &'a StepSpec,
    /// Its stage, if that is known.
    pub entry: Option<&'static Entry>,
    /// Its instances.
    pub matrix: Matrix,
    /// The first instance's position among all, in declared order.
    pub first: usize,
    /// Output ports and whether each is a list; `None` when the stage is not known.
    pub ports: Option<Vec<(String, bool)>>,
}

impl Group<'_> {
    /// The name in the file.
    pub fn name(&self) -> &str {
        &self.spec.name.text
    }

    /// Whether its stage is `command`.
    pub fn is_command(&self) -> bool {
        self.entry.is_some_and(|entry| entry.name == "command")
    }
}

/// Builds the plan; `None` when something is wrong, which `problems` then tells.
pub fn build(
    file: &Path,
    spec: &Spec,
    params: &Node,
    place: (&Path, &Gpus),
    registry: &Registry,
    sources: &Sources,
    problems: &mut Problems,
) -> Option<Plan> {
    let before = problems.len();
    let mut world = World {
        spec,
        params,
        sources,
        cwd: place.0,
        gpus: place.1,
        groups: Vec::with_capacity(spec.steps.len()),
        by_name: HashMap::with_capacity(spec.steps.len()),
        schemas: HashMap::new(),
        found: RefCell::default(),
    };
    let mut first = 0;
    for step in &spec.steps {
        let group = group(step, first, params, registry, problems);
        first += group.matrix.rows.len();
        if let Some(entry) = group.entry {
            world.schemas.entry(entry.name).or_insert_with(entry.schema);
        }
        world.by_name.insert(&step.name.text, world.groups.len());
        world.groups.push(group);
        if problems.enough() {
            return None;
        }
    }
    let mut steps = Vec::with_capacity(first);
    for group in &world.groups {
        step::instances(&world, group, &mut steps, problems);
        if problems.enough() {
            return None;
        }
    }
    let mut outputs = outputs::outputs(&world, problems);
    let order = ordered(&world, &steps, problems)?;
    let (steps, position) = arranged(steps, &order);
    for output in &mut outputs {
        moved(&mut output.source, &position);
    }
    let name = spec.name.as_ref().and_then(Node::text).map(str::to_string);
    let stem = || file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let plan = Plan { name: name.unwrap_or_else(stem), file: file.to_path_buf(), steps, outputs };
    (problems.len() == before).then_some(plan)
}

/// A step's stage and instances.
fn group<'a>(
    spec: &'a StepSpec,
    first: usize,
    params: &Node,
    registry: &Registry,
    problems: &mut Problems,
) -> Group<'a> {
    let scope = Scope { params: Some(params), ..Scope::default() };
    let matrix = match spec.get("matrix") {
        Some(field) => Matrix::of(&scope.fill(field, problems), problems),
        None => Matrix::single(),
    };
    let entry = stage(spec, &scope, registry, problems);
    let ports = entry.map(|entry| match entry.name {
        "command" => step::command_ports(spec),
        _ => (entry.ports)().outputs.iter().map(|out| (out.name.to_string(), out.list)).collect(),
    });
    Group { spec, entry, matrix, first, ports }
}

fn stage(
    spec: &StepSpec,
    scope: &Scope<'_>,
    registry: &Registry,
    problems: &mut Problems,
) -> Option<&'static Entry> {
    let Some(field) = spec.get("stage") else {
        let problem =
            Problem::new(spec.name.span, format!("step `{}` has no `stage`", spec.name.text));
        problems.push(problem.hint("write `stage: …`; `pipe stages` lists them"));
        return None;
    };
    let filled = scope.fill(field, problems);
    let name = match filled.text() {
        Some(name) => name,
        None => {
            if !matches!(filled.value, Value::Broken) {
                let message = format!("`stage` takes a name, not {}", filled.describe());
                problems.push(Problem::new(filled.here(), message));
            }
            return None;
        }
    };
    let entry = registry.get(name);
    if entry.is_none() {
        let message = format!("unknown stage `{}`", shorten(name));
        let hint = suggest(name, "stages", registry.0.iter().map(|entry| entry.name));
        problems.push(Problem::new(filled.here(), message).maybe_hint(hint));
    }
    entry
}

/// The order of instances, or a problem naming the cycle.
fn ordered(world: &World<'_>, steps: &[Step], problems: &mut Problems) -> Option<Vec<usize>> {
    let mut edges = Vec::new();
    for (to, step) in steps.iter().enumerate() {
        edges.extend(step.after.iter().map(|&from| (from, to)));
        for source in step.inputs.iter().flat_map(|port| &port.sources) {
            if let Source::Step { step: from, .. } = source {
                edges.push((*from, to));
            }
        }
    }
    match order(steps.len(), &edges) {
        Ok(order) => Some(order),
        Err(cycles) => {
            for members in cycles {
                if let Some(problem) = cycle(world, steps, &members) {
                    problems.push(problem);
                }
            }
            None
        }
    }
}

/// A cycle, its members named in order.
fn cycle(world: &World<'_>, steps: &[Step], members: &[usize]) -> Option<Problem> {
    let span = |at: usize| {
        let group = world.by_name.get(steps[at].group.as_str()).map(|&g| &world.groups[g]);
        group.map(|group| group.spec.name.span)
    };
    let names: Vec<String> =
        members.iter().chain(members.first()).map(|&at| format!("`{}`", steps[at].name)).collect();
    let first = members.first().and_then(|&at| span(at))?;
    let shown = match names.len() {
        n if n > 12 => format!("{} … {}", names[..10].join(" needs "), names[n - 1]),
        _ => names.join(" needs "),
    };
    let mut problem = Problem::new(first, format!("steps need one another in a circle: {shown}"));
    for &at in members.iter().skip(1).take(8) {
        if let Some(span) = span(at) {
            problem = problem.related(span, format!("`{}`", steps[at].name));
        }
    }
    Some(problem)
}

/// The steps in order, and where each one went.
fn arranged(mut steps: Vec<Step>, order: &[usize]) -> (Vec<Step>, Vec<usize>) {
    let mut position = vec![0; steps.len()];
    order.iter().enumerate().for_each(|(to, &from)| position[from] = to);
    // Without a second list: there may be very many, and most stay where they are.
    let mut goes = position.clone();
    for at in 0..steps.len() {
        while goes[at] != at {
            let to = goes[at];
            steps.swap(at, to);
            goes.swap(at, to);
        }
    }
    for step in &mut steps {
        step.after.iter_mut().for_each(|at| *at = position[*at]);
        step.inputs.iter_mut().flat_map(|port| &mut port.sources).for_each(|s| moved(s, &position));
    }
    (steps, position)
}

fn moved(source: &mut Source, position: &[usize]) {
    if let Source::Step { step, .. } = source {
        *step = position[*step];
    }
}

/// The instances that a reference means, checked: group and rows.
pub fn selected<'w>(
    world: &'w World<'_>,
    reference: &super::reference::Reference<'_>,
    node: &Node,
    problems: &mut Problems,
) -> Option<(&'w Group<'w>, inputs::Selected)> {
    let text = node.text().unwrap_or_default();
    let part = |part: &str| {
        let from = part.as_ptr() as usize - text.as_ptr() as usize;
        if node.via.is_some() { node.here() } else { node.span.part(text, from, part.len()) }
    };
    let Some(&at) = world.by_name.get(reference.step) else {
        let span = part(reference.step);
        let problem = world.spec.unknown_step(reference.step, span);
        let pathlike = text.contains('/')
            || Path::new(text)
                .extension()
                .is_some_and(|_| world.sources.get(node.base).base.join(text).exists());
        problems.push(match pathlike {
            true => {
                problem.hint(format!("a path starts with `./`, `../`, `/` or `~/`: `./{text}`"))
            }
            false => problem,
        });
        return None;
    };
    let group = &world.groups[at];
    match inputs::rows(group, reference) {
        Ok(selected) => Some((group, selected)),
        Err((message, hint)) => {
            let span = part(reference.select.unwrap_or(reference.step));
            problems.push(Problem::new(span, message).maybe_hint(hint));
            None
        }
    }
}
