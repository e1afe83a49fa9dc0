//! Sealed checkpoints: a directory `<position>` that exists whole or not at all.
//!
//! An attempt writes `<position>.tmp`, syncs it, and renames it. Nobody writes to it afterwards, so
//! an orphan that goes on working can harm no later attempt.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Fills a fresh directory by `write`, makes it durable, seals it as `<dir>/<position>` and drops
/// the older checkpoints of the same attempt. Returns the sealed directory.
pub fn save<E: From<io::Error>>(
    dir: &Path,
    position: u64,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<PathBuf, E> {
    let tmp = dir.join(format!("{position}.tmp"));
    let sealed = dir.join(position.to_string());
    if sealed.exists() {
        return Ok(sealed);
    }
    let _ = fs::remove_dir_all(&tmp);
    fs::create_dir_all(&tmp)?;
    write(&tmp)?;
    for item in fs::read_dir(&tmp)? {
        fs::File::open(item?.path())?.sync_all()?;
    }
    fs::File::open(&tmp)?.sync_all()?;
    fs::rename(&tmp, &sealed)?;
    fs::File::open(dir)?.sync_all()?;
    for (older, path) in sealed_in(dir) {
        if older < position {
            // Its name goes first, so that a crash leaves no half-removed checkpoint under it.
            let old = path.with_extension("old");
            if fs::rename(&path, &old).is_ok() {
                let _ = fs::remove_dir_all(old);
            }
        }
    }
    Ok(sealed)
}

/// The newest sealed checkpoint in any of `dirs` (one an attempt).
pub fn latest(dirs: impl IntoIterator<Item = PathBuf>) -> Option<(u64, PathBuf)> {
    dirs.into_iter().flat_map(|dir| sealed_in(&dir)).max_by_key(|(position, _)| *position)
}

fn sealed_in(dir: &Path) -> Vec<(u64, PathBuf)> {
    let Ok(items) = fs::read_dir(dir) else { return Vec::new() };
    items
        .flatten()
        .filter_map(|item| Some((item.file_name().to_str()?.parse().ok()?, item.path())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_sealed_wins_and_half_written_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let fill = |d: &Path| fs::write(d.join("w"), "x");
        save(dir.path(), 9, fill).unwrap();
        save(dir.path(), 10, fill).unwrap();
        fs::create_dir(dir.path().join("11.tmp")).unwrap();
        let (position, path) = latest([dir.path().to_path_buf()]).unwrap();
        assert_eq!((position, path.file_name().unwrap().to_str()), (10, Some("10")));
        assert!(!dir.path().join("9").exists());
        assert!(!dir.path().join("9.old").exists());
    }
}
