//! YAML text → one spanned tree that keeps every scalar as it was written.
//!
//! The only place that meets the YAML crate. `serde_yaml` is serde-saphyr under the name that was
//! asked for; through serde it decides types while it parses, so that `1e-3`, `0017` and `2_000_000`
//! lose their spelling and keys lose their places. The event parser beneath it, which it re-exports,
//! keeps both. Knows nothing of pipelines.

use std::collections::{HashMap, HashSet};

use serde_yaml::granit_parser::{Event, Options, Parser, ScalarStyle, ScanError, Span as Range};

use super::source::{Problem, Span};

/// A value and where it was written.
#[derive(Clone, Debug)]
pub struct Node {
    /// What it is.
    pub value: Value,
    /// Where its value was written.
    pub span: Span,
    /// Where it was put in place of a `${…}`, if it was.
    pub via: Option<Span>,
    /// The source that relative paths in it start from.
    pub base: u32,
}

/// What a [`Node`] is.
#[derive(Clone, Debug)]
pub enum Value {
    /// `null`, `~` or nothing at all.
    Null,
    /// Any other scalar.
    Scalar {
        /// Its text, quotes and escapes undone.
        text: String,
        /// Whether it was written in quotes or as a block, so that it can only be a string.
        quoted: bool,
    },
    /// A list.
    Seq(Vec<Node>),
    /// Keys in the order written, all different.
    Map(Vec<(Key, Node)>),
    /// Something wrong that has been reported, so that nothing more is said about it.
    Broken,
}

/// A key of a map.
#[derive(Clone, Debug)]
pub struct Key {
    /// Its text.
    pub text: String,
    /// Where it was written.
    pub span: Span,
}

/// Nodes in one file, aliases counted each time: 100,000 steps of 40 nodes.
const MAX_NODES: usize = 4_000_000;
/// Nesting; trees are walked by recursion.
const MAX_DEPTH: usize = 64;

impl Node {
    /// A node as if written at `span`.
    pub fn new(value: Value, span: Span) -> Node {
        Node { value, span, via: None, base: span.source }
    }

    /// A plain scalar as if written at `span`.
    pub fn plain(text: impl Into<String>, span: Span) -> Node {
        Node::new(Value::Scalar { text: text.into(), quoted: false }, span)
    }

    /// Whether there is nothing.
    pub fn is_null(&self) -> bool {
        matches!(self.value, Value::Null)
    }

    /// The text of a scalar.
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar { text, .. } => Some(text),
            _ => None,
        }
    }

    /// The text of a scalar that may be something else than a string.
    pub fn unquoted(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar { text, quoted: false } => Some(text),
            _ => None,
        }
    }

    /// The entries of a map; of nothing, none.
    pub fn entries(&self) -> Option<&[(Key, Node)]> {
        match &self.value {
            Value::Map(entries) => Some(entries),
            Value::Null => Some(&[]),
            _ => None,
        }
    }

    /// The value at `key` of a map.
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.entries()?.iter().find(|(k, _)| k.text == key).map(|(_, node)| node)
    }

    /// `a map`, `a list`, `` `text` ``: what there is instead of what was wanted.
    pub fn describe(&self) -> String {
        match &self.value {
            Value::Null => "nothing".into(),
            Value::Seq(_) => "a list".into(),
            Value::Map(_) => "a map".into(),
            Value::Broken => "something wrong".into(),
            Value::Scalar { text, quoted: false } => format!("`{}`", shorten(text)),
            Value::Scalar { text, quoted: true } => format!("the string `{}`", shorten(text)),
        }
    }

    /// Where to point: at the `${…}` if the value came through one, else at the value.
    pub fn here(&self) -> Span {
        self.via.unwrap_or(self.span)
    }
}

/// At most 40 characters of `text`.
pub fn shorten(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_string(),
    }
}

/// Parses `text`, which is `sources[source]` from byte `skip` on; its problems otherwise.
pub fn parse(text: &str, source: u32, skip: usize) -> Result<Node, Vec<Problem>> {
    let mut builder = Builder {
        text,
        source,
        skip: skip as u32,
        stack: Vec::new(),
        anchors: HashMap::new(),
        nodes: 0,
        root: None,
        problems: Vec::new(),
    };
    if u32::try_from(text.len()).is_err() {
        return Err(vec![Problem::new(Span::top(source), "file is larger than 4 GiB")]);
    }
    let mut options = Options::default();
    options.set_emit_comments(false);
    options.simple_key_max_lookahead = 1024;
    let mut parser = Parser::new_from_str_with_options(text, options);
    while let Some(next) = parser.next_event() {
        let ended = match next {
            Ok((Event::StreamEnd, _)) => break,
            Ok((event, range)) => builder.event(event, range),
            Err(error) => Err(builder.syntax(&error)),
        };
        if let Err(problem) = ended {
            builder.problems.push(problem);
            break;
        }
    }
    match builder.problems.is_empty() {
        true => Ok(builder.root.unwrap_or_else(|| Node::new(Value::Null, Span::top(source)))),
        false => Err(builder.problems),
    }
}

/// A list or map that is not closed yet.
struct Open {
    value: Value,
    span: Span,
    anchor: usize,
    /// The key that waits for its value.
    key: Option<Key>,
    /// What `<<` brought in: below anything written out.
    merged: Vec<(Key, Node)>,
}

struct Builder<'a> {
    text: &'a str,
    source: u32,
    skip: u32,
    stack: Vec<Open>,
    anchors: HashMap<usize, (Node, usize)>,
    nodes: usize,
    root: Option<Node>,
    problems: Vec<Problem>,
}

impl Builder<'_> {
    fn event(&mut self, event: Event<'_>, range: Range) -> Result<(), Problem> {
        let span = self.span(range);
        match event {
            Event::DocumentStart(..) if self.root.is_some() => {
                let message = "more than one YAML document in a file";
                return Err(Problem::new(span, message).hint("remove the `---`"));
            }
            Event::Scalar(text, style, anchor, tag) => {
                let string = tag.is_some_and(|t| t.core_suffix() == Some("str"));
                let quoted = style != ScalarStyle::Plain || string;
                let value = match &*text {
                    "" | "~" | "null" | "Null" | "NULL" if !quoted => Value::Null,
                    text => Value::Scalar { text: text.to_string(), quoted },
                };
                self.finish(Node::new(value, span), anchor, 1)?;
            }
            Event::SequenceStart(_, anchor, _) => {
                self.open(Value::Seq(Vec::new()), span, anchor)?
            }
            Event::MappingStart(_, anchor, _) => self.open(Value::Map(Vec::new()), span, anchor)?,
            Event::SequenceEnd | Event::MappingEnd => self.close(span)?,
            Event::Alias(id) => {
                let Some((mut node, size)) = self.anchors.get(&id).cloned() else {
                    return Err(Problem::new(span, "an alias cannot stand inside its own anchor"));
                };
                node.via = None;
                self.finish(node, 0, size)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn open(&mut self, value: Value, span: Span, anchor: usize) -> Result<(), Problem> {
        if self.stack.len() >= MAX_DEPTH {
            return Err(Problem::new(span, format!("nested more than {MAX_DEPTH} deep")));
        }
        self.stack.push(Open { value, span, anchor, key: None, merged: Vec::new() });
        Ok(())
    }

    fn close(&mut self, end: Span) -> Result<(), Problem> {
        let Some(mut open) = self.stack.pop() else { return Ok(()) };
        if let Value::Map(entries) = &mut open.value {
            unique(entries, &mut self.problems);
            if !open.merged.is_empty() {
                let mut seen: HashSet<String> =
                    entries.iter().map(|(k, _)| k.text.clone()).collect();
                open.merged.retain(|(key, _)| seen.insert(key.text.clone()));
                entries.append(&mut open.merged);
            }
        }
        // A block ends where the next thing starts; only a flow `{…}` or `[…]` has an end of its own.
        let last = end.start + end.len;
        let len = last.saturating_sub(open.span.start).max(1);
        let flow = self.text.as_bytes().get((open.span.start - self.skip) as usize);
        let len = if matches!(flow, Some(b'{' | b'[')) { len } else { 1 };
        self.finish(Node::new(open.value, Span { len, ..open.span }), open.anchor, 1)
    }

    /// Puts a finished node where it belongs. `size` is how many nodes it stands for.
    fn finish(&mut self, node: Node, anchor: usize, size: usize) -> Result<(), Problem> {
        self.nodes += size;
        if self.nodes > MAX_NODES {
            let message = format!("more than {MAX_NODES} values in one file");
            return Err(Problem::new(node.span, message).hint("use a `matrix`"));
        }
        if anchor != 0 {
            self.anchors.insert(anchor, (node.clone(), count(&node)));
        }
        let Some(open) = self.stack.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match (&mut open.value, open.key.take()) {
            (Value::Seq(items), _) => items.push(node),
            (Value::Map(_), None) => open.key = Some(key_of(node)?),
            (Value::Map(_), Some(key)) if key.text == "<<" => merge_into(&mut open.merged, node)?,
            (Value::Map(entries), Some(key)) => entries.push((key, node)),
            _ => {}
        }
        Ok(())
    }

    fn span(&self, range: Range) -> Span {
        let (start, end) = (range.start, range.end);
        let first = start.byte_offset().unwrap_or(0) as u32;
        let last = end.byte_offset().unwrap_or(0) as u32;
        let shift = if start.line() <= 1 { self.skip } else { 0 };
        Span {
            source: self.source,
            start: first + self.skip,
            len: last.saturating_sub(first),
            line: start.line().max(1) as u32,
            column: start.col() as u32 + 1 + shift,
        }
    }

    /// The parser's complaint, with advice for the mistakes that are common in pipelines.
    fn syntax(&self, error: &ScanError) -> Problem {
        let mark = *error.marker();
        let span = self.span(Range::new(mark, mark));
        let at = floor(self.text, (span.start - self.skip) as usize);
        let from = self.text[..at].rfind('\n').map_or(0, |i| i + 1);
        // The parser may notice only on the line after.
        let before = self.text[..from.saturating_sub(1)].rfind('\n').map_or(0, |i| i + 1);
        let found = [from, before].into_iter().find_map(|from| {
            let line = self.text[from..].lines().next()?;
            bare_variable(line).map(|at| from + at)
        });
        if let Some(at) = found {
            let rest = &self.text[at..];
            let len = rest.find(['}', '\n']).map_or(2, |end| end + 1);
            let hint = format!("quote it: `\"{}\"`", rest[..len].trim_end());
            return Problem::new(
                self.span_at(at, len),
                "`${…}` inside `{…}` or `[…]` needs quotes",
            )
            .hint(hint);
        }
        let problem = Problem::new(span, format!("bad YAML: {}", error.info()));
        let line = self.text[from..].lines().next().unwrap_or_default();
        match line.trim_start_matches(' ').starts_with('\t') {
            true => problem.hint("indent with spaces; YAML takes no tabs"),
            false if error.info().contains("flow ") => {
                problem.hint("a `{` or `[` before this is not closed, or a comma is missing")
            }
            false => problem,
        }
    }

    /// The span of `len` bytes from byte `at` of the text; counts lines, so for errors only.
    fn span_at(&self, at: usize, len: usize) -> Span {
        let from = self.text[..at].rfind('\n').map_or(0, |i| i + 1);
        let shift = if from == 0 { self.skip } else { 0 };
        Span {
            source: self.source,
            start: at as u32 + self.skip,
            len: len as u32,
            line: self.text[..at].matches('\n').count() as u32 + 1,
            column: self.text[from..at].chars().count() as u32 + 1 + shift,
        }
    }
}

/// The nearest character boundary at or before `at`.
fn floor(text: &str, at: usize) -> usize {
    (0..=at.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)
}

/// Where an unquoted `${` stands in a flow mapping or list of this line.
fn bare_variable(line: &str) -> Option<usize> {
    let (mut quote, mut flow, mut before) = (None, 0usize, ' ');
    let bytes = line.as_bytes();
    for (at, c) in line.char_indices() {
        match (quote, c) {
            (Some(q), c) if q == c => quote = None,
            (Some(_), _) => {}
            (None, '"' | '\'') if !before.is_alphanumeric() => quote = Some(c),
            (None, '$') if flow > 0 && bytes.get(at + 1) == Some(&b'{') => return Some(at),
            (None, '{' | '[') => flow += 1,
            (None, '}' | ']') => flow = flow.saturating_sub(1),
            (None, '#') if before == ' ' => return None,
            _ => {}
        }
        before = c;
    }
    None
}

fn key_of(node: Node) -> Result<Key, Problem> {
    match node.value {
        Value::Scalar { text, .. } => Ok(Key { text, span: node.span }),
        Value::Null => Ok(Key { text: "null".into(), span: node.span }),
        _ => Err(Problem::new(node.span, "a key must be a plain word")
            .hint("a `{` that starts a value needs quotes if it is text")),
    }
}

/// `<<: *defaults`, or a list of such; what comes first wins.
fn merge_into(merged: &mut Vec<(Key, Node)>, node: Node) -> Result<(), Problem> {
    match node.value {
        Value::Map(entries) => merged.extend(entries),
        Value::Seq(items) => {
            for item in items {
                merge_into(merged, item)?;
            }
        }
        _ => return Err(Problem::new(node.span, "`<<` takes a map or a list of maps")),
    }
    Ok(())
}

/// Complains about keys that are there twice, and keeps the first.
fn unique(entries: &mut Vec<(Key, Node)>, problems: &mut Vec<Problem>) {
    let mut seen: HashMap<String, Span> = HashMap::with_capacity(entries.len());
    entries.retain(|(key, _)| match seen.get(&key.text) {
        None => {
            seen.insert(key.text.clone(), key.span);
            true
        }
        Some(first) => {
            let message = format!("`{}` is there twice", shorten(&key.text));
            problems.push(Problem::new(key.span, message).related(*first, "first written here"));
            false
        }
    });
}

/// How many nodes a tree has.
fn count(node: &Node) -> usize {
    match &node.value {
        Value::Seq(items) => 1 + items.iter().map(count).sum::<usize>(),
        Value::Map(entries) => 1 + entries.iter().map(|(_, n)| count(n)).sum::<usize>(),
        _ => 1,
    }
}
