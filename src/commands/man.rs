//! `pipe man`: manual pages, from the same text as `--help`; or the whole reference as Markdown.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::CommandFactory as _;

use crate::cli::Cli;
use crate::cli::look::Man;
use crate::out;

pub fn man(args: Man) -> Result<ExitCode> {
    let command = Cli::command();
    match &args.output {
        Some(dir) if args.markdown => write_reference(dir)?,
        None if args.markdown => {
            let texts = super::reference::pages().map(|(_, text)| text);
            out::line(texts.join("\n").trim_end());
        }
        Some(dir) => {
            let cannot = || format!("cannot write manual pages to {}", dir.display());
            std::fs::create_dir_all(dir).with_context(cannot)?;
            clap_mangen::generate_to(command, dir).with_context(cannot)?;
            out::line(dir.display().to_string());
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(command).render(&mut page)?;
            out::line(String::from_utf8_lossy(&page).trim_end());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn write_reference(dir: &Path) -> Result<()> {
    let cannot = |path: &Path| format!("cannot write {}", path.display());
    std::fs::create_dir_all(dir).with_context(|| cannot(dir))?;
    for (name, text) in super::reference::pages() {
        let path = dir.join(name);
        std::fs::write(&path, text).with_context(|| cannot(&path))?;
        out::line(path.display().to_string());
    }
    Ok(())
}
