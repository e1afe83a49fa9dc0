//! Models and text in a directory and in the hub's cache. Looks a few levels deep, and at a bounded
//! number of files.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// How deep directories are looked into.
const DEPTH: usize = 3;
/// Files and directories that are looked at.
const MOST: usize = 20_000;

/// A model that could be a teacher.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// `./dir`, `./file.gguf`, `hf:owner/name@commit`.
    pub reference: String,
    /// For people.
    pub kind: &'static str,
    /// Of its weights.
    pub bytes: u64,
    /// Where that is told.
    pub layers: Option<u64>,
}

/// Files of text of one kind in one directory.
#[derive(Clone, Debug, PartialEq)]
pub struct Text {
    /// `./texts/*.jsonl`.
    pub glob: String,
    /// Of all.
    pub bytes: u64,
}

/// Models at and below `root`, the smallest first.
pub fn models(root: &Path) -> Vec<Model> {
    let mut found = Vec::new();
    walk(root, &mut |path| {
        if path.is_dir() {
            found.extend(
                directory(path).map(|model| Model { reference: relative(root, path), ..model }),
            );
        } else if ends(path, "gguf") {
            let bytes = size(path);
            let reference = relative(root, path);
            found.push(Model { reference, kind: "GGUF", bytes, layers: None });
        }
    });
    sorted(found)
}

/// Models that Hugging Face's cache holds, each at the commit of its `main`.
pub fn of_hub(cache: &Path) -> Vec<Model> {
    let mut found = Vec::new();
    for item in fs::read_dir(cache).into_iter().flatten().flatten().take(MOST) {
        let name = item.file_name().to_string_lossy().into_owned();
        let Some(repository) = name.strip_prefix("models--") else { continue };
        let Some((owner, model)) = repository.split_once("--") else { continue };
        let Ok(commit) = fs::read_to_string(item.path().join("refs/main")) else { continue };
        let commit = commit.trim();
        if commit.is_empty() || !commit.chars().all(|c| c.is_ascii_hexdigit()) {
            continue;
        }
        let snapshot = item.path().join("snapshots").join(commit);
        let reference = format!("hf:{owner}/{model}@{commit}");
        found.extend(
            directory(&snapshot).map(|model| Model { reference: reference.clone(), ..model }),
        );
        let files = fs::read_dir(&snapshot).into_iter().flatten().flatten().map(|item| item.path());
        for file in files.filter(|file| ends(file, "gguf")) {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let reference = format!("{reference}#{name}");
            found.push(Model { reference, kind: "GGUF", bytes: size(&file), layers: None });
        }
    }
    sorted(found)
}

/// Text at and below `root` by directory and kind, the most first.
pub fn texts(root: &Path) -> Vec<Text> {
    let mut kinds: BTreeMap<(PathBuf, &str), u64> = BTreeMap::new();
    walk(root, &mut |path| {
        let kind = ["txt", "jsonl", "parquet"].into_iter().find(|kind| ends(path, kind));
        let (Some(kind), Some(dir)) = (kind, path.parent()) else { return };
        *kinds.entry((dir.to_path_buf(), kind)).or_default() += size(path);
    });
    let glob = |((dir, kind), bytes): ((PathBuf, &str), u64)| {
        let dir = relative(root, &dir);
        Text { glob: format!("{}/*.{kind}", dir.trim_end_matches('/')), bytes }
    };
    let mut found: Vec<Text> = kinds.into_iter().map(glob).collect();
    found.sort_by_key(|text| std::cmp::Reverse(text.bytes));
    found
}

/// A directory as Hugging Face has them, of a family that is built.
fn directory(dir: &Path) -> Option<Model> {
    let config = fs::read(dir.join("config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_slice(&config).ok()?;
    if !matches!(config["model_type"].as_str()?, "llama" | "phi" | "qwen2") {
        return None;
    }
    let items = fs::read_dir(dir).ok()?.flatten().map(|item| item.path());
    let weights = items.filter(|path| ends(path, "safetensors") || ends(path, "bin"));
    let bytes: u64 = weights.map(|path| size(&path)).sum();
    let layers = config["num_hidden_layers"].as_u64();
    (bytes > 0).then_some(Model { reference: String::new(), kind: "Hugging Face", bytes, layers })
}

fn walk(root: &Path, visit: &mut dyn FnMut(&Path)) {
    let mut left = MOST;
    let mut open = vec![(root.to_path_buf(), 0)];
    while let Some((dir, depth)) = open.pop() {
        let mut items: Vec<PathBuf> =
            fs::read_dir(&dir).into_iter().flatten().flatten().map(|item| item.path()).collect();
        items.sort();
        for path in items {
            let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
            if hidden || left == 0 {
                continue;
            }
            left -= 1;
            visit(&path);
            // What a link leads to may be above us.
            if depth + 1 < DEPTH && path.is_dir() && !path.is_symlink() {
                open.push((path, depth + 1));
            }
        }
    }
}

fn ends(path: &Path, ending: &str) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case(ending))
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.len())
}

fn relative(root: &Path, path: &Path) -> String {
    format!("./{}", path.strip_prefix(root).unwrap_or(path).display())
}

fn sorted(mut models: Vec<Model>) -> Vec<Model> {
    models.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.reference.cmp(&b.reference)));
    models
}
