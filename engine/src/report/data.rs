//! A run's record as the plain facts that a page shows: states, times, attempts, failures, metrics.
//! Knows no HTML.

use std::collections::BTreeMap;

use cache::{Cache, Key, Output};

use super::metrics::{self, Metrics};
use crate::event::{Event, Failure, Summary};
pub(super) use crate::graph::Group;
use crate::graph::groups;
use crate::plan;
use crate::run::Past;
use crate::stage::Report;

/// Values by name at each point of the work.
pub(crate) type Curve = BTreeMap<u64, BTreeMap<String, f64>>;

/// Most points kept of one step's events; later ones are thinned out evenly when drawn.
const MOST_POINTS: usize = 100_000;
/// Most notes of stages that are kept.
const MOST_NOTES: usize = 200;

/// All facts of one run.
pub(super) struct Run<'a> {
    pub past: &'a Past,
    pub outcome: Outcome,
    pub totals: Summary,
    /// One of every step of the plan, in its order.
    pub steps: Vec<Step<'a>>,
    /// Steps by their name in the file, in order of first appearance.
    pub groups: Vec<Group<'a>>,
    pub spans: Vec<Span>,
    pub notes: Vec<String>,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Failed,
    Interrupted,
    /// No end is recorded: it still runs, or was killed.
    Open,
}

/// Where a step stands; in order of how much it matters for a group that has several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum State {
    /// Not asked for in this run.
    Apart,
    Cached,
    Ran,
    /// Asked for, and the record ends before it began.
    Pending,
    Skipped,
    Running,
    Failed,
}

impl State {
    /// For people; also the class in the page.
    pub fn word(self) -> &'static str {
        match self {
            State::Apart => "apart",
            State::Cached => "cached",
            State::Ran => "ran",
            State::Pending => "pending",
            State::Skipped => "skipped",
            State::Running => "running",
            State::Failed => "failed",
        }
    }

    /// What the word means.
    pub fn meaning(self) -> &'static str {
        match self {
            State::Apart => "not asked for in this run",
            State::Cached => "its result was there",
            State::Ran => "executed in this run",
            State::Pending => "not begun when the record ends",
            State::Skipped => "not run, since another failed or the run was stopped",
            State::Running => "begun, and no end is recorded",
            State::Failed => "failed",
        }
    }
}

/// One step and what became of it.
pub(super) struct Step<'a> {
    pub plan: &'a plan::Step,
    pub state: State,
    /// Wall time here; of a cached step, when it ran.
    pub seconds: Option<f64>,
    pub key: Option<Key>,
    pub outputs: &'a [Output],
    pub metrics: Metrics,
    /// From events, if it ran here.
    pub curve: Curve,
    /// Amount of work a second, with its unit, if it ran here and told.
    pub rate: Option<(f64, &'a str)>,
    pub failure: Option<Failed<'a>>,
    /// Attempts begun in this run.
    pub attempts: u32,
    /// Position of the checkpoint the last attempt began from.
    pub resumed: Option<u64>,
}

/// Why a step failed.
#[derive(Clone, Copy)]
pub(super) struct Failed<'a> {
    pub failure: Failure,
    pub message: &'a str,
    pub log: &'a str,
}

/// Something that took time: an attempt, or waiting for another process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub step: usize,
    pub from: f64,
    pub to: f64,
    pub how: How,
}

/// What a span was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum How {
    Ran,
    Failed,
    /// No end recorded.
    Open,
    /// Another process did the work.
    Waited,
}

impl<'a> Run<'a> {
    /// Reads `past`, and the metrics artifacts it names out of `cache`.
    pub fn of(past: &'a Past, cache: &Cache) -> Run<'a> {
        let mut run = Run {
            past,
            outcome: Outcome::Open,
            totals: Summary::default(),
            steps: past.plan.steps.iter().map(Step::new).collect(),
            groups: groups(&past.plan.steps),
            spans: Vec::new(),
            notes: Vec::new(),
        };
        let mut open = Open::default();
        for stamped in &past.events {
            run.take(stamped.t, &stamped.event, &mut open);
        }
        let end = past.events.last().map_or(0.0, |last| last.t);
        for (&step, &(from, waited)) in &open.since {
            let how = if waited { How::Waited } else { How::Open };
            run.spans.push(Span { step, from, to: end, how });
        }
        if run.outcome == Outcome::Open {
            run.count(end);
        } else {
            let unasked = |step: &&mut Step| step.state == State::Pending;
            run.steps.iter_mut().filter(unasked).for_each(|step| step.state = State::Apart);
        }
        metrics::read_all(&mut run.steps, cache);
        run
    }

    fn take(&mut self, t: f64, event: &'a Event, open: &mut Open<'a>) {
        match event {
            // Read back, a run that is unchanged has an event for each hit.
            Event::Started { .. }
            | Event::Job { .. }
            | Event::Durable { .. }
            | Event::Unchanged { .. } => {}
            Event::Cached { step, key, saved_s, outputs } => {
                self.close(*step, t, How::Waited, open);
                let Some(step) = self.steps.get_mut(*step) else { return };
                step.settle(State::Cached, Some(*key), Some(*saved_s), outputs);
            }
            Event::Waiting { step, .. } => {
                open.since.entry(*step).or_insert((t, true));
            }
            Event::Launched { step, key, attempt, resumed, .. } => {
                self.close(*step, t, How::Waited, open);
                let Some(it) = self.steps.get_mut(*step) else { return };
                it.settle(State::Running, Some(*key), None, &[]);
                (it.attempts, it.resumed, it.failure) = (*attempt, *resumed, None);
                open.since.insert(*step, (t, false));
                open.progress.remove(step);
            }
            Event::Reported { step, report } => self.reported(t, *step, report, open),
            Event::Finished { step, key, seconds, outputs } => {
                self.close(*step, t, How::Ran, open);
                let Some(it) = self.steps.get_mut(*step) else { return };
                it.settle(State::Ran, Some(*key), Some(*seconds), outputs);
                it.rate = open.rate(*step);
            }
            Event::Failed { step, key, failure, message, log, retry } => {
                let from = self.close(*step, t, How::Failed, open);
                let Some(it) = self.steps.get_mut(*step) else { return };
                let state = if *retry { State::Pending } else { State::Failed };
                it.settle(state, *key, from.map(|from| t - from), &[]);
                it.failure = Some(Failed { failure: *failure, message, log });
                if *retry {
                    let name = &it.plan.name;
                    self.note(format!("`{name}` failed and was tried again: {message}"));
                }
            }
            Event::Skipped { step, .. } => {
                if let Some(it) = self.steps.get_mut(*step) {
                    it.state = State::Skipped;
                }
            }
            Event::Note { text } => self.note(text.clone()),
            Event::Ended { summary } => {
                self.totals = summary.clone();
                self.outcome = match summary {
                    s if s.failed > 0 => Outcome::Failed,
                    s if s.interrupted || s.left > 0 => Outcome::Interrupted,
                    _ => Outcome::Done,
                };
            }
        }
    }

    fn reported(&mut self, t: f64, at: usize, report: &'a Report, open: &mut Open<'a>) {
        let Some(step) = self.steps.get_mut(at) else { return };
        match report {
            Report::Progress { done, unit, .. } => {
                let point = (t, *done, unit.as_str());
                let (first, last) = open.progress.entry(at).or_insert((point, point));
                if first.2 != unit {
                    *first = point;
                }
                *last = point;
            }
            Report::Metric { at, values } => {
                if step.curve.len() < MOST_POINTS {
                    step.curve.entry(*at).or_default().extend(values.clone());
                }
            }
            Report::Note { text } => {
                let text = format!("`{}`: {text}", step.plan.name);
                self.note(text);
            }
        }
    }

    fn note(&mut self, text: String) {
        if self.notes.len() < MOST_NOTES {
            self.notes.push(text);
        }
    }

    /// Ends what is open of `step`; tells when it began.
    fn close(&mut self, step: usize, to: f64, how: How, open: &mut Open) -> Option<f64> {
        let (from, waited) = open.since.remove(&step)?;
        let how = if waited { How::Waited } else { how };
        self.spans.push(Span { step, from, to, how });
        Some(from)
    }

    /// Totals of a record without an end.
    fn count(&mut self, seconds: f64) {
        let count = |state| self.steps.iter().filter(|step| step.state == state).count();
        let cached = self.steps.iter().filter(|step| step.state == State::Cached);
        self.totals = Summary {
            cached: count(State::Cached),
            ran: count(State::Ran),
            failed: count(State::Failed),
            skipped: count(State::Skipped),
            left: 0,
            seconds,
            saved_s: cached.filter_map(|step| step.seconds).sum(),
            ..Summary::default()
        };
    }

    /// Steps that failed for good.
    pub fn failures(&self) -> impl Iterator<Item = (&Step<'a>, Failed<'a>)> {
        let failed = self.steps.iter().filter(|step| step.state == State::Failed);
        failed.filter_map(|step| Some((step, step.failure?)))
    }
}

/// What has begun and not ended, while events are read.
#[derive(Default)]
struct Open<'a> {
    /// By step: since when, and whether it only waits.
    since: BTreeMap<usize, (f64, bool)>,
    /// By step: first and last progress of the attempt: time, amount, unit.
    progress: BTreeMap<usize, (Point<'a>, Point<'a>)>,
}

type Point<'a> = (f64, u64, &'a str);

impl<'a> Open<'a> {
    fn rate(&self, step: usize) -> Option<(f64, &'a str)> {
        let (first, last) = self.progress.get(&step)?;
        let (seconds, done) = (last.0 - first.0, last.1.saturating_sub(first.1));
        (seconds > 0.05 && done > 0).then(|| (done as f64 / seconds, last.2))
    }
}

impl<'a> Step<'a> {
    fn new(plan: &'a plan::Step) -> Step<'a> {
        Step {
            plan,
            state: State::Pending,
            seconds: None,
            key: None,
            outputs: &[],
            metrics: Metrics::None,
            curve: Curve::new(),
            rate: None,
            failure: None,
            attempts: 0,
            resumed: None,
        }
    }

    fn settle(
        &mut self,
        state: State,
        key: Option<Key>,
        seconds: Option<f64>,
        outputs: &'a [Output],
    ) {
        self.state = state;
        self.key = key.or(self.key);
        self.seconds = seconds;
        self.outputs = outputs;
    }
}
