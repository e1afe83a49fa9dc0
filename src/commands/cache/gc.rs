//! `pipe cache gc`: removes what nothing needs, and says why.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use cache::gc::{Collected, Facts, Keeper, Plan, Policy, Why};
use serde_json::{Value, json};

use super::{ago, bar, count, table, tell_reports};
use crate::cli::Gc;
use crate::out::{self, bytes, clean, duration};

pub fn gc(args: Gc) -> Result<ExitCode> {
    let cache = crate::commands::open_cache(args.place.cache.as_deref())?;
    let mut policy = Policy {
        max_size: args.max_size,
        older_than: args.older_than,
        forget: args.forget,
        ..Policy::default()
    };
    if let Some(age) = args.older_than {
        policy.attempts_older_than = age;
    }
    if args.no_grace {
        policy.grace = Duration::ZERO;
    }
    // Before the roots are read: what becomes one later is seen as being used.
    let mut collector = match args.dry_run {
        true => cache.inspector()?,
        false => cache.collector(|| out::message("waiting for another collection"))?,
    };
    let runs = engine::roots::of_runs(&cache, args.keep_runs)?;
    let facts = collector.survey(&runs.kept, &runs.others)?;
    tell_reports(&cache);
    let plan = Plan::new(&facts, &policy);
    let done = match args.dry_run {
        true => None,
        false => {
            let bar = bar(plan.before - plan.after, "removing");
            let done = collector.carry_out(&facts, &plan, &mut |bytes| bar.set_position(bytes))?;
            bar.finish_and_clear();
            Some(done)
        }
    };
    match args.json {
        true => out::line(serde_json::to_string_pretty(&to_json(&facts, &plan, done.as_ref()))?),
        false => tell(&facts, &plan, done.as_ref()),
    }
    if let Some(limit) = args.max_size.filter(|limit| plan.after > *limit) {
        out::message(too_much(&plan, limit));
    }
    Ok(ExitCode::SUCCESS)
}

fn tell(facts: &Facts, plan: &Plan, done: Option<&Collected>) {
    let mut rows = Vec::new();
    for eviction in plan.evictions.iter().filter(|_| done.is_none()) {
        let product = &facts.products[eviction.product];
        rows.push(vec![
            product.key.short(),
            clean(&product.step),
            bytes(eviction.bytes),
            format!("took {}", duration(product.seconds)),
            format!("last used {}", ago(product.idle)),
            if eviction.why == Why::Age { "too old".into() } else { "to make room".to_string() },
        ]);
    }
    table(&rows, &[2]);
    for line in lines(facts, plan) {
        out::line(line);
    }
    out::line(match done {
        None => format!(
            "would free {} of {}; {} stay",
            bytes(plan.before - plan.after),
            bytes(plan.before),
            bytes(plan.after)
        ),
        Some(done) => format!(
            "freed {} of {}; {} stay",
            bytes(done.bytes),
            bytes(plan.before),
            bytes(plan.before.saturating_sub(done.bytes))
        ),
    });
}

/// What goes, by kind.
fn lines(facts: &Facts, plan: &Plan) -> Vec<String> {
    let of = |why: Why| -> (usize, u64) {
        let blobs = plan.blobs.iter().filter(|(_, other)| *other == why);
        let sum = blobs.map(|&(i, _)| facts.blobs[i].bytes).sum();
        (plan.evictions.iter().filter(|eviction| eviction.why == why).count(), sum)
    };
    let (old, room) = (of(Why::Age), of(Why::Size));
    let orphans = plan.blobs.iter().filter(|(_, why)| *why == Why::Orphan).count();
    let trials = plan.trials.iter().map(|&i| facts.trials[i].bytes).sum::<u64>();
    let records = plan.records.iter().map(|&i| facts.records[i].bytes).sum::<u64>();
    let all = [
        (old.0, "result", old.1, "not used for long"),
        (room.0, "result", room.1, "to make room"),
        (orphans, "object", of(Why::Orphan).1, "that nothing names"),
        (plan.trials.len(), "attempt", trials, "that nobody will go on with"),
        (plan.records.len(), "record", records, "of old runs"),
    ];
    let mut lines: Vec<String> = all
        .into_iter()
        .filter(|(n, ..)| *n > 0)
        .map(|(n, what, sum, why)| format!("{:>9}  {} {why}", bytes(sum), count(n, what)))
        .collect();
    if !plan.forget.is_empty() {
        lines.push(format!("{:>9}  {} forgotten", "", count(plan.forget.len(), "entry")));
    }
    lines
}

/// What keeps the rest, with numbers.
fn too_much(plan: &Plan, limit: u64) -> String {
    let name = |by: Keeper| match by {
        Keeper::Pin => "pin",
        Keeper::Run => "run",
        Keeper::Lease => "running process",
        Keeper::Attempt => "attempt",
    };
    let mut parts: Vec<String> = Vec::new();
    for k in &plan.kept {
        let are = if parts.is_empty() { "are kept " } else { "" };
        parts.push(format!("{} {are}by {}", bytes(k.bytes), count(k.count, name(k.by))));
    }
    if plan.young > 0 {
        parts.push(format!("{} are younger than an hour", bytes(plan.young)));
    }
    if plan.rest > 0 {
        parts.push(format!("{} are attempts, entries and records", bytes(plan.rest)));
    }
    format!(
        "warning: {} more than --max-size stay: {}\nhint: lower --keep-runs, or `pipe cache unpin`; `pipe cache ls` tells what is kept by what",
        bytes(plan.over(limit)),
        parts.join(", ")
    )
}

fn to_json(facts: &Facts, plan: &Plan, done: Option<&Collected>) -> Value {
    let eviction = |eviction: &cache::gc::Eviction| {
        let product = &facts.products[eviction.product];
        json!({
            "key": product.key,
            "step": product.step,
            "bytes": eviction.bytes,
            "seconds": product.seconds,
            "idle_seconds": product.idle.as_secs(),
            "why": if eviction.why == Why::Age { "age" } else { "size" },
        })
    };
    let keeping = |k: &cache::gc::Keeping| json!({ "by": format!("{:?}", k.by).to_lowercase(), "count": k.count, "bytes": k.bytes });
    let forget = plan.forget.iter().map(|&i| facts.products[i].key);
    json!({
        "before_bytes": plan.before,
        "after_bytes": plan.after,
        "evictions": plan.evictions.iter().map(eviction).collect::<Vec<_>>(),
        "forget": forget.collect::<Vec<_>>(),
        "orphans": plan.blobs.iter().filter(|(_, why)| *why == Why::Orphan).count(),
        "attempts": plan.trials.iter().map(|&i| &facts.trials[i].dir).collect::<Vec<_>>(),
        "records": plan.records.iter().map(|&i| &facts.records[i].dir).collect::<Vec<_>>(),
        "kept": plan.kept.iter().map(keeping).collect::<Vec<_>>(),
        "done": done.map(|done| json!({
            "freed_bytes": done.bytes,
            "spared_bytes": done.spared,
            "entries": done.entries,
        })),
    })
}
