//! `pipe why STEP`: what differs from the nearest earlier result, traced upstream to its cause.

use std::collections::HashMap;
use std::process::ExitCode;

use anyhow::Result;
use engine::executor::Options;
use engine::forecast::{self, Forecast, Reason};
use engine::key::{Difference, PreImage};
use engine::plan::{Plan, Source};

use super::forecast::{difference, fetches, to_json};
use crate::cli::OfStep;
use crate::out::{self, clean};

pub fn why(args: OfStep) -> Result<ExitCode> {
    let cache = super::open_cache(args.settings.cache.as_deref())?;
    let loaded = super::load_for_step(args.file.as_deref(), &args.settings, &cache)?;
    let plan = &loaded.plan;
    let step = super::one_step(&loaded, &args.step)?;
    let steps = Options { only: Some(step), ..Options::default() }.selection(plan);
    let found = forecast::forecast(plan, &steps, super::REGISTRY, &cache, &super::hub())?;
    if args.json {
        let all: Vec<_> = steps.iter().map(|&s| to_json(plan, s, &found[&s])).collect();
        out::line(serde_json::to_string_pretty(&all)?);
        return Ok(ExitCode::SUCCESS);
    }
    let name = clean(&plan.steps[step].name);
    match &found[&step] {
        Forecast::Cached { entry } => {
            out::line(format!("`{name}` is cached (key {}): nothing would run", entry.key.short()));
            let image = PreImage::parse(&entry.preimage);
            let earlier = image.and_then(|image| {
                forecast::nearest(&cache, &plan.steps[step].name, &image, &entry.key)
            });
            if let Some((_, differences)) = earlier {
                out::line("it differs from the nearest other result in:");
                tell(plan, step, &differences, "  ");
            }
        }
        Forecast::Broken { message } => {
            out::line(format!("`{name}` cannot run: {}", clean(message)))
        }
        _ => {
            out::line(format!("`{name}` would run:"));
            explain(plan, step, &found, "  ", &mut Vec::new());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Follows what is unknown upstream to the steps that are known to run, each told once.
fn explain(
    plan: &Plan,
    step: usize,
    found: &HashMap<usize, Forecast>,
    indent: &str,
    told: &mut Vec<usize>,
) {
    match &found[&step] {
        Forecast::Runs { reason: Reason::First, .. } => {
            out::line(format!("{indent}nothing like it was done before"));
        }
        Forecast::Runs { reason: Reason::Always, .. } => {
            out::line(format!("{indent}it says `cache: false`"))
        }
        Forecast::Runs { reason: Reason::Changed { differences, .. }, .. } => {
            tell(plan, step, differences, indent);
        }
        Forecast::Unknown { because } => {
            for &upstream in because {
                let name = clean(&plan.steps[upstream].name);
                if told.contains(&upstream) {
                    continue;
                }
                told.push(upstream);
                out::line(format!(
                    "{indent}`{name}`, which it needs, would run (if that gives the same bytes, this is cut off):"
                ));
                explain(plan, upstream, found, &format!("{indent}  "), told);
            }
        }
        Forecast::Fetches { names } => {
            out::line(format!("{indent}{} first", clean(&fetches(names))));
        }
        Forecast::Broken { message } => out::line(format!("{indent}{}", clean(message))),
        Forecast::Cached { .. } => {}
    }
}

fn tell(plan: &Plan, step: usize, differences: &[Difference], indent: &str) {
    for one in differences {
        out::line(format!("{indent}{}", difference(plan, step, one)));
        if let Difference::Input { port, .. } = one {
            let from = plan.steps[step].inputs.iter().find(|p| p.name == *port);
            let steps = from.into_iter().flat_map(|p| &p.sources).filter_map(|s| match s {
                Source::Step { step, .. } => Some(plan.steps[*step].name.as_str()),
                _ => None,
            });
            let mut steps: Vec<&str> = steps.take(1).collect();
            if let Some(upstream) = steps.pop() {
                out::line(format!(
                    "{indent}  hint: `pipe why {}` goes on from there",
                    clean(upstream)
                ));
            }
        }
    }
}
