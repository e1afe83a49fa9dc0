//! The board of `pipe run` on a terminal: a pseudo-terminal by util-linux's `script`, and a small
//! model of a screen to read what is left on it.

#![allow(clippy::print_stdout)] // what is skipped is said

use std::path::PathBuf;
use std::process::{Child, Stdio};

use crate::support::Project;

/// Begins what is drawn at once.
const FRAME: &str = "\x1b[?2026h";

/// Runs `pipe ARGS` on a terminal of `columns` by `rows`, after `before` (shell commands).
fn on_terminal(project: &Project, size: (u32, u32), before: &str, args: &str) -> Option<Child> {
    let has = std::process::Command::new("script").arg("--version").stdout(Stdio::null()).status();
    if !has.is_ok_and(|status| status.success()) {
        println!("skipped: there is no `script` of util-linux");
        return None;
    }
    let pipe = env!("CARGO_BIN_EXE_pipe");
    let (columns, rows) = size;
    let shell = format!("stty cols {columns} rows {rows} -echo; {before} {pipe} {args}");
    let mut command = project.command(&[]);
    let mut on = std::process::Command::new("script");
    on.args(["-q", "-f", "-e", "-c", &shell]).arg(typescript(project));
    on.current_dir(project.path()).stdin(Stdio::null()).stdout(Stdio::null());
    on.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    on.env("TERM", "xterm");
    command.stdin(Stdio::null());
    Some(on.spawn().unwrap())
}

fn typescript(project: &Project) -> PathBuf {
    project.path().join("typescript")
}

/// What was printed so far, without the lines that `script` itself writes.
fn printed(project: &Project) -> String {
    let text = std::fs::read(typescript(project)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines = text.split_inclusive('\n').filter(|line| !line.starts_with("Script "));
    lines.collect()
}

/// The lines of a screen that is `columns` wide and has as many lines as it takes.
fn screen(text: &str, columns: usize) -> Vec<String> {
    let (mut lines, mut row, mut column) = (vec![Vec::new()], 0usize, 0usize);
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\r' => column = 0,
            '\n' => row += 1,
            '\x1b' => {
                assert_eq!(chars.next(), Some('['), "nothing else is used");
                let mut number = String::new();
                let last = loop {
                    match chars.next().unwrap() {
                        c if c.is_ascii_alphabetic() => break c,
                        c => number.push(c),
                    }
                };
                match last {
                    'A' => row = row.checked_sub(number.parse().unwrap()).expect("above the top"),
                    'J' => {
                        lines.truncate(row + 1);
                        lines[row].truncate(column);
                    }
                    'm' | 'h' | 'l' => {}
                    other => panic!("sequence {other}"),
                }
            }
            c => {
                if column == columns {
                    (row, column) = (row + 1, 0);
                }
                lines.resize_with(lines.len().max(row + 1), Vec::new);
                let line: &mut Vec<char> = &mut lines[row];
                line.resize(line.len().max(column + 1), ' ');
                line[column] = c;
                column += 1;
            }
        }
        lines.resize_with(lines.len().max(row + 1), Vec::new);
    }
    let text = |line: Vec<char>| line.into_iter().collect::<String>().trim_end().to_string();
    lines.into_iter().map(text).collect()
}

/// A step that goes on until the file `gate` is there, and one that fails with a long log.
fn gated() -> Project {
    let project = Project::new();
    let gate = project.path().join("gate").display().to_string();
    let long = "x".repeat(150);
    project.write(
        "p.yaml",
        &format!(
            "name: gated
steps:
  waits: {{ stage: command, run: [sh, -c, 'while [ ! -e {gate} ]; do sleep 0.05; done; echo 1 > ${{out.o}}'], out: [o] }}
  breaks: {{ stage: command, in: {{ i: waits.o }}, run: [sh, -c, 'echo first of the log; echo {long}; echo last of the log; exit 3'], out: [o] }}
"
        ),
    );
    project
}

#[test]
fn a_failing_steps_log_stays_whole_and_the_board_goes() {
    let project = gated();
    let Some(mut child) = on_terminal(&project, (100, 20), "", "run p.yaml") else { return };
    let shown = |what: &str| printed(&project).contains(what);
    project.wait_until("the board is drawn", || shown("gated") && shown("▸ waits"));
    project.write("gate", "");
    child.wait().unwrap();
    let left = screen(&printed(&project), 100);
    let text = left.join("\n");
    for once in ["first of the log", "last of the log", "done    waits", "failed breaks"] {
        assert_eq!(text.matches(once).count(), 1, "{once}:\n{text}");
    }
    assert_eq!(text.replace('\n', "").matches(&"x".repeat(150)).count(), 1, "{text}");
    assert!(!text.contains('▸') && !text.contains("to go"), "the board is gone:\n{text}");
    assert!(text.contains("1 ran, 1 failed"), "{text}");
}

#[test]
fn the_board_follows_the_size_of_the_terminal() {
    let project = gated();
    let small = project.path().join("small").display().to_string();
    let resize =
        format!("(while [ ! -e {small} ]; do sleep 0.05; done; stty cols 24 rows 5 < /dev/tty) &");
    let Some(mut child) = on_terminal(&project, (100, 20), &resize, "run p.yaml") else { return };
    project.wait_until("the board is drawn", || printed(&project).contains("▸ waits"));
    project.write("small", "");
    let wide = |frame: &str| {
        let lines = screen(frame, usize::MAX);
        lines.iter().map(|line| line.chars().count()).max().unwrap_or(0)
    };
    // Whole frames, without what takes the one before away.
    let frames = || -> Vec<String> {
        let text = printed(&project);
        let whole = text.split(FRAME).skip(1).filter_map(|frame| frame.split_once("\x1b[?2026l"));
        whole.map(|(frame, _)| frame.rsplit("\x1b[J").next().unwrap().to_string()).collect()
    };
    assert!(frames().iter().any(|frame| wide(frame) > 24));
    project.wait_until("it is drawn narrow", || frames().last().is_some_and(|f| wide(f) < 24));
    project.write("gate", "");
    child.wait().unwrap();
    let all = frames();
    let first = all.iter().position(|frame| wide(frame) < 24).unwrap();
    for frame in &all[first..] {
        assert!(wide(frame) < 24 && frame.lines().count() < 5, "{frame:?}");
    }
}

#[test]
fn quiet_and_piped_runs_have_no_board() {
    let project = gated();
    project.write("gate", "");
    let Some(mut child) = on_terminal(&project, (100, 20), "", "run p.yaml --quiet") else {
        return;
    };
    child.wait().unwrap();
    let text = printed(&project);
    assert!(!text.contains(FRAME) && text.contains("last of the log"), "{text}");
    let piped = project.pipe(&["run", "p.yaml"]);
    assert!(!piped.stderr.contains('\x1b') && piped.stderr.contains("running breaks"));
}
