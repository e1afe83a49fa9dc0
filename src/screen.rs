//! A board below the lines that scroll: drawn on standard error at most ten times a second, taken away
//! before anything else is printed there. The size is asked at every draw.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use unicode_width::UnicodeWidthStr;

/// Between two draws when something changes, and when only time goes by.
const SOONEST: Duration = Duration::from_millis(100);
const LATEST: Duration = Duration::from_secs(1);

/// What draws the lines of a board for so many columns and lines.
type Lines = Box<dyn FnMut(usize, usize) -> Vec<String> + Send>;

/// The board that is shown now, for messages of whomever.
static SHOWN: Mutex<Option<Arc<Shared>>> = Mutex::new(None);

/// A board on the terminal, until it is dropped.
pub struct Screen {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    inner: Mutex<Inner>,
    wake: Condvar,
    changed: AtomicBool,
}

struct Inner {
    /// Columns of each line that is on the terminal now.
    drawn: Vec<usize>,
    ended: bool,
}

impl Screen {
    /// Whether standard error is a terminal that can be steered.
    pub fn possible() -> bool {
        size().is_some() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
    }

    /// Shows what `lines` draws.
    pub fn show(mut lines: Lines) -> Screen {
        let inner = Mutex::new(Inner { drawn: Vec::new(), ended: false });
        let shared =
            Arc::new(Shared { inner, wake: Condvar::new(), changed: AtomicBool::new(true) });
        let of_thread = shared.clone();
        let thread = std::thread::spawn(move || of_thread.go_on(&mut lines));
        *lock(&SHOWN) = Some(shared.clone());
        Screen { shared, thread: Some(thread) }
    }

    /// Says that the board has something new.
    pub fn touch(&self) {
        self.shared.changed.store(true, Ordering::Relaxed);
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        *lock(&SHOWN) = None;
        let mut inner = lock(&self.shared.inner);
        inner.ended = true;
        write(&inner.away());
        inner.drawn.clear();
        drop(inner);
        self.shared.wake.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Prints a line on standard error, above the board if there is one.
pub fn above(text: &str) {
    let shown = lock(&SHOWN).clone();
    let Some(shared) = shown else { return write(&format!("{text}\n")) };
    let mut inner = lock(&shared.inner);
    write(&format!("{}{text}\n", inner.away()));
    inner.drawn.clear();
    shared.changed.store(true, Ordering::Relaxed);
}

impl Shared {
    fn go_on(&self, lines: &mut Lines) {
        let mut last = Instant::now();
        let mut size_then = None;
        loop {
            let inner = lock(&self.inner);
            let waited = self.wake.wait_timeout(inner, SOONEST);
            let mut inner = waited.unwrap_or_else(PoisonError::into_inner).0;
            if inner.ended {
                return;
            }
            let now = size();
            let changed = self.changed.swap(false, Ordering::Relaxed) || now != size_then;
            if !changed && last.elapsed() < LATEST {
                continue;
            }
            (last, size_then) = (Instant::now(), now);
            let Some((columns, rows)) = now else { continue };
            let text = lines(columns, rows);
            // At once, for terminals that can.
            let mut out = String::from("\x1b[?2026h") + &inner.away();
            text.iter().for_each(|line| out += &format!("{line}\n"));
            inner.drawn = text.iter().map(|line| bare(line)).collect();
            write(&(out + "\x1b[?2026l"));
        }
    }
}

impl Inner {
    /// What takes the board away and leaves the cursor where it began. A terminal that became narrower
    /// has wrapped its lines.
    fn away(&self) -> String {
        let columns = size().map_or(80, |(columns, _)| columns.max(1));
        let rows: usize = self.drawn.iter().map(|width| width.div_ceil(columns).max(1)).sum();
        match rows {
            0 => String::new(),
            rows => format!("\r\x1b[{rows}A\x1b[J"),
        }
    }
}

/// Columns of a painted line.
fn bare(line: &str) -> usize {
    let mut text = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' => {
                let _ = chars.find(char::is_ascii_alphabetic);
            }
            c => text.push(c),
        }
    }
    text.width()
}

/// Columns and lines of standard error; `None` if it is no terminal.
fn size() -> Option<(usize, usize)> {
    let stderr = std::io::stderr();
    let size = rustix::termios::tcgetwinsize(&stderr).ok().filter(|_| stderr.is_terminal())?;
    let or = |n: u16, other: usize| if n == 0 { other } else { usize::from(n) };
    Some((or(size.ws_col, 80), or(size.ws_row, 24)))
}

fn write(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// A thread that panicked while it drew leaves nothing half done that matters.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paint_takes_no_columns() {
        assert_eq!(bare("\x1b[1;31mab\x1b[0m 教"), 5);
    }

    #[test]
    fn a_board_is_taken_away_whole() {
        let inner = Inner { drawn: vec![10, 0, 79], ended: false };
        // Not on a terminal here, so 80 columns.
        if size().is_none() {
            assert_eq!(inner.away(), "\r\x1b[3A\x1b[J");
            let wrapped = Inner { drawn: vec![81, 200], ended: false };
            assert_eq!(wrapped.away(), "\r\x1b[5A\x1b[J");
        }
        assert_eq!(Inner { drawn: Vec::new(), ended: false }.away(), "");
    }
}
