//! `pipe`: parses the command line, calls, turns errors into exit codes. Decides nothing else.
//!
//! Exit codes: 0 well, 1 a step failed, 2 wrong pipeline or argument (or a step that cannot fit this
//! machine), 3 the budget of time was used up and steps are left, 130 interrupted.

mod cli;
mod commands;
mod complete;
mod console;
mod machine;
mod out;
mod processes;
mod table;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    complete::answer();
    let cli = cli::Cli::parse();
    match commands::dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            out::error(&error);
            ExitCode::from(if error.is::<commands::Wrong>() { 2 } else { 1 })
        }
    }
}
