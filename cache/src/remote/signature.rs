//! Keys and signatures (ed25519) of entries: who vouches for a result. Knows no remote.
//!
//! A public key is one line, `pipe-ed25519 <base64> [comment]`; a private one the same in a file of
//! its user's alone, `pipe-ed25519-private <base64> [comment]`.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

use crate::error::At;
use crate::remote::Trouble;

const PUBLIC: &str = "pipe-ed25519";
const PRIVATE: &str = "pipe-ed25519-private";
/// Signed before the text, so that a signature made for something else is none of an entry.
const DOMAIN: &[u8] = b"pipe remote: entry, version 1\n";

/// A key whose signatures may be believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    bytes: [u8; 32],
    /// Whose it is, for people.
    pub comment: String,
}

/// A key to sign with. Its `Debug` shows the public part.
#[derive(Clone)]
pub struct SigningKey {
    pair: Arc<Ed25519KeyPair>,
    public: PublicKey,
}

/// One signature over an entry's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Signature {
    pub key: [u8; 32],
    pub bytes: [u8; 64],
}

impl PublicKey {
    pub(super) fn made(&self, signature: &Signature, text: &str) -> bool {
        let key = UnparsedPublicKey::new(&ED25519, self.bytes);
        signature.key == self.bytes && key.verify(&message(text), &signature.bytes).is_ok()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PUBLIC} {}", BASE64_STANDARD.encode(self.bytes))?;
        if self.comment.is_empty() { Ok(()) } else { write!(f, " {}", self.comment) }
    }
}

impl FromStr for PublicKey {
    type Err = Trouble;

    fn from_str(text: &str) -> Result<PublicKey, Trouble> {
        let (bytes, comment) = fields(text, PUBLIC).ok_or_else(|| {
            // Not echoed: somebody may have given the private key.
            Trouble::Settings(format!(
                "this is no public key: expected one line `{PUBLIC} <base64> [comment]`"
            ))
        })?;
        Ok(PublicKey { bytes, comment })
    }
}

impl SigningKey {
    /// Makes a key: the private part in a new file at `path` (mode 0600), the public part in a new
    /// file `<path>.pub`.
    ///
    /// # Errors
    /// When one of the files exists or cannot be written.
    pub fn generate(path: &Path, comment: &str) -> Result<SigningKey, Trouble> {
        let mut seed = [0; 32];
        SystemRandom::new().fill(&mut seed).map_err(|_| {
            Trouble::Settings("the system gives no random numbers for a key".to_string())
        })?;
        let comment: String = comment.chars().filter(|c| !c.is_control()).collect();
        let key = SigningKey::of(&seed, comment.trim())?;
        let line = format!("{PRIVATE} {} {}", BASE64_STANDARD.encode(seed), key.public.comment);
        write_new(path, 0o600, line.trim_end())?;
        write_new(&public_path(path), 0o644, &key.public.to_string())?;
        Ok(key)
    }

    /// Reads a private key.
    ///
    /// # Errors
    /// When it cannot be read, is no key, or others than its user may read it.
    pub fn read(path: &Path) -> Result<SigningKey, Trouble> {
        let mut file = OpenOptions::new().read(true).open(path).at("open", path)?;
        let mode = file.metadata().at("inspect", path)?.mode();
        let path = path.display();
        if mode & 0o077 != 0 {
            return Err(Trouble::Settings(format!(
                "the private key `{path}` can be read by others (mode {:o})\n\
                 hint: chmod 600 {path}",
                mode & 0o7777
            )));
        }
        let mut text = String::new();
        let read = Read::by_ref(&mut file).take(4096).read_to_string(&mut text);
        let fields = read.ok().and_then(|_| fields(&text, PRIVATE));
        let (seed, comment) = fields.ok_or_else(|| {
            Trouble::Settings(format!("`{path}` holds no private key (`{PRIVATE} <base64>`)"))
        })?;
        SigningKey::of(&seed, &comment)
    }

    /// The part that others need to believe this key's signatures.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    fn of(seed: &[u8; 32], comment: &str) -> Result<SigningKey, Trouble> {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed)
            .map_err(|_| Trouble::Settings("this is no ed25519 key".to_string()))?;
        let bytes = pair.public_key().as_ref().try_into().expect("such keys have 32 bytes");
        let public = PublicKey { bytes, comment: comment.to_string() };
        Ok(SigningKey { pair: Arc::new(pair), public })
    }

    pub(super) fn sign(&self, text: &str) -> Signature {
        let signature = self.pair.sign(&message(text));
        let bytes = signature.as_ref().try_into().expect("such signatures have 64 bytes");
        Signature { key: self.public.bytes, bytes }
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.public)
    }
}

impl Signature {
    /// One line, without its end.
    pub fn render(&self) -> String {
        let [key, bytes] = [&self.key[..], &self.bytes[..]].map(|b| BASE64_STANDARD.encode(b));
        format!("{PUBLIC} {key} {bytes}")
    }

    pub fn parse(line: &str) -> Option<Signature> {
        let mut words = line.strip_prefix(PUBLIC)?.strip_prefix(' ')?.split(' ');
        let mut word = || BASE64_STANDARD.decode(words.next()?).ok();
        let (key, bytes) = (word()?.try_into().ok()?, word()?.try_into().ok()?);
        words.next().is_none().then_some(Signature { key, bytes })
    }
}

fn message(text: &str) -> Vec<u8> {
    [DOMAIN, text.as_bytes()].concat()
}

/// The 32 bytes and the comment of a line that starts with `kind`.
fn fields(text: &str, kind: &str) -> Option<([u8; 32], String)> {
    let text = text.trim_end();
    let rest = text.strip_prefix(kind)?.strip_prefix(' ')?;
    let (word, comment) = rest.split_once(' ').unwrap_or((rest, ""));
    if text.contains(char::is_control) {
        return None;
    }
    let bytes = BASE64_STANDARD.decode(word).ok()?.try_into().ok()?;
    Some((bytes, comment.trim().to_string()))
}

fn public_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".pub");
    path.with_file_name(name)
}

fn write_new(path: &Path, mode: u32, line: &str) -> Result<(), Trouble> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(mode).open(path).at("create", path)?;
    let written = file.write_all(format!("{line}\n").as_bytes()).and_then(|()| file.sync_all());
    Ok(written.inspect_err(|_| drop(fs::remove_file(path))).at("write", path)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn made_read_and_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let key = SigningKey::generate(&path, "ann\n@lab").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let again = SigningKey::read(&path).unwrap();
        assert_eq!(again.public(), key.public());
        let line = fs::read_to_string(dir.path().join("key.pub")).unwrap();
        let public: PublicKey = line.parse().unwrap();
        assert_eq!(&public, key.public());
        assert_eq!(public.comment, "ann@lab");
        let signature = Signature::parse(&again.sign("text").render()).unwrap();
        assert!(public.made(&signature, "text"));
        assert!(!public.made(&signature, "texT"));
        let other = SigningKey::generate(&dir.path().join("other"), "").unwrap();
        assert!(!other.public().made(&signature, "text"));
        let forged = Signature { key: other.public.bytes, ..signature };
        assert!(!other.public().made(&forged, "text"));
        assert!(SigningKey::generate(&path, "").is_err(), "a key is never overwritten");
    }

    #[test]
    fn a_private_key_is_nobody_elses_and_never_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let key = SigningKey::generate(&path, "").unwrap();
        let line = fs::read_to_string(&path).unwrap();
        let secret = line.split_whitespace().nth(1).unwrap();
        assert!(!format!("{key:?}").contains(secret));
        let error = line.parse::<PublicKey>().unwrap_err();
        assert!(!format!("{error} {error:?}").contains(secret));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = SigningKey::read(&path).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }
}
