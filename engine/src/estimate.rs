//! What each step of a plan would take: the stages' own cost models over what is known of their
//! inputs, and the time of like steps in history. Sizes are passed on from step to step: from
//! artifacts where they are cached, else from what a cost model says of what it will make.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use cache::{Cache, Entry, Key};
use serde_json::Value;

use crate::forecast::{Forecast, Seen};
use crate::key::PreImage;
use crate::plan::{Plan, Port, Source};
use crate::price::{self, Past, Price};
use crate::stage::Registry;
use crate::stage::cost::{Artifact, Cost, Known};

/// Results of a stage that estimates are made from.
const RECENT: usize = 200;

/// What sizes depend on, read from the file or directory at a path; `name` is its base name.
pub type About<'a> = &'a dyn Fn(&str, &Path) -> Option<Value>;

/// What one step would take.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Estimate {
    /// By the stage's own model.
    pub cost: Cost,
    /// By like steps, if any was ever done.
    pub price: Option<Price>,
}

impl Estimate {
    /// Wall time in seconds, if it can be told.
    pub fn seconds(&self) -> Option<f64> {
        self.price.as_ref().map(|price| price.seconds)
    }

    /// Bytes of artifacts: by the stage's model, else by like steps.
    pub fn bytes(&self) -> Option<u64> {
        self.cost.written.or_else(|| self.price.as_ref().map(|price| price.bytes))
    }
}

/// What estimates are made from.
pub struct Estimator<'a> {
    /// The plan.
    pub plan: &'a Plan,
    /// What would happen to its steps.
    pub found: &'a HashMap<usize, Forecast>,
    /// What no step makes.
    pub seen: &'a Seen<'a>,
    /// All stages.
    pub registry: Registry,
    /// The store.
    pub cache: &'a Cache,
    /// Whether earlier results are asked how long they took.
    pub history: bool,
    /// Reads what sizes depend on.
    pub about: About<'a>,
    /// What it read.
    pub read: RefCell<HashMap<PathBuf, Value>>,
}

/// Earlier results of one stage, and what the time of each grew with, once somebody asked.
struct History {
    past: Vec<Past>,
    work: RefCell<HashMap<Key, Option<f64>>>,
}

impl Estimator<'_> {
    /// What each of `steps`, in the order of the plan, would take if it ran: of those that are not
    /// cached, and those that `forced` picks. Of steps that cannot run nothing is told.
    pub fn estimates(
        &self,
        steps: &[usize],
        forced: &dyn Fn(usize) -> bool,
    ) -> HashMap<usize, Estimate> {
        let mut estimates: HashMap<usize, Estimate> = HashMap::new();
        let mut history: HashMap<&str, History> = HashMap::new();
        for &at in steps {
            let skip = match self.found.get(&at) {
                Some(Forecast::Cached { .. }) => !forced(at),
                Some(Forecast::Broken { .. }) | None => true,
                _ => false,
            };
            if skip {
                continue;
            }
            let step = &self.plan.steps[at];
            let history = history.entry(&step.stage).or_insert_with(|| self.history(at));
            let estimate = self.estimate(at, &estimates, history);
            estimates.insert(at, estimate);
        }
        estimates
    }

    fn history(&self, step: usize) -> History {
        let step = &self.plan.steps[step];
        let entries = match self.history {
            true => self.cache.recent(&step.stage, &step.name, RECENT),
            false => Vec::new(),
        };
        let past = entries.into_iter().filter_map(Past::of).collect();
        History { past, work: RefCell::default() }
    }

    fn estimate(
        &self,
        at: usize,
        before: &HashMap<usize, Estimate>,
        history: &History,
    ) -> Estimate {
        let step = &self.plan.steps[at];
        let known = self.known(at, before);
        let mut cost = self.cost(&step.stage, &step.params.value(), &known).unwrap_or_default();
        cost.read = cost.read.or_else(|| known.all_bytes());
        let work = cost.work;
        let times = |past: &Past| {
            let now = work?;
            let mut known = history.work.borrow_mut();
            let then = known.entry(past.entry.key).or_insert_with(|| self.work(&past.image));
            Some(now / (*then)?)
        };
        let price = price::price(step, &history.past, &times);
        if let Some(price) = &price {
            fill(&mut cost.makes, price);
        }
        Estimate { cost, price }
    }

    fn cost(&self, stage: &str, params: &Value, known: &Known) -> Option<Cost> {
        (self.registry.get(stage)?.cost?)(params, known)
    }

    /// What the time of an earlier result grew with, from its own inputs where they are still there.
    fn work(&self, image: &PreImage) -> Option<f64> {
        let mut known = Known::default();
        for (port, ids) in &image.inputs {
            let artifact = |id: &crate::key::InputId| {
                let path = self.cache.path(&id.digest);
                let whole = || Some(std::fs::metadata(&path).ok()?.len());
                let bytes = match self.cache.recipe(&id.digest) {
                    Some(recipe) => Some(recipe.bytes),
                    None => whole(),
                };
                let about = self.about_of(id.name.as_deref().unwrap_or(""), &path);
                Artifact { index: id.index, bytes, about, sure: true }
            };
            known.ports.insert(port.clone(), ids.iter().map(artifact).collect());
        }
        self.cost(&image.stage, &image.params, &known)?.work
    }

    /// What is known of the inputs of a step.
    fn known(&self, at: usize, before: &HashMap<usize, Estimate>) -> Known {
        let ports = self.plan.steps[at].inputs.iter();
        let one = |port: &Port| {
            let all = port.sources.iter().flat_map(|source| self.artifacts(source, before));
            (port.name.to_string(), all.collect())
        };
        Known { ports: ports.map(one).collect() }
    }

    fn artifacts(&self, source: &Source, before: &HashMap<usize, Estimate>) -> Vec<Artifact> {
        let found = match source {
            Source::Step { step, port, index } => {
                let of = |all: Vec<Artifact>| {
                    all.into_iter().filter(|a| index.is_none() || a.index == *index).collect()
                };
                let made = before.get(step).and_then(|e| e.cost.makes.get(port.as_str()));
                match (made, self.found.get(step)) {
                    (Some(made), _) => of(made.clone()),
                    (None, Some(Forecast::Cached { entry })) => of(self.cached(entry, port)),
                    _ => Vec::new(),
                }
            }
            Source::Path { path } => match self.seen.files.get(path.as_os_str()) {
                Some(Ok(files)) => files
                    .iter()
                    .map(|file| self.there(&file.name(), &file.path, file.bytes, None))
                    .collect(),
                _ => Vec::new(),
            },
            Source::Hub { name } => match self.seen.hub.get(name) {
                Some(Ok(fetched)) => {
                    // Its files lie apart: what it is stands in one of them.
                    let config = fetched.files.iter().find(|(name, _)| name == "config.json");
                    let (name, path) =
                        config.or(fetched.files.first()).cloned().unwrap_or_default();
                    vec![self.there(&name, &path, fetched.bytes, None)]
                }
                _ => Vec::new(),
            },
        };
        match (found.is_empty(), source) {
            (true, Source::Step { index, .. }) => {
                vec![Artifact { index: *index, ..Artifact::default() }]
            }
            (true, _) => vec![Artifact::default()],
            _ => found,
        }
    }

    fn cached(&self, entry: &Entry, port: &str) -> Vec<Artifact> {
        let outputs = entry.outputs.iter().filter(|output| output.port == port);
        let one = |output: &cache::Output| {
            let path = self.cache.path(&output.digest);
            self.there(&output.name, &path, output.bytes, output.index)
        };
        outputs.map(one).collect()
    }

    fn there(&self, name: &str, path: &Path, bytes: u64, index: Option<u32>) -> Artifact {
        let about = self.about_of(name, path);
        Artifact { index, bytes: Some(bytes), about, sure: true }
    }

    fn about_of(&self, name: &str, path: &Path) -> Value {
        if let Some(about) = self.read.borrow().get(path) {
            return about.clone();
        }
        let about = (self.about)(name, path).unwrap_or_default();
        self.read.borrow_mut().insert(path.to_path_buf(), about.clone());
        about
    }
}

/// Sizes of artifacts that a cost model does not tell, as those of a like step.
fn fill(makes: &mut BTreeMap<String, Vec<Artifact>>, price: &Price) {
    let ports: BTreeSet<&String> = price.outputs.iter().map(|(port, ..)| port).collect();
    for port in ports {
        let sizes = price.outputs.iter().filter(|(other, ..)| other == port);
        let sizes: Vec<_> = sizes.map(|(_, index, bytes)| (*index, Some(*bytes))).collect();
        match makes.get_mut(port).map(Vec::as_mut_slice) {
            // Numbers are the model's to know.
            Some([one]) if sizes.len() == 1 => one.bytes = one.bytes.or(sizes[0].1),
            Some([_, ..]) => {}
            _ => {
                let artifact = |(index, bytes)| Artifact { index, bytes, ..Artifact::default() };
                makes.insert(port.clone(), sizes.into_iter().map(artifact).collect());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_fills_what_a_model_leaves_open_and_changes_nothing_else() {
        let artifact = |index, bytes| Artifact { index, bytes, ..Artifact::default() };
        let mut makes: BTreeMap<String, Vec<Artifact>> = [
            ("told".to_string(), vec![artifact(Some(1), Some(5))]),
            ("open".to_string(), vec![artifact(Some(1), None)]),
        ]
        .into();
        let outputs = ["told", "open", "new"].map(|port| (port.to_string(), Some(0), 9)).to_vec();
        let price = Price { seconds: 1.0, bytes: 27, outputs, work: 1.0, unlike: 0 };
        fill(&mut makes, &price);
        assert_eq!(makes["told"], [artifact(Some(1), Some(5))]);
        assert_eq!(makes["open"], [artifact(Some(1), Some(9))]);
        assert_eq!(makes["new"], [artifact(Some(0), Some(9))]);
    }
}
