//! `pipe why STEP`: what differs from the nearest earlier result, traced upstream to its cause.

use std::collections::HashMap;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use engine::cause;
use engine::executor::Options;
use engine::forecast::{self, Forecast, Reason};
use engine::key::{Difference, PreImage};
use engine::plan::Plan;
use engine::recents::Recents;

use super::forecast::{at, causes, difference, fetches, to_json};
use crate::cli::OfStep;
use crate::out::{self, clean};

pub fn why(args: OfStep) -> Result<ExitCode> {
    let cache = super::open_cache(args.settings.cache.as_deref())?;
    let loaded = super::load_for_step(args.file.as_deref(), &args.settings, &cache)?;
    let plan = &loaded.plan;
    let step = super::one_step(&loaded, &args.step)?;
    let steps = Options { only: Some(step), ..Options::default() }.selection(plan);
    let recents = Recents::new(&cache);
    let seen = forecast::see(plan, &steps, &cache, &super::hub());
    let reasons = Some(&recents);
    let found = forecast::forecast_seen(plan, &steps, super::REGISTRY, &cache, &seen, reasons)?;
    if args.json {
        let all: Vec<_> = steps.iter().map(|&s| explained(plan, &found, &recents, s)).collect();
        out::line(serde_json::to_string_pretty(&all)?);
        return Ok(ExitCode::SUCCESS);
    }
    let name = clean(&plan.steps[step].name);
    let why = Why { plan, found: &found, recents: &recents };
    match &found[&step] {
        Forecast::Cached { entry } => {
            out::line(format!("`{name}` is cached (key {}): nothing would run", entry.key.short()));
            if let Some((_, differences)) = other(&recents, plan, &found, step) {
                out::line("it differs from the nearest other result in:");
                why.tell(step, &differences, "  ", &mut Vec::new());
            }
        }
        Forecast::Broken { message } => {
            out::line(format!("`{name}` cannot run: {}", clean(message)))
        }
        _ => {
            out::line(format!("`{name}` would run:"));
            why.explain(step, "  ", &mut Vec::new());
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The forecast of a step as JSON, with what is behind it; of a cached one, with that in which it
/// differs from the nearest other result.
fn explained(
    plan: &Plan,
    found: &HashMap<usize, Forecast>,
    recents: &Recents<'_>,
    step: usize,
) -> serde_json::Value {
    let mut object = to_json(plan, step, &found[&step]);
    let mut behind = causes(plan, found, recents, step);
    if let Some((nearest, differences)) = other(recents, plan, found, step) {
        let words = differences.iter().map(|d| difference(plan, step, d));
        object["differs"] = words.collect::<Vec<_>>().into();
        object["nearest"] = serde_json::json!(nearest.key);
        behind =
            super::forecast::behind(plan, found, recents, (step, &differences), &mut Vec::new());
    }
    if !behind.is_empty() {
        object["causes"] = behind.into();
    }
    object
}

/// Of a cached step, the nearest other result.
fn other(
    recents: &Recents<'_>,
    plan: &Plan,
    found: &HashMap<usize, Forecast>,
    step: usize,
) -> Option<(Arc<cache::Entry>, Vec<Difference>)> {
    let Forecast::Cached { entry } = &found[&step] else { return None };
    let image = PreImage::parse(&entry.preimage)?;
    forecast::nearest(recents, &plan.steps[step].name, &image, &entry.key)
}

/// What explanations are made from.
struct Why<'a> {
    plan: &'a Plan,
    found: &'a HashMap<usize, Forecast>,
    recents: &'a Recents<'a>,
}

impl Why<'_> {
    /// Follows what is unknown upstream to the steps that are known to run, each told once.
    fn explain(&self, step: usize, indent: &str, told: &mut Vec<usize>) {
        match &self.found[&step] {
            Forecast::Runs { reason: Reason::First, .. } => {
                out::line(format!("{indent}nothing like it was done before"));
            }
            Forecast::Runs { reason: Reason::Always, .. } => {
                let place = at(&self.plan.steps[step].place);
                out::line(format!("{indent}it says `cache: false` ({})", clean(&place)));
            }
            Forecast::Runs { reason: Reason::Changed { differences, .. }, .. } => {
                self.tell(step, differences, indent, told);
            }
            Forecast::Unknown { because } => {
                for &upstream in because {
                    let name = clean(&self.plan.steps[upstream].name);
                    if told.contains(&upstream) {
                        continue;
                    }
                    told.push(upstream);
                    out::line(format!(
                        "{indent}`{name}`, which it needs, would run (if that gives the same bytes, this is cut off):"
                    ));
                    self.explain(upstream, &format!("{indent}  "), told);
                }
            }
            Forecast::Fetches { names } => {
                out::line(format!("{indent}{} first", clean(&fetches(names))));
            }
            Forecast::Broken { message } => out::line(format!("{indent}{}", clean(message))),
            Forecast::Cached { .. } => {}
        }
    }
}

impl Why<'_> {
    /// Tells differences, and behind each input that changed, what changed it.
    fn tell(&self, step: usize, differences: &[Difference], indent: &str, told: &mut Vec<usize>) {
        for one in differences {
            out::line(format!("{indent}{}", difference(self.plan, step, one)));
            for cause in cause::behind(self.plan, self.found, self.recents, step, one) {
                let name = clean(&self.plan.steps[cause.step].name);
                if told.contains(&cause.step) {
                    out::line(format!("{indent}  `{name}`: see above"));
                    continue;
                }
                told.push(cause.step);
                if cause.differences.is_empty() {
                    out::line(format!(
                        "{indent}  `{name}` made other bytes; what it was made from before is not known"
                    ));
                    continue;
                }
                out::line(format!("{indent}  `{name}` made other bytes, since then:"));
                self.tell(cause.step, &cause.differences, &format!("{indent}    "), told);
            }
        }
    }
}
