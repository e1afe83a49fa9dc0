//! Pure state machine: which step may do what next. Ids in, commands out; no clock, no path, no
//! thread, no cache.
//!
//! ```text
//! Waiting → Ready → Done                      found in the cache
//!             └→ Queued → Running → Done      a slot, the claim, the work
//!                  │ ↑      └→ Failed         dependents become Skipped
//!                  └─┴ Blocked                another process holds the claim
//! ```
//!
//! `Ready`: every input has a digest, so the key can be computed and looked up. `Queued`: it is a
//! miss and wants slots. A step whose bytes turn out to be lost goes back from `Done` to `Queued`,
//! and whoever needs them back to `Waiting` (see [`Schedule::rewind`]).

use std::collections::{BTreeSet, VecDeque};

use crate::edges::Edges;

/// Slots, of the machine or of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slots {
    /// Cpu slots (`--jobs`).
    pub cpu: u32,
    /// Whole GPUs.
    pub gpu: u32,
    /// Bytes of memory.
    pub memory: u64,
}

impl Slots {
    fn fits(self, free: Slots) -> bool {
        self.cpu <= free.cpu && self.gpu <= free.gpu && self.memory <= free.memory
    }
    fn less(self, other: Slots) -> Slots {
        Slots {
            cpu: self.cpu.saturating_sub(other.cpu),
            gpu: self.gpu.saturating_sub(other.gpu),
            memory: self.memory.saturating_sub(other.memory),
        }
    }
    fn plus(self, other: Slots) -> Slots {
        Slots {
            cpu: self.cpu + other.cpu,
            gpu: self.gpu + other.gpu,
            memory: self.memory + other.memory,
        }
    }
}

/// What a step is to the schedule.
#[derive(Clone, Debug, Default)]
pub struct Need {
    /// Positions of the steps that must be done before.
    pub after: Vec<usize>,
    /// What it takes while it runs. More than the pool has of cpu means all of it.
    pub slots: Slots,
    /// Expected cost; what lies on the costliest chain goes first.
    pub cost: f64,
}

/// Where a step stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// Some input is not there yet.
    Waiting,
    /// Its key can be computed.
    Ready,
    /// A miss that wants slots.
    Queued,
    /// A miss that another process is working on.
    Blocked,
    /// It holds its slots.
    Running,
    /// Its artifacts are known.
    Done,
    /// Failed for good.
    Failed,
    /// Not run, and it will not be.
    Skipped,
}

impl State {
    fn is_final(self) -> bool {
        matches!(self, State::Done | State::Failed | State::Skipped)
    }
}

/// What the executor is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Compute the key and look it up; answer with [`Schedule::hit`] or [`Schedule::miss`].
    Look(usize),
    /// Slots are granted: claim and run; answer with [`Schedule::blocked`],
    /// [`Schedule::rewind`], [`Schedule::leave`], [`Schedule::done`], [`Schedule::again`] or
    /// [`Schedule::failed`].
    Launch(usize),
}

struct Node {
    state: State,
    unmet: u32,
    slots: Slots,
    priority: f64,
}

/// The machine.
pub struct Schedule {
    nodes: Vec<Node>,
    /// What each step needs.
    after: Edges,
    /// What needs it.
    dependents: Edges,
    ready: VecDeque<usize>,
    queued: BTreeSet<(std::cmp::Reverse<u64>, usize)>,
    free: Slots,
    open: usize,
    running: usize,
    stopped: bool,
    keep_going: bool,
    skipped: Vec<(usize, Option<usize>)>,
}

impl Schedule {
    /// A schedule over `needs`, in an order in which each comes after all it needs.
    pub fn new(needs: &[Need], pool: Slots, keep_going: bool) -> Schedule {
        let mut nodes: Vec<Node> = needs
            .iter()
            .map(|need| Node {
                state: State::Waiting,
                unmet: 0,
                slots: Slots { cpu: need.slots.cpu.clamp(1, pool.cpu.max(1)), ..need.slots },
                priority: need.cost,
            })
            .collect();
        let mut after = Edges::with_capacity(nodes.len());
        for (node, need) in nodes.iter_mut().zip(needs) {
            let mut earlier = need.after.clone();
            earlier.sort_unstable();
            earlier.dedup();
            after.push(&earlier);
            node.unmet = earlier.len() as u32;
        }
        let dependents = after.reversed();
        for step in (0..nodes.len()).rev() {
            let longest = |a: f64, d: usize| a.max(nodes[d].priority);
            nodes[step].priority += dependents.of(step).fold(0.0, longest);
        }
        let mut schedule = Schedule {
            open: nodes.len(),
            nodes,
            after,
            dependents,
            ready: VecDeque::new(),
            queued: BTreeSet::new(),
            free: pool,
            running: 0,
            stopped: false,
            keep_going,
            skipped: Vec::new(),
        };
        for step in 0..schedule.nodes.len() {
            if schedule.nodes[step].unmet == 0 {
                schedule.set(step, State::Ready);
            }
        }
        schedule
    }

    /// Where `step` stands.
    pub fn state(&self, step: usize) -> State {
        self.nodes[step].state
    }

    /// Whether every step is at its end.
    pub fn finished(&self) -> bool {
        self.open == 0
    }

    /// How many steps hold slots.
    pub fn running(&self) -> usize {
        self.running
    }

    /// Steps skipped since the last call, each with the failed step that was the reason.
    pub fn take_skipped(&mut self) -> Vec<(usize, Option<usize>)> {
        std::mem::take(&mut self.skipped)
    }

    /// The next thing to do, if there is any before something else happens.
    pub fn next_command(&mut self) -> Option<Command> {
        while let Some(step) = self.ready.pop_front() {
            if self.nodes[step].state == State::Ready {
                return Some(Command::Look(step));
            }
        }
        let step = self.grant()?;
        self.set(step, State::Running);
        Some(Command::Launch(step))
    }

    /// The first queued step that fits. What does not fit reserves its slots, so that small steps
    /// pass a big one only where they do not delay it.
    fn grant(&self) -> Option<usize> {
        let mut free = self.free;
        for &(_, step) in &self.queued {
            let slots = self.nodes[step].slots;
            if slots.fits(free) {
                return Some(step);
            }
            free = free.less(slots);
            if free.cpu == 0 {
                return None;
            }
        }
        None
    }

    /// The entry of a `Ready` step was there.
    pub fn hit(&mut self, step: usize) {
        self.expect(step, State::Ready);
        self.finish(step);
    }

    /// It was not: the step wants slots.
    pub fn miss(&mut self, step: usize) {
        self.expect(step, State::Ready);
        self.set(step, State::Queued);
    }

    /// Another process holds the claim of a launched step: its slots are free again.
    pub fn blocked(&mut self, step: usize) {
        self.expect(step, State::Running);
        self.set(step, State::Blocked);
    }

    /// The other process let go: look again, or wait for what was sent back meanwhile.
    pub fn released(&mut self, step: usize) {
        self.expect(step, State::Blocked);
        self.go_back(step, State::Ready);
    }

    /// A launched step succeeded (or was found after all).
    pub fn done(&mut self, step: usize) {
        self.expect(step, State::Running);
        self.finish(step);
    }

    /// A launched step is to be tried again.
    pub fn again(&mut self, step: usize) {
        self.expect(step, State::Running);
        if self.stopped {
            self.skip(step, None);
        } else {
            self.go_back(step, State::Queued);
        }
    }

    /// A launched step is not to be run now, for whoever decides: it is skipped, and what needs it.
    pub fn leave(&mut self, step: usize) {
        self.expect(step, State::Running);
        self.skip(step, None);
    }

    /// A step failed for good. Without `keep_going` nothing new is launched after this.
    pub fn failed(&mut self, step: usize) {
        assert!(matches!(self.nodes[step].state, State::Running | State::Ready));
        self.set(step, State::Failed);
        self.skip_dependents(step, Some(step));
        if !self.keep_going {
            self.stop_because(Some(step));
        }
    }

    /// The bytes of the `lost` steps, all done, are gone and `step`, just launched, needs them:
    /// they run again, and it waits for them.
    pub fn rewind(&mut self, step: usize, lost: &[usize]) {
        self.expect(step, State::Running);
        assert!(!lost.is_empty());
        for &earlier in lost {
            if self.nodes[earlier].state == State::Done {
                self.go_back(earlier, State::Queued);
            }
            for nth in 0..self.dependents.count(earlier) {
                let dependent = self.dependents.end(earlier, nth);
                let state = self.nodes[dependent].state;
                if matches!(state, State::Waiting | State::Ready | State::Queued) {
                    self.go_back(dependent, State::Ready);
                }
            }
        }
        self.go_back(step, State::Ready);
    }

    /// Puts a step where its upstream allows: on to `open` if all of it is done.
    fn go_back(&mut self, step: usize, open: State) {
        let states = self.after.of(step).map(|earlier| self.nodes[earlier].state);
        let (mut unmet, mut broken) = (0, false);
        for state in states {
            unmet += u32::from(state != State::Done);
            broken |= matches!(state, State::Failed | State::Skipped);
        }
        self.nodes[step].unmet = unmet;
        match unmet {
            _ if broken => self.skip(step, None),
            0 => self.set(step, open),
            _ => self.set(step, State::Waiting),
        }
    }

    fn skip(&mut self, step: usize, because: Option<usize>) {
        self.set(step, State::Skipped);
        self.skipped.push((step, because));
        self.skip_dependents(step, because);
    }

    /// Launches nothing any more: what does not run is skipped.
    pub fn stop(&mut self) {
        self.stop_because(None);
    }

    fn stop_because(&mut self, because: Option<usize>) {
        self.stopped = true;
        for step in 0..self.nodes.len() {
            if !self.nodes[step].state.is_final() && self.nodes[step].state != State::Running {
                self.set(step, State::Skipped);
                self.skipped.push((step, because));
            }
        }
    }

    fn skip_dependents(&mut self, step: usize, because: Option<usize>) {
        let mut stack: Vec<usize> = self.dependents.of(step).collect();
        while let Some(step) = stack.pop() {
            if !self.nodes[step].state.is_final() && self.nodes[step].state != State::Running {
                self.set(step, State::Skipped);
                self.skipped.push((step, because));
                stack.extend(self.dependents.of(step));
            }
        }
    }

    fn finish(&mut self, step: usize) {
        self.set(step, State::Done);
        for nth in 0..self.dependents.count(step) {
            let d = self.dependents.end(step, nth);
            if self.nodes[d].state == State::Waiting {
                self.nodes[d].unmet -= 1;
                if self.nodes[d].unmet == 0 {
                    self.set(d, State::Ready);
                }
            }
        }
    }

    fn expect(&self, step: usize, state: State) {
        assert_eq!(self.nodes[step].state, state, "step {step}");
    }

    /// Every transition goes through here: queues and counters follow the state.
    fn set(&mut self, step: usize, to: State) {
        let from = std::mem::replace(&mut self.nodes[step].state, to);
        // Priorities are positive, so their bits sort as they do.
        let place = (std::cmp::Reverse(self.nodes[step].priority.max(0.0).to_bits()), step);
        match from {
            State::Queued => drop(self.queued.remove(&place)),
            State::Running => {
                self.running -= 1;
                self.free = self.free.plus(self.nodes[step].slots);
            }
            _ => {}
        }
        match to {
            State::Ready => self.ready.push_back(step),
            State::Queued => drop(self.queued.insert(place)),
            State::Running => {
                self.running += 1;
                self.free = self.free.less(self.nodes[step].slots);
            }
            _ => {}
        }
        self.open += usize::from(from.is_final());
        self.open -= usize::from(to.is_final());
    }
}

#[cfg(test)]
mod tests;
