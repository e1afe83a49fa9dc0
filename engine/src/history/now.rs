//! How far a run has come, from its events one by one. Pure: knows no clock and no file.

use std::collections::BTreeMap;

use crate::event::{Event, Job, Stamped, Summary};
use crate::stage::Report;

/// Where a step stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Stand {
    /// Nothing is known of it.
    #[default]
    Pending,
    /// Another process does the work.
    Waiting {
        /// Which.
        holder: String,
    },
    /// A worker has it. In a box, since there is a stand for every step and few are at work.
    Running(Box<Running>),
    /// Its result was there.
    Cached,
    /// Done in this run.
    Ran {
        /// Wall time.
        seconds: f64,
    },
    /// Failed for good.
    Failed {
        /// Why.
        message: String,
    },
    /// Not run, since another failed or the run was stopped.
    Skipped,
}

/// A step at work.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Running {
    /// Seconds since the start of the run.
    pub since: f64,
    /// Directory of the attempt, below the store.
    pub dir: String,
    /// Amount of work done and in all, as last reported; of all, 0 is not known.
    pub done: u64,
    /// See `done`.
    pub total: u64,
    /// Of what.
    pub unit: String,
    /// When the first progress was reported, and how much it was.
    pub first: Option<(f64, u64)>,
    /// When the last was.
    pub last: f64,
    /// The newest values.
    pub metrics: BTreeMap<String, f64>,
    /// While its job waits in a cluster's queue: which, and why.
    pub queued: Option<(String, String)>,
    /// The node that works at it, and the job.
    pub at: Option<(String, String)>,
}

impl Running {
    /// Work a second, once that can be told.
    pub fn rate(&self) -> Option<f64> {
        let (since, at) = self.first?;
        let (seconds, done) = (self.last - since, self.done.saturating_sub(at));
        (seconds > 0.3 && done > 0).then(|| done as f64 / seconds)
    }

    /// Seconds of work that were left at the last report.
    pub fn left(&self) -> Option<f64> {
        let left = self.total.checked_sub(self.done).filter(|left| *left > 0)?;
        Some(left as f64 / self.rate()?)
    }
}

/// A run as its events tell.
#[derive(Clone, Debug, Default)]
pub struct Now {
    /// Of every step of the plan.
    pub steps: Vec<Stand>,
    /// Time of the last event.
    pub t: f64,
    /// Steps that are looked at.
    pub asked: usize,
    /// Totals, once it ended.
    pub summary: Option<Summary>,
}

impl Now {
    /// A run of so many steps of which nothing is known.
    pub fn new(steps: usize) -> Now {
        Now { steps: vec![Stand::Pending; steps], asked: steps, ..Now::default() }
    }

    /// Takes one event.
    pub fn take(&mut self, stamped: &Stamped) {
        self.t = stamped.t;
        let (step, stand) = match &stamped.event {
            Event::Started { steps, .. } => return self.asked = *steps,
            Event::Ended { summary } => return self.summary = Some(summary.clone()),
            Event::Reported { step, report } => return self.reported(*step, report),
            Event::Durable { .. } | Event::Note { .. } => return,
            Event::Unchanged { but, .. } => return self.unchanged(but),
            Event::Job { step, said } => return self.job(*step, said),
            Event::Cached { step, .. } => (*step, Stand::Cached),
            Event::Waiting { step, holder } => (*step, Stand::Waiting { holder: holder.clone() }),
            Event::Launched { step, dir, .. } => {
                let running = Running { since: stamped.t, dir: dir.clone(), ..Running::default() };
                (*step, Stand::Running(Box::new(running)))
            }
            Event::Finished { step, seconds, .. } => (*step, Stand::Ran { seconds: *seconds }),
            Event::Failed { step, retry: true, .. } => (*step, Stand::Pending),
            Event::Failed { step, message, .. } => {
                (*step, Stand::Failed { message: message.clone() })
            }
            Event::Skipped { step, .. } => (*step, Stand::Skipped),
        };
        if let Some(at) = self.steps.get_mut(step) {
            *at = stand;
        }
    }

    fn unchanged(&mut self, but: &[usize]) {
        let others = self.steps.iter_mut().enumerate();
        let same = others.filter(|(step, _)| but.binary_search(step).is_err());
        same.for_each(|(_, stand)| *stand = Stand::Cached);
    }

    fn reported(&mut self, step: usize, report: &Report) {
        let Some(Stand::Running(running)) = self.steps.get_mut(step) else { return };
        match report {
            Report::Progress { done, total, unit } => {
                // Other work, or the same once more, has a rate of its own.
                if running.unit != *unit || *done < running.done {
                    running.first = None;
                }
                running.first.get_or_insert((self.t, *done));
                (running.done, running.total, running.last) = (*done, *total, self.t);
                running.unit.clone_from(unit);
            }
            Report::Metric { values, .. } => running.metrics.extend(values.clone()),
            Report::Note { .. } => {}
        }
    }

    fn job(&mut self, step: usize, said: &Job) {
        let Some(Stand::Running(running)) = self.steps.get_mut(step) else { return };
        match said {
            Job::Queued { job, reason } => running.queued = Some((job.clone(), reason.clone())),
            Job::Began { job, host } => {
                running.queued = None;
                running.at = Some((host.clone(), job.clone()));
                running.since = self.t;
            }
            Job::Ended { .. } | Job::Idle { .. } | Job::Troubled { .. } => {}
        }
    }

    /// Cached, ran, failed, running (or waiting), not begun.
    pub fn counts(&self) -> [usize; 5] {
        let mut counts = [0; 5];
        for step in &self.steps {
            match step {
                Stand::Cached => counts[0] += 1,
                Stand::Ran { .. } => counts[1] += 1,
                Stand::Failed { .. } => counts[2] += 1,
                Stand::Running(_) | Stand::Waiting { .. } => counts[3] += 1,
                Stand::Pending | Stand::Skipped => {}
            }
        }
        counts[4] = self.asked.saturating_sub(counts.iter().sum());
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(t: f64, event: Event) -> Stamped {
        Stamped { t, event }
    }

    fn launched(step: usize) -> Event {
        let key = cache::Key::of(b"k");
        Event::Launched { step, key, attempt: 1, dir: "d".into(), resumed: None }
    }

    fn progress(step: usize, done: u64) -> Event {
        let report = Report::Progress { done, total: 100, unit: "updates".into() };
        Event::Reported { step, report }
    }

    #[test]
    fn a_step_runs_at_a_rate_and_ends() {
        let mut now = Now::new(3);
        now.take(&at(0.0, Event::Started { steps: 2, jobs: 1 }));
        now.take(&at(1.0, launched(0)));
        now.take(&at(2.0, progress(0, 10)));
        now.take(&at(4.0, progress(0, 30)));
        let Stand::Running(running) = &now.steps[0] else { panic!("{:?}", now.steps) };
        assert_eq!((running.rate(), running.left()), (Some(10.0), Some(7.0)));
        assert_eq!(now.counts(), [0, 0, 0, 1, 1]);
        let key = cache::Key::of(b"k");
        now.take(&at(9.0, Event::Finished { step: 0, key, seconds: 8.0, outputs: vec![] }));
        assert_eq!(now.steps[0], Stand::Ran { seconds: 8.0 });
        assert_eq!(now.counts(), [0, 1, 0, 0, 1]);
    }

    #[test]
    fn what_is_as_before_is_a_hit_but_what_is_not() {
        let mut now = Now::new(4);
        now.take(&at(0.0, Event::Unchanged { run: "r".into(), but: vec![1, 3] }));
        now.take(&at(0.1, launched(3)));
        assert_eq!(now.counts(), [2, 0, 0, 1, 1]);
        assert_eq!(now.steps[1], Stand::Pending);
    }

    #[test]
    fn events_of_steps_that_are_not_in_the_plan_do_nothing() {
        let mut now = Now::new(1);
        now.take(&at(0.0, launched(7)));
        now.take(&at(0.0, progress(7, 1)));
        assert_eq!(now.steps, [Stand::Pending]);
    }
}
