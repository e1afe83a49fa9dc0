//! What a worker sees of the GPUs, and how long it keeps them.

use crate::toys::Bench;

#[test]
fn a_worker_sees_its_own_gpus_only() {
    let ran = Bench::new().run(
        "steps:
  s: { matrix: { n: 0..2 }, stage: who, with: { text: '${matrix.n}', ms: 300 }, resources: { gpu: 1 } }
  both: { stage: who, after: [s], resources: { gpu: 2 } }
  program:
    stage: command
    after: [both]
    run: [sh, -c, 'echo $CUDA_VISIBLE_DEVICES and $$ > ${out.text}']
    out: [text]
    resources: { gpu: 1 }
",
        2,
    );
    assert!(ran.failures.is_empty(), "{:?}", ran.failures);
    let mut seen = ["s[0]", "s[1]"].map(|step| ran.who(step).0);
    seen.sort_unstable();
    assert_eq!(seen, ["fake-0", "fake-1"]);
    let mut both: Vec<&str> = ran.who("both").0.split(',').collect();
    both.sort_unstable();
    assert_eq!(both, ["fake-0", "fake-1"]);
    assert!(ran.who("program").0.starts_with("fake-"), "{:?}", ran.texts);
}

#[test]
fn a_gpu_has_one_warm_worker() {
    let ran = Bench::new().run(
        "steps:
  a: { stage: who, resources: { gpu: 1, cpu: 1 } }
  b: { stage: who, with: { text: b }, after: [a], resources: { gpu: 1, cpu: 3 } }
  c: { stage: who, with: { text: c }, after: [b] }
  d: { stage: who, with: { text: d }, after: [c], resources: { gpu: 1 } }
",
        1,
    );
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|step| ran.who(step));
    assert!(a == b && b == d && a != c, "{:?}", ran.texts);
}

#[test]
fn several_gpus_end_the_workers_of_each() {
    let bench = Bench::new();
    let ran = bench.run(
        "steps:
  a: { stage: who, resources: { gpu: 1 } }
  b: { stage: who, with: { text: b }, after: [a], resources: { gpu: 2 } }
  c: { stage: who, with: { text: c }, after: [b], resources: { gpu: 1 } }
",
        2,
    );
    let [a, b, c] = ["a", "b", "c"].map(|step| ran.who(step).1);
    assert!(a != b && b != c && a != c, "{:?}", ran.texts);
    let locks = std::fs::read_dir(bench.path()).unwrap().flatten();
    assert_eq!(locks.filter(|item| item.path().is_file()).count(), 0, "given back at the end");
}
