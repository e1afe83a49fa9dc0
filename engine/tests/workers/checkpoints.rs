//! Checkpoints written in the background are whole or not there, however the step ends.

use engine::event::Failure;

use crate::toys::Bench;

#[test]
fn killed_in_the_middle_the_one_before_stays() {
    let ran = Bench::new().run("steps:\n  a: { stage: killed_writing, retries: 1 }\n", 0);
    let [(_, Failure::OutOfMemory, _, true)] = &ran.failures[..] else {
        panic!("{:?}", ran.failures)
    };
    assert_eq!(ran.texts["a"], "from 1: whole");
}

#[test]
fn a_step_that_fails_waits_for_its_checkpoint() {
    for (text, failure) in [("no luck", Failure::Error), ("panic", Failure::Panic)] {
        let bench = Bench::new();
        let yaml = format!("steps:\n  a: {{ stage: fails_meanwhile, with: {{ text: {text} }} }}\n");
        let ran = bench.run(&yaml, 0);
        let [(_, kind, message, false)] = &ran.failures[..] else { panic!("{:?}", ran.failures) };
        assert!(*kind == failure && message.contains("no luck"), "{message}");
        assert_eq!(bench.run(&yaml, 0).texts["a"], "from 7: late");
    }
}

#[test]
fn a_checkpoint_that_is_not_written_fails_the_step() {
    let ran = Bench::new().run("steps:\n  a: { stage: bad_checkpoint }\n", 0);
    let [(_, Failure::Error, message, false)] = &ran.failures[..] else {
        panic!("{:?}", ran.failures)
    };
    assert_eq!(message, "the checkpoint at 5 was not written: the disk is full");
}
