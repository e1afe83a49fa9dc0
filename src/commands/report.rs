//! `pipe report`: a run's record as one HTML file, once or for as long as the run goes on.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use cache::Cache;
use engine::history;
use engine::run::{EVENTS, Past};

use crate::cli::Report;
use crate::out;

pub fn report(args: Report) -> Result<ExitCode> {
    let cache = super::open_cache(args.cache.as_deref())?;
    let dir = super::run_dir(&cache, args.run.as_deref())?;
    let mut goes_on = write(&dir, &cache, &args)?;
    out::line(args.output.display().to_string());
    if args.open {
        open(&args.output);
    }
    let mut seen = changed(&dir);
    while let (true, Some(seconds)) = (goes_on, args.watch) {
        std::thread::sleep(Duration::from_secs(seconds.into()));
        let now = changed(&dir);
        if now != seen || !history::alive(&dir) {
            seen = now;
            goes_on = write(&dir, &cache, &args)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Draws the page as it is now, whole or not at all. Tells whether the run goes on.
fn write(dir: &Path, cache: &Cache, args: &Report) -> Result<bool> {
    // Asked before the record is read: the last page has its end.
    let goes_on = history::alive(dir);
    let past = Past::load(dir)?;
    let html = match args.watch.filter(|_| goes_on) {
        Some(seconds) => engine::report::html_live(&past, cache, seconds),
        None => engine::report::html(&past, cache),
    };
    let path = &args.output;
    let cannot = || format!("cannot write {}", path.display());
    // What is no plain file (a pipe, /dev/stdout) is written as it is.
    if path.exists() && !path.is_file() {
        std::fs::write(path, html).with_context(cannot)?;
        return Ok(goes_on);
    }
    let mut name = path.file_name().map_or_else(OsString::new, OsString::from);
    name.push(format!(".{}.tmp", std::process::id()));
    let draft: PathBuf = path.with_file_name(name);
    let moved = std::fs::write(&draft, html).and_then(|()| std::fs::rename(&draft, path));
    if moved.is_err() {
        let _ = std::fs::remove_file(&draft);
    }
    moved.with_context(cannot)?;
    Ok(goes_on)
}

/// Size and time of the record, to see whether there is anything new.
fn changed(dir: &Path) -> Option<(u64, SystemTime)> {
    let about = std::fs::metadata(dir.join(EVENTS)).ok()?;
    Some((about.len(), about.modified().ok()?))
}

/// Opens a file in the browser. That there is none is told and no error: the file is there.
fn open(path: &Path) {
    let named = std::env::var_os("BROWSER").filter(|name| !name.is_empty());
    let usual = if cfg!(target_os = "macos") { "open" } else { "xdg-open" };
    let program = named.unwrap_or_else(|| usual.into());
    let path = std::path::absolute(path).unwrap_or_else(|_| path.into());
    let mut command = Command::new(&program);
    command.arg(&path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if let Err(error) = command.spawn() {
        let program = program.to_string_lossy();
        out::message(format!(
            "note: `{program}` cannot be started ({error}): open {} in a browser",
            path.display()
        ));
    }
}
