//! The texts a pipeline is made of, places in them, and the collector of what is wrong there.
//!
//! Knows no YAML: a text is a name, characters and the directory that its relative paths start from.

use std::collections::HashSet;
use std::path::PathBuf;

use crate::diagnostic::{Diagnostic, Diagnostics, Snippet};
use crate::plan::{Place, Text};

/// A piece of one text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// Position in [`Sources`].
    pub source: u32,
    /// First byte.
    pub start: u32,
    /// Bytes.
    pub len: u32,
    /// 1-based.
    pub line: u32,
    /// 1-based, in characters.
    pub column: u32,
}

/// One text.
#[derive(Clone, Debug)]
pub struct Source {
    /// As shown: the path as given, or `--set`.
    pub name: Text,
    /// All of it.
    pub text: String,
    /// Where relative paths written in it start from.
    pub base: PathBuf,
    /// Whether places in it have line numbers (an argument has none).
    pub lines: bool,
}

/// All texts read so far.
#[derive(Debug, Default)]
pub struct Sources {
    all: Vec<Source>,
}

impl Sources {
    /// Adds a text.
    pub fn add(&mut self, source: Source) -> u32 {
        self.all.push(source);
        (self.all.len() - 1) as u32
    }

    /// The text at `index`.
    pub fn get(&self, index: u32) -> &Source {
        &self.all[index as usize]
    }

    /// File, line and column for people.
    pub fn place(&self, span: Span) -> Place {
        let source = self.get(span.source);
        Place {
            file: source.name.clone(),
            line: if source.lines { span.line as usize } else { 0 },
            column: span.column as usize,
        }
    }

    /// The line around `span`; what reaches beyond it is cut.
    fn snippet(&self, span: Span) -> Option<Snippet> {
        let text = &self.get(span.source).text;
        let start = floor(text, span.start as usize);
        let end = floor(text, (span.start as usize).saturating_add(span.len as usize));
        let from = text[..start].rfind('\n').map_or(0, |at| at + 1);
        let to = text[start..].find('\n').map_or(text.len(), |at| start + at);
        let line = text[from..to].trim_end_matches('\r');
        if line.trim().is_empty() {
            return None;
        }
        let end = end.clamp(start, to);
        Some(Snippet {
            line: line.to_string(),
            start: text[from..start].chars().count(),
            len: text[start..end].trim_end().chars().count().max(1),
        })
    }
}

/// The nearest character boundary at or before `at`.
fn floor(text: &str, at: usize) -> usize {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

impl Span {
    /// The place of a whole text.
    pub fn top(source: u32) -> Span {
        Span { source, start: 0, len: 0, line: 1, column: 1 }
    }

    /// The part from byte `from` of length `len` of the scalar `text` written here. Exact for a
    /// scalar written on one line without escapes, else the scalar as a whole.
    pub fn part(self, text: &str, from: usize, len: usize) -> Span {
        let skip = match (self.len as usize).checked_sub(text.len()) {
            Some(0) => 0,
            Some(2) => 1, // its quotes
            _ => return self,
        };
        if text.contains('\n') || !text.is_char_boundary(from) {
            return self;
        }
        Span {
            start: self.start + (skip + from) as u32,
            len: len as u32,
            column: self.column + skip as u32 + text[..from].chars().count() as u32,
            ..self
        }
    }
}

/// Where a problem is, before it is put into words for people.
#[derive(Clone, Debug)]
pub struct Problem {
    /// See [`Diagnostic::message`].
    pub message: String,
    /// The main place.
    pub span: Span,
    /// See [`Diagnostic::hint`].
    pub hint: Option<String>,
    /// Other places and what they are.
    pub related: Vec<(Span, String)>,
}

impl Problem {
    /// A problem at `span`.
    pub fn new(span: Span, message: impl Into<String>) -> Problem {
        Problem { message: message.into(), span, hint: None, related: Vec::new() }
    }

    /// With advice.
    pub fn hint(mut self, hint: impl Into<String>) -> Problem {
        self.hint = Some(hint.into());
        self
    }

    /// With advice, if there is any.
    pub fn maybe_hint(mut self, hint: Option<String>) -> Problem {
        self.hint = hint.or(self.hint);
        self
    }

    /// With another place.
    pub fn related(mut self, span: Span, text: impl Into<String>) -> Problem {
        self.related.push((span, text.into()));
        self
    }
}

/// Beyond so many problems nobody reads on, and looking for advice for each would take its time.
const ENOUGH: usize = 200;

/// Collects problems; the same one at the same place counts once (a matrix repeats them).
#[derive(Debug, Default)]
pub struct Problems {
    all: Vec<Problem>,
    seen: HashSet<(Span, String)>,
}

impl Problems {
    /// Takes one.
    pub fn push(&mut self, problem: Problem) {
        if self.seen.insert((problem.span, problem.message.clone())) {
            self.all.push(problem);
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether it makes no sense to look for more.
    pub fn enough(&self) -> bool {
        self.all.len() >= ENOUGH
    }

    /// Takes all of `other`.
    pub fn append(&mut self, other: Problems) {
        other.all.into_iter().for_each(|problem| self.push(problem));
    }

    /// In order of place, with the lines they are about.
    pub fn finish(mut self, sources: &Sources) -> Diagnostics {
        self.all.sort_by_key(|p| (p.span.source, p.span.line, p.span.column));
        if self.enough() {
            self.all.truncate(ENOUGH);
            let message = format!("these are the first {ENOUGH} problems; there may be more");
            self.all.extend(self.all.last().map(|last| Problem::new(last.span, message)));
        }
        let related = |(span, text): (Span, String)| match sources.get(span.source) {
            source if source.lines => (sources.place(span), text),
            source => (sources.place(span), format!("{text}: `{}`", source.text)),
        };
        let told = |problem: Problem| Diagnostic {
            place: sources.place(problem.span),
            snippet: sources.snippet(problem.span),
            message: problem.message,
            label: String::new(),
            hint: problem.hint,
            related: problem.related.into_iter().map(related).collect(),
        };
        Diagnostics(self.all.into_iter().map(told).collect())
    }
}
