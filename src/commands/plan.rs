//! `pipe plan`: what a run would do, step by step, why, and what it would take.

use std::collections::HashMap;
use std::process::ExitCode;

use anyhow::Result;
use engine::estimate::Estimate;
use engine::forecast::{self, Forecast, Reason};
use engine::plan::Plan;
use engine::price::Total;
use engine::recents::Recents;
use serde_json::{Value, json};

use super::forecast::{causes, device, difference, state, to_json};
use super::priced::{self, Priced, Wanted};
use crate::cli;
use crate::out::{self, Paint, bytes, clean, duration};
use crate::table::{Cell, Format, Table};

pub fn plan(args: cli::Plan) -> Result<ExitCode> {
    let loaded = super::load(args.file.as_deref(), &args.settings)?;
    let cache = super::open_cache(args.settings.cache.as_deref())?;
    let plan = &loaded.plan;
    let steps: Vec<usize> = (0..plan.steps.len()).collect();
    let seen = forecast::see(plan, &steps, &cache, &super::hub());
    let wanted = Wanted { reasons: true, times: true };
    let recents = Recents::new(&cache);
    let priced = priced::priced(plan, &steps, (&cache, &seen), &recents, &|_| false, wanted)?;
    let broken = priced.found.values().any(|f| matches!(f, Forecast::Broken { .. }));
    let wrong = broken || !priced.refusals.is_empty();
    let code = if wrong { ExitCode::from(2) } else { ExitCode::SUCCESS };
    let cached = |step: &usize| matches!(priced.found[step], Forecast::Cached { .. });
    let open: Vec<usize> = steps.into_iter().filter(|step| !cached(step)).collect();
    let total = priced::total(plan, &open, &priced.estimates, priced::jobs());
    let sums = Sums::new(plan, &open, &priced.estimates);
    match args.json {
        true => {
            out::line(serde_json::to_string_pretty(&whole(plan, &recents, &priced, &total, &sums))?)
        }
        false => tell(plan, &priced, &total, &sums),
    }
    Ok(code)
}

/// What steps take together; each with how many of them it is not known of.
struct Sums {
    flops: (f64, usize),
    read: (u64, usize),
    written: (u64, usize),
    /// Artifacts and, while the largest step runs, its checkpoints.
    disk: (u64, usize),
    /// The largest of a step.
    memory: (u64, usize),
    device: u64,
    gpu_hours: f64,
}

impl Sums {
    fn new(plan: &Plan, steps: &[usize], estimates: &HashMap<usize, Estimate>) -> Sums {
        let nothing = Estimate::default();
        let of = |step: &usize| estimates.get(step).unwrap_or(&nothing);
        let sum = |pick: &dyn Fn(&Estimate) -> Option<u64>| {
            let known = steps.iter().filter_map(|step| pick(of(step)));
            (known.clone().sum::<u64>(), steps.len() - known.count())
        };
        let most = |pick: &dyn Fn(&Estimate) -> Option<u64>| {
            let known = steps.iter().filter_map(|step| pick(of(step)));
            (known.clone().max().unwrap_or(0), steps.len() - known.count())
        };
        let flops = steps.iter().filter_map(|step| of(step).cost.flops);
        let hours = |step: &usize| {
            of(step).seconds().unwrap_or(0.0) * f64::from(plan.steps[*step].resources.gpu) / 3600.0
        };
        let written = sum(&Estimate::bytes);
        let beside = |e: &Estimate| Some(e.cost.disk.likely?.saturating_sub(e.bytes()?));
        Sums {
            flops: (flops.clone().sum(), steps.len() - flops.count()),
            read: sum(&|e| e.cost.read),
            written,
            disk: (written.0 + most(&beside).0, written.1),
            memory: most(&|e| e.cost.memory.likely),
            device: most(&|e| e.cost.device.likely).0,
            gpu_hours: steps.iter().map(hours).sum(),
        }
    }
}

/// `1.3 T`.
fn short(flops: f64) -> String {
    let units = ["", "k", "M", "G", "T", "P", "E", "Z", "Y"];
    let (mut value, mut unit) = (flops, 0);
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", units[unit])
}

fn whole(plan: &Plan, recents: &Recents<'_>, priced: &Priced, total: &Total, sums: &Sums) -> Value {
    let one = |step: usize| {
        let mut object = to_json(plan, step, &priced.found[&step]);
        let found = causes(plan, &priced.found, recents, step);
        if !found.is_empty() {
            object["causes"] = found.into();
        }
        if let Some(estimate) = priced.estimates.get(&step) {
            object["estimate"] = figures(estimate);
        }
        let refused = priced.refusals.iter().filter(|refusal| refusal.step == step);
        let refused: Vec<Value> = refused.map(|refusal| json!(refusal)).collect();
        if !refused.is_empty() {
            object["refused"] = refused.into();
        }
        object
    };
    let steps: Vec<Value> = (0..plan.steps.len()).map(one).collect();
    let name = |step: &usize| plan.steps[*step].name.clone();
    let count = |word: &str| steps.iter().filter(|step| step["state"] == word).count();
    let totals = json!({
        "cached": count("cached"),
        "runs": count("runs"),
        "maybe": count("maybe"),
        "broken": count("broken"),
        "seconds": total.seconds,
        "seconds_one_by_one": total.sum_s,
        "critical_path": total.longest.iter().map(name).collect::<Vec<_>>(),
        "critical_path_seconds": total.longest_s,
        "gpu_hours": sums.gpu_hours,
        "flops": sums.flops.0,
        "read": sums.read.0,
        "written": sums.written.0,
        "disk": sums.disk.0,
        "memory": sums.memory.0,
        "device_memory": sums.device,
        "unknown": {
            "seconds": total.unknown,
            "flops": sums.flops.1,
            "read": sums.read.1,
            "written": sums.written.1,
            "memory": sums.memory.1,
        },
    });
    json!({ "steps": steps, "totals": totals })
}

fn figures(estimate: &Estimate) -> Value {
    let Estimate { cost, price } = estimate;
    let mut object = json!({
        "flops": cost.flops,
        "read": cost.read,
        "written": estimate.bytes(),
        "memory": cost.memory,
        "device_memory": cost.device,
        "disk": cost.disk,
    });
    if let Some(price) = price {
        object["seconds"] = json!(price.seconds);
        object["bytes"] = json!(price.bytes);
        object["work"] = json!(price.work);
        object["unlike"] = json!(price.unlike);
    }
    object
}

fn tell(plan: &Plan, priced: &Priced, total: &Total, sums: &Sums) {
    let paint = Paint::stdout();
    let width = plan.steps.iter().map(|s| s.name.chars().count()).max().unwrap_or(0).min(32);
    let mut counts = [0usize; 5];
    for step in 0..plan.steps.len() {
        let found = &priced.found[&step];
        let (word, text) = state(plan, found);
        let refused: Vec<_> = priced.refusals.iter().filter(|r| r.step == step).collect();
        let (at, painted) = match word {
            _ if !refused.is_empty() => (4, paint.bold_red("refuse")),
            "cached" => (0, paint.green("cached")),
            "runs" => (1, paint.bold("runs  ")),
            "maybe" => (2, paint.yellow("maybe ")),
            _ => (3, paint.bold_red("broken")),
        };
        counts[at] += 1;
        let name = clean(&plan.steps[step].name);
        let device = device(&plan.steps[step]).map_or(String::new(), |d| format!(" ({d})"));
        let line = format!("{painted}  {name:<width$}  {}", clean(&text));
        out::line(format!("{}{}", line.trim_end(), paint.dim(&device)));
        if let Forecast::Runs { reason: Reason::Changed { differences, .. }, .. } = found {
            for one in differences {
                out::line(format!("        {}", paint.dim(&difference(plan, step, one))));
            }
        }
        for refusal in refused {
            for line in priced::refused(plan, refusal).lines() {
                out::line(format!("        {}", clean(line)));
            }
        }
    }
    if counts[1] + counts[2] + counts[4] > 0 {
        table(plan, &priced.estimates, sums);
        times(plan, total, sums);
    }
    let unknown = |f: &Forecast| matches!(f, Forecast::Unknown { .. });
    if priced.found.values().any(unknown) {
        let words = "maybe: runs, unless what it waits for makes the same bytes as before";
        out::line(paint.dim(words));
    }
    let [cached, runs, maybe, broken, refused] = counts;
    let mut line = format!("{cached} cached, {runs} to run, {maybe} maybe");
    for (count, word) in [(broken, "broken"), (refused, "refused")] {
        if count > 0 {
            line += &format!(", {count} {word}");
        }
    }
    out::line(line);
}

/// What each step that is not cached takes, and all of them, as far as it is known.
fn table(plan: &Plan, estimates: &HashMap<usize, Estimate>, sums: &Sums) {
    let names = ["step", "time", "FLOP", "reads", "writes", "memory", "GPU memory", "disk"];
    let mut table = Table { columns: names.map(String::from).to_vec(), rows: Vec::new() };
    let size = |amount: Option<u64>| match amount.filter(|n| *n > 0) {
        Some(amount) => Cell::Shown(amount as f64, bytes(amount)),
        None => Cell::Nothing,
    };
    for (at, step) in plan.steps.iter().enumerate() {
        let Some(estimate) = estimates.get(&at) else { continue };
        let Estimate { cost, .. } = estimate;
        let seconds = |s: f64| Cell::Shown(s, duration(s));
        let row = vec![
            Cell::Text(step.name.clone()),
            estimate.seconds().map_or(Cell::Nothing, seconds),
            cost.flops.map_or(Cell::Nothing, |n| Cell::Shown(n, short(n))),
            size(cost.read),
            size(estimate.bytes()),
            size(cost.memory.likely),
            size(cost.device.likely),
            size(cost.disk.likely),
        ];
        if row[1..].iter().any(|cell| *cell != Cell::Nothing) {
            table.rows.push(row);
        }
    }
    if table.rows.is_empty() {
        return;
    }
    let more = |unknown: usize, text: String| match unknown {
        0 => text,
        _ => format!("≥ {text}"),
    };
    let sum = |(amount, unknown): (u64, usize)| match amount {
        0 => Cell::Nothing,
        _ => Cell::Shown(amount as f64, more(unknown, bytes(amount))),
    };
    let (flops, unknown) = sums.flops;
    table.rows.push(vec![
        Cell::Text("in total".into()),
        Cell::Nothing,
        if flops > 0.0 { Cell::Shown(flops, more(unknown, short(flops))) } else { Cell::Nothing },
        sum(sums.read),
        sum(sums.written),
        sum(sums.memory),
        sum((sums.device, 0)),
        sum(sums.disk),
    ]);
    table.drop_empty();
    if table.columns.len() > 1 {
        out::line("");
        table.print(Format::Text);
        out::line("");
    }
}

/// The time of all of it, if anything is known of that.
fn times(plan: &Plan, total: &Total, sums: &Sums) {
    if total.sum_s == 0.0 {
        return;
    }
    let (most, unknown) = match total.unknown {
        0 => ("at most about", String::new()),
        1 => ("about", ", without 1 step of which nothing like was ever done".to_string()),
        n => ("about", format!(", without {n} steps of which nothing like was ever done")),
    };
    let gpus = match sums.gpu_hours > 0.0 {
        true => format!(", {:.2} GPU-hours", sums.gpu_hours),
        false => String::new(),
    };
    out::line(format!("{most} {}{gpus}{unknown}", duration(total.seconds)));
    let way: Vec<String> = total.longest.iter().map(|&s| clean(&plan.steps[s].name)).collect();
    let way = match &way[..] {
        [first, .., last] if way.len() > 4 => format!("{first} → … → {last}, {} steps", way.len()),
        _ => way.join(" → "),
    };
    out::line(format!("the longest way takes {}: {way}", duration(total.longest_s)));
}
