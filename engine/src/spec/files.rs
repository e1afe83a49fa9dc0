//! Reading the pipeline file and what it includes, each file once, the included before the including.
//!
//! Knows the outer shape of a file (`name`, `include`, `params`, …), not what a step is.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::source::{Problem, Problems, Source, Sources, Span};
use super::yaml::{self, Node, Value};
use crate::diagnostic::suggest;
use crate::plan::inputs::absolute;
use crate::plan::outputs::plain;

/// What may stand at the top of a file.
pub const TOP: [&str; 7] =
    ["name", "include", "params", "profiles", "steps", "outputs", "executor"];

/// All files of a pipeline.
#[derive(Default)]
pub struct Files {
    /// Their trees; the pipeline's own is last.
    pub trees: Vec<Node>,
    /// Their paths and texts, in the order read.
    pub read: Vec<(PathBuf, String)>,
    state: HashMap<PathBuf, Progress>,
    /// Further names of files that were read, by way of links.
    links: HashSet<PathBuf>,
    broken: bool,
}

enum Progress {
    Reading,
    Done,
}

/// Deepest chain of includes.
const MAX_CHAIN: usize = 64;

impl Files {
    /// Reads the pipeline at `path`, shown as given.
    pub fn load(
        &mut self,
        path: &Path,
        cwd: &Path,
        sources: &mut Sources,
        problems: &mut Problems,
    ) {
        let name = path.display().to_string();
        self.read(&cwd.join(path), &name, None, 0, sources, problems);
    }

    /// Whether some file could not be read or parsed.
    pub fn broken(&self) -> bool {
        self.broken
    }

    /// Takes the pipeline from memory.
    pub fn take(
        &mut self,
        name: &str,
        text: &str,
        base: &Path,
        sources: &mut Sources,
        problems: &mut Problems,
    ) {
        self.parse(PathBuf::from(name), name, text.to_string(), base, 0, sources, problems);
    }

    fn read(
        &mut self,
        path: &Path,
        name: &str,
        from: Option<Span>,
        depth: usize,
        sources: &mut Sources,
        problems: &mut Problems,
    ) {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) => {
                self.broken = true;
                problems.push(unreadable(path, name, &error, from, sources));
                return;
            }
        };
        let real = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        match (self.state.get(&real), from) {
            (Some(Progress::Done), _) => {
                // By way of a link it may be another file one day.
                if plain(path) != real && self.links.insert(path.to_path_buf()) {
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    self.read.push((path.to_path_buf(), text));
                }
                return;
            }
            (Some(Progress::Reading), Some(span)) => {
                let message = format!("`{name}` includes itself, directly or through others");
                problems.push(Problem::new(span, message).hint("remove one of the includes"));
                return;
            }
            _ => {}
        }
        self.state.insert(real.clone(), Progress::Reading);
        let base = path.parent().unwrap_or(Path::new("")).to_path_buf();
        match String::from_utf8(bytes) {
            Ok(text) => self.parse(path.to_path_buf(), name, text, &base, depth, sources, problems),
            Err(error) => {
                self.broken = true;
                let at = error.utf8_error().valid_up_to();
                let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
                let line = text.get(..at).map_or(1, |t| t.matches('\n').count() + 1) as u32;
                let from = text.get(..at).and_then(|t| t.rfind('\n')).map_or(0, |i| i + 1);
                let column = text.get(from..at).map_or(1, |t| t.chars().count() + 1) as u32;
                let source = add(sources, name, &text, &base);
                let span = Span { source, start: at as u32, len: 1, line, column };
                let message = "not UTF-8 text".to_string();
                problems.push(Problem::new(span, message).hint("save the file as UTF-8"));
            }
        }
        self.state.insert(real, Progress::Done);
    }

    #[expect(clippy::too_many_arguments, reason = "one file's four facts, and the collectors")]
    fn parse(
        &mut self,
        path: PathBuf,
        name: &str,
        text: String,
        base: &Path,
        depth: usize,
        sources: &mut Sources,
        problems: &mut Problems,
    ) {
        let source = add(sources, name, &text, base);
        let tree = yaml::parse(&text, source, 0);
        self.read.push((path, text));
        let tree = match tree {
            Ok(tree) => tree,
            Err(found) => {
                self.broken = true;
                found.into_iter().for_each(|problem| problems.push(problem));
                return;
            }
        };
        let Some(entries) = tree.entries() else {
            let message = format!("a pipeline is a map of fields, not {}", tree.describe());
            let hint = "write `steps: { NAME: { stage: … } }`";
            problems.push(Problem::new(tree.span, message).hint(hint));
            self.broken = true;
            return;
        };
        for (key, _) in entries {
            // `x-…` is free, so that anchors have somewhere to be.
            if !TOP.contains(&key.text.as_str()) && !key.text.starts_with("x-") {
                let message = format!("unknown field `{}`", yaml::shorten(&key.text));
                let hint = suggest(&key.text, "fields", TOP);
                problems.push(Problem::new(key.span, message).maybe_hint(hint));
            }
        }
        if let Some(include) = tree.get("include") {
            for (node, file) in names(include, problems) {
                if depth >= MAX_CHAIN {
                    let message = format!("more than {MAX_CHAIN} includes deep");
                    problems.push(Problem::new(node, message));
                    return;
                }
                let shown = beside(name, &file);
                self.read(&absolute(&file, base), &shown, Some(node), depth + 1, sources, problems);
            }
        }
        self.trees.push(tree);
    }
}

/// The files an `include:` names.
fn names(include: &Node, problems: &mut Problems) -> Vec<(Span, String)> {
    let items = match &include.value {
        Value::Null => return Vec::new(),
        Value::Seq(items) => items.as_slice(),
        _ => std::slice::from_ref(include),
    };
    let mut names = Vec::new();
    for item in items {
        match item.text() {
            Some(text) => names.push((item.span, text.to_string())),
            None => {
                let message = format!("`include` takes names of files, not {}", item.describe());
                problems.push(Problem::new(item.span, message));
            }
        }
    }
    names
}

/// How an included file is shown: beside the file that includes it.
fn beside(name: &str, file: &str) -> String {
    match Path::new(name).parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir.join(file).display().to_string(),
        _ => file.to_string(),
    }
}

fn add(sources: &mut Sources, name: &str, text: &str, base: &Path) -> u32 {
    sources.add(Source {
        name: name.into(),
        text: text.to_string(),
        base: base.to_path_buf(),
        lines: true,
    })
}

/// Why a file could not be read: at the `include` that asked for it, or about the file itself.
pub fn unreadable(
    path: &Path,
    name: &str,
    error: &std::io::Error,
    from: Option<Span>,
    sources: &mut Sources,
) -> Problem {
    let span = from.unwrap_or_else(|| {
        let base = PathBuf::new();
        let source = Source { name: name.into(), text: String::new(), base, lines: false };
        Span::top(sources.add(source))
    });
    let why = match error.kind() {
        std::io::ErrorKind::NotFound => "it does not exist".to_string(),
        std::io::ErrorKind::IsADirectory => "it is a directory".to_string(),
        _ => error.to_string(),
    };
    let problem = Problem::new(span, format!("cannot read `{name}`: {why}"));
    match from {
        Some(_) => problem.hint(format!("looked for `{}`", path.display())),
        None => problem.maybe_hint(meant(path)),
    }
}

/// Which YAML file was meant: what lies beside `path`, or in it.
fn meant(path: &Path) -> Option<String> {
    let (dir, word) = match path.is_dir() {
        true => (path, ""),
        false => (path.parent()?, path.file_name()?.to_str()?),
    };
    let names = std::fs::read_dir(dir).ok()?.take(MOST_LISTED).flatten();
    let names = names.filter_map(|item| item.file_name().into_string().ok());
    let yaml = |name: &String| name.ends_with(".yaml") || name.ends_with(".yml");
    let mut names: Vec<String> = names.filter(yaml).collect();
    names.sort();
    suggest(word, "files there", names.iter().map(String::as_str))
}

/// Items of a directory that are looked at for a hint.
const MOST_LISTED: usize = 1000;
