//! One object, from this machine to a remote. Its bytes are hashed as they are read, so that what
//! does not match its digest never gets there under it; what is larger than a part goes in parts,
//! and an upload that breaks off goes on with those that are missing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;

use crate::cache::Cache;
use crate::crash_point;
use crate::error::{At, Error};
use crate::recipe::Part;
use crate::remote::blob::Transfer;
use crate::remote::inner::blocking;
use crate::remote::journal::{Head, Journal, Sent};
use crate::remote::subtree::{Node, join};
use crate::remote::transport::{Fault, Piece, Put, Upload};
use crate::remote::{Trouble, layout};

/// Objects go in parts of this size when they are larger; a power of two, for the hash.
const PART: u64 = 8 << 20;
/// Stores take 10,000 parts; larger objects have larger parts.
const PARTS: u64 = 8192;
/// Parts of one object on their way at once.
const AHEAD: usize = 4;

/// A file whose bytes are to be those of a digest.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub part: Part,
    pub path: PathBuf,
}

/// How an upload in parts ended.
enum Ended {
    Done(u64),
    /// The store does not know it any more, or does not take its parts.
    Stale,
}

impl Transfer {
    /// Puts one object; the bytes that went.
    pub async fn send(&self, source: &Source) -> Result<u64, Trouble> {
        let sent = if source.part.bytes <= PART {
            self.send_whole(source).await?
        } else {
            self.send_parts(source).await?
        };
        self.inner.set_damaged(&source.part.digest, false);
        self.inner.remember(&source.part.digest, source.part.bytes);
        Ok(sent)
    }

    async fn send_whole(&self, source: &Source) -> Result<u64, Trouble> {
        let _room = self.inner.room(source.part.bytes, true).await;
        let (node, bytes) = self.read(source, 0, source.part.bytes).await?;
        if join(&[node], PART, source.part.bytes) != source.part.digest {
            return Err(self.local_damage(source));
        }
        let name = layout::object(&source.part.digest);
        self.put_checked(&name, bytes).await?;
        self.progress.moved(source.part.bytes);
        Ok(source.part.bytes)
    }

    /// Puts a small object and looks whether it got there; a store that loses writes is told so
    /// twice.
    pub async fn put_checked(&self, name: &str, bytes: Bytes) -> Result<(), Trouble> {
        for last in [false, true] {
            let size = self.patiently(async || {
                let put = || self.inner.transport.put(name, bytes.clone(), Put::Over);
                self.inner.twice(put).await.map_err(|f| self.inner.trouble(f))?;
                self.inner.head(name).await.map_err(|f| self.inner.trouble(f))
            });
            if size.await? == Some(bytes.len() as u64) {
                return Ok(());
            }
            if last {
                break;
            }
        }
        Err(self.inner.unavailable(format!("it says that it took `{name}`, and does not have it")))
    }

    /// In parts, by the journal of an earlier try when there is one.
    async fn send_parts(&self, source: &Source) -> Result<u64, Trouble> {
        let name = layout::object(&source.part.digest);
        let path = self.inner.uploads(&self.cache)?.join(format!("{}.parts", source.part.digest));
        let mut journal = Journal::open(path.clone()).at("open", &path)?;
        for _ in 0..3 {
            let part = part_size(source.part.bytes);
            let known = journal.as_ref().and_then(|j| j.head.clone()).filter(|head| {
                (head.bytes, head.part, &head.name) == (source.part.bytes, part, &name)
            });
            let resumed = known.is_some();
            let head = match known {
                Some(head) => head,
                None => self.begin(source, &name, part, journal.as_mut()).await?,
            };
            crash_point!("push.after-begin");
            match self.send_missing(source, &head, journal.as_mut()).await {
                Ok(Ended::Done(sent)) => {
                    if let Some(journal) = journal {
                        journal.remove();
                    }
                    return Ok(sent);
                }
                Ok(Ended::Stale) if resumed || journal.is_some() => {
                    self.abandon(&head).await;
                    if let Some(journal) = journal.as_mut() {
                        journal.head = None;
                    }
                }
                Ok(Ended::Stale) => break,
                Err(error) => {
                    let keep = matches!(error, Trouble::Unavailable { .. } | Trouble::Cancelled);
                    if !keep || journal.is_none() {
                        self.abandon(&head).await;
                        journal.into_iter().for_each(Journal::remove);
                    }
                    return Err(error);
                }
            }
        }
        Err(self.inner.unavailable(format!("it does not take `{name}` in parts")))
    }

    async fn begin(
        &self,
        source: &Source,
        name: &str,
        part: u64,
        journal: Option<&mut Journal>,
    ) -> Result<Head, Trouble> {
        let begin = async || {
            let id = self.inner.twice(|| self.inner.transport.begin(name)).await;
            id.map_err(|f| self.inner.trouble(f))
        };
        let id = self.patiently(begin).await?;
        let head = Head { name: name.to_string(), bytes: source.part.bytes, part, id };
        if let Some(journal) = journal {
            journal.start(head.clone()).at("write the journal of", &source.path)?;
        }
        Ok(head)
    }

    async fn abandon(&self, head: &Head) {
        let _ = self.inner.transport.abort(Upload { name: &head.name, id: &head.id }).await;
    }

    /// Reads and hashes every part, sends those that were not, and has the store join them when
    /// the whole is right.
    async fn send_missing(
        &self,
        source: &Source,
        head: &Head,
        mut journal: Option<&mut Journal>,
    ) -> Result<Ended, Trouble> {
        let count = head.bytes.div_ceil(head.part) as usize;
        let before = journal.as_ref().map(|j| j.sent.clone()).unwrap_or_default();
        let before = Arc::new(before);
        let (mut running, mut next) = (JoinSet::new(), 0);
        let (mut nodes, mut contents) = (vec![None; count], vec![String::new(); count]);
        let mut moved = 0;
        while nodes.iter().any(Option::is_none) {
            while next < count && running.len() < AHEAD {
                let wait = running.is_empty();
                let Some(room) = self.inner.room(head.part, wait).await else { break };
                let (this, source, head) = (self.clone(), source.clone(), head.clone());
                running.spawn(this.part(source, head, next, before.clone(), room));
                next += 1;
            }
            let done = running.join_next().await.expect("a part is missing");
            let Some(part) = done.map_err(|e| self.inner.unavailable(e.to_string()))?? else {
                return Ok(Ended::Stale);
            };
            let index = part.sent.index;
            self.progress.moved(part.bytes);
            (nodes[index], contents[index]) = (Some(part.node), part.sent.content.clone());
            if part.fresh {
                moved += part.bytes;
                if let Some(journal) = journal.as_deref_mut() {
                    journal.add(part.sent).at("write the journal of", &source.path)?;
                }
                crash_point!("push.after-part");
            }
        }
        let nodes: Vec<Node> = nodes.into_iter().flatten().collect();
        if join(&nodes, head.part, head.bytes) != source.part.digest {
            return Err(self.local_damage(source));
        }
        crash_point!("push.before-complete");
        let ended = self.complete(source, head, contents, moved).await;
        if !matches!(ended, Ok(Ended::Done(_))) {
            self.progress.undo(head.bytes);
        }
        crash_point!("push.after-complete");
        ended
    }

    /// An answer that is lost may have been a success, which a look at the object tells.
    async fn complete(
        &self,
        source: &Source,
        head: &Head,
        contents: Vec<String>,
        moved: u64,
    ) -> Result<Ended, Trouble> {
        let mut tries = self.patience.tries();
        // What lay there damaged may have the right size too.
        let damaged = self.inner.is_damaged(&source.part.digest);
        loop {
            let upload = Upload { name: &head.name, id: &head.id };
            let completed = self.inner.transport.complete(upload, contents.clone()).await;
            let size = match self.inner.head(&head.name).await {
                Ok(size) => size,
                Err(fault) => {
                    tries.again(fault).await.map_err(|f| self.inner.trouble(f))?;
                    continue;
                }
            };
            match &completed {
                _ if size == Some(head.bytes) && (completed.is_ok() || !damaged) => {
                    return Ok(Ended::Done(moved));
                }
                Err(fault @ Fault::Down(_)) => {
                    tries.again(fault.clone()).await.map_err(|f| self.inner.trouble(f))?;
                }
                _ => return Ok(Ended::Stale),
            }
        }
    }

    /// One part, read and hashed, and sent unless it was before; none when the store does not
    /// know the upload or refuses.
    async fn part(
        self,
        source: Source,
        head: Head,
        index: usize,
        before: Arc<BTreeMap<usize, Sent>>,
        _room: OwnedSemaphorePermit,
    ) -> Result<Option<PartDone>, Trouble> {
        let offset = index as u64 * head.part;
        let length = head.part.min(head.bytes - offset);
        let (node, bytes) = self.read(&source, offset, length).await?;
        let hash = node.hex();
        if let Some(sent) = before.get(&index).filter(|sent| sent.hash == hash) {
            return Ok(Some(PartDone { sent: sent.clone(), node, bytes: length, fresh: false }));
        }
        let patience = self.patience.clone();
        let mut tries = patience.tries();
        loop {
            let upload = Upload { name: &head.name, id: &head.id };
            let piece = Piece { index, offset, bytes: bytes.clone() };
            match self.inner.transport.part(upload, piece).await {
                Ok(content) => {
                    tries.moved();
                    let sent = Sent { index, hash, content };
                    return Ok(Some(PartDone { sent, node, bytes: length, fresh: true }));
                }
                Err(Fault::Absent) => return Ok(None),
                Err(fault) => tries.again(fault).await.map_err(|f| self.inner.trouble(f))?,
            }
        }
    }

    /// Bytes of a local file and what they add to its digest.
    async fn read(&self, source: &Source, at: u64, length: u64) -> Result<(Node, Bytes), Trouble> {
        let (path, total) = (source.path.clone(), source.part.bytes);
        let buffers = self.inner.buffers.clone();
        let read = move || -> io::Result<(Node, Bytes)> {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(at))?;
            let mut buffer = buffers.take(length as usize);
            if file.take(length).read_to_end(&mut buffer)? as u64 != length {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Ok((Node::of(at, total, &buffer), Bytes::from_owner(buffer)))
        };
        match blocking(read).await {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(Trouble::Lost { digest: source.part.digest })
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(self.local_damage(source)),
            result => Ok(result.at("read", &source.path)?),
        }
    }

    fn local_damage(&self, source: &Source) -> Trouble {
        let what = "they are not what their name says, and are not pushed".to_string();
        let error = Error::Damaged { path: source.path.clone(), what };
        self.cache.report(error.to_string());
        Trouble::Local(error)
    }
}

/// A part that is there.
struct PartDone {
    sent: Sent,
    node: Node,
    bytes: u64,
    /// Sent now and not before.
    fresh: bool,
}

/// The size of parts: a power of two, small as long as there are not too many.
fn part_size(bytes: u64) -> u64 {
    PART.max(bytes.div_ceil(PARTS).next_power_of_two())
}

/// Uploads in parts that were not gone on with for a week are dropped, here and there.
pub(super) async fn drop_old(transfer: &Transfer) -> Result<(), Trouble> {
    const WEEK: u64 = 7 * 86_400;
    transfer.inner.transport.tidy().await;
    let cache: &Cache = &transfer.cache;
    let dir = transfer.inner.uploads(cache)?;
    for item in std::fs::read_dir(&dir).at("list", &dir)?.flatten() {
        let path = item.path();
        let age = item.metadata().and_then(|meta| meta.modified()).map(|time| time.elapsed());
        let old = age.is_ok_and(|age| age.is_ok_and(|age| age.as_secs() > WEEK));
        if !old || path.extension().is_none_or(|e| e != "parts") {
            continue;
        }
        if let Some(journal) = Journal::open(path.clone()).at("open", &path)? {
            if let Some(head) = &journal.head {
                transfer.abandon(head).await;
            }
            journal.remove();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_few_enough() {
        for bytes in [1, PART, PART * PARTS, PART * PARTS + 1, 5 << 40] {
            let part = part_size(bytes);
            assert!(part.is_power_of_two() && bytes.div_ceil(part) <= PARTS, "{bytes}");
        }
        assert_eq!(part_size(1 << 30), PART);
    }
}
