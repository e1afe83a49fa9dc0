//! `pipe plan`: what a run would do, step by step, and why.

use std::process::ExitCode;

use anyhow::Result;
use engine::forecast::{self, Forecast, Reason};
use serde_json::Value;

use super::forecast::{device, difference, state, to_json};
use crate::cli::Plan;
use crate::out::{self, Paint, clean};

pub fn plan(args: Plan) -> Result<ExitCode> {
    let loaded = super::load(args.file.as_deref(), &args.settings)?;
    let cache = super::open_cache(args.settings.cache.as_deref())?;
    let plan = &loaded.plan;
    let steps: Vec<usize> = (0..plan.steps.len()).collect();
    let found = forecast::forecast(plan, &steps, super::REGISTRY, &cache, &super::hub())?;
    let broken = found.values().any(|f| matches!(f, Forecast::Broken { .. }));
    let code = if broken { ExitCode::from(2) } else { ExitCode::SUCCESS };
    if args.json {
        let all: Vec<Value> = steps.iter().map(|s| to_json(plan, *s, &found[s])).collect();
        out::line(serde_json::to_string_pretty(&all)?);
        return Ok(code);
    }
    let paint = Paint::stdout();
    let width = plan.steps.iter().map(|s| s.name.chars().count()).max().unwrap_or(0).min(32);
    let mut counts = [0usize; 4];
    for &step in &steps {
        let (word, text) = state(plan, &found[&step]);
        let (at, painted) = match word {
            "cached" => (0, paint.green("cached")),
            "runs" => (1, paint.bold("runs  ")),
            "maybe" => (2, paint.yellow("maybe ")),
            _ => (3, paint.bold_red("broken")),
        };
        counts[at] += 1;
        let name = clean(&plan.steps[step].name);
        let line = format!("{painted}  {name:<width$}  {}", clean(&text));
        let device = device(&plan.steps[step]).map(|device| paint.dim(&format!(" ({device})")));
        out::line(format!("{}{}", line.trim_end(), device.unwrap_or_default()));
        if let Forecast::Runs { reason: Reason::Changed { differences, .. }, .. } = &found[&step] {
            for one in differences {
                out::line(format!("        {}", paint.dim(&difference(plan, step, one))));
            }
        }
    }
    let [cached, runs, maybe, broken] = counts;
    let mut line = format!("{cached} cached, {runs} to run, {maybe} maybe");
    if broken > 0 {
        line += &format!(", {broken} broken");
    }
    out::line(line);
    Ok(code)
}
