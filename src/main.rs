//! `pipe`: parses the command line, calls, turns errors into exit codes. Decides nothing else.
//!
//! Exit codes: 0 well, 1 a step failed, 2 wrong pipeline or argument, 130 interrupted.

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
