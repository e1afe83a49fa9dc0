//! A Hugging Face model directory: one file of weights, or shards and their index. Knows which
//! files hold weights; knows no configuration and no tokenizer.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Error, MapAccess, Visitor};

use super::bytes::Bytes;
use super::{Checkpoint, SafetensorsFile, TensorInfo, TorchFile};

/// What is looked for, in this order.
const CHOICES: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

/// A larger index is none: a line of it is some hundred bytes, one per tensor.
const MAX_INDEX: usize = 64 << 20;

/// The weights of an open directory.
pub struct Directory {
    files: Vec<PathBuf>,
    /// One for each of `files` that holds tensors.
    shards: Vec<Box<dyn Checkpoint>>,
    /// The shard of every tensor.
    tensors: BTreeMap<String, usize>,
}

impl Directory {
    /// Opens the weights in `dir`: `model.safetensors`, or the shards of
    /// `model.safetensors.index.json`, or `pytorch_model.bin`, or the shards of its index, whichever
    /// is there first. Files may be links. Every tensor of the index must be in its shard, and
    /// every tensor of a shard in the index: files that disagree are of different models.
    pub fn open(dir: &Path) -> Result<Directory> {
        // A link to nowhere counts, so that it is complained about.
        let is_there = |choice: &&&str| dir.join(choice).symlink_metadata().is_ok();
        let Some(choice) = CHOICES.iter().find(is_there) else {
            bail!("{} has none of {}; {}", dir.display(), CHOICES.join(", "), listing(dir));
        };
        let path = dir.join(choice);
        if !choice.ends_with(".json") {
            let shard = open_file(&path)?;
            let tensors = shard.names().into_iter().map(|name| (name.to_string(), 0)).collect();
            return Ok(Directory { files: vec![path], shards: vec![shard], tensors });
        }
        let index = read_index(&path)?;
        let mut found =
            Directory { files: vec![path], shards: Vec::new(), tensors: BTreeMap::new() };
        let names: BTreeSet<&String> = index.values().collect();
        for name in names {
            found.shard(dir, name, &index).with_context(|| format!("{choice}, shard {name}"))?;
        }
        Ok(found)
    }

    /// Every file that is read, the index first.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Opens one shard and takes the tensors that `index` says it has.
    fn shard(&mut self, dir: &Path, file: &str, index: &BTreeMap<String, String>) -> Result<()> {
        let path = dir.join(file);
        let shard = open_file(&path)?;
        for name in shard.names() {
            match index.get(name) {
                Some(wanted) if wanted == file => {}
                Some(wanted) => bail!("it has tensor `{name}`, which the index puts into {wanted}"),
                None => bail!("it has tensor `{name}`, which the index does not name"),
            }
        }
        for (name, _) in index.iter().filter(|(_, wanted)| *wanted == file) {
            if shard.info(name).is_none() {
                bail!("it lacks tensor `{name}`, which the index puts there");
            }
            self.tensors.insert(name.clone(), self.shards.len());
        }
        self.files.push(path);
        self.shards.push(shard);
        Ok(())
    }

    fn of(&self, name: &str) -> Option<&dyn Checkpoint> {
        Some(&*self.shards[*self.tensors.get(name)?])
    }
}

impl Checkpoint for Directory {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.of(name)?.info(name)
    }

    fn read_f32(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let Some(shard) = self.of(name) else { bail!("tensor `{name}` is missing") };
        shard.read_f32(name, out)
    }

    fn plain(&self, name: &str) -> Option<(Dtype, &[u8])> {
        self.of(name)?.plain(name)
    }
}

/// Opens a file of weights by its ending.
fn open_file(path: &Path) -> Result<Box<dyn Checkpoint>> {
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("safetensors") => Ok(Box::new(SafetensorsFile::open(path)?)),
        Some("bin") => Ok(Box::new(TorchFile::open(path)?)),
        _ => bail!("{} ends neither in .safetensors nor in .bin", path.display()),
    }
}

/// What is in a directory, for a message.
fn listing(dir: &Path) -> String {
    let Ok(items) = std::fs::read_dir(dir) else { return "it is no directory".into() };
    let mut names: Vec<String> =
        items.flatten().map(|item| item.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    match names.len() {
        0 => "it is empty".into(),
        1..=20 => format!("there is {}", names.join(", ")),
        more => format!("there is {} and {} more", names[..20].join(", "), more - 20),
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: WeightMap,
}

/// Tensor to file; serde's own maps would let the last of two equal names win.
struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = WeightMap;

            fn expecting(&self, to: &mut fmt::Formatter) -> fmt::Result {
                to.write_str("a map of tensors to files")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<WeightMap, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((name, file)) = access.next_entry::<String, String>()? {
                    if entries.contains_key(&name) {
                        return Err(A::Error::custom(format!("tensor `{name}` is given twice")));
                    }
                    entries.insert(name, file);
                }
                Ok(WeightMap(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    parse_index(&Bytes::map(path)?).with_context(|| path.display().to_string())
}

/// The file of every tensor, from the text of an index. Files are named without folders.
pub fn parse_index(text: &[u8]) -> Result<BTreeMap<String, String>> {
    if text.len() > MAX_INDEX {
        bail!("an index of {} bytes is not read (at most {MAX_INDEX})", text.len());
    }
    let WeightMap(map) = serde_json::from_slice::<Index>(text)?.weight_map;
    if map.is_empty() {
        bail!("the index names no tensor");
    }
    for (name, file) in &map {
        let mut parts = Path::new(file).components();
        let plain = matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(only)), None) if only.to_str() == Some(file)
        );
        if !plain || file.contains(['\\', '\0']) {
            bail!("tensor `{name}` is in {file:?}, which is no plain file name");
        }
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_names_plain_files_and_each_tensor_once() {
        let found = parse_index(br#"{"metadata": {"x": 1}, "weight_map": {"a": "1.bin"}}"#);
        assert_eq!(found.unwrap()["a"], "1.bin");
        for wrong in ["../1.bin", "/1.bin", "a/1.bin", "..", ".", "", "a/", "a\\\\b", "./a"] {
            let text = format!(r#"{{"weight_map": {{"a": "{wrong}"}}}}"#);
            let error = parse_index(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("no plain file name"), "{wrong}: {error}");
        }
        let error = |text: &str| parse_index(text.as_bytes()).unwrap_err().to_string();
        let twice = error(r#"{"weight_map": {"a": "1", "a": "1"}}"#);
        assert!(twice.contains("tensor `a` is given twice"), "{twice}");
        let maps = error(r#"{"weight_map": {"a": "1"}, "weight_map": {"a": "1"}}"#);
        assert!(maps.contains("duplicate field"), "{maps}");
        assert!(error(r#"{"weight_map": {}}"#).contains("no tensor"));
        assert!(error("{}").contains("missing field `weight_map`"));
        assert!(error(&"[".repeat(100_000)).contains("invalid type"));
    }

    #[test]
    fn an_empty_directory_says_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let error = || Directory::open(dir.path()).err().unwrap().to_string();
        assert!(error().contains("none of model.safetensors, model.safetensors.index.json"));
        assert!(error().ends_with("it is empty"));
        std::fs::write(dir.path().join("model.gguf"), b"").unwrap();
        assert!(error().ends_with("there is model.gguf"));
    }
}
