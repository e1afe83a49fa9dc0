//! What must not be shown: values of credentials, taken out of every text that leaves the remote.
//! Knows no store.

use std::fmt;

/// Shorter values would tear holes into ordinary words.
const SHORTEST: usize = 6;

/// Secret values of one remote. Its `Debug` shows how many.
#[derive(Clone, Default)]
pub(super) struct Secrets(Vec<String>);

impl Secrets {
    pub fn add(&mut self, value: &str) {
        for line in value.lines().map(str::trim).filter(|line| line.len() >= SHORTEST) {
            if !self.0.iter().any(|known| known == line) {
                self.0.push(line.to_string());
            }
        }
        // Longer ones first, so that one which contains another goes as a whole.
        self.0.sort_by_key(|value| std::cmp::Reverse(value.len()));
    }

    /// `text` with every secret replaced.
    pub fn scrub(&self, text: impl Into<String>) -> String {
        self.0.iter().fold(text.into(), |text, secret| {
            if text.contains(secret) { text.replace(secret, "***") } else { text }
        })
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secrets({})", self.0.len())
    }
}
