//! Sealed checkpoints: a directory `<position>` that exists whole or not at all.
//!
//! An attempt writes `<position>.tmp`, syncs all of it, and renames it. Nobody writes to it afterwards, so
//! an orphan that goes on working can harm no later attempt.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::crash_point;
use crate::loss;
use crate::tree;

/// Directories above a first checkpoint that may be as new as it: attempt, key, all attempts.
const ABOVE: usize = 3;

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
    let first = !dir.exists();
    fs::create_dir_all(&tmp)?;
    if first {
        loss::named(dir, None);
    }
    loss::named(&tmp, None);
    write(&tmp)?;
    loss::wrote(&tmp);
    crash_point!("checkpoint.before-sync");
    sync_below(&tmp)?;
    crash_point!("checkpoint.before-seal");
    fs::rename(&tmp, &sealed)?;
    loss::named(&sealed, Some(&tmp));
    crash_point!("checkpoint.after-seal");
    tree::sync_one(dir)?;
    if first {
        // The names of the directory, of its attempt and of its key: what is sealed is to be found.
        dir.ancestors().skip(1).take(ABOVE).try_for_each(tree::sync_one)?;
    }
    crash_point!("checkpoint.durable");
    for (older, path) in sealed_in(dir) {
        if older < position {
            // Its name goes first, so that a crash leaves no half-removed checkpoint under it.
            let old = path.with_extension("old");
            if fs::rename(&path, &old).is_ok() {
                loss::named(&old, Some(&path));
                crash_point!("checkpoint.before-drop");
                let _ = fs::remove_dir_all(old);
            }
        }
    }
    Ok(sealed)
}

/// Makes all that is in `path` durable, however deep.
fn sync_below(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        fs::read_dir(path)?.try_for_each(|item| sync_below(&item?.path()))?;
    }
    tree::sync_one(path)
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
