//! The house rules that a compiler does not check.

use std::fs;
use std::path::{Path, PathBuf};

/// Every source file below `dir`.
fn sources(dir: &str, found: &mut Vec<PathBuf>) {
    for item in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(dir)).unwrap().flatten() {
        let name = item.path().strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap().to_path_buf();
        if item.path().is_dir() {
            sources(name.to_str().unwrap(), found);
        } else if name.extension().is_some_and(|e| e == "rs") {
            found.push(name);
        }
    }
}

fn all() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for dir in ["src", "cache/src", "engine/src", "stages/src"] {
        sources(dir, &mut found);
    }
    let read = |p: PathBuf| {
        let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&p)).unwrap();
        (p, text)
    };
    found.into_iter().map(read).collect()
}

#[test]
fn every_module_says_what_it_is() {
    let missing: Vec<_> =
        all().into_iter().filter(|(_, text)| !text.starts_with("//!")).map(|(p, _)| p).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn crates_depend_one_way() {
    for (path, text) in all() {
        let forbidden: &[&str] =
            match path.components().next().unwrap().as_os_str().to_str().unwrap() {
                "cache" => &["engine::", "stages::", "candle_core"],
                "engine" => &["stages::", "candle_core", "std::env::var"],
                "stages" => {
                    &["cache::Cache", "engine::executor", "engine::schedule", "engine::worker"]
                }
                _ => &[],
            };
        for name in forbidden {
            // The command stage hands the user's own environment on, by declaration.
            if path.ends_with("command.rs") && name.starts_with("std::env") {
                continue;
            }
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            let hit = code.into_iter().find(|line| {
                line.contains(name)
                    && !line.contains(&format!("_{name}"))
                    && !line.contains(&format!("::{name}"))
            });
            assert!(hit.is_none(), "{}: `{name}` in {hit:?}", path.display());
        }
    }
}

#[test]
fn functions_fit_a_screen() {
    let mut long = Vec::new();
    for (path, text) in all() {
        let lines: Vec<&str> = text.lines().collect();
        for (start, line) in lines.iter().enumerate() {
            let code = line.trim_start();
            let is_fn = [
                "fn ",
                "pub fn ",
                "pub(crate) fn ",
                "pub(super) fn ",
                "unsafe fn ",
                "pub unsafe fn ",
            ]
            .iter()
            .any(|head| code.starts_with(head));
            if !is_fn || code.ends_with(';') {
                continue;
            }
            let close = format!("{}}}", &line[..line.len() - code.len()]);
            let length = lines[start..].iter().position(|l| *l == close).unwrap_or(0);
            if length > 70 {
                long.push(format!("{}:{} ({length} lines)", path.display(), start + 1));
            }
        }
    }
    assert!(long.is_empty(), "{long:#?}");
}

#[test]
fn files_stay_readable() {
    let long: Vec<_> = all()
        .into_iter()
        .map(|(path, text)| (text.lines().count(), path))
        .filter(|(lines, _)| *lines > 600)
        .collect();
    assert!(long.is_empty(), "{long:?}");
}
