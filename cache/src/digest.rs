//! `Digest` (of content) and `Key` (of all that decides an output): blake3 of exact bytes.
//! Knows files only as bytes; directories are `tree.rs`.

use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::str::FromStr;

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

use crate::error::{At, Error, Result};
use crate::stat::Stamp;

macro_rules! hash_type {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; 32]);

        impl $name {
            /// The blake3 of `bytes`.
            pub fn of(bytes: &[u8]) -> Self {
                Self(*blake3::hash(bytes).as_bytes())
            }

            pub const fn from_bytes(bytes: [u8; 32]) -> Self {
                Self(bytes)
            }

            pub const fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// The first 12 hexadecimal digits, for people.
            pub fn short(&self) -> String {
                self.to_string()[..12].to_string()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.short())
            }
        }

        impl FromStr for $name {
            type Err = Error;

            /// Lower-case hexadecimal only, so that a value has one spelling (and one file name).
            fn from_str(text: &str) -> Result<Self> {
                let wrong = || Error::BadHex { what: $what, text: text.to_string() };
                from_hex(text).map(Self).ok_or_else(wrong)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                from.deserialize_str(Hex).map(Self)
            }
        }
    };
}

hash_type!(
    /// What bytes are: blake3 of a file's content, or of a directory's canonical listing.
    Digest,
    "digest"
);
hash_type!(
    /// What decides an output: blake3 of a canonical, stored pre-image.
    Key,
    "key"
);

struct Hex;

impl Visitor<'_> for Hex {
    type Value = [u8; 32];

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("64 hexadecimal digits")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<[u8; 32], E> {
        from_hex(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
    }
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; 32];
    if text.len() != 64 {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// So many bytes are read and hashed by one thread in one go: they stay in the cache of its core.
const PART: u64 = 256 << 10;
/// In such pieces files are read elsewhere.
pub(crate) const PIECE: usize = 8 << 20;

/// Digest and size of a regular file (a symbolic link is followed).
///
/// # Errors
/// When it cannot be read, is not a regular file, or changes meanwhile.
pub fn hash_file(path: impl AsRef<Path>) -> Result<(Digest, u64)> {
    let path = path.as_ref();
    let file = File::open(path).at("open", path)?;
    hash_open(&file, path)
}

/// As [`hash_file`], over an open file. Read and not mapped: a user's file that shrinks meanwhile
/// is an error here, where a mapping would end the process by SIGBUS.
pub(crate) fn hash_open(file: &File, path: &Path) -> Result<(Digest, u64)> {
    let before = file.metadata().at("inspect", path)?;
    if !before.is_file() {
        return Err(Error::Special { path: path.to_path_buf() });
    }
    let changed = || Error::Changed { path: path.to_path_buf() };
    let (hash, bytes) = match whole(file, before.len()) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(changed()),
        result => result.at("read", path)?,
    };
    let after = file.metadata().at("inspect", path)?;
    if bytes != after.len() || Stamp::of(&before) != Stamp::of(&after) {
        return Err(changed());
    }
    Ok((Digest(*hash.as_bytes()), bytes))
}

/// The hash of a file of `size` bytes, and how many it really had, as far as that was seen.
fn whole(mut file: &File, size: u64) -> io::Result<(blake3::Hash, u64)> {
    if size > PART {
        let (left, right) = halves(file, 0, size)?;
        return Ok((merge_subtrees_root(&left, &right, Mode::Hash), size));
    }
    let mut buffer = Vec::with_capacity(size as usize + 1);
    let n = file.read_to_end(&mut buffer)?;
    Ok((blake3::hash(&buffer), n as u64))
}

/// The two subtrees of the `size` bytes at `at`, on two threads if there is one free.
fn halves(file: &File, at: u64, size: u64) -> io::Result<(ChainingValue, ChainingValue)> {
    let middle = left_subtree_len(size);
    let (left, right) =
        rayon::join(|| subtree(file, at, middle), || subtree(file, at + middle, size - middle));
    Ok((left?, right?))
}

fn subtree(file: &File, at: u64, size: u64) -> io::Result<ChainingValue> {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    if size > PART {
        let (left, right) = halves(file, at, size)?;
        return Ok(merge_subtrees_non_root(&left, &right, Mode::Hash));
    }
    BUFFER.with_borrow_mut(|buffer| {
        buffer.resize(PART as usize, 0);
        let part = &mut buffer[..size as usize];
        file.read_exact_at(part, at)?;
        Ok(blake3::Hasher::new().set_input_offset(at).update(part).finalize_non_root())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_spelling_and_back() {
        let key = Key::of(b"x");
        let text = key.to_string();
        assert_eq!(text.parse::<Key>().unwrap(), key);
        assert_eq!(serde_json::to_string(&key).unwrap(), format!("\"{text}\""));
        assert_eq!(serde_json::from_str::<Key>(&format!("\"{text}\"")).unwrap(), key);
        assert_eq!(key.short(), text[..12]);
        for bad in [text.to_uppercase(), text[1..].to_string(), format!("g{}", &text[1..])] {
            assert!(bad.parse::<Key>().is_err(), "{bad}");
            assert!(serde_json::from_str::<Key>(&format!("\"{bad}\"")).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_file_is_the_blake3_of_its_bytes_at_every_size() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let part = PART as usize;
        let edges = [0, 1, part - 1, part, part + 1, 2 * part + 1, 3 * part, 7 * part + 1025];
        for size in edges {
            let bytes: Vec<u8> = (0..size).map(|i| (i * 31 % 251) as u8).collect();
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(hash_file(&path).unwrap(), (Digest::of(&bytes), size as u64), "{size}");
        }
    }
}
