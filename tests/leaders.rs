//! Several leaders over one pipeline, frozen ones and dead ones: each step is executed once, and
//! whoever comes late or goes on alone harms nothing.

use std::fs;
use std::path::Path;

use rustix::process::{Pid, Signal};

use crate::support::{Project, signal};

#[test]
fn three_leaders_at_once_execute_each_step_once() {
    let project = Project::new();
    let dir = project.path().display().to_string();
    project.write(
        "p.yaml",
        &format!(
            "steps:
  part:
    matrix: {{ n: 0..30 }}
    stage: command
    run: [sh, -c, 'echo ${{matrix.n}} >> {dir}/ran; sleep 0.02; echo ${{matrix.n}} > ${{out.o}}']
    out: [o]
  all:
    stage: command
    in: {{ parts: 'part[*].o' }}
    run: [sh, -c, 'echo all >> {dir}/ran; cat ${{in.parts}} > ${{out.o}}']
    out: [o]
outputs: {{ o: {{ from: all.o, to: o.txt }} }}
"
        ),
    );
    let leaders: Vec<_> = (0..3).map(|_| project.start(&["run", "p.yaml", "-j4"])).collect();
    for leader in leaders {
        let output = leader.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{stderr}");
    }
    let text = project.read("ran");
    let mut ran: Vec<&str> = text.lines().collect();
    ran.sort_unstable();
    let mut expected: Vec<String> = (0..30).map(|n| n.to_string()).collect();
    expected.push("all".into());
    expected.sort_unstable();
    assert_eq!(ran, expected);
    assert_eq!(project.run(&[]), "31 cached, 0 ran");
    assert_eq!(project.read("o.txt").lines().count(), 30);
}

/// A step that writes on and on until `go` is there, and gives the number of its execution.
fn numbered() -> Project {
    let project = Project::new();
    let dir = project.path().display().to_string();
    project.write(
        "p.yaml",
        &format!(
            "steps:
  step:
    stage: command
    run:
      - sh
      - -c
      - |
        echo x >> {dir}/began
        n=$(wc -l < {dir}/began)
        while [ ! -e {dir}/go ]; do echo half > ${{out.o}}; sleep 0.02; done
        echo $n > ${{out.o}}
    out: [o]
outputs: {{ o: {{ from: step.o, to: o.txt }} }}
"
        ),
    );
    project
}

/// The second execution's result stands, and nothing is left of the first.
fn second_stands(project: &Project) {
    project.wait_until("every process has ended", || project.processes().is_empty());
    assert_eq!(project.count("began"), 2);
    fs::remove_file(project.path().join("o.txt")).unwrap();
    assert_eq!(project.run(&[]), "1 cached, 0 ran");
    assert_eq!(project.read("o.txt").trim(), "2");
    let verify = project.run(&["--force=step"]);
    assert_eq!(verify, "0 cached, 1 ran", "the step can be run again");
}

#[test]
fn a_frozen_leader_that_wakes_when_others_have_done_its_work_harms_nothing() {
    let project = numbered();
    let leader = project.start(&["run", "p.yaml"]);
    project.wait_until("the step began", || project.count("began") == 1);
    // With all it started: what its worker finished meanwhile would be adopted.
    let frozen = project.processes();
    frozen.iter().for_each(|&pid| signal_if_there(pid, Signal::STOP));
    // Its claim is lost, as a lock on a network's file system can be.
    remove_files(&project.cache().join("locks"));
    project.write("go", "");
    assert_eq!(project.run(&[]), "0 cached, 1 ran");
    assert_eq!(project.read("o.txt").trim(), "2");
    frozen.iter().for_each(|&pid| signal_if_there(pid, Signal::CONT));
    let output = leader.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    second_stands(&project);
}

#[test]
fn a_worker_that_goes_on_when_its_leader_was_killed_harms_nothing() {
    let project = numbered();
    let mut leader = project.start(&["run", "p.yaml"]);
    project.wait_until("the step began", || project.count("began") == 1);
    // So that it cannot see its leader's end, nor end its command.
    let workers = workers(&project);
    assert!(!workers.is_empty());
    workers.iter().for_each(|&pid| signal(pid, Signal::STOP));
    signal(leader.id(), Signal::KILL);
    leader.wait().unwrap();
    project.write("go", "");
    assert_eq!(project.run(&[]), "0 cached, 1 ran");
    assert_eq!(project.read("o.txt").trim(), "2");
    for pid in workers.into_iter().filter(|pid| project.processes().contains(pid)) {
        signal(pid, Signal::CONT);
    }
    second_stands(&project);
}

/// As [`signal`], to one that may be a `sleep` which is over.
fn signal_if_there(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).unwrap();
    match rustix::process::kill_process(pid, signal) {
        Err(rustix::io::Errno::SRCH) => {}
        result => result.unwrap(),
    }
}

fn workers(project: &Project) -> Vec<u32> {
    let is = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.windows(7).any(|w| w == b"\0worker")
    };
    project.processes().into_iter().filter(is).collect()
}

fn remove_files(dir: &Path) {
    for item in fs::read_dir(dir).unwrap() {
        let path = item.unwrap().path();
        if path.is_dir() { remove_files(&path) } else { fs::remove_file(path).unwrap() }
    }
}
