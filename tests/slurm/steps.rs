//! What a step gets and gives on a node is what it gets and gives here.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use super::cluster::{Cluster, divergences};
use crate::support::Project;

#[test]
fn the_method_gives_the_same_bytes_on_three_nodes() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let tiny = include_str!("../cases/tiny.yaml");
    let mut project = Project::with(tiny);
    cluster.meet(&mut project);
    assert_eq!(project.run(&["--on", "slurm"]), "0 cached, 13 ran");
    let here = Project::with(tiny);
    here.run(&[]);
    assert_eq!(project.digests(&[]), here.digests(&[]));
}

/// All six run at once, each waiting for the others: so no two may have the same GPU of a node.
#[test]
fn steps_with_a_gpu_have_it_to_themselves() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let mut project = Project::new();
    cluster.meet(&mut project);
    let dir = project.path().display().to_string();
    project.write(
        "p.yaml",
        &format!(
            "executor: {{ slurm: {{ mode: submit }} }}
steps:
  step:
    matrix: {{ n: 0..6 }}
    stage: command
    run:
      - sh
      - -ec
      - |
        echo $CUDA_VISIBLE_DEVICES > ${{out.o}}
        touch {dir}/here-${{matrix.n}}
        while [ $(ls {dir}/here-* | wc -l) -lt 6 ]; do sleep 0.1; done
    out: [o]
    resources: {{ gpu: 1, memory: 50MiB }}
outputs: {{ o: {{ from: 'step[0].o', to: o.txt }} }}
"
        ),
    );
    let ran = project.pipe(&["run", "p.yaml", "--on", "slurm", "--json"]);
    assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
    let mut places: Vec<(u64, String)> = Vec::new();
    let mut devices: Vec<(u64, String)> = Vec::new();
    for event in ran.events().map(|event| event["e"].clone()) {
        let step = event["step"].as_u64().unwrap_or_default();
        if event["kind"] == "job" && event["said"]["is"] == "began" {
            places.push((step, event["said"]["host"].as_str().unwrap().into()));
        }
        if event["kind"] == "finished" {
            let digest = event["outputs"][0]["digest"].as_str().unwrap();
            let path = project.cache().join("objects").join(&digest[..2]).join(digest);
            devices.push((step, fs::read_to_string(path).unwrap().trim().into()));
        }
    }
    places.sort();
    devices.sort();
    assert_eq!((places.len(), devices.len()), (6, 6), "{places:?} {devices:?}");
    let pairs: BTreeSet<(&String, &String)> =
        places.iter().zip(&devices).map(|((_, host), (_, device))| (host, device)).collect();
    assert_eq!(pairs.len(), 6, "{places:?} {devices:?}");
    assert!(devices.iter().all(|(_, device)| ["0", "1"].contains(&device.as_str())));
    let used = ran.events().find(|event| event["e"]["kind"] == "ended").unwrap();
    assert!(used["e"]["summary"]["used"]["gpu_hours"].as_f64().unwrap() > 0.0, "{used}");
}

#[test]
fn a_failure_of_a_step_is_its_own() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let mut project = Project::with(
        "steps:
  good: { stage: command, run: [sh, -c, 'echo 1 > ${out.o}'], out: [o] }
  bad:
    stage: command
    run: [sh, -c, 'echo told; exit 3']
    retries: 5
    resources: { cpu: 2 }
",
    );
    cluster.meet(&mut project);
    for mode in ["submit", "pilot"] {
        let yaml = project.read("p.yaml");
        let steps = &yaml[yaml.find("steps:").unwrap()..];
        let yaml = format!("executor: {{ slurm: {{ mode: {mode} }} }}\n{steps}");
        project.write("p.yaml", &yaml);
        let ran = project.pipe(&["run", "p.yaml", "--on", "slurm", "--keep-going"]);
        assert_eq!(ran.code, Some(1), "{}{}", ran.stdout, ran.stderr);
        assert!(ran.stderr.contains("failed bad") && ran.stderr.contains("told"), "{}", ran.stderr);
        assert_eq!(ran.stderr.matches("failed bad").count(), 1, "no retry: {}", ran.stderr);
    }
    assert_eq!(divergences(project.cache()), 0);
}

/// One that no node can run fails at once, with Slurm's words.
#[test]
fn a_job_that_is_refused_fails_its_step() {
    let Some(cluster) = Cluster::start(&[("SLURM_LOOPBACK_NODES", "1")]) else { return };
    let mut project = Project::with(
        "steps: { a: { stage: command, run: [true], resources: { memory: 100TiB } } }\n",
    );
    cluster.meet(&mut project);
    let ran = project.pipe(&["run", "p.yaml", "--on", "slurm"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("refuses its job"), "{}", ran.stderr);
}

/// What the site's `setup:` says is told, and pilots are not submitted for ever.
#[test]
fn pilots_that_cannot_start_end_the_run() {
    let Some(cluster) = Cluster::start(&[("SLURM_LOOPBACK_NODES", "1")]) else { return };
    let mut project = Project::with(
        "executor: { slurm: { mode: pilot, poll: 2, setup: ['echo no such module >&2; exit 3'] } }
steps: { a: { stage: command, run: [true] } }
",
    );
    cluster.meet(&mut project);
    let ran = project.pipe(&["run", "p.yaml", "--on", "slurm"]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("no such module"), "{}", ran.stderr);
    assert!(cluster.jobs("PENDING,RUNNING").is_empty());
}

/// A place whose name means something to a shell, or to Slurm.
#[test]
fn jobs_run_in_a_place_with_any_name() {
    let Some(cluster) = Cluster::start(&[("SLURM_LOOPBACK_NODES", "1")]) else { return };
    for mode in ["submit", "pilot"] {
        let mut project = Project::with(&format!(
            "executor: {{ slurm: {{ mode: {mode} }} }}
steps:
  a:
    matrix: {{ n: [\"$(id>bad)\", \"it's;%j\"] }}
    stage: command
    run: [sh, -c, 'echo ok > ${{out.o}}']
    out: [o]
"
        ));
        cluster.meet(&mut project);
        project.env("SQUEUE_STATES", "CANCELLED");
        let cache = project.path().join("$(id>bad) 'it\"s' %j;#");
        let cache = cache.display().to_string();
        let ran = project.pipe(&["run", "p.yaml", "--on", "slurm", "--cache", &cache]);
        assert_eq!(ran.code, Some(0), "{mode}: {}{}", ran.stdout, ran.stderr);
        assert!(!project.path().join("bad").exists());
        let jobs = fs::read_dir(project.path()).unwrap().flatten().map(|item| item.file_name());
        assert_eq!(jobs.count(), 2, "the pipeline and the cache");
    }
}

#[test]
fn without_slurm_one_line_says_so() {
    let mut project = Project::with("steps: { a: { stage: command, run: [true] } }\n");
    let empty = project.path().join("empty");
    fs::create_dir(&empty).unwrap();
    project.env("PATH", &empty.display().to_string());
    let ran = project.pipe(&["run", "p.yaml", "--on", "slurm"]);
    assert_eq!(ran.code, Some(2));
    assert_eq!(ran.stderr.trim().lines().count(), 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("there is no `sinfo`"), "{}", ran.stderr);
    assert_eq!(project.pipe(&["run", "p.yaml", "--on", "mars"]).code, Some(2));
}

#[test]
fn a_chain_of_jobs_needs_no_leader() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let mut project = Project::with(
        "steps:
  a: { matrix: { n: [1, 2] }, stage: command, run: [sh, -c, 'echo ${matrix.n} > ${out.o}'], out: [o] }
  b: { stage: command, in: { i: 'a[*].o' }, run: [sh, -c, 'cat ${in.i} > ${out.o}'], out: [o] }
outputs: { o: { from: b.o, to: o.txt } }
",
    );
    cluster.meet(&mut project);
    let ran = project.pipe(&["export-jobs", "script", "p.yaml"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    project.write("submit.sh", &ran.stdout);
    let mut bash = Command::new("bash");
    bash.arg("submit.sh").current_dir(project.path());
    for (name, value) in project.command(&[]).get_envs() {
        value.map(|value| bash.env(name, value));
    }
    let output = bash.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("3 jobs were submitted"));
    project.wait_until("the jobs have ended", || {
        cluster.jobs("PENDING,RUNNING,COMPLETING").is_empty()
    });
    assert_eq!(project.run(&[]), "3 cached, 0 ran");
    assert_eq!(project.read("o.txt"), "1\n2\n");
    let ran = project.pipe(&["export-jobs", "k8s", "p.yaml", "--image", "x"]);
    let list: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(list["items"].as_array().unwrap().len(), 3);
}
