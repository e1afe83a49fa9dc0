//! Whether a remote is worth asking: after some failures in a row it counts as down for a while,
//! so that a dead one costs a few seconds a run and not a time-out a step. Knows no remote.

use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// So many failures in a row mean that it is down.
pub(super) const FAILURES: u32 = 3;

/// Counts failures in a row.
#[derive(Debug)]
pub(super) struct Breaker {
    first_pause: Duration,
    /// The longest pause; each is twice the one before, until something succeeds.
    longest: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    why: String,
    down: Option<Pause>,
}

#[derive(Debug)]
struct Pause {
    until: Instant,
    length: Duration,
    /// Somebody was let through after it, to see.
    trial: bool,
}

impl Breaker {
    pub fn new(first_pause: Duration, longest: Duration) -> Breaker {
        Breaker { first_pause: first_pause.min(longest), longest, state: Mutex::default() }
    }

    /// Whether one may ask now, without taking the turn; else why not.
    pub fn peek(&self, now: Instant) -> Result<(), String> {
        let state = self.locked();
        match &state.down {
            Some(pause) if now < pause.until => Err(refusal(&state.why, pause, now)),
            _ => Ok(()),
        }
    }

    /// Whether to ask now, else why not. After a pause one may, and the others still may not.
    pub fn ask(&self, now: Instant) -> Result<(), String> {
        let State { why, down, .. } = &mut *self.locked();
        let Some(pause) = down else { return Ok(()) };
        if now < pause.until {
            return Err(refusal(why, pause, now));
        }
        pause.trial = true;
        pause.until = now + pause.length;
        Ok(())
    }

    /// The remote did as it was asked, or said that it has no such thing.
    pub fn worked(&self) {
        *self.locked() = State::default();
    }

    /// It did not.
    pub fn failed(&self, now: Instant, why: &str) {
        let mut state = self.locked();
        state.failures += 1;
        state.why = why.to_string();
        let failures = state.failures;
        match &mut state.down {
            None if failures < FAILURES => {}
            None => {
                let (until, length) = (now + self.first_pause, self.first_pause);
                state.down = Some(Pause { until, length, trial: false });
            }
            Some(pause) if pause.trial => {
                let length = (pause.length * 2).min(self.longest);
                *pause = Pause { until: now + length, length, trial: false };
            }
            // Somebody who had asked before.
            Some(_) => {}
        }
    }

    /// Whoever asked cannot say whether it works: somebody else may try.
    pub fn undecided(&self, now: Instant) {
        if let Some(pause) = &mut self.locked().down
            && pause.trial
        {
            pause.until = now;
        }
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn refusal(why: &str, pause: &Pause, now: Instant) -> String {
    let left = (pause.until - now).as_secs() + 1;
    format!("{why}; it is asked again in {left} s")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_secs(10);
    const LONGEST: Duration = Duration::from_secs(600);

    #[test]
    fn down_after_three_in_a_row_and_longer_each_time() {
        let (breaker, start) = (Breaker::new(PAUSE, LONGEST), Instant::now());
        for _ in 0..2 {
            breaker.failed(start, "no answer");
        }
        breaker.worked();
        for _ in 0..2 {
            breaker.failed(start, "no answer");
        }
        breaker.ask(start).unwrap();
        breaker.failed(start, "no answer");
        let why = breaker.ask(start).unwrap_err();
        assert_eq!(why, "no answer; it is asked again in 11 s");
        breaker.failed(start, "late");
        breaker.ask(start + PAUSE).unwrap();
        breaker.ask(start + PAUSE).unwrap_err();
        breaker.undecided(start + PAUSE);
        breaker.ask(start + PAUSE).unwrap();
        breaker.failed(start + PAUSE, "no answer");
        breaker.ask(start + PAUSE * 2).unwrap_err();
        breaker.ask(start + PAUSE * 3).unwrap();
        breaker.worked();
        breaker.ask(start).unwrap();
    }

    #[test]
    fn never_longer_than_somebody_waits() {
        let (breaker, mut now) = (Breaker::new(LONGEST, PAUSE), Instant::now());
        for _ in 0..20 {
            breaker.failed(now, "no answer");
            now += PAUSE;
            breaker.ask(now).unwrap();
        }
    }
}
