//! What reaches the user: answers on standard output, messages on standard error. A closed standard
//! output ends the program quietly. Outside text is stripped of control sequences.

use std::io::{ErrorKind, IsTerminal, Write};

/// Prints a line of the answer.
pub fn line(text: impl AsRef<str>) {
    write(&format!("{}\n", text.as_ref()));
}

/// Prints a piece of the answer at once; control sequences reach no terminal.
pub fn piece(text: &str) {
    match std::io::stdout().is_terminal() {
        true => write(&clean(text)),
        false => write(text),
    }
}

/// Prints what steers the terminal.
pub fn raw(text: &str) {
    write(text);
}

fn write(text: &str) {
    let mut stdout = std::io::stdout().lock();
    if let Err(error) = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
        && error.kind() == ErrorKind::BrokenPipe
    {
        std::process::exit(0);
    }
}

/// Prints a message, above the board if there is one.
pub fn message(text: impl AsRef<str>) {
    crate::screen::above(text.as_ref());
}

/// Prints an error and what caused it.
pub fn error(error: &anyhow::Error) {
    let text = format!("{error:#}");
    let paint = Paint::stderr();
    if text.starts_with("error:") || text.starts_with("error[") {
        message(text);
    } else {
        message(format!("{} {}", paint.bold_red("error:"), clean(&text)));
    }
}

/// Colours, if they are wanted where the text goes.
#[derive(Clone, Copy)]
pub struct Paint(pub bool);

impl Paint {
    fn wanted(terminal: bool) -> Paint {
        Paint(terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()))
    }
    /// For standard output.
    pub fn stdout() -> Paint {
        Paint::wanted(std::io::stdout().is_terminal())
    }
    /// For standard error.
    pub fn stderr() -> Paint {
        Paint::wanted(std::io::stderr().is_terminal())
    }
    fn code(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.into() }
    }
    pub fn bold(self, text: &str) -> String {
        self.code("1", text)
    }
    pub fn dim(self, text: &str) -> String {
        self.code("2", text)
    }
    pub fn green(self, text: &str) -> String {
        self.code("32", text)
    }
    pub fn yellow(self, text: &str) -> String {
        self.code("33", text)
    }
    pub fn bold_red(self, text: &str) -> String {
        self.code("1;31", text)
    }
}

/// Columns of the terminal that standard output is; `None` if it is none.
pub fn terminal_width() -> Option<usize> {
    let stdout = std::io::stdout();
    let size = rustix::termios::tcgetwinsize(&stdout).ok().filter(|_| stdout.is_terminal())?;
    Some(if size.ws_col == 0 { 80 } else { usize::from(size.ws_col) })
}

/// `text` without control characters other than line break and tab, so that logs, models and YAML
/// cannot drive the terminal.
pub fn clean(text: &str) -> String {
    text.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')).collect()
}

/// `1.2 s`, `3 min 05 s`, `2 h 10 min`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        _ if seconds < 0.9995 => format!("{:.0} ms", seconds * 1000.0),
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole / 60 % 60),
    }
}

/// `1.2 kB`, `34.5 MB`.
pub fn bytes(bytes: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_read_well() {
        assert_eq!(duration(0.0421), "42 ms");
        assert_eq!(duration(59.96), "1 min 00 s");
        assert_eq!(duration(185.2), "3 min 05 s");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_250_000), "1.2 MB");
    }

    #[test]
    fn control_sequences_are_stripped() {
        assert_eq!(clean("a\x1b[31mb\n"), "a[31mb\n");
    }
}
