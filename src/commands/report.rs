//! `pipe report`: a run's record as one HTML file.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use engine::run::Past;

use crate::cli::Report;
use crate::out;

pub fn report(args: Report) -> Result<ExitCode> {
    let cache = super::open_cache(args.cache.as_deref())?;
    let dir = super::run_dir(&cache, args.run.as_deref())?;
    let html = engine::report::html(&Past::load(&dir)?, &cache);
    std::fs::write(&args.output, html)
        .with_context(|| format!("cannot write {}", args.output.display()))?;
    out::line(args.output.display().to_string());
    Ok(ExitCode::SUCCESS)
}
