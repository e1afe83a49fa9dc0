//! `pipe cache pin` and `unpin`: results that stay, by step or key.

use std::process::ExitCode;

use anyhow::{Result, bail};
use cache::{Cache, Key};
use engine::executor::Options;
use engine::forecast::{self, Forecast};

use crate::cli::{OfPins, Pin, Unpin};
use crate::commands::{self, Wrong};
use crate::out::{self, clean};

/// A key, and the step that it is the result of.
struct Named {
    key: Key,
    step: Option<String>,
}

pub fn pin(args: Pin) -> Result<ExitCode> {
    let cache = commands::open_cache(args.of.settings.cache.as_deref())?;
    for name in &args.steps {
        for found in resolve(&cache, name, &args.of)? {
            let entry = cache.lookup(&found.key)?;
            let Some(entry) = entry else {
                bail!(Wrong(format!("there is no result of key {}", found.key)));
            };
            let new = cache.pin(&found.key, args.reason.as_deref().unwrap_or_default())?;
            let here = entry.outputs.iter().all(|output| cache.present(output));
            out::line(format!(
                "{} {}{}",
                told(&found),
                if new { "is pinned" } else { "was pinned before" },
                if here {
                    ""
                } else {
                    "; its bytes are not here, they stay once they are made again"
                }
            ));
        }
    }
    Ok(ExitCode::SUCCESS)
}

pub fn unpin(args: Unpin) -> Result<ExitCode> {
    let cache = commands::open_cache(args.of.settings.cache.as_deref())?;
    for name in &args.steps {
        for found in resolve(&cache, name, &args.of)? {
            let was = cache.unpin(&found.key)?;
            let what = if was { "is not pinned any more" } else { "was not pinned" };
            out::line(format!("{} {what}", told(&found)));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn told(found: &Named) -> String {
    match &found.step {
        Some(step) => format!("`{}` ({})", clean(step), found.key.short()),
        None => found.key.short(),
    }
}

/// What `name` means: a whole key, else a step, else the beginning of a key.
fn resolve(cache: &Cache, name: &str, of: &OfPins) -> Result<Vec<Named>> {
    if let Ok(key) = name.parse::<Key>() {
        return Ok(vec![Named { key, step: None }]);
    }
    let steps = of_step(cache, name, of);
    let hex = name.len() >= 4 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if steps.is_ok() || !hex {
        return steps;
    }
    match &cache.keys_like(name)?[..] {
        [key] => Ok(vec![Named { key: *key, step: None }]),
        [] => steps,
        many => bail!(Wrong(format!(
            "{} keys begin with `{name}`: {}, …\nhint: give more digits",
            many.len(),
            many.iter().take(3).map(Key::short).collect::<Vec<_>>().join(", ")
        ))),
    }
}

/// The results of all steps that `name` means.
fn of_step(cache: &Cache, name: &str, of: &OfPins) -> Result<Vec<Named>> {
    let loaded = commands::load_for_step(of.file.as_deref(), &of.settings, cache)?;
    let plan = &loaded.plan;
    let wanted = commands::select(&loaded, name)?;
    let steps = Options { until: wanted.clone(), ..Options::default() }.selection(plan);
    let found = forecast::forecast(plan, &steps, commands::REGISTRY, cache, &commands::hub())?;
    let one = |&step: &usize| match &found[&step] {
        Forecast::Cached { entry } => {
            Ok(Named { key: entry.key, step: Some(plan.steps[step].name.clone()) })
        }
        _ => bail!(Wrong(format!(
            "`{}` has no result yet\nhint: `pipe run --until '{0}'` makes it, or give a key of `pipe cache ls`",
            plan.steps[step].name
        ))),
    };
    wanted.iter().map(one).collect()
}
