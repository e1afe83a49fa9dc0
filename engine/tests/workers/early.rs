//! Workers that are started before it is known what for.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::toys::Bench;

const STEPS: &str = "steps:
  a: { stage: who, resources: { gpu: 1 } }
  b: { stage: who, with: { text: b }, after: [a], resources: { cpu: 2 } }
  c: { stage: who, with: { text: c }, after: [b], resources: { cpu: 2 } }
";

fn pid(id: u32) -> Pid {
    Pid::from_raw(id.try_into().unwrap()).unwrap()
}

#[test]
fn the_first_step_without_gpus_is_run_by_it_and_so_is_the_next_of_its_kind() {
    let bench = Bench::new();
    let early = bench.early();
    let id = early.id().unwrap().to_string();
    let ran = bench.run_with(STEPS, 1, Some(early));
    assert!(ran.failures.is_empty(), "{:?}", ran.failures);
    let [a, b, c] = ["a", "b", "c"].map(|step| ran.who(step));
    assert!(a.1 != id && b.1 == id && c.1 == id, "{id}: {:?}", ran.texts);
}

#[test]
fn another_takes_the_place_of_one_that_ended() {
    let bench = Bench::new();
    let early = bench.early();
    let id = early.id().unwrap();
    kill_process(pid(id), Signal::KILL).unwrap();
    // Until it is a zombie, which has no program.
    let started = Instant::now();
    while std::fs::read_link(format!("/proc/{id}/exe")).is_ok() {
        assert!(started.elapsed() < Duration::from_secs(60), "it does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
    let ran = bench.run_with(STEPS, 1, Some(early));
    assert!(ran.failures.is_empty(), "{:?}", ran.failures);
    assert_ne!(ran.who("b").1, id.to_string());
}

#[test]
fn it_ends_with_the_run_that_does_not_want_it() {
    let bench = Bench::new();
    let early = bench.early();
    let id = early.id().unwrap();
    let ran = bench.run_with("steps: { a: { stage: who, resources: { gpu: 1 } } }", 1, Some(early));
    assert_eq!(ran.texts.len(), 1);
    assert!(test_kill_process(pid(id)).is_err(), "it is still there");
    let early = bench.early();
    let id = early.id().unwrap();
    drop(early);
    assert!(test_kill_process(pid(id)).is_err(), "it is still there");
}
