//! From an input that changed to what changed it: up the steps, by the results that hold the earlier
//! bytes and the bytes of now.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use cache::{Digest, Entry};

use crate::forecast::Forecast;
use crate::key::{Difference, PreImage, differences};
use crate::plan::{Plan, Source};
use crate::recents::{Recent, Recents};

/// Results of a stage that are looked at for the earlier bytes.
const RECENT: usize = 200;
/// Steps behind one input that are told.
const MOST: usize = 4;

/// Why a step upstream made other bytes than before.
#[derive(Clone, Debug)]
pub struct Cause {
    /// Its position in the plan.
    pub step: usize,
    /// In what it differs from when it made the earlier bytes; empty if no result is known that did,
    /// or if it gave other bytes for the same.
    pub differences: Vec<Difference>,
}

/// The steps behind the input that `difference` of `step` is about, those that made other bytes.
pub fn behind(
    plan: &Plan,
    found: &HashMap<usize, Forecast>,
    recents: &Recents<'_>,
    step: usize,
    difference: &Difference,
) -> Vec<Cause> {
    let Difference::Input { port, old, .. } = difference else { return Vec::new() };
    let earlier: HashSet<Digest> = old.iter().map(|id| id.digest).collect();
    let sources = plan.steps[step].inputs.iter().filter(|bound| bound.name == *port);
    let mut seen = HashSet::new();
    let mut causes = Vec::new();
    for source in sources.flat_map(|bound| &bound.sources) {
        let Source::Step { step: upstream, port, index } = source else { continue };
        let Some(Forecast::Cached { entry: now }) = found.get(upstream) else { continue };
        let wanted = |o: &&cache::Output| o.port == *port && (index.is_none() || o.index == *index);
        let same = now.outputs.iter().filter(wanted).all(|o| earlier.contains(&o.digest));
        if same || !seen.insert(*upstream) || causes.len() == MOST {
            continue;
        }
        let then = then(plan, recents, *upstream, now, port, &earlier);
        let differences = then.and_then(|then| {
            let new = PreImage::parse(&now.preimage)?;
            Some(differences(then.image.as_ref()?, &new))
        });
        causes.push(Cause { step: *upstream, differences: differences.unwrap_or_default() });
    }
    causes
}

/// The result of `step`'s stage that made the earlier bytes: of the step itself if there is one.
fn then(
    plan: &Plan,
    recents: &Recents<'_>,
    step: usize,
    now: &Entry,
    port: &str,
    earlier: &HashSet<Digest>,
) -> Option<Rc<Recent>> {
    let step = &plan.steps[step];
    let made = |recent: &Rc<Recent>| {
        let entry = &recent.entry;
        let mut outputs = entry.outputs.iter().filter(|output| output.port == port);
        entry.key != now.key && outputs.any(|output| earlier.contains(&output.digest))
    };
    recents.of(&step.stage, &step.name, RECENT).into_iter().find(made)
}
