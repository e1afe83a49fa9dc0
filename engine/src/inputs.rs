//! The user's own files, and those fetched from a hub: found, hashed in place, and watched for
//! changes until the step is done.

use std::path::{Path, PathBuf};

use cache::{Cache, Digest, Kind, Memo, Recalled, Stamp};

use crate::hub::Snapshot;

/// A user's file or directory as it was when it was hashed.
#[derive(Clone, Debug)]
pub struct UserFile {
    /// Absolute path.
    pub path: PathBuf,
    /// Digest of its bytes.
    pub digest: Digest,
    /// File or directory.
    pub kind: Kind,
    /// Size.
    pub bytes: u64,
    /// Whether an earlier run found the same.
    pub known: bool,
    stamp: Vec<Stamp>,
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
        UserFile::hashed(path, || cache.digest_of(path))
    }

    /// As [`UserFile::read`], and every byte is read, whatever `stat` says.
    pub fn reread(path: &Path) -> Result<UserFile, String> {
        UserFile::hashed(path, || cache::hash_path(path))
    }

    fn hashed(
        path: &Path,
        hash: impl FnOnce() -> cache::Result<(Digest, Kind, u64)>,
    ) -> Result<UserFile, String> {
        let what = |e: &dyn std::fmt::Display| format!("cannot read `{}`: {e}", path.display());
        let before = stamps(path).map_err(|e| what(&e))?;
        let (digest, kind, bytes) = hash().map_err(|e| what(&e))?;
        let file =
            UserFile { path: path.to_path_buf(), digest, kind, bytes, known: false, stamp: before };
        file.unchanged()?;
        Ok(file)
    }

    /// What an earlier run found in the file at `path`, if it is what it was.
    pub fn recalled(earlier: &Recalled, path: &Path) -> Option<UserFile> {
        let (digest, stamp) = earlier.file(path)?;
        Some(UserFile {
            path: path.to_path_buf(),
            digest,
            kind: Kind::File,
            bytes: stamp.size,
            known: true,
            stamp: vec![stamp],
        })
    }

    /// Base name.
    pub fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
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

/// Notes what `pattern` stood for; `false` when something is so young that it may change unseen.
pub fn note(memo: &mut Memo, pattern: &Path, files: &[UserFile]) -> bool {
    if let [file] = files
        && file.kind == Kind::File
        && file.path == pattern
    {
        return memo.file(pattern, &file.stamp[0], &file.digest);
    }
    let settled = files.iter().flat_map(|file| &file.stamp).all(|stamp| memo.settles(stamp));
    if settled {
        memo.files(pattern, &seal_of(files.iter().map(|file| (&*file.path, &*file.stamp))));
    }
    settled
}

/// Notes the file or directory at `path`, which is known to be right; `false` when it may have
/// changed since the memo began.
pub fn note_as_it_is(memo: &mut Memo, path: &Path) -> bool {
    let Ok(stamp) = stamps(path) else { return false };
    let settled = stamp.iter().all(|stamp| memo.settles(stamp));
    if settled {
        memo.files(path, &seal_of([(path, &*stamp)].into_iter()));
    }
    settled
}

/// Names and stamps of all that `pattern` stands for now, as one digest.
pub fn seal(pattern: &Path) -> Option<Digest> {
    let found = find(pattern).ok()?;
    let stamps: Option<Vec<Vec<Stamp>>> = found.iter().map(|path| stamps(path).ok()).collect();
    let stamps = stamps?;
    Some(seal_of(found.iter().zip(&stamps).map(|(path, stamp)| (&**path, &**stamp))))
}

fn seal_of<'a>(files: impl Iterator<Item = (&'a Path, &'a [Stamp])>) -> Digest {
    let mut text = Vec::new();
    for (path, stamps) in files {
        let path = path.as_os_str().as_encoded_bytes();
        text.extend((path.len() as u64).to_le_bytes());
        text.extend(path);
        text.extend((stamps.len() as u64).to_le_bytes());
        stamps.iter().for_each(|stamp| text.extend(stamp.bytes()));
    }
    Digest::of(&text)
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
    let mut found = vec![Stamp::of(&meta)];
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
