//! `why` over a table: each kind of change is named with its cause, file and line, old and new value;
//! what must not matter leaves everything cached.

use std::fs;

use cache::{Cache, Entry, Publication};

use crate::hub_server::{Blob, Hub};
use crate::support::Project;

/// A pipeline with something of everything. Runs in a second.
const BASE: &str = r#"name: base
include: [more.yaml]
params:
  word: hello
  range: 2
  parts: [./a.txt, ./b.txt]
profiles:
  loud: { params: { word: HELLO } }
  long: { steps: { corpus: { with: { documents: 60 } } } }
steps:
  corpus: { stage: text, with: { documents: 40, seed: 1 } }
  tokenizer: { stage: train_tokenizer, in: { text: corpus.text }, with: { vocab: 300 } }
  tokens:
    stage: tokenize
    in: { text: corpus.text, tokenizer: tokenizer.tokenizer }
    with: { seq: 16, holdout: 0.2 }
  teacher:
    stage: pretrain
    in: { tokens: tokens.train }
    with: { layers: 2, d_model: 16, heads: 2, ffn: 32, updates: 1 }
  signals:
    stage: cache_teacher
    in: { model: teacher.model, tokens: tokens.train }
    with: { sequences: 4 }
  pick: { stage: command, in: { x: "signals.layer[0]" }, run: [cp, "${in.x}", "${out.o}"], out: [o] }
  say:
    stage: command
    in: { f: ./f.txt }
    run: [sh, -c, 'cat ${in.f} > ${out.o}; echo ${params.word} >> ${out.o}']
    out: [o]
    env: { MODE: one }
  other: { stage: command, in: { f: ./f.txt }, run: [cp, "${in.f}", "${out.o}"], out: [o] }
  follow: { stage: command, in: { x: say.o }, run: [cp, "${in.x}", "${out.o}"], out: [o] }
  each:
    matrix: { i: "0..${params.range}" }
    stage: command
    run: [sh, -c, 'echo ${matrix.i} > ${out.o}']
    out: [o]
  all: { stage: command, in: { x: "each[*].o" }, run: [sh, -c, 'cat ${in.x} > ${out.o}'], out: [o] }
  ordered: { stage: command, in: { x: "${params.parts}" }, run: [sh, -c, 'cat ${in.x} > ${out.o}'], out: [o] }
  texts: { stage: text, in: { files: ./texts/*.txt } }
  tree: { stage: command, in: { d: ./tree }, run: [sh, -c, 'ls ${in.d} > ${out.o}'], out: [o] }
"#;

/// What `BASE` includes.
const MORE: &str = "params: { extra: 1 }
steps:
  shared: { stage: command, run: [sh, -c, 'echo extra ${params.extra} > ${out.o}'], out: [o] }
  written: { stage: text, with: { documents: 10, filler: 0.5 } }
";

const FILES: [(&str, &str); 10] = [
    ("p.yaml", BASE),
    ("more.yaml", MORE),
    ("values.yaml", "word: there\n"),
    ("f.txt", "one\n"),
    ("g.txt", "two\n"),
    ("a.txt", "a\n"),
    ("b.txt", "b\n"),
    ("c.txt", "c\n"),
    ("texts/x.txt", "a text of some words\n"),
    ("tree/one", "1"),
];

/// A change and what is asked.
#[derive(Default)]
struct Case {
    /// For messages.
    name: &'static str,
    /// The step that `why` is asked about.
    step: &'static str,
    /// File, text, other text; an empty text replaces the whole file.
    edits: &'static [(&'static str, &'static str, &'static str)],
    /// Arguments of `why`.
    args: &'static [&'static str],
    /// An environment variable.
    env: Option<(&'static str, &'static str)>,
    /// What is told.
    told: &'static [&'static str],
    /// A file, and what stands on the line of it that is told.
    place: Option<(&'static str, &'static str)>,
}

fn project() -> Project {
    let mut project = Project::new();
    FILES.iter().for_each(|(name, text)| project.write(name, text));
    project.env("PIPE_FAKE_GPUS", "");
    project.run(&[]);
    project
}

/// What `why` tells after the change of `case`, which is undone.
fn asked(project: &mut Project, case: &Case) -> String {
    for (file, from, to) in case.edits {
        let text = project.read(file);
        assert!(from.is_empty() || text.contains(from), "{}: no {from:?} in {file}", case.name);
        project.write(file, &if from.is_empty() { to.to_string() } else { text.replace(from, to) });
    }
    if let Some((name, value)) = case.env {
        project.env(name, value);
    }
    let told = project.pipe(&[&["why", case.step, "-f", "p.yaml"], case.args].concat());
    let place = case.place.map(|(file, on)| {
        let text = project.read(file);
        let line = text.lines().position(|line| line.contains(on));
        format!("{file}:{}:", line.unwrap_or_else(|| panic!("no {on:?} in {file}")) + 1)
    });
    for (file, ..) in case.edits {
        match FILES.iter().find(|(name, _)| name == file) {
            Some((name, text)) => project.write(name, text),
            None => fs::remove_file(project.path().join(file)).unwrap(),
        }
    }
    if let Some((name, _)) = case.env {
        project.env(name, "");
    }
    assert_eq!(told.code, Some(0), "{}: {}", case.name, told.stderr);
    for text in case.told.iter().map(|text| text.to_string()).chain(place) {
        assert!(told.stdout.contains(&text), "{}: no {text:?} in\n{}", case.name, told.stdout);
    }
    told.stdout
}

const CHANGES: &[Case] = &[
    Case {
        name: "a parameter",
        step: "tokens",
        edits: &[("p.yaml", "seq: 16", "seq: 8")],
        told: &["`tokens` would run", "parameter `seq`: 16 → 8 (p.yaml:"],
        place: Some(("p.yaml", "seq: 8")),
        ..CASE
    },
    Case {
        name: "a parameter of the pipeline in a command",
        step: "say",
        edits: &[("p.yaml", "word: hello", "word: moon")],
        told: &["parameter `run`: ", "echo hello", "→", "echo moon", ", `params.word` at p.yaml:"],
        place: Some(("p.yaml", "word: moon")),
        ..CASE
    },
    Case {
        name: "a profile's parameter",
        step: "say",
        args: &["--profile", "loud"],
        told: &["echo HELLO", ", `params.word` at p.yaml:"],
        place: Some(("p.yaml", "loud:")),
        ..CASE
    },
    Case {
        name: "a profile's field of a step",
        step: "corpus",
        args: &["--profile", "long"],
        told: &["parameter `documents`: 40 → 60 (p.yaml:"],
        place: Some(("p.yaml", "long:")),
        ..CASE
    },
    Case {
        name: "the content of a file",
        step: "say",
        edits: &[("f.txt", "one", "another")],
        told: &["input `f` from file ", "f.txt: other bytes (", " → ", "(p.yaml:"],
        place: Some(("p.yaml", "in: { f: ./f.txt }")),
        ..CASE
    },
    Case {
        name: "another file",
        step: "other",
        edits: &[(
            "p.yaml",
            "other: { stage: command, in: { f: ./f.txt }",
            "other: { stage: command, in: { f: ./g.txt }",
        )],
        told: &["input `f` from file ", "g.txt: other bytes ("],
        place: Some(("p.yaml", "g.txt")),
        ..CASE
    },
    Case {
        name: "the tokenizer",
        step: "tokens",
        edits: &[("p.yaml", "vocab: 300", "vocab: 310")],
        told: &["`tokenizer`, which it needs, would run", "parameter `vocab`: 300 → 310 (p.yaml:"],
        place: Some(("p.yaml", "vocab: 310")),
        ..CASE
    },
    Case {
        name: "environment of a command",
        step: "say",
        edits: &[("p.yaml", "MODE: one", "MODE: two")],
        told: &["parameter `env.MODE`: \"one\" → \"two\" (p.yaml:"],
        place: Some(("p.yaml", "MODE: two")),
        ..CASE
    },
    Case {
        name: "a new variable",
        step: "say",
        edits: &[("p.yaml", "{ MODE: one }", "{ MODE: one, MORE: x }")],
        told: &["parameter `env.MORE`: absent → \"x\" (p.yaml:"],
        place: Some(("p.yaml", "MORE: x")),
        ..CASE
    },
    Case {
        name: "the seed",
        step: "corpus",
        edits: &[("p.yaml", "seed: 1 }", "seed: 2 }")],
        told: &["parameter `seed`: 1 → 2 (p.yaml:"],
        place: Some(("p.yaml", "seed: 2 }")),
        ..CASE
    },
    Case {
        name: "the kind of device, by itself",
        step: "teacher",
        env: Some(("PIPE_FAKE_GPUS", "GPU-why")),
        told: &["parameter `device`: \"cpu\" → \"cuda\" (auto: there is a GPU)"],
        ..CASE
    },
    Case {
        name: "one more of a matrix",
        step: "all",
        edits: &[("p.yaml", "range: 2", "range: 3")],
        told: &["`each[2]`, which it needs, would run"],
        ..CASE
    },
    Case {
        name: "one less of a matrix",
        step: "all",
        edits: &[("p.yaml", "range: 2", "range: 1")],
        told: &["input `x` from step `each[0]`: 2 artifacts → 1 (p.yaml:"],
        place: Some(("p.yaml", "each[*].o")),
        ..CASE
    },
    Case {
        name: "a parameter in an included file",
        step: "shared",
        edits: &[("more.yaml", "extra: 1", "extra: 7")],
        told: &["echo extra 1 >", "→", "echo extra 7 >", ", `params.extra` at more.yaml:"],
        place: Some(("more.yaml", "extra: 7")),
        ..CASE
    },
    Case {
        name: "a step in an included file",
        step: "written",
        edits: &[("more.yaml", "filler: 0.5", "filler: 0.25")],
        told: &["parameter `filler`: 0.5 → 0.25 (more.yaml:"],
        place: Some(("more.yaml", "filler: 0.25")),
        ..CASE
    },
    Case {
        name: "--set of a step",
        step: "tokens",
        args: &["--set", "tokens.seq=8"],
        told: &["parameter `seq`: 16 → 8 (--set"],
        ..CASE
    },
    Case {
        name: "--set of a parameter",
        step: "say",
        args: &["--set", "word=sun"],
        told: &["echo sun", ", `params.word` at --set"],
        ..CASE
    },
    Case {
        name: "--params",
        step: "say",
        args: &["--params", "values.yaml"],
        told: &["echo there", ", `params.word` at "],
        place: Some(("values.yaml", "word")),
        ..CASE
    },
    Case {
        name: "the order of a list",
        step: "ordered",
        edits: &[("p.yaml", "[./a.txt, ./b.txt]", "[./b.txt, ./a.txt]")],
        told: &["input `x` from file ", "2 of 2 artifacts have other bytes (p.yaml:"],
        place: Some(("p.yaml", "./b.txt, ./a.txt")),
        ..CASE
    },
    Case {
        name: "one more of a list",
        step: "ordered",
        edits: &[("p.yaml", "[./a.txt, ./b.txt]", "[./a.txt, ./b.txt, ./c.txt]")],
        told: &["2 artifacts → 3 (p.yaml:"],
        place: Some(("p.yaml", "./c.txt")),
        ..CASE
    },
    Case {
        name: "the layer of a list",
        step: "pick",
        edits: &[("p.yaml", "signals.layer[0]", "signals.layer[1]")],
        told: &["input `x` from step `signals`: other bytes (", "number 0 → 1", "(p.yaml:"],
        place: Some(("p.yaml", "signals.layer[1]")),
        ..CASE
    },
    Case {
        name: "another step as input",
        step: "follow",
        edits: &[("p.yaml", "in: { x: say.o }", "in: { x: other.o }")],
        told: &["input `x` from step `other`: other bytes ("],
        place: Some(("p.yaml", "x: other.o")),
        ..CASE
    },
    Case {
        name: "a file two steps up",
        step: "follow",
        edits: &[("f.txt", "one", "another")],
        told: &["`say`, which it needs, would run", "f.txt: other bytes ("],
        place: Some(("p.yaml", "in: { f: ./f.txt }")),
        ..CASE
    },
    Case {
        name: "one more input",
        step: "other",
        edits: &[(
            "p.yaml",
            "other: { stage: command, in: { f: ./f.txt }",
            "other: { stage: command, in: { f: ./f.txt, g: ./g.txt }",
        )],
        told: &["input `g` from file ", "g.txt: was not connected before (p.yaml:"],
        place: Some(("p.yaml", "g: ./g.txt")),
        ..CASE
    },
    Case {
        name: "one input less",
        step: "say",
        edits: &[(
            "p.yaml",
            "    in: { f: ./f.txt }\n    run: [sh, -c, 'cat ${in.f} > ${out.o}; echo",
            "    run: [sh, -c, 'echo",
        )],
        told: &["input `f` is not connected any more", "(p.yaml:"],
        place: Some(("p.yaml", "  say:")),
        ..CASE
    },
    Case {
        name: "another program",
        step: "other",
        edits: &[("p.yaml", "in: { f: ./f.txt }, run: [cp, ", "in: { f: ./f.txt }, run: [ln, ")],
        told: &["parameter `run`: [\"cp\",", "→ [\"ln\","],
        place: Some(("p.yaml", "run: [ln")),
        ..CASE
    },
    Case {
        name: "the name of an output",
        step: "follow",
        edits: &[(
            "p.yaml",
            "in: { x: say.o }, run: [cp, \"${in.x}\", \"${out.o}\"], out: [o]",
            "in: { x: say.o }, run: [cp, \"${in.x}\", \"${out.o}\"], out: { o: x.txt }",
        )],
        told: &["parameter `out.o`: null → \"x.txt\" (p.yaml:"],
        place: Some(("p.yaml", "x.txt")),
        ..CASE
    },
    Case {
        name: "a parameter that is left to its default",
        step: "written",
        edits: &[("more.yaml", ", filler: 0.5", "")],
        told: &["parameter `filler`: 0.5 → 0.2 (by default)"],
        ..CASE
    },
    Case {
        name: "one more file that a pattern finds",
        step: "texts",
        edits: &[("texts/y.txt", "", "more words of text\n")],
        told: &["input `files` from file ", "texts/*.txt: 1 artifact → 2 (p.yaml:"],
        place: Some(("p.yaml", "./texts/*.txt")),
        ..CASE
    },
    Case {
        name: "a file in a directory",
        step: "tree",
        edits: &[("tree/two", "", "2")],
        told: &["input `d` from file ", "tree: other bytes ("],
        place: Some(("p.yaml", "in: { d: ./tree }")),
        ..CASE
    },
    Case {
        name: "never from the cache",
        step: "other",
        edits: &[("p.yaml", "  other: { stage", "  other: { cache: false, stage")],
        told: &["`other` would run", "it says `cache: false` (p.yaml:"],
        place: Some(("p.yaml", "cache: false")),
        ..CASE
    },
];

const CASE: Case =
    Case { name: "", step: "", edits: &[], args: &[], env: None, told: &[], place: None };

#[test]
fn every_kind_of_change_is_named_with_its_place() {
    assert!(CHANGES.len() >= 30, "{}", CHANGES.len());
    let mut project = project();
    for case in CHANGES {
        let told = asked(&mut project, case);
        assert!(!told.contains("is cached"), "{}: {told}", case.name);
    }
}

/// What must not matter: of each, one step is asked, and a run would find everything there.
const SAME: &[Case] = &[
    Case {
        name: "a comment",
        step: "tokens",
        edits: &[("p.yaml", "holdout: 0.2 }", "holdout: 0.2 } # a little")],
        ..CASE
    },
    Case {
        name: "the order of keys",
        step: "tokens",
        edits: &[("p.yaml", "{ seq: 16, holdout: 0.2 }", "{ holdout: 0.2, seq: 16 }")],
        ..CASE
    },
    Case {
        name: "formatting",
        step: "corpus",
        edits: &[(
            "p.yaml",
            "{ documents: 40, seed: 1 }",
            "\n      { documents: 40,\n        seed: 1 }",
        )],
        ..CASE
    },
    Case {
        name: "how a number is written",
        step: "corpus",
        edits: &[("p.yaml", "documents: 40,", "documents: 4e1,")],
        ..CASE
    },
    Case {
        name: "a default that is spelled out",
        step: "corpus",
        edits: &[("p.yaml", "seed: 1 }", "seed: 1, refrains: 0.4 }")],
        ..CASE
    },
    Case {
        name: "the name of the pipeline",
        step: "say",
        edits: &[("p.yaml", "name: base", "name: another")],
        ..CASE
    },
    Case {
        name: "the name of a step",
        step: "spoken",
        edits: &[("p.yaml", "  say:", "  spoken:"), ("p.yaml", "say.o", "spoken.o")],
        ..CASE
    },
    Case {
        name: "the name of a parameter",
        step: "say",
        edits: &[
            ("p.yaml", "word: hello", "term: hello"),
            ("p.yaml", "params.word", "params.term"),
            ("p.yaml", "{ word: HELLO }", "{ term: HELLO }"),
        ],
        ..CASE
    },
    Case {
        name: "retries, time-out and resources",
        step: "tokens",
        edits: &[(
            "p.yaml",
            "seq: 16, holdout: 0.2 }",
            "seq: 16, holdout: 0.2 }\n    retries: 3\n    timeout: 2h\n    resources: { cpu: 1, memory: 1MB }",
        )],
        ..CASE
    },
    Case {
        name: "a step that nothing needs",
        step: "follow",
        edits: &[("p.yaml", "  all:", "  unrelated: { stage: text }\n  all:")],
        ..CASE
    },
    Case {
        name: "a file at another place",
        step: "other",
        edits: &[
            ("f2/f.txt", "", "one\n"),
            (
                "p.yaml",
                "other: { stage: command, in: { f: ./f.txt }",
                "other: { stage: command, in: { f: ./f2/f.txt }",
            ),
        ],
        ..CASE
    },
    Case {
        name: "one more step after it",
        step: "all",
        edits: &[("p.yaml", "  other: {", "  another: { stage: text, after: [all] }\n  other: {")],
        ..CASE
    },
    Case {
        name: "an order that carries nothing",
        step: "follow",
        edits: &[(
            "p.yaml",
            "  follow: { stage: command,",
            "  follow: { stage: command, after: [other],",
        )],
        ..CASE
    },
    Case {
        name: "a value from the command line that is the same",
        step: "say",
        args: &["--set", "word=hello", "--set", "tokens.seq=16"],
        ..CASE
    },
];

#[test]
fn what_does_not_matter_leaves_everything_cached() {
    assert!(SAME.len() >= 10, "{}", SAME.len());
    let mut project = project();
    for case in SAME {
        let told = asked(&mut project, case);
        let start = format!("`{}` is cached (key ", case.step);
        assert!(
            told.starts_with(&start) && told.contains("nothing would run"),
            "{}: {told}",
            case.name
        );
    }
}

#[test]
fn times_jobs_places_and_forced_attempts_do_not_matter() {
    let mut project = project();
    let steps = project.run(&["-j", "1"]);
    assert!(steps.ends_with(" cached, 0 ran"), "{steps}");
    // A file that is touched; a file that is written anew with the same bytes.
    let now = fs::FileTimes::new().set_modified(std::time::SystemTime::now());
    fs::File::open(project.path().join("f.txt")).unwrap().set_times(now).unwrap();
    project.write("a.txt", "a\n");
    assert_eq!(project.run(&[]), steps);
    // The same key again, by force.
    project.run(&["--force", "say"]);
    let case = Case { step: "follow", ..CASE };
    assert!(asked(&mut project, &case).starts_with("`follow` is cached"));
    // The whole project elsewhere.
    fs::create_dir(project.path().join("moved")).unwrap();
    for (name, text) in FILES {
        project.write(&format!("moved/{name}"), text);
    }
    let told = project.pipe(&["why", "follow", "-f", "moved/p.yaml"]);
    assert!(told.stdout.starts_with("`follow` is cached"), "{}{}", told.stdout, told.stderr);
}

#[test]
fn another_version_of_a_stage_is_named() {
    let project = Project::with("steps: { corpus: { stage: text, with: { documents: 10 } } }\n");
    project.run(&[]);
    let cache = Cache::open(project.cache()).unwrap();
    let now = cache.entries().unwrap().next().unwrap();
    assert!(now.preimage.ends_with("\"version\":1}"), "{}", now.preimage);
    let before = now.preimage.replace("\"version\":1}", "\"version\":0}");
    let old = Entry::new(before, now.outputs.clone(), None, now.provenance.clone());
    // A cache in which only the earlier version has been.
    let mut other = Project::with(&project.read("p.yaml"));
    let past = Cache::open(other.cache()).unwrap();
    let committer = past.committer(|_| {});
    committer.publish(Publication::imported(old)).unwrap();
    committer.flush().unwrap();
    drop(committer);
    let case = Case {
        name: "version",
        step: "corpus",
        told: &["`corpus` would run", "the stage's code: version 0 → 1"],
        ..CASE
    };
    asked(&mut other, &case);
}

#[test]
fn another_revision_of_a_hub_is_named() {
    let hub = Hub::new("o/n");
    let blob = |text: &str| Blob {
        bytes: text.into(),
        etag: format!("etag-{}", text.len()),
        elsewhere: false,
    };
    let files = || vec![("config.json", blob("{}")), ("model.safetensors", blob("weights"))];
    let (old, new) =
        ("00000000000000000000000000000000000000aa", "00000000000000000000000000000000000000bb");
    hub.commit("main", old, files());
    let mut project = Project::with(
        "steps:
  list: { stage: command, in: { m: 'hf:o/n@main' }, run: [sh, -c, 'ls ${in.m} > ${out.o}'], out: [o] }
",
    );
    project.env("HF_ENDPOINT", &hub.url());
    project.env("HF_HOME", &project.path().join("hf").display().to_string());
    for name in
        ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE"]
    {
        project.env(name, "");
    }
    project.run(&[]);
    hub.commit("main", new, files());
    project.run(&[]);
    let told = project.pipe(&["why", "list", "-f", "p.yaml"]).stdout;
    let wanted =
        format!("input `m` from hf:o/n@main: another name (o/n@{old} → o/n@{new}) (p.yaml:2:");
    assert!(told.contains(&wanted), "{told}");
}

#[test]
fn causes_are_told_to_programs_with_their_places() {
    let mut project = project();
    project.write("f.txt", "another\n");
    project.run(&[]);
    let ran = project.pipe(&["why", "follow", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let follow = json.as_array().unwrap().iter().find(|step| step["step"] == "follow").unwrap();
    assert_eq!(follow["state"], "cached");
    let cause = &follow["causes"][0];
    assert_eq!((&cause["step"], &cause["differences"][0]["port"]), (&"say".into(), &"f".into()));
    assert!(cause["because"][0].as_str().unwrap().contains("f.txt: other bytes"), "{cause}");
    // The plan tells the same of what would run: here after the input changed and was made.
    project.write(
        "p.yaml",
        &BASE.replace("in: { x: say.o }, run: [cp", "in: { x: say.o }, run: [cat"),
    );
    let case = Case { step: "follow", ..CASE };
    let plan = project.pipe(&["plan", "p.yaml", "--json"]).stdout;
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    let steps = plan["steps"].as_array().unwrap();
    let follow = steps.iter().find(|step| step["step"] == case.step).unwrap();
    assert_eq!(follow["differences"][0]["name"], "run", "{follow}");
    asked(&mut project, &case);
}
