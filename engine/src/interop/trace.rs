//! A run as a Chrome trace, which Perfetto and chrome://tracing open: steps as slices, in as many
//! lanes as ran side by side, metrics as counters.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::event::{Event, Stamped};
use crate::run::Past;
use crate::stage::Report;

/// Time that a step took, or waited.
#[derive(Clone, Debug, PartialEq)]
struct Slice {
    step: usize,
    from: f64,
    to: f64,
    /// `ran`, `failed`, `waited`, `open`.
    how: &'static str,
}

/// The trace as JSON.
pub fn trace(past: &Past) -> Value {
    let slices = slices(&past.events);
    let lanes = lanes(&slices);
    let name = |step: usize| past.plan.steps.get(step).map_or("?", |step| step.name.as_str());
    let mut events =
        vec![meta("process_name", 0, &format!("{} {}", past.info.pipeline, past.info.id))];
    let most = lanes.iter().max().map_or(0, |most| most + 1);
    events
        .extend((0..most).map(|lane| meta("thread_name", lane + 1, &format!("lane {}", lane + 1))));
    for (slice, lane) in slices.iter().zip(&lanes) {
        let stage = past.plan.steps.get(slice.step).map_or("?", |step| step.stage.as_str());
        events.push(json!({
            "ph": "X", "pid": 1, "tid": lane + 1, "name": name(slice.step), "cat": slice.how,
            "ts": micros(slice.from), "dur": micros(slice.to) - micros(slice.from),
            "args": { "stage": stage, "how": slice.how },
        }));
    }
    for stamped in &past.events {
        events.extend(other(stamped, &name));
    }
    json!({ "displayTimeUnit": "ms", "traceEvents": events })
}

/// Whole microseconds, so that ends and beginnings meet exactly.
fn micros(seconds: f64) -> i64 {
    (seconds * 1e6).round() as i64
}

fn meta(what: &str, lane: usize, name: &str) -> Value {
    json!({ "ph": "M", "pid": 1, "tid": lane, "name": what, "args": { "name": name } })
}

/// Counters of metrics, and marks of what has no length.
fn other<'a>(stamped: &Stamped, name: &impl Fn(usize) -> &'a str) -> Vec<Value> {
    let ts = micros(stamped.t);
    let mark =
        |text: String| json!({ "ph": "i", "s": "p", "pid": 1, "tid": 0, "ts": ts, "name": text });
    match &stamped.event {
        Event::Reported { step, report: Report::Metric { values, .. } } => values
            .iter()
            .filter(|(_, value)| value.is_finite())
            .map(|(metric, value)| {
                let name = format!("{} {metric}", name(*step));
                json!({ "ph": "C", "pid": 1, "ts": ts, "name": name, "args": { metric.as_str(): value } })
            })
            .collect(),
        Event::Cached { step, .. } => vec![mark(format!("{} cached", name(*step)))],
        Event::Note { text } => vec![mark(text.clone())],
        _ => Vec::new(),
    }
}

fn slices(events: &[Stamped]) -> Vec<Slice> {
    let mut open: BTreeMap<usize, (f64, bool)> = BTreeMap::new();
    let mut slices = Vec::new();
    for stamped in events {
        let t = stamped.t;
        let mut close = |step: usize, how, open: &mut BTreeMap<usize, (f64, bool)>| {
            if let Some((from, waited)) = open.remove(&step) {
                let how = if waited { "waited" } else { how };
                slices.push(Slice { step, from, to: t, how });
            }
        };
        match &stamped.event {
            Event::Waiting { step, .. } => {
                open.entry(*step).or_insert((t, true));
            }
            Event::Launched { step, .. } => {
                close(*step, "open", &mut open);
                open.insert(*step, (t, false));
            }
            Event::Finished { step, .. } => close(*step, "ran", &mut open),
            Event::Failed { step, .. } => close(*step, "failed", &mut open),
            Event::Cached { step, .. } => close(*step, "waited", &mut open),
            _ => {}
        }
    }
    let end = events.last().map_or(0.0, |last| last.t);
    slices.extend(open.into_iter().map(|(step, (from, waited))| Slice {
        step,
        from,
        to: end,
        how: if waited { "waited" } else { "open" },
    }));
    slices.sort_by(|a, b| a.from.total_cmp(&b.from).then(a.step.cmp(&b.step)));
    slices
}

/// The lowest lane that is free, for slices in the order in which they begin.
fn lanes(slices: &[Slice]) -> Vec<usize> {
    let mut busy_until: Vec<f64> = Vec::new();
    let place = |slice: &Slice| {
        let free = busy_until.iter().position(|until| *until <= slice.from);
        let lane = free.unwrap_or_else(|| {
            busy_until.push(0.0);
            busy_until.len() - 1
        });
        busy_until[lane] = slice.to;
        lane
    };
    slices.iter().map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slice(from: f64, to: f64) -> Slice {
        Slice { step: 0, from, to, how: "ran" }
    }

    #[test]
    fn steps_side_by_side_have_lanes_of_their_own() {
        let slices = [slice(0.0, 5.0), slice(1.0, 2.0), slice(2.0, 3.0), slice(2.5, 6.0)];
        assert_eq!(lanes(&slices), [0, 1, 1, 2]);
    }

    proptest! {
        #[test]
        fn nothing_overlaps_in_a_lane(ends in prop::collection::vec((0u8..50, 1u8..20), 0..40)) {
            let mut slices: Vec<Slice> =
                ends.iter().map(|(a, n)| slice(f64::from(*a), f64::from(a + n))).collect();
            slices.sort_by(|a, b| a.from.total_cmp(&b.from));
            let lanes = lanes(&slices);
            for (i, a) in slices.iter().enumerate() {
                for (j, b) in slices.iter().enumerate().skip(i + 1) {
                    prop_assert!(lanes[i] != lanes[j] || a.to <= b.from || b.to <= a.from);
                }
            }
            let most = slices.iter().map(|s| slices.iter().filter(|o| o.from <= s.from && s.from < o.to).count()).max();
            prop_assert_eq!(lanes.iter().max().map(|m| m + 1), most, "no more lanes than needed");
        }
    }
}
