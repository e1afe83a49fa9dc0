//! What a run would do, and why: the same keys and lookups as a run, nothing executed.

use std::collections::{BTreeMap, HashMap};

use cache::{Cache, Entry, Key};

use crate::hub;
use crate::inputs::Fetched;
use crate::key::{Difference, PreImage, differences};
use crate::lookup::{self, Inputs};
use crate::plan::Plan;
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
        nearest: Box<Entry>,
        /// The differences, never empty.
        differences: Vec<Difference>,
    },
}

/// What steps read that no step makes.
pub struct Seen {
    /// The user's files by pattern.
    pub files: lookup::Files,
    /// What is here of what a hub has, by the text after `hf:`.
    pub hub: BTreeMap<String, Result<Fetched, String>>,
}

/// Looks at what `steps` read that no step makes. A hub is asked what a revision is, once each;
/// nothing is fetched.
pub fn see(plan: &Plan, steps: &[usize], cache: &Cache, hub: &hub::Settings) -> Seen {
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
    forecast_seen(plan, steps, registry, cache, &see(plan, steps, cache, hub), true)
}

/// The same for whoever has looked. Without `reasons`, which cost many reads, whatever runs is said
/// to be the first of its kind.
pub fn forecast_seen(
    plan: &Plan,
    steps: &[usize],
    registry: Registry,
    cache: &Cache,
    Seen { files, hub }: &Seen,
    reasons: bool,
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
    reasons: bool,
) -> anyhow::Result<Forecast> {
    let key = image.key();
    if !plan.steps[step].cache {
        return Ok(Forecast::Runs { key, reason: Reason::Always });
    }
    if let Some(entry) = cache.lookup(&key)? {
        return Ok(Forecast::Cached { entry: Box::new(entry) });
    }
    let earlier = reasons.then(|| nearest(cache, &plan.steps[step].name, image, &key)).flatten();
    let reason = match earlier {
        Some((nearest, differences)) => Reason::Changed { nearest: Box::new(nearest), differences },
        None => Reason::First,
    };
    Ok(Forecast::Runs { key, reason })
}

/// The earlier entry of the same stage that differs least: first among those of a step of the same
/// name, then among all; ties go to the newest.
pub fn nearest(
    cache: &Cache,
    name: &str,
    image: &PreImage,
    key: &Key,
) -> Option<(Entry, Vec<Difference>)> {
    let compare = |entry: Entry| {
        let differences = differences(&PreImage::parse(&entry.preimage)?, image);
        (entry.key != *key && !differences.is_empty()).then_some((entry, differences))
    };
    let of = |wanted: bool, entries: &[Entry]| {
        let same = |entry: &&Entry| (entry.provenance["step"] == name) == wanted;
        let found = entries.iter().filter(same).cloned().filter_map(compare);
        found.min_by_key(|(_, differences)| differences.len())
    };
    let entries = cache.recent(&image.stage, name, 200);
    of(true, &entries).or_else(|| of(false, &entries))
}
