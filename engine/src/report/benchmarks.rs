//! Benchmarks and probes of an evaluation: teacher beside student, with standard errors. Takes what
//! it finds in the metrics and asks for nothing.

use std::fmt::Write;

use serde_json::{Map, Value};

use super::markup::{clip, num, percent, thousands};
use super::whiskers::{self, Mean};

/// More rows of a table are only counted.
const MOST_ROWS: usize = 200;

/// What an evaluation says of benchmarks and probes.
#[derive(Clone, Debug, Default)]
pub(super) struct Benchmarks {
    tasks: Vec<Row>,
    average: Option<Row>,
    retained: Vec<Kept>,
    recall: Vec<Probe>,
    distance: Vec<Probe>,
    needle: Vec<Probe>,
}

/// One metric of one benchmark.
#[derive(Clone, Debug, Default)]
struct Row {
    task: String,
    metric: String,
    n: Option<f64>,
    chance: Option<f64>,
    teacher: Option<Mean>,
    student: Option<Mean>,
    difference: Option<Mean>,
}

/// What the student kept of the teacher's gain over guessing.
#[derive(Clone, Debug)]
struct Kept {
    tasks: u64,
    chance: Option<f64>,
    value: f64,
    /// Its 95 % interval.
    ends: Option<[f64; 2]>,
}

/// One line of a probe.
#[derive(Clone, Debug)]
struct Probe {
    name: String,
    n: Option<f64>,
    chance: Option<f64>,
    /// Exact answers: teacher, student; then choices of the right one.
    figures: [Option<Mean>; 4],
}

impl Benchmarks {
    pub(super) fn of(value: &Map<String, Value>) -> Benchmarks {
        let list = |value: Option<&Value>| -> Vec<Value> {
            value.and_then(Value::as_array).cloned().unwrap_or_default()
        };
        let probes = |name: &str, label: fn(&Value) -> Option<String>| -> Vec<Probe> {
            let rows = list(value.get("probes").and_then(|probes| probes.get(name)));
            rows.iter().filter_map(|row| Some(Probe::of(label(row)?, row))).collect()
        };
        Benchmarks {
            tasks: list(value.get("tasks")).iter().flat_map(Row::all).collect(),
            average: value.get("average").and_then(Row::average),
            retained: ["retained", "retained_choices"]
                .into_iter()
                .filter_map(|name| Kept::of(value.get("average")?.get(name)?))
                .collect(),
            recall: probes("recall", |row| row.get("pairs")?.as_u64().map(thousands)),
            distance: probes("recall_by_distance", |row| {
                let to = row.get("to")?.as_u64()?.saturating_sub(1);
                Some(format!("{}–{}", whole_of(row, "from")?, thousands(to)))
            }),
            needle: probes("needle", |row| {
                let depth = row.get("depth")?.as_f64()?;
                Some(format!("{} at {:.0} %", whole_of(row, "length")?, depth * 100.0))
            }),
        }
    }

    /// Whether any of it is of two models.
    pub(super) fn compares(&self) -> bool {
        let probes = [&self.recall, &self.distance, &self.needle].into_iter().flatten();
        let probes = probes.flat_map(|probe| [probe.figures[0], probe.figures[2]]);
        self.tasks.iter().map(|row| row.teacher).chain(probes).any(|teacher| teacher.is_some())
    }

    /// What each benchmark is compared by, and their mean, to be drawn.
    pub(super) fn whiskers(&self) -> Vec<whiskers::Row> {
        let mut rows: Vec<whiskers::Row> = Vec::new();
        for row in self.tasks.iter().chain(&self.average) {
            // The first metric of a task is the one it is compared by.
            if row.metric != "perplexity" && rows.iter().all(|known| known.name != row.task) {
                let Row { task, chance, teacher, student, .. } = row.clone();
                rows.push(whiskers::Row { name: task, chance, teacher, student });
            }
        }
        rows
    }

    /// Both means over benchmarks: teacher, student.
    pub(super) fn averages(&self) -> Option<(f64, f64)> {
        let row = self.average.as_ref()?;
        Some((row.teacher?.0, row.student?.0))
    }

    /// The student's mean over benchmarks.
    pub(super) fn average(&self) -> Option<f64> {
        Some(self.average.as_ref()?.student?.0)
    }
}

fn whole_of(row: &Value, name: &str) -> Option<String> {
    row.get(name)?.as_u64().map(thousands)
}

/// `name` of `figures`, with `name_stderr`.
fn mean(figures: Option<&Value>, name: &str) -> Option<Mean> {
    let get = |name: &str| figures?.get(name)?.as_f64();
    Some((get(name)?, get(&format!("{name}_stderr"))))
}

/// `{"value": …, "stderr": …}`.
fn plain(value: Option<&Value>) -> Option<Mean> {
    let get = |name: &str| value?.get(name)?.as_f64();
    Some((get("value")?, get("stderr")))
}

impl Row {
    /// What the benchmark is compared by, then its other metrics.
    fn all(value: &Value) -> Vec<Row> {
        let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
        let number = |name: &str| value.get(name).and_then(Value::as_f64);
        let (task, first) = (text("task"), text("metric"));
        let others = ["acc", "acc_norm", "perplexity"].into_iter().filter(|name| *name != first);
        let row = |metric: &str| Row {
            task: task.into(),
            metric: metric.into(),
            n: number("n"),
            chance: number("chance").filter(|_| metric != "perplexity"),
            teacher: mean(value.get("teacher"), metric),
            student: mean(value.get("student"), metric),
            difference: plain(value.get("difference")).filter(|_| metric == first),
        };
        let rows = std::iter::once(first).chain(others).map(row);
        rows.filter(|row| row.student.is_some() || row.teacher.is_some()).collect()
    }

    fn average(value: &Value) -> Option<Row> {
        let tasks = value.get("tasks").and_then(Value::as_u64)?;
        Some(Row {
            task: format!("average of {tasks}"),
            student: Some(plain(value.get("student"))?),
            teacher: plain(value.get("teacher")),
            difference: plain(value.get("difference")),
            ..Row::default()
        })
    }

    fn draw(&self, out: &mut String) {
        let share = self.metric != "perplexity";
        let cell = |mean: Option<Mean>| mean.map_or("–".into(), |mean| shown(mean, share));
        let metric = match self.metric.as_str() {
            "acc" => "accuracy".into(),
            "acc_norm" => "accuracy by length".into(),
            other => clip(other, 40),
        };
        let _ = write!(
            out,
            "<tr><th>{} <small>{metric}</small></th><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            clip(&self.task, 80),
            count(self.n),
            self.chance.map_or(String::new(), percent),
            cell(self.teacher),
            cell(self.student),
            self.difference.map_or(String::new(), points),
        );
    }
}

impl Kept {
    fn of(value: &Value) -> Option<Kept> {
        let number = |name: &str| value.get(name).and_then(Value::as_f64);
        Some(Kept {
            tasks: value.get("tasks").and_then(Value::as_u64)?,
            chance: number("chance"),
            value: number("value")?,
            ends: number("low").zip(number("high")).map(|(low, high)| [low, high]),
        })
    }

    fn draw(&self, out: &mut String) {
        let ends = self.ends.map_or(String::new(), |[low, high]| {
            format!(" <small>{} to {}</small>", percent(low), percent(high))
        });
        let _ = write!(
            out,
            "<tr><th>retained gain, {} benchmarks <small>95 % interval</small></th><td></td><td>{}</td><td></td><td>{}{ends}</td><td></td></tr>",
            self.tasks,
            self.chance.map_or(String::new(), percent),
            percent(self.value),
        );
    }
}

impl Probe {
    fn of(name: String, row: &Value) -> Probe {
        let of = |side: &str, name: &str| mean(row.get(side), name);
        let number = |name: &str| row.get(name).and_then(Value::as_f64);
        let [teacher, student] = ["teacher", "student"];
        let figures = [
            of(teacher, "exact"),
            of(student, "exact"),
            of(teacher, "chosen"),
            of(student, "chosen"),
        ];
        Probe { name, n: number("n"), chance: number("chance"), figures }
    }
}

fn count(n: Option<f64>) -> String {
    n.map_or(String::new(), |n| thousands(n.max(0.0) as u64))
}

/// `64.0 % ± 1.1`, or of no share `62.2 ± 3.1`.
fn shown((value, error): Mean, share: bool) -> String {
    let (text, error) = match share {
        true => (percent(value), error.map(|error| format!("{:.1}", 100.0 * error))),
        false => (num(value), error.map(num)),
    };
    text + &error.map_or(String::new(), |error| format!(" <small>± {error}</small>"))
}

/// A difference of shares, in points.
fn points((value, error): Mean) -> String {
    let sign = if value < 0.0 { "−" } else { "+" };
    let error = error.map(|error| format!(" <small>± {:.1}</small>", 100.0 * error));
    format!("{sign}{:.1}{}", 100.0 * value.abs(), error.unwrap_or_default())
}

/// All tables of one evaluation, empty if it has no benchmark and no probe.
pub(super) fn tables(found: &Benchmarks) -> String {
    let mut out = String::new();
    if !found.tasks.is_empty() {
        let head = ["", "Documents", "Guessing", "Teacher", "Student", "Student − teacher"];
        open(&mut out, "Benchmarks", &head);
        found.tasks.iter().take(MOST_ROWS).for_each(|row| row.draw(&mut out));
        found.average.iter().for_each(|row| row.draw(&mut out));
        found.retained.iter().for_each(|row| row.draw(&mut out));
        close(&mut out, found.tasks.len());
    }
    let probes = [
        ("Recall by number of pairs", "Pairs", &found.recall),
        ("Recall by distance", "Tokens since", &found.distance),
        ("Needle by length and depth", "Tokens", &found.needle),
    ];
    for (title, name, rows) in probes.into_iter().filter(|(.., rows)| !rows.is_empty()) {
        let head = [name, "n", "Teacher exact", "Student exact", "Guessing", "Teacher", "Student"];
        open(&mut out, title, &head);
        for Probe { name, n, chance, figures } in rows.iter().take(MOST_ROWS) {
            let [a, b, c, d] =
                figures.map(|mean| mean.map_or("–".into(), |mean| shown(mean, true)));
            let _ = write!(
                out,
                "<tr><th>{name}</th><td>{}</td><td>{a}</td><td>{b}</td><td>{}</td><td>{c}</td><td>{d}</td></tr>",
                count(*n),
                chance.map_or(String::new(), percent),
            );
        }
        close(&mut out, rows.len());
    }
    out
}

fn open(out: &mut String, title: &str, head: &[&str]) {
    let _ = write!(out, "<h3>{title}</h3><div class=scroll><table class=figures><thead><tr>");
    head.iter().for_each(|name| _ = write!(out, "<th>{name}</th>"));
    out.push_str("</tr></thead><tbody>");
}

fn close(out: &mut String, rows: usize) {
    out.push_str("</tbody></table></div>");
    if rows > MOST_ROWS {
        let _ = write!(out, "<p class=none>and {} more.</p>", rows - MOST_ROWS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn drawn(value: &Value) -> String {
        tables(&Benchmarks::of(value.as_object().unwrap()))
    }

    #[test]
    fn both_models_stand_beside_each_other_with_their_errors() {
        let figures = |acc: f64| json!({ "acc": acc, "acc_stderr": 0.0112, "perplexity": 62.2 });
        let task = json!({ "task": "lambada <1>", "n": 5153, "metric": "acc", "chance": null,
            "student": figures(0.25), "teacher": figures(0.3), "difference": { "value": -0.05, "stderr": 0.01 } });
        let mean = json!({ "value": 0.5, "stderr": null });
        let kept = json!({ "tasks": 6, "chance": 0.29, "value": 0.9, "low": 0.85, "high": 0.951 });
        let found = drawn(
            &json!({ "tasks": [task, 3], "average": { "tasks": 6, "student": mean, "retained": kept } }),
        );
        let row = "<tr><th>lambada &lt;1&gt; <small>accuracy</small></th><td>5,153</td><td></td>\
                   <td>30.0 % <small>± 1.1</small></td><td>25.0 % <small>± 1.1</small></td>\
                   <td>−5.0 <small>± 1.0</small></td></tr>";
        assert!(found.contains(row), "{found}");
        assert!(
            found.contains("<small>perplexity</small></th><td>5,153</td><td></td><td>62.20</td>")
        );
        assert!(
            found.contains("<th>average of 6 <small></small></th>") && found.contains("50.0 %")
        );
        assert!(
            found.contains("<td>29.0 %</td><td></td><td>90.0 % <small>85.0 % to 95.1 %</small>"),
            "{found}"
        );
    }

    #[test]
    fn probes_have_a_table_each_and_nothing_is_asked_for() {
        let figures = json!({ "exact": 0.5, "chosen": 1.0, "chosen_stderr": 0.0 });
        let found = drawn(&json!({ "probes": {
            "recall": [{ "pairs": 16, "n": 8, "chance": 0.25, "student": figures }],
            "recall_by_distance": [{ "from": 8, "to": 16, "teacher": figures }, { "from": 1 }],
            "needle": [{ "length": 1024, "depth": 0.5, "student": {} }] } }));
        let row = "<tr><th>16</th><td>8</td><td>–</td><td>50.0 %</td><td>25.0 %</td><td>–</td>\
                   <td>100.0 % <small>± 0.0</small></td></tr>";
        assert!(found.contains(row), "{found}");
        assert!(found.contains("<th>8–15</th>") && found.contains("<th>1,024 at 50 %</th>"));
        assert_eq!(found.matches("<table").count(), 3);
        assert_eq!(drawn(&json!({ "tasks": "none", "probes": [], "average": 1 })), "");
    }
}
