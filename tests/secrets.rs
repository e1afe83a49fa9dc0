//! Planted secrets are found nowhere but where a program was given them; its environment is listed.

use std::fs;
use std::path::Path;

use crate::support::{Project, Ran};

/// As a careless program may meet it: with what JSON escapes, and with a line break.
const DECLARED: &str = "pl4nted-\"declared\"/\\-secret\nsecond-line-of-it";
const TOKEN: &str = "hf_pl4nted0token0of0the0hub";
const CLOUD: &str = "pl4nted+cloud/key";

fn project(run: &str) -> Project {
    let mut project = Project::new();
    project.env("DECLARED", DECLARED);
    project.env("HF_TOKEN", TOKEN);
    project.env("AWS_SECRET_ACCESS_KEY", CLOUD);
    project.env("HF_ENDPOINT", "http://user:pl4nted-in-an-address@127.0.0.1:9");
    project.env("HF_HOME", &project.path().join("hf").display().to_string());
    project.write("p.sh", run);
    project
}

/// Every spelling that must be nowhere.
fn spellings() -> Vec<String> {
    let mut all = vec![TOKEN.to_string(), CLOUD.to_string(), "pl4nted".into()];
    for text in [DECLARED].into_iter().chain(DECLARED.lines()) {
        let json = serde_json::to_string(text).unwrap();
        let twice = serde_json::to_string(&json).unwrap();
        all.extend([text.to_string(), json.trim_matches('"').to_string()]);
        all.push(twice.trim_matches('"').trim_matches('\\').to_string());
    }
    all.push("second-line-of-it".into());
    all
}

fn clean(text: &[u8], place: &str) {
    for secret in spellings() {
        let found = text.windows(secret.len()).any(|window| window == secret.as_bytes());
        assert!(!found, "{secret:?} is in {place}: {}", String::from_utf8_lossy(text));
    }
}

fn clean_tree(dir: &Path) -> usize {
    let mut files = 0;
    for item in fs::read_dir(dir).unwrap() {
        let path = item.unwrap().path();
        clean(path.as_os_str().as_encoded_bytes(), "a name");
        if path.is_dir() {
            files += clean_tree(&path);
        } else if path.is_file() {
            clean(&fs::read(&path).unwrap(), &path.display().to_string());
            files += 1;
        }
    }
    files
}

fn clean_ran(ran: &Ran, what: &str) {
    clean(ran.stdout.as_bytes(), &format!("the output of {what}"));
    clean(ran.stderr.as_bytes(), &format!("the messages of {what}"));
}

/// Prints the secret whole, by halves, to both streams by turns, as JSON does, and line by line.
const PROGRAM: &str = r#"
printf 'whole: %s\n' "$DECLARED"
half=${DECLARED%-secret*}
rest=${DECLARED#"$half"}
printf 'cut: %s' "$half"; sleep 0.2; printf '%s\n' "$rest" >&2
printf '%s' "$half" >&2; sleep 0.2; printf '%s\n' "$rest"
printf '%s' "$DECLARED" | python3 -c 'import json,sys; print(json.dumps({"t": sys.stdin.read()}))' || true
printf '%s' "$DECLARED" | while read -r line; do echo "> $line"; done
printf 'in the middle of '; printf '%s' "$DECLARED"; printf ' a line\n'
env | grep -c HF_TOKEN
echo "end: ${HF_TOKEN-}${AWS_SECRET_ACCESS_KEY-}."
echo done > "$1"
exit "$2"
"#;

fn yaml(project: &Project, status: u32) {
    let program = project.path().join("p.sh").display().to_string();
    project.write(
        "p.yaml",
        &format!(
            "steps:
  tell:
    stage: command
    secrets: [DECLARED]
    run: [sh, {program}, '${{out.o}}', '{status}']
    out: [o]
"
        ),
    );
}

#[test]
fn planted_secrets_are_nowhere() {
    for status in [0, 3] {
        let project = project(PROGRAM);
        yaml(&project, status);
        let ran = project.pipe(&["run", "p.yaml", "--json"]);
        assert_eq!(ran.code, Some(i32::from(status > 0)), "{}", ran.stderr);
        clean_ran(&ran, "run --json");
        let ran = project.pipe(&["run", "p.yaml"]);
        clean_ran(&ran, "run");
        let log = project.pipe(&["log", "tell"]);
        clean_ran(&log, "log");
        for told in ["whole: ***\n", "cut: ***\n", "> ***\n", "middle of *** a line", "end: .\n"] {
            assert!(log.stdout.contains(told), "{told:?} is not in {}", log.stdout);
        }
        let verbs: [&[&str]; 6] = [
            &["show", "tell", "--json"],
            &["show", "tell"],
            &["why", "tell", "--json"],
            &["plan", "p.yaml", "--json"],
            &["report", "-o", "report.html"],
            &["check", "p.yaml", "--json"],
        ];
        for verb in verbs {
            clean_ran(&project.pipe(verb), verb[0]);
        }
        clean(project.read("report.html").as_bytes(), "the report");
        assert!(clean_tree(project.cache()) > 10);
    }
}

#[test]
fn a_hub_that_cannot_be_reached_is_told_without_token_and_password() {
    let mut project = project("");
    project.write(
        "p.yaml",
        "steps: { t: { stage: command, in: { m: 'hf:owner/name' }, run: 'true', out: [o] } }\n",
    );
    project.env("no_proxy", "*");
    for verb in [&["run", "p.yaml", "--json"][..], &["run", "p.yaml"], &["plan", "p.yaml"]] {
        let ran = project.pipe(verb);
        clean_ran(&ran, verb[0]);
        if verb[0] == "run" {
            assert_eq!(ran.code, Some(1), "{}", ran.stderr);
            assert!((ran.stdout + &ran.stderr).contains("owner/name"), "what is missing is told");
        }
    }
    clean_tree(project.cache());
}

/// What a program's own children left behind keeps no step from ending.
#[test]
fn a_program_that_leaves_somebody_writing_ends_all_the_same() {
    let project = project("echo begun; sleep 1000 & echo x > \"$1\"\n");
    yaml(&project, 0);
    assert_eq!(project.run(&[]), "0 cached, 1 ran");
}

#[test]
fn a_program_gets_the_environment_that_is_listed_and_no_other() {
    let mut project = project("");
    project.env("DECLARED", "x");
    for name in ["LD_PRELOAD_NOT", "PYTHONPATH", "PIPE_ANYTHING", "SSH_AUTH_SOCK", "TZ", "LANG"] {
        project.env(name, "C");
    }
    project.write(
        "p.yaml",
        "steps:
  list:
    stage: command
    secrets: [DECLARED]
    env: { MINE: mine }
    run: [sh, -c, 'env -0 | tr \"\\0\" \"\\n\" | cut -d= -f1 | sort > ${out.o}']
    out: [o]
outputs: { o: { from: list.o, to: o.txt } }
",
    );
    project.run(&[]);
    // Passed, if they are set: PATH HOME LANG LC_ALL TMPDIR TZ and those of GPUs.
    let passed = [
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "TMPDIR",
        "TZ",
        "CUDA_VISIBLE_DEVICES",
        "NVIDIA_VISIBLE_DEVICES",
        "LD_LIBRARY_PATH",
        "CUDA_HOME",
    ];
    let of_shell = ["PWD", "OLDPWD", "SHLVL", "_"];
    let listed = project.read("o.txt");
    let names: Vec<&str> = listed.lines().filter(|name| !of_shell.contains(name)).collect();
    for name in &names {
        let known = passed.contains(name) || ["DECLARED", "MINE"].contains(name);
        assert!(known, "{name} reached the program");
    }
    for name in ["DECLARED", "MINE", "LANG", "TZ", "PATH"] {
        assert!(names.contains(&name), "{name} did not reach it: {names:?}");
    }
}
