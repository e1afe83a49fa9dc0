//! Metrics artifacts (JSON with a `kind`) as figures: curves, layers, teacher against student.
//! Takes what it finds and asks for nothing: a missing field is a missing figure.

use std::collections::BTreeMap;
use std::io::Read;

use cache::{Cache, Kind, Output};
use serde_json::{Map, Value};

use super::benchmarks::Benchmarks;
use super::data::{Curve, Step};
use super::matrices::Picture;
use crate::plan;

/// Biggest artifact that is looked into.
const MOST_BYTES: u64 = 4 << 20;
/// Most that is read for one page.
const MOST_IN_ALL: u64 = 256 << 20;

/// Values by name.
pub(crate) type Figures = BTreeMap<String, f64>;
/// A layer's number and its values.
pub(super) type Layer = (i64, Figures);

/// What a step measured.
pub(super) enum Metrics {
    /// It publishes none.
    None,
    /// It did, and the bytes are not to be had: why.
    Lost(String),
    /// Of a training step.
    Training {
        /// May be empty.
        curve: Curve,
        /// By layer, after (and before) the work.
        layers: Vec<Layer>,
        /// Everything else after the last update.
        last: Figures,
    },
    /// Of an evaluation.
    Evaluation(Box<Evaluation>),
    /// Of any other kind: its name and numbers.
    Other(String, Figures),
}

/// Teacher against student.
#[derive(Clone, Debug, Default)]
pub(super) struct Evaluation {
    pub student: Figures,
    pub teacher: Figures,
    pub ratios: Figures,
    pub agreement: Figures,
    /// Numbers outside these four.
    pub rest: Figures,
    pub layers: Vec<Layer>,
    pub recall: Vec<Bucket>,
    pub benchmarks: Benchmarks,
    /// Mixing matrices beside attention.
    pub pictures: Vec<Picture>,
}

/// Recall of what lies between `from` and `to` tokens back.
#[derive(Clone, Debug)]
pub(super) struct Bucket {
    pub from: f64,
    pub to: f64,
    pub n: Option<f64>,
    pub teacher: Option<f64>,
    pub student: Option<f64>,
}

impl Evaluation {
    fn of(value: &Map<String, Value>) -> Evaluation {
        let part = |name: &str| value.get(name).map(figures).unwrap_or_default();
        let known = [
            "student",
            "teacher",
            "ratios",
            "agreement",
            "layers",
            "recall_by_distance",
            "tasks",
            "average",
            "probes",
            "matrices",
        ];
        let mut rest = Figures::new();
        for (name, value) in value.iter().filter(|(name, _)| !known.contains(&name.as_str())) {
            flatten(name, value, &mut rest);
        }
        let list =
            |name: &str| value.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
        Evaluation {
            student: part("student"),
            teacher: part("teacher"),
            ratios: part("ratios"),
            agreement: part("agreement"),
            rest,
            layers: value.get("layers").map(layer_list).unwrap_or_default(),
            recall: list("recall_by_distance").iter().filter_map(Bucket::of).collect(),
            benchmarks: Benchmarks::of(value),
            pictures: list("matrices").iter().filter_map(Picture::of).collect(),
        }
    }

    /// Student over teacher, as published or as it follows from the two.
    pub fn ratio(&self, name: &str) -> Option<f64> {
        let follows = || {
            let (student, teacher) = (self.student.get(name)?, self.teacher.get(name)?);
            (*teacher != 0.0).then(|| student / teacher)
        };
        self.ratios.get(name).copied().or_else(follows).filter(|ratio| ratio.is_finite())
    }

    /// Whether a student stands beside a teacher.
    pub fn compares(&self) -> bool {
        !self.teacher.is_empty() || self.benchmarks.compares()
    }

    /// Accuracy of guessing.
    pub fn chance(&self) -> Option<f64> {
        self.student.get("chance").or_else(|| self.teacher.get("chance")).copied()
    }

    /// The share of tokens on which both say the same, under whatever name it goes.
    pub fn agree(&self) -> Option<f64> {
        let names = ["argmax", "top1", "greedy", "accuracy", "agreement"];
        let named = names.iter().find_map(|name| self.agreement.get(*name));
        let similar = || {
            let like = |name: &str| names.iter().any(|known| name.contains(known));
            self.agreement.iter().find(|(name, _)| like(name)).map(|(_, value)| value)
        };
        named.or_else(similar).copied().filter(|share| (0.0..=1.0).contains(share))
    }
}

impl Bucket {
    fn of(value: &Value) -> Option<Bucket> {
        let get = |name: &str| value.get(name).and_then(Value::as_f64);
        let from = get("from").unwrap_or(0.0);
        Some(Bucket {
            from,
            to: get("to").unwrap_or(from),
            n: get("n"),
            teacher: get("teacher"),
            student: get("student"),
        })
        .filter(|bucket| bucket.teacher.is_some() || bucket.student.is_some())
    }
}

/// Reads the metrics of all steps that have any.
pub(super) fn read_all(steps: &mut [Step], cache: &Cache) {
    let mut left = MOST_IN_ALL;
    for step in steps {
        step.metrics = read(step, cache, &mut left);
    }
}

fn read(step: &Step, cache: &Cache, left: &mut u64) -> Metrics {
    match value(step.outputs, cache, left) {
        Ok(Some(value)) => Metrics::of(&value, step.plan),
        Ok(None) => Metrics::None,
        Err(why) => Metrics::Lost(why),
    }
}

/// The metrics among `outputs`: the first artifact that is JSON with a `kind`. The error says why
/// there are some and they cannot be had.
pub(crate) fn value(
    outputs: &[Output],
    cache: &Cache,
    left: &mut u64,
) -> Result<Option<Map<String, Value>>, String> {
    let json = |output: &&Output| output.port == "metrics" || output.name.ends_with(".json");
    let mut candidates: Vec<&Output> = outputs.iter().filter(json).collect();
    candidates.sort_by_key(|output| output.port != "metrics");
    let mut lost = None;
    for output in candidates.iter().filter(|output| output.kind != Kind::Dir) {
        match parse(output, cache, left) {
            Ok(Value::Object(value)) if value.contains_key("kind") => return Ok(Some(value)),
            Ok(_) => {}
            Err(why) if output.port == "metrics" => lost = Some(why),
            Err(_) => {}
        }
    }
    lost.map_or(Ok(None), Err)
}

fn parse(output: &Output, cache: &Cache, left: &mut u64) -> Result<Value, String> {
    if output.bytes > MOST_BYTES || output.bytes > *left {
        return Err("they are too big to be read here".into());
    }
    *left -= output.bytes;
    let file = std::fs::File::open(cache.object(&output.digest))
        .map_err(|_| "their bytes are not in the store any more".to_string())?;
    let mut text = Vec::new();
    file.take(MOST_BYTES).read_to_end(&mut text).map_err(|e| e.to_string())?;
    serde_json::from_slice(&text).map_err(|e| format!("they are no JSON: {e}"))
}

impl Metrics {
    fn of(value: &Map<String, Value>, step: &plan::Step) -> Metrics {
        match value["kind"].as_str().unwrap_or_default() {
            "evaluation" => Metrics::Evaluation(Box::new(Evaluation::of(value))),
            "training" => {
                let last = value.get("final").unwrap_or(&Value::Null);
                Metrics::Training {
                    curve: value.get("curve").map(curve).unwrap_or_default(),
                    layers: layers(last, step),
                    last: figures(last),
                }
            }
            kind => {
                let mut all = Figures::new();
                for (name, value) in value.iter().filter(|(name, _)| *name != "kind") {
                    flatten(name, value, &mut all);
                }
                Metrics::Other(kind.into(), all)
            }
        }
    }
}

/// `[[update, loss], …]` or `[[update, {name: value, …}], …]`.
pub(crate) fn curve(value: &Value) -> Curve {
    let mut curve = Curve::new();
    for point in value.as_array().into_iter().flatten() {
        let Some([at, values, ..]) = point.as_array().map(Vec::as_slice) else { continue };
        let Some(at) = at.as_f64() else { continue };
        let values = match values.as_f64() {
            Some(loss) => Figures::from([("loss".into(), loss)]),
            None => figures(values),
        };
        curve.entry(at.max(0.0) as u64).or_default().extend(values);
    }
    curve
}

/// All numbers in `value`, nested ones as `outer.inner`.
pub(crate) fn figures(value: &Value) -> Figures {
    let mut all = Figures::new();
    flatten("", value, &mut all);
    all
}

fn flatten(name: &str, value: &Value, into: &mut Figures) {
    match value {
        Value::Number(number) => {
            into.extend(number.as_f64().map(|number| (name.to_string(), number)));
        }
        Value::Object(fields) => {
            for (inner, value) in fields {
                let inner = if name.is_empty() { inner.clone() } else { format!("{name}.{inner}") };
                flatten(&inner, value, into);
            }
        }
        _ => {}
    }
}

/// `[{"layer": 0, …}, …]`, or `{"0": {…}, …}`, or `[0.1, …]`.
fn layer_list(value: &Value) -> Vec<Layer> {
    let one = |number: Option<i64>, value: &Value| -> Option<Layer> {
        let mut values = figures(value);
        if let Some(plain) = values.remove("") {
            values.insert("distance".into(), plain);
        }
        let named = values.remove("layer").map(|layer| layer as i64);
        Some((named.or(number)?, values))
    };
    match value {
        Value::Array(items) => {
            items.iter().enumerate().filter_map(|(i, item)| one(Some(i as i64), item)).collect()
        }
        Value::Object(fields) => {
            fields.iter().filter_map(|(name, item)| one(name.parse().ok(), item)).collect()
        }
        _ => Vec::new(),
    }
}

/// What the end of a training step says of each layer: a list under `layers`, or lists of numbers
/// as long as the step has layers, or, of a step that has but one layer, everything.
fn layers(last: &Value, step: &plan::Step) -> Vec<Layer> {
    if let Some(found) = last.get("layers").map(layer_list).filter(|found| !found.is_empty()) {
        return found;
    }
    let list = step.params.get("layers");
    let list = list.as_ref().and_then(Value::as_array);
    let mut numbers: Vec<i64> = list.into_iter().flatten().filter_map(Value::as_i64).collect();
    if numbers.is_empty() {
        let axis = step.coords.iter().find(|(axis, _)| ["layer", "block"].contains(&axis.as_str()));
        let told = step.params.get("layer");
        let one = last.get("layer").or(told.as_ref()).or(axis.map(|(_, value)| value));
        numbers.extend(one.and_then(Value::as_i64));
    }
    match numbers.as_slice() {
        [] => Vec::new(),
        [one] => {
            let mut values = figures(last);
            values.remove("layer");
            let lists = last.as_object().into_iter().flatten();
            for (name, value) in lists {
                if let Some([only]) = value.as_array().map(Vec::as_slice) {
                    flatten(name, only, &mut values);
                }
            }
            if values.is_empty() { Vec::new() } else { vec![(*one, values)] }
        }
        several => columns(last, several),
    }
}

fn columns(last: &Value, numbers: &[i64]) -> Vec<Layer> {
    let mut rows: Vec<Layer> = numbers.iter().map(|&layer| (layer, Figures::new())).collect();
    for (name, value) in last.as_object().into_iter().flatten() {
        let Some(items) = value.as_array().filter(|items| items.len() == rows.len()) else {
            continue;
        };
        for (row, item) in rows.iter_mut().zip(items) {
            flatten(name, item, &mut row.1);
        }
    }
    rows.retain(|(_, values)| !values.is_empty());
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn curves_come_in_both_shapes_and_survive_rubbish() {
        let found =
            curve(&json!([[0, 3.5], [10, { "loss": 2.0, "lr": 0.1 }], [], ["x", 1], [20, null]]));
        assert_eq!(found[&0]["loss"], 3.5);
        assert_eq!(found[&10]["lr"], 0.1);
        assert_eq!(found[&20].len(), 0);
        assert!(curve(&json!("no curve")).is_empty());
    }

    #[test]
    fn layers_are_found_in_every_shape() {
        let rows = layer_list(&json!([{ "layer": 4, "distance": 0.5 }, 0.25]));
        assert_eq!(rows[0], (4, Figures::from([("distance".into(), 0.5)])));
        assert_eq!(rows[1], (1, Figures::from([("distance".into(), 0.25)])));
        let rows = layer_list(&json!({ "3": { "before": { "x": 1 } } }));
        assert_eq!(rows, [(3, Figures::from([("before.x".into(), 1.0)]))]);
        let rows = columns(&json!({ "loss": [1, 2], "other": [1], "n": 7 }), &[5, 6]);
        assert_eq!(rows[1], (6, Figures::from([("loss".into(), 2.0)])));
    }

    #[test]
    fn an_evaluation_needs_no_field() {
        let empty = Evaluation::of(&Map::new());
        assert!(empty.ratio("perplexity").is_none() && empty.agree().is_none());
        let value = json!({ "kind": "evaluation", "student": { "perplexity": 3 },
            "teacher": { "perplexity": 2, "chance": 0.2 }, "agreement": { "argmax_share": 0.9, "kl": 0.1 },
            "recall_by_distance": [{ "from": 0, "to": 8 }, { "from": 8, "to": 16, "student": 1 }], "tokens": 5 });
        let found = Evaluation::of(value.as_object().unwrap());
        assert_eq!(found.ratio("perplexity"), Some(1.5));
        assert_eq!((found.agree(), found.chance()), (Some(0.9), Some(0.2)));
        assert_eq!((found.recall.len(), found.rest["tokens"]), (1, 5.0));
    }
}
