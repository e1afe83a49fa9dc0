//! What `${…}` can stand for at some place of a pipeline, and putting it there.
//!
//! Strict: an unknown name is a problem. A value that is only one `${…}` keeps its type and the
//! place where it was written; a list in a longer text is joined by spaces.

use super::source::{Problem, Problems, Span};
use super::yaml::{Key, Node, Value};
use crate::diagnostic::suggest;
use crate::interpolate::{Piece, escape, is_script, pieces, shell_quote};

/// The names that are known.
#[derive(Clone, Copy, Default)]
pub struct Scope<'a> {
    /// `params.…`, already filled; a map.
    pub params: Option<&'a Node>,
    /// `matrix.…`: axes and their values.
    pub matrix: &'a [(String, Node)],
    /// Axes that an override took away.
    pub removed: &'a [String],
    /// Whether the text is a reference, in which such an axis stands for all its values: `*`.
    pub reference: bool,
    /// `env.…`: what the step declares.
    pub env: &'a [(Key, Node)],
    /// What only the worker knows, left in place; `None` where it makes no sense.
    pub late: Option<Late<'a>>,
}

/// Names that the worker fills in.
#[derive(Clone, Copy)]
pub struct Late<'a> {
    /// Connected inputs.
    pub inputs: &'a [String],
    /// Declared outputs.
    pub outputs: &'a [String],
}

/// What a name stands for.
enum Found<'a> {
    Value(&'a Node),
    /// A declared variable: its text is itself a template for the worker.
    Template(&'a Node),
    Every,
    Later,
}

impl Scope<'_> {
    /// `node` with everything filled in; what is wrong becomes [`Value::Broken`].
    pub fn fill(&self, node: &Node, problems: &mut Problems) -> Node {
        let value = match &node.value {
            Value::Scalar { text, .. } if text.contains('$') => {
                return self.scalar(node, text, false, problems);
            }
            Value::Seq(items) => {
                Value::Seq(items.iter().map(|item| self.fill(item, problems)).collect())
            }
            Value::Map(entries) => {
                let fill = |(key, node): &(Key, Node)| (key.clone(), self.fill(node, problems));
                Value::Map(entries.iter().map(fill).collect())
            }
            _ => node.value.clone(),
        };
        Node { value, ..*node }
    }

    /// The arguments of a command: a list that is a whole argument becomes several, and values in
    /// a shell's program text are quoted.
    pub fn arguments(&self, items: &[Node], problems: &mut Problems) -> Vec<Node> {
        let texts: Vec<&str> = items.iter().map(|n| n.text().unwrap_or_default()).collect();
        let mut arguments = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let filled = match item.text() {
                Some(text) if is_script(&texts, index) => self.scalar(item, text, true, problems),
                Some(text) => self.scalar(item, text, false, problems),
                None => item.clone(),
            };
            match filled.value {
                Value::Seq(several) => arguments.extend(several),
                _ => arguments.push(filled),
            }
        }
        arguments
    }

    fn scalar(&self, node: &Node, text: &str, quote: bool, problems: &mut Problems) -> Node {
        let broken = Node { value: Value::Broken, ..*node };
        let cut = match pieces(text) {
            Ok(cut) => cut,
            Err(unclosed) => {
                let span = node.span.part(text, unclosed.0, text.len() - unclosed.0);
                let problem = Problem::new(span, "`${` without `}`");
                problems.push(problem.hint("write `$${` for a literal `${`"));
                return broken;
            }
        };
        if let [Piece::Hole { name, at, len }] = cut[..]
            && !quote
        {
            let span = node.span.part(text, at, len);
            return match self.find(name, span, problems) {
                Some(Found::Value(value)) => self.whole(value, node.here()),
                Some(Found::Template(value)) => Node { via: Some(node.here()), ..value.clone() },
                Some(Found::Every) => Node::plain("*", node.span),
                Some(Found::Later) => node.clone(),
                None => broken,
            };
        }
        self.joined(node, text, &cut, quote, problems).unwrap_or(broken)
    }

    /// A value in the place of a whole `${…}`.
    fn whole(&self, value: &Node, here: Span) -> Node {
        let mut node = Node { via: Some(here), ..value.clone() };
        if self.late.is_some() {
            literal(&mut node);
        }
        node
    }

    /// Text with values in it.
    fn joined(
        &self,
        node: &Node,
        text: &str,
        cut: &[Piece<'_>],
        quote: bool,
        problems: &mut Problems,
    ) -> Option<Node> {
        let late = self.late.is_some();
        let mut joined = String::new();
        let mut base = node.base;
        let mut holes = false;
        let mut whole = true;
        for (index, piece) in cut.iter().enumerate() {
            let (name, at, len) = match piece {
                Piece::Text(plain) if late => {
                    joined.push_str(&escape(plain));
                    continue;
                }
                Piece::Text(plain) => {
                    joined.push_str(plain);
                    continue;
                }
                Piece::Hole { name, at, len } => (*name, *at, *len),
            };
            holes = true;
            let span = node.span.part(text, at, len);
            match self.find(name, span, problems) {
                None => whole = false,
                Some(Found::Every) => joined.push('*'),
                Some(Found::Later) if joined.ends_with('$') => {
                    let message = format!("a `$` cannot stand right before `${{{name}}}`");
                    problems.push(Problem::new(span, message));
                    whole = false;
                }
                Some(Found::Later) => joined.push_str(&text[at..at + len]),
                Some(Found::Template(value)) if quote => {
                    let message = format!("`${{{name}}}` cannot stand in a program text");
                    let hint = format!("the program has it as its variable `${}`", &name[4..]);
                    problems.push(
                        Problem::new(span, message).hint(hint).related(value.span, "set here"),
                    );
                    whole = false;
                }
                Some(Found::Template(value)) => joined.push_str(value.text().unwrap_or_default()),
                Some(Found::Value(value)) => {
                    if index == 0 {
                        base = value.base;
                    }
                    match texts(value, quote) {
                        Some(texts) if late => joined.push_str(&escape(&texts)),
                        Some(texts) => joined.push_str(&texts),
                        None => {
                            let message = format!("{} cannot be part of a text", value.describe());
                            problems
                                .push(Problem::new(span, message).related(value.span, "set here"));
                            whole = false;
                        }
                    }
                }
            }
        }
        let quoted = !holes && matches!(node.value, Value::Scalar { quoted: true, .. });
        let value = Value::Scalar { text: joined, quoted };
        whole.then_some(Node { value, base, ..*node })
    }

    fn find(&self, name: &str, span: Span, problems: &mut Problems) -> Option<Found<'_>> {
        let (root, rest) = name.split_once('.').unwrap_or((name, ""));
        let found = match root {
            "params" if !rest.is_empty() => self.param(rest).map(Found::Value),
            "matrix" if self.reference && self.lost(rest) => Some(Found::Every),
            "matrix" => {
                self.matrix.iter().find(|(axis, _)| axis == rest).map(|(_, v)| Found::Value(v))
            }
            "env" => self.env.iter().find(|(k, _)| k.text == rest).map(|(_, v)| Found::Template(v)),
            "in" => self.late.filter(|l| l.inputs.iter().any(|p| p == rest)).map(|_| Found::Later),
            "out" => {
                self.late.filter(|l| l.outputs.iter().any(|p| p == rest)).map(|_| Found::Later)
            }
            "checkpoint" | "scratch" if rest.is_empty() => self.late.map(|_| Found::Later),
            _ => None,
        };
        match found {
            Some(Found::Value(n) | Found::Template(n)) if matches!(n.value, Value::Broken) => None,
            Some(found) => Some(found),
            None => {
                problems.push(self.unknown(name, root, span));
                None
            }
        }
    }

    /// Whether an override took this axis away.
    fn lost(&self, axis: &str) -> bool {
        self.removed.iter().any(|removed| removed == axis)
    }

    /// The parameter at a dotted path; a number counts into a list.
    fn param(&self, path: &str) -> Option<&Node> {
        let mut node = self.params?;
        for part in path.split('.') {
            node = match &node.value {
                Value::Map(_) => node.get(part)?,
                Value::Seq(items) => items.get(part.parse::<usize>().ok()?)?,
                Value::Broken => return Some(node),
                _ => return None,
            };
        }
        Some(node)
    }

    fn unknown(&self, name: &str, root: &str, span: Span) -> Problem {
        let problem = Problem::new(span, format!("unknown variable `{name}`"));
        if name.is_empty() {
            return problem.hint("write a name, `${params.seed}` say, or `$${` for a literal `${`");
        }
        let names = self.names();
        let borrowed = || names.iter().map(String::as_str);
        match root {
            "matrix" if self.lost(name.strip_prefix("matrix.").unwrap_or_default()) => {
                problem.hint("an override took the `matrix` away; it must replace this value too")
            }
            "matrix" if self.matrix.is_empty() => problem.hint("this step has no `matrix`"),
            "in" | "out" | "checkpoint" | "scratch" if self.late.is_none() => {
                problem.hint("it is known only in `run` and `env` of a `command` step")
            }
            _ => problem.maybe_hint(suggest(name, "known here", borrowed())),
        }
    }

    /// All names that are known, dotted.
    fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        if let Some(params) = self.params {
            leaves(params, "params", &mut names);
        }
        names.extend(self.matrix.iter().map(|(axis, _)| format!("matrix.{axis}")));
        names.extend(self.env.iter().map(|(key, _)| format!("env.{}", key.text)));
        if let Some(late) = self.late {
            names.extend(late.inputs.iter().map(|port| format!("in.{port}")));
            names.extend(late.outputs.iter().map(|port| format!("out.{port}")));
            names.extend(["checkpoint".into(), "scratch".into()]);
        }
        names
    }
}

fn leaves(node: &Node, path: &str, names: &mut Vec<String>) {
    match &node.value {
        Value::Map(entries) => {
            for (key, node) in entries {
                leaves(node, &format!("{path}.{}", key.text), names);
            }
        }
        _ => names.push(path.to_string()),
    }
}

/// Scalars of a value that goes into text: itself, or a list's items with spaces between.
fn texts(node: &Node, quote: bool) -> Option<String> {
    match &node.value {
        Value::Scalar { text, .. } if quote => Some(shell_quote(text)),
        Value::Scalar { text, .. } => Some(text.clone()),
        Value::Seq(items) => {
            let texts: Option<Vec<String>> =
                items.iter().map(|i| i.text().and_then(|_| texts(i, quote))).collect();
            texts.map(|t| t.join(" "))
        }
        _ => None,
    }
}

/// Escapes what a worker would otherwise take for something to fill in.
fn literal(node: &mut Node) {
    match &mut node.value {
        Value::Scalar { text, .. } if text.contains("${") => *text = escape(text),
        Value::Seq(items) => items.iter_mut().for_each(literal),
        _ => {}
    }
}
