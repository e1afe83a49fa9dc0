//! Random trials: several processes work on one store, are killed at named points or at any time,
//! frozen and woken, lose what was not synced; then a fresh process judges.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::acts::Actor;
use crate::loss::{POINTS, judged};
use crate::story::*;
use crate::support::*;

/// Run as a child: does anything, by a seed.
#[test]
fn child_does_anything() {
    let Some(cache) = as_child() else { return };
    let seed = std::env::var("CACHE_TEST_SEED").unwrap().parse().unwrap();
    let mut actor = Actor::new(cache, seed);
    for _ in 0..25 {
        actor.anything();
    }
}

/// How a process of a trial ends.
#[derive(Debug, Clone, Copy)]
enum End {
    ByItself,
    AtPoint,
    Killed { after: Duration },
    Frozen { after: Duration, on: Duration },
}

struct Worker {
    child: Child,
    end: End,
    started: Instant,
    stopped: bool,
}

impl Worker {
    fn start(root: &Path, dice: &mut Dice, alone: bool) -> Worker {
        let mut child = child("soak::child_does_anything", root);
        child.env("CACHE_TEST_SEED", dice.next().to_string()).stderr(Stdio::piped());
        if dice.below(2) == 0 {
            child.env(PARK, "1");
        }
        let mut moment = |most: usize| Duration::from_millis(dice.below(most) as u64);
        let (after, on) = (moment(40), moment(60));
        let end = match dice.below(10) {
            0..5 => End::AtPoint,
            5..8 => End::Killed { after },
            8 => End::Frozen { after, on },
            _ => End::ByItself,
        };
        if let End::AtPoint = end {
            let point = format!("{}@{}", dice.pick(&POINTS), 1 + dice.below(3));
            child.env("PIPE_CRASH_AT", point);
            // Others would have lost their part, too.
            if alone {
                child.env("PIPE_CRASH_LOSE", dice.next().to_string());
            }
        }
        let child = child.spawn().unwrap();
        Worker { child, end, started: Instant::now(), stopped: false }
    }

    fn signal(&self, signal: Signal) {
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    /// Does what is due; whether it has ended.
    fn turn(&mut self) -> bool {
        if self.child.try_wait().unwrap().is_some() {
            return true;
        }
        let age = self.started.elapsed();
        match self.end {
            End::Killed { after } if age >= after => self.signal(Signal::KILL),
            End::Frozen { after, on } if age >= after + on => {
                self.signal(Signal::CONT);
                self.end = End::ByItself;
            }
            End::Frozen { after, .. } if age >= after && !self.stopped => {
                self.signal(Signal::STOP);
                self.stopped = true;
            }
            _ => assert!(age < Duration::from_secs(60), "it hangs"),
        }
        false
    }

    fn end(self, what: &str) -> bool {
        let output = self.child.wait_with_output().unwrap();
        let killed = output.status.signal() == Some(9);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(killed || output.status.success(), "{what}: {}\n{told}", output.status);
        killed
    }
}

/// Gives how many processes were killed.
fn trial(seed: u64) -> usize {
    let home = Home::in_memory();
    let (root, dir) = (home.root(), home.dir);
    drop(home.cache);
    let mut dice = Dice(seed);
    let what = format!("PIPE_SOAK_SEED={seed}");
    let mut killed = 0;
    for _ in 0..2 {
        let many = [1, 2, 3, 3][dice.below(4)];
        let mut workers: Vec<Worker> =
            (0..many).map(|_| Worker::start(&root, &mut dice, many == 1)).collect();
        while !workers.iter_mut().map(Worker::turn).fold(true, |all, one| all & one) {
            std::thread::sleep(Duration::from_millis(2));
        }
        killed += workers.into_iter().filter_map(|w| w.end(&what).then_some(())).count();
    }
    judged(&root, &what);
    drop(dir);
    killed
}

#[test]
#[expect(clippy::print_stdout, reason = "how often, and from which seed, is to be told")]
fn nothing_is_lost_and_nothing_wrong_whoever_is_killed_when() {
    let given = std::env::var("PIPE_SOAK_SEED").ok().and_then(|seed| seed.parse().ok());
    let (first, trials) = match given {
        Some(seed) => (seed, 1),
        None => (RandomState::new().hash_one(0) >> 16, soak(100)),
    };
    let started = Instant::now();
    let (next, killed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= trials {
                        break;
                    }
                    killed.fetch_add(trial(first + at as u64), Ordering::Relaxed);
                }
            });
        }
    });
    let (killed, took) = (killed.into_inner(), started.elapsed());
    println!("{trials} trials from seed {first}: {killed} processes killed, {took:.1?}");
    assert!(trials < 50 || killed > trials, "{killed} killed in {trials} trials");
}
