//! `pipe runs`, `diff` and `compare` from outside.

use serde_json::Value;

use crate::support::Project;

/// Two learning rates, each trained and measured, as a command can do it.
fn sweep() -> Project {
    Project::with(
        "params: { seed: 1 }
steps:
  train:
    matrix: { lr: [1, 2, 3] }
    stage: command
    run: [sh, -c, 'echo ${matrix.lr}${params.seed} > ${out.model}']
    out: [model]
  evaluate:
    matrix: { lr: [1, 2, 3] }
    stage: command
    in: { model: 'train[${matrix.lr}].model' }
    run: [sh, -c, 'n=$(cat ${in.model}); echo {\\\"kind\\\": \\\"toy\\\", \\\"loss\\\": $(( (n - 20) * (n - 20) )), \\\"deep\\\": {\\\"x\\\": 1}} > ${out.metrics}']
    out: [metrics]
",
    )
}

fn json(project: &Project, args: &[&str]) -> Value {
    let ran = project.pipe(args);
    assert_eq!(ran.code, Some(0), "{args:?}: {}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap()
}

#[test]
fn runs_are_listed_with_what_they_measured() {
    let project = sweep();
    assert_eq!(json(&project, &["runs", "--json"]), Value::Array(vec![]));
    project.run(&[]);
    project.run(&["--set", "seed=5"]);
    let runs = json(&project, &["runs", "--json", "--sort", "evaluate[2].loss"]);
    let of = |at: usize, name: &str| runs[at][name].clone();
    assert_eq!((of(0, "run"), of(0, "evaluate[2].loss")), ("@2".into(), 1.into()), "{runs}");
    assert_eq!((of(1, "run"), of(1, "evaluate[2].loss")), ("@1".into(), 25.into()), "{runs}");
    assert_eq!((of(0, "state"), of(0, "ran")), ("done".into(), 6.into()));
    let csv = project.pipe(&["runs", "--csv", "-n", "1"]).stdout;
    assert!(csv.starts_with("run,id,pipeline,state,") && csv.lines().count() == 2, "{csv}");
    let unclear = project.pipe(&["runs", "--sort", "loss"]);
    assert_eq!(unclear.code, Some(2));
    assert!(unclear.stderr.contains("`evaluate[1].loss`"), "{}", unclear.stderr);
}

#[test]
fn two_runs_differ_in_what_was_changed_and_what_that_changed() {
    let project = sweep();
    project.run(&[]);
    project.run(&["--set", "seed=5"]);
    let rows = json(&project, &["diff", "@2", "@1", "--json"]);
    let rows = rows.as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    for part in ["arguments", "train[1].run", "evaluate[2].loss", "train[3].model"] {
        assert!(names.contains(&part), "{part} in {names:?}");
    }
    assert!(!names.iter().any(|name| name.contains("deep.x")), "the same in both: {names:?}");
    let text = project.pipe(&["diff", "@2", "@1"]).stdout;
    assert!(text.contains("+2400.00 %"), "25 after 1: {text}");
    let all = project.pipe(&["diff", "@2", "@1", "--all"]).stdout;
    assert!(all.contains("evaluate[*].deep.x"), "instances that agree are one row: {all}");
    let same = project.pipe(&["diff", "@1", "@1"]).stdout;
    assert!(same.starts_with("0 differ, "), "{same}");
}

#[test]
fn a_run_is_named_by_the_beginning_of_its_id() {
    let project = sweep();
    project.run(&[]);
    project.run(&["--set", "seed=5"]);
    let runs = json(&project, &["runs", "--json"]);
    let id = runs[0]["id"].as_str().unwrap();
    let status = json(&project, &["status", "--json", "--run", id]);
    assert_eq!(status["run"], id);
    let both = project.pipe(&["diff", "20", id]);
    assert_eq!(both.code, Some(2));
    assert!(both.stderr.contains("2 runs start with `20`"), "{}", both.stderr);
    for (wrong, told) in [("@9", "no run `@9`"), ("@0", "is no run"), ("zzz", "starts with `zzz`")]
    {
        let ran = project.pipe(&["diff", wrong, id]);
        assert!(ran.code == Some(2) && ran.stderr.contains(told), "{}", ran.stderr);
        assert!(ran.stderr.contains("hint: "), "{}", ran.stderr);
    }
}

#[test]
fn instances_of_a_sweep_are_compared() {
    let project = sweep();
    project.run(&[]);
    let text = project.pipe(&["compare", "evaluate", "--sort", "loss"]).stdout;
    let order: Vec<&str> =
        text.lines().skip(1).map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(order, ["evaluate[2]", "evaluate[1]", "evaluate[3]"], "{text}");
    assert!(text.lines().next().unwrap().contains(" lr "), "{text}");
    assert!(!text.contains("deep.x"), "what is the same for all is not shown: {text}");
    let back = json(&project, &["compare", "evaluate", "--sort", "loss", "--reverse", "--json"]);
    assert_eq!((&back[0]["lr"], &back[0]["loss"]), (&3.into(), &121.into()));
    let one = project.pipe(&["compare", "evaluate[2]", "--csv", "--metric", "deep.x"]).stdout;
    assert!(one.starts_with("step,state,time,lr,deep.x\n") && one.ends_with(",2,1\n"), "{one}");
    let wrong = project.pipe(&["compare", "evalute"]);
    assert!(wrong.code == Some(2) && wrong.stderr.contains("evaluate"), "{}", wrong.stderr);
}
