//! Commands with their arguments, as `--help` has them.

use std::fmt::Write as _;

use clap::{Arg, ArgAction, Command, CommandFactory as _};

use super::{head, sentence};
use crate::cli::Cli;

pub fn page() -> String {
    let mut root = Cli::command();
    root.build();
    let mut out = head("Commands");
    out += "Exit codes: 0 well, 1 a step failed, 2 a wrong pipeline or argument, 130 interrupted. Answers go to\n\
            standard output, messages to standard error.\n\n";
    let global: Vec<&Arg> = root.get_arguments().filter(|arg| shown(arg)).collect();
    let _ = writeln!(out, "Every command takes\n");
    global.iter().for_each(|arg| out += &row(arg));
    for command in root.get_subcommands().filter(|command| !command.is_hide_set()) {
        section(command, &mut out);
    }
    out
}

fn section(command: &Command, out: &mut String) {
    let name = command.get_bin_name().unwrap_or(command.get_name());
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let _ = write!(out, "\n## {name}\n\n{}\n", sentence(&about));
    if command.has_subcommands() {
        let inner = command.get_subcommands().filter(|command| !command.is_hide_set());
        return inner.for_each(|command| section(command, out));
    }
    let usage = command.clone().render_usage().to_string();
    let _ = write!(out, "\n```\n{}\n```\n\n", usage.trim_start_matches("Usage: "));
    let arguments = command.get_arguments().filter(|arg| shown(arg) && !of_all(arg));
    arguments.for_each(|arg| *out += &row(arg));
    if let Some(after) = command.get_after_help() {
        let _ = write!(out, "\n```\n{}\n```\n", after.to_string().trim_end());
    }
}

fn shown(arg: &Arg) -> bool {
    !arg.is_hide_set() && !matches!(arg.get_id().as_str(), "help" | "version")
}

/// Told once, above.
fn of_all(arg: &Arg) -> bool {
    arg.get_id() == "shared_cache"
}

/// ``- `--set NAME=VALUE`: what it does. Default: …``
fn row(arg: &Arg) -> String {
    let takes = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
    let value = arg.get_value_names().filter(|_| takes).unwrap_or_default();
    let value: Vec<&str> = value.iter().map(AsRef::as_ref).collect();
    let mut names: Vec<String> = Vec::new();
    names.extend(arg.get_short().map(|short| format!("-{short}")));
    names.extend(arg.get_long().map(|long| format!("--{long}")));
    let name = match names.is_empty() {
        true => value.join(" "),
        false if value.is_empty() => names.join(", "),
        false => format!("{} {}", names.join(", "), value.join(" ")),
    };
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let mut out = format!("- `{name}`: {}", sentence(&help));
    let possible: Vec<String> = arg
        .get_possible_values()
        .iter()
        .filter(|value| takes && !value.is_hide_set())
        .map(|value| format!("`{}`", value.get_name()))
        .collect();
    if !possible.is_empty() {
        let _ = write!(out, " One of {}.", possible.join(", "));
    }
    let defaults: Vec<_> = arg.get_default_values().iter().map(|v| v.to_string_lossy()).collect();
    if takes && defaults.iter().any(|default| !default.is_empty()) {
        let _ = write!(out, " Default: `{}`.", defaults.join(","));
    }
    out + "\n"
}
