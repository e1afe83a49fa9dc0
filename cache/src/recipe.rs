//! A recipe: of which pieces an artifact's bytes consist, as one sealed text. Knows no store.
//!
//! Locally a file with tensors is kept so (`parts.rs`). A remote, which holds plain pieces only,
//! has one of every such file and of every directory.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::cache::locked;
use crate::digest::Digest;
use crate::entry::check_name;
use crate::error::Result;
use crate::sealed;
use crate::tree::{self, Kind};

/// With what the text begins: no file of tensors does, it would name a header far too long.
pub(crate) const KIND: &str = "pipe-recipe";
const VERSION: u32 = 1;

/// Bytes that are an object of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    pub digest: Digest,
    pub bytes: u64,
}

/// One file: its parts one after the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Item {
    /// Below the directory, with `/` between names; empty when the artifact is this file.
    pub path: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub executable: bool,
    pub parts: Vec<Part>,
}

/// Of what the artifact `digest` is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    pub digest: Digest,
    pub kind: Kind,
    /// Of a directory: the sum over its files.
    pub bytes: u64,
    /// Sorted by path.
    pub items: Vec<Item>,
    /// Directories with nothing in them, sorted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub empty_dirs: Vec<String>,
}

impl Recipe {
    /// The recipe of a file that is these parts.
    pub fn of_file(digest: Digest, parts: Vec<Part>) -> Recipe {
        let bytes = parts.iter().map(|part| part.bytes).sum();
        let items = vec![Item { path: String::new(), executable: false, parts }];
        Recipe { digest, kind: Kind::File, bytes, items, empty_dirs: Vec::new() }
    }

    /// The recipe of the directory at `dir`, each file one part, by reading all of it.
    ///
    /// # Errors
    /// As [`crate::hash_path`], and for names that are not UTF-8.
    pub fn of_dir(dir: &Path) -> Result<Recipe> {
        let files = Mutex::new(Vec::new());
        let leaf = |path: &Path, meta: &std::fs::Metadata| {
            let digest = tree::hash_leaf(path, meta)?;
            let parts = vec![Part { digest, bytes: meta.len() }];
            let executable = tree::executable(meta);
            let item = Item { path: below(dir, path)?, executable, parts };
            locked(&files).push(item);
            Ok(digest)
        };
        let (digest, kind, bytes) = tree::hash_with(dir, &leaf)?;
        let mut files = files.into_inner().unwrap_or_else(PoisonError::into_inner);
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let empty = tree::empty_dirs(dir)?;
        let mut empty_dirs: Vec<String> =
            empty.iter().map(|path| below(dir, path)).collect::<Result<_>>()?;
        empty_dirs.sort();
        Ok(Recipe { digest, kind, bytes, items: files, empty_dirs })
    }

    /// Every part, in order.
    pub fn parts(&self) -> impl Iterator<Item = &Part> {
        self.items.iter().flat_map(|item| &item.parts)
    }

    /// The file's text.
    pub fn render(&self) -> String {
        let body = serde_json::to_string(self).expect("a recipe has only text keys");
        sealed::seal(KIND, VERSION, &(body + "\n"))
    }

    /// Reads a text; the error says in words what is wrong with it. No path of what is returned
    /// leaves the directory it is put in, and none is named twice.
    pub fn parse(text: &str, digest: &Digest) -> Result<Recipe, String> {
        let body = sealed::open(KIND, VERSION, text)?;
        let recipe: Recipe = serde_json::from_str(body).map_err(|e| e.to_string())?;
        if recipe.digest != *digest {
            return Err(format!("it is the recipe of another artifact, `{}`", recipe.digest));
        }
        recipe.check()?;
        Ok(recipe)
    }

    fn check(&self) -> Result<(), String> {
        let sizes = self.parts().map(|part| part.bytes);
        let sum = sizes.into_iter().try_fold(0u64, u64::checked_add);
        if sum != Some(self.bytes) {
            return Err("its sizes do not add up".into());
        }
        if self.kind == Kind::File {
            return match &self.items[..] {
                [one] if one.path.is_empty() && self.empty_dirs.is_empty() => Ok(()),
                _ => Err("it is of a file and lists a directory".into()),
            };
        }
        let paths = || self.items.iter().map(|item| &item.path[..]);
        let paths = || paths().chain(self.empty_dirs.iter().map(String::as_str));
        let mut seen = BTreeSet::new();
        for path in paths() {
            path.split('/').try_for_each(check_name).map_err(|e| format!("`{path}`: {e}"))?;
            if !seen.insert(path) {
                return Err(format!("`{path}` is listed twice"));
            }
        }
        for path in paths() {
            let mut above = path.match_indices('/').map(|(at, _)| &path[..at]);
            if let Some(other) = above.find(|dir| seen.contains(dir)) {
                return Err(format!("`{path}` lies below `{other}`, which is listed too"));
            }
        }
        Ok(())
    }
}

/// `path` below `dir`, with `/` between names.
fn below(dir: &Path, path: &Path) -> Result<String> {
    let name = path.strip_prefix(dir).ok().and_then(Path::to_str);
    name.map(String::from).ok_or_else(|| crate::Error::BadName { name: path.display().to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn part(text: &str) -> Part {
        Part { digest: Digest::of(text.as_bytes()), bytes: text.len() as u64 }
    }

    fn tree_of(paths: &[&str], empty_dirs: &[&str]) -> Recipe {
        let item = |path: &&str| Item {
            path: path.to_string(),
            executable: false,
            parts: vec![part("x")],
        };
        Recipe {
            digest: Digest::of(b"d"),
            kind: Kind::Dir,
            bytes: paths.len() as u64,
            items: paths.iter().map(item).collect(),
            empty_dirs: empty_dirs.iter().map(|d| d.to_string()).collect(),
        }
    }

    #[test]
    fn text_and_back_and_every_flipped_bit_is_seen() {
        let recipe = Recipe::of_file(Digest::of(b"ab"), vec![part("a"), part("b")]);
        let text = recipe.render();
        assert_eq!(Recipe::parse(&text, &recipe.digest).unwrap(), recipe);
        assert!(Recipe::parse(&text, &Digest::of(b"other")).is_err());
        for i in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[i] ^= 1;
            let Ok(flipped) = String::from_utf8(bytes) else { continue };
            assert!(Recipe::parse(&flipped, &recipe.digest).is_err(), "flip at {i}");
        }
    }

    #[test]
    fn no_path_leaves_its_directory_or_meets_another() {
        for path in ["", "..", "../x", "a/../b", "/etc/passwd", "a//b", "a/", "./a", "a\0b"] {
            let recipe = tree_of(&[path], &[]);
            assert!(Recipe::parse(&recipe.render(), &recipe.digest).is_err(), "{path:?}");
            let recipe = tree_of(&["ok"], &[path]);
            assert!(Recipe::parse(&recipe.render(), &recipe.digest).is_err(), "{path:?}");
        }
        for (paths, dirs) in
            [(&["a", "a"][..], &[][..]), (&["a", "a/b"], &[]), (&["a"], &["a"]), (&["d/x"], &["d"])]
        {
            let recipe = tree_of(paths, dirs);
            assert!(Recipe::parse(&recipe.render(), &recipe.digest).is_err(), "{paths:?} {dirs:?}");
        }
        let fine = tree_of(&["a", "b/c"], &["d", "e/f"]);
        assert_eq!(Recipe::parse(&fine.render(), &fine.digest).unwrap(), fine);
    }

    #[test]
    fn of_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("b/empty")).unwrap();
        fs::write(dir.path().join("b/x"), "x").unwrap();
        fs::write(dir.path().join("a"), "yy").unwrap();
        let recipe = Recipe::of_dir(dir.path()).unwrap();
        assert_eq!(recipe.digest, crate::hash_path(dir.path()).unwrap().0);
        let paths: Vec<&str> = recipe.items.iter().map(|i| i.path.as_str()).collect();
        assert_eq!(
            (paths, &recipe.empty_dirs[..], recipe.bytes),
            (vec!["a", "b/x"], &["b/empty".to_string()][..], 3)
        );
        assert_eq!(Recipe::parse(&recipe.render(), &recipe.digest).unwrap(), recipe);
    }
}
