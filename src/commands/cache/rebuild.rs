//! `pipe cache rebuild`: the index anew, from the entries.

use std::process::ExitCode;

use anyhow::{Result, bail};

use super::{count, tell_reports};
use crate::cli::Rebuild;
use crate::commands::Wrong;
use crate::out;

pub fn rebuild(args: Rebuild) -> Result<ExitCode> {
    let cache = crate::commands::open_cache(args.place.cache.as_deref())?;
    let made = cache.reindex()?;
    tell_reports(&cache);
    let Some(made) = made else {
        bail!(Wrong(format!(
            "there can be no index in {}: SQLite does not work there, as on network file systems, \
             and all else works without",
            cache.index_dir().display()
        )));
    };
    out::line(format!("the index has {}", count(made.entries, "entry")));
    if made.damaged > 0 {
        out::message(format!(
            "{} damaged\nhint: `pipe cache verify --repair` moves damage away",
            count(made.damaged, "entry")
        ));
    }
    Ok(ExitCode::SUCCESS)
}
