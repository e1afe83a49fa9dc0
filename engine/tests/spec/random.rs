//! Whatever is in a file, it is a plan or a list of complaints, never a panic.

use engine::spec::load_text;
use proptest::prelude::*;

use crate::toys::{TOYS, options};

/// Pipelines to spoil: the cases beside this file.
const SEEDS: &str =
    concat!(include_str!("good.md"), include_str!("bad.md"), include_str!("layers.md"));

/// The YAML of one case.
fn seed(index: usize) -> String {
    let blocks: Vec<&str> = SEEDS.split("```yaml\n").skip(1).collect();
    let block = blocks[index % blocks.len()];
    block.split("```").next().unwrap_or_default().to_string()
}

fn survive(text: &str, sets: &[String]) {
    let options = engine::spec::Options { sets: sets.to_vec(), ..options() };
    if let Err(wrong) = load_text("p.yaml", text, &options, &TOYS) {
        assert!(!wrong.0.is_empty(), "an error that says nothing");
        assert!(wrong.render(true).len() >= wrong.render(false).len());
    }
}

/// Text made of what pipelines are made of.
fn words() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "steps:",
        "\n",
        "  ",
        "a:",
        " ",
        "stage: concat",
        "{",
        "}",
        "[",
        "]",
        ",",
        "${",
        "params.",
        "matrix:",
        "0..3",
        "\"",
        "'",
        "in:",
        "a.text",
        "[*]",
        "with:",
        "n:",
        "1",
        "&x",
        "*x",
        "<<:",
        "- ",
        "|",
        "#",
        "\t",
        "é",
        "日",
        "-",
        "include:",
        "outputs:",
        "from:",
        "to:",
        "profiles:",
        "null",
        "run:",
        "out:",
        "$${",
        "%",
        "---",
        "!!str",
        "?",
        ":",
        "\r\n",
        "\u{feff}",
        "\0",
        "1e999",
        "0x",
        "99999999999999999999",
    ]);
    prop::collection::vec(word, 0..60).prop_map(|words| words.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_text(text in words()) {
        survive(&text, &[]);
    }

    #[test]
    fn spoiled_pipelines(index in 0usize..100, cuts in prop::collection::vec((any::<prop::sample::Index>(), 0u8..3, words()), 1..4)) {
        let mut text: Vec<char> = seed(index).chars().collect();
        for (at, kind, new) in cuts {
            if text.is_empty() {
                break;
            }
            let at = at.index(text.len());
            match kind {
                0 => drop(text.remove(at)),
                1 => text.truncate(at),
                _ => drop(text.splice(at..at, new.chars().take(8))),
            }
        }
        survive(&text.into_iter().collect::<String>(), &[]);
    }

    #[test]
    fn random_sets(path in "[a-z.=]{0,12}", value in words()) {
        survive(&seed(0), &[format!("{path}={value}"), format!("steps.teacher.{path}={value}"), format!("seq={value}")]);
    }
}
