//! What is wrong with a pipeline, and its drawing as text with the source line underlined.
//!
//! Pure data and a pure renderer: knows no YAML, no terminal; whether to colour is asked for.

use std::fmt::{self, Write as _};

use serde::Serialize;

use crate::plan::Place;

/// One thing that is wrong, or worth knowing.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Diagnostic {
    /// What is wrong, in lower case, names in backticks.
    pub message: String,
    /// Where.
    pub place: Place,
    /// The source line there, if it could be read.
    pub snippet: Option<Snippet>,
    /// Short text beside the underline; may be empty.
    pub label: String,
    /// What to write instead.
    pub hint: Option<String>,
    /// Other places that belong to it (`first written here`).
    pub related: Vec<(Place, String)>,
}

/// A line of source and the part of it that is meant.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Snippet {
    /// The line, without its end.
    pub line: String,
    /// First character meant, counted from 0.
    pub start: usize,
    /// How many characters; at least one is underlined.
    pub len: usize,
}

/// Everything wrong with a pipeline, in order of place.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Diagnostics(pub Vec<Diagnostic>);

/// Longest part of a source line that is shown.
const WIDTH: usize = 110;

impl Diagnostics {
    /// All of them as text, one blank line between.
    pub fn render(&self, colour: bool) -> String {
        let texts: Vec<String> = self.0.iter().map(|d| d.render(colour)).collect();
        texts.join("\n")
    }
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Diagnostics {}

impl Diagnostic {
    /// This one as text that ends in a line feed.
    pub fn render(&self, colour: bool) -> String {
        let paint = Paint { on: colour };
        let number = if self.place.line > 0 { self.place.line.to_string() } else { String::new() };
        let number = format!("{number:1}");
        let gutter = " ".repeat(number.len());
        let mut out = String::new();
        let message = printable(&self.message);
        let _ = writeln!(out, "{}: {}", paint.red("error"), paint.bold(&message));
        let _ = writeln!(out, "{gutter}{} {}", paint.blue("-->"), printable(&show(&self.place)));
        if let Some(snippet) = &self.snippet {
            let (line, start, len) = snippet.window();
            let carets = "^".repeat(len);
            let label =
                if self.label.is_empty() { String::new() } else { format!(" {}", self.label) };
            let bar = paint.blue("|");
            let _ = writeln!(out, "{gutter} {bar}");
            let _ = writeln!(out, "{} {bar} {}", paint.blue(&number), line.trim_end());
            let underline = paint.red(&format!("{carets}{}", printable(&label)));
            let _ = writeln!(out, "{gutter} {bar} {}{underline}", " ".repeat(start));
        }
        for (place, text) in &self.related {
            let place = printable(&show(place));
            let _ = writeln!(out, "{gutter}{} {}: {}", paint.blue(":::"), place, printable(text));
        }
        if let Some(hint) = &self.hint {
            let _ = writeln!(out, "{gutter} {}: {}", paint.bold("hint"), printable(hint));
        }
        out
    }
}

/// `file:line:column`, or just the file where there is no line.
fn show(place: &Place) -> String {
    match place.line {
        0 => place.file.to_string(),
        line => format!("{}:{line}:{}", place.file, place.column),
    }
}

impl Snippet {
    /// The part of the line that is shown, and where its underline starts and how long it is.
    fn window(&self) -> (String, usize, usize) {
        let characters: Vec<char> = self.line.chars().map(tame).collect();
        let start = self.start.min(characters.len());
        let len = self.len.clamp(1, (characters.len() - start).max(1));
        if characters.len() <= WIDTH {
            return (characters.iter().collect(), start, len);
        }
        let from = if start + len < WIDTH * 3 / 4 { 0 } else { start.saturating_sub(WIDTH / 3) };
        let to = (from + WIDTH).min(characters.len());
        let head = if from > 0 { "…" } else { "" };
        let tail = if to < characters.len() { "…" } else { "" };
        let shown: String = characters[from..to].iter().collect();
        let offset = start - from + head.chars().count();
        (format!("{head}{shown}{tail}"), offset, len.min((to - start).max(1)))
    }
}

/// A character as it may be shown in one column.
fn tame(c: char) -> char {
    match c {
        '\t' => ' ',
        c if c.is_control() || is_formatting(c) => '\u{fffd}',
        c => c,
    }
}

/// Characters that would reorder or hide what follows them on a terminal.
fn is_formatting(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}')
}

/// Text from a pipeline without what could steer a terminal.
fn printable(text: &str) -> String {
    text.chars().map(tame).collect()
}

struct Paint {
    on: bool,
}

impl Paint {
    fn with(&self, code: &str, text: &str) -> String {
        if self.on { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }
    fn red(&self, text: &str) -> String {
        self.with("1;31", text)
    }
    fn blue(&self, text: &str) -> String {
        self.with("1;34", text)
    }
    fn bold(&self, text: &str) -> String {
        self.with("1", text)
    }
}

/// The candidate that `word` was probably meant to be.
pub fn closest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = word.to_lowercase();
    let best = candidates
        .into_iter()
        .map(|candidate| {
            (strsim::damerau_levenshtein(&lower, &candidate.to_lowercase()), candidate)
        })
        .min_by_key(|(distance, _)| *distance)?;
    let allowed = (word.chars().count() / 3).clamp(1, 4);
    (best.0 <= allowed && best.0 < word.chars().count()).then_some(best.1)
}

/// `did you mean …?` where something is close, else the list of what there is.
pub fn suggest<'a>(
    word: &str,
    what: &str,
    candidates: impl IntoIterator<Item = &'a str> + Clone,
) -> Option<String> {
    if word.len() <= 200
        && let Some(best) = closest(word, candidates.clone())
    {
        return Some(format!("did you mean `{best}`?"));
    }
    let all: Vec<String> = candidates.into_iter().map(|c| format!("`{c}`")).collect();
    match all.len() {
        0 => None,
        n if n > 20 => Some(format!("{what}: {}, … ({n} in all)", all[..20].join(", "))),
        _ => Some(format!("{what}: {}", all.join(", "))),
    }
}
