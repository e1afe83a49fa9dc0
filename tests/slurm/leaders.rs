//! Leaders that go: killed, interrupted, cancelled, or jobs themselves.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::cluster::{Cluster, FRAGILE, divergences, entries};
use crate::support::{Project, signal};

/// Three steps that wait for `go`, and one that needs them.
fn waiting(cluster: &Cluster, mode: &str) -> Project {
    let mut project = Project::new();
    cluster.meet(&mut project);
    let dir = project.path().display().to_string();
    project.write(
        "p.yaml",
        &format!(
            "executor: {{ slurm: {{ mode: {mode}, poll: 3 }} }}
steps:
  part:
    matrix: {{ n: 0..3 }}
    stage: command
    run:
      - sh
      - -ec
      - |
        echo ${{matrix.n}} >> {dir}/began
        while [ ! -e {dir}/go ]; do sleep 0.1; done
        echo ${{matrix.n}} > ${{out.o}}
    out: [o]
  all: {{ stage: command, in: {{ p: 'part[*].o' }}, run: [sh, -c, 'cat ${{in.p}} > ${{out.o}}'], out: [o] }}
outputs: {{ o: {{ from: all.o, to: o.txt }} }}
"
        ),
    );
    project
}

fn began(project: &Project, n: usize) {
    project.wait_until("all parts began", || project.count("began") == n);
}

#[test]
fn whoever_comes_after_a_dead_leader_goes_on_with_its_jobs() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    for mode in ["submit", "pilot"] {
        let project = waiting(&cluster, mode);
        let mut leader = project.start(&["run", "p.yaml", "--on", "slurm"]);
        began(&project, 3);
        signal(leader.id(), Signal::KILL);
        leader.wait().unwrap();
        let second = project.start(&["run", "p.yaml", "--on", "slurm"]);
        std::thread::sleep(Duration::from_secs(3));
        project.write("go", "");
        let output = second.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        assert_eq!(project.count("began"), 3, "{mode}: nothing was begun twice\n{stderr}");
        assert_eq!(project.read("o.txt"), "0\n1\n2\n");
        assert_eq!((entries(project.cache()), divergences(project.cache())), (4, 0));
        wait_empty(&cluster, &project);
    }
}

#[test]
fn what_was_finished_without_a_leader_is_taken() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let project = waiting(&cluster, "submit");
    let mut leader = project.start(&["run", "p.yaml", "--on", "slurm"]);
    began(&project, 3);
    signal(leader.id(), Signal::KILL);
    leader.wait().unwrap();
    project.write("go", "");
    project.wait_until("the jobs have ended", || cluster.jobs("PENDING,RUNNING").is_empty());
    assert_eq!(project.run(&[]), "3 cached, 1 ran", "here, without Slurm");
    assert_eq!(project.count("began"), 3);
}

#[test]
fn an_interrupted_leader_leaves_its_jobs_and_cancel_ends_them() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let project = waiting(&cluster, "submit");
    let leader = project.start(&["run", "p.yaml", "--on", "slurm"]);
    began(&project, 3);
    project.wait_until("the status names the nodes", || {
        project.pipe(&["status"]).stdout.matches("on n").count() == 3
    });
    signal(leader.id(), Signal::INT);
    let output = leader.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(String::from_utf8_lossy(&output.stderr).contains("pipe cancel"));
    assert_eq!(cluster.jobs("RUNNING").len(), 3);
    let ran = project.pipe(&["cancel"]);
    assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
    assert!(ran.stdout.contains("3 of its jobs"), "{}", ran.stdout);
    wait_empty(&cluster, &project);
    assert_eq!(entries(project.cache()), 0);
}

#[test]
fn cancel_ends_a_leader_at_work_too() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    for mode in ["submit", "pilot"] {
        let project = waiting(&cluster, mode);
        let leader = project.start(&["run", "p.yaml", "--on", "slurm"]);
        began(&project, 3);
        let ran = project.pipe(&["cancel"]);
        assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
        assert_eq!(leader.wait_with_output().unwrap().status.code(), Some(130));
        wait_empty(&cluster, &project);
        project.write("go", "");
        assert_eq!(project.run(&["--on", "slurm"]), "0 cached, 4 ran");
    }
}

#[test]
fn a_leader_may_be_a_job() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let project = waiting(&cluster, "submit");
    project.write("go", "");
    let ran = project.pipe(&["run", "p.yaml", "--on", "slurm", "--detach"]);
    assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
    project.wait_until("the run has ended", || project.read("o.txt") == "0\n1\n2\n");
    wait_empty(&cluster, &project);
    let logs = fs::read_dir(project.path()).unwrap().flatten();
    let logs = logs.filter(|f| f.file_name().to_string_lossy().starts_with("pipe-leader-"));
    let log = fs::read_to_string(logs.last().unwrap().path()).unwrap();
    assert!(log.contains("0 cached, 4 ran"), "{log}");
}

fn wait_empty(cluster: &Cluster, project: &Project) {
    let started = Instant::now();
    while !cluster.jobs("PENDING,RUNNING,COMPLETING").is_empty() {
        assert!(started.elapsed() < Duration::from_secs(180), "{:?}", cluster.jobs("all"));
        std::thread::sleep(Duration::from_millis(200));
    }
    project.wait_until("every process has ended", || project.processes().is_empty());
}

/// What jobs and pilots had is done by others, and is told to be the node's fault.
#[test]
fn a_node_that_is_lost_costs_its_steps_one_attempt() {
    for mode in ["submit", "pilot"] {
        let Some(cluster) = Cluster::start(&[FRAGILE]) else { return };
        let project = waiting(&cluster, mode);
        let leader = project.start(&["run", "p.yaml", "--on", "slurm"]);
        began(&project, 3);
        // All three have room on one node, and it is the first.
        cluster.fault("kill-node", Some("n1"));
        project.write("go", "");
        let output = leader.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{mode}: {stderr}");
        assert!(stderr.contains("lost with its node"), "{mode}: {stderr}");
        assert_eq!(project.count("began"), 6, "{mode}: each once more\n{stderr}");
        assert_eq!(project.read("o.txt"), "0\n1\n2\n");
        assert_eq!((entries(project.cache()), divergences(project.cache())), (4, 0));
    }
}
