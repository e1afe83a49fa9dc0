//! Steps that are as an earlier run of the same plan found them: settled at once, without a key made
//! or an entry read, and told by one event that names that run. What of them is not so is looked up
//! as ever, and so is everything where no earlier run can tell.

use std::collections::HashSet;

use cache::Cache;

use super::found::{Finder, not_as_before};
use super::{Executor, Options};
use crate::event::Event;
use crate::lookup::{self, Files};
use crate::plan::{Plan, Source};
use crate::run;

/// Finds out which steps stand, and reads the user's files that the others need.
pub(super) fn find<'p>(
    plan: &'p Plan,
    steps: &[usize],
    cache: &Cache,
    options: &Options,
    run: &str,
) -> (Finder, Files<'p>) {
    let mut finder = Finder::new(cache, options);
    let of = |source: &Source| match source {
        Source::Step { step, .. } => Some(*step),
        _ => None,
    };
    let delivered: HashSet<usize> =
        plan.outputs.iter().filter_map(|output| of(&output.source)).collect();
    let looked =
        |at: usize| !plan.steps[at].cache || options.force.contains(&at) || delivered.contains(&at);
    if steps.len() == plan.steps.len() {
        finder.stand(plan, options, &looked);
    }
    // Its events are what tells of them.
    let runs = cache.runs_dir();
    let told = finder.standing().is_none_or(|(earlier, _)| {
        run::link_events(&runs.join(&earlier.head.record), &runs.join(run))
    });
    if !told {
        finder.look_at_all();
    }
    let files = match finder.standing() {
        None => finder.user_files(plan, steps, cache),
        Some((_, stand)) => {
            let others: Vec<usize> = steps.iter().copied().filter(|&step| !stand[step]).collect();
            finder.user_files(plan, &others, cache)
        }
    };
    (finder, files)
}

impl Executor<'_> {
    /// Settles the steps that stand. They are all the steps of the plan, so that places in the run's
    /// order are positions in the plan.
    pub(super) fn settle_standing(&mut self) {
        let Some((earlier, stand)) = self.finder.standing() else { return };
        let (earlier, stand) = (earlier.clone(), stand.to_vec());
        let (but, run) = (not_as_before(&earlier.head, &stand), earlier.head.base.clone());
        self.emit(Event::Unchanged { run, but: but.clone() });
        let uses = self.finder.notes_uses();
        for step in (0..stand.len()).filter(|step| stand[*step]) {
            let key = earlier.recalled.key(step);
            if uses && let Some(key) = &key {
                self.cache.used(key);
            }
            self.settled[step].key = key;
            self.summary.cached += 1;
            self.summary.saved_s += earlier.recalled.seconds_at(step).unwrap_or_default();
            self.schedule.hit(step);
        }
        for (step, key, hit) in self.finder.take_hits() {
            if but.binary_search(&step).is_ok() {
                let outputs = hit.outputs.clone();
                self.emit(Event::Cached { step, key, saved_s: hit.seconds, outputs });
            }
            self.settled[step].outputs = Some(hit.outputs);
        }
    }

    /// Steps that are to run again stand no more, if they did: what they read is looked at, and has to
    /// be what it was.
    pub(super) fn fall(&mut self, steps: &[usize]) -> Result<(), String> {
        let Some((earlier, stand)) = self.finder.standing() else { return Ok(()) };
        let fallen: Vec<usize> = steps.iter().copied().filter(|&step| stand[step]).collect();
        for step in fallen.iter().flat_map(|&step| lookup::upstream(self.plan, step)) {
            if stand[step] && self.settled[step].outputs.is_none() {
                let hit = earlier.recalled.hit_at(step);
                self.settled[step].outputs = hit.map(|(_, hit)| hit.outputs);
            }
        }
        for (pattern, files) in self.finder.user_files(self.plan, &fallen, self.cache) {
            self.files.entry(pattern).or_insert(files);
        }
        for step in fallen {
            if Some(self.pre_image(step)?.key()) != self.settled[step].key {
                let name = &self.plan.steps[step].name;
                return Err(format!(
                    "what `{name}` reads changed while the run went on; run again"
                ));
            }
            self.finder.falls(step);
        }
        Ok(())
    }
}
