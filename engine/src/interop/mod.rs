//! A run's record for other tools: TensorBoard, Perfetto, lines of JSON, RO-Crate. Each writer takes
//! what was recorded and gives bytes by file name; who asked writes them. Knows no clock.

mod crc32c;
pub mod jsonl;
pub mod ro_crate;
pub mod tensorboard;
pub mod trace;

use std::collections::BTreeMap;

use cache::Cache;

use crate::event::Event;
use crate::history::facts::{Facts, facts};
use crate::report::metrics;
use crate::run::Past;
use crate::stage::Report;

/// Most bytes of metrics that are read for one run.
const MOST_BYTES: u64 = 256 << 20;

/// Values at a point of the work of a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// The update, or whatever counts the work.
    pub at: u64,
    /// Seconds since the start of the run.
    pub t: f64,
    /// Values by name.
    pub values: BTreeMap<String, f64>,
}

/// What a step measured while it worked, and in the end.
#[derive(Clone, Debug, Default)]
pub struct Course {
    /// In the order of the work.
    pub points: Vec<Point>,
    /// See [`Facts`].
    pub facts: Facts,
}

/// The course of every step of a run. A cached step did not report in it: its points are those that
/// it published when it ran, all at the moment in which it was found.
pub fn courses(past: &Past, cache: &Cache) -> Vec<Course> {
    let mut all: Vec<Course> =
        facts(past, cache).into_iter().map(|facts| Course { points: Vec::new(), facts }).collect();
    let mut found = vec![0.0; all.len()];
    for stamped in &past.events {
        match &stamped.event {
            Event::Cached { step, .. } if *step < all.len() => found[*step] = stamped.t,
            // Another attempt begins again; what it does not repeat is still true.
            Event::Launched { step, resumed, .. } if *step < all.len() => {
                let from = resumed.unwrap_or(0);
                all[*step].points.retain(|point| point.at < from);
            }
            Event::Reported { step, report: Report::Metric { at, values } }
                if *step < all.len() =>
            {
                let (at, t, values) = (*at, stamped.t, values.clone());
                all[*step].points.push(Point { at, t, values });
            }
            _ => {}
        }
    }
    let mut left = MOST_BYTES;
    for (course, t) in all.iter_mut().zip(found) {
        if course.facts.state != "cached" {
            continue;
        }
        let value = metrics::value(&course.facts.outputs, cache, &mut left).ok().flatten();
        let curve = value.and_then(|value| Some(metrics::curve(value.get("curve")?)));
        let points = curve.into_iter().flatten().map(|(at, values)| Point { at, t, values });
        course.points = points.collect();
    }
    all
}

/// A step's name as the name of a directory: `align[2]` is `align@2`.
pub(crate) fn plain(name: &str) -> String {
    let plain = |c: char| match c {
        '[' => Some('@'),
        ']' => None,
        c if c.is_ascii_alphanumeric() || "-_.=,@".contains(c) => Some(c),
        _ => Some('_'),
    };
    let text: String = name.chars().filter_map(plain).collect();
    if text.starts_with('.') { format!("_{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_below_their_directory() {
        assert_eq!(plain("align[2]"), "align@2");
        assert_eq!(plain("train[lr=3e-4,seed=1]"), "train@lr=3e-4,seed=1");
        assert_eq!(plain("../../x[/etc]"), "_.._.._x@_etc");
    }
}
