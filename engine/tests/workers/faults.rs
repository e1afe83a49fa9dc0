//! A worker that dies ends one step; others go on, in fresh workers.

use engine::event::Failure;

use crate::toys::Bench;

#[test]
fn a_dead_worker_is_told_and_the_rest_goes_on() {
    let ran = Bench::new().run(
        "steps:
  a: { stage: abort }
  b: { stage: segfault }
  c: { stage: who, with: { ms: 100 } }
  after_a: { stage: who, in: { parts: a.text } }
  after_c: { stage: who, in: { parts: c.text } }
",
        0,
    );
    let mut failures = ran.failures.clone();
    failures.sort_by_key(|failure| failure.0.clone());
    let [(a, first, abort, false), (b, second, segv, false)] = &failures[..] else {
        panic!("{failures:?}")
    };
    assert_eq!((a.as_str(), b.as_str()), ("a", "b"));
    assert_eq!((*first, *second), (Failure::Crash, Failure::Crash));
    assert!(abort.contains("SIGABRT") && segv.contains("SIGSEGV"), "{abort} {segv}");
    assert_eq!(ran.texts.keys().collect::<Vec<_>>(), ["after_c", "c"]);
}

#[test]
fn what_crashed_or_failed_on_a_device_is_tried_again_elsewhere() {
    for (stage, failure) in [("fault_once", Failure::Fault), ("abort_once", Failure::Crash)] {
        let yaml = format!(
            "steps:
  before: {{ stage: who, resources: {{ gpu: 1 }} }}
  again: {{ stage: {stage}, retries: 1, after: [before], resources: {{ gpu: 1 }} }}
  last: {{ stage: who, with: {{ text: other }}, after: [again], resources: {{ gpu: 1 }} }}
"
        );
        let ran = Bench::new().run(&yaml, 1);
        let [(step, kind, message, true)] = &ran.failures[..] else { panic!("{:?}", ran.failures) };
        assert_eq!((step.as_str(), *kind), ("again", failure));
        if failure == Failure::Fault {
            assert_eq!(message, "the GPU failed in `ssd_scan`: an illegal address");
        }
        let [before, again, last] = ["before", "again", "last"].map(|step| ran.who(step));
        assert_ne!(before, again, "a fresh worker");
        assert_eq!(again, last, "a warm one");
    }
}
