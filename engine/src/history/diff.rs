//! Two runs side by side: settings, parameters, metrics and artifacts by name. Pure.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::facts::Facts;
use crate::plan::Step;
use crate::run::Info;

/// What a row is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// What was asked.
    Run,
    /// A parameter of a step.
    Parameter,
    /// A number that a step measured.
    Metric,
    /// Digest of what a step made.
    Artifact,
}

impl Part {
    /// For people.
    pub fn word(self) -> &'static str {
        match self {
            Part::Run => "run",
            Part::Parameter => "parameter",
            Part::Metric => "metric",
            Part::Artifact => "artifact",
        }
    }
}

/// One value in both runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What it is about.
    pub part: Part,
    /// `step.name`; of all instances of a step that agree in both, `step[*].name`.
    pub name: String,
    /// In the first run; `None` if it has none.
    pub a: Option<Value>,
    /// In the second run.
    pub b: Option<Value>,
}

impl Row {
    /// Whether both have the same.
    pub fn same(&self) -> bool {
        self.a == self.b
    }
}

/// A run to compare: what was asked, its steps, what they made.
#[derive(Clone, Copy)]
pub struct Side<'a> {
    /// What was asked.
    pub info: &'a Info,
    /// Steps of its plan.
    pub steps: &'a [Step],
    /// Of each step.
    pub facts: &'a [Facts],
}

/// Everything that is known of either, in the order of parts; steps in the order of the first plan.
pub fn diff(a: Side<'_>, b: Side<'_>) -> Vec<Row> {
    let mut rows = vec![
        row(Part::Run, "pipeline", Some(a.info.pipeline.as_str()), Some(&b.info.pipeline)),
        row(
            Part::Run,
            "arguments",
            Some(a.info.args.join(" ").as_str()),
            Some(&b.info.args.join(" ")),
        ),
        row(Part::Run, "build", Some(a.info.build.as_str()), Some(&b.info.build)),
    ];
    let empty = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let (of_a, of_b) = (by_name(a), by_name(b));
    let mut known = BTreeSet::new();
    let steps: Vec<&Step> =
        a.steps.iter().chain(b.steps).filter(|step| known.insert(step.name.as_str())).collect();
    for (part, pick) in [(Part::Parameter, 0), (Part::Metric, 1), (Part::Artifact, 2)] {
        let mut found: Vec<(&Step, String, Option<Value>, Option<Value>)> = Vec::new();
        for &step in &steps {
            let (a, b) = (of_a.get(step.name.as_str()), of_b.get(step.name.as_str()));
            let values = |side: Option<&Values>| -> BTreeMap<String, Value> {
                let side = side.unwrap_or(&empty);
                [&side.0, &side.1, &side.2][pick].clone()
            };
            let (a, b) = (values(a), values(b));
            let names: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            let both =
                |name: &String| (step, name.clone(), a.get(name).cloned(), b.get(name).cloned());
            found.extend(names.into_iter().map(both));
        }
        rows.extend(merged(part, found, &steps));
    }
    rows
}

type Values = (BTreeMap<String, Value>, BTreeMap<String, Value>, BTreeMap<String, Value>);

fn row(part: Part, name: &str, a: Option<&str>, b: Option<&str>) -> Row {
    Row { part, name: name.into(), a: a.map(Value::from), b: b.map(Value::from) }
}

/// Parameters, metrics and artifacts of every step.
fn by_name(side: Side<'_>) -> BTreeMap<&str, Values> {
    let of = |(step, facts): (&'_ Step, &Facts)| -> Values {
        let mut params = BTreeMap::new();
        flat("", &step.params.value(), &mut params);
        let metrics = facts.metrics.iter().map(|(name, value)| (name.clone(), (*value).into()));
        let artifact = |output: &cache::Output| {
            let index = output.index.map_or(String::new(), |index| format!("[{index}]"));
            (format!("{}{index}", output.port), Value::from(output.digest.to_string()))
        };
        (params, metrics.collect(), facts.outputs.iter().map(artifact).collect())
    };
    let sides = side.steps.iter().zip(side.facts);
    sides.map(|pair| (pair.0.name.as_str(), of(pair))).collect()
}

/// Instances that agree in both runs become one row.
fn merged(
    part: Part,
    found: Vec<(&Step, String, Option<Value>, Option<Value>)>,
    steps: &[&Step],
) -> Vec<Row> {
    let mut sizes: BTreeMap<&str, usize> = BTreeMap::new();
    steps.iter().for_each(|step| *sizes.entry(&step.group).or_default() += 1);
    let mut alike: BTreeMap<(&str, &str), Vec<usize>> = BTreeMap::new();
    for (at, (step, name, ..)) in found.iter().enumerate() {
        alike.entry((&step.group, name)).or_default().push(at);
    }
    let mut rows = Vec::new();
    for (at, (step, name, a, b)) in found.iter().enumerate() {
        let group = &alike[&(step.group.as_str(), name.as_str())];
        let whole = group.len() > 1 && group.len() == sizes[step.group.as_str()];
        let all = whole && group.iter().all(|&i| (&found[i].2, &found[i].3) == (a, b));
        if all && group[0] != at {
            continue;
        }
        let step = if all { format!("{}[*]", step.group) } else { step.name.clone() };
        let (a, b) = (a.clone(), b.clone());
        rows.push(Row { part, name: format!("{step}.{name}"), a, b });
    }
    rows
}

/// Nested objects as dotted names.
fn flat(name: &str, value: &Value, into: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (inner, value) in fields {
                let path = if name.is_empty() { inner.clone() } else { format!("{name}.{inner}") };
                flat(&path, value, into);
            }
        }
        Value::Null if name.is_empty() => {}
        Value::Object(_) if name.is_empty() => {}
        value => {
            into.insert(name.into(), value.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn step(name: &str, group: &str, params: Value) -> Step {
        Step { name: name.into(), group: group.into(), params: params.into(), ..Step::default() }
    }

    fn facts(loss: f64) -> Facts {
        Facts { metrics: [("final.loss".into(), loss)].into(), ..Facts::default() }
    }

    fn info() -> Info {
        Info { pipeline: "p".into(), args: vec!["run".into()], ..Info::default() }
    }

    #[test]
    fn what_differs_is_named_and_instances_that_agree_are_one_row() {
        let info = info();
        let of = |lr: f64, extra: &str| {
            vec![
                step("a[0]", "a", json!({ "lr": lr, "s": { "w": 1 } })),
                step("a[1]", "a", json!({ "lr": lr, "s": { "w": 1 } })),
                step(extra, extra, json!({ "x": 1 })),
            ]
        };
        let (old, new) = (of(0.1, "only_old"), of(0.2, "only_new"));
        let (made, remade) =
            (vec![facts(1.0), facts(2.0), facts(3.0)], vec![facts(1.0), facts(2.5), facts(3.0)]);
        let rows = diff(
            Side { info: &info, steps: &old, facts: &made },
            Side { info: &info, steps: &new, facts: &remade },
        );
        let find = |name: &str| rows.iter().find(|row| row.name == name).cloned().unwrap();
        let lr = find("a[*].lr");
        assert_eq!((lr.part, lr.a, lr.b), (Part::Parameter, Some(json!(0.1)), Some(json!(0.2))));
        assert!(find("a[*].s.w").same());
        assert!(find("a[0].final.loss").same() && !find("a[1].final.loss").same());
        assert_eq!(find("only_old.x").b, None);
        assert_eq!(find("only_new.x").a, None);
        assert_eq!(rows.iter().filter(|row| row.name.contains("lr")).count(), 1);
    }
}
