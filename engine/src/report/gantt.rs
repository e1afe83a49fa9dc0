//! What ran when, as SVG: a row for each executed step, or, of many, for each group of them.

use std::fmt::Write;

use super::data::{How, Run, Span};
use super::markup::{clip, duration};
use super::scale::moments;

/// More executed steps than this share the rows of their groups.
const MOST_ROWS: usize = 48;
const MOST_BARS: usize = 1500;
const WIDTH: f64 = 1060.0;
const LEFT: f64 = 176.0;
const RIGHT: f64 = 985.0;
const ROW: f64 = 22.0;

/// Draws the times of `run`.
pub(super) fn gantt(run: &Run) -> String {
    if run.spans.is_empty() {
        return "<p class=none>Nothing was executed in this run.</p>".into();
    }
    let mut spans = run.spans.clone();
    spans.sort_by(|a, b| a.from.total_cmp(&b.from).then(a.step.cmp(&b.step)));
    let hidden = spans.len().saturating_sub(MOST_BARS);
    spans.truncate(MOST_BARS);
    let rows = rows(run, &spans);
    let end = spans.iter().map(|span| span.to).fold(run.totals.seconds, f64::max).max(1e-3);
    let x = |t: f64| LEFT + (t / end).clamp(0.0, 1.0) * (RIGHT - LEFT);
    let bottom = 8.0 + rows.len() as f64 * ROW;
    let height = bottom + 26.0;
    let mut out = format!(
        "<div class=scroll><svg class=gantt viewBox=\"0 0 {WIDTH} {height}\" role=img aria-label=\"times of steps\">"
    );
    for t in moments(end) {
        let (at, label) = (x(t), moment(t));
        let _ = write!(
            out,
            "<path class=grid d=\"M{at:.1} 4V{bottom}\"/><text class=x x={at:.1} y={}>{label}</text>",
            bottom + 16.0
        );
    }
    for (i, (name, spans)) in rows.iter().enumerate() {
        let y = 8.0 + i as f64 * ROW;
        let _ = write!(
            out,
            "<text class=y x={} y={:.1}>{}</text>",
            LEFT - 8.0,
            y + 14.0,
            clip(&short(name), 40)
        );
        for span in spans {
            bar(&mut out, run, span, (x(span.from), x(span.to)), y);
        }
        let last = spans.iter().map(|span| span.to).fold(0.0, f64::max);
        let busy: f64 = spans.iter().map(|span| span.to - span.from).sum();
        let _ = write!(
            out,
            "<text class=v x={:.1} y={:.1}>{}</text>",
            x(last) + 6.0,
            y + 14.0,
            duration(busy)
        );
    }
    out.push_str("</svg></div>");
    if hidden > 0 {
        let _ = write!(out, "<p class=none>{hidden} later attempts are not drawn.</p>");
    }
    out
}

fn bar(out: &mut String, run: &Run, span: &Span, (from, to): (f64, f64), y: f64) {
    let (class, what) = match span.how {
        How::Ran => ("ran", "ran"),
        How::Failed => ("failed", "failed after"),
        How::Open => ("running", "no end recorded after"),
        How::Waited => ("waited", "waited for another process"),
    };
    let name = run.steps.get(span.step).map_or("?", |step| step.plan.name.as_str());
    let _ = write!(
        out,
        "<rect class={class} x={from:.1} y={:.1} width={:.1} height=14 rx=2><title>{}: {what} {}</title></rect>",
        y + 3.0,
        (to - from).max(1.5),
        clip(name, 80),
        duration(span.to - span.from)
    );
}

/// A round moment.
fn moment(t: f64) -> String {
    match t {
        0.0 => "0".into(),
        60.0 => "1 min".into(),
        t => duration(t).replace(" 00 s", "").replace(" 00 min", ""),
    }
}

/// The end of a long name says more than its middle.
fn short(name: &str) -> String {
    let n = name.chars().count();
    if n <= 26 {
        return name.into();
    }
    let head: String = name.chars().take(9).collect();
    let tail: String = name.chars().skip(n - 16).collect();
    format!("{head}…{tail}")
}

fn rows<'a>(run: &Run<'a>, spans: &[Span]) -> Vec<(&'a str, Vec<Span>)> {
    let mut rows: Vec<(&str, Vec<Span>)> = Vec::new();
    let known = spans.iter().filter(|span| span.step < run.steps.len());
    let mut steps: Vec<usize> = known.clone().map(|span| span.step).collect();
    steps.sort_unstable();
    steps.dedup();
    let by_group = steps.len() > MOST_ROWS;
    for span in known {
        let plan = run.steps[span.step].plan;
        let name = if by_group { plan.group.as_str() } else { plan.name.as_str() };
        match rows.iter().position(|(row, _)| *row == name) {
            Some(i) => rows[i].1.push(*span),
            None if rows.len() < 2 * MOST_ROWS => rows.push((name, vec![*span])),
            None => {}
        }
    }
    rows
}
