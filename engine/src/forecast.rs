//! What a run would do, and why: the same keys and lookups as a run, nothing executed.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use cache::{Cache, Entry, Key};

use crate::hub;
use crate::inputs::Fetched;
use crate::key::{self, Difference, PreImage, differences};
use crate::lookup::{self, Inputs};
use crate::plan::Plan;
use crate::recents::Recents;
use crate::stage::Registry;

/// What would happen to one step.
#[derive(Clone, Debug)]
pub enum Forecast {
    /// Its entry is there.
    Cached {
        /// The entry.
        entry: Box<Entry>,
    },
    /// It runs.
    Runs {
        /// The key under which it will be published.
        key: Key,
        /// What it differs in from the nearest earlier entry, if there is one.
        reason: Reason,
    },
    /// Something upstream runs first; if that reproduces the same bytes, this may be cut off.
    Unknown {
        /// Positions of the direct upstream steps that are not cached.
        because: Vec<usize>,
    },
    /// What it takes from a hub is not here; a run fetches it first.
    Fetches {
        /// The texts after `hf:`.
        names: Vec<String>,
    },
    /// It cannot run.
    Broken {
        /// Why.
        message: String,
    },
}

/// Why a step runs.
#[derive(Clone, Debug)]
pub enum Reason {
    /// No entry of this stage is known.
    First,
    /// `cache: false`, or forced.
    Always,
    /// The nearest earlier entry and all that differs from it.
    Changed {
        /// The earlier entry.
        nearest: Arc<Entry>,
        /// The differences, never empty.
        differences: Vec<Difference>,
    },
}

/// What steps read that no step makes.
pub struct Seen<'p> {
    /// The user's files by pattern.
    pub files: lookup::Files<'p>,
    /// What is here of what a hub has, by the text after `hf:`.
    pub hub: BTreeMap<String, Result<Fetched, String>>,
}

/// Looks at what `steps` read that no step makes. A hub is asked what a revision is, once each;
/// nothing is fetched.
pub fn see<'p>(plan: &'p Plan, steps: &[usize], cache: &Cache, hub: &hub::Settings) -> Seen<'p> {
    let look = |name: String| Some((name.clone(), lookup::look_for(hub, cache, &name)?));
    let hub = lookup::hub_names(plan, steps).into_iter().filter_map(look).collect();
    Seen { files: lookup::user_files(plan, steps, cache), hub }
}

/// The forecast of every step in `steps` (positions in plan order; upstream included).
pub fn forecast(
    plan: &Plan,
    steps: &[usize],
    registry: Registry,
    cache: &Cache,
    hub: &hub::Settings,
) -> anyhow::Result<HashMap<usize, Forecast>> {
    let (seen, recents) = (see(plan, steps, cache, hub), Recents::new(cache));
    forecast_seen(plan, steps, registry, cache, &seen, Some(&recents))
}

/// The same for whoever has looked. Without `reasons`, earlier results to compare with, which cost
/// many reads, whatever runs is said to be the first of its kind.
pub fn forecast_seen(
    plan: &Plan,
    steps: &[usize],
    registry: Registry,
    cache: &Cache,
    Seen { files, hub }: &Seen<'_>,
    reasons: Option<&Recents<'_>>,
) -> anyhow::Result<HashMap<usize, Forecast>> {
    let mut found: HashMap<usize, Forecast> = HashMap::new();
    for &step in steps {
        let unknown = |s: &usize| !matches!(found.get(s), Some(Forecast::Cached { .. }));
        let because: Vec<usize> =
            lookup::upstream(plan, step).into_iter().filter(unknown).collect();
        if !because.is_empty() {
            found.insert(step, Forecast::Unknown { because });
            continue;
        }
        let names = lookup::hub_names(plan, &[step]);
        let names: Vec<String> = names.into_iter().filter(|name| !hub.contains_key(name)).collect();
        if !names.is_empty() {
            found.insert(step, Forecast::Fetches { names });
            continue;
        }
        let outputs = |s: usize| match &found[&s] {
            Forecast::Cached { entry } => Some(&entry.outputs[..]),
            _ => None,
        };
        let inputs = Inputs { plan, files, hub, outputs: &outputs };
        let one = match lookup::pre_image(&inputs, step, registry) {
            Err(message) => Forecast::Broken { message },
            Ok(image) => look_up(plan, step, &image, cache, reasons)?,
        };
        found.insert(step, one);
    }
    Ok(found)
}

fn look_up(
    plan: &Plan,
    step: usize,
    image: &PreImage,
    cache: &Cache,
    reasons: Option<&Recents<'_>>,
) -> anyhow::Result<Forecast> {
    let key = image.key();
    if !plan.steps[step].cache {
        return Ok(Forecast::Runs { key, reason: Reason::Always });
    }
    if let Some(entry) = cache.lookup(&key)? {
        return Ok(Forecast::Cached { entry: Box::new(entry) });
    }
    let earlier = reasons.and_then(|recents| nearest(recents, &plan.steps[step].name, image, &key));
    let reason = match earlier {
        Some((nearest, differences)) => Reason::Changed { nearest, differences },
        None => Reason::First,
    };
    Ok(Forecast::Runs { key, reason })
}

/// The earlier entry of the same stage that differs least: first among those of a step of the same
/// name, then among all; ties go to the newest.
pub fn nearest(
    recents: &Recents<'_>,
    name: &str,
    image: &PreImage,
    key: &Key,
) -> Option<(Arc<Entry>, Vec<Difference>)> {
    const MOST: usize = 200;
    let all = recents.of_others(&image.stage, name, MOST);
    let all = all.unwrap_or_else(|| recents.of(&image.stage, name, MOST).into());
    let of = |wanted: bool| {
        let (mut least, mut best) = (usize::MAX, None);
        for recent in all.iter() {
            let same = recent.entry.provenance["step"] == name;
            let Some(old) = recent.image.as_ref().filter(|_| same == wanted) else { continue };
            let count = key::count(old, image, least);
            if count > 0 && count < least && recent.entry.key != *key {
                (least, best) = (count, Some(recent));
            }
            if least == 1 {
                break;
            }
        }
        let recent = best?;
        Some((recent.entry.clone(), differences(recent.image.as_ref()?, image)))
    };
    of(true).or_else(|| of(false))
}
