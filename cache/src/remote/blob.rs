//! One object, from a remote to this machine: in pieces, several at once, hashed as they come, and
//! never under its name before its digest was right. What has come is kept in `staging/` under the
//! digest, so that a later try, also of another process, goes on there.

use std::collections::{BTreeSet, VecDeque};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
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
use crate::remote::inner::{Inner, blocking};
use crate::remote::patience::Patience;
use crate::remote::progress::Progress;
use crate::remote::subtree::{Growing, Node, join};
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

/// A partial object, locked. Its name ends with the first success or damage. Pieces come in any
/// order; which are whole, a second file beside says, four bytes for each.
struct Partial {
    path: PathBuf,
    file: Arc<File>,
}

impl Partial {
    fn beside(&self) -> PathBuf {
        self.path.with_extension("done")
    }

    fn remove(&self) {
        let _ = fs::remove_file(self.beside());
        let _ = fs::remove_file(&self.path);
    }

    /// The pieces that are whole, as far as is known.
    fn done(&self) -> BTreeSet<u64> {
        let bytes = fs::read(self.beside()).unwrap_or_default();
        let (words, _cut) = bytes.as_chunks::<4>();
        words.iter().map(|word| u32::from_le_bytes(*word).into()).collect()
    }

    /// Notes a piece, after its bytes were written.
    fn note(&self, index: u64) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o600);
        options.open(self.beside())?.write_all(&(index as u32).to_le_bytes())
    }
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
            match self.fill(&part, &partial, &mut moved).await {
                Ok(()) => {
                    let beside = partial.beside();
                    self.finish(&part, partial, sink).await?;
                    let _ = fs::remove_file(beside);
                    self.inner.set_damaged(&part.digest, false);
                    return Ok(moved);
                }
                Err(Trouble::Damaged { what, .. }) => {
                    partial.remove();
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
        let (mut blocks, mut since) = (0, Instant::now());
        loop {
            let locked = lock(&path).at("open", &path)?;
            if has_object(&self.cache, part) {
                if let Some(file) = locked {
                    Partial { path, file: Arc::new(file) }.remove();
                }
                return Ok(None);
            }
            if let Some(file) = locked {
                return Ok(Some(Partial { path, file: Arc::new(file) }));
            }
            // Whoever has it may be frozen. Pieces come in any order, so the length tells nothing.
            let now = fs::metadata(&path).map_or(0, |meta| meta.blocks());
            if now != blocks {
                (blocks, since) = (now, Instant::now());
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
        let missing = (0..nodes.len() as u64).filter(|index| nodes[*index as usize].is_none());
        let mut missing: VecDeque<u64> = missing.collect();
        let size = |index: u64| PIECE.min(part.bytes - index * PIECE);
        self.progress.moved(part.bytes - missing.iter().map(|index| size(*index)).sum::<u64>());
        let mut running = JoinSet::new();
        while !missing.is_empty() || !running.is_empty() {
            while running.len() < AHEAD
                && let Some(&next) = missing.front()
            {
                let wait = running.is_empty();
                let Some(room) = self.inner.room(size(next), wait).await else { break };
                running.spawn(self.clone().piece(*part, next, partial.file.clone(), room));
                missing.pop_front();
            }
            let Some(done) = running.join_next().await else { continue };
            let (index, node) = done.map_err(|e| self.inner.unavailable(e.to_string()))??;
            nodes[index as usize] = Some(node);
            *moved += size(index);
            if nodes.len() > 1 {
                partial.note(index).at("write beside", &partial.path)?;
            }
            crash_point!("fetch.after-piece");
        }
        let mut nodes: Vec<Node> = nodes.into_iter().flatten().collect();
        if nodes.is_empty() {
            nodes.push(Node::of(0, 0, &[]));
        }
        let found = join(&nodes, PIECE, part.bytes);
        if found == part.digest {
            return Ok(());
        }
        let what = format!("their digest is `{found}`");
        Err(Trouble::Damaged { remote: self.inner.name.clone(), digest: part.digest, what })
    }

    /// What each piece adds to the digest, of those that an earlier try has left.
    async fn resume(&self, part: &Part, partial: &Partial) -> Result<Vec<Option<Node>>, Trouble> {
        let (file, total, path) = (partial.file.clone(), part.bytes, partial.path.clone());
        let (done, beside) = (partial.done(), partial.beside());
        let hash = move || -> io::Result<Vec<Option<Node>>> {
            let pieces = total.div_ceil(PIECE);
            let size = file.metadata()?.len();
            if size > total || size == 0 {
                // What is noted is of another file.
                let _ = fs::remove_file(beside);
                file.set_len(0)?;
            }
            let mut buffer = Vec::new();
            let mut nodes = vec![None; pieces as usize];
            for index in done.into_iter().filter(|index| *index < pieces) {
                let (at, end) = (index * PIECE, ((index + 1) * PIECE).min(total));
                if end <= size && size <= total {
                    buffer.resize((end - at) as usize, 0);
                    file.read_exact_at(&mut buffer, at)?;
                    nodes[index as usize] = Some(Node::of(at, total, &buffer));
                }
            }
            Ok(nodes)
        };
        Ok(blocking(hash).await.at("read", &path)?)
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
        file: Arc<File>,
        _room: OwnedSemaphorePermit,
    ) -> Result<(u64, Node), Trouble> {
        let (start, end) = (index * PIECE, ((index + 1) * PIECE).min(part.bytes));
        let patience = self.patience.clone();
        let mut tries = patience.tries();
        let mut growing = Growing::new(start, part.bytes);
        while start + growing.length() < end {
            let before = growing.length();
            let fault = match self.stream(&part, start..end, &file, &mut growing).await? {
                Came::All => break,
                Came::Size(size) => return Err(self.wrong_size(&part, size)),
                Came::Less(Fault::Absent) => {
                    self.inner.forget(&part.digest);
                    let remote = self.inner.name.clone();
                    return Err(Trouble::Missing { remote, digest: part.digest });
                }
                Came::Less(fault) => fault,
            };
            if growing.length() > before {
                tries.moved();
            }
            if let Err(fault) = tries.again(fault).await {
                return Err(self.given_up(&part, fault).await);
            }
        }
        tries.moved();
        Ok((index, growing.node()))
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

    /// Writes and hashes what comes of a piece, from where it was left: both at once, while the bytes
    /// are in the processor's own memory.
    async fn stream(
        &self,
        part: &Part,
        piece: Range<u64>,
        file: &File,
        growing: &mut Growing,
    ) -> Result<Came, Trouble> {
        let mut at = piece.start + growing.length();
        let asked = at..piece.end;
        let asked = if asked == (0..part.bytes) { None } else { Some(asked) };
        let got = self.inner.transport.get(&layout::object(&part.digest), asked).await;
        let mut body = match got {
            Ok(body) if body.size == part.bytes => body,
            Ok(body) => return Ok(Came::Size(body.size)),
            Err(fault) => return Ok(Came::Less(fault)),
        };
        while at < piece.end {
            let mut bytes = match body.stream.next().await {
                Some(Ok(bytes)) => bytes,
                Some(Err(fault)) => return Ok(Came::Less(fault)),
                None => return Ok(Came::Less(Fault::Down("the answer was cut off".to_string()))),
            };
            bytes.truncate((piece.end - at) as usize);
            let keep = || -> io::Result<()> {
                file.write_all_at(&bytes, at)?;
                growing.add(&bytes);
                Ok(())
            };
            let staging = self.cache.layout().dir("staging");
            tokio::task::block_in_place(keep).at("write to", &staging)?;
            at += bytes.len() as u64;
            self.progress.moved(bytes.len() as u64);
        }
        Ok(Came::All)
    }
}

/// How much came of a piece.
enum Came {
    All,
    /// Not all, and why.
    Less(Fault),
    /// Nothing, since the object has this size and not what it should have.
    Size(u64),
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
