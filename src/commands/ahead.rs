//! What `run` does before anything runs: refuses, makes a budget, expects times; and what it says
//! after of what was left.

use std::collections::HashMap;

use anyhow::{Result, bail};
use engine::estimate::Estimate;
use engine::executor::{Budget, Left, Options, Why};
use engine::forecast::Seen;
use engine::lookup;
use engine::plan::{Plan, Step};
use engine::price;
use engine::recents::Recents;

use super::priced;
use crate::out::{self, duration};

/// Results of a stage that times are expected from.
const RECENT: usize = 50;

/// Before anything runs: refuses steps that cannot fit this machine, and makes a budget of `seconds`.
/// Where results may come from a remote, nobody knows yet what will run, so that nothing is refused.
pub fn look(
    plan: &Plan,
    cache: &cache::Cache,
    options: &mut Options,
    seconds: Option<f64>,
    remote: bool,
) -> Result<()> {
    let costed =
        |step: &Step| super::REGISTRY.get(&step.stage).is_some_and(|stage| stage.cost.is_some());
    if seconds.is_none() && (remote || !plan.steps.iter().any(costed)) {
        return Ok(());
    }
    let steps = options.selection(plan);
    // The hub is asked by the run itself, once.
    let seen = Seen { files: lookup::user_files(plan, &steps, cache), hub: Default::default() };
    let forced = |step: usize| options.force.contains(&step);
    let wanted = priced::Wanted { reasons: false, times: seconds.is_some() };
    let priced =
        priced::priced(plan, &steps, (cache, &seen), &Recents::new(cache), &forced, wanted)?;
    let mine = |step: usize| options.only.is_none_or(|only| only == step);
    let refused: Vec<String> = priced
        .refusals
        .iter()
        .filter(|refusal| !remote && mine(refusal.step))
        .map(|refusal| priced::refused(plan, refusal))
        .collect();
    if !refused.is_empty() {
        bail!(super::Wrong(refused.join("\n\n")));
    }
    options.budget = seconds.map(|seconds| {
        let known = priced.estimates.iter();
        let known = known.filter_map(|(step, e)| Some((*step, Estimate::seconds(e)?)));
        Budget { seconds, estimates: known.collect() }
    });
    Ok(())
}

/// What was left for want of time, and why.
pub fn tell_left(plan: &Plan, left: &[Left], budget: Option<f64>) {
    const MOST: usize = 12;
    for Left { step, why } in left.iter().take(MOST) {
        let name = out::clean(&plan.steps[*step].name);
        let budget = budget.unwrap_or(0.0);
        out::message(match why {
            Why::Cut => {
                format!(
                    "left: `{name}` was stopped when time was up; it goes on from its checkpoint"
                )
            }
            Why::TooLong { takes, .. } if *takes > budget => format!(
                "left: `{name}` takes about {}, more than the whole budget of {}",
                duration(*takes),
                duration(budget)
            ),
            Why::TooLong { takes, left } => format!(
                "left: `{name}` takes about {}, and {} were left",
                duration(*takes),
                duration(*left)
            ),
        });
    }
    if left.len() > MOST {
        out::message(format!("left: {} more", left.len() - MOST));
    }
    if !left.is_empty() {
        out::message("the budget is used up; run again to go on with what is left");
    }
}

/// Seconds that each step takes, as far as anything like it was ever done.
pub fn expected(plan: &Plan, cache: &cache::Cache) -> Vec<Option<f64>> {
    let mut known: HashMap<&str, Vec<price::Past>> = HashMap::new();
    let mut all = Vec::new();
    for step in &plan.steps {
        let look = || {
            let entries = cache.recent(&step.stage, &step.name, RECENT);
            entries.into_iter().filter_map(price::Past::of).collect()
        };
        let past = known.entry(&step.stage).or_insert_with(look);
        all.push(price::price(step, past, &|_| None).map(|price| price.seconds));
    }
    all
}
