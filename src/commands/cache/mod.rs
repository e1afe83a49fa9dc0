//! `pipe cache …`: what the store holds, what goes, what stays. One file a verb; here what they
//! share.

mod du;
mod gc;
mod ls;
mod pin;
mod rebuild;
mod verify;

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Result;
use cache::Cache;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli;
use crate::out;

/// Runs the verb.
pub fn dispatch(verb: cli::Cache) -> Result<ExitCode> {
    match verb {
        cli::Cache::Ls(args) => ls::ls(args),
        cli::Cache::Gc(args) => gc::gc(args),
        cli::Cache::Pin(args) => pin::pin(args),
        cli::Cache::Unpin(args) => pin::unpin(args),
        cli::Cache::Du(args) => du::du(args),
        cli::Cache::Verify(args) => verify::verify(args),
        cli::Cache::Rebuild(args) => rebuild::rebuild(args),
        cli::Cache::Keygen(args) => super::remote::keygen(args),
    }
}

/// Tells damage that was met on the way.
fn tell_reports(cache: &Cache) {
    for report in cache.take_reports() {
        out::message(format!("warning: {}", out::clean(&report)));
    }
}

/// A bar of bytes where standard error is a terminal, else nothing.
fn bar(total: u64, what: &'static str) -> ProgressBar {
    let target = match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr_with_hz(10),
        false => ProgressDrawTarget::hidden(),
    };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    let style = "{msg} {bar:30} {decimal_bytes} of {decimal_total_bytes}, {decimal_bytes_per_sec}";
    bar.set_style(ProgressStyle::with_template(style).expect("a template"));
    bar.set_message(what);
    bar
}

/// Prints columns, each as wide as its widest cell; those of `right` end at its right.
fn table(rows: &[Vec<String>], right: &[usize]) {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |c: usize| rows.iter().map(|row| row[c].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let cells = row.iter().enumerate().map(|(c, cell)| {
            let width = widths[c];
            if right.contains(&c) { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        out::line(cells.collect::<Vec<_>>().join("  ").trim_end());
    }
}

/// `today`, `yesterday`, `12 days ago`.
fn ago(idle: std::time::Duration) -> String {
    match idle.as_secs() / 86_400 {
        0 => "today".into(),
        1 => "yesterday".into(),
        days => format!("{days} days ago"),
    }
}

/// `1 run`, `2 runs`.
fn count(n: usize, what: &str) -> String {
    let many = match what.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None if what.ends_with('s') => format!("{what}es"),
        None => format!("{what}s"),
    };
    if n == 1 { format!("1 {what}") } else { format!("{n} {many}") }
}
