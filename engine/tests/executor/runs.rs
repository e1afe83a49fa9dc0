//! Single runs: order, cache, failures, force, two at once, many steps.

use std::fmt::Write as _;

use cache::Cache;
use engine::event::{Event, Failure};

use crate::toys::{Bench, run_on};

const CHAIN: &str = "steps:
  a: { stage: concat, with: { text: a } }
  b: { stage: concat, in: { parts: a.text }, with: { text: b } }
  c: { stage: concat, in: { parts: [b.text, a.text] }, with: { text: c } }
";

#[test]
fn each_step_once_in_order_and_then_cached() {
    let bench = Bench::new();
    let first = bench.run(CHAIN);
    assert_eq!(first.launched(), ["a", "b", "c"]);
    assert_eq!(first.text(&bench.cache, "c"), "abac");
    let second = bench.run(CHAIN);
    assert_eq!((second.launched().len(), second.summary.cached), (0, 3));
    assert_eq!(first.digests(), second.digests());
}

#[test]
fn equal_bytes_stop_the_ripple() {
    let bench = Bench::new();
    let yaml = |text: &str| CHAIN.replace("{ text: a }", &format!("{{ text: {text}, take: 1 }}"));
    bench.run(&yaml("abc"));
    assert_eq!(bench.run(&yaml("axy")).launched(), ["a"]);
    assert_eq!(bench.run(&yaml("xyz")).launched(), ["a", "b", "c"]);
}

#[test]
fn a_panic_is_told_with_its_place_and_the_rest_goes_on() {
    let bench = Bench::new();
    let yaml = "steps:
  a: { stage: panic, with: { text: one thing } }
  b: { stage: panic, with: { text: another thing } }
  after_a: { stage: concat, in: { parts: a.text } }
  c: { stage: concat, with: { text: c, ms: 50 } }
  after_c: { stage: concat, in: { parts: c.text } }
";
    let ran = bench.run_with(yaml, |_, options| options.keep_going = true);
    let mut failures = ran.failures();
    failures.sort_by_key(|failure| failure.0);
    for ((name, failure, message, retry), (wanted, text)) in
        failures.into_iter().zip([("a", "one thing"), ("b", "another thing")])
    {
        assert_eq!((name, failure, retry), (wanted, Failure::Panic, false));
        assert!(message.contains(text) && message.contains("toys.rs:"), "{message}");
    }
    assert_eq!(ran.skipped(), ["after_a"]);
    assert_eq!((ran.summary.ran, ran.summary.failed), (2, 2));
}

#[test]
fn without_keep_going_nothing_new_starts_after_a_failure() {
    let bench = Bench::new();
    let yaml = "steps:
  a: { stage: fail, with: { text: no luck } }
  b: { stage: concat, after: [a] }
  c: { stage: concat, with: { ms: 100 } }
  d: { stage: concat, in: { parts: c.text } }
";
    let ran = bench.run(yaml);
    assert_eq!(ran.failures(), [("a", Failure::Error, "no luck", false)]);
    let mut skipped = ran.skipped();
    skipped.sort_unstable();
    assert_eq!(skipped, ["b", "d"]);
    let because = ran.events.iter().find_map(|e| match e {
        Event::Skipped { step, because } if ran.plan.steps[*step].name == "b" => Some(*because),
        _ => None,
    });
    assert_eq!(because.flatten().map(|s| ran.plan.steps[s].name.as_str()), Some("a"));
}

#[test]
fn divergence_is_never_tried_again() {
    let bench = Bench::new();
    let ran =
        bench.run("steps:\n  a: { stage: diverge, retries: 5, with: { text: lr too high } }\n");
    assert_eq!(ran.failures(), [("a", Failure::Diverged, "lr too high", false)]);
    assert_eq!(ran.launched(), ["a"]);
}

#[test]
fn a_failing_device_is_named_and_tried_again() {
    let bench = Bench::new();
    let yaml = "steps:
  a: { stage: fault, retries: 1, with: { text: an illegal address } }
  b: { stage: memory, retries: 1, with: { text: too little memory for the logits } }
  c: { stage: concat, after: [], with: { text: c, ms: 20 } }
  after_c: { stage: concat, in: { parts: c.text } }
";
    let ran = bench.run_with(yaml, |_, options| options.keep_going = true);
    let mut told = ran.failures();
    told.sort_by_key(|failure| failure.0);
    let fault = "in update 3: the GPU failed in `ssd_scan`: an illegal address";
    let memory = "too little memory for the logits";
    let wanted = [
        ("a", Failure::Fault, fault, true),
        ("a", Failure::Fault, fault, false),
        ("b", Failure::OutOfMemory, memory, true),
        ("b", Failure::OutOfMemory, memory, false),
    ];
    assert_eq!(told, wanted);
    assert_eq!((ran.summary.ran, ran.summary.failed), (2, 2));
}

#[test]
fn an_output_that_was_not_made_is_an_error() {
    let bench = Bench::new();
    let ran = bench.run("steps:\n  a: { stage: lazy }\n");
    let message = "the stage made nothing for its output `text`";
    assert_eq!(ran.failures(), [("a", Failure::Error, message, false)]);
}

#[test]
fn after_orders_steps_that_share_nothing() {
    let bench = Bench::new();
    let yaml = "steps:
  z: { stage: concat, after: [y], with: { text: z } }
  y: { stage: concat, after: [x], with: { text: y, ms: 20 } }
  x: { stage: concat, with: { text: x, ms: 20 } }
";
    assert_eq!(bench.run(yaml).launched(), ["x", "y", "z"]);
    let other = yaml.replace("text: x", "text: xx");
    assert_eq!(bench.run(&other).launched(), ["x"], "order is no input");
}

#[test]
fn a_file_that_changes_under_a_step_fails_it() {
    let bench = Bench::new();
    std::fs::write(bench.path().join("f.txt"), "text").unwrap();
    let ran = bench.run("steps:\n  a: { stage: meddle, retries: 3, in: { parts: ./f.txt } }\n");
    let [("a", Failure::Input, message, false)] = ran.failures()[..] else {
        panic!("{:?}", ran.failures())
    };
    assert!(message.contains("f.txt") && message.contains("changed"), "{message}");
    // Nothing was published: with the file as it now is, the step has another key and runs.
    let again = bench.run("steps:\n  a: { stage: concat, in: { parts: ./f.txt } }\n");
    assert_eq!(again.text(&bench.cache, "a"), "text and more");
}

#[test]
fn a_forced_result_replaces_the_one_before() {
    let bench = Bench::new();
    let yaml = "steps:
  a: { stage: noise }
  b: { stage: concat, in: { parts: a.text } }
";
    let first = bench.run(yaml);
    assert_eq!(bench.run(yaml).digests(), first.digests());
    let forced = bench.run_with(yaml, |_, options| options.force.extend([0]));
    assert_eq!(forced.launched(), ["a", "b"], "what needs it goes by its new bytes");
    assert_ne!(forced.digests(), first.digests());
    let last = bench.run(yaml);
    assert_eq!((last.launched().len(), last.digests()), (0, forced.digests()));
}

#[test]
fn a_step_without_cache_runs_every_time() {
    let bench = Bench::new();
    let yaml = "steps:
  a: { stage: concat, cache: false, with: { text: a } }
  b: { stage: concat, in: { parts: a.text } }
";
    assert_eq!(bench.run(yaml).launched(), ["a", "b"]);
    assert_eq!(bench.run(yaml).launched(), ["a"]);
}

#[test]
fn selection_looks_at_what_is_needed_only() {
    let bench = Bench::new();
    let yaml = format!("{CHAIN}  d: {{ stage: concat, with: {{ text: d }} }}\n");
    let only = |name: &'static str| {
        bench.run_with(&yaml, move |plan, options| {
            options.only = plan.steps.iter().position(|step| step.name == name)
        })
    };
    let early = only("b");
    assert!(early.failures()[0].2.contains("not in the cache"), "{:?}", early.failures());
    let until = bench.run_with(&yaml, |plan, options| {
        options.until = vec![plan.steps.iter().position(|step| step.name == "b").unwrap()]
    });
    assert_eq!(until.launched(), ["a", "b"]);
    assert_eq!(only("c").launched(), ["c"]);
}

#[test]
fn two_executors_over_one_cache_do_no_work_twice() {
    let bench = Bench::new();
    let mut yaml = String::from("steps:\n");
    for i in 0..6 {
        let _ = writeln!(yaml, "  s{i}: {{ stage: concat, with: {{ text: '{i}', ms: 30 }} }}");
    }
    let plan = bench.plan(&yaml);
    // Each with an open cache of its own, as two processes have.
    let run = || run_on(plan.clone(), &Cache::open(bench.cache.root()).unwrap(), |_, _| {});
    let (one, two) = std::thread::scope(|scope| {
        let other = scope.spawn(run);
        (run(), other.join().unwrap())
    });
    assert_eq!(one.launched().len() + two.launched().len(), 6);
    assert_eq!(one.digests(), two.digests());
}

#[test]
fn lists_and_matrices_flow() {
    let bench = Bench::new();
    let yaml = "params: { layers: 3 }
steps:
  all: { stage: layers, with: { text: l, layers: [0, 1, 2] } }
  one:
    matrix: { layer: '0..${params.layers}' }
    stage: layers
    in: { parts: 'all.layer[${matrix.layer}]' }
    with: { text: 'm', layers: ['${matrix.layer}'] }
  from_one: { stage: concat, in: { parts: all.layer } }
  from_many: { stage: concat, in: { parts: 'one[*].layer[*]' } }
  last: { stage: concat, in: { parts: ['one[2].layer[2]', from_one.text] } }
";
    let ran = bench.run(yaml);
    assert_eq!(ran.text(&bench.cache, "from_one"), "l0l1l2");
    assert_eq!(ran.text(&bench.cache, "from_many"), "m0m1m2");
    assert_eq!(ran.text(&bench.cache, "last"), "m2l0l1l2");
    let fewer = bench.run(&yaml.replace("layers: [0, 1, 2]", "layers: [0, 1, 2, 3]"));
    assert_eq!(fewer.launched(), ["all", "from_one", "last"], "the slices are the same bytes");
}

#[test]
fn a_wide_plan_of_many_steps_ends() {
    let bench = Bench::new();
    let yaml = "steps:
  part: { matrix: { n: 0..2000 }, stage: concat, with: { text: '${matrix.n}', take: 1 } }
  all: { stage: concat, in: { parts: 'part[*].text' } }
";
    let ran = bench.run(yaml);
    assert_eq!(ran.summary.ran, 2001);
    assert_eq!(ran.text(&bench.cache, "all").len(), 2000);
    let again = bench.run(yaml);
    assert_eq!((again.summary.cached, again.summary.ran), (2001, 0));
}
