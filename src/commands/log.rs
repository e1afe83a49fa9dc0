//! `pipe log STEP`: what the newest attempt of a step printed.

use std::process::ExitCode;

use anyhow::{Result, bail};
use engine::event::Event;
use engine::executor::Options;
use engine::forecast::{self, Forecast};
use engine::run::Past;

use crate::cli::OfStep;
use crate::out;

pub fn log(args: OfStep) -> Result<ExitCode> {
    let cache = super::open_cache(args.settings.cache.as_deref())?;
    let loaded = super::load_for_step(args.file.as_deref(), &args.settings, &cache)?;
    let at = super::one_step(&loaded, &args.step)?;
    let steps = Options { only: Some(at), ..Options::default() }.selection(&loaded.plan);
    let found = forecast::forecast(&loaded.plan, &steps, super::REGISTRY, &cache, &super::hub())?;
    let name = &loaded.plan.steps[at].name;
    let text = match &found[&at] {
        Forecast::Cached { entry } => match entry.log {
            Some((digest, _)) => match cache.read(&digest) {
                Err(cache::Error::Missing { .. }) => bail!(super::Wrong(format!(
                    "the log of `{name}` was evicted with its artifacts\nhint: `pipe run --from '{name}'` makes them again"
                ))),
                text => Some(text?),
            },
            None => Some(Vec::new()),
        },
        _ => attempt_log(&cache, name)?,
    };
    let Some(text) = text else {
        bail!(super::Wrong(format!("`{name}` has no log: no attempt of it is recorded here")));
    };
    let text = String::from_utf8_lossy(&text);
    if args.json {
        out::line(serde_json::json!({ "step": name, "log": text }).to_string());
    } else if !text.is_empty() {
        out::line(out::clean(text.trim_end_matches('\n')));
    }
    Ok(ExitCode::SUCCESS)
}

/// The log of the newest recorded attempt of `name` in runs of this directory.
fn attempt_log(cache: &cache::Cache, name: &str) -> Result<Option<Vec<u8>>> {
    let Some(dir) = super::newest_run(cache)? else { return Ok(None) };
    let past = Past::load(&dir)?;
    let of = |event: &Event| match event {
        Event::Launched { step, dir, .. } if past.plan.steps[*step].name == name => {
            Some(dir.clone())
        }
        _ => None,
    };
    let newest = past.events.iter().rev().find_map(|stamped| of(&stamped.event));
    let path = newest.map(|dir| cache.root().join(dir).join(engine::worker::LOG));
    Ok(path.and_then(|path| std::fs::read(path).ok()))
}
