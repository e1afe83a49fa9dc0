//! Files, profiles, `--params` and `--set`, laid over one another, as one [`Spec`].
//!
//! Defaults < included file < file < profile < `--params FILE` < `--set`. Knows which fields a step
//! has, not what they mean.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::files::{self, Files};
use super::source::{Problem, Problems, Source, Sources, Span};
use super::yaml::{self, Key, Node, Value};
use crate::diagnostic::suggest;

/// What may stand in a step.
pub const FIELDS: [&str; 13] = [
    "stage",
    "in",
    "with",
    "matrix",
    "resources",
    "retries",
    "timeout",
    "after",
    "cache",
    "run",
    "out",
    "env",
    "secrets",
];

/// A pipeline with everything laid over: one spanned tree, nothing filled in yet.
pub struct Spec {
    /// `name:`.
    pub name: Option<Node>,
    /// A map.
    pub params: Node,
    /// In declared order, included ones first.
    pub steps: Vec<StepSpec>,
    /// Of the pipeline file itself, not of what it includes.
    pub outputs: Vec<(Key, Node)>,
    by_name: HashMap<String, usize>,
    /// Names of all profiles, chosen or not.
    pub profiles: Vec<String>,
    /// `executor:`, as it stands in the files and chosen profiles.
    pub executor: Node,
}

/// One step as written.
pub struct StepSpec {
    /// Its name and where that was written.
    pub name: Key,
    /// A map of [`FIELDS`].
    pub fields: Node,
    /// Axes of a matrix that an override took away.
    pub removed: Vec<String>,
}

impl Spec {
    /// The step called `name`.
    pub fn step(&self, name: &str) -> Option<&StepSpec> {
        self.by_name.get(name).map(|&at| &self.steps[at])
    }

    pub(super) fn step_mut(&mut self, name: &str) -> Option<&mut StepSpec> {
        self.by_name.get(name).map(|&at| &mut self.steps[at])
    }

    /// Lays the files over one another, then the chosen profiles over them.
    pub fn of(
        files: Files,
        profiles: &[String],
        sources: &mut Sources,
        problems: &mut Problems,
    ) -> Spec {
        let top = files.trees.last().map_or(Span::top(0), |tree| tree.span);
        let mut spec = Spec {
            name: None,
            params: Node::new(Value::Map(Vec::new()), top),
            steps: Vec::new(),
            outputs: Vec::new(),
            executor: Node::new(Value::Map(Vec::new()), top),
            by_name: HashMap::new(),
            profiles: Vec::new(),
        };
        let mut known: HashMap<&str, Vec<&Node>> = HashMap::new();
        let mut order: Vec<&str> = Vec::new();
        for (index, tree) in files.trees.iter().enumerate() {
            if let Some(params) = map(tree, "params", problems) {
                overlay(&mut spec.params, &Node::new(Value::Map(params.to_vec()), top));
            }
            if let Some(executor) = tree.get("executor") {
                overlay(&mut spec.executor, executor);
            }
            for (key, step) in map(tree, "steps", problems).unwrap_or_default() {
                spec.add(key, step, problems);
            }
            for (key, profile) in map(tree, "profiles", problems).unwrap_or_default() {
                known.entry(&key.text).or_default().push(profile);
                order.push(&key.text);
            }
            if index + 1 == files.trees.len() {
                spec.name = tree.get("name").cloned();
                spec.outputs = map(tree, "outputs", problems).unwrap_or_default().to_vec();
            }
        }
        for name in profiles {
            match known.get(name.as_str()) {
                Some(all) => all.iter().for_each(|profile| spec.profile(name, profile, problems)),
                None => {
                    let span = argument("--profile", name, sources);
                    let problem = Problem::new(span, format!("unknown profile `{name}`"));
                    let hint = suggest(name, "profiles", order.iter().copied());
                    let none = || "the pipeline has no `profiles`".to_string();
                    problems.push(problem.hint(hint.unwrap_or_else(none)));
                }
            }
        }
        let mut seen = HashSet::new();
        order.retain(|name| seen.insert(*name));
        spec.profiles = order.into_iter().map(String::from).collect();
        spec
    }

    fn add(&mut self, key: &Key, step: &Node, problems: &mut Problems) {
        if !is_name(&key.text) {
            let message = format!("`{}` cannot name a step", yaml::shorten(&key.text));
            problems.push(Problem::new(key.span, message).hint(NAME_RULE));
            return;
        }
        if let Some(&at) = self.by_name.get(&key.text) {
            let first = self.steps[at].name.span;
            let problem = Problem::new(key.span, format!("step `{}` is there twice", key.text));
            let problem = problem.related(first, "first written here");
            problems
                .push(problem.hint("rename one; parameters, unlike steps, override one another"));
            return;
        }
        if step.entries().is_none() || step.is_null() {
            let message =
                format!("step `{}` takes a map of fields, not {}", key.text, step.describe());
            problems.push(Problem::new(step.span, message).hint("write at least `stage: …`"));
            return;
        }
        check_fields(step, &key.text, problems);
        self.by_name.insert(key.text.clone(), self.steps.len());
        let (name, fields) = (key.clone(), step.clone());
        self.steps.push(StepSpec { name, fields, removed: Vec::new() });
    }

    fn profile(&mut self, name: &str, profile: &Node, problems: &mut Problems) {
        let Some(entries) = profile.entries() else {
            let message =
                format!("profile `{name}` takes `params` and `steps`, not {}", profile.describe());
            problems.push(Problem::new(profile.span, message));
            return;
        };
        for (key, _) in entries {
            let fields = ["params", "steps", "executor"];
            if !fields.contains(&key.text.as_str()) {
                let message = format!("unknown field `{}` of a profile", key.text);
                let hint = suggest(&key.text, "fields", fields);
                problems.push(Problem::new(key.span, message).maybe_hint(hint));
            }
        }
        if let Some(executor) = profile.get("executor") {
            overlay(&mut self.executor, executor);
        }
        if let Some(params) = map(profile, "params", problems) {
            self.known_params(params, problems);
            overlay(&mut self.params, &Node::new(Value::Map(params.to_vec()), profile.span));
        }
        for (key, over) in map(profile, "steps", problems).unwrap_or_default() {
            check_fields(over, &key.text, problems);
            match self.step_mut(&key.text) {
                Some(step) => step.overlay(over, problems),
                None => {
                    let problem = self.unknown_step(&key.text, key.span);
                    problems.push(problem);
                }
            }
        }
    }

    /// Reads a `--params` file: a map of parameters.
    pub fn params_file(
        &mut self,
        path: &Path,
        cwd: &Path,
        sources: &mut Sources,
        problems: &mut Problems,
    ) -> Option<String> {
        let (name, full) = (path.display().to_string(), cwd.join(path));
        let text = match std::fs::read_to_string(&full) {
            Ok(text) => text,
            Err(error) => {
                problems.push(files::unreadable(&full, &name, &error, None, sources));
                return None;
            }
        };
        let base = full.parent().unwrap_or(Path::new("")).to_path_buf();
        let source =
            sources.add(Source { name: name.into(), text: text.clone(), base, lines: true });
        match yaml::parse(&text, source, 0) {
            Ok(tree) => match tree.entries() {
                Some(entries) => {
                    self.known_params(entries, problems);
                    overlay(&mut self.params, &tree);
                }
                None => {
                    let message = format!("a parameter file is a map, not {}", tree.describe());
                    problems.push(Problem::new(tree.span, message));
                }
            },
            Err(found) => found.into_iter().for_each(|problem| problems.push(problem)),
        }
        Some(text)
    }

    /// An override of a parameter that is not there is a slip of the pen.
    fn known_params(&self, over: &[(Key, Node)], problems: &mut Problems) {
        let known = self.params.entries().unwrap_or_default();
        for (key, _) in over {
            if !known.iter().any(|(k, _)| k.text == key.text) {
                let problem = Problem::new(key.span, format!("unknown parameter `{}`", key.text));
                let names = known.iter().map(|(k, _)| k.text.as_str());
                let hint = suggest(&key.text, "the pipeline's parameters", names);
                problems.push(problem.hint(hint.unwrap_or("the pipeline has no `params`".into())));
            }
        }
    }

    /// A name that is no step, with what was meant.
    pub fn unknown_step(&self, name: &str, span: Span) -> Problem {
        let names = self.steps.iter().map(|step| step.name.text.as_str());
        let problem = Problem::new(span, format!("unknown step `{}`", yaml::shorten(name)));
        problem.maybe_hint(suggest(name, "steps", names))
    }
}

impl StepSpec {
    /// The value of a field, if it says anything.
    pub fn get(&self, field: &str) -> Option<&Node> {
        self.fields.get(field).filter(|node| !node.is_null())
    }

    /// Lays fields over this step's. A field that is `null` is taken away.
    pub(super) fn overlay(&mut self, over: &Node, problems: &mut Problems) {
        let Some(entries) = over.entries() else {
            let message = format!("a step takes a map of fields, not {}", over.describe());
            problems.push(Problem::new(over.span, message));
            return;
        };
        for (key, node) in entries {
            if key.text == "matrix" && node.is_null() {
                let axes = self.get("matrix").and_then(Node::entries).unwrap_or_default();
                let axes: Vec<String> = axes.iter().map(|(k, _)| k.text.clone()).collect();
                self.removed.extend(axes.into_iter().filter(|axis| axis != "exclude"));
            }
            let Value::Map(fields) = &mut self.fields.value else { return };
            match fields.iter_mut().find(|(k, _)| k.text == key.text) {
                Some((_, old))
                    if matches!(key.text.as_str(), "in" | "with" | "env" | "resources") =>
                {
                    overlay(old, node);
                }
                Some((_, old)) => *old = node.clone(),
                None => fields.push((key.clone(), node.clone())),
            }
        }
    }
}

/// Lays `over` over `base`: maps key by key, anything else as a whole.
pub fn overlay(base: &mut Node, over: &Node) {
    let (Value::Map(entries), Value::Map(others)) = (&mut base.value, &over.value) else {
        *base = over.clone();
        return;
    };
    let mut at: HashMap<String, usize> =
        entries.iter().enumerate().map(|(i, (k, _))| (k.text.clone(), i)).collect();
    for (key, node) in others {
        match at.get(&key.text) {
            Some(&i) => overlay(&mut entries[i].1, node),
            None => {
                at.insert(key.text.clone(), entries.len());
                entries.push((key.clone(), node.clone()));
            }
        }
    }
}

/// The map at `key`, if there is one.
fn map<'a>(node: &'a Node, key: &str, problems: &mut Problems) -> Option<&'a [(Key, Node)]> {
    let child = node.get(key)?;
    let entries = child.entries();
    if entries.is_none() {
        let message = format!("`{key}` takes a map, not {}", child.describe());
        problems.push(Problem::new(child.span, message));
    }
    entries
}

fn check_fields(step: &Node, name: &str, problems: &mut Problems) {
    for (key, _) in step.entries().unwrap_or_default() {
        if !FIELDS.contains(&key.text.as_str()) {
            let message = format!("unknown field `{}` in step `{name}`", yaml::shorten(&key.text));
            let problem = Problem::new(key.span, message);
            problems.push(problem.maybe_hint(suggest(&key.text, "fields of a step", FIELDS)));
        }
    }
}

/// What [`is_name`] asks for, in words.
pub const NAME_RULE: &str =
    "a name is letters, digits, `_` and `-`, and starts with a letter or `_`";

/// Whether a text can name a step, a port or an axis.
pub fn is_name(text: &str) -> bool {
    let mut characters = text.chars();
    characters.next().is_some_and(|c| c.is_alphabetic() || c == '_')
        && characters.all(|c| c.is_alphanumeric() || c == '_' || c == '-')
}

/// The place of an argument on the command line.
pub fn argument(option: &str, text: &str, sources: &mut Sources) -> Span {
    let base = Path::new("").to_path_buf();
    let source = Source { name: option.into(), text: text.to_string(), base, lines: false };
    Span { len: text.len() as u32, ..Span::top(sources.add(source)) }
}
