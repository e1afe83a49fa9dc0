//! Choosing steps by name, the schema for editors, what the worker fills in, and the cost of a plan.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fmt::Write as _;

use engine::interpolate::{Piece, escape, fill_run, pieces};
use engine::spec::schema;

use crate::toys::{TOYS, options, plan, set};

thread_local! {
    static ALLOCATED: Cell<u64> = const { Cell::new(0) };
}

/// Counts allocations of this thread: a measure of work that no other process disturbs.
struct Counting;

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATED.try_with(|n| n.set(n.get() + 1));
        // SAFETY: the caller's promise, handed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, handed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Allocations of planning two matrices of `n` instances, one feeding the other, and a sink.
fn cost(n: usize) -> u64 {
    let yaml = format!(
        "steps:\n  a: {{ stage: concat, matrix: {{ i: 0..{n}, j: [x, y] }}, with: {{ n: '${{matrix.i}}' }} }}\n  \
         b: {{ stage: concat, matrix: {{ i: 0..{n} }}, in: {{ parts: 'a[i=${{matrix.i}},j=*].text' }} }}\n  \
         c: {{ stage: concat, in: {{ parts: 'b[*].text' }} }}\n"
    );
    let before = ALLOCATED.get();
    let plan = plan(&yaml, &options());
    assert_eq!(plan.steps.len(), 3 * n + 1);
    ALLOCATED.get() - before
}

#[test]
fn ten_times_the_instances_take_ten_times_the_work() {
    let (small, large) = (cost(500), cost(5000));
    assert!(large < 11 * small, "{small} allocations became {large}");
    assert!(large / 15_001 < 120, "{} allocations a step", large / 15_001);
}

#[test]
fn a_hundred_thousand_written_steps_fit() {
    let mut yaml = String::from("steps:\n");
    for i in 0..100_000 {
        let _ = writeln!(yaml, "  s{i}: {{ stage: concat, with: {{ n: {i}, sep: x }} }}");
    }
    assert_eq!(plan(&yaml, &options()).steps.len(), 100_000);
}

#[test]
fn ten_thousand_mistakes_end_after_the_first_of_them() {
    let mut yaml = String::from("steps:\n");
    for i in 0..10_000 {
        let _ = writeln!(yaml, "  s{i}: {{ stage: concat, in: {{ head: t{i}.text }} }}");
    }
    let before = ALLOCATED.get();
    let told = crate::toys::check(&yaml, &options());
    assert!(told.contains("these are the first 200 problems; there may be more"));
    assert_eq!(told.matches("error: ").count(), 201);
    assert!(ALLOCATED.get() - before < 20_000_000, "{}", ALLOCATED.get() - before);
}

#[test]
fn steps_are_chosen_by_name_coordinates_and_shell_form() {
    let plan = plan(
        "steps:\n  align: { stage: concat, matrix: { layer: 0..3 } }\n  \
         train: { stage: concat, matrix: { lr: [3e-4, 1], seed: 0..2 } }\n  one: { stage: concat }\n",
        &set(&[]),
    );
    let chosen = |text: &str| match plan.select(text) {
        Ok(steps) => {
            steps.iter().map(|&s| plan.steps[s].name.clone()).collect::<Vec<_>>().join(" ")
        }
        Err(message) => message,
    };
    assert_eq!(chosen("one"), "one");
    assert_eq!(chosen("align"), "align[0] align[1] align[2]");
    assert_eq!(chosen("align[*]"), "align[0] align[1] align[2]");
    assert_eq!(chosen("align[2]"), "align[2]");
    assert_eq!(chosen("align@2"), "align[2]");
    assert_eq!(chosen("train[lr=3e-4,seed=*]"), "train[lr=3e-4,seed=0] train[lr=3e-4,seed=1]");
    assert_eq!(chosen("train@lr=0.0003,seed=1"), "train[lr=3e-4,seed=1]");
    assert_eq!(chosen("algin"), "unknown step `algin`\nhint: did you mean `align`?");
    assert_eq!(chosen("align[3]"), "`align` has no instance `3`\nhint: did you mean `align[0]`?");
    assert_eq!(
        chosen("align[0].text"),
        "`align[0].text` names a port\nhint: write the step, `align[0]`"
    );
    assert_eq!(chosen("align["), "`[` without `]` in `align[`");
}

#[test]
fn the_schema_knows_stages_parameters_and_ports() {
    let schema = schema(&TOYS);
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    let seq = &schema["$defs"]["with_tokenize"]["properties"]["seq"];
    assert_eq!(seq["description"], "Length of a sequence.");
    let branches = schema["$defs"]["step"]["allOf"].as_array().expect("a branch a stage");
    assert_eq!(branches.len(), TOYS.0.len());
    assert!(branches.iter().any(|b| b["then"]["properties"]["in"]["required"][0] == "mixers"));
    // Every reference leads somewhere.
    let mut open = vec![&schema];
    while let Some(node) = open.pop() {
        if let Some(target) = node.get("$ref").and_then(|r| r.as_str()) {
            assert!(schema.pointer(&target[1..]).is_some(), "{target}");
        }
        open.extend(node.as_object().into_iter().flat_map(|o| o.values()));
        open.extend(node.as_array().into_iter().flatten());
    }
}

#[test]
fn a_worker_fills_in_what_a_plan_left_open() {
    let lookup = |name: &str| match name {
        "in.raw" => Ok(vec!["in/raw/a b".to_string(), "in/raw/c".to_string()]),
        "out.text" => Ok(vec!["out/text".to_string()]),
        other => Err(format!("no `{other}`")),
    };
    let fill = |run: &[&str]| {
        let run: Vec<String> = run.iter().map(|s| s.to_string()).collect();
        fill_run(&run, &lookup)
    };
    let ok = |run: &[&str], want: &[&str]| {
        assert_eq!(fill(run), Ok(want.iter().map(|s| s.to_string()).collect()));
    };
    ok(
        &["cat", "${in.raw}", "--out=${out.text}"],
        &["cat", "in/raw/a b", "in/raw/c", "--out=out/text"],
    );
    ok(&["cat", "x=${in.raw}"], &["cat", "x=in/raw/a b in/raw/c"]);
    ok(
        &["sh", "-c", "cat ${in.raw} $${HOME} $X"],
        &["sh", "-c", "cat 'in/raw/a b' in/raw/c ${HOME} $X"],
    );
    ok(&["bash", "-euc", "${in.raw}"], &["bash", "-euc", "'in/raw/a b' in/raw/c"]);
    assert!(fill(&["x", "${in.other}"]).is_err());
    assert!(fill(&["x", "${in.raw"]).is_err());
}

#[test]
fn what_is_escaped_comes_back() {
    for text in ["", "a", "${x}", "$${x}", "$$$${", "$", "a$${b", "${", "}{$"] {
        assert_eq!(pieces(&escape(text)), Ok(vec![Piece::Text(text.into())]), "{text}");
    }
}
