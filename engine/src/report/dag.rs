//! The graph of a run's plan: a node for each step of the file (its matrix instances together).

use std::collections::BTreeMap;

use super::data::{Run, State};
use super::markup::duration;
use crate::graph::svg::{self, Label};

/// More nodes are not drawn.
const MOST_NODES: usize = 150;

/// Draws the graph of `run`.
pub(super) fn dag(run: &Run) -> String {
    let n = run.groups.len();
    if n == 0 {
        return "<p class=none>The plan has no steps.</p>".into();
    }
    if n > MOST_NODES {
        return format!("<p class=none>The graph has {n} nodes, too many to be drawn.</p>");
    }
    let labels: Vec<Label> = (0..n).map(|group| label(run, group)).collect();
    let needs: Vec<Vec<usize>> = run.groups.iter().map(|group| group.needs.clone()).collect();
    format!("<div class=scroll>{}</div>", svg::draw(&labels, &needs, ""))
}

fn label(run: &Run, group: usize) -> Label {
    let link = Some(format!("#g{group}"));
    let group = &run.groups[group];
    let steps = || group.steps.iter().map(|&step| &run.steps[step]);
    let state = steps().map(|step| step.state).max().unwrap_or(State::Apart);
    let mut counts: BTreeMap<State, usize> = BTreeMap::new();
    steps().for_each(|step| *counts.entry(step.state).or_default() += 1);
    let mut words: Vec<String> = match counts.len() {
        1 => vec![state.word().into()],
        _ => counts.iter().rev().map(|(state, n)| format!("{n} {}", state.word())).collect(),
    };
    let seconds: Vec<f64> = steps().filter_map(|step| step.seconds).collect();
    if !seconds.is_empty() && state != State::Skipped {
        words.push(duration(seconds.iter().sum()));
    }
    let many = group.steps.len();
    let mut name: String = group.name.chars().take(34).collect();
    if many > 1 {
        name = format!("{name} ×{many}");
    }
    let title = format!("{} (stage {}): {}", group.name, group.stage, words.join(", "));
    Label { name, below: words.join(" · "), class: state.word(), title, link }
}
