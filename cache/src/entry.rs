//! An entry: what a key's result is, as one sealed text. Knows no store and no index.

use serde::{Deserialize, Serialize};

use crate::digest::{Digest, Key};
use crate::error::{Error, Result};
use crate::sealed;
use crate::tree::Kind;

const KIND: &str = "pipe-entry";
const VERSION: u32 = 1;

/// One artifact of a result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    pub port: String,
    /// The place in a list port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u32>,
    /// The file name a consumer sees: one path component, never a path.
    pub name: String,
    pub kind: Kind,
    pub digest: Digest,
    /// Of a directory: the sum over its files.
    pub bytes: u64,
}

impl Output {
    /// Whether `port` and `name` can be used as file names without leaving a directory.
    ///
    /// # Errors
    /// [`Error::BadName`].
    pub fn check(&self) -> Result<()> {
        check_name(&self.port)?;
        check_name(&self.name)
    }

    fn place(&self) -> (&str, Option<u32>) {
        (&self.port, self.index)
    }
}

/// The result of a key: created once, never changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub key: Key,
    /// The canonical text whose blake3 is the key.
    pub preimage: String,
    /// Sorted by port, then index.
    pub outputs: Vec<Output>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log: Option<(Digest, u64)>,
    /// Opaque, but for `stage`, `step` (texts) and `seconds` (a number), which the index copies.
    pub provenance: serde_json::Value,
}

impl Entry {
    /// An entry whose key is the digest of `preimage`.
    pub fn new(
        preimage: String,
        mut outputs: Vec<Output>,
        log: Option<(Digest, u64)>,
        provenance: serde_json::Value,
    ) -> Entry {
        outputs.sort_by(|a, b| a.place().cmp(&b.place()));
        Entry { key: Key::of(preimage.as_bytes()), preimage, outputs, log, provenance }
    }

    /// Whether both say the same bytes at the same ports; names and provenance may differ.
    pub fn agrees(&self, other: &Entry) -> bool {
        let same = |(a, b): (&Output, &Output)| {
            a.place() == b.place() && a.digest == b.digest && a.kind == b.kind
        };
        self.outputs.len() == other.outputs.len()
            && self.outputs.iter().zip(&other.outputs).all(same)
    }

    /// The file's text.
    pub(crate) fn render(&self) -> Result<String> {
        self.check()?;
        let body = serde_json::to_string(self).expect("an entry has only text keys");
        Ok(sealed::seal(KIND, VERSION, &(body + "\n")))
    }

    /// Reads a file's text; the error says in words what is wrong with it.
    pub(crate) fn parse(text: &str, key: &Key) -> Result<Entry, String> {
        let body = sealed::open(KIND, VERSION, text)?;
        let entry: Entry = serde_json::from_str(body).map_err(|e| e.to_string())?;
        if entry.key != *key {
            return Err(format!("it is the entry of another key, `{}`", entry.key));
        }
        entry.check().map_err(|e| e.to_string())?;
        Ok(entry)
    }

    fn check(&self) -> Result<()> {
        let found = Key::of(self.preimage.as_bytes());
        if found != self.key {
            return Err(Error::WrongKey { key: self.key, found });
        }
        self.outputs.iter().try_for_each(Output::check)
    }
}

pub(crate) fn check_name(name: &str) -> Result<()> {
    let bad = matches!(name, "" | "." | "..")
        || name.len() > 255
        || name.bytes().any(|b| b == b'/' || b == 0);
    if bad { Err(Error::BadName { name: name.to_string() }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Entry {
        let output = |port: &str, index| Output {
            port: port.into(),
            index,
            name: "weights.safetensors".into(),
            kind: Kind::File,
            digest: Digest::of(b"w"),
            bytes: 1,
        };
        let outputs = vec![output("model", Some(1)), output("model", Some(0)), output("a", None)];
        Entry::new("{}".into(), outputs, Some((Digest::of(b"l"), 1)), serde_json::json!({"s": 1}))
    }

    #[test]
    fn text_and_back_sorted() {
        let entry = entry();
        let ports: Vec<_> = entry.outputs.iter().map(|o| (o.port.as_str(), o.index)).collect();
        assert_eq!(ports, [("a", None), ("model", Some(0)), ("model", Some(1))]);
        let text = entry.render().unwrap();
        assert_eq!(Entry::parse(&text, &entry.key).unwrap(), entry);
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_seen() {
        let entry = entry();
        let text = entry.render().unwrap();
        for i in 0..text.len() {
            assert!(Entry::parse(&text[..i], &entry.key).is_err(), "cut at {i}");
            let mut bytes = text.clone().into_bytes();
            bytes[i] ^= 1;
            if let Ok(text) = String::from_utf8(bytes) {
                assert!(Entry::parse(&text, &entry.key).is_err(), "flip at {i}");
            }
        }
        assert!(Entry::parse(&text, &Key::of(b"other")).is_err());
    }

    #[test]
    fn no_name_leaves_its_directory() {
        for name in ["", ".", "..", "a/b", "/etc/passwd", "../x", "a\0b"] {
            let mut entry = entry();
            entry.outputs[0].name = name.into();
            assert!(entry.render().is_err(), "{name:?}");
            let body = serde_json::to_string(&entry).unwrap();
            let text = sealed::seal(KIND, VERSION, &body);
            let error = Entry::parse(&text, &entry.key).unwrap_err();
            assert!(error.contains("one path component"), "{error}");
        }
    }
}
