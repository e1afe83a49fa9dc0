//! One object, from a remote to this machine: in pieces, several at once, hashed as they come, and
//! never under its name before its digest was right. What has come is kept in `staging/` under the
//! digest, so that a later try, also of another process, goes on there.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use rustix::fs::{FlockOperation, flock};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;

use crate::cache::Cache;
use crate::crash_point;
use crate::digest::Digest;
use crate::error::At;
use crate::layout::unique;
use crate::recipe::Part;
use crate::remote::artifact::has_object;
use crate::remote::buffers::Buffer;
use crate::remote::inner::{Inner, blocking};
use crate::remote::patience::Patience;
use crate::remote::progress::Progress;
use crate::remote::subtree::{Node, join};
use crate::remote::transport::Fault;
use crate::remote::{Trouble, layout};
use crate::store;
use crate::tree::Kind;

/// Pieces are of this size. A power of two, for the hash.
pub(super) const PIECE: u64 = 8 << 20;
/// Pieces of one object on their way at once.
const AHEAD: usize = 4;
/// How often it is looked whether somebody else has brought an object.
const LOOK: Duration = Duration::from_millis(50);

/// What all objects of one transfer share.
#[derive(Clone)]
pub(super) struct Transfer {
    pub inner: Arc<Inner>,
    pub cache: Cache,
    pub progress: Progress,
    pub patience: Arc<Patience>,
}

/// Where an object's bytes go.
#[derive(Debug, Clone)]
pub(super) enum Sink {
    /// Under its name in the cache.
    Cache,
    /// Into a new file that is the caller's.
    File(PathBuf),
}

/// A partial object, locked. Its name ends with the first success or damage.
struct Partial {
    path: PathBuf,
    file: Arc<File>,
}

impl Transfer {
    /// Brings one object; the bytes moved over the network.
    pub async fn bring(&self, part: Part, sink: &Sink) -> Result<u64, Trouble> {
        let mut moved = 0;
        for last in [false, true] {
            let partial = match self.partial(&part).await? {
                Some(partial) => partial,
                None if matches!(sink, Sink::Cache) => {
                    self.progress.moved(part.bytes);
                    return Ok(moved);
                }
                None => self.own_partial()?,
            };
            let path = partial.path.clone();
            match self.fill(&part, &partial, &mut moved).await {
                Ok(()) => {
                    self.finish(&part, partial, sink).await?;
                    self.inner.set_damaged(&part.digest, false);
                    return Ok(moved);
                }
                Err(Trouble::Damaged { what, .. }) => {
                    let _ = fs::remove_file(path);
                    self.progress.undo(part.bytes);
                    self.damaged(&part.digest, &what, last)?;
                }
                Err(other) => return Err(other),
            }
        }
        unreachable!("the last damage is an error")
    }

    /// Tells of damage; an error when there is no other try.
    fn damaged(&self, digest: &Digest, what: &str, last: bool) -> Result<(), Trouble> {
        let (remote, digest, what) = (self.inner.name.clone(), *digest, what.to_string());
        let damaged = Trouble::Damaged { remote, digest, what };
        self.cache.report(damaged.to_string());
        if !last {
            return Ok(());
        }
        self.inner.set_damaged(&digest, true);
        Err(damaged)
    }

    /// The partial object, once nobody else has it; none when its bytes got there meanwhile.
    async fn partial(&self, part: &Part) -> Result<Option<Partial>, Trouble> {
        let path = self.cache.layout().dir("staging").join(format!("fetch-{}", part.digest));
        let (mut size, mut since) = (0, Instant::now());
        loop {
            let locked = lock(&path).at("open", &path)?;
            if has_object(&self.cache, part) {
                if locked.is_some() {
                    let _ = fs::remove_file(&path);
                }
                return Ok(None);
            }
            if let Some(file) = locked {
                return Ok(Some(Partial { path, file: Arc::new(file) }));
            }
            // Whoever has it may be frozen.
            let now = fs::metadata(&path).map_or(0, |meta| meta.len());
            if now != size {
                (size, since) = (now, Instant::now());
            } else if since.elapsed() > self.inner.settings.timeouts.stall {
                return Ok(Some(self.own_partial()?));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn own_partial(&self) -> Result<Partial, Trouble> {
        let path = self.cache.layout().dir("staging").join(format!("fetch-{}", unique()));
        let file = lock(&path).at("create", &path)?.expect("a name nobody else has");
        Ok(Partial { path, file: Arc::new(file) })
    }

    /// Completes a partial object and compares its digest.
    async fn fill(&self, part: &Part, partial: &Partial, moved: &mut u64) -> Result<(), Trouble> {
        let mut nodes = self.resume(part, partial).await?;
        self.progress.moved((nodes.len() as u64 * PIECE).min(part.bytes));
        let pieces = part.bytes.div_ceil(PIECE) as usize;
        let (mut running, mut next) = (JoinSet::new(), nodes.len());
        let mut waiting = BTreeMap::new();
        while nodes.len() < pieces {
            while next < pieces && running.len() + waiting.len() < AHEAD {
                // What has come takes room until it is written, which is done below.
                let wait = running.is_empty() && waiting.is_empty();
                let size = PIECE.min(part.bytes - next as u64 * PIECE);
                let Some(room) = self.inner.room(size, wait).await else { break };
                running.spawn(self.clone().piece(*part, next as u64, room));
                next += 1;
            }
            let done = running.join_next().await.expect("a piece is missing");
            let piece = done.map_err(|e| self.inner.unavailable(e.to_string()))??;
            waiting.insert(piece.index, piece);
            while let Some(piece) = waiting.remove(&(nodes.len() as u64)) {
                nodes.push(piece.node);
                *moved += piece.bytes.len() as u64;
                self.write(partial, piece).await?;
                crash_point!("fetch.after-piece");
            }
        }
        if nodes.is_empty() {
            nodes.push(Node::of(0, 0, []));
        }
        let found = join(&nodes, PIECE, part.bytes);
        if found == part.digest {
            return Ok(());
        }
        let what = format!("their digest is `{found}`");
        Err(Trouble::Damaged { remote: self.inner.name.clone(), digest: part.digest, what })
    }

    /// Hashes what a partial object has of whole pieces, and cuts off the rest.
    async fn resume(&self, part: &Part, partial: &Partial) -> Result<Vec<Node>, Trouble> {
        let (file, total, path) = (partial.file.clone(), part.bytes, partial.path.clone());
        let hash = move || -> io::Result<Vec<Node>> {
            let size = file.metadata()?.len();
            let whole = match size.cmp(&total) {
                Ordering::Less => size / PIECE,
                Ordering::Equal => total.div_ceil(PIECE),
                Ordering::Greater => 0,
            };
            let mut buffer = Vec::new();
            let nodes = (0..whole).map(|index| {
                let at = index * PIECE;
                buffer.resize(PIECE.min(total - at) as usize, 0);
                file.read_exact_at(&mut buffer, at)?;
                Ok(Node::of(at, total, [&buffer[..]]))
            });
            let nodes = nodes.collect::<io::Result<Vec<_>>>()?;
            file.set_len((whole * PIECE).min(total))?;
            Ok(nodes)
        };
        Ok(blocking(hash).await.at("read", &path)?)
    }

    async fn write(&self, partial: &Partial, piece: Piece) -> Result<(), Trouble> {
        let file = partial.file.clone();
        let write = move || file.write_all_at(&piece.bytes, piece.index * PIECE);
        Ok(blocking(write).await.at("write", &partial.path)?)
    }

    /// Gives whole bytes their place. They are not made durable, which would take longer than the
    /// transfer: nobody believes bytes after a loss of power without hashing them.
    async fn finish(&self, part: &Part, partial: Partial, sink: &Sink) -> Result<(), Trouble> {
        let (cache, digest, sink) = (self.cache.clone(), part.digest, sink.clone());
        let place = move || -> crate::Result<()> {
            let Partial { path, file } = &partial;
            file.set_permissions(Permissions::from_mode(0o444)).at("set the mode of", path)?;
            crash_point!("fetch.before-place");
            match sink {
                Sink::Cache => store::place(cache.layout(), path, &digest, Kind::File)?,
                Sink::File(to) => fs::rename(path, &to).at("create", &to)?,
            }
            crash_point!("fetch.after-place");
            Ok(())
        };
        Ok(blocking(place).await?)
    }

    /// One piece, tried for as long as patience lasts; what has come of it is not asked for again.
    async fn piece(
        self,
        part: Part,
        index: u64,
        room: OwnedSemaphorePermit,
    ) -> Result<Piece, Trouble> {
        let (start, end) = (index * PIECE, ((index + 1) * PIECE).min(part.bytes));
        let patience = self.patience.clone();
        let mut tries = patience.tries();
        // One buffer, since neither the hash nor the disk likes crumbs.
        let (mut bytes, mut at) = (self.inner.buffers.take((end - start) as usize), start);
        while at < end {
            match self.stream(&part, at..end, &mut bytes).await {
                Ok(None) => at = end,
                Ok(Some(size)) => return Err(self.wrong_size(&part, size)),
                Err(Fault::Absent) => {
                    self.inner.forget(&part.digest);
                    let remote = self.inner.name.clone();
                    return Err(Trouble::Missing { remote, digest: part.digest });
                }
                Err(fault) => {
                    let now = start + bytes.len() as u64;
                    if now > at {
                        tries.moved();
                    }
                    at = now;
                    if let Err(fault) = tries.again(fault).await {
                        return Err(self.given_up(&part, fault).await);
                    }
                }
            }
        }
        tries.moved();
        let hash = move || (Node::of(start, part.bytes, [&bytes[..]]), bytes);
        let (node, bytes) = blocking(hash).await;
        Ok(Piece { index, node, bytes, _room: room })
    }

    /// A range that is refused may be one that a shorter object does not have.
    async fn given_up(&self, part: &Part, fault: Fault) -> Trouble {
        if let Fault::Refused(_) = fault
            && let Ok(Some(size)) = self.inner.head(&layout::object(&part.digest)).await
            && size != part.bytes
        {
            return self.wrong_size(part, size);
        }
        self.inner.trouble(fault)
    }

    fn wrong_size(&self, part: &Part, size: u64) -> Trouble {
        let what = format!("there are {size} of {} bytes", part.bytes);
        Trouble::Damaged { remote: self.inner.name.clone(), digest: part.digest, what }
    }

    /// Appends what comes of `range`; gives the object's size when it is not what it should be.
    async fn stream(
        &self,
        part: &Part,
        range: Range<u64>,
        bytes: &mut Vec<u8>,
    ) -> Result<Option<u64>, Fault> {
        let whole = range == (0..part.bytes);
        let mut left = range.end - range.start;
        let asked = if whole { None } else { Some(range) };
        let mut body = self.inner.transport.get(&layout::object(&part.digest), asked).await?;
        if body.size != part.bytes {
            return Ok(Some(body.size));
        }
        while left > 0 {
            let Some(mut piece) = body.stream.next().await.transpose()? else {
                return Err(Fault::Down("the answer was cut off".to_string()));
            };
            piece.truncate(left as usize);
            left -= piece.len() as u64;
            self.progress.moved(piece.len() as u64);
            bytes.extend_from_slice(&piece);
        }
        Ok(None)
    }
}

/// A piece that has come. It takes room until its bytes are written.
struct Piece {
    index: u64,
    node: Node,
    bytes: Buffer,
    _room: OwnedSemaphorePermit,
}

/// Opens and locks `path`, made when it is not there; none when somebody else has the lock.
fn lock(path: &Path) -> io::Result<Option<File>> {
    loop {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
        let file = match options.open(path) {
            // Somebody has just made it whole, or left it so when it was killed.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                fs::set_permissions(path, Permissions::from_mode(0o600))?;
                continue;
            }
            result => result?,
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            result => result?,
        }
        let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
        if fs::symlink_metadata(path).map(id).ok() == Some(id(file.metadata()?)) {
            return Ok(Some(file));
        }
    }
}
