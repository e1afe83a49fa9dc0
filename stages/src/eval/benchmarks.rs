//! Runs benchmarks from their files: documents, tokens, both models' likelihoods, figures, and one
//! line a document for whoever compares models later.

use std::io::Write;

use anyhow::{Context as _, Result, ensure};
use engine::stage::{Context, Input};
use rayon::prelude::*;
use serde::Serialize;

use super::bench::{Answers, Bench};
use super::likelihood::{Item, Likelihood};
use super::tasks::encode::Encoder;
use super::tasks::results::{Outcome, TaskResult, judge};
use super::tasks::{Document, Task};
use crate::data::corpus::parallel;

/// One line of the `scores` artifact.
#[derive(Serialize)]
struct Line<'a> {
    task: &'a str,
    /// From 0, in the order of the file.
    document: usize,
    gold: usize,
    lengths: &'a [usize],
    /// ln p and whether it is the likeliest, of each choice.
    student: Vec<(f32, bool)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    teacher: Option<Vec<(f32, bool)>>,
}

/// The benchmarks that `inputs` hold by their names, each once.
pub fn tasks(inputs: &[Input]) -> Result<Vec<(&'static Task, &Input)>> {
    let mut found: Vec<(&'static Task, &Input)> = Vec::new();
    for input in inputs {
        let task = Task::of_file(&input.name)?;
        let twice = found.iter().any(|(other, _)| other.name == task.name);
        ensure!(!twice, "benchmark `{}` is given twice", task.name);
        found.push((task, input));
    }
    Ok(found)
}

/// Both models on one benchmark; its lines go to `scores`.
pub fn run(
    (task, input): (&Task, &Input),
    limit: Option<usize>,
    encoder: &Encoder,
    bench: &mut Bench,
    ctx: &mut Context,
    scores: &mut impl Write,
) -> Result<TaskResult> {
    let documents = task.read(&input.path, limit)?;
    let items = encode(task, &documents, encoder, ctx.threads())?;
    let answers = bench.ask(task.name, &items, ctx)?;
    write(task, &documents, &answers, scores).context("cannot write the scores")?;
    let student = outcomes(task, &documents, &answers.student);
    let teacher = answers.teacher.map(|teacher| outcomes(task, &documents, &teacher));
    Ok(TaskResult::of(task, &documents, &student, teacher.as_deref()))
}

/// All requests of all documents, one after the other.
fn encode(
    task: &Task,
    documents: &[Document],
    encoder: &Encoder,
    threads: usize,
) -> Result<Vec<Item>> {
    let one = |(number, document): (usize, &Document)| -> Result<Vec<Item>> {
        let items = document.requests.iter().map(|request| encoder.item(request));
        let place = || format!("document {number} of `{}`", task.name);
        items.collect::<Result<_>>().with_context(place)
    };
    let all: Result<Vec<Vec<Item>>> =
        parallel(threads, || documents.par_iter().enumerate().map(one).collect())?;
    Ok(all?.into_iter().flatten().collect())
}

/// The likelihoods of each document's requests.
fn by_document<'a>(
    documents: &'a [Document],
    likelihoods: &'a [Likelihood],
) -> impl Iterator<Item = (&'a Document, &'a [Likelihood])> {
    let mut rest = likelihoods;
    documents.iter().map(move |document| {
        let (own, after) = rest.split_at(document.requests.len());
        rest = after;
        (document, own)
    })
}

fn outcomes(task: &Task, documents: &[Document], likelihoods: &[Likelihood]) -> Vec<Outcome> {
    let pairs = by_document(documents, likelihoods);
    pairs.map(|(document, own)| judge(task.kind, document, own)).collect()
}

fn write(
    task: &Task,
    documents: &[Document],
    answers: &Answers,
    to: &mut impl Write,
) -> Result<()> {
    let plain = |own: &[Likelihood]| own.iter().map(|l| (l.nats, l.greedy)).collect();
    let mut teacher = answers.teacher.iter().flat_map(|all| by_document(documents, all));
    for (number, (document, own)) in by_document(documents, &answers.student).enumerate() {
        let line = Line {
            task: task.name,
            document: number,
            gold: document.gold,
            lengths: &document.lengths,
            student: plain(own),
            teacher: teacher.next().map(|(_, own)| plain(own)),
        };
        serde_json::to_writer(&mut *to, &line)?;
        to.write_all(b"\n")?;
    }
    Ok(())
}
