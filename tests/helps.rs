//! What helps before anything runs: completions, manual pages, `pipe init`, did-you-mean.

use std::process::Command;

use crate::support::Project;

fn two() -> Project {
    Project::with(
        "profiles: { small: {}, big: {} }
steps:
  part: { matrix: { n: [1, 2] }, stage: command, run: [sh, -c, 'echo ${matrix.n} > ${out.o}'], out: [o] }
  all: { stage: command, in: { i: 'part[*].o' }, run: [sh, -c, 'cat ${in.i} > ${out.o}'], out: [o] }
",
    )
}

/// What bash would be told for the last of `words`.
fn complete(project: &Project, words: &[&str]) -> Vec<String> {
    let mut command = project.command(&[&["--", "pipe"], words].concat());
    let output = command
        .env("PIPE_COMPLETE", "bash")
        .env("_CLAP_IFS", "\n")
        .env("_CLAP_COMPLETE_INDEX", words.len().to_string())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(|l| l.trim().to_string()).collect()
}

#[test]
fn a_shell_completes_commands_steps_profiles_and_runs() {
    let project = two();
    assert!(complete(&project, &["gra"]).contains(&"graph".to_string()));
    let steps = complete(&project, &["run", "p.yaml", "--until", ""]);
    for step in ["part", "part@1", "part@2", "all"] {
        assert!(steps.contains(&step.to_string()), "{step} in {steps:?}");
    }
    assert_eq!(complete(&project, &["run", "p.yaml", "--profile", "s"]), ["small"]);
    assert!(
        complete(&project, &["why", "dist"]).contains(&"distill".to_string()),
        "the embedded one"
    );
    project.run(&[]);
    assert_eq!(complete(&project, &["why", "a"]), ["all"], "the newest run's");
    assert!(complete(&project, &["diff", "@"]).contains(&"@1".to_string()));
    assert!(complete(&project, &["stages", "dist"]).contains(&"distill".to_string()));
}

#[test]
fn scripts_for_shells_are_printed_and_bash_takes_ours() {
    let project = Project::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let ran = project.pipe(&["completions", shell]);
        assert!(
            ran.code == Some(0) && ran.stdout.contains("PIPE_COMPLETE"),
            "{shell}: {}",
            ran.stdout
        );
    }
    project.write("c.sh", &project.pipe(&["completions", "bash"]).stdout);
    let bash = Command::new("bash").args(["-n", "c.sh"]).current_dir(project.path()).status();
    assert!(bash.unwrap().success());
    let wrong = project.pipe(&["completions", "bsh"]);
    assert!(wrong.code == Some(2) && wrong.stderr.contains("'bash'"), "{}", wrong.stderr);
}

#[test]
fn every_command_has_a_page_and_an_example() {
    let project = Project::new();
    assert!(project.pipe(&["man"]).stdout.contains(".TH pipe 1"));
    assert_eq!(project.pipe(&["man", "-o", "man1"]).code, Some(0));
    let pages: Vec<String> = std::fs::read_dir(project.path().join("man1"))
        .unwrap()
        .map(|item| item.unwrap().file_name().into_string().unwrap())
        .collect();
    for page in ["pipe.1", "pipe-run.1", "pipe-graph.1", "pipe-bench-decode.1"] {
        assert!(pages.contains(&page.to_string()), "{page} in {pages:?}");
    }
    let help = project.pipe(&["--help"]).stdout;
    let verbs = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let verbs = verbs.take_while(|line| !line.is_empty());
    let names = verbs.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let mut seen = 0;
    for name in names.map(|line| line.split_whitespace().next().unwrap()) {
        let help = project.pipe(&[name, "--help"]).stdout;
        // `bench` and `cache` have commands of their own; the schema's has no arguments at all.
        assert!(
            help.contains("Example") || ["bench", "cache", "schema"].contains(&name),
            "{name}: {help}"
        );
        seen += 1;
    }
    assert!(seen > 20, "{help}");
}

#[test]
fn a_starter_is_for_what_is_there_and_right() {
    let mut project = Project::new();
    let hub = project.path().join(".hub");
    project.env("HF_HUB_CACHE", hub.to_str().unwrap());
    let ran = project.pipe(&["init"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("no model is here"), "{}", ran.stderr);
    assert!(project.pipe(&["plan", "pipeline.yaml"]).stdout.contains("runs    corpus"));
    let again = project.pipe(&["init"]);
    assert!(again.code == Some(2) && again.stderr.contains("--force"), "{}", again.stderr);
    // A directory, a file with a name that means something elsewhere, one of the hub, and text.
    project.write("models/tiny/config.json", r#"{"model_type": "llama", "num_hidden_layers": 6}"#);
    project.write("models/tiny/model.safetensors", "0123456789");
    project.write("models/other/config.json", r#"{"model_type": "bert"}"#);
    project.write("models/other/model.safetensors", "0");
    project.write("odd ${params.seed}: \"x\".gguf", "0123456789abcdef");
    let commit = "0123456789abcdef0123456789abcdef01234567";
    project.write(".hub/models--some--model/refs/main", commit);
    let snapshot = format!(".hub/models--some--model/snapshots/{commit}");
    project.write(&format!("{snapshot}/config.json"), r#"{"model_type": "phi"}"#);
    project.write(&format!("{snapshot}/pytorch_model.bin"), "0123");
    project.write("texts/a.jsonl", "{\"text\": \"one\"}\n");
    let ran = project.pipe(&["init", "--force"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let yaml = project.read("pipeline.yaml");
    for part in [
        "teacher: \"./models/tiny\"",
        "layers: [2, 4]",
        "corpus: [\"./texts/*.jsonl\"]",
        &format!("hf:some/model@{commit}"),
        "odd $${params.seed}: \\\"x\\\".gguf",
    ] {
        assert!(yaml.contains(part), "{part} in {yaml}");
    }
    assert!(!yaml.contains("models/other"), "a family that is not built: {yaml}");
    assert_eq!(project.pipe(&["check", "pipeline.yaml", "--profile", "try"]).code, Some(0));
}

#[test]
fn a_typo_is_answered_with_what_was_meant() {
    let project = two();
    project.run(&[]);
    for (args, meant) in [
        (&["why", "al"][..], "all"),
        (&["run", "p.yaml", "--utnil", "all"], "--until"),
        (&["stauts"], "status"),
        (&["run", "p.yaml", "--profile", "smal"], "small"),
        (&["compare", "prat"], "part"),
        (&["run", "p.yaml", "--until", "part@3"], "part[2]"),
    ] {
        let ran = project.pipe(args);
        assert!(ran.code == Some(2) && ran.stderr.contains(meant), "{args:?}: {}", ran.stderr);
    }
}
