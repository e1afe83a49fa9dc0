//! Every stage together: MOHAWK at toy sizes, incremental, the same everywhere, killed and resumed.

use std::fs;

use rustix::process::Signal;

use crate::support::{Project, signal};

const TINY: &str = include_str!("cases/tiny.yaml");

#[test]
fn the_whole_method_is_incremental() {
    let project = Project::with(TINY);
    assert_eq!(project.run(&[]), "0 cached, 13 ran");
    assert_eq!(project.run(&[]), "13 cached, 0 ran");
    let names = ["distill", "evaluate", "size"];
    let executed = project.executed(&["--set", "distill.lr=1e-3"]);
    // The student's size does not change with its bytes, but its input does.
    assert_eq!(executed, names);
    let executed = project.executed(&["--set", "align.lr=1e-3"]);
    assert_eq!(executed, ["align[0]", "align[1]", "distill", "evaluate", "size", "student"]);

    let (head, _) = TINY.split_once("  orient:").unwrap();
    let probe =
        "  probe: { stage: evaluate, in: { model: teacher.model, tokens: tokens.holdout } }\n";
    project.write("p.yaml", &format!("{head}{probe}").replace("name: tiny", "name: another"));
    assert_eq!(project.executed(&[]), ["probe"], "the teacher is shared");
}

#[test]
fn bytes_depend_on_no_cache_and_no_thread_count() {
    let digests = |jobs: &str| {
        let project = Project::with(TINY);
        project.run(&[jobs]);
        project.digests(&[])
    };
    assert_eq!(digests("-j1"), digests("-j3"));
}

#[test]
fn killed_training_resumes_and_ends_with_the_same_bytes() {
    let undisturbed = Project::with(TINY);
    undisturbed.run(&[]);
    let expected = undisturbed.digests(&[]);
    for victim in ["run", "worker"] {
        let project = Project::with(TINY);
        project.run(&["--until", "student"]);
        let child = project.start(&["run", "p.yaml"]);
        project.wait_until("distill has sealed a checkpoint", || sealed(&project));
        kill(&project, victim);
        let _ = child.wait_with_output();
        project.wait_until("nobody is left", || project.processes().is_empty());
        let ran = project.pipe(&["run", "p.yaml", "--json"]);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let resumed = ran.events().find(|e| e["e"]["kind"] == "launched").unwrap();
        assert!(resumed["e"]["resumed"].as_u64().is_some_and(|at| at >= 20), "{resumed}");
        assert_eq!(project.digests(&[]), expected, "killed the {victim}");
    }
}

/// Whether some attempt holds a sealed checkpoint.
fn sealed(project: &Project) -> bool {
    let inside = |dir: std::path::PathBuf| fs::read_dir(dir).into_iter().flatten().flatten();
    inside(project.cache().join("attempts"))
        .flat_map(|key| inside(key.path()))
        .flat_map(|key| {
            let direct = inside(key.path().join("checkpoints"));
            direct.chain(inside(key.path()).flat_map(move |a| inside(a.path().join("checkpoints"))))
        })
        .any(|c| c.file_name().to_string_lossy().parse::<u64>().is_ok())
}

/// Ends the processes of `pipe VERB` without a warning.
fn kill(project: &Project, verb: &str) {
    let mut killed = 0;
    for pid in project.processes() {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if line.split(|b| *b == 0).nth(1) == Some(verb.as_bytes()) {
            signal(pid, Signal::KILL);
            killed += 1;
        }
    }
    assert!(killed > 0, "no `pipe {verb}` is running");
}
