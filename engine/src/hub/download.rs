//! Brings files of a commit: a few at once, each resumed where it broke off, checked by length and
//! by sha before it gets its name.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::api::{Client, Meta, text_of};
use super::store::{Store, cannot};
use super::{Error, Kind, Work, short};

/// Files at once.
const AT_ONCE: usize = 4;
/// How often a person hears how far it is.
const TELL_EVERY: Duration = Duration::from_secs(10);
/// A try that brought so much counts as a new beginning.
const PROGRESS: u64 = 8 << 20;

/// Fetches those of `names` that are not here.
pub fn files(
    client: &Client<'_>,
    store: &Store,
    commit: &str,
    names: &[String],
    work: &Work<'_>,
) -> Result<(), Error> {
    let missing: Vec<&String> =
        names.iter().filter(|name| store.bytes_of(commit, name).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    store.prepare()?;
    let metas = each(client, &missing, &|name: &&String| client.meta(commit, name), &|| {})?;
    let total: u64 = metas.iter().fold(0, |sum, meta| sum.saturating_add(meta.size));
    let reference = client.reference();
    let started = Instant::now();
    (work.say)(format!(
        "fetching `{reference}` (commit {}): {} files, {} MB from {}",
        short(commit),
        missing.len(),
        megabytes(total),
        client.host()
    ));
    let here = AtomicU64::new(0);
    let wanted: Vec<(&String, Meta)> = missing.into_iter().zip(metas).collect();
    let fetch = |(name, meta): &(&String, Meta)| one(client, store, commit, name, meta, &here);
    each(client, &wanted, &fetch, &|| {
        let done = here.load(Ordering::Relaxed);
        let (done, all) = (megabytes(done), megabytes(total));
        (work.say)(format!("fetching `{reference}`: {done} of {all} MB"));
    })?;
    let seconds = started.elapsed().as_secs_f64();
    (work.say)(format!("fetched `{reference}`: {} MB in {seconds:.1} s", megabytes(total)));
    Ok(())
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

/// Does `work` for each item, a few at once; the first error ends it. `tell` is called now and then.
fn each<T: Sync, R: Send>(
    client: &Client<'_>,
    items: &[T],
    work: &(dyn Fn(&T) -> Result<R, Error> + Sync),
    tell: &dyn Fn(),
) -> Result<Vec<R>, Error> {
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Option<R>>> = Mutex::new(items.iter().map(|_| None).collect());
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    std::thread::scope(|scope| {
        let (alive, ended) = channel::<()>();
        for _ in 0..AT_ONCE.min(items.len()) {
            let (alive, next, results, failed) = (alive.clone(), &next, &results, &failed);
            scope.spawn(move || {
                let _alive = alive;
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(at).filter(|_| !client.stopped()) else { break };
                    match work(item) {
                        Ok(result) => locked(results)[at] = Some(result),
                        Err(error) => {
                            locked(failed).get_or_insert(error);
                            client.fail();
                            break;
                        }
                    }
                }
            });
        }
        drop(alive);
        while ended.recv_timeout(TELL_EVERY) == Err(RecvTimeoutError::Timeout) {
            tell();
        }
    });
    match failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(error) => Err(error),
        None if client.stopped() => Err(Error::stopped()),
        None => Ok(results
            .into_inner()
            .unwrap_or_else(|e| e.into_inner())
            .into_iter()
            .flatten()
            .collect()),
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Brings one file, unless its bytes are here under another name or come by another process.
fn one(
    client: &Client<'_>,
    store: &Store,
    commit: &str,
    name: &str,
    meta: &Meta,
    here: &AtomicU64,
) -> Result<(), Error> {
    let _lock = store.lock(&meta.etag, &|| client.stopped())?;
    let blob = store.blob(&meta.etag);
    if blob.is_file() {
        here.fetch_add(meta.size, Ordering::Relaxed);
    } else {
        let partial = store.partial(&meta.etag);
        whole(client, commit, name, meta, &partial, here)?;
        fs::rename(&partial, &blob).map_err(|e| cannot("name", &blob, &e))?;
    }
    store.link(commit, name, &meta.etag)
}

/// Makes the partial file whole and checks it.
fn whole(
    client: &Client<'_>,
    commit: &str,
    name: &str,
    meta: &Meta,
    path: &Path,
    here: &AtomicU64,
) -> Result<(), Error> {
    let mut partial = Partial::open(path, meta)?;
    here.fetch_add(partial.len, Ordering::Relaxed);
    let mut found = partial.len;
    loop {
        let settings = client.settings();
        let (mut tried, mut pause, mut most) = (0, settings.pause, partial.len);
        while partial.len < meta.size {
            let error = match stream(client, commit, name, &mut partial, here) {
                Ok(()) => continue,
                Err(error) => error,
            };
            tried += 1;
            if partial.len >= most.saturating_add(PROGRESS) {
                (tried, pause, most) = (1, settings.pause, partial.len);
            }
            match error.again {
                Some(wait) if tried < settings.tries => {
                    client.sleep(wait.unwrap_or(pause).min(Duration::from_secs(120)))?;
                    pause *= 2;
                }
                _ => return Err(error),
            }
        }
        let Some(wrong) = partial.finish()? else { return Ok(()) };
        partial.clear(here)?;
        // What an earlier run left may have been the damage; what came fresh is the hub's.
        if std::mem::take(&mut found) == 0 {
            return Err(client.odd(name, &format!("with other bytes than it announces: {wrong}")));
        }
    }
}

/// Adds what one answer brings.
fn stream(
    client: &Client<'_>,
    commit: &str,
    name: &str,
    partial: &mut Partial<'_>,
    here: &AtomicU64,
) -> Result<(), Error> {
    let mut response = client.bytes(commit, name, partial.len)?;
    let start = match response.status().as_u16() {
        206 => {
            let range = text_of(&response, "content-range").and_then(|r| r.strip_prefix("bytes "));
            range.and_then(|r| r.split('-').next()?.trim().parse().ok())
        }
        _ => Some(0u64),
    };
    if start != Some(partial.len) {
        partial.clear(here)?;
        if start != Some(0) || response.status() == 416 {
            let text = format!("`{}`: {} gives another range", client.reference(), client.host());
            return Err(Error::new(Kind::Unreachable, text).again(Some(Duration::ZERO)));
        }
    }
    let mut reader = response.body_mut().as_reader();
    let mut buffer = vec![0; 256 << 10];
    while partial.len < partial.meta.size {
        if client.stopped() {
            return Err(Error::stopped());
        }
        let n = match reader.read(&mut buffer) {
            Ok(0) => {
                let (have, all) = (partial.len, partial.meta.size);
                return Err(client.broken(&format!("`{name}` after {have} of {all} bytes")));
            }
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(client.broken(&format!("`{name}`: {e}"))),
        };
        if n as u64 > partial.meta.size - partial.len {
            partial.clear(here)?;
            let size = partial.meta.size;
            return Err(client.odd(name, &format!("with more than the {size} bytes it announces")));
        }
        partial.add(&buffer[..n])?;
        here.fetch_add(n as u64, Ordering::Relaxed);
    }
    Ok(())
}

/// Bytes on their way, hashed as they come.
struct Partial<'a> {
    path: &'a Path,
    meta: &'a Meta,
    file: File,
    len: u64,
    sum: Sum,
}

/// What an etag is a sum of.
enum Sum {
    Sha256(Sha256),
    /// As git names a file: a header before the bytes.
    Git(Sha1),
    None,
}

impl Sum {
    fn of(meta: &Meta) -> Sum {
        let hex = meta.etag.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match meta.etag.len() {
            64 if hex => Sum::Sha256(Sha256::new()),
            40 if hex => {
                Sum::Git(Sha1::new_with_prefix(format!("blob {}\0", meta.size).as_bytes()))
            }
            _ => Sum::None,
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        match self {
            Sum::Sha256(sum) => sum.update(bytes),
            Sum::Git(sum) => sum.update(bytes),
            Sum::None => {}
        }
    }

    fn text(&self) -> Option<String> {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect();
        match self {
            Sum::Sha256(sum) => Some(hex(&sum.clone().finalize())),
            Sum::Git(sum) => Some(hex(&sum.clone().finalize())),
            Sum::None => None,
        }
    }
}

impl<'a> Partial<'a> {
    /// Takes up what there is; more than the whole is nothing.
    fn open(path: &'a Path, meta: &'a Meta) -> Result<Partial<'a>, Error> {
        let file = OpenOptions::new().read(true).append(true).create(true).open(path);
        let file = file.map_err(|e| cannot("open", path, &e))?;
        let mut partial = Partial { path, meta, file, len: 0, sum: Sum::of(meta) };
        let mut buffer = vec![0; 256 << 10];
        loop {
            match partial.file.read(&mut buffer).map_err(|e| cannot("read", path, &e))? {
                0 => break,
                n => {
                    partial.sum.add(&buffer[..n]);
                    partial.len += n as u64;
                }
            }
        }
        if partial.len > meta.size {
            partial.empty()?;
        }
        Ok(partial)
    }

    fn add(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(|e| cannot("write", self.path, &e))?;
        self.sum.add(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    fn empty(&mut self) -> Result<(), Error> {
        self.file.set_len(0).map_err(|e| cannot("empty", self.path, &e))?;
        (self.len, self.sum) = (0, Sum::of(self.meta));
        Ok(())
    }

    /// Starts over.
    fn clear(&mut self, here: &AtomicU64) -> Result<(), Error> {
        here.fetch_sub(self.len, Ordering::Relaxed);
        self.empty()
    }

    /// Brings the bytes to the disk. The sum they have, if it is not their name.
    fn finish(&mut self) -> Result<Option<String>, Error> {
        match self.sum.text() {
            Some(sum) if sum != self.meta.etag => {
                Ok(Some(format!("{sum} and not {}", self.meta.etag)))
            }
            _ => {
                self.file.sync_data().map_err(|e| cannot("sync", self.path, &e))?;
                Ok(None)
            }
        }
    }
}
