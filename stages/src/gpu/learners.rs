//! Sets of parameters that are trained on the device, each with its own clip, optimiser step and
//! reaction to numbers that are none: what [`crate::train::learner::Learner`] is on the CPU.
//!
//! All lie in one flat buffer each of masters, gradients, moments and bf16 shadows. An update reads
//! its rate from device memory and writes loss, norm and whether it was finite into a history on
//! the device, so that the host need not wait; [`Learners::settle`] reads it.

use anyhow::Result;
use engine::stage::Context;
use half::bf16;

use super::launch::{Buf, Gpu, Pinned, Slice};
use super::ops::{adamw, reduce};
use super::weights::{Bank, Fallback, Places};
use crate::train::adamw::{Group, Rule};
use crate::train::checkpoint::Saved;
use crate::train::learner::{Facts, Learner};
use crate::train::run::Guard;

/// Updates that can be made before the host reads their history.
pub const SLOTS: usize = 64;

/// One of them.
pub struct Member {
    /// As in [`crate::train::learner::Learner`].
    pub name: String,
    /// All parameters as the host had them at first; what is not trained stays here.
    pub host: Vec<f32>,
    /// Where the trained ones lie.
    pub places: Places,
    /// Ranges of the host's buffer that are trained.
    pub groups: Vec<Group>,
}

impl Member {
    /// The groups in places of the device.
    fn runs(&self) -> Vec<Group> {
        let runs = |group: &Group| {
            let found = self.places.runs(group.range.clone());
            let Group { decay, scale, .. } = *group;
            found.into_iter().map(move |range| Group { range, decay, scale })
        };
        self.groups.iter().flat_map(runs).collect()
    }
}

/// All learners of a step.
pub struct Learners {
    gpu: Gpu,
    members: Vec<Member>,
    guards: Vec<Guard>,
    params: Buf<f32>,
    half: Buf<bf16>,
    grads: Buf<f32>,
    m: Buf<f32>,
    v: Buf<f32>,
    updates: adamw::Updates,
    /// Loss of every learner, summed over the micro-batches of an update, then the extra figures.
    figures: Buf<f32>,
    rate: Buf<f32>,
    slot: Buf<u32>,
    rates: Pinned<f32>,
    slots: Pinned<u32>,
    /// Marks of the updates whose rates are in `rates`.
    marks: Vec<usize>,
    made: u64,
    settled: u64,
}

impl Learners {
    /// Uploads `members`, whose places follow each other from 0 on.
    pub fn new(gpu: &Gpu, members: Vec<Member>, clip: f64) -> Result<Learners> {
        Learners::with_rule(gpu, members, clip, Rule::default())
    }

    /// The same with the optimiser's constants.
    pub fn with_rule(gpu: &Gpu, members: Vec<Member>, clip: f64, rule: Rule) -> Result<Learners> {
        let len = members.iter().map(|member| member.places.end()).max().unwrap_or(0);
        let mut flat = vec![0.0; len];
        for member in &members {
            member.places.scatter(&member.host, 0, &mut flat);
        }
        let half: Vec<bf16> = flat.iter().map(|v| bf16::from_f32(*v)).collect();
        let groups: Vec<Vec<Group>> = members.iter().map(Member::runs).collect();
        let count = members.len();
        Ok(Learners {
            gpu: gpu.clone(),
            guards: vec![Guard::default(); count],
            params: gpu.buf("master weights", &flat)?,
            half: gpu.buf("weights", &half)?,
            grads: gpu.zeros("gradients", len)?,
            m: gpu.zeros("first moments", len)?,
            v: gpu.zeros("second moments", len)?,
            updates: adamw::Updates::new(gpu, &groups, rule, clip as f32, SLOTS)?,
            figures: gpu.zeros("losses", 2 * count)?,
            rate: gpu.zeros("rate", 1)?,
            slot: gpu.zeros("slot", 1)?,
            rates: gpu.pinned(SLOTS)?,
            slots: gpu.pinned(SLOTS)?,
            marks: vec![0; SLOTS],
            members,
            made: 0,
            settled: 0,
        })
    }

    /// The learners.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Skipped updates of learner `at`.
    pub fn guard(&self, at: usize) -> &Guard {
        &self.guards[at]
    }

    /// The parameters of learner `at`; `other` serves its frozen parts.
    pub fn bank(&self, at: usize, other: Option<Box<dyn Fallback>>) -> Bank {
        let places = self.members[at].places.clone();
        Bank::trained(places, self.half.all(), self.params.all(), self.grads.all(), other)
    }

    /// Where the loss of learner `at` is added up over the micro-batches of an update.
    pub fn loss(&self, at: usize) -> Slice<f32> {
        self.figures.all().range(at..at + 1)
    }

    /// Where the second figure of learner `at` is added up.
    pub fn extra(&self, at: usize) -> Slice<f32> {
        let at = self.members.len() + at;
        self.figures.all().range(at..at + 1)
    }

    /// Begins an update: zeroes losses and sends the rate (gradients were zeroed by the last one).
    pub fn begin(&mut self, rate: f32) -> Result<()> {
        let slot = (self.made % SLOTS as u64) as usize;
        if self.made >= SLOTS as u64 {
            self.gpu.passed(self.marks[slot])?;
        }
        self.rates.values_mut()[slot] = rate;
        self.slots.values_mut()[slot] = slot as u32;
        self.gpu.upload_later(self.rate.all(), &self.rates, slot..slot + 1);
        self.gpu.upload_later(self.slot.all(), &self.slots, slot..slot + 1);
        self.marks[slot] = self.gpu.mark();
        self.gpu.fill(self.figures.all(), 0);
        Ok(())
    }

    /// Queues clip and optimiser step of all; the same work every time, so it can be a graph.
    pub fn finish(&self) {
        let count = self.members.len();
        let figures = self.figures.all();
        let (losses, extras) = (figures.range(0..count), figures.range(count..2 * count));
        let flat = adamw::Flat {
            params: self.params.all(),
            grads: self.grads.all(),
            m: self.m.all(),
            v: self.v.all(),
            shadow: Some(self.half.all()),
        };
        let at = (self.rate.all(), self.slot.all());
        self.updates.step(&self.gpu, flat, Some((losses, extras)), at, true);
    }

    /// Notes that an update was queued.
    pub fn made(&mut self) {
        self.made += 1;
    }

    /// Whether the history must be read before the next update.
    pub fn full(&self) -> bool {
        self.made - self.settled >= SLOTS as u64
    }

    /// Waits for all updates, gives what each left (one row an update) and fails at a guard's
    /// bound. `done` is the number of updates that the step has made.
    pub fn settle(&mut self, ctx: &Context, done: u64) -> Result<Vec<Vec<adamw::Record>>> {
        let count = (self.made - self.settled) as usize;
        if count == 0 {
            return Ok(Vec::new());
        }
        let all = self.updates.records(&self.gpu, 0..SLOTS)?;
        let mut rows = Vec::new();
        for i in 0..count {
            let slot = ((self.settled + i as u64) % SLOTS as u64) as usize;
            let row = &all[slot * self.members.len()..][..self.members.len()];
            for (at, record) in row.iter().enumerate() {
                let (update, made) = (done - (count - i) as u64, record.factor > 0.0);
                self.guards[at].note(ctx, &self.members[at].name, update, made)?;
            }
            rows.push(row.to_vec());
        }
        self.settled = self.made;
        Ok(rows)
    }

    /// What the newest update left of each learner; waits for it.
    pub fn newest(&self) -> Result<Vec<adamw::Record>> {
        let slot = (self.made.max(1) - 1) as usize % SLOTS;
        self.updates.records(&self.gpu, slot..slot + 1)
    }

    /// Whether no learner skipped its last update, as far as the host knows.
    pub fn healthy(&self) -> bool {
        self.guards.iter().all(|guard| guard.in_row == 0)
    }

    /// All parameters of learner `at`, with what it is now on the device.
    pub fn params(&self, at: usize) -> Result<Vec<f32>> {
        self.member(at, &self.params)
    }

    fn member(&self, at: usize, from: &Buf<f32>) -> Result<Vec<f32>> {
        let member = &self.members[at];
        let (first, end) = (member.places.units().first().map_or(0, |u| u.at), member.places.end());
        let values = self.gpu.download(from.all().range(first..end))?;
        let mut out = match std::ptr::eq(from, &raw const self.params) {
            true => member.host.clone(),
            false => vec![0.0; member.host.len()],
        };
        member.places.gather(&values, first, &mut out);
        Ok(out)
    }

    /// Gives parameters and counts of skipped updates back to the host's learners, in order.
    pub fn give_back<'a>(&self, host: impl Iterator<Item = &'a mut Learner>) -> Result<()> {
        for (at, learner) in host.enumerate() {
            learner.params = self.params(at)?;
            learner.guard = self.guards[at].clone();
        }
        Ok(())
    }

    /// What a checkpoint needs besides [`Learners::buffers`].
    pub fn facts(&self) -> Result<Vec<Facts>> {
        let updates = self.gpu.download(self.updates.made_i.all())?;
        let facts = |(updates, guard): (u32, &Guard)| Facts::new(updates.into(), guard.clone());
        Ok(updates.into_iter().zip(&self.guards).map(facts).collect())
    }

    /// Weights and moments of all, named as the CPU's are.
    pub fn buffers(&self) -> Result<Vec<(String, Vec<f32>)>> {
        let mut all = Vec::new();
        for (at, member) in self.members.iter().enumerate() {
            for (name, from) in [("params", &self.params), ("m", &self.m), ("v", &self.v)] {
                all.push((format!("{}.{name}", member.name), self.member(at, from)?));
            }
        }
        Ok(all)
    }

    /// Takes a checkpoint's place.
    pub fn restore(&mut self, saved: &Saved, facts: Vec<Facts>) -> Result<()> {
        let updates: Vec<u32> = facts.iter().map(|facts| facts.updates() as u32).collect();
        self.gpu.upload(self.updates.made_i.all(), &updates);
        self.guards = facts.into_iter().map(Facts::guard).collect();
        let len = self.params.len();
        for (name, to) in [("params", &self.params), ("m", &self.m), ("v", &self.v)] {
            let mut flat = vec![0.0; len];
            for member in &self.members {
                let values = saved.all(&format!("{}.{name}", member.name), member.host.len())?;
                member.places.scatter(&values, 0, &mut flat);
            }
            self.gpu.upload(to.all(), &flat);
            if name == "params" {
                let half: Vec<bf16> = flat.iter().map(|v| bf16::from_f32(*v)).collect();
                self.gpu.upload(self.half.all(), &half);
            }
        }
        self.gpu.status()
    }

    /// Adds `scale` times the sum of `values` to a loss or a second figure.
    pub fn add_sum(&self, to: Slice<f32>, values: Slice<f32>, partials: Slice<f32>, scale: f32) {
        reduce::sum(&self.gpu, values, partials, to, scale, true);
    }
}
