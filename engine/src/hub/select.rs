//! Pure: which files of a repository a model needs. Knows names only.

use std::collections::BTreeSet;

use serde_json::Value;

/// Files beside the weights, each wanted where it is.
const BESIDE: [&str; 10] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
];

/// What is wanted of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Files that are known by their names.
    pub files: Vec<String>,
    /// The index whose files belong to it too.
    pub index: Option<String>,
}

impl Wanted {
    /// All files, those that the index names included; `read` gives the index.
    pub fn and_shards(
        &self,
        read: &dyn Fn(&str) -> Result<Vec<u8>, String>,
    ) -> Result<Vec<String>, String> {
        let mut names = self.files.clone();
        if let Some(index) = &self.index {
            names.push(index.clone());
            names.extend(shards(&read(index)?).map_err(|what| format!("`{index}` {what}"))?);
        }
        Ok(names)
    }
}

/// The files of a model among `names`: safetensors where there are any, else PyTorch's.
///
/// # Errors
/// A name that leads elsewhere, or no weights; the text follows the name of the repository.
pub fn wanted(names: &[String]) -> Result<Wanted, String> {
    let has = |name: &str| names.iter().any(|n| n == name);
    let mut files: Vec<String> =
        BESIDE.iter().filter(|name| has(name)).map(|n| n.to_string()).collect();
    for (start, end) in [("model", ".safetensors"), ("pytorch_model", ".bin")] {
        let (whole, index) = (format!("{start}{end}"), format!("{start}{end}.index.json"));
        if has(&whole) {
            files.push(whole);
            return Ok(Wanted { files, index: None });
        }
        if has(&index) {
            return Ok(Wanted { files, index: Some(index) });
        }
        let start = if end == ".bin" { start } else { "" };
        let top = |n: &&String| n.starts_with(start) && n.ends_with(end) && !n.contains('/');
        let other = |n: &&String| !n.starts_with("consolidated") && !n.starts_with("adapter_");
        let others: Vec<String> = names.iter().filter(top).filter(other).cloned().collect();
        if !others.is_empty() {
            files.extend(others);
            return Ok(Wanted { files, index: None });
        }
    }
    let packed: Vec<&str> =
        names.iter().map(String::as_str).filter(|n| n.ends_with(".gguf")).collect();
    Err(match packed.first() {
        Some(first) => format!(
            "holds its weights as {} GGUF files only\nhint: name one of them after the revision: `#{first}`",
            packed.len()
        ),
        None => "holds no weights: no `*.safetensors` and no `pytorch_model*.bin`".into(),
    })
}

/// The files that an index of weights names.
fn shards(index: &[u8]) -> Result<Vec<String>, String> {
    let value: Value = serde_json::from_slice(index).map_err(|e| format!("is no JSON: {e}"))?;
    let map = value.get("weight_map").and_then(Value::as_object);
    let names: Option<BTreeSet<&str>> =
        map.ok_or("has no `weight_map`")?.values().map(Value::as_str).collect();
    let names = names.ok_or("has a `weight_map` with other things than names")?;
    match names.iter().find(|name| !plain_path(name) || name.contains('/')) {
        Some(name) => Err(format!("names `{}`, which is no file beside it", name.escape_debug())),
        None => Ok(names.into_iter().map(Into::into).collect()),
    }
}

/// Whether a path stays inside: relative, no empty, `.` or `..` parts, nothing that a file system
/// or a terminal reads in its own way.
pub fn plain_path(path: &str) -> bool {
    path.len() <= 512
        && !path.contains('\\')
        && !path.chars().any(char::is_control)
        && path.split('/').all(|part| !matches!(part, "" | "." | "..") && part.len() <= 255)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str]) -> Result<Vec<String>, String> {
        let names: Vec<String> = names.iter().map(|n| n.to_string()).collect();
        let index = br#"{"weight_map": {"a": "s-2.bin", "b": "s-1.bin", "c": "s-2.bin"}}"#;
        wanted(&names)?.and_shards(&|_| Ok(index.to_vec()))
    }

    #[test]
    fn safetensors_go_before_pytorch_and_one_file_before_an_index() {
        let all = ["config.json", "README.md", "onnx/model.onnx", "original/model.safetensors"];
        let and = |more: &[&'static str]| chosen(&[&all[..], more].concat()).unwrap();
        let index = "model.safetensors.index.json";
        assert_eq!(
            and(&["model.safetensors", index, "pytorch_model.bin"]),
            ["config.json", "model.safetensors"]
        );
        assert_eq!(and(&[index]), ["config.json", index, "s-1.bin", "s-2.bin"]);
        assert_eq!(
            and(&["consolidated.safetensors", "pytorch_model.bin"]),
            ["config.json", "pytorch_model.bin"]
        );
        assert_eq!(and(&["x.safetensors"]), ["config.json", "x.safetensors"]);
        assert_eq!(
            and(&["pytorch_model.bin.index.json"]),
            ["config.json", "pytorch_model.bin.index.json", "s-1.bin", "s-2.bin"]
        );
    }

    #[test]
    fn a_repository_of_gguf_files_asks_for_a_name() {
        let told = chosen(&["a.gguf", "b.gguf"]).unwrap_err();
        assert!(told.contains("2 GGUF files") && told.contains("`#a.gguf`"), "{told}");
        assert!(chosen(&["README.md"]).unwrap_err().contains("no weights"));
    }

    #[test]
    fn an_index_that_leads_elsewhere_is_refused() {
        for name in ["../x", "/etc/passwd", "a/b", "..", "", "a\\b"] {
            let index = serde_json::json!({ "weight_map": { "a": name } }).to_string();
            assert!(shards(index.as_bytes()).is_err(), "{name}");
        }
        for text in ["", "[]", "{}", r#"{"weight_map": {"a": 1}}"#] {
            assert!(shards(text.as_bytes()).is_err(), "{text}");
        }
    }
}
