//! `versions.lock`: which sources made each stage's VERSION. Fails when a stage's sources changed and
//! its VERSION did not, since old results would then be taken for new ones.
//!
//! Comments, blank lines and unit tests do not count.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// What a stage's bytes depend on.
struct Sources {
    stage: &'static str,
    /// Files and folders, relative to `stages/src`.
    paths: &'static [&'static str],
    /// Crates whose locked version matters.
    crates: &'static [&'static str],
}

const SOURCES: &[Sources] = &[
    Sources {
        stage: "text",
        paths: &["text.rs", "data/document.rs", "data/random.rs", "data/read.rs", "data/sample.rs"],
        crates: &["flate2", "parquet", "serde_json", "zstd"],
    },
    Sources {
        stage: "train_tokenizer",
        paths: &["train_tokenizer.rs", "data/corpus.rs", "data/document.rs", "data/random.rs"],
        crates: &["tokenizers"],
    },
    Sources {
        stage: "tokenize",
        paths: &[
            "tokenize.rs",
            "tokenizer/bpe.rs",
            "tokenizer/cached.rs",
            "train_tokenizer.rs",
            "data/corpus.rs",
            "data/document.rs",
            "data/random.rs",
            "data/separator.rs",
            "data/shard.rs",
        ],
        crates: &["tokenizers"],
    },
    Sources {
        stage: "pretrain",
        paths: &["pretrain.rs", "data/shard.rs", "gpu", "../kernels", "models", "ops", "train"],
        crates: TENSORS,
    },
    Sources {
        stage: "teacher",
        paths: &[
            "teacher.rs",
            "foreign",
            "formats",
            "tokenizer",
            "tokenize.rs",
            "data/corpus.rs",
            "data/document.rs",
            "data/random.rs",
            "data/separator.rs",
            "data/shard.rs",
            "models",
            "ops",
            "train/philox.rs",
        ],
        crates: &["gemm", "half", "pulp", "safetensors", "tokenizers"],
    },
    Sources {
        stage: "sample_teacher",
        paths: &[
            "sample_teacher.rs",
            "tokenize.rs",
            "tokenizer/bpe.rs",
            "tokenizer/cached.rs",
            "data/corpus.rs",
            "data/document.rs",
            "data/random.rs",
            "data/separator.rs",
            "data/shard.rs",
            "gpu",
            "../kernels",
            "models",
            "ops",
            "train/device.rs",
            "train/philox.rs",
        ],
        crates: &["gemm", "half", "pulp", "safetensors", "tokenizers"],
    },
    Sources {
        stage: "cache_teacher",
        paths: &[
            "cache_teacher.rs",
            "data/shard.rs",
            "gpu",
            "../kernels",
            "models",
            "ops",
            "train",
        ],
        crates: TENSORS,
    },
    Sources {
        stage: "orient",
        paths: &["orient.rs", "data/shard.rs", "gpu", "../kernels", "models", "ops", "train"],
        crates: TENSORS,
    },
    Sources {
        stage: "align",
        paths: &["align.rs", "data/shard.rs", "gpu", "../kernels", "models", "ops", "train"],
        crates: TENSORS,
    },
    Sources {
        stage: "assemble",
        paths: &["assemble.rs", "data/shard.rs", "models", "ops", "train"],
        crates: TENSORS,
    },
    Sources {
        stage: "distill",
        paths: &[
            "distill.rs",
            "distill",
            "data/shard.rs",
            "gpu",
            "../kernels",
            "models",
            "ops",
            "train",
        ],
        crates: TENSORS,
    },
    Sources {
        stage: "evaluate",
        paths: &[
            "evaluate.rs",
            "eval",
            "data/corpus.rs",
            "data/document.rs",
            "data/random.rs",
            "data/separator.rs",
            "data/shard.rs",
            "gpu",
            "../kernels",
            "models",
            "ops",
            "tokenize.rs",
            "tokenizer/bpe.rs",
            "tokenizer/cached.rs",
            "train/checkpoint.rs",
            "train/device.rs",
            "train/philox.rs",
        ],
        crates: &["gemm", "half", "pulp", "safetensors", "tokenizers"],
    },
    Sources {
        stage: "command",
        paths: &[
            "../../engine/src/command.rs",
            "../../engine/src/places.rs",
            "../../engine/src/plain.rs",
            "../../engine/src/spawn.rs",
        ],
        crates: &[],
    },
];

/// What every stage that computes depends on.
const TENSORS: &[&str] = &["gemm", "half", "pulp", "safetensors"];

const HEADER: &str = "# Per stage: VERSION and the digest of its sources and locked crates.\n\
                      # Written by `PIPE_BLESS=1 cargo test -p stages --test versions`.\n";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Every source file under `path`, sorted.
fn files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_path_buf()];
    }
    let list = std::fs::read_dir(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut found: Vec<PathBuf> = list.flat_map(|item| files(&item.unwrap().path())).collect();
    found.sort();
    found
}

/// Code that decides bytes: no comment lines, no blank lines, nothing after `#[cfg(test)]`.
fn code(text: &str) -> String {
    text.lines()
        .take_while(|line| line.trim() != "#[cfg(test)]")
        .filter(|line| !line.trim().is_empty() && !line.trim_start().starts_with("//"))
        .flat_map(|line| [line, "\n"])
        .collect()
}

fn locked_version(lock: &str, name: &str) -> String {
    let package = format!("name = \"{name}\"\nversion = \"");
    let versions: Vec<&str> =
        lock.split(&package).skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
    assert!(!versions.is_empty(), "Cargo.lock has no crate `{name}`");
    versions.join(", ")
}

fn digest(sources: &Sources) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut part = |name: &str, text: &str| {
        for piece in [name, text] {
            hasher.update(&(piece.len() as u64).to_le_bytes());
            hasher.update(piece.as_bytes());
        }
    };
    let base = root().join("stages/src");
    for path in sources.paths {
        for file in files(&base.join(path)) {
            let name = file.strip_prefix(root()).unwrap().to_str().unwrap().to_string();
            part(&name, &code(&std::fs::read_to_string(&file).unwrap()));
        }
    }
    let lock = std::fs::read_to_string(root().join("Cargo.lock")).unwrap();
    for name in sources.crates {
        part(name, &locked_version(&lock, name));
    }
    hasher.finalize().to_hex()[..32].to_string()
}

fn current() -> BTreeMap<String, (u32, String)> {
    let entry = |stage: &engine::stage::Entry| {
        let row = SOURCES.iter().find(|row| row.stage == stage.name);
        let row = row.unwrap_or_else(|| {
            panic!(
                "stage `{}` has no row in SOURCES of stages/tests/stages/versions.rs",
                stage.name
            )
        });
        (stage.name.to_string(), (stage.version, digest(row)))
    };
    stages::ALL.iter().map(entry).collect()
}

fn parse(text: &str) -> BTreeMap<String, (u32, String)> {
    let line = |line: &str| {
        let [stage, version, digest] = line.split(' ').collect::<Vec<_>>()[..] else {
            panic!("versions.lock: `{line}`")
        };
        (stage.to_string(), (version.parse().unwrap(), digest.to_string()))
    };
    text.lines().filter(|line| !line.starts_with('#')).map(line).collect()
}

#[test]
fn sources_change_only_with_their_version() {
    let path = root().join("versions.lock");
    let current = current();
    if std::env::var_os("PIPE_BLESS").is_some() {
        let mut text = HEADER.to_string();
        for (stage, (version, digest)) in &current {
            writeln!(text, "{stage} {version} {digest}").unwrap();
        }
        return std::fs::write(&path, text).unwrap();
    }
    let locked = parse(&std::fs::read_to_string(&path).unwrap_or_default());
    let mut wrong = Vec::new();
    for (stage, (version, digest)) in &current {
        match locked.get(stage) {
            Some((v, d)) if (v, d) == (version, digest) => {}
            Some((v, d)) if v == version && d != digest => wrong.push(format!(
                "sources of `{stage}` changed, its VERSION is still {v}: raise it if the same inputs \
                 may give other bytes"
            )),
            _ => wrong.push(format!("`{stage}` version {version} is not in versions.lock")),
        }
    }
    let gone = locked.keys().filter(|stage| !current.contains_key(*stage));
    wrong.extend(gone.map(|stage| format!("`{stage}` is in versions.lock, but no stage any more")));
    let bless = "then run `PIPE_BLESS=1 cargo test -p stages --test versions`";
    assert!(wrong.is_empty(), "{}\n{bless}", wrong.join("\n"));
}

/// A file that a stage's sources use must be among its sources; `gpu`, which serves all stages that
/// compute, is counted whole and may use what belongs to one of them.
#[test]
fn sources_are_complete() {
    let base = root().join("stages/src");
    for row in SOURCES {
        let listed: Vec<PathBuf> =
            row.paths.iter().flat_map(|path| files(&base.join(path))).collect();
        let own = |file: &&PathBuf| {
            let path = file.to_str().unwrap();
            !path.contains("..") && !path.contains("/src/gpu/")
        };
        for file in listed.iter().filter(own) {
            let text = code(&std::fs::read_to_string(file).unwrap());
            for used in modules_used(&text, &base, file) {
                assert!(
                    listed.contains(&used) || used.ends_with("mod.rs"),
                    "{} uses {}, which is not among the sources of `{}` in SOURCES",
                    file.display(),
                    used.display(),
                    row.stage
                );
            }
        }
    }
}

/// Files behind `crate::a::b`, `super::a` and `crate::a::{b, c}`.
fn modules_used(text: &str, base: &Path, file: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for (prefix, folder) in [("crate::", base), ("super::", file.parent().unwrap())] {
        for rest in text.split(prefix).skip(1) {
            let word = |c: &char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_:".contains(*c);
            let path: String = rest.chars().take_while(word).collect();
            let group = rest[path.len()..].strip_prefix('{').and_then(|r| r.split('}').next());
            let path = path.trim_end_matches(':').replace("::", "/");
            let parts: Vec<&str> = path.split('/').collect();
            let grouped = group.unwrap_or_default().split(',').map(|part| {
                let name = part.trim().split("::").next().unwrap();
                format!("{path}/{name}")
            });
            let prefixes = (1..=parts.len()).map(|n| parts[..n].join("/"));
            let files = prefixes.chain(grouped).map(|name| folder.join(format!("{name}.rs")));
            found.extend(files.filter(|file| file.is_file()));
        }
    }
    found
}
