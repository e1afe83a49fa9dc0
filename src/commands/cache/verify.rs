//! `pipe cache verify`: reads everything and names what is damaged.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use cache::{Damage, Scrubbed};
use serde_json::json;

use super::{bar, count};
use crate::cli::Verify;
use crate::out::{self, bytes, clean, duration};

pub fn verify(args: Verify) -> Result<ExitCode> {
    let cache = crate::commands::open_cache(args.place.cache.as_deref())?;
    let started = Instant::now();
    let bar = bar(0, "reading");
    let all = cache.scrub(args.repair, &|done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    let left = all.damage.iter().filter(|damage| !damage.repaired).count();
    match args.json {
        true => out::line(serde_json::to_string_pretty(&to_json(&all))?),
        false => tell(&all, args.repair, started.elapsed().as_secs_f64()),
    }
    Ok(if left > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn tell(all: &Scrubbed, repair: bool, seconds: f64) {
    for damage in &all.damage {
        let how = if damage.repaired { "moved away" } else { "damaged" };
        out::line(format!("{how}  {}", damage.path.display()));
        out::line(format!("  {}", clean(&damage.what)));
        let needed = needed_by(damage);
        if !needed.is_empty() {
            out::line(format!("  needed by {needed}"));
        }
    }
    out::line(format!(
        "{}, {} and {} ({}) read in {}: {}",
        count(all.entries, "entry"),
        count(all.recipes, "recipe"),
        count(all.objects, "object"),
        bytes(all.bytes),
        duration(seconds),
        match all.damage.len() {
            0 => "all is well".into(),
            n => format!("{n} damaged"),
        }
    ));
    if !all.damage.is_empty() && !repair {
        out::message(
            "hint: `pipe cache verify --repair` moves them away; their steps run again when needed",
        );
    }
}

/// Steps and keys, a few.
fn needed_by(damage: &Damage) -> String {
    let one = |(key, step): &(cache::Key, String)| match step.as_str() {
        "" => format!("the result of key {}", key.short()),
        step => format!("`{}` ({})", clean(step), key.short()),
    };
    let mut all: Vec<String> = damage.needed_by.iter().take(8).map(one).collect();
    if damage.needed_by.len() > all.len() {
        all.push(format!("{} more", damage.needed_by.len() - all.len()));
    }
    all.join(", ")
}

fn to_json(all: &Scrubbed) -> serde_json::Value {
    let one = |damage: &Damage| {
        let needed = damage.needed_by.iter();
        json!({
            "path": damage.path,
            "what": damage.what,
            "needed_by": needed.map(|(key, step)| json!({ "key": key, "step": step })).collect::<Vec<_>>(),
            "repaired": damage.repaired,
        })
    };
    json!({
        "entries": all.entries,
        "recipes": all.recipes,
        "objects": all.objects,
        "bytes": all.bytes,
        "damage": all.damage.iter().map(one).collect::<Vec<_>>(),
    })
}
