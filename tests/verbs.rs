//! The commands that read, and what they print.

use crate::support::Project;

fn two_steps() -> Project {
    Project::with(
        "params: { word: hello, times: 2 }
steps:
  say:
    stage: command
    run: [sh, -c, 'echo saying; for i in $(seq ${params.times}); do echo ${params.word}; done > ${out.text}']
    out: { text: said.txt }
  count: { stage: command, in: { text: say.text }, run: [sh, -c, 'wc -l < ${in.text} > ${out.n}'], out: [n] }
",
    )
}

#[test]
fn plan_tells_what_would_run_and_why() {
    let project = two_steps();
    let first = project.pipe(&["plan", "p.yaml"]);
    assert_eq!(first.code, Some(0), "{}", first.stderr);
    assert!(first.stdout.contains("runs    say    never done before"), "{}", first.stdout);
    assert!(first.stdout.contains("maybe   count  after `say`"), "{}", first.stdout);
    assert!(first.stdout.ends_with("0 cached, 1 to run, 1 maybe\n"), "{}", first.stdout);
    project.run(&[]);
    let second = project.pipe(&["plan", "p.yaml"]);
    assert!(second.stdout.ends_with("2 cached, 0 to run, 0 maybe\n"), "{}", second.stdout);
    let changed = project.pipe(&["plan", "p.yaml", "--set", "times=3"]);
    assert!(changed.stdout.contains("parameter `run`"), "{}", changed.stdout);
    let json: serde_json::Value =
        serde_json::from_str(&project.pipe(&["plan", "p.yaml", "--json"]).stdout).unwrap();
    assert_eq!(json["steps"][0]["state"], "cached");
    assert_eq!((&json["totals"]["cached"], &json["totals"]["runs"]), (&2.into(), &0.into()));
}

#[test]
fn a_plan_is_priced_by_what_like_steps_took() {
    let project = Project::with(
        "params: { documents: 40 }
steps:
  corpus: { stage: text, with: { documents: \"${params.documents}\" } }
  tokenizer: { stage: train_tokenizer, in: { text: corpus.text }, with: { vocab: 300 } }
",
    );
    let first = project.pipe(&["plan", "p.yaml"]).stdout;
    assert!(!first.contains("about"), "nothing is known yet: {first}");
    project.run(&[]);
    let priced = project.pipe(&["plan", "p.yaml", "--set", "documents=80"]).stdout;
    assert!(
        priced.contains("the longest way takes ") && priced.contains(": corpus → tokenizer"),
        "{priced}"
    );
    let json = |args: &[&str]| -> serde_json::Value {
        let ran = project.pipe(&[&["plan", "p.yaml", "--json"], args].concat());
        serde_json::from_str(&ran.stdout).unwrap()
    };
    let shown: serde_json::Value =
        serde_json::from_str(&project.pipe(&["show", "corpus", "--json"]).stdout).unwrap();
    let took = shown["provenance"]["seconds"].as_f64().unwrap();
    let twice = json(&["--set", "documents=80"]);
    let estimate = &twice["steps"][0]["estimate"];
    assert_eq!(estimate["work"], 2.0);
    assert!((estimate["seconds"].as_f64().unwrap() - 2.0 * took).abs() < 1e-9, "{estimate} {took}");
    let now = json(&[]);
    assert!(now["steps"][0]["estimate"].is_null(), "what is cached costs nothing");
    assert_eq!(now["totals"]["seconds"], 0.0);
    let totals = &twice["totals"];
    assert_eq!(totals["critical_path"], serde_json::json!(["corpus", "tokenizer"]));
    assert_eq!(totals["critical_path_seconds"], totals["seconds_one_by_one"]);
    assert!(priced.lines().all(|line| line.chars().count() <= 80), "{priced}");
}

#[test]
fn why_names_the_parameter_the_file_and_the_upstream_step() {
    let project = Project::with(
        "steps:
  a: { stage: command, in: { f: ./f.txt }, run: [cp, '${in.f}', '${out.o}'], out: [o], env: { MODE: one } }
  b: { stage: command, in: { i: a.o }, run: [cp, '${in.i}', '${out.o}'], out: [o] }
",
    );
    project.write("f.txt", "1");
    project.run(&[]);
    let why = |step: &str| project.pipe(&["why", step]).stdout;
    assert!(why("b").starts_with("`b` is cached"), "{}", why("b"));
    project.write("f.txt", "2");
    assert!(why("a").contains("f.txt: other bytes"), "{}", why("a"));
    assert!(why("b").contains("`a`, which it needs, would run"), "{}", why("b"));
    project.run(&[]);
    let told = why("b");
    assert!(told.contains("input `i` from step `a`: other bytes"), "{told}");
    assert!(
        told.contains("`a` made other bytes, since then:\n      input `f` from file "),
        "{told}"
    );
    project.write("p.yaml", &project.read("p.yaml").replace("MODE: one", "MODE: two"));
    let told = why("a");
    assert!(
        told.contains("parameter `env.MODE`: \"one\" → \"two\"") && told.contains("p.yaml:2:"),
        "{told}"
    );
    project.write("p.yaml", &project.read("p.yaml").replace("MODE: two", "MODE: one"));
    assert!(why("a").starts_with("`a` is cached"), "{}", why("a"));
}

#[test]
fn a_command_about_a_step_means_the_newest_run_with_its_settings() {
    let project = two_steps();
    project.run(&["--set", "word=there"]);
    let shown = |args: &[&str]| project.pipe(&[&["show", "say"], args].concat()).stdout;
    assert!(shown(&[]).starts_with("say cached"), "{}", shown(&[]));
    assert!(!shown(&["--set", "times=3"]).starts_with("say cached"), "settings now come on top");
    assert!(!shown(&["-f", "p.yaml"]).starts_with("say cached"), "a file has no settings");
    // Many runs in a second: the last one is the newest.
    for word in ["a", "b", "c", "d", "e", "f"] {
        project.run(&["--set", &format!("word={word}")]);
        let json: serde_json::Value = serde_json::from_str(&shown(&["--json"])).unwrap();
        assert!(json["params"].to_string().contains(&format!("echo {word};")), "{word}: {json}");
    }
}

#[test]
fn show_and_log() {
    let project = two_steps();
    project.run(&[]);
    let shown = project.pipe(&["show", "say"]);
    for part in ["stage `command`", "text ", "made in"] {
        assert!(shown.stdout.contains(part), "{part} in {}", shown.stdout);
    }
    assert_eq!(project.pipe(&["log", "say"]).stdout, "saying\n");
    let json: serde_json::Value =
        serde_json::from_str(&project.pipe(&["show", "say", "--json"]).stdout).unwrap();
    assert_eq!(json["outputs"][0]["name"], "said.txt");
    let wrong = project.pipe(&["show", "sya"]);
    assert_eq!(wrong.code, Some(2));
    assert!(wrong.stderr.contains("say"), "{}", wrong.stderr);
}

#[test]
fn stages_and_schema_come_from_the_types() {
    let project = Project::new();
    let stages = project.pipe(&["stages"]).stdout;
    for name in [
        "text",
        "train_tokenizer",
        "tokenize",
        "pretrain",
        "cache_teacher",
        "orient",
        "align",
        "assemble",
        "distill",
        "evaluate",
        "command",
    ] {
        assert!(stages.lines().any(|line| line.starts_with(&format!("{name} "))), "{name}");
    }
    let one = project.pipe(&["stages", "distill"]).stdout;
    assert!(one.contains("lr") && one.contains("out  model"), "{one}");
    let schema: serde_json::Value =
        serde_json::from_str(&project.pipe(&["schema"]).stdout).unwrap();
    assert!(schema["$schema"].as_str().unwrap().contains("2020-12"));
}

#[test]
fn a_closed_standard_output_ends_quietly() {
    let project = Project::new();
    let mut child = project.start(&["schema"]);
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert!(output.status.success());
}

#[test]
fn the_report_is_one_file_without_network() {
    let project = two_steps();
    project.run(&[]);
    let ran = project.pipe(&["report", "-o", "r.html"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let html = project.read("r.html");
    assert!(html.contains("say") && html.contains("<svg") && !html.contains("src=\"http"));
}

#[test]
fn quiet_prints_the_last_line_only() {
    let ran = two_steps().pipe(&["run", "p.yaml", "--quiet"]);
    assert_eq!((ran.stdout.lines().count(), ran.stderr.as_str()), (1, ""));
}
