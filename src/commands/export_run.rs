//! `pipe export-run`: a run's record for TensorBoard, Perfetto, scripts or an archive.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail};
use engine::history::{self, State};
use engine::interop::{self, jsonl, ro_crate, tensorboard, trace};
use engine::run::{self, Past};

use super::Wrong;
use crate::cli::look::{ExportRun, Tool};
use crate::out;

pub fn export_run(args: ExportRun) -> Result<ExitCode> {
    let cache = super::open_cache(args.cache.as_deref())?;
    let dir = super::run_dir(&cache, args.run.as_deref())?;
    let past = Past::load(&dir)?;
    let courses = interop::courses(&past, &cache);
    let path = &args.output;
    match args.to {
        Tool::Trace => write(path, trace::trace(&past).to_string().as_bytes())?,
        Tool::Jsonl => write(path, jsonl::jsonl(&past, &courses).as_bytes())?,
        Tool::Tensorboard => {
            let files = tensorboard::files(&past, &courses);
            if files.is_empty() {
                bail!("this run measured nothing that TensorBoard could show");
            }
            write_all(path, &files)?;
        }
        Tool::RoCrate => {
            let brief = history::brief(run::info(&dir)?, dir)?;
            if brief.state == State::Running {
                bail!(Wrong("this run goes on\nhint: a crate is made of a run that ended".into()));
            }
            write_all(path, &ro_crate::files(&past, &courses, &cache, &args.license)?)?;
        }
    }
    out::line(path.display().to_string());
    Ok(ExitCode::SUCCESS)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes files into a directory that is new or empty, so that nothing old is taken for a part.
fn write_all(dir: &Path, files: &BTreeMap<String, Vec<u8>>) -> Result<()> {
    let there = fs::read_dir(dir).map(|mut items| items.next().is_some());
    if there.unwrap_or(false) {
        bail!(Wrong(format!(
            "{} is not empty\nhint: name a new directory with `-o`",
            dir.display()
        )));
    }
    for (name, bytes) in files {
        let path = dir.join(name);
        let parent = path.parent().unwrap_or(dir);
        fs::create_dir_all(parent)
            .with_context(|| format!("cannot create {}", parent.display()))?;
        write(&path, bytes)?;
    }
    Ok(())
}
