//! `pipe`: parses the command line, calls, turns errors into exit codes. Decides nothing else.
//!
//! Exit codes: 0 well, 1 a step failed, 2 wrong pipeline or argument (or a step that cannot fit this
//! machine), 3 the budget of time was used up and steps are left, 130 interrupted.

mod board;
mod cli;
mod commands;
mod complete;
mod console;
mod machine;
mod out;
mod processes;
mod screen;
mod table;
mod usage;

use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command, CommandFactory as _};

fn main() -> ExitCode {
    complete::answer();
    let cli = cli::Cli::read().unwrap_or_else(|error| meant(error).exit());
    match commands::dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            out::error(&error);
            ExitCode::from(if error.is::<commands::Wrong>() { 2 } else { 1 })
        }
    }
}

/// A mistyped command is answered with the nearest one: `run` for `rnu`, where the parser's own measure
/// says `runs`.
fn meant(mut error: clap::Error) -> clap::Error {
    let Some(ContextValue::String(word)) = error.get(ContextKind::InvalidSubcommand) else {
        return error;
    };
    fn names(command: &Command, word: &str) -> Option<String> {
        let shown = command.get_subcommands().filter(|command| !command.is_hide_set());
        engine::diagnostic::closest(word, shown.map(Command::get_name)).map(String::from)
    }
    let root = cli::Cli::command();
    let of = std::env::args().nth(1).and_then(|verb| root.find_subcommand(verb).cloned());
    let meant = names(of.as_ref().unwrap_or(&root), word);
    if let (ErrorKind::InvalidSubcommand, Some(name)) = (error.kind(), meant) {
        error.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(vec![name]));
    }
    error
}
