//! What cannot fit a machine, told before anything runs. Pure but for one question to earlier results.
//!
//! Only amounts that no run stays below are compared, and only of steps that are certain to run: what
//! would have run is never refused.

use std::collections::HashMap;
use std::rc::Rc;

use serde::Serialize;

use crate::estimate::Estimate;
use crate::forecast::Forecast;
use crate::plan::{Plan, Step};
use crate::recents::{Recent, Recents};

/// Results of a stage that are looked at for one that a step may be cut off by.
const RECENT: usize = 500;

/// What a machine has, in bytes; `None` where it does not tell, or cannot be held to it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Machine {
    /// Memory that a process can have, swap included.
    pub memory: Option<u64>,
    /// Memory of the largest device.
    pub device: Option<u64>,
    /// Room on the disk of the cache.
    pub disk: Option<u64>,
}

/// Of what there is too little.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// The host's memory.
    Memory,
    /// A device's memory.
    Device,
    /// The disk of the cache.
    Disk,
}

/// A step that cannot run here.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Refusal {
    /// Its position in the plan.
    #[serde(skip)]
    pub step: usize,
    /// Of what there is too little.
    pub what: What,
    /// Bytes that it takes at least.
    pub needs: u64,
    /// Bytes that there are.
    pub has: u64,
    /// What to change, as a clause.
    pub lower: String,
}

/// The steps of `estimates` that cannot run on `machine`, in the order of the plan; `certain` tells
/// of which steps it is known that they run.
pub fn refusals(
    estimates: &HashMap<usize, Estimate>,
    machine: &Machine,
    certain: &dyn Fn(usize) -> bool,
) -> Vec<Refusal> {
    let mut found = Vec::new();
    for (&step, Estimate { cost, .. }) in estimates {
        let all = [
            (What::Memory, &cost.memory, machine.memory),
            (What::Device, &cost.device, machine.device),
            (What::Disk, &cost.disk, machine.disk),
        ];
        for (what, amount, has) in all {
            let Some(has) = has.filter(|has| amount.least > *has) else { continue };
            if certain(step) {
                let lower = amount.lower.clone();
                found.push(Refusal { step, what, needs: amount.least, has, lower });
            }
        }
    }
    found.sort_by_key(|refusal| (refusal.step, refusal.what as u8));
    found
}

/// Whether a step is certain to run if nothing before it fails: not where upstream may give the bytes
/// of an earlier result, so that it is cut off.
pub fn certain(
    plan: &Plan,
    found: &HashMap<usize, Forecast>,
    recents: &Recents<'_>,
    version: &dyn Fn(&Step) -> Option<u32>,
    step: usize,
) -> bool {
    let planned = &plan.steps[step];
    match found.get(&step) {
        Some(Forecast::Runs { .. }) => true,
        Some(Forecast::Unknown { .. } | Forecast::Fetches { .. }) if planned.cache => {
            let entries = recents.of(&planned.stage, &planned.name, RECENT);
            let params = planned.params.value();
            let same = |recent: &Rc<Recent>| {
                recent.image.as_ref().is_none_or(|image| {
                    image.params == params && Some(image.version) == version(planned)
                })
            };
            // Of more results than are looked at nobody knows.
            entries.len() < RECENT && !entries.iter().any(same)
        }
        Some(Forecast::Unknown { .. } | Forecast::Fetches { .. }) => true,
        Some(Forecast::Cached { .. } | Forecast::Broken { .. }) | None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage::cost::{Amount, Cost};

    fn step(memory: u64, device: u64, disk: u64) -> Estimate {
        let amount = |least: u64| Amount { likely: None, least, lower: "set `x`".into() };
        let (memory, device, disk) = (amount(memory), amount(device), amount(disk));
        let cost = Cost { memory, device, disk, ..Cost::default() };
        Estimate { cost, price: None }
    }

    #[test]
    fn a_step_is_refused_by_the_first_byte_too_many_and_not_before() {
        let machine = Machine { memory: Some(100), device: Some(10), disk: Some(1000) };
        let steps = [
            step(100, 10, 1000), // all that there is
            step(101, 0, 0),
            step(0, 11, 0),
            step(0, 0, 1001),
            step(500, 500, 500),
        ];
        let estimates: HashMap<usize, Estimate> = steps.into_iter().enumerate().collect();
        let told = |machine: &Machine, certain: &dyn Fn(usize) -> bool| -> Vec<_> {
            let all = refusals(&estimates, machine, certain);
            all.into_iter().map(|r| (r.step, r.what, r.needs, r.has)).collect()
        };
        assert_eq!(
            told(&machine, &|_| true),
            [
                (1, What::Memory, 101, 100),
                (2, What::Device, 11, 10),
                (3, What::Disk, 1001, 1000),
                (4, What::Memory, 500, 100),
                (4, What::Device, 500, 10),
            ]
        );
        assert_eq!(told(&machine, &|step| step == 3), [(3, What::Disk, 1001, 1000)]);
        assert_eq!(told(&Machine::default(), &|_| true), [], "nobody knows what there is");
    }
}
