//! `pipe graph`: the steps of a pipeline as a drawing.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use engine::event::Event;
use engine::forecast::{self, Forecast};
use engine::graph::{self, Drawing, State};
use engine::plan::Plan;
use engine::run::Past;

use crate::cli::look::{Format, Graph};
use crate::out::{self, Paint};

/// Bigger pictures help nobody.
const MOST_DRAWN: usize = 2000;

pub fn graph(args: Graph) -> Result<ExitCode> {
    let loaded = super::load(args.file.as_deref(), &args.settings)?;
    let format = args.format.unwrap_or_else(|| by_ending(args.output.as_deref()));
    let terminal = out::terminal_width();
    let looked = args.state || (format == Format::Text && terminal.is_some());
    let states = match looked {
        true => Some(states(&loaded.plan, args.settings.cache.as_deref())?),
        false => None,
    };
    let graph = graph::Graph::of(&loaded.plan, args.expand, states.as_ref());
    let text = match format {
        Format::Dot => graph.dot(),
        Format::Mermaid => graph.mermaid(),
        Format::Svg if graph.nodes.len() > MOST_DRAWN => bail!(super::Wrong(format!(
            "a picture of {} nodes shows nothing\nhint: leave `--expand` away, or take `--format dot`",
            graph.nodes.len()
        ))),
        Format::Svg => graph.svg(),
        Format::Text => {
            let wide = terminal.unwrap_or(100);
            let paint = if args.output.is_some() { Paint(false) } else { Paint::stdout() };
            in_words(&graph, wide, paint)
        }
    };
    match &args.output {
        Some(path) => std::fs::write(path, text)
            .with_context(|| format!("cannot write {}", path.display()))?,
        None => out::line(text.trim_end_matches('\n')),
    }
    Ok(ExitCode::SUCCESS)
}

fn by_ending(output: Option<&Path>) -> Format {
    match output.and_then(Path::extension).and_then(|ending| ending.to_str()) {
        Some("svg") => Format::Svg,
        Some("dot" | "gv") => Format::Dot,
        Some("mmd" | "mermaid") => Format::Mermaid,
        _ => Format::Text,
    }
}

/// The drawing, or a list where that is too wide.
fn in_words(graph: &graph::Graph, wide: usize, paint: Paint) -> String {
    let small = graph.nodes.len() <= MOST_DRAWN;
    let drawing = small.then(|| graph.drawing()).filter(|drawing| drawing.width <= wide);
    painted(&drawing.unwrap_or_else(|| graph.list()), paint)
}

fn painted(drawing: &Drawing, paint: Paint) -> String {
    let mut text = String::new();
    for row in &drawing.rows {
        let pieces = row.iter().map(|piece| match (piece.state, piece.name) {
            (Some(State::Cached), _) => paint.green(&piece.text),
            (Some(State::Maybe), _) => paint.yellow(&piece.text),
            (Some(State::Failed | State::Broken), _) => paint.bold_red(&piece.text),
            (_, true) => paint.bold(&piece.text),
            (_, false) if piece.text.trim().is_empty() => piece.text.clone(),
            (_, false) => paint.dim(&piece.text),
        });
        text += pieces.collect::<String>().trim_end();
        text.push('\n');
    }
    text
}

/// What a run would do now, and what failed in the newest one.
fn states(plan: &Plan, cache: Option<&Path>) -> Result<HashMap<usize, State>> {
    let cache = super::open_cache(cache)?;
    let steps: Vec<usize> = (0..plan.steps.len()).collect();
    let found = forecast::forecast(plan, &steps, super::REGISTRY, &cache, &super::hub())?;
    let failed = failed(&cache, &plan.name)?;
    let state = |(step, forecast): (usize, Forecast)| {
        let state = match forecast {
            Forecast::Cached { .. } => State::Cached,
            _ if failed.contains(&plan.steps[step].name) => State::Failed,
            Forecast::Runs { .. } => State::Runs,
            Forecast::Unknown { .. } | Forecast::Fetches { .. } => State::Maybe,
            Forecast::Broken { .. } => State::Broken,
        };
        (step, state)
    };
    Ok(found.into_iter().map(state).collect())
}

/// Steps that failed for good in the newest run in this directory, if that was one of `pipeline`.
fn failed(cache: &cache::Cache, pipeline: &str) -> Result<HashSet<String>> {
    let Some(dir) = super::newest_run(cache)? else { return Ok(HashSet::new()) };
    if engine::run::info(&dir)?.pipeline != pipeline {
        return Ok(HashSet::new());
    }
    let past = Past::load(&dir)?;
    let name = |event: &Event| match event {
        Event::Failed { step, retry: false, .. } => {
            past.plan.steps.get(*step).map(|step| step.name.clone())
        }
        _ => None,
    };
    Ok(past.events.iter().filter_map(|stamped| name(&stamped.event)).collect())
}
