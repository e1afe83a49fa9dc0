//! Random graphs, played by a random executor that checks every promise on the way.

use super::*;
use proptest::prelude::*;

const POOL: Slots = Slots { cpu: 4, gpu: 1, memory: 100 };

/// Random graphs: each step needs some earlier ones and some slots.
fn graph() -> impl Strategy<Value = Vec<Need>> {
    let need = (
        prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        0u32..6,
        0u32..2,
        0u64..100,
        0.0..5.0f64,
    );
    prop::collection::vec(need, 1..40).prop_map(|raw| {
        let step = |(i, (after, cpu, gpu, memory, cost)): (
            usize,
            (Vec<prop::sample::Index>, _, _, _, _),
        )| {
            let after = if i == 0 { vec![] } else { after.iter().map(|a| a.index(i)).collect() };
            Need { after, slots: Slots { cpu, gpu, memory }, cost }
        };
        raw.into_iter().enumerate().map(step).collect()
    })
}

/// A random executor that checks every promise on the way.
struct Player<'a> {
    needs: &'a [Need],
    schedule: Schedule,
    choices: std::iter::Cycle<std::slice::Iter<'a, u8>>,
    running: Vec<usize>,
    blocked: Vec<usize>,
    detours: usize,
    failed: bool,
    stopped: bool,
    keep_going: bool,
}

impl Player<'_> {
    fn choose(&mut self, n: usize) -> usize {
        usize::from(*self.choices.next().unwrap_or(&0)) % n.max(1)
    }

    /// A detour now and then, but not for ever.
    fn detour(&mut self, n: usize) -> bool {
        let taken = self.detours < 40 && self.choose(n) == 0;
        self.detours += usize::from(taken);
        taken
    }

    fn turn(&mut self) {
        match self.schedule.next_command() {
            Some(Command::Look(step)) => {
                self.upstream_done(step);
                if self.choose(3) == 0 { self.schedule.hit(step) } else { self.schedule.miss(step) }
            }
            Some(Command::Launch(step)) => self.launch(step),
            None if !self.running.is_empty() => self.end_one(),
            None => {
                let schedule = &self.schedule;
                self.blocked.retain(|&s| schedule.state(s) == State::Blocked);
                self.schedule.released(self.blocked.pop().expect("something can happen"));
            }
        }
    }

    fn upstream_done(&self, step: usize) {
        let done = |&a: &usize| self.schedule.state(a) == State::Done;
        assert!(self.needs[step].after.iter().all(done));
    }

    fn launch(&mut self, step: usize) {
        assert!(!self.stopped, "nothing starts after a stop");
        assert!(self.keep_going || !self.failed, "nothing starts after a failure");
        assert!(!self.running.contains(&step), "never twice at once");
        let after = self.needs[step].after.clone();
        let lost: Vec<usize> = after.into_iter().filter(|_| self.detour(9)).collect();
        if !lost.is_empty() {
            self.schedule.rewind(step, &lost);
        } else if self.detour(8) {
            self.schedule.blocked(step);
            self.blocked.push(step);
        } else {
            self.upstream_done(step);
            self.running.push(step);
            let slots = |&s: &usize| {
                let slots = self.needs[s].slots;
                Slots { cpu: slots.cpu.clamp(1, POOL.cpu), ..slots }
            };
            let used = self.running.iter().map(slots).fold(Slots::default(), Slots::plus);
            assert!(used.fits(POOL), "{used:?}");
        }
    }

    fn end_one(&mut self) {
        let at = self.choose(self.running.len());
        let step = self.running.swap_remove(at);
        if self.choose(10) == 0 {
            self.schedule.failed(step);
            self.failed = true;
        } else if self.detour(10) {
            self.schedule.again(step);
        } else {
            self.schedule.done(step);
        }
    }
}

fn play(needs: &[Need], choices: &[u8], keep_going: bool, stop_at: Option<usize>) -> Vec<State> {
    let mut player = Player {
        needs,
        schedule: Schedule::new(needs, POOL, keep_going),
        choices: choices.iter().cycle(),
        running: Vec::new(),
        blocked: Vec::new(),
        detours: 0,
        failed: false,
        stopped: false,
        keep_going,
    };
    for turn in 1.. {
        if player.schedule.finished() {
            break;
        }
        assert!(turn < 20 * needs.len() + 300, "it ends");
        if stop_at == Some(turn) {
            player.schedule.stop();
            player.blocked.clear();
            player.stopped = true;
        } else {
            player.turn();
        }
    }
    assert!(player.running.is_empty());
    (0..needs.len()).map(|s| player.schedule.state(s)).collect()
}

proptest! {
    #[test]
    fn runs_every_step_in_order_within_the_pools(needs in graph(), choices in prop::collection::vec(any::<u8>(), 1..200)) {
        for keep_going in [false, true] {
            let states = play(&needs, &choices, keep_going, None);
            for (step, need) in needs.iter().enumerate() {
                let broken = |&a: &usize| matches!(states[a], State::Failed | State::Skipped);
                if keep_going && !need.after.iter().any(broken) {
                    prop_assert!(matches!(states[step], State::Done | State::Failed));
                }
            }
        }
    }

    #[test]
    fn stops_whenever_it_is_told(needs in graph(), choices in prop::collection::vec(any::<u8>(), 1..200), at in 1usize..60) {
        play(&needs, &choices, true, Some(at));
    }
}

fn need(after: &[usize], cpu: u32, cost: f64) -> Need {
    Need { after: after.to_vec(), slots: Slots { cpu, gpu: 0, memory: 0 }, cost }
}

fn launches(schedule: &mut Schedule) -> Vec<usize> {
    let mut found = Vec::new();
    while let Some(command) = schedule.next_command() {
        match command {
            Command::Look(step) => schedule.miss(step),
            Command::Launch(step) => found.push(step),
        }
    }
    found
}

#[test]
fn the_costliest_chain_goes_first() {
    let needs = [need(&[], 4, 1.0), need(&[], 4, 1.0), need(&[1], 4, 5.0)];
    assert_eq!(launches(&mut Schedule::new(&needs, POOL, false)), [1]);
}

#[test]
fn small_steps_do_not_starve_a_big_one() {
    let needs = [need(&[], 2, 9.0), need(&[], 4, 5.0), need(&[], 1, 1.0), need(&[], 1, 1.0)];
    let mut schedule = Schedule::new(&needs, POOL, false);
    assert_eq!(launches(&mut schedule), [0], "the rest is kept for step 1");
    schedule.done(0);
    assert_eq!(launches(&mut schedule), [1]);
}
#[test]
fn what_is_left_takes_what_needs_it_along_and_nothing_else() {
    let needs = [need(&[], 4, 9.0), need(&[0], 1, 1.0), need(&[], 1, 1.0)];
    let mut schedule = Schedule::new(&needs, POOL, false);
    assert_eq!(launches(&mut schedule), [0]);
    schedule.leave(0);
    assert_eq!(launches(&mut schedule), [2]);
    assert_eq!(schedule.take_skipped(), [(0, None), (1, None)]);
}
