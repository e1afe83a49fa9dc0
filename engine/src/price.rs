//! What a plan would take: seconds and bytes of every step from results of like steps, the longest
//! way through it, and the whole. Pure; an estimate says what it is made from.

use std::collections::{BTreeSet, HashMap};

use cache::Entry;
use serde_json::Value;

use crate::key::PreImage;
use crate::lookup;
use crate::plan::{Plan, Step};

/// Parameters that say how often something is done: twice as much takes twice as long.
const WORK: [&str; 9] = [
    "updates",
    "batch",
    "documents",
    "sequences",
    "samples",
    "limit",
    "tokens_max",
    "tokens",
    "layers",
];
/// Those of them that make more bytes, too.
const DATA: [&str; 6] = ["documents", "sequences", "samples", "tokens_max", "tokens", "layers"];

/// What a step would take.
#[derive(Clone, Debug, PartialEq)]
pub struct Price {
    /// Wall time.
    pub seconds: f64,
    /// Bytes of its artifacts.
    pub bytes: u64,
    /// Bytes of each: port, number and size.
    pub outputs: Vec<(String, Option<u32>, u64)>,
    /// How many times the work of the result that it is estimated from.
    pub work: f64,
    /// Parameters that differ from that and are no amount of work: the fewer, the better.
    pub unlike: usize,
}

/// An earlier result.
pub struct Past {
    /// It.
    pub entry: Entry,
    /// What decided it.
    pub image: PreImage,
}

impl Past {
    /// `entry`, unless what decided it cannot be read.
    pub fn of(entry: Entry) -> Option<Past> {
        let image = PreImage::parse(&entry.preimage)?;
        Some(Past { entry, image })
    }
}

/// The price of `step` by the most like of `past`, which are of its stage. `times` says how many
/// times the work of one of them it is, where the stage can tell; parameters do otherwise.
pub fn price(step: &Step, past: &[Past], times: &dyn Fn(&Past) -> Option<f64>) -> Option<Price> {
    let params = step.params.value();
    let of = |past: &Past| {
        let Past { entry, image } = past;
        let seconds = entry.provenance.get("seconds")?.as_f64()?;
        let then = &image.params;
        // Another device takes another time, and nothing says which.
        if then.get("device") != params.get("device") {
            return None;
        }
        let by_params = || ratio(then, &params, &WORK);
        let work = times(past).filter(|n| n.is_finite() && *n > 0.0);
        let work = work.unwrap_or_else(by_params);
        let data = ratio(then, &params, &DATA);
        let scaled = |bytes: u64| (bytes as f64 * data) as u64;
        let all = entry.outputs.iter();
        let outputs: Vec<_> = all.map(|o| (o.port.clone(), o.index, scaled(o.bytes))).collect();
        let bytes = outputs.iter().map(|(.., bytes)| bytes).sum();
        let unlike = unlike(then, &params);
        Some(Price { seconds: seconds * work, bytes, outputs, work, unlike })
    };
    // Of those that are as like, the one that needs the least stretching; the first is the newest.
    let far = |price: &Price| price.work.ln().abs();
    let best = |a: &Price, b: &Price| a.unlike.cmp(&b.unlike).then(far(a).total_cmp(&far(b)));
    past.iter().filter_map(of).min_by(best)
}

/// How many times the work of `old` is in `new`.
fn ratio(old: &Value, new: &Value, names: &[&str]) -> f64 {
    let amount = |params: &Value, name: &str| match params.get(name)? {
        Value::Number(number) => number.as_f64().filter(|n| *n > 0.0),
        Value::Array(items) => Some(items.len() as f64).filter(|n| *n > 0.0),
        _ => None,
    };
    let one = |name: &&str| Some(amount(new, name)? / amount(old, name)?);
    names.iter().filter_map(one).product()
}

fn unlike(old: &Value, new: &Value) -> usize {
    let (Some(old), Some(new)) = (old.as_object(), new.as_object()) else { return 0 };
    let names = old.keys().chain(new.keys().filter(|name| !old.contains_key(*name)));
    names.filter(|name| !WORK.contains(&name.as_str()) && old.get(*name) != new.get(*name)).count()
}

/// What steps would take together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Total {
    /// From the first to the last, with so many cpu slots.
    pub seconds: f64,
    /// All after one another.
    pub sum_s: f64,
    /// Of the longest way, however many slots there are.
    pub longest_s: f64,
    /// The steps of that way.
    pub longest: Vec<usize>,
    /// Steps of which nothing like was ever done.
    pub unknown: usize,
}

/// The total of `steps` (in the order of the plan) by the seconds that each takes, where that is
/// known; `slots` tells how many of `jobs` cpu slots a step takes.
pub fn total(
    plan: &Plan,
    steps: &[usize],
    known: &dyn Fn(usize) -> Option<f64>,
    jobs: u32,
    slots: &dyn Fn(usize) -> u32,
) -> Total {
    let seconds = |step: usize| known(step).unwrap_or(0.0);
    let mut total = Total::default();
    // End of the longest way to each step, and the step before it on that way.
    let mut ways: HashMap<usize, (f64, Option<usize>)> = HashMap::new();
    for &step in steps {
        total.sum_s += seconds(step);
        total.unknown += usize::from(known(step).is_none());
        let before = lookup::upstream(plan, step).into_iter().filter(|s| ways.contains_key(s));
        let before = before.max_by(|a, b| ways[a].0.total_cmp(&ways[b].0));
        let start = before.map_or(0.0, |before| ways[&before].0);
        ways.insert(step, (start + seconds(step), before));
    }
    let mut at = steps.iter().copied().max_by(|a, b| ways[a].0.total_cmp(&ways[b].0));
    total.longest_s = at.map_or(0.0, |at| ways[&at].0);
    while let Some(step) = at {
        total.longest.push(step);
        at = ways[&step].1;
    }
    total.longest.reverse();
    total.seconds = wall(plan, steps, &seconds, jobs, slots);
    total
}

/// Wall time if every step begins as soon as what it needs is done and slots are free, in the order
/// of the plan.
fn wall(
    plan: &Plan,
    steps: &[usize],
    seconds: &dyn Fn(usize) -> f64,
    jobs: u32,
    slots: &dyn Fn(usize) -> u32,
) -> f64 {
    let mut missing: HashMap<usize, usize> = steps.iter().map(|step| (*step, 0)).collect();
    let mut users: HashMap<usize, Vec<usize>> = HashMap::new();
    for &step in steps {
        for need in lookup::upstream(plan, step) {
            if missing.contains_key(&need) {
                users.entry(need).or_default().push(step);
                *missing.entry(step).or_default() += 1;
            }
        }
    }
    let mut ready: BTreeSet<usize> =
        missing.iter().filter(|(_, n)| **n == 0).map(|(step, _)| *step).collect();
    let mut running: Vec<(f64, usize)> = Vec::new();
    let taken = |step: usize| slots(step).clamp(1, jobs.max(1));
    let (mut now, mut free) = (0.0, jobs.max(1));
    loop {
        let fits = |step: &usize| taken(*step) <= free;
        let step = if free > 0 { ready.iter().copied().find(fits) } else { None };
        if let Some(step) = step {
            ready.remove(&step);
            free -= taken(step);
            running.push((now + seconds(step), step));
            continue;
        }
        let next = (0..running.len()).min_by(|a, b| running[*a].0.total_cmp(&running[*b].0));
        let Some(next) = next else { return now };
        let (end, step) = running.swap_remove(next);
        (now, free) = (end, free + taken(step));
        for user in users.remove(&step).into_iter().flatten() {
            let left = missing.entry(user).or_default();
            *left = left.saturating_sub(1);
            if *left == 0 {
                ready.insert(user);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn past(params: Value, seconds: f64, bytes: u64) -> Past {
        let image = PreImage {
            format: 1,
            inputs: Default::default(),
            params,
            stage: "s".into(),
            version: 1,
        };
        let output = cache::Output {
            port: "o".into(),
            index: None,
            name: "o".into(),
            kind: cache::Kind::File,
            digest: cache::Digest::of(b"o"),
            bytes,
        };
        let seconds = json!({ "seconds": seconds });
        Past::of(Entry::new(image.text(), vec![output], None, seconds)).unwrap()
    }

    fn price(step: &Step, past: &[Past]) -> Option<Price> {
        super::price(step, past, &|_| None)
    }

    fn step(params: Value) -> Step {
        Step { params: params.into(), ..Step::default() }
    }

    #[test]
    fn twice_the_work_takes_twice_as_long_and_only_data_makes_bytes() {
        let known = [past(json!({ "updates": 100, "lr": 0.1 }), 10.0, 500)];
        let found = price(&step(json!({ "updates": 250, "lr": 0.2 })), &known).unwrap();
        assert_eq!((found.seconds, found.bytes, found.unlike), (25.0, 500, 1));
        let known = [past(json!({ "sequences": 10, "keep": ["a"] }), 2.0, 1000)];
        let found = price(&step(json!({ "sequences": 40, "keep": ["a"] })), &known).unwrap();
        assert_eq!((found.seconds, found.bytes, found.unlike), (8.0, 4000, 0));
        assert_eq!(price(&step(json!({})), &[]), None);
    }

    #[test]
    fn the_stage_knows_better_than_parameters_and_devices_are_not_compared() {
        let known = [past(json!({ "updates": 100, "device": "cpu" }), 10.0, 500)];
        let wanted = step(json!({ "updates": 200, "device": "cpu" }));
        let seconds = |times| super::price(&wanted, &known, &move |_| times).unwrap().seconds;
        assert_eq!(seconds(Some(3.0)), 30.0);
        assert_eq!(seconds(Some(f64::NAN)), 20.0, "what is no number is nothing known");
        assert_eq!(price(&step(json!({ "updates": 100, "device": "cuda" })), &known), None);
    }

    #[test]
    fn the_most_like_result_counts_and_the_nearest_of_those() {
        let known = [
            past(json!({ "updates": 100, "d_model": 64 }), 100.0, 1),
            past(json!({ "updates": 10, "d_model": 16 }), 1.0, 1),
            past(json!({ "updates": 90, "d_model": 16 }), 10.0, 1),
        ];
        let found = price(&step(json!({ "updates": 180, "d_model": 16 })), &known).unwrap();
        assert_eq!(found.seconds, 20.0);
    }

    #[test]
    fn steps_side_by_side_share_slots_and_the_longest_way_is_found() {
        let after = |after: &[usize]| Step { after: after.to_vec(), ..Step::default() };
        let steps = vec![after(&[]), after(&[0]), after(&[0]), after(&[1, 2]), after(&[])];
        let plan = Plan { steps, ..Plan::default() };
        let prices = |step: usize| [1.0, 4.0, 6.0, 2.0].get(step).copied();
        let all = [0, 1, 2, 3, 4];
        let one = total(&plan, &all, &prices, 1, &|_| 1);
        assert_eq!((one.seconds, one.sum_s, one.longest_s), (13.0, 13.0, 9.0));
        assert_eq!((one.longest, one.unknown), (vec![0, 2, 3], 1));
        let two = total(&plan, &all, &prices, 2, &|_| 1);
        assert_eq!(two.seconds, 9.0, "1 and 2 side by side");
        let wide = total(&plan, &all, &prices, 2, &|_| 2);
        assert_eq!(wide.seconds, 13.0, "steps that take all slots");
        assert_eq!(
            total(&plan, &[3], &prices, 2, &|_| 1).seconds,
            2.0,
            "what is cached costs nothing"
        );
    }
}
