//! The cases of `*.md` beside this file: YAML, options, and what comes of them, as text.
//!
//! `BLESS=1 cargo test -p engine --test spec` writes what comes of them now; read the difference.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use engine::gpu::{Gpu, Gpus};
use engine::spec::Options;

use crate::toys::{check, options};

#[test]
fn good_pipelines_become_these_plans() {
    run("good.md");
}

#[test]
fn bad_pipelines_are_told_what_is_wrong() {
    run("bad.md");
}

#[test]
fn overrides_lie_over_one_another() {
    run("layers.md");
}

#[test]
fn devices_are_what_the_executor_offers() {
    run("devices.md");
}

fn run(file: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/spec").join(file);
    let text = std::fs::read_to_string(&path).expect("the cases");
    let mut blessed = String::new();
    let mut wrong = String::new();
    let mut cases = text.split("\n## ");
    blessed.push_str(cases.next().unwrap_or_default().trim_end());
    blessed.push('\n');
    for case in cases {
        let name = case.lines().next().unwrap_or_default();
        let yaml = block(case, "yaml").unwrap_or_default();
        let flags = block(case, "options").unwrap_or_default();
        let told = check(yaml, &parse(flags));
        if block(case, "text") != Some(&told) {
            let _ = writeln!(wrong, "## {name}\n{told}");
        }
        let flags =
            if flags.is_empty() { String::new() } else { format!("```options\n{flags}```\n\n") };
        let _ = write!(blessed, "\n## {name}\n\n```yaml\n{yaml}```\n\n{flags}```text\n{told}```\n");
    }
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, blessed).expect("writable");
    } else {
        assert!(wrong.is_empty(), "these differ from {file}; BLESS=1 writes them:\n\n{wrong}");
    }
}

/// The text inside a fenced block, each line ended.
fn block<'a>(case: &'a str, kind: &str) -> Option<&'a str> {
    let from = case.find(&format!("```{kind}\n"))? + kind.len() + 4;
    let len = case[from..].find("```")?;
    Some(&case[from..from + len])
}

fn parse(flags: &str) -> Options {
    let mut options = options();
    for line in flags.lines() {
        match line.split_once(' ') {
            Some(("--set", text)) => options.sets.push(text.into()),
            Some(("--profile", name)) => options.profiles.push(name.into()),
            Some(("--gpus", sizes)) => options.gpus = gpus(sizes),
            _ => panic!("unknown option {line}"),
        }
    }
    options
}

/// GPUs of so many GiB.
fn gpus(sizes: &str) -> Gpus {
    let gpu = |(index, gib): (u32, &str)| Gpu {
        uuid: format!("GPU-{index}"),
        index,
        name: "Fake".into(),
        capability: (9, 0),
        memory: gib.parse::<u64>().expect("a number") << 30,
        free: Arc::new(|| None),
    };
    let list = (0..).zip(sizes.split(',')).map(gpu).collect();
    Gpus { list, ..Gpus::default() }
}
