//! Teacher against student: a table for each evaluation, and, of several, one that compares them
//! and one that takes seeds together.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde_json::Value;

use super::benchmarks;
use super::data::Step;
use super::headline::decimal;
use super::markup::{clip, num, percent, thousands};
use super::metrics::{Evaluation, Figures};
use super::whiskers::{self, whiskers};

/// More evaluations are not compared one by one.
const MOST_ROWS: usize = 400;
/// More evaluations have no table of their own.
const MOST_TABLES: usize = 12;

/// All tables of `found`.
pub(super) fn tables(found: &[(&Step, &Evaluation)]) -> String {
    if found.is_empty() {
        return String::new();
    }
    if let [(_, evaluation)] = found {
        return table(evaluation);
    }
    let mut out = summary(found) + &comparison(found);
    out.push_str("<details class=more><summary>Each with its teacher</summary>");
    for (step, evaluation) in found.iter().take(MOST_TABLES) {
        let _ = write!(
            out,
            "<h3><code>{}</code></h3><div class=pair><div>{}</div>{}</div>",
            clip(&step.plan.name, 160),
            table(evaluation),
            tasks(evaluation)
        );
    }
    out.push_str("</details>");
    out
}

/// Accuracies of both models with their error bars, a row a task.
pub(super) fn tasks(evaluation: &Evaluation) -> String {
    let own = |name: &str, called: &str| {
        let side = |figures: &Figures| Some((*figures.get(name)?, error(figures, name)));
        let (teacher, student) = (side(&evaluation.teacher)?, side(&evaluation.student)?);
        let chance = evaluation.chance().filter(|_| name == "recall");
        let (name, teacher, student) = (called.to_string(), Some(teacher), Some(student));
        Some(whiskers::Row { name, chance, teacher, student })
    };
    let mut rows: Vec<whiskers::Row> =
        [own("recall", "recall"), own("copy", "copying")].into_iter().flatten().collect();
    rows.extend(evaluation.benchmarks.whiskers());
    whiskers("teacher and student by task", &rows)
}

/// The standard error of a figure: its own, or, of perplexity, what follows from that of the loss.
fn error(figures: &Figures, name: &str) -> Option<f64> {
    match name {
        "perplexity" => Some(figures.get(name)? * figures.get("nats_se")?),
        name => figures.get(&format!("{name}_se")).copied(),
    }
}

/// Names with a meaning we know; others are shown as they are.
fn label(name: &str) -> String {
    let known = match name {
        "perplexity" => "Perplexity",
        "recall" => "Recall accuracy",
        "copy" => "Copy accuracy",
        "chance" => "Recall by guessing",
        "answers" => "Answers scored",
        "copy_tokens" => "Copied tokens scored",
        "loss" | "nats" => "Loss (nats per token)",
        "nats_se" => "Standard error of the loss",
        "tokens" => "Tokens scored",
        "kl" => "KL from teacher to student (nats)",
        "argmax" | "top1" => "Same most likely token",
        "accuracy" => "Next-token accuracy",
        _ => return clip(&name.replace(['_', '.'], " "), 80),
    };
    known.into()
}

fn is_share(name: &str) -> bool {
    if name.ends_with("_tokens") {
        return false;
    }
    let words =
        ["recall", "copy", "chance", "accuracy", "argmax", "top1", "agree", "share", "greedy"];
    words.iter().any(|word| name.contains(word))
}

fn shown(name: &str, value: f64) -> String {
    if is_share(name) && (0.0..=1.0).contains(&value) {
        return percent(value);
    }
    if value.fract() == 0.0 && (0.0..1e15).contains(&value) {
        return thousands(value as u64);
    }
    num(value)
}

/// The tables of one evaluation.
fn table(evaluation: &Evaluation) -> String {
    let benchmarks = benchmarks::tables(&evaluation.benchmarks);
    let parts = [&evaluation.student, &evaluation.teacher, &evaluation.agreement, &evaluation.rest];
    match parts.iter().all(|part| part.is_empty()) && !benchmarks.is_empty() {
        true => benchmarks,
        false => text_table(evaluation) + &benchmarks,
    }
}

/// What was measured on held-out text.
fn text_table(evaluation: &Evaluation) -> String {
    let mut out = String::from(
        "<div class=scroll><table class=figures><thead><tr><th></th><th>Teacher</th><th>Student</th><th>Student ÷ teacher</th></tr></thead><tbody>",
    );
    let nothing = |name: &String| {
        let zero = |figures: &Figures| figures.get(name).is_none_or(|value| *value == 0.0);
        ["answers", "copy_tokens"].contains(&name.as_str())
            && zero(&evaluation.student)
            && zero(&evaluation.teacher)
    };
    let names = names([&evaluation.student, &evaluation.teacher]);
    for name in names.into_iter().filter(|name| !nothing(name)) {
        let cell = |figures: &Figures| {
            let Some(value) = figures.get(&name) else { return "–".into() };
            let text = shown(&name, *value);
            let error = error(figures, &name).filter(|error| *error > 0.0);
            let error = error.map(|error| format!(" <small>± {}</small>", like(&text, error)));
            text + &error.unwrap_or_default()
        };
        let same = evaluation.student.get(&name) == evaluation.teacher.get(&name);
        let counted =
            same && ["chance", "answers", "tokens", "copy_tokens"].contains(&name.as_str());
        let ratio = evaluation.ratio(&name).filter(|_| !counted).map(decimal).unwrap_or_default();
        let _ = write!(
            out,
            "<tr><th>{}</th><td>{}</td><td>{}</td><td>{ratio}</td></tr>",
            label(&name),
            cell(&evaluation.teacher),
            cell(&evaluation.student)
        );
    }
    let shared = evaluation.agreement.iter().chain(&evaluation.rest);
    for (name, value) in shared.take(60) {
        let _ = write!(
            out,
            "<tr><th>{}</th><td class=both colspan=2>{}</td><td></td></tr>",
            label(name),
            shown(name, *value)
        );
    }
    out.push_str("</tbody></table></div>");
    out
}

/// All names, those that matter most first.
fn names(parts: [&Figures; 2]) -> Vec<String> {
    let first = ["perplexity", "loss", "recall", "chance", "copy", "accuracy", "answers"];
    let mut all: Vec<String> = parts.iter().flat_map(|part| part.keys().cloned()).collect();
    all.sort_by_key(|name| {
        (first.iter().position(|known| known == name).unwrap_or(first.len()), name.clone())
    });
    all.dedup();
    // Standard errors stand beside what they belong to.
    let errors: Vec<String> = all.iter().map(|name| format!("{name}_se")).collect();
    all.retain(|name| !errors.contains(name));
    all.truncate(60);
    all
}

/// One column of the comparison.
struct Column {
    name: &'static str,
    value: fn(&Evaluation) -> Option<f64>,
    show: fn(f64) -> String,
    /// Whether less is better.
    low: bool,
}

const COLUMNS: [Column; 6] = [
    Column {
        name: "Perplexity",
        value: |e| e.student.get("perplexity").copied(),
        show: num,
        low: true,
    },
    Column { name: "÷ teacher", value: |e| e.ratio("perplexity"), show: decimal, low: true },
    Column {
        name: "Recall",
        value: |e| e.student.get("recall").copied(),
        show: percent,
        low: false,
    },
    Column { name: "Copy", value: |e| e.student.get("copy").copied(), show: percent, low: false },
    Column { name: "Agreement", value: Evaluation::agree, show: percent, low: false },
    Column { name: "Benchmarks", value: |e| e.benchmarks.average(), show: percent, low: false },
];

fn columns(found: &[(&Step, &Evaluation)]) -> Vec<&'static Column> {
    let any = |column: &&Column| found.iter().any(|(_, e)| (column.value)(e).is_some());
    COLUMNS.iter().filter(any).collect()
}

/// The best value, unless all are the same.
fn best(column: &Column, values: impl Iterator<Item = f64>) -> Option<f64> {
    let values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    let low = values.iter().copied().min_by(f64::total_cmp)?;
    let high = values.iter().copied().max_by(f64::total_cmp)?;
    (low != high).then_some(if column.low { low } else { high })
}

/// A row an evaluation, the best of each column marked.
fn comparison(found: &[(&Step, &Evaluation)]) -> String {
    let columns = columns(found);
    let best: Vec<Option<f64>> = columns
        .iter()
        .map(|column| best(column, found.iter().filter_map(|(_, e)| (column.value)(e))))
        .collect();
    let mut out = String::from(
        "<h3>All evaluations</h3><div class=scroll><table class=figures><thead><tr><th>Step</th>",
    );
    columns.iter().for_each(|column| _ = write!(out, "<th>{}</th>", column.name));
    out.push_str("</tr></thead><tbody>");
    for (step, evaluation) in found.iter().take(MOST_ROWS) {
        let _ = write!(out, "<tr><th><code>{}</code></th>", clip(&step.plan.name, 160));
        for (column, best) in columns.iter().zip(&best) {
            let value = (column.value)(evaluation);
            let text = value.map_or("–".into(), column.show);
            let mark = value.is_some() && value == *best;
            let _ = match mark {
                true => write!(out, "<td class=best>{text} <i>best</i></td>"),
                false => write!(out, "<td>{text}</td>"),
            };
        }
        out.push_str("</tr>");
    }
    let _ = write!(out, "</tbody></table></div>");
    if found.len() > MOST_ROWS {
        let _ = write!(out, "<p class=none>and {} more.</p>", found.len() - MOST_ROWS);
    }
    out
}

/// What a step is called without its seed, if it has one.
pub(super) fn without_seed(step: &Step) -> String {
    let kept: Vec<String> = step
        .plan
        .coords
        .iter()
        .filter(|(axis, _)| axis != "seed")
        .map(|(axis, value)| format!("{axis}={}", plain(value)))
        .collect();
    if kept.is_empty() {
        step.plan.group.to_string()
    } else {
        format!("{} {}", step.plan.group, kept.join(" "))
    }
}

/// A coordinate as it is written.
pub(super) fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

/// Mean and standard deviation over seeds, if any step has one.
fn summary(found: &[(&Step, &Evaluation)]) -> String {
    if !found.iter().any(|(step, _)| step.plan.coords.iter().any(|(axis, _)| axis == "seed")) {
        return String::new();
    }
    let columns = columns(found);
    let mut order: Vec<String> = Vec::new();
    let mut groups: BTreeMap<String, Vec<&Evaluation>> = BTreeMap::new();
    for (step, evaluation) in found {
        let name = without_seed(step);
        if !groups.contains_key(&name) {
            order.push(name.clone());
        }
        groups.entry(name).or_default().push(evaluation);
    }
    let best: Vec<Option<f64>> = columns
        .iter()
        .map(|column| best(column, groups.values().filter_map(|g| spread(g, column)).map(|s| s.0)))
        .collect();
    let mut out = String::from(
        "<h3>Over seeds: mean ± standard deviation</h3><div class=scroll><table class=figures><thead><tr><th>Steps</th><th>n</th>",
    );
    columns.iter().for_each(|column| _ = write!(out, "<th>{}</th>", column.name));
    out.push_str("</tr></thead><tbody>");
    for name in order.iter().take(MOST_ROWS) {
        let group = &groups[name];
        let _ =
            write!(out, "<tr><th><code>{}</code></th><td>{}</td>", clip(name, 160), group.len());
        for (column, best) in columns.iter().zip(&best) {
            let Some((mean, sd)) = spread(group, column) else {
                out.push_str("<td>–</td>");
                continue;
            };
            let shown = (column.show)(mean);
            let sd = sd.map(|sd| format!(" <small>± {}</small>", like(&shown, sd)));
            let (class, mark) =
                if Some(mean) == *best { (" class=best", " <i>best</i>") } else { ("", "") };
            let _ = write!(out, "<td{class}>{}{}{mark}</td>", shown, sd.unwrap_or_default());
        }
        out.push_str("</tr>");
    }
    out.push_str("</tbody></table></div>");
    out
}

/// `sd` with as many decimals, in the same unit, as `shown`.
fn like(shown: &str, sd: f64) -> String {
    let (digits, scale) = match shown.strip_suffix(" %") {
        Some(digits) => (digits, 100.0),
        None => (shown, 1.0),
    };
    if digits.contains('e') {
        return num(sd);
    }
    let decimals = digits.split_once('.').map_or(0, |(_, decimals)| decimals.len());
    format!("{:.decimals$}", sd * scale)
}

/// Mean, and from two values on, the sample standard deviation.
fn spread(group: &[&Evaluation], column: &Column) -> Option<(f64, Option<f64>)> {
    let values: Vec<f64> =
        group.iter().filter_map(|e| (column.value)(e)).filter(|v| v.is_finite()).collect();
    let n = values.len() as f64;
    if values.is_empty() {
        return None;
    }
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    Some((mean, (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt())))
}
