//! GPUs that nobody has, on threads: who gets which, who waits, and what is told.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cache::Cache;
use engine::event::Failure;
use engine::executor::Options;
use engine::gpu::Gpu;
use engine::gpu::lock::{Locked, lock};

use crate::toys::{Bench, Ran, run_on};

const GIB: u64 = 1 << 30;

/// A GPU of 80 GiB.
fn gpu(index: u32, free: impl Fn() -> u64 + Send + Sync + 'static) -> Gpu {
    Gpu {
        uuid: format!("fake-{index}"),
        index,
        name: "Fake".into(),
        capability: (9, 0),
        memory: 80 * GIB,
        free: Arc::new(move || Some(free())),
    }
}

fn empty(count: u32) -> Vec<Gpu> {
    (0..count).map(|index| gpu(index, || 80 * GIB)).collect()
}

fn run(bench: &Bench, yaml: &str, gpus: &[Gpu], change: impl FnOnce(&mut Options)) -> Ran {
    let plan = bench.plan_for(yaml, gpus);
    run_on(plan, &bench.cache, |_, options| {
        options.gpus = gpus.to_vec();
        options.gpu_locks = bench.path().to_path_buf();
        change(options);
    })
}

const MANY: &str = "steps:
  s: { matrix: { n: 0..6 }, stage: concat, with: { text: '${matrix.n}', ms: 20 }, resources: { gpu: 1 } }
  both: { stage: concat, with: { text: both }, resources: { gpu: 2, vram: 60GiB } }
";

#[test]
fn steps_share_what_there_is() {
    let bench = Bench::new();
    let ran = run(&bench, MANY, &empty(2), |_| {});
    assert_eq!((ran.summary.ran, ran.waited().len()), (7, 0));
    let again = run(&bench, MANY, &empty(3), |_| {});
    assert_eq!(again.summary.cached, 7, "which GPUs there are is in no key");
    let left = std::fs::read_dir(bench.path()).unwrap().flatten();
    let left: Vec<_> = left.filter(|item| item.path().is_file()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn two_runs_share_one_machine() {
    let bench = Bench::new();
    let (locks, gpus) = (bench.path().to_path_buf(), empty(2));
    let run = |text: &str| {
        let plan = bench.plan_for(&MANY.replace("'${matrix.n}'", text), &gpus);
        run_on(plan, &Cache::open(bench.cache.root()).unwrap(), |_, options| {
            options.gpus = gpus.clone();
            options.gpu_locks = locks.clone();
        })
    };
    let (one, two) = std::thread::scope(|scope| {
        let other = scope.spawn(|| run("'a${matrix.n}'"));
        (run("'b${matrix.n}'"), other.join().unwrap())
    });
    assert_eq!(one.summary.failed + two.summary.failed, 0);
    assert_eq!(one.launched().len() + two.launched().len(), 13, "`both` is the same step");
}

#[test]
fn a_step_waits_for_the_gpu_of_another_run() {
    let bench = Bench::new();
    let Locked::Mine(held) = lock(bench.path(), "fake-0", "run 7 (process 1)").unwrap() else {
        panic!("it is ours")
    };
    let ran = std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            drop(held);
        });
        let yaml = "steps:\n  a: { stage: concat, resources: { gpu: 1 } }\n  b: { stage: concat, with: { text: b } }\n";
        run(&bench, yaml, &empty(1), |_| {})
    });
    assert_eq!(ran.waited(), [("a", "GPU 0 (Fake), which run 7 (process 1) uses")]);
    assert_eq!(ran.launched(), ["b", "a"], "other steps go on");
}

const HUNGRY: &str = "steps:\n  a: { stage: concat, resources: { gpu: 1, vram: 8GiB } }\n";

#[test]
fn too_little_memory_is_told_after_a_while() {
    let bench = Bench::new();
    let short = [gpu(0, || 3 * GIB)];
    let patience = Duration::from_millis(200);
    let ran = run(&bench, HUNGRY, &short, |options| options.gpu_patience = patience);
    let [("a", Failure::OutOfMemory, message, false)] = ran.failures()[..] else {
        panic!("{:?}", ran.failures())
    };
    for part in ["GPU 0 (Fake) has 3.0 GiB free of 80.0 GiB", "`a` needs 8.0 GiB", "hint: "] {
        assert!(message.contains(part), "{message}");
    }
    let [("a", holder)] = ran.waited()[..] else { panic!("{:?}", ran.waited()) };
    assert!(holder.starts_with("memory: GPU 0 (Fake) has 3.0 GiB free"), "{holder}");
    assert!(ran.summary.seconds >= 0.2);
    let two = [gpu(0, || 3 * GIB), gpu(1, || 9 * GIB)];
    assert_eq!(run(&bench, HUNGRY, &two, |_| {}).summary.ran, 1, "another one is tried");
}

#[test]
fn memory_that_comes_back_is_taken() {
    let bench = Bench::new();
    let asked = Arc::new(AtomicU64::new(0));
    let free = move || match asked.fetch_add(1, Ordering::SeqCst) {
        0 | 1 => 3 * GIB,
        _ => 80 * GIB,
    };
    let patience = Duration::from_secs(4);
    let ran = run(&bench, HUNGRY, &[gpu(0, free)], |options| options.gpu_patience = patience);
    assert_eq!((ran.summary.ran, ran.waited().len()), (1, 1));
}

#[test]
fn a_failure_gives_its_gpu_back() {
    let bench = Bench::new();
    let yaml = "steps:
  a: { stage: fault, retries: 2, with: { text: an illegal address }, resources: { gpu: 1 } }
  b: { stage: concat, resources: { gpu: 1 } }
";
    let ran = run(&bench, yaml, &empty(1), |options| options.keep_going = true);
    assert_eq!((ran.failures().len(), ran.summary.failed, ran.summary.ran), (3, 1, 1));
}

#[test]
fn an_idle_gpu_is_given_to_others() {
    let bench = Bench::new();
    let yaml = "steps:
  a: { stage: concat, with: { ms: 200 }, resources: { gpu: 1 } }
  b: { stage: concat, with: { text: b, ms: 1500 }, after: [a] }
";
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            run(&bench, yaml, &empty(1), |options| options.gpu_warm = Duration::from_millis(50))
        });
        let mut busy = false;
        loop {
            match lock(bench.path(), "fake-0", "another").unwrap() {
                Locked::Busy(_) => busy = true,
                Locked::Mine(_) if busy => break,
                Locked::Mine(_) => {}
            }
            assert!(!run.is_finished(), "it was ours to the end");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(run.join().unwrap().summary.ran, 2);
    });
}

#[test]
fn beside_a_gpu_one_cpu_will_do() {
    for (resources, threads) in [("{}", "4"), ("{ gpu: 1 }", "1"), ("{ gpu: 1, cpu: 3 }", "3")] {
        let bench = Bench::new();
        let yaml = format!("steps:\n  a: {{ stage: threads, resources: {resources} }}\n");
        let ran = run(&bench, &yaml, &empty(1), |_| {});
        assert_eq!(ran.text(&bench.cache, "a"), threads, "{resources}");
    }
}
