//! What a plan would take and whether it fits this machine, for `plan` and `run`.

use std::cell::RefCell;
use std::collections::HashMap;

use anyhow::Result;
use cache::Cache;
use engine::estimate::{Estimate, Estimator};
use engine::executor::Options;
use engine::fit::{self, Machine, Refusal, What};
use engine::forecast::{self, Forecast, Seen};
use engine::plan::{Plan, Step};
use engine::price::{self, Total};
use engine::recents::Recents;
use engine::stage::Cpu;

use crate::machine;
use crate::out::bytes;

/// What would happen, what it would take, and what cannot.
pub struct Priced {
    /// By position in the plan.
    pub found: HashMap<usize, Forecast>,
    /// Of what would run.
    pub estimates: HashMap<usize, Estimate>,
    /// Of what cannot fit.
    pub refusals: Vec<Refusal>,
}

/// What is wanted beside states and sizes.
#[derive(Clone, Copy)]
pub struct Wanted {
    /// Why steps run.
    pub reasons: bool,
    /// How long they take.
    pub times: bool,
}

/// Prices those `steps` of `plan` that would run. Nothing is fetched; `seen` says what is here.
pub fn priced(
    plan: &Plan,
    steps: &[usize],
    (cache, seen): (&Cache, &Seen<'_>),
    recents: &Recents<'_>,
    forced: &dyn Fn(usize) -> bool,
    wanted: Wanted,
) -> Result<Priced> {
    let registry = super::REGISTRY;
    let reasons = wanted.reasons.then_some(recents);
    let found = forecast::forecast_seen(plan, steps, registry, cache, seen, reasons)?;
    let about = |name: &str, path: &std::path::Path| {
        ::stages::costs::describe(name, path).map(|about| about.value())
    };
    let estimator = Estimator {
        plan,
        found: &found,
        seen,
        registry,
        cache,
        history: wanted.times,
        about: &about,
        read: RefCell::default(),
    };
    let estimates = estimator.estimates(steps, forced);
    let version = |step: &Step| super::REGISTRY.get(&step.stage).map(|stage| stage.version);
    let certain = |step: usize| forced(step) || fit::certain(plan, &found, recents, &version, step);
    let refusals = fit::refusals(&estimates, &machine(cache), &certain);
    Ok(Priced { found, estimates, refusals })
}

/// What this machine has.
fn machine(cache: &Cache) -> Machine {
    Machine {
        memory: Some(machine::memory_and_swap()),
        device: super::gpus::gpus().list.iter().map(|gpu| gpu.memory).max(),
        disk: machine::room(cache.root()),
    }
}

/// The time of `steps`, by their estimates, with `jobs` cpu slots.
pub fn total(
    plan: &Plan,
    steps: &[usize],
    estimates: &HashMap<usize, Estimate>,
    jobs: u32,
) -> Total {
    let seconds = |step: usize| estimates.get(&step).and_then(Estimate::seconds);
    let slots = |step: usize| {
        let step = &plan.steps[step];
        let all = super::REGISTRY.get(&step.stage).is_some_and(|stage| stage.cpu == Cpu::All);
        let usual = if all && step.resources.gpu == 0 { jobs } else { 1 };
        step.resources.cpu.unwrap_or(usual)
    };
    price::total(plan, steps, &seconds, jobs, &slots)
}

/// Cpu slots of a run that is not told otherwise.
pub fn jobs() -> u32 {
    Options::default().jobs
}

/// Why a step cannot run here, and what to do.
pub fn refused(plan: &Plan, refusal: &Refusal) -> String {
    let (of, whose) = match refusal.what {
        What::Memory => ("memory", "this machine gives"),
        What::Device => ("memory of a GPU", "the largest GPU has"),
        What::Disk => ("disk for its artifacts", "the disk of the cache has room for"),
    };
    format!(
        "`{}` takes at least {} of {of}, but {whose} {}\nhint: {}",
        plan.steps[refusal.step].name,
        bytes(refusal.needs),
        bytes(refusal.has),
        refusal.lower
    )
}
