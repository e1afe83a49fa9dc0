//! `pipe completions SHELL`: the script that lets a shell complete commands, steps and runs.

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::look::Completions;
use crate::{complete, out};

pub fn completions(args: Completions) -> Result<ExitCode> {
    out::line(complete::script(&args.shell)?.trim_end());
    Ok(ExitCode::SUCCESS)
}
