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

/// Real prose where there is some: `PIPE_TEST_DATA` names a folder with `text/`.
#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn real_text_goes_to_the_end() {
    let Some(data) = std::env::var_os("PIPE_TEST_DATA") else {
        return eprintln!("skipped: PIPE_TEST_DATA is not set");
    };
    let text = std::path::Path::new(&data).join("text");
    let project = Project::with(TINY);
    for name in ["books.jsonl", "wikitext-2-valid.txt"] {
        let set = format!("corpus={}", text.join(name).display());
        assert_eq!(project.run(&["--set", &set]), "0 cached, 13 ran", "{name}");
        let shown = project.pipe(&["show", "evaluate", "--set", &set, "--json"]).stdout;
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        let nats = shown["metrics"]["teacher"]["nats"].as_f64().unwrap();
        // 40 tiny updates learn something: better than guessing among 512 tokens.
        assert!(nats > 1.0 && nats < 512f64.ln(), "{name}: {nats}");
        assert!(shown["metrics"]["student"]["recall"].is_null(), "prose asks nothing");
    }
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
