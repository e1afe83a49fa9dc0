//! `pipe cache ls`: results, what they take, and what keeps them.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::process::ExitCode;

use anyhow::Result;
use cache::Key;
use cache::gc::{Facts, Keeper, Product, Root};
use serde_json::json;

use super::{ago, count, table, tell_reports};
use crate::cli::{KEEP_RUNS, Ls, Sort};
use crate::out::{self, bytes, clean, duration};

pub fn ls(args: Ls) -> Result<ExitCode> {
    let cache = crate::commands::open_cache(args.place.cache.as_deref())?;
    let mut collector = cache.inspector()?;
    let runs = engine::roots::of_runs(&cache, KEEP_RUNS)?;
    let saved = engine::roots::saved(&cache)?;
    let facts = collector.survey(&runs.kept, &[])?;
    tell_reports(&cache);
    let wanted = |product: &&Product| match &args.step {
        None => true,
        Some(name) => product.step == *name || product.step.starts_with(&format!("{name}[")),
    };
    let mut products: Vec<&Product> = facts.products.iter().filter(wanted).collect();
    products.sort_by(|a, b| match args.sort {
        Sort::Size => b.bytes.cmp(&a.bytes),
        Sort::Seconds => b.seconds.total_cmp(&a.seconds),
        Sort::Used => a.idle.cmp(&b.idle),
    });
    let table = Table { facts: &facts, saved, users: users(&facts) };
    match args.json {
        true => table.json(&products)?,
        false => table.print(&products),
    }
    if let (Some(name), true) = (&args.step, products.is_empty()) {
        let steps: BTreeSet<&str> = facts.products.iter().map(|p| p.step.as_str()).collect();
        if let Some(hint) = engine::diagnostic::suggest(name, "results are of", steps) {
            out::message(format!("hint: {hint}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// How many results need each blob.
fn users(facts: &Facts) -> Vec<usize> {
    let mut users = vec![0; facts.blobs.len()];
    facts.products.iter().flat_map(|product| &product.blobs).for_each(|&i| users[i] += 1);
    users
}

struct Table<'a> {
    facts: &'a Facts,
    saved: HashMap<Key, (usize, f64)>,
    users: Vec<usize>,
}

impl Table<'_> {
    fn print(&self, products: &[&Product]) {
        if products.is_empty() {
            return out::line("no results");
        }
        let head = ["key", "step", "stage", "size", "", "shared", "took", "saved", "last used"];
        let mut rows = vec![head.iter().map(|cell| cell.to_string()).collect::<Vec<_>>()];
        rows[0].push("kept by".into());
        for product in products {
            let (hits, seconds) = self.saved(product);
            rows.push(vec![
                product.key.short(),
                clean(&product.step),
                clean(&product.stage),
                bytes(product.bytes),
                match state(product) {
                    "here" => String::new(),
                    other => other.into(),
                },
                bytes(self.shared(product)),
                duration(product.seconds),
                match hits {
                    0 => String::new(),
                    _ => format!("{} ({})", duration(seconds), count(hits, "hit")),
                },
                ago(product.idle),
                clean(&self.kept_by(product).join(", ")),
            ]);
        }
        table(&rows, &[3, 5, 6]);
        let usage = self.facts.usage();
        out::line(format!(
            "{}, {} in all; {} stored",
            count(products.len(), "result"),
            bytes(products.iter().map(|product| product.bytes).sum()),
            bytes(usage.stored)
        ));
    }

    fn json(&self, products: &[&Product]) -> Result<()> {
        let one = |product: &&Product| {
            let (hits, seconds) = self.saved(product);
            json!({
                "key": product.key,
                "step": product.step,
                "stage": product.stage,
                "bytes": product.bytes,
                "here_bytes": product.here,
                "shared_bytes": self.shared(product),
                "state": state(product),
                "seconds": product.seconds,
                "hits": hits,
                "saved_seconds": seconds,
                "idle_seconds": product.idle.as_secs(),
                "evidence": product.evidence.is_some(),
                "kept_by": self.kept_by(product),
            })
        };
        let all: Vec<_> = products.iter().map(one).collect();
        out::line(serde_json::to_string_pretty(&all)?);
        Ok(())
    }

    fn saved(&self, product: &Product) -> (usize, f64) {
        match product.evidence {
            Some(_) => (0, 0.0),
            None => self.saved.get(&product.key).copied().unwrap_or_default(),
        }
    }

    /// Bytes that other results need too.
    fn shared(&self, product: &Product) -> u64 {
        let shared = product.blobs.iter().filter(|&&i| self.users[i] > 1);
        shared.map(|&i| self.facts.blobs[i].bytes).sum()
    }

    fn kept_by(&self, product: &Product) -> Vec<String> {
        let mut all = Vec::new();
        let mut runs = 0;
        for root in &product.roots {
            match root {
                Root::Pin(reason) if reason.is_empty() => all.push("a pin".into()),
                Root::Pin(reason) => all.push(format!("a pin: {reason}")),
                Root::Run(_) => runs += 1,
            }
        }
        if runs > 0 {
            all.push(count(runs, "run"));
        }
        if product.in_use {
            let blobs: HashSet<&usize> = product.blobs.iter().collect();
            let uses = self.facts.holders.iter().filter(|holder| {
                holder.by == Keeper::Lease && holder.blobs.iter().any(|i| blobs.contains(i))
            });
            all.extend(uses.map(|holder| format!("process {}", holder.who)));
        }
        if product.evidence.is_some() {
            all.push("(another result of the key)".into());
        }
        all
    }
}

/// Whether the bytes are there.
fn state(product: &Product) -> &'static str {
    match product.here {
        here if here == product.bytes => "here",
        0 => "evicted",
        _ => "in part",
    }
}
