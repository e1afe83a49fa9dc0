//! `pipe report`: a run's record as one HTML file.

use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use engine::run::{self, Past};

use crate::cli::Report;
use crate::out;

pub fn report(args: Report) -> Result<ExitCode> {
    let cache = super::open_cache(args.cache.as_deref())?;
    let dir = match &args.run {
        None => super::newest_run(&cache)?,
        Some(id) => run::all(&cache).into_iter().find(|dir| {
            dir.file_name().is_some_and(|name| name.to_string_lossy().starts_with(id.as_str()))
        }),
    };
    let Some(dir) = dir else {
        bail!(super::Wrong(match args.run {
            Some(id) => format!(
                "no recorded run starts with `{id}`\nhint: runs are the directories of {}",
                cache.runs_dir().display()
            ),
            None => "no pipeline was run in this directory\nhint: run one first, or name a run by its id".into(),
        }));
    };
    let html = engine::report::html(&Past::load(&dir)?, &cache);
    std::fs::write(&args.output, html)
        .with_context(|| format!("cannot write {}", args.output.display()))?;
    out::line(args.output.display().to_string());
    Ok(ExitCode::SUCCESS)
}
