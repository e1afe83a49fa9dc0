//! `docs/reference/` is what the types say.
//!
//! `BLESS=1 cargo test -p pipe --test outside reference` writes it anew; read the difference.

use std::fs;
use std::path::Path;

use crate::support::Project;

#[test]
fn the_reference_is_what_the_types_say() {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference");
    let project = Project::new();
    let ran = project.pipe(&["man", "--markdown", "-o", "reference"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let names = |dir: &Path| {
        let items = fs::read_dir(dir).into_iter().flatten().flatten();
        let mut names: Vec<_> = items.map(|item| item.file_name()).collect();
        names.sort();
        names
    };
    let made = project.path().join("reference");
    if std::env::var_os("BLESS").is_some() {
        fs::create_dir_all(&committed).unwrap();
        for name in names(&made) {
            fs::copy(made.join(&name), committed.join(&name)).unwrap();
        }
    }
    assert_eq!(names(&made), names(&committed));
    for name in names(&made) {
        let (new, old) = (made.join(&name), committed.join(&name));
        let same = fs::read(&new).unwrap() == fs::read(&old).unwrap();
        assert!(same, "{name:?} is stale; BLESS=1 writes it");
    }
}

#[test]
fn the_reference_has_every_stage_parameter_and_command() {
    let text = Project::new().pipe(&["man", "--markdown"]).stdout;
    let stages: serde_json::Value =
        serde_json::from_str(&Project::new().pipe(&["stages", "--json"]).stdout).unwrap();
    for stage in stages.as_array().unwrap() {
        let name = stage["name"].as_str().unwrap();
        assert!(text.contains(&format!("\n## {name}\n")), "{name}");
        for parameter in stage["params"]["properties"].as_object().unwrap().keys() {
            assert!(text.contains(&format!("| `{parameter}` | ")), "{name}.{parameter}");
        }
        for port in ["inputs", "outputs"].iter().flat_map(|way| stage[way].as_array().unwrap()) {
            assert!(text.contains(&format!("| `{}` | ", port["name"].as_str().unwrap())), "{port}");
        }
    }
    for command in ["pipe run", "pipe cache gc", "pipe bench decode", "pipe export-run"] {
        assert!(text.contains(&format!("\n## {command}\n")), "{command}");
    }
    for part in ["`--set NAME=VALUE`", "`--profile NAME`", "- `retries`", "- `vram`"] {
        assert!(text.contains(part), "{part}");
    }
    assert!(!text.contains("anything |"), "a parameter whose type is not told");
}

#[test]
fn the_example_of_the_pipeline_file_is_right() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/reference/pipeline-file.md");
    let text = fs::read_to_string(page).unwrap();
    let (_, rest) = text.split_once("```yaml\n").unwrap();
    let project = Project::with(rest.split_once("```").unwrap().0);
    for args in [&["check", "p.yaml"][..], &["check", "p.yaml", "--profile", "long"]] {
        let ran = project.pipe(args);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    }
}
