//! What `stat` says of a file, and when that may stand for its content. Knows no index.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Device, inode, size and both times of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub dev: u64,
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// Nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Nanoseconds since 1970.
    pub ctime_ns: i64,
}

/// Two edits within one tick of a file system's clock look alike, so a file this young proves
/// nothing (2 s is the tick of the coarsest file systems).
pub(crate) const RACY: Duration = Duration::from_secs(2);

impl Stamp {
    /// What `meta` says.
    pub fn of(meta: &Metadata) -> Stamp {
        let ns = |secs: i64, ns: i64| secs.saturating_mul(1_000_000_000).saturating_add(ns);
        Stamp {
            dev: meta.dev(),
            ino: meta.ino(),
            size: meta.size(),
            mtime_ns: ns(meta.mtime(), meta.mtime_nsec()),
            ctime_ns: ns(meta.ctime(), meta.ctime_nsec()),
        }
    }

    /// As [`Stamp::of`].
    #[allow(clippy::unnecessary_cast, reason = "the types are the platform's")]
    pub(crate) fn of_stat(stat: &rustix::fs::Stat) -> Stamp {
        let ns = |secs: i64, ns: i64| secs.saturating_mul(1_000_000_000).saturating_add(ns);
        Stamp {
            dev: stat.st_dev as u64,
            ino: stat.st_ino as u64,
            size: stat.st_size as u64,
            mtime_ns: ns(stat.st_mtime as i64, stat.st_mtime_nsec as i64),
            ctime_ns: ns(stat.st_ctime as i64, stat.st_ctime_nsec as i64),
        }
    }

    /// Whether an edit at `now` would surely change this stamp. A time in the future never settles.
    pub fn settled(&self, now: SystemTime) -> bool {
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let edge = since.saturating_sub(RACY).as_nanos() as i128;
        (self.mtime_ns as i128) < edge && (self.ctime_ns as i128) < edge
    }

    /// The numbers as bytes.
    pub fn bytes(&self) -> [u8; 40] {
        let mut all = [0; 40];
        let words = [self.dev, self.ino, self.size, self.mtime_ns as u64, self.ctime_ns as u64];
        for (part, word) in all.chunks_exact_mut(8).zip(words) {
            part.copy_from_slice(&word.to_le_bytes());
        }
        all
    }

    /// And back.
    pub fn from_bytes(bytes: [u8; 40]) -> Stamp {
        let word = |n: usize| std::array::from_fn(|i| bytes[8 * n + i]);
        Stamp {
            dev: u64::from_le_bytes(word(0)),
            ino: u64::from_le_bytes(word(1)),
            size: u64::from_le_bytes(word(2)),
            mtime_ns: i64::from_le_bytes(word(3)),
            ctime_ns: i64::from_le_bytes(word(4)),
        }
    }
}
