//! Group commit: results become durable together, entry after bytes, index after entry. Knows no
//! attempts.
//!
//! Order: texts staged; one sync (bytes of objects and texts); entries named by their keys,
//! never over another; directories synced; rows; claims released; the caller told. A crash before a
//! link leaves bytes without a name, which the next attempt finds or makes again; after it, the
//! entry is whole.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::attempt::Attempt;
use crate::cache::{Cache, Found, row_of};
use crate::claim::Claim;
use crate::crash_point;
use crate::digest::{Digest, Key};
use crate::entry::Entry;
use crate::error::{At, Error, Result};
use crate::index::Row;
use crate::lease::Lock;
use crate::loss;
use crate::stat::Stamp;
use crate::store;
use crate::tree;

/// How long the first result of a group waits for others, and for how many at most.
const WAIT: Duration = Duration::from_millis(50);
const GROUP: usize = 1024;
/// Each result keeps files open: its claim, its attempt, and in the group at work its text; another
/// group may wait. Together they take no more than half of what the process may open.
const FILES: usize = 10;
/// Where syncing is slow it also slows whoever makes files meanwhile, so a group waits so many times
/// as long as the one before took, up to so long.
const SHARE: u32 = 4;
const WAIT_MOST: Duration = Duration::from_secs(1);
/// From this many directories on, one sync of the file system is cheaper than one of each.
const MANY: usize = 4;

/// A result to be published.
#[derive(Debug)]
pub struct Publication {
    pub key: Key,
    pub entry: Entry,
    /// Given back when the result is durable.
    pub claim: Option<Claim>,
    /// Held until then, so that nothing it made is taken for garbage before the entry names it.
    pub attempt: Option<Attempt>,
    /// Whether the result takes the place of an earlier one.
    pub replace: bool,
}

impl Publication {
    /// A result that another cache gave; its bytes may come later.
    pub fn imported(entry: Entry) -> Publication {
        Publication { key: entry.key, entry, claim: None, attempt: None, replace: false }
    }
}

/// What became of a publication.
#[derive(Debug, Clone, PartialEq)]
pub enum Published {
    /// The first result of its key.
    New,
    /// An equal result was there.
    Same,
    /// Another result was there and stays; this one is kept as evidence.
    Diverged { kept: Entry },
    /// It took the place of one that was to be replaced, was damaged, or whose bytes are lost.
    Replaced,
    /// It could not be written. [`Committer::flush`] tells it as an error too.
    Failed { reason: String },
}

enum Message {
    Ready,
    Publish(Box<Publication>),
    Hurry,
    Flush(Sender<Result<()>>),
}

/// Hands results to the thread that makes them durable. Dropping it waits for that.
#[derive(Debug)]
pub struct Committer {
    cache: Cache,
    sender: Option<SyncSender<Message>>,
    thread: Option<JoinHandle<()>>,
}

impl Cache {
    /// Starts a committer; `on_durable` is called on its thread, once a group.
    pub fn committer(
        &self,
        on_durable: impl Fn(Vec<(Key, Published)>) + Send + 'static,
    ) -> Committer {
        let most = most();
        let (sender, receiver) = sync_channel(most);
        let cache = self.clone();
        let thread = std::thread::Builder::new()
            .name("commit".to_string())
            .spawn(move || serve(&cache, &receiver, most, &on_durable))
            .expect("a thread can be started");
        Committer { cache: self.clone(), sender: Some(sender), thread: Some(thread) }
    }
}

impl Committer {
    /// Gives a result away; lookups through this cache see it at once. Waits while a whole group is
    /// waiting already.
    ///
    /// # Errors
    /// When the committing thread has died; then nothing more can be published.
    pub fn publish(&self, publication: Publication) -> Result<()> {
        self.cache.set_pending(publication.entry.clone(), publication.replace);
        self.send(Message::Publish(Box::new(publication)))
    }

    /// Opens the index, which will be wanted, while there is nothing else to do.
    pub fn ready(&self) {
        // One that died tells so when something is published.
        let _ = self.send(Message::Ready);
    }

    /// Has what was published made durable now, and does not wait for that.
    ///
    /// # Errors
    /// When the committing thread has died.
    pub fn hurry(&self) -> Result<()> {
        self.send(Message::Hurry)
    }

    /// Waits until all that was published is durable.
    ///
    /// # Errors
    /// What could not be published since the last call.
    pub fn flush(&self) -> Result<()> {
        let (sender, receiver) = channel();
        self.send(Message::Flush(sender))?;
        receiver.recv().map_err(|_| dead())?
    }

    fn send(&self, message: Message) -> Result<()> {
        let sender = self.sender.as_ref().expect("there until the drop");
        sender.send(message).map_err(|_| dead())
    }
}

impl Drop for Committer {
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn dead() -> Error {
    Error::Committer { what: "its callback panicked".to_string() }
}

/// How many results a group has at most.
fn most() -> usize {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    files.map_or(GROUP, |files| (files as usize / FILES).clamp(1, GROUP))
}

fn serve(
    cache: &Cache,
    receiver: &Receiver<Message>,
    most: usize,
    on_durable: &dyn Fn(Vec<(Key, Published)>),
) {
    let mut failed: Vec<(Key, String)> = Vec::new();
    let mut wait = WAIT;
    loop {
        let (group, flush, ended) = gather(cache, receiver, most, wait);
        if !group.is_empty() {
            let started = Instant::now();
            let outcomes = commit(cache, group);
            wait = (started.elapsed() * SHARE).clamp(WAIT, WAIT_MOST);
            for (key, outcome) in &outcomes {
                if let Published::Failed { reason } = outcome {
                    failed.push((*key, reason.clone()));
                }
            }
            on_durable(outcomes);
        }
        if let Some(reply) = flush {
            let _ = reply.send(match failed.first().cloned() {
                None => Ok(()),
                Some((key, reason)) => Err(Error::Publish { count: failed.len(), key, reason }),
            });
            failed.clear();
        }
        if ended {
            return;
        }
    }
}

/// The next group: what comes within `wait` of its first, cut short by haste, a flush or the end.
fn gather(
    cache: &Cache,
    receiver: &Receiver<Message>,
    most: usize,
    wait: Duration,
) -> (Vec<Publication>, Option<Sender<Result<()>>>, bool) {
    let mut group = Vec::new();
    let mut deadline = None;
    while group.len() < most {
        let next = match deadline {
            None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(end) => {
                receiver.recv_timeout(Instant::saturating_duration_since(&end, Instant::now()))
            }
        };
        match next {
            Ok(Message::Publish(publication)) => group.push(*publication),
            Ok(Message::Ready) => {
                cache.open_index();
                continue;
            }
            Ok(Message::Hurry) => return (group, None, false),
            Ok(Message::Flush(reply)) => return (group, Some(reply), false),
            Err(RecvTimeoutError::Timeout) => break,
            Err(RecvTimeoutError::Disconnected) => return (group, None, true),
        }
        deadline = deadline.or_else(|| Some(Instant::now() + wait));
    }
    (group, None, false)
}

/// An entry's text in `staging/`, removed if it is still there at the end.
struct Staged {
    path: PathBuf,
    file: File,
    text: String,
    /// Whether it has another name.
    named: Cell<bool>,
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.named.get() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn commit(cache: &Cache, group: Vec<Publication>) -> Vec<(Key, Published)> {
    let mut staged: Vec<Result<Staged>> = group.iter().map(|p| stage(cache, p)).collect();
    crash_point!("commit.before-sync");
    let good = || staged.iter().zip(&group).filter_map(|(s, p)| Some((s.as_ref().ok()?, p)));
    let digests = |e: &Entry| -> Vec<Digest> {
        let log = e.log.iter().map(|(digest, _)| *digest);
        e.outputs.iter().map(|o| o.digest).chain(log).collect()
    };
    let objects =
        good().flat_map(|(_, p)| digests(&p.entry)).flat_map(|digest| cache.objects(&digest));
    // Of entries the directories: they may be new, and only their own names will be synced below.
    let texts = good().flat_map(|(s, p)| [s.path.clone(), shard(cache, &p.key)]);
    let paths: Vec<PathBuf> = texts.chain(objects).collect();
    if let Err(error) = store::sync_all(cache.layout(), paths.into_iter()) {
        let reason = error.to_string();
        let fail = |_| Err(Error::Publish { count: 1, key: group[0].key, reason: reason.clone() });
        staged = staged.into_iter().map(|s| s.and_then(fail)).collect();
    }
    crash_point!("commit.before-link");
    let mut dirs = BTreeSet::new();
    let mut outcomes = Vec::new();
    for (publication, staged) in group.iter().zip(&staged) {
        let outcome = match staged {
            Ok(staged) => place(cache, publication, staged, &mut dirs).map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let outcome = outcome.unwrap_or_else(|reason| Published::Failed { reason });
        outcomes.push((publication.key, outcome));
    }
    crash_point!("commit.before-dirs");
    if let Err(error) = sync_dirs(cache, &dirs) {
        for (_, outcome) in &mut outcomes {
            *outcome = Published::Failed { reason: error.to_string() };
        }
    }
    crash_point!("commit.after-link");
    cache.index_rows(rows(cache, &group, &staged, &outcomes));
    crash_point!("commit.after-row");
    for publication in &group {
        cache.clear_pending(&publication.entry);
    }
    drop(group); // and with it claims and attempts
    outcomes
}

fn stage(cache: &Cache, publication: &Publication) -> Result<Staged> {
    let Publication { key, entry, .. } = publication;
    if *key != entry.key {
        return Err(Error::WrongKey { key: *key, found: entry.key });
    }
    let text = entry.render()?;
    cache.layout().make_dir(&shard(cache, key))?;
    let (path, mode) = (cache.layout().staging(), cache.layout().access().entry());
    let write = || -> io::Result<File> {
        let mut file = File::create_new(&path)?;
        file.write_all(text.as_bytes())?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        loss::wrote(&path);
        Ok(file)
    };
    let file = write().inspect_err(|_| drop(fs::remove_file(&path))).at("write", &path)?;
    Ok(Staged { path, file, text, named: Cell::new(false) })
}

/// Gives a staged text its name. The first result stays, unless it is worth nothing or is to go.
fn place(
    cache: &Cache,
    publication: &Publication,
    staged: &Staged,
    dirs: &mut BTreeSet<PathBuf>,
) -> Result<Published> {
    let target = cache.layout().entry(&publication.key);
    dirs.extend(target.parent().map(Path::to_path_buf));
    let shared = cache.layout().lives().is_some();
    let named = match store::name_synced(&staged.path, &target, shared) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
        result => result.map(|()| true).at("create", &target)?,
    };
    if named {
        staged.named.set(true);
        crash_point!("commit.linked");
        return Ok(Published::New);
    }
    let old = cache.read_entry(&publication.key)?;
    // Whoever was silent for so long that another took its claim may add a result, and replace none.
    let fenced = publication.claim.as_ref().is_some_and(|claim| !claim.is_mine());
    if let Found::Whole(old, ..) = old
        && (!publication.replace || fenced)
        && old.outputs.iter().all(|o| cache.present(o))
    {
        if old.agrees(&publication.entry) {
            return Ok(Published::Same);
        }
        keep_evidence(cache, publication, staged, dirs)?;
        return Ok(Published::Diverged { kept: *old });
    }
    if target.is_dir() {
        cache.layout().discard(&target)?;
    }
    // So that nobody who saw damage here removes what takes its place.
    let _lock = Lock::shared(cache.layout())?;
    crash_point!("commit.before-replace");
    loss::replacing(&target);
    fs::rename(&staged.path, &target).at("replace", &target)?;
    loss::named(&target, Some(&staged.path));
    crash_point!("commit.after-replace");
    Ok(Published::Replaced)
}

fn keep_evidence(
    cache: &Cache,
    publication: &Publication,
    staged: &Staged,
    dirs: &mut BTreeSet<PathBuf>,
) -> Result<()> {
    let dir = cache.layout().divergences(&publication.key);
    cache.layout().make_dir(&dir)?;
    let path = dir.join(Digest::of(staged.text.as_bytes()).to_string());
    fs::rename(&staged.path, &path).at("create", &path)?;
    loss::named(&path, Some(&staged.path));
    crash_point!("commit.after-evidence");
    dirs.extend([cache.layout().dir("divergences"), dir]);
    Ok(())
}

fn sync_dirs(cache: &Cache, dirs: &BTreeSet<PathBuf>) -> Result<()> {
    if dirs.len() >= MANY {
        return store::sync_all(cache.layout(), dirs.iter().cloned());
    }
    dirs.iter().try_for_each(|dir| tree::sync_one(dir).at("sync", dir))
}

/// The directory of the entry of `key`.
fn shard(cache: &Cache, key: &Key) -> PathBuf {
    let mut path = cache.layout().entry(key);
    path.pop();
    path
}

/// Rows of what is under its key now. The file is the staged one only if its inode is.
fn rows(
    cache: &Cache,
    group: &[Publication],
    staged: &[Result<Staged>],
    outcomes: &[(Key, Published)],
) -> Vec<Row> {
    let row =
        |((publication, staged), (key, outcome)): ((&Publication, &Result<Staged>), &(_, _))| {
            let staged = staged.as_ref().ok()?;
            if !matches!(outcome, Published::New | Published::Replaced) {
                return None;
            }
            let there = fs::symlink_metadata(cache.layout().entry(key)).ok()?;
            let same = staged.file.metadata().is_ok_and(|m| m.ino() == there.ino());
            same.then(|| row_of(&publication.entry, Stamp::of(&there), staged.text.clone()))
        };
    group.iter().zip(staged).zip(outcomes).filter_map(row).collect()
}
