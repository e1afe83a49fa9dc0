//! Recorded runs, read: which there are, where they stand, what they measured, how two differ.
//!
//! [`Brief`] is a run by its first and last lines, [`now`] how far one has come, [`facts`] what its
//! steps made, [`diff`] two of them side by side. Changes nothing.

mod brief;
pub mod diff;
pub mod facts;
pub mod now;
pub mod tail;

pub use brief::{Brief, State, alive, brief};

use std::path::{Path, PathBuf};

use cache::Cache;

use crate::diagnostic::closest;
use crate::run::{self, Info};

/// Runs that were started in `cwd`, the newest first.
pub fn here(cache: &Cache, cwd: &Path) -> Vec<(Info, PathBuf)> {
    let mut found = all(cache);
    found.retain(|(info, _)| info.cwd == cwd);
    found
}

/// All runs, the newest first. Ids tell the second only; records are more exact.
pub fn all(cache: &Cache) -> Vec<(Info, PathBuf)> {
    let read = |dir: PathBuf| Some((run::info(&dir).ok()?, dir));
    let mut found: Vec<_> = run::all(cache).into_iter().filter_map(read).collect();
    found.sort_by(|a, b| b.0.started_s.total_cmp(&a.0.started_s));
    found
}

/// The run that `text` means: `@1` is the newest of `cwd`, `@2` the one before; else the beginning
/// of an id.
pub fn find(cache: &Cache, cwd: &Path, text: &str) -> Result<PathBuf, String> {
    if let Some(number) = text.strip_prefix('@') {
        let runs = here(cache, cwd);
        let at = number.parse::<usize>().ok().and_then(|n| n.checked_sub(1));
        let Some(at) = at else {
            return Err(format!("`{text}` is no run\nhint: `@1` is the newest of this directory"));
        };
        return match runs.into_iter().nth(at) {
            Some((_, dir)) => Ok(dir),
            None => Err(format!(
                "there is no run `{text}` in this directory\nhint: `pipe runs` lists them"
            )),
        };
    }
    let id = |dir: &PathBuf| dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut found: Vec<PathBuf> =
        run::all(cache).into_iter().filter(|dir| id(dir).starts_with(text)).collect();
    if let Some(exact) = found.iter().position(|dir| id(dir) == text) {
        return Ok(found.swap_remove(exact));
    }
    match &found[..] {
        [one] => Ok(one.clone()),
        [] => {
            let ids: Vec<String> = run::all(cache).iter().map(id).collect();
            let hint = match closest(text, ids.iter().map(String::as_str)) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => "`pipe runs --all` lists them".into(),
            };
            Err(format!("no recorded run starts with `{text}`\nhint: {hint}"))
        }
        many => {
            let ids: Vec<String> =
                many.iter().take(3).map(|dir| format!("`{}`", id(dir))).collect();
            let more = if many.len() > 3 { ", …" } else { "" };
            Err(format!(
                "{} runs start with `{text}`: {}{more}\nhint: write more of the id",
                many.len(),
                ids.join(", ")
            ))
        }
    }
}
