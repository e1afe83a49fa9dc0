//! The top of the page: what was run, how it ended, what the student is worth, what failed.

use std::fmt::Write;

use super::costs;
use super::data::{Outcome, Run, State};
use super::markup::{bytes, clip, count, duration, esc, num, percent};
use super::metrics::{Evaluation, Metrics};
use crate::event::Failure;
use crate::run::timestamp;

/// More failures are only counted.
const MOST_FAILURES: usize = 20;

/// Evaluations with the step they belong to, in the plan's order. Where some compare a student with
/// its teacher, those that look at one model alone (a teacher before it is used) are left out.
pub(super) fn evaluations<'a>(run: &'a Run) -> Vec<(&'a super::data::Step<'a>, &'a Evaluation)> {
    let found = run.steps.iter().filter_map(|step| match &step.metrics {
        Metrics::Evaluation(evaluation) => Some((step, evaluation.as_ref())),
        _ => None,
    });
    let mut found: Vec<_> = found.collect();
    if found.iter().any(|(_, evaluation)| evaluation.compares()) {
        found.retain(|(_, evaluation)| evaluation.compares());
    }
    found
}

/// Title, sentence, tiles.
pub(super) fn headline(run: &Run) -> String {
    let info = &run.past.info;
    let (class, word) = match run.outcome {
        Outcome::Done => ("ran", "done"),
        Outcome::Failed => ("failed", "failed"),
        Outcome::Interrupted => ("skipped", "interrupted"),
        Outcome::Open => ("running", "no end recorded"),
    };
    let mut out = format!(
        "<header><h1>{} <span class=\"state {class}\">{word}</span></h1><p class=sub>{} · {} · run <code>{}</code></p></header>",
        clip(&info.pipeline, 120),
        when(info.started_s),
        duration(run.totals.seconds),
        clip(&info.id, 60),
    );
    if run.outcome == Outcome::Open {
        out.push_str("<p class=lead>The record has no end: the run still goes on, or was killed. What follows is what had happened by its last event.</p>");
    }
    let found = evaluations(run);
    if let [(_, evaluation)] = found.as_slice() {
        out.push_str(&sentence(evaluation));
    }
    out.push_str(&course(run));
    out.push_str("<div class=tiles>");
    match found.as_slice() {
        [] => {}
        [(_, evaluation)] => result_tiles(&mut out, evaluation),
        many => best_tile(&mut out, many),
    }
    work_tiles(&mut out, run);
    out.push_str("</div>");
    out
}

/// `2026-11-23 17:01:02 UTC`.
fn when(seconds: f64) -> String {
    let text = timestamp(seconds.clamp(0.0, 2.5e11) as u64);
    let part = |from: usize, to: usize| text.get(from..to).unwrap_or("??").to_string();
    let (date, time) = (&text[..text.len() - 7], text.len() - 6);
    let (year, rest) = date.split_at(date.len() - 4);
    let clock = [part(time, time + 2), part(time + 2, time + 4), part(time + 4, time + 6)];
    format!("{year}-{}-{} {} UTC", &rest[..2], &rest[2..], clock.join(":"))
}

/// How the run went, in a sentence or two.
fn course(run: &Run) -> String {
    let totals = &run.totals;
    let steps = |n: usize| count(n, "step");
    let mut text = match run.outcome {
        Outcome::Open => return String::new(),
        Outcome::Done => format!("All {} are done.", steps(totals.ran + totals.cached)),
        Outcome::Failed => format!("<b>{} failed</b>.", steps(totals.failed)),
        Outcome::Interrupted => "The run was stopped.".into(),
    };
    let cost = costs::total(run);
    if totals.ran > 0 {
        let on = match cost.gpu_seconds {
            s if s > 0.0 => format!(" ({})", costs::gpu_hours(s)),
            _ => String::new(),
        };
        text +=
            &format!(" {} ran here for {}{on} in all.", steps(totals.ran), duration(cost.seconds));
    }
    if totals.cached > 0 {
        let saved = duration(totals.saved_s);
        text += &format!(
            " The results of {} were there already, which saved {saved}.",
            steps(totals.cached)
        );
    }
    if totals.skipped > 0 {
        text += &format!(" {} did not begin.", steps(totals.skipped));
    }
    if run.outcome != Outcome::Done {
        text += " What is done is kept: run again, and it goes on from there.";
    }
    format!("<p class=lead>{text}</p>")
}

/// What a ratio of perplexities means.
fn judgement(ratio: f64) -> &'static str {
    match ratio {
        r if r <= 1.0 => "is as good as its teacher",
        r if r <= 1.05 => "is almost as good as its teacher",
        r if r <= 1.25 => "is somewhat behind its teacher",
        _ => "is far behind its teacher",
    }
}

fn sentence(evaluation: &Evaluation) -> String {
    let get = |name: &str| Some((*evaluation.student.get(name)?, *evaluation.teacher.get(name)?));
    let mut parts = Vec::new();
    if let Some((student, teacher)) = get("perplexity") {
        let ratio = evaluation.ratio("perplexity");
        let judged = ratio.map_or("was measured", judgement);
        let ratio = ratio.map(|r| format!(", {} times", decimal(r)));
        parts.push(format!(
            "<b>{judged}</b> on held-out text (perplexity {}{} the teacher’s {})",
            num(student),
            ratio.unwrap_or_else(|| " against".into()),
            num(teacher),
        ));
    }
    if let Some((student, teacher)) = get("recall") {
        let chance = evaluation.chance().map(|c| format!("; guessing gives {}", percent(c)));
        let (student, teacher) = (percent(student), percent(teacher));
        let chance = chance.unwrap_or_default();
        parts.push(format!(
            "recalls <b>{student}</b> of the facts asked for (teacher {teacher}{chance})"
        ));
    }
    if let Some((teacher, student)) = evaluation.benchmarks.averages() {
        let (student, teacher) = (percent(student), percent(teacher));
        parts.push(format!(
            "answers <b>{student}</b> of the benchmarks’ questions (teacher {teacher})"
        ));
    }
    let Some(last) = parts.pop() else { return String::new() };
    let first = parts.join(", ");
    let and = if first.is_empty() { "" } else { " and " };
    format!("<p class=lead>The student {first}{and}{last}.</p>")
}

/// A ratio near one: three decimals.
pub(super) fn decimal(ratio: f64) -> String {
    if (0.1..100.0).contains(&ratio) { format!("{ratio:.3}") } else { num(ratio) }
}

fn tile(out: &mut String, class: &str, name: &str, value: &str, below: &str) {
    let _ = write!(
        out,
        "<div class=\"tile {class}\"><span>{name}</span><b>{value}</b><small>{below}</small></div>"
    );
}

fn result_tiles(out: &mut String, evaluation: &Evaluation) {
    let get = |name: &str| Some((*evaluation.student.get(name)?, *evaluation.teacher.get(name)?));
    if let Some((student, teacher)) = get("perplexity") {
        let ratio = evaluation.ratio("perplexity").map(|r| format!(" · ratio {}", decimal(r)));
        let value = format!("{} <i>→</i> {}", num(teacher), num(student));
        let below = format!("teacher → student{}", ratio.unwrap_or_default());
        tile(out, "good", "Perplexity", &value, &below);
    }
    if let Some((student, teacher)) = get("recall") {
        let chance = evaluation.chance().map(|c| format!(" · chance {}", percent(c)));
        let from = percent(teacher).replace(" %", "");
        let value = format!("{from} <i>→</i> {}", percent(student));
        let below = format!("teacher → student{}", chance.unwrap_or_default());
        tile(out, "good", "Recall accuracy", &value, &below);
    }
    if let Some(share) = evaluation.agree() {
        tile(out, "good", "Agreement", &percent(share), "tokens on which both say the same");
    }
}

fn best_tile(out: &mut String, many: &[(&super::data::Step, &Evaluation)]) {
    let ratios =
        many.iter().filter_map(|(step, e)| Some((e.ratio("perplexity")?, step.plan.name.as_str())));
    if let Some((ratio, name)) = ratios.min_by(|a, b| a.0.total_cmp(&b.0)) {
        let value = format!("{} ×", decimal(ratio));
        let below = format!("the teacher’s, in <code>{}</code>", clip(name, 60));
        tile(out, "good", "Best perplexity", &value, &below);
    }
    let recalls = many
        .iter()
        .filter_map(|(step, e)| Some((*e.student.get("recall")?, step.plan.name.as_str())));
    if let Some((recall, name)) = recalls.max_by(|a, b| a.0.total_cmp(&b.0)) {
        let below = format!("in <code>{}</code>", clip(name, 60));
        tile(out, "good", "Best recall", &percent(recall), &below);
    }
    tile(out, "", "Evaluations", &many.len().to_string(), "compared below");
}

fn work_tiles(out: &mut String, run: &Run) {
    let totals = &run.totals;
    let mut parts = Vec::new();
    for (n, word) in [
        (totals.ran, "ran"),
        (totals.cached, "cached"),
        (totals.failed, "failed"),
        (totals.skipped, "skipped"),
    ] {
        if n > 0 || word == "failed" {
            parts.push(format!("{n} {word}"));
        }
    }
    let open = |state| run.steps.iter().filter(|step| step.state == state).count();
    for state in [State::Running, State::Pending] {
        if open(state) > 0 {
            parts.push(format!("{} {}", open(state), state.word()));
        }
    }
    let asked = run.steps.iter().filter(|step| step.state != State::Apart).count();
    let class = if totals.failed > 0 { "bad" } else { "" };
    tile(out, class, "Steps", &asked.to_string(), &parts.join(" · "));
    let cost = costs::total(run);
    let mut below = format!("work of {}", count(cost.ran, "step"));
    if cost.gpu_seconds > 0.0 {
        below += &format!(" · {}", costs::gpu_hours(cost.gpu_seconds));
    }
    below += &format!(" · {} made", bytes(cost.bytes));
    tile(out, "", "Cost", &duration(cost.seconds), &below);
    let below = match totals.cached {
        0 => "no result was there yet".into(),
        n => format!("what {} took when they ran", count(n, "cached step")),
    };
    tile(out, "", "Time saved by the cache", &duration(totals.saved_s), &below);
}

/// The red box: every step that failed, why, and the end of its log.
pub(super) fn failures(run: &Run) -> String {
    let all: Vec<_> = run.failures().collect();
    if all.is_empty() {
        return String::new();
    }
    let mut out = format!("<section class=failures><h2>{} failed</h2>", count(all.len(), "step"));
    for (step, failed) in all.iter().take(MOST_FAILURES) {
        let _ = write!(
            out,
            "<article><h3><code>{}</code> <span>{}</span></h3><p>{}</p>",
            clip(&step.plan.name, 200),
            kind(failed.failure),
            clip(failed.message, 4000)
        );
        if !failed.log.trim().is_empty() {
            let log = clip(failed.log, 6000);
            let _ = write!(out, "<p class=small>End of its log:</p><pre>{log}</pre>");
        }
        let place = &step.plan.place;
        if place.line > 0 {
            let _ = write!(
                out,
                "<p class=small>Written at {}:{}.</p>",
                esc(file(&place.file)),
                place.line
            );
        }
        out.push_str("</article>");
    }
    if all.len() > MOST_FAILURES {
        let _ = write!(out, "<p>and {} more.</p>", all.len() - MOST_FAILURES);
    }
    out.push_str("</section>");
    out
}

/// The base name of a file, and what is no file (`--set`) as it is.
pub(super) fn file(path: &str) -> &str {
    path.rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or(path)
}

fn kind(failure: Failure) -> &'static str {
    match failure {
        Failure::Error => "error",
        Failure::Panic => "panic in the stage",
        Failure::Diverged => "diverged",
        Failure::Crash => "the worker crashed",
        Failure::OutOfMemory => "out of memory",
        Failure::Fault => "the device failed",
        Failure::Timeout => "timed out",
        Failure::Cancelled => "stopped",
        Failure::Preempted => "lost its job",
        Failure::Lost => "lost its node",
        Failure::Input => "an input file is missing or changed",
    }
}

#[cfg(test)]
mod tests {
    use super::when;

    #[test]
    fn moments_are_dates() {
        assert_eq!(when(1_795_453_262.5), "2026-11-23 17:01:02 UTC");
        assert_eq!(when(-1.0), "1970-01-01 00:00:00 UTC");
        assert!(when(f64::NAN).ends_with("UTC") && when(f64::MAX).ends_with("UTC"));
    }
}
