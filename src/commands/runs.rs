//! `pipe runs`: recorded runs in one table, with what they measured.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::Result;
use engine::history::{self, Brief, facts};
use engine::run::{self, Past};

use crate::cli::look::Runs;
use crate::out::{self, duration};
use crate::table::{Cell, Format, Table};

pub fn runs(args: Runs) -> Result<ExitCode> {
    let cache = super::open_cache(args.cache.as_deref())?;
    let cwd = std::env::current_dir()?;
    let all = if args.all { history::all(&cache) } else { history::here(&cache, &cwd) };
    let format = Format::of(args.json, args.csv);
    if all.is_empty() && format == Format::Text {
        let (hint, place) = match args.all {
            true => ("", "in this cache"),
            false => ("; `--all` lists those of other directories", "in this directory"),
        };
        out::message(format!("nothing was run {place}{hint}"));
    }
    let mut own = 0;
    let mut listed: Vec<(Option<usize>, Brief)> = Vec::new();
    for (info, dir) in all {
        own += usize::from(info.cwd == cwd);
        let number = (info.cwd == cwd).then_some(own);
        if listed.len() < args.newest {
            listed.push((number, history::brief(info, dir)?));
        }
    }
    let mut table = Table { columns: columns(args.all), rows: Vec::new() };
    let now = run::now();
    table.rows = listed.iter().map(|(number, brief)| row(*number, brief, now, args.all)).collect();
    let mut wanted = args.metrics.clone();
    wanted.extend(args.sort.clone().filter(|sort| !wanted.contains(sort)));
    if !wanted.is_empty() {
        let measured = listed.iter().map(|(_, brief)| {
            let past = Past::load(&brief.dir)?;
            let facts = facts::facts(&past, &cache);
            Ok(facts::measured(&past, &facts))
        });
        add(&mut table, &wanted, &measured.collect::<Result<Vec<_>>>()?)?;
    }
    if let Some(sort) = &args.sort {
        let at = wanted.iter().position(|name| name == sort).unwrap_or_default();
        table.sort(table.columns.len() - wanted.len() + at, args.reverse);
    }
    table.print(format);
    Ok(ExitCode::SUCCESS)
}

fn columns(all: bool) -> Vec<String> {
    let mut columns =
        vec!["run", "id", "pipeline", "state", "started", "time", "cached", "ran", "failed"];
    if all {
        columns.push("directory");
    }
    columns.into_iter().map(String::from).collect()
}

fn row(number: Option<usize>, brief: &Brief, now: f64, all: bool) -> Vec<Cell> {
    let text = |text: &str| Cell::Text(text.into());
    let count = |of: fn(&engine::event::Summary) -> usize| {
        brief.summary.as_ref().map_or(Cell::Nothing, |summary| Cell::Number(of(summary) as f64))
    };
    let started = brief.info.started_s;
    let mut row = vec![
        number.map_or(Cell::Nothing, |number| Cell::Text(format!("@{number}"))),
        text(&brief.info.id),
        text(&brief.info.pipeline),
        text(brief.state.word()),
        Cell::Shown(started, ago(now - started)),
        Cell::Shown(brief.seconds, duration(brief.seconds)),
        count(|summary| summary.cached),
        count(|summary| summary.ran),
        count(|summary| summary.failed),
    ];
    if all {
        row.push(text(&brief.info.cwd.display().to_string()));
    }
    row
}

/// Adds a column for each metric that is meant.
fn add(table: &mut Table, wanted: &[String], measured: &[BTreeMap<String, f64>]) -> Result<()> {
    for text in wanted {
        let names = measured.iter().flat_map(|run| run.keys().map(String::as_str));
        let name = facts::name(text, names).map_err(super::Wrong)?;
        for (row, run) in table.rows.iter_mut().zip(measured) {
            row.push(run.get(&name).map_or(Cell::Nothing, |value| Cell::Number(*value)));
        }
        table.columns.push(name);
    }
    Ok(())
}

/// `4 min ago`.
pub fn ago(seconds: f64) -> String {
    match seconds as i64 {
        ..60 => "just now".into(),
        s @ 60..3600 => format!("{} min ago", s / 60),
        s @ 3600..86_400 => format!("{} h ago", s / 3600),
        s => format!("{} days ago", s / 86_400),
    }
}
