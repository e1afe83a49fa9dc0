//! `pipe status`, `log -f` and `top` beside a run that goes on.

use std::process::Child;

use rustix::process::Signal;
use serde_json::Value;

use crate::support::{Project, signal};

/// Steps that print, and go on once a file is there.
fn gated() -> Project {
    let project = Project::new();
    let gate = project.path().join("gate").display().to_string();
    project.write(
        "p.yaml",
        &format!(
            "steps:
  a: {{ stage: command, run: [sh, -c, 'echo first; while [ ! -e {gate} ]; do sleep 0.05; done; echo second; echo 1 > ${{out.o}}'], out: [o] }}
  b: {{ stage: command, in: {{ i: a.o }}, run: [cp, '${{in.i}}', '${{out.o}}'], out: [o] }}
"
        ),
    );
    project
}

fn status(project: &Project) -> Value {
    let ran = project.pipe(&["status", "--json"]);
    serde_json::from_str(&ran.stdout).unwrap_or(Value::Null)
}

fn started(project: &Project) -> Child {
    let child = project.start(&["run", "p.yaml"]);
    project.wait_until("`a` runs", || status(project)["steps"][0]["state"] == "running");
    project.wait_until("`a` printed", || project.pipe(&["log", "a"]).stdout == "first\n");
    child
}

#[test]
fn status_tells_how_far_a_run_has_come() {
    let project = gated();
    let none = project.pipe(&["status"]);
    assert!(none.code == Some(2) && none.stderr.contains("hint: "), "{}", none.stderr);
    let mut child = started(&project);
    let now = status(&project);
    assert_eq!((&now["state"], &now["pid"]), (&"running".into(), &child.id().into()));
    assert_eq!((&now["running"], &now["left"]), (&1.into(), &1.into()), "{now}");
    let text = project.pipe(&["status"]).stdout;
    assert!(text.contains("running for") && text.contains("running a"), "{text}");
    project.write("gate", "");
    assert!(child.wait().unwrap().success());
    let done = status(&project);
    assert_eq!((&done["state"], &done["ran"]), (&"done".into(), &2.into()), "{done}");
    assert!(project.pipe(&["status"]).stdout.contains("0 cached, 2 ran"));
}

#[test]
fn a_run_whose_process_is_gone_is_interrupted() {
    let project = gated();
    let mut child = started(&project);
    signal(child.id(), Signal::KILL);
    child.wait().unwrap();
    project.wait_until("it is told", || status(&project)["state"] == "interrupted");
    let text = project.pipe(&["status"]).stdout;
    assert!(text.contains("stopped a") && text.contains("run again to go on"), "{text}");
    let runs = project.pipe(&["runs"]).stdout;
    assert!(runs.contains("interrupted"), "{runs}");
    assert_eq!(project.pipe(&["top"]).stdout, "no pipeline is running\n");
    let follow = project.pipe(&["log", "-f", "a"]);
    assert!(
        follow.stdout.starts_with("first\n") && follow.stderr.contains("the run ended"),
        "{}",
        follow.stderr
    );
}

#[test]
fn a_log_is_followed_to_the_end_of_its_step() {
    let project = gated();
    let mut run = started(&project);
    let follow = project.start(&["log", "-f", "a"]);
    let top: Value = serde_json::from_str(&project.pipe(&["top", "--json"]).stdout).unwrap();
    assert_eq!(top[0]["pid"], run.id());
    assert!(top[0]["processes"].as_u64().unwrap() >= 3, "leader, worker, shell: {top}");
    assert!(project.pipe(&["top"]).stdout.contains("a for "), "what is at work");
    project.write("gate", "");
    assert!(run.wait().unwrap().success());
    let output = follow.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "first\nsecond\n");
    assert!(output.status.success());
    let late = project.pipe(&["log", "-f", "a"]);
    assert_eq!(late.stdout, "first\nsecond\n", "afterwards, from the result: {}", late.stderr);
    assert_eq!(project.pipe(&["log", "a", "--run", "@1"]).stdout, "first\nsecond\n");
}
