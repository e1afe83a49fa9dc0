//! What the steps of a run made: states, times, artifacts, and their measurements by name.

use std::collections::BTreeMap;

use cache::{Cache, Output};

use crate::event::Event;
use crate::report::metrics;
use crate::run::Past;

/// Most bytes of metrics that are read for one run.
const MOST_BYTES: u64 = 256 << 20;

/// One step of a run that was done, or failed.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// `cached`, `ran`, `failed`, `skipped`; empty if the record tells nothing.
    pub state: &'static str,
    /// Wall time; of a cached step, when it ran.
    pub seconds: Option<f64>,
    /// The artifacts.
    pub outputs: Vec<Output>,
    /// Numbers of its metrics artifact, nested ones dotted.
    pub metrics: BTreeMap<String, f64>,
}

/// The facts of every step of the plan, in its order.
pub fn facts(past: &Past, cache: &Cache) -> Vec<Facts> {
    let mut all = vec![Facts::default(); past.plan.steps.len()];
    for stamped in &past.events {
        let (step, state, seconds, outputs) = match &stamped.event {
            Event::Cached { step, saved_s, outputs, .. } => {
                (*step, "cached", Some(*saved_s), &outputs[..])
            }
            Event::Finished { step, seconds, outputs, .. } => {
                (*step, "ran", Some(*seconds), &outputs[..])
            }
            Event::Failed { step, retry: false, .. } => (*step, "failed", None, &[][..]),
            Event::Skipped { step, .. } => (*step, "skipped", None, &[][..]),
            _ => continue,
        };
        let Some(facts) = all.get_mut(step) else { continue };
        *facts = Facts { state, seconds, outputs: outputs.to_vec(), metrics: BTreeMap::new() };
    }
    let mut left = MOST_BYTES;
    for facts in &mut all {
        if let Ok(Some(value)) = metrics::value(&facts.outputs, cache, &mut left) {
            facts.metrics = metrics::figures(&value.into());
        }
    }
    all
}

/// What a run measured, by `step.metric`.
pub fn measured(past: &Past, facts: &[Facts]) -> BTreeMap<String, f64> {
    let steps = past.plan.steps.iter().zip(facts);
    let named = steps.flat_map(|(step, facts)| {
        facts.metrics.iter().map(move |(name, value)| (format!("{}.{name}", step.name), *value))
    });
    named.collect()
}

/// The name among `names` that `text` means: itself, or the only one that ends in `.text`.
pub fn name<'a>(text: &str, names: impl IntoIterator<Item = &'a str>) -> Result<String, String> {
    let names: Vec<&str> = names.into_iter().collect();
    if names.contains(&text) {
        return Ok(text.into());
    }
    let ending = format!(".{text}");
    let mut found: Vec<&str> = names.iter().copied().filter(|n| n.ends_with(&ending)).collect();
    found.sort_unstable();
    found.dedup();
    match &found[..] {
        [one] => Ok((*one).into()),
        [] => {
            let ends = names.iter().copied();
            let last = names.iter().filter_map(|n| n.rsplit('.').next());
            let hint = crate::diagnostic::suggest(text, "metrics", ends.chain(last));
            let hint = hint.map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
            Err(format!("nothing measured `{text}`{hint}"))
        }
        many => {
            let some: Vec<String> = many.iter().take(4).map(|n| format!("`{n}`")).collect();
            let more = if many.len() > 4 { ", …" } else { "" };
            Err(format!("`{text}` could be {}{more}\nhint: write one of them", some.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_is_meant_by_its_end_if_that_is_clear() {
        let names =
            ["evaluate.student.loss", "evaluate.teacher.loss", "evaluate.ratios.perplexity"];
        assert_eq!(name("perplexity", names).unwrap(), "evaluate.ratios.perplexity");
        assert_eq!(name("student.loss", names).unwrap(), "evaluate.student.loss");
        assert_eq!(name("evaluate.teacher.loss", names).unwrap(), "evaluate.teacher.loss");
        let unclear = name("loss", names).unwrap_err();
        assert!(unclear.contains("`evaluate.student.loss`, `evaluate.teacher.loss`"), "{unclear}");
        let wrong = name("perplexitty", names).unwrap_err();
        assert!(wrong.contains("hint:") && wrong.contains("perplexity"), "{wrong}");
    }
}
