//! `pipe cache du`: what takes how much, and what sharing saves.

use std::process::ExitCode;

use anyhow::Result;
use cache::gc::{Sum, Usage};
use serde_json::{Map, Value, json};

use super::{table, tell_reports};
use crate::cli::Du;
use crate::out::{self, bytes};

pub fn du(args: Du) -> Result<ExitCode> {
    let cache = crate::commands::open_cache(args.place.cache.as_deref())?;
    let usage = cache.inspector()?.survey(&[], &[])?.usage();
    tell_reports(&cache);
    let kinds = kinds(&usage);
    if args.json {
        let one = |(name, sum, _): &(String, Sum, &str)| {
            (name.clone(), json!({ "items": sum.items, "bytes": sum.bytes }))
        };
        let object = json!({
            "kinds": kinds.iter().map(one).collect::<Map<String, Value>>(),
            "bytes": usage.bytes,
            "apparent_bytes": usage.apparent,
            "stored_bytes": usage.stored,
            "unnamed_bytes": usage.unnamed.bytes,
        });
        out::line(serde_json::to_string_pretty(&object)?);
        return Ok(ExitCode::SUCCESS);
    }
    let row = |(name, sum, what): &(String, Sum, &str)| {
        vec![name.clone(), sum.items.to_string(), bytes(sum.bytes), what.to_string()]
    };
    let mut rows: Vec<Vec<String>> = kinds.iter().map(row).collect();
    rows.push(vec!["all".into(), String::new(), bytes(usage.bytes), String::new()]);
    table(&rows, &[1, 2]);
    out::line(format!(
        "artifacts and logs of all results are {} by themselves and take {}: sharing saves {}",
        bytes(usage.apparent),
        bytes(usage.stored),
        bytes(usage.apparent.saturating_sub(usage.stored))
    ));
    if usage.unnamed.bytes > 0 {
        out::line(format!("{} belong to no result: `pipe cache gc`", bytes(usage.unnamed.bytes)));
    }
    Ok(ExitCode::SUCCESS)
}

/// Name, size and meaning, the interesting ones first.
fn kinds(usage: &Usage) -> Vec<(String, Sum, &'static str)> {
    let mut all = vec![
        ("objects".to_string(), usage.objects, "files and directories, whole"),
        ("parts".to_string(), usage.parts, "tensors, each kept once"),
        ("recipes".to_string(), usage.recipes, "which tensors a file has"),
    ];
    let told = [
        ("attempts", "work in progress, with checkpoints"),
        ("entries", "what results are"),
        ("divergences", "results that differ from their entries"),
        ("runs", "records"),
        ("index", "may be deleted"),
        ("trash", "on its way out"),
        ("staging", "on its way in"),
    ];
    let of = |name: &str| usage.dirs.iter().find(|(dir, _)| dir == name).map(|(_, sum)| *sum);
    for (name, what) in told {
        all.push((name.into(), of(name).unwrap_or_default(), what));
    }
    let mut rest = Sum::default();
    for (name, sum) in &usage.dirs {
        if !told.iter().any(|(known, _)| known == name) {
            rest = Sum { items: rest.items + sum.items, bytes: rest.bytes + sum.bytes };
        }
    }
    all.push(("other".into(), rest, "locks, leases, pins, spares"));
    all
}
