//! The SQLite index: a copy of the entries, and what files were last time. Knows nothing that the
//! entry files and the files themselves do not know better: it may be deleted at any time.
//!
//! A row stands for an entry file only while `stat` of that file says what it said when the row was
//! made, so no order between files and rows has to be kept, and an entry removed or replaced by
//! anybody is never served from here. Any failure means "not in the index".

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{
    Connection, ErrorCode, OptionalExtension, Row as SqlRow, Transaction, TransactionBehavior,
    params,
};

use crate::bytes::Seen;
use crate::crash_point;
use crate::digest::{Digest, Key};
use crate::layout::Layout;
use crate::loss;
use crate::place;
use crate::stat::Stamp;

/// Part of the file name: builds with another schema have an index of their own.
const SCHEMA: u32 = 2;

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS entries (
        key BLOB NOT NULL UNIQUE, stage TEXT NOT NULL, step TEXT NOT NULL,
        created INTEGER NOT NULL, seconds REAL NOT NULL, last_used INTEGER NOT NULL,
        stamp BLOB NOT NULL, text TEXT NOT NULL) STRICT;
    CREATE INDEX IF NOT EXISTS by_stage ON entries (stage, created);
    CREATE TABLE IF NOT EXISTS files (
        path BLOB NOT NULL PRIMARY KEY, stamp BLOB NOT NULL, digest BLOB NOT NULL,
        checksum BLOB NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS objects (
        digest BLOB NOT NULL PRIMARY KEY, seen BLOB NOT NULL, checksum BLOB NOT NULL)
        STRICT, WITHOUT ROWID;";

/// So many bytes of SQLite's log the next process reads in less than a millisecond.
const LITTLE: u64 = 512 << 10;

/// An entry's row.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub key: Key,
    pub stage: String,
    pub step: String,
    /// Nanoseconds since 1970.
    pub created: i64,
    pub seconds: f64,
    /// Seconds since 1970.
    pub last_used: i64,
    /// Of the entry file.
    pub stamp: Stamp,
    /// The entry file's whole text, checksum included.
    pub text: String,
}

/// One connection, shared by threads.
#[derive(Debug)]
pub(crate) struct Index {
    path: PathBuf,
    connection: Mutex<Connection>,
    dead: AtomicBool,
    wrote: AtomicBool,
}

impl Index {
    /// Opens the newest index in `dir`, or makes one. `None` where SQLite cannot work.
    pub fn open(layout: &Layout) -> Option<Index> {
        let dir = &place::index(layout.root(), layout.dir("index"), layout.lives().is_some())?;
        // Once more when a damaged one is put away, or when another process makes it just now.
        (0..4).find_map(|attempt| {
            std::thread::sleep(Duration::from_millis(5 * attempt));
            let path = current(dir);
            // SQLite gives the files beside it the mode of this one.
            layout.open_file(&path, false).ok()?;
            match connect(&path).and_then(|c| c.execute_batch(TABLES).map(|()| c)) {
                Ok(connection) => Some(Index {
                    path,
                    connection: Mutex::new(connection),
                    dead: AtomicBool::new(false),
                    wrote: AtomicBool::new(false),
                }),
                Err(error) => {
                    if damaged(&error) {
                        retire(&path);
                    }
                    None
                }
            }
        })
    }

    /// A second connection with a view that does not change, for many lookups.
    pub fn snapshot(&self) -> Option<Connection> {
        if self.dead.load(Ordering::Relaxed) {
            return None;
        }
        let connection = connect(&self.path).ok()?;
        connection.execute_batch("BEGIN").ok()?;
        Some(connection)
    }

    /// Runs `f`; `None` when it fails. An index found damaged is put away and not asked again.
    fn run<T>(&self, f: impl FnOnce(&mut Connection) -> rusqlite::Result<T>) -> Option<T> {
        if self.dead.load(Ordering::Relaxed) {
            return None;
        }
        let mut connection = self.connection.lock().unwrap_or_else(|e| e.into_inner());
        match f(&mut connection) {
            Ok(value) => Some(value),
            Err(error) => {
                if damaged(&error) && !self.dead.swap(true, Ordering::Relaxed) {
                    retire(&self.path);
                }
                None
            }
        }
    }

    /// Runs `f` in a transaction that writes.
    fn write(&self, f: impl FnOnce(&Transaction) -> rusqlite::Result<()>) -> Option<()> {
        self.wrote.store(true, Ordering::Relaxed);
        self.run(|connection| {
            let all = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            f(&all)?;
            crash_point!("index.before-commit");
            all.commit()
        })?;
        loss::wrote(&beside(&self.path, "-wal"));
        crash_point!("index.after-commit");
        Some(())
    }

    pub fn put(&self, rows: &[Row]) -> Option<()> {
        self.write(|all| {
            let mut insert = all.prepare_cached(
                "INSERT OR REPLACE INTO entries VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            )?;
            for row in rows {
                insert.execute(params![
                    row.key.as_bytes(),
                    row.stage,
                    row.step,
                    row.created,
                    row.seconds,
                    row.last_used,
                    row.stamp.bytes(),
                    row.text
                ])?;
            }
            Ok(())
        })
    }

    pub fn delete(&self, keys: &[Key]) -> Option<()> {
        self.write(|all| {
            for key in keys {
                all.prepare_cached("DELETE FROM entries WHERE key = ?1")?
                    .execute([key.as_bytes()])?;
            }
            Ok(())
        })
    }

    /// Every key with a row.
    pub fn keys(&self) -> Option<Vec<Key>> {
        self.run(|connection| {
            connection
                .prepare_cached("SELECT key FROM entries")?
                .query_map([], |row| row.get(0).map(Key::from_bytes))?
                .collect()
        })
    }

    /// Keys of `stage`, those of `step` first, then the newest first.
    pub fn recent(&self, stage: &str, step: &str, limit: usize) -> Option<Vec<Key>> {
        self.run(|connection| {
            connection
                .prepare_cached(
                    "SELECT key FROM entries WHERE stage = ?1
                     ORDER BY step = ?2 DESC, created DESC LIMIT ?3",
                )?
                .query_map(params![stage, step, limit as i64], |row| {
                    row.get(0).map(Key::from_bytes)
                })?
                .collect()
        })
    }

    /// Steps and keys of `stage`, the newest first.
    pub fn keys_of(&self, stage: &str) -> Option<Vec<(String, Key)>> {
        self.run(|connection| {
            connection
                .prepare_cached(
                    "SELECT step, key FROM entries WHERE stage = ?1 ORDER BY created DESC",
                )?
                .query_map([stage], |row| Ok((row.get(0)?, Key::from_bytes(row.get(1)?))))?
                .collect()
        })
    }

    /// Sets the last use of `keys` where it is older than `before` (both seconds since 1970).
    pub fn touch(&self, keys: &[Key], now: i64, before: i64) -> Option<()> {
        self.write(|all| {
            let mut update = all.prepare_cached(
                "UPDATE entries SET last_used = ?2 WHERE key = ?1 AND last_used < ?3",
            )?;
            for key in keys {
                update.execute(params![key.as_bytes(), now, before])?;
            }
            Ok(())
        })
    }

    /// The last known use of every key, seconds since 1970, and the seconds its making took.
    pub fn uses(&self) -> Option<Vec<(Key, i64, f64)>> {
        self.run(|connection| {
            connection
                .prepare_cached("SELECT key, last_used, seconds FROM entries")?
                .query_map([], |row| Ok((Key::from_bytes(row.get(0)?), row.get(1)?, row.get(2)?)))?
                .collect()
        })
    }

    /// The digest a file had when it had this stamp.
    pub fn file(&self, path: &[u8], stamp: &Stamp) -> Option<Digest> {
        let (digest, checksum): ([u8; 32], [u8; 8]) = self.run(|connection| {
            connection
                .prepare_cached(
                    "SELECT digest, checksum FROM files WHERE path = ?1 AND stamp = ?2",
                )?
                .query_row(params![path, stamp.bytes()], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()
        })??;
        let digest = Digest::from_bytes(digest);
        (checksum == file_checksum(path, stamp, &digest)).then_some(digest)
    }

    pub fn put_files(&self, files: &[(Vec<u8>, Stamp, Digest)]) -> Option<()> {
        self.write(|all| {
            let mut insert =
                all.prepare_cached("INSERT OR REPLACE INTO files VALUES (?1, ?2, ?3, ?4)")?;
            for (path, stamp, digest) in files {
                let checksum = file_checksum(path, stamp, digest);
                insert.execute(params![path, stamp.bytes(), digest.as_bytes(), checksum])?;
            }
            Ok(())
        })
    }

    /// What `stat` said of the object `digest` when its bytes were right.
    pub fn object(&self, digest: &Digest) -> Option<Seen> {
        let (seen, checksum): (Seen, [u8; 8]) = self.run(|connection| {
            connection
                .prepare_cached("SELECT seen, checksum FROM objects WHERE digest = ?1")?
                .query_row([digest.as_bytes()], |row| Ok((row.get(0)?, row.get(1)?)))
                .optional()
        })??;
        (checksum == checksum_of(&[&seen, digest.as_bytes()])).then_some(seen)
    }

    pub fn put_objects(&self, objects: &[(Digest, Seen)]) -> Option<()> {
        self.write(|all| {
            let mut insert =
                all.prepare_cached("INSERT OR REPLACE INTO objects VALUES (?1, ?2, ?3)")?;
            for (digest, seen) in objects {
                let checksum = checksum_of(&[seen, digest.as_bytes()]);
                insert.execute(params![digest.as_bytes(), seen, checksum])?;
            }
            Ok(())
        })
    }
}

impl Drop for Index {
    /// Little is left in the log for later: to empty it takes two syncs, and two more to begin it anew.
    fn drop(&mut self) {
        let log = || fs::metadata(beside(&self.path, "-wal")).map_or(0, |log| log.len());
        if self.wrote.load(Ordering::Relaxed) && log() > LITTLE {
            // Fails when another process reads or writes; then that one does it.
            self.run(|c| {
                c.busy_timeout(Duration::ZERO)?;
                c.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
            });
        }
    }
}

/// The row of `key`: its stamp's bytes, text and last use.
pub(crate) fn row(connection: &Connection, key: &Key) -> rusqlite::Result<Option<RowHead>> {
    let read = |row: &SqlRow| {
        Ok(RowHead { stamp: row.get(0)?, text: row.get(1)?, last_used: row.get(2)? })
    };
    connection
        .prepare_cached("SELECT stamp, text, last_used FROM entries WHERE key = ?1")?
        .query_row([key.as_bytes()], read)
        .optional()
}

/// What a lookup needs of a [`Row`].
pub(crate) struct RowHead {
    pub stamp: [u8; 40],
    pub text: String,
    pub last_used: i64,
}

/// A damaged page must not vouch for a file.
fn file_checksum(path: &[u8], stamp: &Stamp, digest: &Digest) -> [u8; 8] {
    checksum_of(&[&stamp.bytes(), digest.as_bytes(), path])
}

fn checksum_of(parts: &[&[u8]]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    let hash = hasher.finalize();
    std::array::from_fn(|i| hash.as_bytes()[i])
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(Duration::from_secs(2))?;
    // A process that still has a put-away index open must not remove files at its end.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
    if mode != "wal" {
        return Err(rusqlite::Error::InvalidQuery);
    }
    connection.execute_batch("PRAGMA synchronous = NORMAL; PRAGMA cache_size = -16000;")?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(connection)
}

fn damaged(error: &rusqlite::Error) -> bool {
    use rusqlite::Error::{FromSqlConversionFailure, InvalidColumnType, SqliteFailure};
    match error {
        SqliteFailure(e, text) => {
            matches!(e.code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
                || text.as_ref().is_some_and(|t| t.starts_with("no such "))
        }
        InvalidColumnType(..) | FromSqlConversionFailure(..) => true,
        _ => false,
    }
}

/// `s<schema>-<n>.sqlite` with the greatest `n`: a name is never used again, so that nobody mixes
/// the files of two databases.
fn current(dir: &Path) -> PathBuf {
    let newest = fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|item| {
        let name = item.file_name().into_string().ok()?;
        let n = name.strip_prefix(&format!("s{SCHEMA}-"))?;
        n.strip_suffix(".sqlite")
            .or(n.strip_suffix(".retired"))?
            .parse::<u64>()
            .ok()
            .map(|n| if name.ends_with(".retired") { n + 1 } else { n })
    });
    dir.join(format!("s{SCHEMA}-{}.sqlite", newest.max().unwrap_or(1)))
}

/// Puts a damaged index away; an empty `.retired` keeps its number from being used again.
fn retire(path: &Path) {
    let _ = fs::write(path.with_extension("retired"), "");
    for suffix in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(beside(path, suffix));
        crash_point!("index.retiring");
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
