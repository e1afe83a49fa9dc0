//! `pipe plan`: what a run would do, step by step, and why.

use std::collections::HashMap;
use std::process::ExitCode;

use anyhow::Result;
use cache::{Cache, Entry};
use engine::executor::Options;
use engine::forecast::{self, Forecast, Reason};
use engine::plan::Plan;
use engine::price::{self, Price};
use engine::stage::Cpu;
use serde_json::{Value, json};

use super::forecast::{device, difference, state, to_json};
use crate::cli;
use crate::out::{self, Paint, bytes, clean, duration};

/// Results of a stage that prices are made from.
const RECENT: usize = 200;

pub fn plan(args: cli::Plan) -> Result<ExitCode> {
    let loaded = super::load(args.file.as_deref(), &args.settings)?;
    let cache = super::open_cache(args.settings.cache.as_deref())?;
    let plan = &loaded.plan;
    let steps: Vec<usize> = (0..plan.steps.len()).collect();
    let found = forecast::forecast(plan, &steps, super::REGISTRY, &cache, &super::hub())?;
    let broken = found.values().any(|f| matches!(f, Forecast::Broken { .. }));
    let code = if broken { ExitCode::from(2) } else { ExitCode::SUCCESS };
    let prices = prices(plan, &found, &cache);
    if args.json {
        let one = |step: &usize| {
            let mut object = to_json(plan, *step, &found[step]);
            if let Some(price) = prices.get(step) {
                object["estimate"] = json!({
                    "seconds": price.seconds, "bytes": price.bytes,
                    "work": price.work, "unlike": price.unlike,
                });
            }
            object
        };
        let all: Vec<Value> = steps.iter().map(one).collect();
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
        let price = prices
            .get(&step)
            .map(|price| format!("about {}, {}", duration(price.seconds), bytes(price.bytes)));
        let more: Vec<String> = device(&plan.steps[step]).into_iter().chain(price).collect();
        let more = match more.is_empty() {
            true => String::new(),
            false => paint.dim(&format!(" ({})", more.join(", "))),
        };
        out::line(format!("{}{more}", line.trim_end()));
        if let Forecast::Runs { reason: Reason::Changed { differences, .. }, .. } = &found[&step] {
            for one in differences {
                out::line(format!("        {}", paint.dim(&difference(plan, step, one))));
            }
        }
    }
    told(plan, &found, &prices);
    let [cached, runs, maybe, broken] = counts;
    let mut line = format!("{cached} cached, {runs} to run, {maybe} maybe");
    if broken > 0 {
        line += &format!(", {broken} broken");
    }
    out::line(line);
    Ok(code)
}

/// What each step that is not cached would take, where anything like it was ever done.
fn prices(plan: &Plan, found: &HashMap<usize, Forecast>, cache: &Cache) -> HashMap<usize, Price> {
    let mut known: HashMap<&str, Vec<Entry>> = HashMap::new();
    let mut prices = HashMap::new();
    for (at, step) in plan.steps.iter().enumerate() {
        if matches!(found[&at], Forecast::Cached { .. } | Forecast::Broken { .. }) {
            continue;
        }
        let entries = known
            .entry(&step.stage)
            .or_insert_with(|| cache.recent(&step.stage, &step.name, RECENT));
        prices.extend(price::price(step, entries).map(|price| (at, price)));
    }
    prices
}

/// What a run would take, if anything is known of that.
fn told(plan: &Plan, found: &HashMap<usize, Forecast>, prices: &HashMap<usize, Price>) {
    if prices.is_empty() {
        return;
    }
    let cached = |step: &usize| matches!(found[step], Forecast::Cached { .. });
    let steps: Vec<usize> = (0..plan.steps.len()).filter(|step| !cached(step)).collect();
    let jobs = Options::default().jobs;
    let slots = |step: usize| {
        let step = &plan.steps[step];
        let all = super::REGISTRY.get(&step.stage).is_some_and(|stage| stage.cpu == Cpu::All);
        let usual = if all && step.resources.gpu == 0 { jobs } else { 1 };
        step.resources.cpu.unwrap_or(usual)
    };
    let total = price::total(plan, &steps, prices, jobs, &slots);
    let way: Vec<String> = total.longest.iter().map(|&s| clean(&plan.steps[s].name)).collect();
    let way = match &way[..] {
        [first, .., last] if way.len() > 6 => format!("{first} → … → {last}, {} steps", way.len()),
        _ => way.join(" → "),
    };
    let (most, unknown) = match total.unknown {
        0 => ("at most about", String::new()),
        n => ("about", format!(", without {n} of which nothing like was ever done")),
    };
    out::line(format!(
        "{most} {} and {} of artifacts{unknown}; the longest way takes {}: {way}",
        duration(total.seconds),
        bytes(total.bytes),
        duration(total.longest_s),
    ));
}
