//! `pipe compare STEP`: the instances of a step in one table, with their matrix values.

use std::collections::BTreeSet;
use std::process::ExitCode;

use anyhow::Result;
use engine::history::facts::{self, Facts};
use engine::plan::Plan;
use engine::run::Past;

use crate::cli::look::Compare;
use crate::out::{self, duration};
use crate::table::{Cell, Format, Table};

/// More columns are for programs.
const MOST_SHOWN: usize = 5;

pub fn compare(args: Compare) -> Result<ExitCode> {
    let cache = super::open_cache(args.cache.as_deref())?;
    let past = Past::load(&super::run_dir(&cache, args.run.as_deref())?)?;
    let steps = past.plan.select(&args.step).map_err(super::Wrong)?;
    let all = facts::facts(&past, &cache);
    let format = Format::of(args.json, args.csv);
    let mut metrics = meant(&args, &steps, &all)?;
    let sort = match &args.sort {
        Some(sort) => Some(facts::name(sort, names(&steps, &all)).map_err(super::Wrong)?),
        None => None,
    };
    if metrics.is_empty() {
        metrics = differing(&steps, &all);
        if format == Format::Text && metrics.len() > MOST_SHOWN {
            let more = metrics.split_off(MOST_SHOWN).len();
            out::message(format!(
                "note    {more} more metrics differ: `--metric NAME`, or all with `--csv`"
            ));
        }
    }
    metrics.extend(sort.clone().filter(|sort| !metrics.contains(sort)));
    let mut table = table(&past.plan, &steps, &all, &metrics);
    if let Some(sort) = sort {
        let at = table.columns.iter().position(|column| *column == sort).unwrap_or_default();
        table.sort(at, args.reverse);
    }
    table.print(format);
    Ok(ExitCode::SUCCESS)
}

/// The metrics that were asked for by `--metric`.
fn meant(args: &Compare, steps: &[usize], all: &[Facts]) -> Result<Vec<String>> {
    let name = |text: &String| Ok(facts::name(text, names(steps, all)).map_err(super::Wrong)?);
    args.metrics.iter().map(name).collect()
}

fn names<'a>(steps: &[usize], all: &'a [Facts]) -> BTreeSet<&'a str> {
    steps.iter().flat_map(|&step| all[step].metrics.keys().map(String::as_str)).collect()
}

/// Metrics that are not the same for all, the plainest names first; of a single step, all.
fn differing(steps: &[usize], all: &[Facts]) -> Vec<String> {
    let differs = |name: &&str| {
        let mut values = steps.iter().map(|&step| all[step].metrics.get(*name));
        let first = values.next();
        steps.len() == 1 || values.any(|value| Some(value) != first)
    };
    let mut found: Vec<&str> = names(steps, all).into_iter().filter(differs).collect();
    found.sort_by_key(|name| name.matches('.').count());
    found.into_iter().map(String::from).collect()
}

fn table(plan: &Plan, steps: &[usize], all: &[Facts], metrics: &[String]) -> Table {
    let mut axes: Vec<&str> = Vec::new();
    for (axis, _) in steps.iter().flat_map(|&step| &plan.steps[step].coords) {
        if !axes.contains(&axis.as_str()) {
            axes.push(axis);
        }
    }
    let fixed = ["step", "state", "time"].map(String::from);
    let axis_names = axes.iter().map(|axis| axis.to_string());
    let columns = fixed.into_iter().chain(axis_names).chain(metrics.iter().cloned()).collect();
    let row = |&step: &usize| {
        let (planned, facts) = (&plan.steps[step], &all[step]);
        let state = if facts.state.is_empty() { "pending" } else { facts.state };
        let time = facts.seconds.map_or(Cell::Nothing, |s| Cell::Shown(s, duration(s)));
        let mut row = vec![Cell::Text(planned.name.clone()), Cell::Text(state.into()), time];
        row.extend(axes.iter().map(|axis| {
            let value = planned.coords.iter().find(|(name, _)| name == axis);
            value.map_or(Cell::Nothing, |(_, value)| Cell::from(value))
        }));
        row.extend(metrics.iter().map(|name| {
            facts.metrics.get(name).map_or(Cell::Nothing, |value| Cell::Number(*value))
        }));
        row
    };
    Table { columns, rows: steps.iter().map(row).collect() }
}
