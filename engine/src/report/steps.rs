//! The table of steps, and where the run came from: command line, build, sources, notes.

use std::fmt::Write;
use std::fs;

use cache::Output;
use serde_json::Value;

use super::data::{Run, State, Step};
use super::headline::file;
use super::markup::{bytes, clip, count, duration, esc, num, thousands};
use super::metrics::Metrics;

/// Rows of the table take no more than so many bytes of the page.
const MOST_BYTES: usize = 700_000;
/// Rows of one group when there are many steps.
const MOST_OF_GROUP: usize = 40;
/// More steps than this are folded by group.
const MANY: usize = 300;
const MOST_SOURCE: usize = 60_000;
const MOST_SOURCES: usize = 240_000;

/// A row a step; of big groups the first ones and all that failed.
pub(super) fn table(run: &Run) -> String {
    let mut out = String::from(
        "<div class=scroll><table class=steps><thead><tr><th>Step</th><th>State</th><th>Time</th><th>Key</th><th>Artifacts</th></tr></thead><tbody>",
    );
    let many = run.steps.len() > MANY;
    let mut full = 0;
    for (g, group) in run.groups.iter().enumerate() {
        let mut hidden = 0;
        for (i, &at) in group.steps.iter().enumerate() {
            let step = &run.steps[at];
            let room = out.len() < MOST_BYTES;
            let wanted = !many || i < MOST_OF_GROUP || step.state == State::Failed;
            if room && wanted {
                row(&mut out, step, (i == 0).then_some(g));
            } else if room {
                hidden += 1;
            } else {
                full += 1;
            }
        }
        if hidden > 0 {
            let _ = write!(
                out,
                "<tr class=fold><td colspan=5>and {} of <code>{}</code></td></tr>",
                count(hidden, "more instance"),
                clip(group.name, 120)
            );
        }
    }
    if full > 0 {
        let _ = write!(
            out,
            "<tr class=fold><td colspan=5>and {} that this page has no room for</td></tr>",
            count(full, "more step")
        );
    }
    out.push_str("</tbody></table></div>");
    out
}

fn row(out: &mut String, step: &Step, anchor: Option<usize>) {
    let id = anchor.map(|g| format!(" id=g{g}")).unwrap_or_default();
    let word = step.state.word();
    let _ = write!(
        out,
        "<tr{id}><td><details><summary><code>{}</code> <small>{}</small></summary>",
        clip(&step.plan.name, 160),
        clip(&step.plan.stage, 60)
    );
    details(out, step);
    let _ = write!(
        out,
        "</details></td><td><span class=\"state {word}\" title=\"{}\">{word}</span></td><td class=num>",
        step.state.meaning()
    );
    match (step.state, step.seconds) {
        (State::Cached, Some(s)) => _ = write!(out, "<small>saved</small> {}", duration(s)),
        (_, Some(s)) => out.push_str(&duration(s)),
        (_, None) => out.push('–'),
    }
    if let Some((rate, unit)) = step.rate {
        let _ = write!(out, "<br><small>{} {}/s</small>", num_round(rate), clip(unit, 20));
    }
    let key = step.key.map(|key| key.to_string());
    let _ = match key {
        Some(key) => write!(out, "</td><td><code title=\"{key}\">{}</code></td><td>", &key[..12]),
        None => write!(out, "</td><td>–</td><td>"),
    };
    artifacts(out, step.outputs);
    out.push_str("</td></tr>");
}

fn num_round(value: f64) -> String {
    if value >= 100.0 { thousands(value.round() as u64) } else { num(value) }
}

fn artifacts(out: &mut String, outputs: &[Output]) {
    let line = |out: &mut String, output: &Output| {
        let index = output.index.map(|i| format!("[{i}]")).unwrap_or_default();
        let digest = output.digest.to_string();
        let _ = write!(
            out,
            "<div class=art>{}{index} <small>{} · <code title=\"{digest}\">{}</code></small></div>",
            clip(&output.port, 60),
            bytes(output.bytes),
            &digest[..8]
        );
    };
    if outputs.len() <= 4 {
        outputs.iter().for_each(|output| line(out, output));
        return;
    }
    let total: u64 = outputs.iter().fold(0, |sum, output| sum.saturating_add(output.bytes));
    let _ = write!(
        out,
        "<details><summary>{} · {}</summary>",
        count(outputs.len(), "artifact"),
        bytes(total)
    );
    outputs.iter().take(64).for_each(|output| line(out, output));
    if outputs.len() > 64 {
        let _ = write!(out, "<div class=art>and {} more</div>", outputs.len() - 64);
    }
    out.push_str("</details>");
}

fn details(out: &mut String, step: &Step) {
    let place = &step.plan.place;
    if place.line > 0 {
        let _ = write!(out, "<p class=small>{}:{}</p>", clip(file(&place.file), 80), place.line);
    }
    if let Some(at) = step.resumed {
        let _ = write!(out, "<p class=small>resumed from its checkpoint at {}</p>", thousands(at));
    }
    if step.attempts > 1 {
        let _ = write!(
            out,
            "<p class=small>{} in this run</p>",
            count(step.attempts as usize, "attempt")
        );
    }
    parameters(out, step);
    metrics(out, &step.metrics);
}

fn parameters(out: &mut String, step: &Step) {
    let params = step.plan.params.value();
    let Some(params) = params.as_object().filter(|params| !params.is_empty()) else {
        out.push_str("<p class=small>no parameters</p>");
        return;
    };
    out.push_str("<table class=params>");
    for (name, value) in params.iter().take(60) {
        let origin = step.plan.origins.get(name).map(|place| match place.line {
            0 => esc(file(&place.file)),
            line => format!("{}:{line}", clip(file(&place.file), 60)),
        });
        let text = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let _ = write!(
            out,
            "<tr><th>{}</th><td>{}</td><td>{}</td></tr>",
            clip(name, 60),
            clip(&text, 600),
            origin.unwrap_or_else(|| "default".into())
        );
    }
    out.push_str("</table>");
}

fn metrics(out: &mut String, metrics: &Metrics) {
    let (name, figures) = match metrics {
        Metrics::Lost(why) => {
            let _ =
                write!(out, "<p class=small>Its metrics cannot be shown: {}.</p>", clip(why, 200));
            return;
        }
        Metrics::Training { last, .. } => ("after the last update", last),
        Metrics::Other(kind, figures) => (kind.as_str(), figures),
        Metrics::Evaluation(found) if !found.compares() => ("measured", &found.student),
        Metrics::None | Metrics::Evaluation(_) => return,
    };
    if figures.is_empty() {
        return;
    }
    let _ = write!(out, "<p class=small>{}</p><table class=params>", clip(name, 60));
    for (name, value) in figures.iter().take(40) {
        let _ = write!(out, "<tr><th>{}</th><td>{}</td></tr>", clip(name, 80), num(*value));
    }
    out.push_str("</table>");
}

/// Notes of the run and its stages.
pub(super) fn notes(run: &Run) -> String {
    let mut lost: Vec<String> = Vec::new();
    for step in &run.steps {
        if let Metrics::Lost(why) = &step.metrics {
            lost.push(format!("metrics of `{}` cannot be shown: {why}", step.plan.name));
        }
    }
    let all: Vec<&String> = run.notes.iter().chain(lost.iter().take(40)).collect();
    if all.is_empty() {
        return String::new();
    }
    let items: String = all.iter().map(|note| format!("<li>{}</li>", clip(note, 1000))).collect();
    format!("<ul class=notes>{items}</ul>")
}

/// Where the run came from.
pub(super) fn provenance(run: &Run) -> String {
    let info = &run.past.info;
    let mut out = String::from("<table class=params>");
    let file = info.file.to_string_lossy();
    let rows = [
        ("run", info.id.clone()),
        ("command line", info.args.join(" ")),
        ("directory", info.cwd.to_string_lossy().into_owned()),
        (
            "pipeline file",
            if file.is_empty() { "the embedded one".into() } else { file.into_owned() },
        ),
        ("build", info.build.clone()),
        ("record", run.past.dir.to_string_lossy().into_owned()),
    ];
    for (name, value) in rows {
        let _ = write!(out, "<tr><th>{name}</th><td><code>{}</code></td></tr>", clip(&value, 2000));
    }
    out.push_str("</table>");
    out
}

/// The YAML as it was read.
pub(super) fn sources(run: &Run) -> String {
    let Ok(items) = fs::read_dir(&run.past.dir) else { return String::new() };
    let mut found: Vec<(usize, String, std::path::PathBuf)> = items
        .flatten()
        .filter_map(|item| {
            let name = item.file_name().to_string_lossy().into_owned();
            let (number, base) = name.strip_prefix("source-")?.split_once('-')?;
            Some((number.parse().ok()?, base.to_string(), item.path()))
        })
        .collect();
    found.sort();
    let (mut out, mut left) = (String::new(), MOST_SOURCES);
    for (_, name, path) in found.into_iter().take(40) {
        let text = fs::read(&path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let text =
            clip(&text.unwrap_or_else(|e| format!("cannot be read: {e}")), MOST_SOURCE.min(left));
        left = left.saturating_sub(text.len());
        let _ = write!(
            out,
            "<details><summary><code>{}</code></summary><pre>{text}</pre></details>",
            clip(&name, 120)
        );
    }
    out
}
