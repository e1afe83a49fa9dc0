//! The user's own files, and those fetched from a hub: found, hashed in place, and watched for
//! changes until the step is done.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use cache::{Cache, Digest, Kind};

use crate::hub::Snapshot;

/// A user's file or directory as it was when it was hashed.
#[derive(Clone, Debug)]
pub struct UserFile {
    /// Absolute path.
    pub path: PathBuf,
    /// Base name.
    pub name: String,
    /// Digest of its bytes.
    pub digest: Digest,
    /// File or directory.
    pub kind: Kind,
    /// Size.
    pub bytes: u64,
    stamp: Vec<Stamp>,
}

/// What `fstat` says of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// The files that `pattern` stands for: itself, or what a glob matches, sorted.
pub fn find(pattern: &Path) -> Result<Vec<PathBuf>, String> {
    if pattern.exists() {
        return Ok(vec![pattern.to_path_buf()]);
    }
    let text = pattern.to_string_lossy();
    if !text.contains(['*', '?', '[']) {
        return Err(format!("`{text}` does not exist"));
    }
    let found = glob::glob(&text).map_err(|e| format!("`{text}` is no pattern: {e}"))?;
    let mut found: Vec<PathBuf> = found.flatten().collect();
    found.sort();
    if found.is_empty() { Err(format!("nothing matches `{text}`")) } else { Ok(found) }
}

impl UserFile {
    /// Hashes the file or directory at `path`; fails if it changes meanwhile.
    pub fn read(cache: &Cache, path: &Path) -> Result<UserFile, String> {
        let what = |e: &dyn std::fmt::Display| format!("cannot read `{}`: {e}", path.display());
        let before = stamps(path).map_err(|e| what(&e))?;
        let (digest, kind, bytes) = cache.digest_of(path).map_err(|e| what(&e))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let file = UserFile { path: path.to_path_buf(), name, digest, kind, bytes, stamp: before };
        file.unchanged()?;
        Ok(file)
    }

    /// An error if the file is not the one that was hashed.
    pub fn unchanged(&self) -> Result<(), String> {
        let path = self.path.display();
        match stamps(&self.path) {
            Ok(now) if now == self.stamp => Ok(()),
            Ok(_) => Err(format!("`{path}` changed while it was in use; run again")),
            Err(e) => Err(format!("`{path}` vanished while it was in use: {e}")),
        }
    }
}

/// What a reference to a hub stands for, as it was when it was hashed.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// `owner/name@commit`, with `#file` when it is one file.
    pub origin: String,
    /// Base name.
    pub name: String,
    /// Digest of names and bytes: that of a directory with these files, or of the file.
    pub digest: Digest,
    /// File or directory.
    pub kind: Kind,
    /// Size.
    pub bytes: u64,
    /// Files by name, and where their bytes are.
    pub files: Vec<(String, PathBuf)>,
    stamp: Vec<Stamp>,
}

impl Fetched {
    /// Hashes what is here; fails if it changes meanwhile.
    pub fn read(cache: &Cache, snapshot: Snapshot) -> Result<Fetched, String> {
        let Snapshot { origin, name, files, single, .. } = snapshot;
        let what = |e: &dyn std::fmt::Display| format!("cannot read what is here of {origin}: {e}");
        let stamp = stamps_of(&files).map_err(|e| what(&e))?;
        let (digest, kind, bytes) = match &files[..] {
            [(_, path)] if single => cache.digest_of(path).map_err(|e| what(&e))?,
            files => {
                let (digest, bytes) = cache.digest_of_files(files).map_err(|e| what(&e))?;
                (digest, Kind::Dir, bytes)
            }
        };
        let fetched = Fetched { origin, name, digest, kind, bytes, files, stamp };
        fetched.unchanged()?;
        Ok(fetched)
    }

    /// An error if the files are not those that were hashed.
    pub fn unchanged(&self) -> Result<(), String> {
        match stamps_of(&self.files) {
            Ok(now) if now == self.stamp => Ok(()),
            Ok(_) => Err(format!("{} changed here while it was in use; run again", self.origin)),
            Err(e) => Err(format!("{} vanished while it was in use: {e}; run again", self.origin)),
        }
    }
}

fn stamps_of(files: &[(String, PathBuf)]) -> std::io::Result<Vec<Stamp>> {
    let mut found = Vec::with_capacity(files.len());
    for (_, path) in files {
        found.extend(stamps(path)?);
    }
    Ok(found)
}

/// The stamps of a file, or of everything below a directory in sorted order.
fn stamps(path: &Path) -> std::io::Result<Vec<Stamp>> {
    let meta = std::fs::metadata(path)?;
    let mut found = vec![Stamp {
        device: meta.dev(),
        inode: meta.ino(),
        bytes: meta.len(),
        modified: (meta.mtime(), meta.mtime_nsec()),
        changed: (meta.ctime(), meta.ctime_nsec()),
    }];
    if meta.is_dir() {
        let items = std::fs::read_dir(path)?.map(|item| Ok(item?.path()));
        let mut items: Vec<PathBuf> = items.collect::<std::io::Result<_>>()?;
        items.sort();
        for item in items {
            found.extend(stamps(&item)?);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_in_use_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("cache")).unwrap();
        let path = dir.path().join("a.txt");
        std::fs::write(&path, "one").unwrap();
        let file = UserFile::read(&cache, &path).unwrap();
        assert_eq!(file.unchanged(), Ok(()));
        std::fs::write(&path, "two").unwrap();
        assert!(file.unchanged().unwrap_err().contains("changed while"));
    }

    #[test]
    fn globs_are_sorted_and_must_match() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.txt", "a.txt", "c.md"] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        let found = find(&dir.path().join("*.txt")).unwrap();
        let names: Vec<_> = found.iter().map(|p| p.file_name().unwrap()).collect();
        assert_eq!(names, ["a.txt", "b.txt"]);
        assert!(find(&dir.path().join("*.rs")).unwrap_err().starts_with("nothing matches"));
        assert!(find(&dir.path().join("d")).unwrap_err().ends_with("does not exist"));
    }
}
