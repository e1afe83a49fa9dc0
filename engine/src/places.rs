//! Directories that one step leaves to the next: emptied, and made where they are not there. Knows no
//! steps.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Makes `dir` have these directories and nothing else. An earlier step may have left it: what it
/// has of them is kept, since to make and remove directories is most of what a small step costs.
pub(crate) fn make(dir: &Path, places: &BTreeSet<PathBuf>) -> std::io::Result<()> {
    let there = match empty(dir, places) {
        Some(there) => there,
        None => {
            set_aside(dir)?;
            BTreeSet::new()
        }
    };
    for new in places.difference(&there) {
        match fs::create_dir(dir.join(new)) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            result => result?,
        }
    }
    Ok(())
}

/// Removes all that is in `dir` but these directories; tells which of them are there, all empty.
/// `None` of one that cannot be used.
fn empty(dir: &Path, places: &BTreeSet<PathBuf>) -> Option<BTreeSet<PathBuf>> {
    let mut there = BTreeSet::from([PathBuf::new()]);
    usable(dir).then(|| clear(dir, Path::new(""), places, &mut there))?.ok()?;
    Some(there)
}

/// Removes from `dir/below` all but the directories that are wanted.
fn clear(
    dir: &Path,
    below: &Path,
    places: &BTreeSet<PathBuf>,
    there: &mut BTreeSet<PathBuf>,
) -> std::io::Result<()> {
    for item in fs::read_dir(dir.join(below))? {
        let item = item?;
        let (name, path) = (below.join(item.file_name()), item.path());
        match item.file_type()?.is_dir() {
            true if places.contains(&name) && usable(&path) => {
                clear(dir, &name, places, there)?;
                there.insert(name);
            }
            true => fs::remove_dir_all(path)?,
            false => fs::remove_file(path)?,
        }
    }
    Ok(())
}

/// Whether it is a directory as one that was just made; a program may change its mode.
fn usable(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|m| m.is_dir() && m.mode() & 0o5700 == 0o700)
}

/// Removes what is at `dir`. What cannot be removed gets another name, and goes when the attempt does.
fn set_aside(dir: &Path) -> std::io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != ErrorKind::NotFound => fs::rename(dir, dir.with_extension("old")),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn set(places: &[&str]) -> BTreeSet<PathBuf> {
        places.iter().map(PathBuf::from).collect()
    }

    /// Everything below `dir`, sorted.
    fn below(dir: &Path) -> Vec<String> {
        let mut found = Vec::new();
        for item in fs::read_dir(dir).unwrap() {
            let item = item.unwrap();
            let name = item.file_name().into_string().unwrap();
            if item.file_type().unwrap().is_dir() {
                found.extend(below(&item.path()).iter().map(|inner| format!("{name}/{inner}")));
            }
            found.push(name);
        }
        found.sort();
        found
    }

    #[test]
    fn what_is_wanted_is_there_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join("work");
        make(&work, &set(&["", "in", "in/a", "out"])).unwrap();
        assert_eq!(below(&work), ["in", "in/a", "out"]);
        fs::write(work.join("in/a/f"), "bytes").unwrap();
        fs::create_dir_all(work.join("out/deep/er")).unwrap();
        fs::write(work.join("out/deep/er/f"), "bytes").unwrap();
        std::os::unix::fs::symlink("/", work.join("in/link")).unwrap();
        make(&work, &set(&["", "in", "in/b", "out"])).unwrap();
        assert_eq!(below(&work), ["in", "in/b", "out"]);
        // A program may put anything in the place of a directory.
        fs::remove_dir(work.join("out")).unwrap();
        fs::write(work.join("out"), "a file").unwrap();
        fs::remove_dir_all(work.join("in")).unwrap();
        std::os::unix::fs::symlink("/tmp", work.join("in")).unwrap();
        make(&work, &set(&["", "in", "out"])).unwrap();
        assert_eq!(below(&work), ["in", "out"]);
        assert!(work.join("in").symlink_metadata().unwrap().is_dir());
    }

    #[test]
    fn a_directory_that_cannot_be_used_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let work = dir.path().join("work");
        make(&work, &set(&["", "in", "out"])).unwrap();
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(&work.join("out"), 0o500);
        make(&work, &set(&["", "in", "out"])).unwrap();
        fs::write(work.join("out/f"), "it can be written to").unwrap();
        mode(&work, 0o500);
        make(&work, &set(&["", "in", "out"])).unwrap();
        assert_eq!(below(&work), ["in", "out"]);
        assert!(usable(&work));
    }
}
