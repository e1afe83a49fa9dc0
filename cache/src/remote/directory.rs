//! A directory, perhaps on a shared file system, as a [`Transport`]. Objects get their name by a
//! rename or a link and are durable before; nobody sees half of one.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream;
use rustix::fs::OFlags;
use tokio::time::timeout;

use crate::layout::unique;
use crate::remote::transport::{Body, Fault, Piece, Put, Transport, Upload};

/// So much is read at once.
const CHUNK: u64 = 1 << 20;
/// Where objects are that are not whole yet.
const TMP: &str = "tmp";

/// Nobody goes on with something this old.
const OLD: Duration = Duration::from_secs(14 * 86_400);

/// A directory that holds a remote.
#[derive(Debug, Clone)]
pub(super) struct Directory {
    root: PathBuf,
    /// How long one call of the file system may take. A network file system may hang for ever; the
    /// thread that asked it then stays behind.
    limit: Duration,
}

impl Directory {
    pub fn new(root: PathBuf, limit: Duration) -> Directory {
        Directory { root, limit }
    }

    /// Below the root, whatever the name.
    fn path(&self, name: &str) -> Result<PathBuf, Fault> {
        let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains('\0');
        if !name.split('/').all(plain) {
            return Err(Fault::Refused(format!("`{name}` is no name of an object")));
        }
        Ok(self.root.join(name))
    }

    fn tmp(&self, id: &str) -> Result<PathBuf, Fault> {
        if id.is_empty() || id.contains('/') || id.starts_with('.') {
            return Err(Fault::Absent);
        }
        self.path(&format!("{TMP}/{id}"))
    }

    /// The root itself is never made: a file system that is not mounted is a fault and no empty
    /// remote.
    fn make_parent(&self, path: &Path) -> io::Result<()> {
        let parent = path.parent().unwrap_or(&self.root);
        if parent.is_dir() {
            return Ok(());
        }
        fs::metadata(&self.root)?;
        fs::create_dir_all(parent)
    }

    fn write(&self, path: &Path, bytes: &[u8], put: Put) -> io::Result<()> {
        let tmp = self.root.join(TMP).join(unique_here());
        self.make_parent(&tmp)?;
        let mut file = File::create_new(&tmp)?;
        let written = file.write_all(bytes).and_then(|()| seal(&file));
        let named = written.and_then(|()| self.name(&tmp, path, put));
        if named.is_err() || put == Put::New {
            let _ = fs::remove_file(&tmp);
        }
        named
    }

    fn name(&self, tmp: &Path, path: &Path, put: Put) -> io::Result<()> {
        self.make_parent(path)?;
        match put {
            Put::Over => fs::rename(tmp, path)?,
            Put::New => fs::hard_link(tmp, path)?,
        }
        // Best effort: some network file systems cannot sync a directory.
        let _ = path.parent().map(|dir| File::open(dir).and_then(|d| d.sync_all()));
        Ok(())
    }
}

/// A name that no other machine takes either.
fn unique_here() -> String {
    let mut random = [0; 8];
    let _ = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut random);
    format!("{}-{:016x}", unique(), u64::from_le_bytes(random))
}

/// Read-only and durable.
fn seal(file: &File) -> io::Result<()> {
    let mut permissions = file.metadata()?.permissions();
    permissions.set_readonly(true);
    file.set_permissions(permissions)?;
    file.sync_all()
}

fn open(path: &Path) -> io::Result<File> {
    // A name that is a link or a device is none of ours.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(ErrorKind::NotFound.into()) }
}

/// Adds the names below `root` of the files in `dir`, however deep. No link is followed.
fn files_below(root: &Path, dir: &Path, names: &mut Vec<String>) -> io::Result<()> {
    for item in fs::read_dir(dir)? {
        let item = item?;
        let (path, kind) = (item.path(), item.file_type()?);
        if kind.is_dir() {
            match files_below(root, &path, names) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
                _ => continue,
            }
        }
        let name = path.strip_prefix(root).ok().and_then(Path::to_str);
        names.extend(name.filter(|_| kind.is_file()).map(str::to_string));
    }
    Ok(())
}

fn fault(error: io::Error) -> Fault {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::IsADirectory => Fault::Absent,
        ErrorKind::AlreadyExists => Fault::Exists,
        ErrorKind::PermissionDenied
        | ErrorKind::ReadOnlyFilesystem
        | ErrorKind::StorageFull
        | ErrorKind::QuotaExceeded
        | ErrorKind::FileTooLarge
        | ErrorKind::InvalidInput => Fault::Refused(error.to_string()),
        _ if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => Fault::Absent,
        _ => Fault::Down(error.to_string()),
    }
}

/// Does `work` where it may block, and waits for so long.
async fn blocking<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Fault> {
    match timeout(limit, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(done)) => done.map_err(fault),
        Ok(Err(_)) => Err(Fault::Down("a thread died".to_string())),
        Err(_) => {
            let limit = limit.as_secs_f32();
            Err(Fault::Down(format!("the file system does not answer in {limit} s")))
        }
    }
}

impl Directory {
    /// Reads or writes. Where the root is not there, what is missing is not one object but all.
    async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, Fault> {
        let result = blocking(self.limit, work).await;
        let Err(Fault::Absent) = result else { return result };
        let root = self.root.clone();
        match blocking(self.limit, move || fs::metadata(root)).await {
            Ok(meta) if meta.is_dir() => Err(Fault::Absent),
            _ => Err(Fault::Down(format!(
                "there is no directory `{}`\nhint: make it, or mount what it is on",
                self.root.display()
            ))),
        }
    }
}

#[async_trait]
impl Transport for Directory {
    async fn head(&self, name: &str) -> Result<u64, Fault> {
        let path = self.path(name)?;
        self.ask(move || Ok(open(&path)?.metadata()?.len())).await
    }

    async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Body, Fault> {
        let path = self.path(name)?;
        let opened = self.ask(move || {
            let file = open(&path)?;
            let size = file.metadata()?.len();
            Ok((file, size))
        });
        let (file, size) = opened.await?;
        let limit = self.limit;
        let (start, end) = range.map_or((0, size), |r| (r.start, r.end.min(size)));
        let state = (Arc::new(file), start);
        let stream = stream::try_unfold(state, move |(file, at)| async move {
            if at >= end {
                return Ok(None);
            }
            let shared = file.clone();
            let piece = blocking(limit, move || {
                let mut buffer = vec![0; CHUNK.min(end - at) as usize];
                let n = shared.read_at(&mut buffer, at)?;
                buffer.truncate(n);
                Ok(Bytes::from(buffer))
            });
            let piece = piece.await?;
            let next = at + piece.len() as u64;
            Ok((!piece.is_empty()).then_some((piece, (file, next))))
        });
        Ok(Body { size, stream: stream.boxed() })
    }

    async fn put(&self, name: &str, bytes: Bytes, put: Put) -> Result<(), Fault> {
        let (this, path) = (self.clone(), self.path(name)?);
        self.ask(move || this.write(&path, &bytes, put)).await
    }

    async fn delete(&self, name: &str) -> Result<(), Fault> {
        let path = self.path(name)?;
        match self.ask(move || fs::remove_file(path)).await {
            Err(Fault::Absent) => Ok(()),
            result => result,
        }
    }

    async fn list(&self, dir: &str) -> Result<Vec<String>, Fault> {
        let path = self.path(dir)?;
        let root = self.root.clone();
        let listed = self.ask(move || {
            let mut names = Vec::new();
            files_below(&root, &path, &mut names)?;
            Ok(names)
        });
        match listed.await {
            Err(Fault::Absent) => Ok(Vec::new()),
            result => result,
        }
    }

    async fn begin(&self, _name: &str) -> Result<String, Fault> {
        let id = unique_here();
        let (this, path) = (self.clone(), self.tmp(&id)?);
        let made = self.ask(move || {
            this.make_parent(&path)?;
            File::create_new(path).map(drop)
        });
        made.await?;
        Ok(id)
    }

    async fn part(&self, upload: Upload<'_>, part: Piece) -> Result<String, Fault> {
        let path = self.tmp(upload.id)?;
        self.ask(move || {
            let file = OpenOptions::new().write(true).open(&path)?;
            file.write_all_at(&part.bytes, part.offset)?;
            Ok(part.bytes.len().to_string())
        })
        .await
    }

    async fn complete(&self, upload: Upload<'_>, parts: Vec<String>) -> Result<(), Fault> {
        let (this, tmp, path) = (self.clone(), self.tmp(upload.id)?, self.path(upload.name)?);
        let sizes = parts.iter().map(|size| size.parse::<u64>().ok());
        let bytes = sizes.sum::<Option<u64>>();
        self.ask(move || {
            let file = File::open(&tmp)?;
            if bytes != Some(file.metadata()?.len()) {
                return Err(ErrorKind::InvalidInput.into());
            }
            seal(&file)?;
            this.name(&tmp, &path, Put::Over)
        })
        .await
    }

    async fn tidy(&self) {
        let dir = self.root.join(TMP);
        let swept = blocking(self.limit, move || {
            for item in fs::read_dir(dir)?.flatten() {
                let age = item.metadata().and_then(|m| m.modified()).map(|time| time.elapsed());
                if age.is_ok_and(|age| age.is_ok_and(|age| age > OLD)) {
                    let _ = fs::remove_file(item.path());
                }
            }
            Ok(())
        });
        let _ = swept.await;
    }

    async fn abort(&self, upload: Upload<'_>) -> Result<(), Fault> {
        let path = self.tmp(upload.id)?;
        match self.ask(move || fs::remove_file(path)).await {
            Err(Fault::Absent) => Ok(()),
            result => result,
        }
    }
}
