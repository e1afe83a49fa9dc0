//! `pipe diff RUN RUN`: settings, parameters, metrics and artifacts of two runs side by side.

use std::process::ExitCode;

use anyhow::Result;
use engine::history::diff::{self, Part, Row, Side};
use engine::history::facts;
use engine::run::Past;
use serde_json::Value;

use crate::cli::look::Diff;
use crate::out::{self, Paint, clean};
use crate::table::{Cell, Format, Table, short};

/// Longer values are cut in a table for people.
const MOST: usize = 48;

pub fn diff(args: Diff) -> Result<ExitCode> {
    let cache = super::open_cache(args.cache.as_deref())?;
    let load = |run: &String| Past::load(&super::run_dir(&cache, Some(run))?);
    let (a, b) = (load(&args.a)?, load(&args.b)?);
    let (of_a, of_b) = (facts::facts(&a, &cache), facts::facts(&b, &cache));
    let rows = diff::diff(
        Side { info: &a.info, steps: &a.plan.steps, facts: &of_a },
        Side { info: &b.info, steps: &b.plan.steps, facts: &of_b },
    );
    let same = rows.iter().filter(|row| row.same()).count();
    let differ = rows.len() - same;
    let format = Format::of(args.json, args.csv);
    let exact = format != Format::Text;
    let names = [&a.info.id, &b.info.id].map(|id| if exact { id.clone() } else { clean(id) });
    let [first, second] = match names[0] == names[1] {
        true => [format!("{} (a)", names[0]), format!("{} (b)", names[1])],
        false => names,
    };
    let mut table = Table {
        columns: vec!["what".into(), "name".into(), first, second, "change".into()],
        rows: Vec::new(),
    };
    for row in rows.iter().filter(|row| args.all || !row.same()) {
        table.rows.push(vec![
            Cell::Text(row.part.word().into()),
            Cell::Text(row.name.clone()),
            cell(row, &row.a, exact),
            cell(row, &row.b, exact),
            change(row, exact),
        ]);
    }
    if exact || !table.rows.is_empty() {
        table.print(format);
    }
    if !exact {
        let line = format!("{differ} differ, {same} are the same");
        out::line(Paint::stdout().dim(&line));
    }
    Ok(ExitCode::SUCCESS)
}

fn cell(row: &Row, value: &Option<Value>, exact: bool) -> Cell {
    match value {
        None => Cell::Nothing,
        Some(value) if exact => Cell::from(value),
        Some(Value::String(digest)) if row.part == Part::Artifact => {
            Cell::Text(digest.chars().take(12).collect())
        }
        Some(Value::Number(number)) => Cell::Text(short(number.as_f64().unwrap_or(f64::NAN))),
        Some(value) => {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_string);
            Cell::Text(match text.chars().count() {
                0..=MOST => text,
                _ => text.chars().take(MOST - 1).chain(['…']).collect(),
            })
        }
    }
}

/// The change of a metric, as a share of what it was.
fn change(row: &Row, exact: bool) -> Cell {
    let number = |value: &Option<Value>| value.as_ref().and_then(Value::as_f64);
    match (row.part, number(&row.a), number(&row.b)) {
        (Part::Metric, Some(a), Some(b)) if a != 0.0 && a != b => {
            let share = (b - a) / a.abs();
            Cell::Shown(share, format!("{:+.2} %", 100.0 * share))
        }
        _ if exact => Cell::Nothing,
        _ => Cell::Text(String::new()),
    }
}
