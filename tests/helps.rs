//! What helps before anything runs: completions, manual pages, `pipe init`, did-you-mean.

use std::path::Path;
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

/// A real bash, which has read our script, asked as it asks when somebody presses Tab.
#[test]
fn bash_completes_steps_of_the_pipeline_at_hand() {
    let project = two();
    project.write("c.sh", &project.pipe(&["completions", "bash"]).stdout);
    let bin = Path::new(env!("CARGO_BIN_EXE_pipe")).parent().unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let tab = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let script = format!(
            "source ./c.sh; complete -p pipe > /dev/null; COMP_WORDS=({}); COMP_CWORD={}; COMP_TYPE=9; \
             _clap_complete_pipe pipe '{}' '{}'; IFS=$'\\n'; echo \"${{COMPREPLY[*]}}\"",
            words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" "),
            words.len() - 1,
            words[words.len() - 1],
            words[words.len() - 2],
        );
        let mut bash = Command::new("bash");
        bash.args(["--norc", "-c", &script]).current_dir(project.path()).env("PATH", &path);
        let output = bash.env("PIPE_CACHE", project.cache()).output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{told}{}", String::from_utf8_lossy(&output.stderr));
        told.lines().map(|line| line.trim().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(tab("pipe run p.yaml --until pa"), ["part", "part@1", "part@2"]);
    assert_eq!(tab("pipe run p.yaml --profile b"), ["big"]);
    assert_eq!(tab("pipe rep"), ["report"]);
    project.run(&[]);
    assert_eq!(tab("pipe why a"), ["all"]);
    assert_eq!(tab("pipe export all x --port "), ["o"]);
    // The other shells, where they are.
    for (shell, args) in [("zsh", ["-n"]), ("fish", ["-n"])] {
        project.write("c.txt", &project.pipe(&["completions", shell]).stdout);
        match Command::new(shell).args(args).arg("c.txt").current_dir(project.path()).status() {
            Ok(status) => assert!(status.success(), "{shell} does not take our script"),
            #[allow(clippy::print_stdout)] // a test says what it skips
            Err(_) => println!("skipped: there is no {shell}"),
        }
    }
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
    let mut seen = 0;
    let mut open: Vec<Vec<String>> = vec![Vec::new()];
    while let Some(command) = open.pop() {
        let mut args: Vec<&str> = command.iter().map(String::as_str).collect();
        args.push("--help");
        let help = project.pipe(&args).stdout;
        let inner = help.lines().skip_while(|line| *line != "Commands:").skip(1);
        let inner = inner.take_while(|line| !line.is_empty());
        let names = inner.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
        let names: Vec<&str> = names.filter_map(|line| line.split_whitespace().next()).collect();
        assert!(!names.is_empty() || help.contains("Example"), "{command:?}: {help}");
        open.extend(names.iter().map(|name| [&command[..], &[name.to_string()]].concat()));
        seen += 1;
    }
    assert!(seen > 35, "{seen} commands");
}

#[test]
fn a_starter_is_for_what_is_there_and_right() {
    let mut project = Project::new();
    let hub = project.path().join(".hub");
    project.env("HF_HUB_CACHE", hub.to_str().unwrap());
    let ran = project.pipe(&["init"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    for part in ["no model is here", "no text is here"] {
        assert!(ran.stderr.contains(part), "{}", ran.stderr);
    }
    let yaml = project.read("pipeline.yaml");
    assert!(yaml.starts_with("# A small Transformer of the embedded sample"), "{yaml}");
    assert!(yaml.contains("\nname: \"pipeline\"\n") && !yaml.contains("mohawk"), "{yaml}");
    assert_eq!(project.pipe(&["check", "pipeline.yaml"]).code, Some(0));
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
    assert!(ran.stderr.contains("found   ./texts/*.jsonl ("), "{}", ran.stderr);
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
        (&["rnu", "p.yaml"], "'run'"),
        (&["cache", "verfy"], "'verify'"),
        (&["plan", "q.yaml"], "did you mean `p.yaml`"),
        (&["report", "@7"], "pipe runs"),
        (&["export", "all", "out", "--port", "oo"], "did you mean `o`"),
        (&["generate", "all", "--port", "oo"], "did you mean `o`"),
        (&["stages", "distil"], "distill"),
    ] {
        let ran = project.pipe(args);
        assert!(ran.code == Some(2) && ran.stderr.contains(meant), "{args:?}: {}", ran.stderr);
    }
}
