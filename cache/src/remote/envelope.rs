//! An entry as a remote holds it: one object with the sealed text and the signatures over it.
//!
//! ```text
//! pipe-remote-entry 1 <blake3 of what follows>
//! pipe-ed25519 <public key> <signature>          none, or one a line
//! recipe <digest>                                artifacts that have a recipe, to ask for it first
//!
//! pipe-entry 1 …                                 the entry's file, byte by byte
//! ```

use crate::digest::{Digest, Key};
use crate::entry::Entry;
use crate::remote::Trust;
use crate::remote::signature::{Signature, SigningKey};
use crate::sealed;

const KIND: &str = "pipe-remote-entry";
const VERSION: u32 = 1;
/// An entry object may not be larger, in bytes.
pub(super) const LARGEST: u64 = 64 << 20;

/// The parts of the object.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Envelope {
    pub signatures: Vec<Signature>,
    /// Digests of artifacts with a recipe. Not signed: a wrong one costs a request.
    pub recipes: Vec<Digest>,
    pub text: String,
    pub entry: Entry,
}

impl Envelope {
    pub fn new(entry: &Entry, recipes: Vec<Digest>) -> crate::Result<Envelope> {
        let text = entry.render()?;
        Ok(Envelope { signatures: Vec::new(), recipes, text, entry: entry.clone() })
    }

    /// Adds the signature of `key`; a second one by it says nothing new.
    pub fn sign(&mut self, key: &SigningKey) {
        if !self.signatures.iter().any(|s| key.public().made(s, &self.text)) {
            self.signatures.push(key.sign(&self.text));
        }
    }

    pub fn render(&self) -> String {
        let mut body = String::with_capacity(self.text.len() + 256);
        for signature in &self.signatures {
            body += &(signature.render() + "\n");
        }
        for digest in &self.recipes {
            body += &format!("recipe {digest}\n");
        }
        body += "\n";
        body += &self.text;
        sealed::seal(KIND, VERSION, &body)
    }

    /// Reads an object; the error says in words what is wrong with it.
    pub fn parse(bytes: &[u8], key: &Key) -> Result<Envelope, String> {
        let text = str::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_string())?;
        let body = sealed::open(KIND, VERSION, text)?;
        let (head, text) = match body.strip_prefix('\n') {
            Some(text) => ("", text),
            None => body.split_once("\n\n").ok_or("its head has no end")?,
        };
        let (mut signatures, mut recipes) = (Vec::new(), Vec::new());
        for line in head.lines() {
            match line.strip_prefix("recipe ").map(str::parse) {
                Some(digest) => recipes.push(digest.map_err(|e: crate::Error| e.to_string())?),
                None => signatures.push(Signature::parse(line).ok_or("a line is no signature")?),
            }
        }
        let entry = Entry::parse(text, key)?;
        Ok(Envelope { signatures, recipes, text: text.to_string(), entry })
    }

    /// Whether the entry may be used under `trust`; else why not.
    pub fn acceptable(&self, trust: &Trust) -> Result<(), String> {
        let Trust::Keys(keys) = trust else { return Ok(()) };
        let good = |s: &Signature| keys.iter().any(|key| key.made(s, &self.text));
        if self.signatures.iter().any(good) {
            return Ok(());
        }
        Err(match (self.signatures.len(), keys.len()) {
            (_, 0) => "the remote is not trusted and no key is listed for it".to_string(),
            (0, _) => "it is not signed, and the remote is not trusted".to_string(),
            (n, _) => format!("none of its {n} signature(s) is good and of a listed key"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Output;
    use crate::tree::Kind;

    fn entry() -> Entry {
        let output = Output {
            port: "model".into(),
            index: None,
            name: "w".into(),
            kind: Kind::File,
            digest: Digest::of(b"w"),
            bytes: 1,
        };
        Entry::new("{}".into(), vec![output], None, serde_json::json!({"text": "a\n\nb"}))
    }

    #[test]
    fn there_and_back_and_every_flipped_bit_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let keys = ["a", "b"].map(|n| SigningKey::generate(&dir.path().join(n), n).unwrap());
        let mut envelope = Envelope::new(&entry(), vec![Digest::of(b"w")]).unwrap();
        let key = envelope.entry.key;
        for _ in 0..2 {
            keys.iter().for_each(|k| envelope.sign(k));
        }
        let bytes = envelope.render().into_bytes();
        assert_eq!(Envelope::parse(&bytes, &key).unwrap(), envelope);
        assert_eq!(envelope.signatures.len(), 2);
        for i in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[i] ^= 1;
            assert!(Envelope::parse(&flipped, &key).is_err(), "flip at {i}");
            assert!(Envelope::parse(&bytes[..i], &key).is_err(), "cut at {i}");
        }
        assert!(Envelope::parse(&bytes, &Key::of(b"other")).is_err());
    }

    #[test]
    fn who_is_believed() {
        let dir = tempfile::tempdir().unwrap();
        let [ann, bob] = ["a", "b"].map(|n| SigningKey::generate(&dir.path().join(n), n).unwrap());
        let listed = Trust::Keys(vec![ann.public().clone()]);
        let mut envelope = Envelope::new(&entry(), vec![]).unwrap();
        envelope.acceptable(&Trust::Writers).unwrap();
        assert!(envelope.acceptable(&listed).unwrap_err().contains("not signed"));
        envelope.sign(&bob);
        assert!(envelope.acceptable(&listed).unwrap_err().contains("none of its 1"));
        envelope.sign(&ann);
        envelope.acceptable(&listed).unwrap();
        assert!(
            envelope.acceptable(&Trust::Keys(vec![])).unwrap_err().contains("no key is listed")
        );
        // A signature over one text, put under another, well sealed one.
        let mut other = entry();
        other.outputs[0].digest = Digest::of(b"evil");
        let mut forged = Envelope::new(&other, vec![]).unwrap();
        forged.signatures = envelope.signatures.clone();
        let forged = Envelope::parse(forged.render().as_bytes(), &entry().key).unwrap();
        assert!(forged.acceptable(&listed).is_err());
    }
}
