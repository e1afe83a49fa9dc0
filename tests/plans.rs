//! What a plan foretells, what is refused before anything runs, and runs with a budget of time.

use serde_json::Value;

use crate::support::Project;

fn plan(project: &Project, args: &[&str]) -> Value {
    let ran = project.pipe(&[&["plan", "p.yaml", "--json"], args].concat());
    serde_json::from_str(&ran.stdout).unwrap_or_else(|_| panic!("{}{}", ran.stdout, ran.stderr))
}

fn step<'a>(plan: &'a Value, name: &str) -> &'a Value {
    let mut steps = plan["steps"].as_array().unwrap().iter();
    steps.find(|step| step["step"] == name).unwrap_or_else(|| panic!("no `{name}` in {plan}"))
}

const SMALL: &str = include_str!("cases/tiny.yaml");

#[test]
fn sizes_are_foretold_before_anything_ran() {
    // As the sample, but with one update wherever it learns.
    let short = |text: &str| {
        text.replace("updates: 400", "updates: 2").replace("updates: 40", "updates: 2")
    };
    let project = Project::with(&short(SMALL));
    let before = plan(&project, &[]);
    project.run(&[]);
    let made = |name: &str, port: Option<&str>| -> f64 {
        let shown = project.pipe(&["show", name, "--json"]).stdout;
        let shown: Value = serde_json::from_str(&shown).unwrap();
        let outputs = shown["outputs"].as_array().unwrap().iter();
        let wanted = outputs.filter(|o| port.is_none_or(|port| o["port"] == port));
        wanted.map(|output| output["bytes"].as_f64().unwrap()).sum()
    };
    let written = |name: &str| step(&before, name)["estimate"]["written"].as_f64().unwrap();
    assert_eq!(written("signals"), made("signals", None), "exact");
    for (name, port) in [
        ("teacher", "model"),
        ("orient[1]", "mixer"),
        ("align[0]", "block"),
        ("student", "model"),
        ("distill", "model"),
    ] {
        let (told, found) = (written(name), made(name, Some(port)));
        assert!((told / found - 1.0).abs() < 0.01, "{name}: {told} foretold, {found} made");
    }
    assert_eq!(step(&before, "corpus")["estimate"]["written"], Value::Null, "nobody knows");
    // And after it, by sizes that were read: the same, but certain.
    let again = plan(&project, &["--set", "signals.seed=5"]);
    let signals = &step(&again, "signals")["estimate"];
    assert_eq!(signals["written"], signals["disk"]["least"]);
    assert!(step(&again, "orient[0]")["estimate"]["flops"].as_f64().unwrap() > 1e5);
    let totals = &again["totals"];
    assert!(totals["flops"].as_f64().unwrap() > 1e5 && totals["memory"].as_f64().unwrap() > 1e6);
}

#[test]
fn lines_of_a_plan_fit_a_terminal() {
    let project = Project::with(include_str!("../pipelines/mohawk.yaml"));
    let told = project.pipe(&["plan", "p.yaml"]).stdout;
    let long: Vec<&str> = told.lines().filter(|line| line.chars().count() > 80).collect();
    assert!(long.is_empty(), "{long:#?}");
    let total = told.lines().find(|line| line.starts_with("in total  ")).expect("totals");
    let words: Vec<&str> = total.split_whitespace().collect();
    assert_eq!(words[2..6], ["≥", "7.2", "T", "≥"], "{told}");
    // What nothing is known of has no line in the table.
    assert_eq!(told.lines().filter(|line| line.contains("tokenizer")).count(), 1, "{told}");
}

const TEACHER: &str = "params: { width: 16, seed: 1 }
steps:
  corpus: { stage: text, with: { documents: 40 } }
  tokenizer: { stage: train_tokenizer, in: { text: corpus.text }, with: { vocab: 300 } }
  tokens:
    stage: tokenize
    in: { text: corpus.text, tokenizer: tokenizer.tokenizer }
    with: { seq: 16, holdout: 0.2 }
  teacher:
    stage: pretrain
    in: { tokens: tokens.train }
    with: { layers: 2, d_model: \"${params.width}\", heads: 2, ffn: 32, updates: 1, seed: \"${params.seed}\" }
";

#[test]
fn a_step_that_no_memory_holds_is_refused_before_anything_runs() {
    let project = Project::with(TEACHER);
    let large = ["--set", "width=16777216"]; // 2 · 4 · 2^48 numbers and more
    let ran = project.pipe(&[&["run", "p.yaml"][..], &large].concat());
    assert_eq!(ran.code, Some(2), "{}{}", ran.stdout, ran.stderr);
    assert!(ran.stderr.contains("error: `teacher` takes at least "), "{}", ran.stderr);
    assert!(ran.stderr.contains(" of memory, but this machine gives "), "{}", ran.stderr);
    assert!(ran.stderr.contains("\nhint: lower `d_model`"), "{}", ran.stderr);
    let runs = std::fs::read_dir(project.cache().join("runs")).into_iter().flatten();
    assert_eq!((runs.count(), &*ran.stdout), (0, ""), "nothing ran, and no run is recorded");
    let told = project.pipe(&[&["plan", "p.yaml"][..], &large].concat());
    assert_eq!(told.code, Some(2), "{}", told.stderr);
    assert!(told.stdout.contains("refuse  teacher"), "{}", told.stdout);
    assert!(told.stdout.contains("        hint: lower `d_model`"), "{}", told.stdout);
    assert!(told.stdout.ends_with("1 to run, 2 maybe, 1 refused\n"), "{}", told.stdout);
    let json = plan(&project, &large);
    let refused = &step(&json, "teacher")["refused"][0];
    assert_eq!(refused["what"], "memory");
    assert!(refused["needs"].as_u64() > refused["has"].as_u64(), "{refused}");
    // Only what is asked for counts, and what fits runs.
    let until = ["run", "p.yaml", "--until", "tokens"];
    assert_eq!(project.pipe(&[&until[..], &large].concat()).code, Some(0));
    assert_eq!(project.run(&[]), "3 cached, 1 ran");
    let small = plan(&project, &["--set", "seed=2"]);
    assert!(step(&small, "teacher").get("refused").is_none(), "{small}");
}

#[test]
fn the_memory_of_gpus_is_a_limit_too() {
    let mut project = Project::with(TEACHER);
    let marked = |project: &Project, width: &str| {
        let told = project.pipe(&["plan", "p.yaml", "--set", &format!("width={width}")]).stdout;
        (told.contains("refuse  teacher"), told)
    };
    // 18 bytes for each of 2 · 4 · 8192² numbers and more: 10 GB.
    project.env("PIPE_FAKE_GPUS", "GPU-small:8");
    let (refused, told) = marked(&project, "8192");
    assert!(
        refused && told.contains(" of memory of a GPU, but the largest GPU has 8.6 GB"),
        "{told}"
    );
    project.env("PIPE_FAKE_GPUS", "GPU-small:8,GPU-large:16");
    let (refused, told) = marked(&project, "8192");
    assert!(!refused, "{told}");
}

/// Bytes that `certain` says are needed are no more than what a run takes.
#[test]
fn what_is_certain_is_no_more_than_what_is_taken() {
    let project = Project::with(&TEACHER.replace("ffn: 32", "ffn: 2048"));
    project.run(&["--until", "tokens"]);
    let told = plan(&project, &["--set", "width=512"]);
    let least = step(&told, "teacher")["estimate"]["memory"]["least"].as_u64().unwrap();
    assert!(least > 100_000_000, "{least}");
    let mut child = project.start(&["run", "p.yaml", "--set", "width=512"]);
    let mut most = 0;
    while child.try_wait().unwrap().is_none() {
        for process in project.processes() {
            let text = std::fs::read_to_string(format!("/proc/{process}/status"));
            let peak = text.unwrap_or_default();
            let peak = peak.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib = peak.and_then(|peak| peak.trim().split(' ').next()?.parse::<u64>().ok());
            most = most.max(kib.unwrap_or(0) * 1024);
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    assert!(most >= least, "{most} bytes were taken, at least {least} were foretold");
}

const BUDGET: &str = "params: { documents: 40, seed: 1 }
steps:
  small: { stage: text, with: { documents: 40, seed: \"${params.seed}\" } }
  large: { stage: text, with: { documents: \"${params.documents}\", seed: 3 } }
  tokenizer: { stage: train_tokenizer, in: { text: large.text }, with: { vocab: 300 } }
";

#[test]
fn a_budget_leaves_what_would_end_too_late_and_the_next_run_goes_on() {
    let project = Project::with(BUDGET);
    project.run(&[]);
    // At a millisecond for 40 documents, and it takes longer, these take a day.
    let settings = ["--set", "seed=2", "--set", "documents=4000000000"];
    let ran = project.pipe(&[&["run", "p.yaml", "--budget", "1h"][..], &settings].concat());
    assert_eq!(ran.code, Some(3), "{}{}", ran.stdout, ran.stderr);
    assert_eq!(ran.counts(), "0 cached, 1 ran, 2 left");
    assert!(ran.stderr.contains("left: `large` takes about "), "{}", ran.stderr);
    assert!(ran.stderr.contains("more than the whole budget of 1 h 00 min"), "{}", ran.stderr);
    assert!(ran.stderr.contains("run again to go on"), "{}", ran.stderr);
    assert_eq!(project.run(&["--set", "seed=2", "--budget", "1h"]), "3 cached, 0 ran");
    let wrong = project.pipe(&["run", "p.yaml", "--budget", "soon"]);
    assert_eq!(wrong.code, Some(2), "{}", wrong.stderr);
    assert!(wrong.stderr.contains("`6h`"), "{}", wrong.stderr);
}

#[test]
fn what_runs_when_time_is_up_is_stopped_and_goes_on_later() {
    let project = Project::with(
        "steps:
  slow:
    stage: command
    run: [sh, -c, 'echo begun >> DIR/seen; while test ! -e DIR/go; do sleep 0.05; done; echo x > ${out.o}']
    out: [o]
  after: { stage: command, in: { x: slow.o }, run: [cp, '${in.x}', '${out.o}'], out: [o] }
",
    );
    let script = project.path().display().to_string();
    let yaml = project.read("p.yaml").replace("DIR", &script);
    project.write("p.yaml", &yaml);
    let ran = project.pipe(&["run", "p.yaml", "--budget", "5s"]);
    assert_eq!(ran.code, Some(3), "{}{}", ran.stdout, ran.stderr);
    assert_eq!((ran.counts(), project.count("seen")), ("0 cached, 0 ran, 2 left".into(), 1));
    assert!(ran.stderr.contains("left: `slow` was stopped when time was up"), "{}", ran.stderr);
    assert!(project.processes().is_empty(), "nothing stays");
    project.write("go", "");
    assert_eq!(project.run(&["--budget", "10min"]), "0 cached, 2 ran");
}
