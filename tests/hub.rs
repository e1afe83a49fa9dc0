//! Models from a hub, from outside: fetched before the step, keyed by bytes and commit, and not
//! asked for again.

use crate::hub_server::{Blob, Hub, Reply};
use crate::support::Project;

const OLD: &str = "00000000000000000000000000000000000000aa";
const NEW: &str = "00000000000000000000000000000000000000bb";

/// Steps that list the files of `REVISION` and one that wants nothing of the hub.
const LIST: &str = "params: { model: 'hf:o/n@main' }
steps:
  list:
    stage: command
    in: { model: '${params.model}' }
    run: [sh, -c, 'ls ${in.model} > ${out.names}; cat ${in.model}/config.json >> ${out.names}']
    out: { names: names.txt }
  other:
    stage: command
    run: [sh, -c, 'echo x > ${out.text}']
    out: { text: x.txt }
outputs:
  names: { from: list.names, to: ./names.txt }
";

fn blob(text: &str) -> Blob {
    // No sum: then only the length is checked.
    Blob { bytes: text.into(), etag: format!("etag-{}", text.len()), elsewhere: text.len() > 99 }
}

fn files(config: &str) -> Vec<(&'static str, Blob)> {
    let weights = "w".repeat(100);
    vec![
        ("README.md", blob("of no use to a model")),
        ("config.json", blob(config)),
        ("model.safetensors", blob(&weights)),
    ]
}

fn project(yaml: &str) -> (Project, Hub) {
    let hub = Hub::new("o/n");
    hub.commit("main", OLD, files("{}"));
    let mut project = Project::with(yaml);
    project.env("HF_ENDPOINT", &hub.url());
    project.env("HF_HOME", &project.path().join("hf").display().to_string());
    for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH"] {
        project.env(name, "");
    }
    for name in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"] {
        project.env(name, "");
    }
    (project, hub)
}

#[test]
fn a_model_is_fetched_once_and_its_commit_is_part_of_the_key() {
    let (project, hub) = project(LIST);
    let planned = project.pipe(&["plan", "p.yaml"]);
    assert!(
        planned.stdout.contains("maybe   list   `hf:o/n@main` will be fetched"),
        "{}",
        planned.stdout
    );
    assert_eq!(hub.asked(), ["GET /api/models/o/n/revision/main"], "a plan fetches nothing");
    assert_eq!(project.run(&[]), "0 cached, 2 ran");
    assert_eq!(project.read("names.txt"), "config.json\nmodel.safetensors\n{}");
    assert!(hub.asked().len() > 3);
    assert_eq!(project.run(&[]), "2 cached, 0 ran");
    assert_eq!(hub.asked(), ["GET /api/models/o/n/revision/main"], "what is the branch now?");
    assert_eq!(project.run(&["--set", &format!("model=hf:o/n@{OLD}")]), "2 cached, 0 ran");
    assert_eq!(hub.asked(), [""; 0], "a commit stays what it is");
    let shown = project.pipe(&["show", "list", "--json"]);
    let shown: serde_json::Value = serde_json::from_str(&shown.stdout).unwrap();
    assert_eq!(shown["provenance"]["hub"]["hf:o/n@main"], format!("o/n@{OLD}"));

    // Another commit with the same files is another input: the revision is part of the key.
    hub.commit("main", NEW, files("{}"));
    assert_eq!(project.executed(&[]), ["list"]);
    let why = project.pipe(&["why", "list"]);
    assert!(why.stdout.contains(&format!("(o/n@{OLD} → o/n@{NEW})")), "{}", why.stdout);
    hub.commit("main", &NEW.replace('b', "c"), files("{1}"));
    assert_eq!(project.executed(&[]), ["list"]);
}

#[test]
fn offline_takes_what_is_here_and_says_which() {
    let (mut project, hub) = project(LIST);
    project.run(&[]);
    hub.asked();
    project.env("HF_HUB_OFFLINE", "1");
    let ran = project.pipe(&["run", "p.yaml"]);
    assert_eq!((ran.code, ran.counts().as_str()), (Some(0), "2 cached, 0 ran"), "{}", ran.stderr);
    assert!(
        ran.stderr.contains("as it was when last fetched: commit 000000000000"),
        "{}",
        ran.stderr
    );
    let ran = project.pipe(&["run", "p.yaml", "--set", "model=hf:o/other"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("nothing of it is here, and HF_HUB_OFFLINE"), "{}", ran.stderr);
    assert_eq!(hub.asked(), [""; 0]);
}

#[test]
fn what_cannot_be_fetched_fails_its_step_and_no_other() {
    let (mut project, hub) = project(LIST);
    project.env("HF_TOKEN", "secret-token");
    hub.hook(|request| {
        let gated = request.path.starts_with("/o/n/resolve/");
        gated.then(|| Reply::status(403).with("X-Error-Code", "GatedRepo"))
    });
    let ran = project.pipe(&["run", "p.yaml", "--keep-going"]);
    assert_eq!((ran.code, ran.counts().as_str()), (Some(1), "0 cached, 1 ran, 1 failed"));
    assert!(
        ran.stderr.contains("failed list: `hf:o/n@main`: 127.0.0.1 keeps it behind a licence"),
        "{}",
        ran.stderr
    );
    assert!(ran.stderr.contains("hint: accept the licence at http://127.0.0.1"), "{}", ran.stderr);
    assert!(!ran.stderr.contains("secret-token") && !ran.stdout.contains("secret-token"));
    hub.hook(|_| None);
    assert_eq!(project.run(&[]), "1 cached, 1 ran");
}

#[test]
fn one_file_of_a_repository_comes_under_its_name() {
    let yaml = "steps:
  a:
    stage: command
    in: { file: 'hf:o/n@v2#q/a-q4.gguf' }
    run: [sh, -c, 'echo ${in.file} > ${out.text}; cat ${in.file} >> ${out.text}']
    out: { text: a.txt }
outputs:
  a: { from: a.text, to: ./a.txt }
";
    let (project, hub) = project(yaml);
    hub.commit("v2", NEW, vec![("q/a-q4.gguf", blob("packed"))]);
    assert_eq!(project.run(&[]), "0 cached, 1 ran");
    assert_eq!(project.read("a.txt"), "in/file/a-q4.gguf\npacked");
}

#[test]
fn steps_that_want_nothing_of_the_hub_do_not_wait_for_it() {
    let (project, hub) = project(LIST);
    // The hub answers when the other step is done.
    let done = project.path().join("done");
    let yaml = LIST.replace(
        "echo x > ${out.text}",
        &format!("echo x > ${{out.text}}; touch {}", done.display()),
    );
    project.write("p.yaml", &yaml);
    hub.hook(move |_| {
        for _ in 0..6000 {
            if done.exists() {
                return None;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Some(Reply::status(404))
    });
    assert_eq!(project.run(&["--jobs", "2"]), "0 cached, 2 ran");
}
