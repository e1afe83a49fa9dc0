//! Likelihoods of a benchmark's documents as accuracies, by the harness' formulas
//! (`lm_eval.api.metrics`).

use serde::Serialize;

use super::retained::Retained;
use super::{Document, Kind, Metric, TASKS, Task};
use crate::eval::likelihood::Likelihood;
use crate::eval::report::short;

/// What one model made of one document.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Whether it is right.
    pub acc: bool,
    /// Whether it is right by length.
    pub acc_norm: bool,
    /// Of a cloze, ln p of the continuation.
    pub nats: f64,
}

/// One model's figures on one benchmark. Errors are standard errors of the mean over documents.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TaskFigures {
    /// Share of documents that are right.
    pub acc: f64,
    /// Its error.
    pub acc_stderr: Option<f64>,
    /// Share that is right by length.
    pub acc_norm: Option<f64>,
    /// Its error.
    pub acc_norm_stderr: Option<f64>,
    /// exp of the mean −ln p of a continuation.
    pub perplexity: Option<f64>,
    /// Its error by the delta method; the harness draws samples instead.
    pub perplexity_stderr: Option<f64>,
}

/// Both models on one benchmark.
#[derive(Clone, Debug, Serialize)]
pub struct TaskResult {
    /// Its name.
    pub task: &'static str,
    /// Documents asked.
    pub n: usize,
    /// `acc` or `acc_norm`: what the benchmark is compared by.
    pub metric: &'static str,
    /// What guessing scores by that metric.
    pub chance: Option<f64>,
    /// The model evaluated.
    pub student: TaskFigures,
    /// The model it is compared with.
    pub teacher: Option<TaskFigures>,
    /// Student less teacher by that metric, paired by document.
    pub difference: Option<Mean>,
    /// Whether student and teacher are right by that metric, document by document; empty without a
    /// teacher.
    #[serde(skip)]
    pub hits: Vec<[bool; 2]>,
}

/// A mean and its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Mean {
    /// The mean.
    pub value: f64,
    /// Its standard error, if there is more than one value.
    pub stderr: Option<f64>,
}

/// Means over the paper's six benchmarks, each by its own metric.
#[derive(Clone, Debug, Serialize)]
pub struct Average {
    /// How many benchmarks.
    pub tasks: usize,
    /// The model evaluated.
    pub student: Mean,
    /// The model it is compared with.
    pub teacher: Option<Mean>,
    /// Student less teacher, paired.
    pub difference: Option<Mean>,
    /// What the student kept of the teacher's gain over guessing.
    pub retained: Option<Retained>,
    /// The same of the benchmarks with choices alone, so without LAMBADA.
    pub retained_choices: Option<Retained>,
}

/// The first of the largest.
fn first_best(values: impl Iterator<Item = f64>) -> usize {
    let better = |best: (usize, f64), new: (usize, f64)| if new.1 > best.1 { new } else { best };
    values.enumerate().reduce(better).map_or(0, |(at, _)| at)
}

/// What a model made of `document`, of whose requests it gave the `likelihoods`.
pub fn judge(kind: Kind, document: &Document, likelihoods: &[Likelihood]) -> Outcome {
    let nats = |at: usize| f64::from(likelihoods[at].nats);
    match kind {
        Kind::Cloze => {
            let acc = likelihoods[0].greedy;
            Outcome { acc, acc_norm: acc, nats: nats(0) }
        }
        Kind::Choice { .. } => {
            let count = likelihoods.len();
            let plain = first_best((0..count).map(nats));
            let by_length = (0..count).map(|at| nats(at) / document.lengths[at] as f64);
            let acc_norm = first_best(by_length) == document.gold;
            Outcome { acc: plain == document.gold, acc_norm, nats: nats(document.gold) }
        }
    }
}

impl Mean {
    /// Of `values`, none if there are none; the error from the sample's standard deviation.
    pub fn of(values: &[f64]) -> Option<Mean> {
        let n = values.len() as f64;
        let value = (!values.is_empty()).then(|| values.iter().sum::<f64>() / n)?;
        let squares: f64 = values.iter().map(|x| (x - value).powi(2)).sum();
        let stderr = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt() / n.sqrt());
        Some(Mean { value, stderr })
    }

    /// The mean of independent means.
    fn over(means: &[Mean]) -> Option<Mean> {
        let n = means.len() as f64;
        let value = (!means.is_empty()).then(|| means.iter().map(|m| m.value).sum::<f64>() / n)?;
        let squares: Option<f64> = means.iter().map(|mean| Some(mean.stderr?.powi(2))).sum();
        Some(Mean { value, stderr: squares.map(|squares| squares.sqrt() / n) })
    }

    fn short(self) -> Mean {
        Mean { value: short(self.value), stderr: self.stderr.map(short) }
    }
}

fn share(hit: bool) -> f64 {
    f64::from(u8::from(hit))
}

impl TaskFigures {
    /// Of all documents of a benchmark.
    pub fn of(kind: Kind, outcomes: &[Outcome]) -> TaskFigures {
        let mean =
            |of: &dyn Fn(&Outcome) -> f64| Mean::of(&outcomes.iter().map(of).collect::<Vec<f64>>());
        let Some(acc) = mean(&|o| share(o.acc)).map(Mean::short) else {
            return TaskFigures::default();
        };
        let figures =
            TaskFigures { acc: acc.value, acc_stderr: acc.stderr, ..TaskFigures::default() };
        match kind {
            Kind::Choice { normalised: false } => figures,
            Kind::Choice { normalised: true } => {
                let norm = mean(&|o| share(o.acc_norm)).map(Mean::short);
                let acc_norm_stderr = norm.and_then(|norm| norm.stderr);
                TaskFigures { acc_norm: norm.map(|norm| norm.value), acc_norm_stderr, ..figures }
            }
            Kind::Cloze => {
                let nats = mean(&|o| -o.nats);
                let perplexity = nats.map(|nats| nats.value.exp());
                let error = nats.and_then(|nats| Some(nats.value.exp() * nats.stderr?));
                TaskFigures {
                    perplexity: perplexity.map(short),
                    perplexity_stderr: error.map(short),
                    ..figures
                }
            }
        }
    }

    /// The figure that the benchmark is compared by.
    pub fn headline(&self, metric: Metric) -> Mean {
        match (metric, self.acc_norm) {
            (Metric::AccNorm, Some(value)) => Mean { value, stderr: self.acc_norm_stderr },
            _ => Mean { value: self.acc, stderr: self.acc_stderr },
        }
    }
}

/// What guessing scores on average, where there is something to guess among.
fn chance(kind: Kind, documents: &[Document]) -> Option<f64> {
    let guess = |document: &Document| 1.0 / document.requests.len() as f64;
    match kind {
        Kind::Cloze => None,
        Kind::Choice { .. } => {
            Mean::of(&documents.iter().map(guess).collect::<Vec<_>>()).map(|mean| short(mean.value))
        }
    }
}

impl TaskResult {
    /// From what each model made of `documents`, in order.
    pub fn of(
        task: &Task,
        documents: &[Document],
        student: &[Outcome],
        teacher: Option<&[Outcome]>,
    ) -> TaskResult {
        let hit = |outcome: &Outcome| match task.metric {
            Metric::Acc => outcome.acc,
            Metric::AccNorm => outcome.acc_norm,
        };
        let pairs = student.iter().zip(teacher.unwrap_or_default());
        let hits: Vec<[bool; 2]> = pairs.map(|(s, t)| [hit(s), hit(t)]).collect();
        let apart: Vec<f64> = hits.iter().map(|[s, t]| share(*s) - share(*t)).collect();
        TaskResult {
            task: task.name,
            n: documents.len(),
            metric: task.metric.name(),
            chance: chance(task.kind, documents),
            student: TaskFigures::of(task.kind, student),
            teacher: teacher.map(|teacher| TaskFigures::of(task.kind, teacher)),
            difference: Mean::of(&apart).map(Mean::short),
            hits,
        }
    }

    fn task(&self) -> Option<&'static Task> {
        TASKS.iter().find(|task| task.name == self.task)
    }
}

impl Metric {
    /// Its name in the harness.
    pub fn name(self) -> &'static str {
        match self {
            Metric::Acc => "acc",
            Metric::AccNorm => "acc_norm",
        }
    }
}

impl Average {
    /// Over the paper's benchmarks; none unless all are there.
    pub fn of(results: &[TaskResult]) -> Option<Average> {
        let paper: Vec<(&TaskResult, Metric)> = results
            .iter()
            .filter_map(|result| Some((result, result.task().filter(|task| task.paper)?.metric)))
            .collect();
        if paper.len() != TASKS.iter().filter(|task| task.paper).count() {
            return None;
        }
        let over = |of: &dyn Fn(&TaskResult, Metric) -> Option<Mean>| {
            let means: Option<Vec<Mean>> = paper.iter().map(|(r, metric)| of(r, *metric)).collect();
            Mean::over(&means?).map(Mean::short)
        };
        let all: Vec<&TaskResult> = paper.iter().map(|(result, _)| *result).collect();
        let choices: Vec<&TaskResult> =
            all.iter().filter(|result| result.chance.is_some()).copied().collect();
        Some(Average {
            tasks: paper.len(),
            student: over(&|result, metric| Some(result.student.headline(metric)))?,
            teacher: over(&|result, metric| Some(result.teacher.as_ref()?.headline(metric))),
            difference: over(&|result, _| result.difference),
            retained: Retained::of(&all),
            retained_choices: Retained::of(&choices),
        })
    }
}
