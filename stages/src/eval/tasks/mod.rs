//! Benchmarks as lm-evaluation-harness 0.4.13 asks them, without examples: published documents to
//! pairs of context and continuation, and likelihoods to accuracies. Knows no model.

pub mod arc;
pub mod boolq;
pub mod encode;
pub mod hellaswag;
pub mod lambada;
pub mod piqa;
pub mod results;
pub mod retained;
pub mod text;
pub mod winogrande;

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

/// Most choices of a document: no benchmark has near so many, and each repeats the context.
const CHOICES_MAX: usize = 64;

/// What a model is to continue, and with what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What comes before.
    pub context: String,
    /// What is scored.
    pub continuation: String,
}

/// One document of a benchmark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// One for each choice; of a cloze, the only one.
    pub requests: Vec<Request>,
    /// Length of each choice in characters, by which `acc_norm` divides.
    pub lengths: Vec<usize>,
    /// The right choice.
    pub gold: usize,
}

/// How a benchmark is scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The likeliest of several choices is taken; `normalised` if length-normalised accuracy is
    /// reported too.
    Choice {
        /// Whether `acc_norm` is reported.
        normalised: bool,
    },
    /// One continuation, right if each of its tokens is the likeliest; perplexity is reported too.
    Cloze,
}

/// Which accuracy a benchmark is compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Plain.
    Acc,
    /// By length.
    AccNorm,
}

/// A benchmark.
pub struct Task {
    /// Also the base name of its file.
    pub name: &'static str,
    /// How it is scored.
    pub kind: Kind,
    /// What MOHAWK's tables have of it.
    pub metric: Metric,
    /// Whether it is one of the six of MOHAWK's first table.
    pub paper: bool,
    parse: fn(&[u8]) -> Result<Document>,
}

const fn choice(name: &'static str, parse: fn(&[u8]) -> Result<Document>) -> Task {
    let kind = Kind::Choice { normalised: true };
    Task { name, kind, metric: Metric::Acc, paper: false, parse }
}

const fn plain(mut task: Task) -> Task {
    task.kind = Kind::Choice { normalised: false };
    task
}

const fn by_length(mut task: Task) -> Task {
    task.metric = Metric::AccNorm;
    task
}

const fn paper(mut task: Task) -> Task {
    task.paper = true;
    task
}

/// All benchmarks there are.
pub const TASKS: &[Task] = &[
    Task {
        name: "lambada_openai",
        kind: Kind::Cloze,
        metric: Metric::Acc,
        paper: true,
        parse: lambada::parse,
    },
    paper(by_length(choice("hellaswag", hellaswag::parse))),
    paper(choice("piqa", piqa::parse)),
    paper(choice("arc_easy", arc::parse)),
    paper(by_length(choice("arc_challenge", arc::parse))),
    paper(plain(choice("winogrande", winogrande::parse))),
    plain(choice("boolq", boolq::parse)),
    by_length(choice("openbookqa_test", arc::parse_openbookqa)),
    by_length(choice("openbookqa_validation", arc::parse_openbookqa)),
];

impl Task {
    /// The benchmark that a file called `file` holds.
    pub fn of_file(file: &str) -> Result<&'static Task> {
        let stem = file.strip_suffix(".jsonl").unwrap_or(file);
        let found = TASKS.iter().find(|task| task.name == stem);
        let known: Vec<String> = TASKS.iter().map(|task| format!("{}.jsonl", task.name)).collect();
        found.with_context(|| {
            let known = known.join(", ");
            format!("the name of `{file}` is no benchmark's: rename it to one of {known}")
        })
    }

    /// The document on one line of the file.
    pub fn document(&self, line: &[u8]) -> Result<Document> {
        let document = (self.parse)(line)?;
        let (choices, gold) = (document.requests.len(), document.gold);
        ensure!(choices <= CHOICES_MAX, "{choices} choices are more than {CHOICES_MAX}");
        ensure!(gold < choices, "answer {gold} is none of {choices} choices");
        Ok(document)
    }

    /// The first `limit` documents of the file (all, if there is no limit).
    pub fn read(&self, path: &Path, limit: Option<usize>) -> Result<Vec<Document>> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let bytes = std::fs::read(path).with_context(|| format!("cannot read `{name}`"))?;
        let lines = bytes.split(|byte| *byte == b'\n').enumerate();
        let filled = lines.filter(|(_, line)| !line.trim_ascii().is_empty());
        let one = |(number, line): (usize, &[u8])| {
            self.document(line).with_context(|| format!("`{name}`, line {}", number + 1))
        };
        let documents: Vec<Document> =
            filled.take(limit.unwrap_or(usize::MAX)).map(one).collect::<Result<_>>()?;
        if documents.is_empty() {
            bail!("`{name}` has no document");
        }
        Ok(documents)
    }
}

/// Choices after one context, each with a space before it.
fn choices(context: &str, choices: &[impl AsRef<str>], gold: usize) -> Result<Document> {
    // Before the context is repeated for each.
    let count = choices.len();
    ensure!(count <= CHOICES_MAX, "{count} choices are more than {CHOICES_MAX}");
    let choices = || choices.iter().map(AsRef::as_ref);
    let request = |choice| Request { context: context.into(), continuation: format!(" {choice}") };
    let lengths = choices().map(|choice: &str| choice.chars().count()).collect();
    Ok(Document { requests: choices().map(request).collect(), lengths, gold })
}
