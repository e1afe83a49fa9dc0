//! What the cache and the plan know of a step's model: its artifact, its tokenizer, and where it
//! comes from.

use std::collections::{BTreeSet, HashMap, VecDeque};

use anyhow::{Result, bail};
use cache::{Cache, Entry, Output};
use engine::executor::Options;
use engine::forecast::{self, Forecast};
use engine::lookup;
use engine::plan::{Plan, Source};
use engine::stage::Stage as _;
use stages::evaluate::Evaluate;
use stages::models::published::{Evaluation, Provenance, StepFact};

use crate::commands::{BUILD, REGISTRY, Wrong, no_port};

/// What was found.
pub struct Found {
    /// Name of the step.
    pub step: String,
    /// Its model.
    pub model: Output,
    /// A tokenizer, and the step that made it.
    pub tokenizer: Option<(String, Output)>,
    /// Where the model comes from.
    pub provenance: Provenance,
}

/// Everything about `port` of step `at`, whose entry must be there.
pub fn find(plan: &Plan, at: usize, port: &str, cache: &Cache) -> Result<Found> {
    let before = closure(plan, [at]);
    let evaluations = evaluations(plan, at, port);
    let all = closure(plan, evaluations.iter().copied().chain([at]));
    let mut found = forecast::forecast(plan, &all, REGISTRY, cache, &crate::commands::hub())?;
    let mut entries: HashMap<usize, Entry> = HashMap::new();
    for (step, forecast) in found.drain() {
        match forecast {
            Forecast::Cached { entry } => {
                entries.insert(step, *entry);
            }
            other if step == at => bail!(not_done(plan, at, &other)),
            _ => {}
        }
    }
    let step = plan.steps[at].name.clone();
    let model = model(plan, at, port, &entries[&at])?;
    let has = |step: usize| entries.get(&step).and_then(|entry| output(entry, "tokenizer"));
    let upstream = |step| lookup::upstream(plan, step);
    let tokenizer = nearest(at, upstream, |step| has(step).is_some());
    let tokenizer =
        tokenizer.and_then(|step| Some((plan.steps[step].name.clone(), has(step)?.clone())));
    let provenance = Provenance {
        build: BUILD.into(),
        pipeline: plan.name.clone(),
        step: step.clone(),
        port: port.into(),
        key: entries[&at].key.to_string(),
        model: model.digest.to_string(),
        steps: before.iter().filter_map(|s| fact(plan, *s, entries.get(s)?)).collect(),
        evaluations: evaluations
            .iter()
            .filter_map(|s| evaluation(plan, *s, entries.get(s)?, cache))
            .collect(),
        ..Provenance::default()
    };
    Ok(Found { step, model, tokenizer, provenance })
}

/// `steps` and all before them, in the order of the plan.
fn closure(plan: &Plan, steps: impl IntoIterator<Item = usize>) -> Vec<usize> {
    Options { until: steps.into_iter().collect(), ..Options::default() }.selection(plan)
}

fn not_done(plan: &Plan, at: usize, forecast: &Forecast) -> Wrong {
    let name = &plan.steps[at].name;
    let (_, why) = crate::commands::forecast::state(plan, forecast);
    let why = if why.is_empty() { String::new() } else { format!(" ({why})") };
    let file = match plan.file.as_os_str().is_empty() {
        true => String::new(),
        false => format!("{} ", plan.file.display()),
    };
    Wrong(format!(
        "`{name}` is not in the cache{why}\nhint: `pipe run {file}--until '{name}'` makes it"
    ))
}

/// The artifact of a port that is no list.
fn model(plan: &Plan, at: usize, port: &str, entry: &Entry) -> Result<Output> {
    let step = &plan.steps[at];
    let many: Vec<&Output> = entry.outputs.iter().filter(|o| o.port == port).collect();
    match &many[..] {
        [one] => Ok((*one).clone()),
        [] => bail!(no_port(step, port)),
        _ => bail!(Wrong(format!("port `{port}` of `{}` is a list, not a model", step.name))),
    }
}

/// The one artifact of `port`.
fn output<'a>(entry: &'a Entry, port: &str) -> Option<&'a Output> {
    entry.outputs.iter().find(|output| output.port == port)
}

/// The step with `has` that is fewest edges above `at` (which may be it); of equals the later one.
fn nearest(
    at: usize,
    upstream: impl Fn(usize) -> Vec<usize>,
    has: impl Fn(usize) -> bool,
) -> Option<usize> {
    let (mut queue, mut seen) = (VecDeque::from([at]), BTreeSet::from([at]));
    while let Some(step) = queue.pop_front() {
        if has(step) {
            return Some(step);
        }
        queue.extend(upstream(step).into_iter().rev().filter(|above| seen.insert(*above)));
    }
    None
}

/// Steps that evaluate `port` of `at`.
fn evaluations(plan: &Plan, at: usize, port: &str) -> Vec<usize> {
    let takes = |source: &Source| match source {
        Source::Step { step, port: from, .. } => *step == at && from == port,
        _ => false,
    };
    let of = |step: &usize| {
        let step = &plan.steps[*step];
        let model = step.inputs.iter().find(|input| input.name == "model");
        step.stage == Evaluate::NAME && model.is_some_and(|input| input.sources.iter().any(takes))
    };
    (0..plan.steps.len()).filter(of).collect()
}

fn fact(plan: &Plan, step: usize, entry: &Entry) -> Option<StepFact> {
    let step = &plan.steps[step];
    Some(StepFact {
        name: step.name.clone(),
        stage: step.stage.to_string(),
        version: REGISTRY.get(&step.stage)?.version,
        key: entry.key.to_string(),
        params: step.params.value(),
    })
}

fn evaluation(plan: &Plan, step: usize, entry: &Entry, cache: &Cache) -> Option<Evaluation> {
    let text = cache.read(&output(entry, "metrics")?.digest).ok()?;
    Some(Evaluation {
        step: plan.steps[step].name.clone(),
        key: entry.key.to_string(),
        metrics: serde_json::from_slice(&text).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn the_nearest_step_is_found_over_any_graph() {
        // 5 ← 4 ← 3 ← 0, 5 ← 2 ← 1
        let upstream = |step: usize| match step {
            5 => vec![2, 4],
            4 => vec![3],
            3 => vec![0],
            2 => vec![1],
            _ => vec![],
        };
        let find = |with: &[usize]| nearest(5, upstream, |step| with.contains(&step));
        assert_eq!(find(&[0, 1]), Some(1));
        assert_eq!(find(&[1, 3]), Some(3), "of equals the later");
        assert_eq!(find(&[5, 4]), Some(5));
        assert_eq!(find(&[6]), None);
    }
}
