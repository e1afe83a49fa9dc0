//! `pipe check`: every error of a pipeline at once.

use std::process::ExitCode;

use anyhow::Result;
use serde_json::json;

use crate::cli::Check;
use crate::out;

pub fn check(args: Check) -> Result<ExitCode> {
    let loaded = super::load(args.file.as_deref(), &args.settings)?;
    let plan = &loaded.plan;
    if args.json {
        out::line(json!({ "pipeline": plan.name, "steps": plan.steps.len() }).to_string());
    } else {
        out::line(format!("`{}` is right: {} steps", out::clean(&plan.name), plan.steps.len()));
    }
    Ok(ExitCode::SUCCESS)
}
