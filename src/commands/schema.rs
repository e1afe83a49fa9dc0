//! `pipe schema`: the JSON Schema of pipeline files.

use std::process::ExitCode;

use anyhow::Result;

use crate::out;

pub fn schema() -> Result<ExitCode> {
    let schema = engine::spec::schema(&super::REGISTRY);
    out::line(serde_json::to_string_pretty(&schema)?);
    Ok(ExitCode::SUCCESS)
}
