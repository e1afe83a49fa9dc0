//! How far a transfer is, to be read by another thread while it runs. Knows no transfer.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts of one transfer, or of several that are shown as one. Clones count together.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    total: AtomicU64,
    done: AtomicU64,
}

impl Progress {
    pub fn new() -> Progress {
        Progress::default()
    }

    /// Bytes to be moved, as far as is known yet.
    pub fn total(&self) -> u64 {
        self.counts.total.load(Ordering::Relaxed)
    }

    /// Bytes moved or found to be there; bytes that had to be moved again count once.
    pub fn done(&self) -> u64 {
        self.counts.done.load(Ordering::Relaxed).min(self.total())
    }

    pub(super) fn expect(&self, bytes: u64) {
        self.counts.total.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn moved(&self, bytes: u64) {
        self.counts.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// These bytes have to be moved again.
    pub(super) fn undo(&self, bytes: u64) {
        let less = |done: u64| Some(done.saturating_sub(bytes));
        let _ = self.counts.done.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }
}
