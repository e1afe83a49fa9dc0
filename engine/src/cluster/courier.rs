//! The leader's side where nodes share no file system with it: orders and their inputs go to a
//! remote before their jobs are submitted, and what nodes leave there comes into the directories of
//! its attempts, where all else finds it as ever. Threads of its own, since a remote may be slow.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cache::remote::{Progress, Remote, Trouble};
use cache::{Cache, Digest, Kind, Output};

use super::desk::{self, Address, Desk};
use super::records::{self, Exit, Ordered};
use super::saved;
use crate::event::Failure;
use crate::wire::{Answer, Order};
use crate::worker;

/// So many orders are sent at a time.
const THREADS: usize = 4;
/// Pauses between looks at the remote, from first to longest, and when it does not answer.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(3));
const TROUBLED: Duration = Duration::from_secs(10);
/// An order that could not be sent is sent again after so long.
const AGAIN: Duration = Duration::from_secs(2);
/// How often it is looked whether all is over.
const TICK: Duration = Duration::from_millis(50);
/// So many notes are read at a time.
const BATCH: usize = 64;
/// Results up to this size come with the record of their step: reports are made of such.
const SMALL: u64 = 256 << 10;
/// And its log.
const LOG_MOST: u64 = 16 << 20;

/// What a courier tells the driver.
pub(super) enum News {
    /// The order and its inputs are there.
    Ready(u64),
    /// They cannot be sent now, and why.
    Waits(u64, String),
    /// They cannot be sent.
    Refused(u64, Answer),
    /// All that was there at this moment was taken.
    Looked(Instant),
    /// What is there cannot be taken, and why; told once until it can.
    Troubled(String),
}

type Errand = Box<dyn FnOnce(&Carrier) + Send>;
/// Takes news; `false` once nobody listens.
type Tell = Arc<dyn Fn(News) -> bool + Send + Sync>;

/// A handle on the threads, which end with it.
pub(super) struct Courier {
    pub own: Desk,
    errands: Sender<Errand>,
    looks: Sender<Option<(Desk, PathBuf)>>,
    carrier: Carrier,
    tell: Tell,
}

/// Carries things between a cache and a remote.
#[derive(Clone)]
pub(super) struct Carrier {
    pub cache: Cache,
    pub remote: Remote,
    cancel: Arc<AtomicBool>,
    /// Whether it does not let notes be removed.
    refused: Arc<AtomicBool>,
}

impl Courier {
    /// Starts the threads. What `own` has is announced in `mail`.
    pub fn start<T: From<News> + Send + 'static>(
        carrier: Carrier,
        own: Desk,
        mail: PathBuf,
        tell: Sender<T>,
    ) -> Courier {
        let (errands, queue) = channel::<Errand>();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..THREADS {
            let (queue, carrier) = (queue.clone(), carrier.clone());
            std::thread::spawn(move || {
                loop {
                    let errand = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    match errand {
                        Ok(errand) => errand(&carrier),
                        Err(_) => return,
                    }
                }
            });
        }
        let (looks, wanted) = channel();
        let tell: Tell = Arc::new(move |news| tell.send(T::from(news)).is_ok());
        let (desk, looker, told) = (own.clone(), carrier.clone(), tell.clone());
        std::thread::spawn(move || looker.look(vec![(desk, mail)], &wanted, &*told));
        Courier { own, errands, looks, carrier, tell }
    }

    /// Sends an order and all that its step needs.
    pub fn send(&self, worker: u64, attempt: String, ordered: Ordered) {
        let (desk, tell) = (self.own.clone(), self.tell.clone());
        let _ = self.errands.send(Box::new(move |carrier: &Carrier| {
            carrier.send(worker, &desk, &attempt, &ordered, &*tell);
        }));
    }

    /// Looks at the notes of the run recorded in `run` too, if they are in the same remote.
    pub fn also(&self, run: &Path, mail: PathBuf) {
        let desk = Address::of(run).and_then(|address| address.desk(&self.carrier.remote));
        if let Some(desk) = desk {
            let _ = self.looks.send(Some((desk, mail)));
        }
    }

    /// Looks soon.
    pub fn look_soon(&self) {
        let _ = self.looks.send(None);
    }
}

impl Drop for Courier {
    fn drop(&mut self) {
        self.carrier.cancel.store(true, Ordering::Relaxed);
    }
}

impl Carrier {
    pub fn new(cache: &Cache, remote: &Remote) -> Carrier {
        let remote = remote.waited_for(TROUBLED).unwrap_or_else(|_| remote.clone());
        let (cancel, refused) = (Arc::default(), Arc::default());
        Carrier { cache: cache.clone(), remote, cancel, refused }
    }

    fn send(
        &self,
        worker: u64,
        desk: &Desk,
        attempt: &str,
        ordered: &Ordered,
        tell: &dyn Fn(News) -> bool,
    ) {
        let mut told = false;
        loop {
            let why = match self.try_to_send(desk, attempt, ordered) {
                Ok(()) => {
                    tell(News::Ready(worker));
                    return;
                }
                Err(Trouble::Cancelled) => return,
                Err(trouble @ Trouble::Lost { .. }) => {
                    let digests = self.lost(ordered);
                    if !digests.is_empty() {
                        tell(News::Refused(worker, Answer::Lost { digests }));
                        return;
                    }
                    // It does not say so of any: it does not answer now.
                    trouble.to_string()
                }
                Err(trouble @ Trouble::Unavailable { .. }) => trouble.to_string(),
                Err(trouble) => {
                    let message = format!("its inputs cannot be sent to its node: {trouble}");
                    let answer = Answer::Failed { failure: Failure::Error, message };
                    tell(News::Refused(worker, answer));
                    return;
                }
            };
            if !std::mem::replace(&mut told, true) && !tell(News::Waits(worker, why)) {
                return;
            }
            let again = Instant::now() + AGAIN;
            while Instant::now() < again && !self.cancel.load(Ordering::Relaxed) {
                std::thread::sleep(TICK);
            }
        }
    }

    fn try_to_send(&self, desk: &Desk, attempt: &str, ordered: &Ordered) -> Result<(), Trouble> {
        self.remote.send(&self.cache, &inputs(ordered), places(ordered), &self.cancel)?;
        let mut there = ordered.clone();
        if let Order::Run { attempt, places, .. } = &mut there.order {
            // Paths of this machine.
            (*attempt, *places) = Default::default();
        }
        let body = serde_json::to_vec(&there).expect("plain values");
        desk.put(&desk::note(attempt, desk::ORDER), &body)
    }

    /// Inputs whose bytes are neither here nor there.
    fn lost(&self, ordered: &Ordered) -> Vec<Digest> {
        let lost = |input: &Output| {
            let sent = self.remote.send(
                &self.cache,
                std::slice::from_ref(input),
                places(ordered),
                &self.cancel,
            );
            matches!(sent, Err(Trouble::Lost { .. }))
        };
        inputs(ordered).into_iter().filter(lost).map(|input| input.digest).collect()
    }

    /// Looks at desks again and again, until nobody wants it any more.
    fn look(
        &self,
        mut desks: Vec<(Desk, PathBuf)>,
        wanted: &Receiver<Option<(Desk, PathBuf)>>,
        tell: &dyn Fn(News) -> bool,
    ) {
        let (mut pause, mut told) = (PAUSE.0, false);
        loop {
            match wanted.recv_timeout(pause) {
                Ok(first) => {
                    for (desk, mail) in first.into_iter().chain(wanted.try_iter().flatten()) {
                        if desks.iter().all(|(_, known)| *known != mail) {
                            desks.push((desk, mail));
                        }
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            let (began, mut any, mut all) = (Instant::now(), false, true);
            for (desk, mail) in &desks {
                match self.take(desk, mail) {
                    Ok(took) => any |= took,
                    Err(trouble) => {
                        all = false;
                        let first = !std::mem::replace(&mut told, true);
                        if first && !tell(News::Troubled(trouble.to_string())) {
                            return;
                        }
                    }
                }
            }
            if all && !tell(News::Looked(began)) {
                return;
            }
            told &= !all;
            let longest = if all { PAUSE.1 } else { TROUBLED };
            pause = if any { PAUSE.0 } else { (pause * 3 / 2).min(longest) };
        }
    }

    /// Takes what is new at a desk; tells whether anything was.
    pub fn take(&self, desk: &Desk, mail: &Path) -> Result<bool, Trouble> {
        let (mut wanted, mut over) = (Vec::new(), Vec::new());
        for name in desk.list()? {
            let Some((attempt, record)) = desk::parts(&name) else { continue };
            let dir = records::dir_of(self.cache.root(), attempt).filter(|dir| dir.is_dir());
            // Of one that was given up, or whose end was taken.
            match dir.filter(|dir| !records::path(dir, records::EXIT).exists()) {
                Some(dir) => {
                    if let Some(rank) = rank(record, &dir) {
                        wanted.push((attempt.to_string(), rank, name));
                    }
                }
                None => over.push(name),
            }
        }
        self.remove(desk, &over);
        // The end of each last, and pieces in their order.
        wanted.sort();
        let names: Vec<String> = wanted.into_iter().map(|(.., name)| name).collect();
        // What could not be kept here: a disk may be full for a while.
        let mut failed = None;
        for part in names.chunks(BATCH) {
            self.take_part(desk, part, mail, &mut failed)?;
        }
        match failed {
            Some((path, cause)) => {
                Err(Trouble::Local(cache::Error::Io { doing: "keep what came for", path, cause }))
            }
            None => Ok(!names.is_empty()),
        }
    }

    fn take_part(
        &self,
        desk: &Desk,
        names: &[String],
        mail: &Path,
        failed: &mut Option<(PathBuf, io::Error)>,
    ) -> Result<(), Trouble> {
        let (mut ends, mut done) = (Vec::new(), Vec::new());
        for (name, body) in desk.read(names)? {
            let Some((attempt, record)) = desk::parts(&name) else { continue };
            let Some(dir) = records::dir_of(self.cache.root(), attempt) else { continue };
            match self.keep(&dir, record, &body, mail) {
                Ok(Some(exit)) => ends.push((dir, exit, name)),
                Ok(None) if record != desk::STARTED => done.push(name),
                Ok(None) => {}
                // A piece whose forerunner is not here, or what another build wrote.
                Err(e) if e.kind() == io::ErrorKind::InvalidData => {}
                Err(e) => *failed = Some((dir, e)),
            }
        }
        self.bring_small(&ends);
        for (dir, exit, name) in ends {
            match records::write_new(&records::path(&dir, records::EXIT), &exit) {
                Ok(_) => {
                    records::announce(&dir, mail);
                    done.push(name);
                    if let Answer::Done { .. } = exit.answer {
                        saved::tidy(&self.remote, self.cache.root(), &dir, true);
                    }
                }
                Err(e) => *failed = Some((dir, e)),
            }
        }
        self.remove(desk, &done);
        Ok(())
    }

    /// Removes notes that were taken. Where that is refused they stay, and are passed over.
    fn remove(&self, desk: &Desk, names: &[String]) {
        if !names.is_empty()
            && !self.refused.load(Ordering::Relaxed)
            && let Err(Trouble::Refused { .. }) = desk.remove(names)
        {
            self.refused.store(true, Ordering::Relaxed);
        }
    }

    /// Keeps what a note says; an exit record is given back.
    fn keep(&self, dir: &Path, record: &str, body: &[u8], mail: &Path) -> io::Result<Option<Exit>> {
        records::prepare(dir)?;
        match record {
            desk::STARTED => {
                let place: records::Place = serde_json::from_slice(body)?;
                records::write_new(&records::path(dir, records::STARTED), &place)?;
                records::announce_start(dir, mail);
            }
            desk::EXIT => {
                let mut exit: Exit = serde_json::from_slice(body)?;
                if let Answer::Lost { digests } = &exit.answer {
                    exit.answer = self.missed(dir, digests);
                }
                return Ok(Some(exit));
            }
            _ => match desk::piece(record) {
                Some((desk::LOG, from)) => add(&dir.join(worker::LOG), from, body)?,
                Some((desk::ANSWERS, from)) => {
                    add(&records::path(dir, records::ANSWERS), from, body)?;
                }
                Some((desk::CHECKPOINT, _)) => {
                    let saved = serde_json::from_slice(body)?;
                    self.forget_missing(dir, &saved);
                    saved::keep(dir, &saved)?;
                    saved::tidy(&self.remote, self.cache.root(), dir, false);
                }
                _ => {}
            },
        }
        Ok(None)
    }

    /// An attempt that comes no further than where it was to begin did not find that checkpoint.
    fn forget_missing(&self, dir: &Path, saved: &saved::Saved) {
        let ordered = records::read::<Ordered>(&records::path(dir, records::ORDER));
        let began = ordered.and_then(|ordered| ordered.checkpoint);
        if let Some(gone) = began.filter(|began| began.position >= saved.position) {
            saved::forget(self.cache.root(), dir, &gone);
        }
    }

    /// What it means that a node did not find inputs which were there: those that are here are sent
    /// anew with the next attempt, of the others the steps run again.
    fn missed(&self, dir: &Path, digests: &[Digest]) -> Answer {
        self.remote.doubt();
        let ordered = records::read::<Ordered>(&records::path(dir, records::ORDER));
        let inputs = ordered.as_ref().map(inputs).unwrap_or_default();
        let here = |digest: &Digest| {
            ordered.as_ref().is_some_and(|o| places(o).contains_key(digest))
                || inputs.iter().any(|o| o.digest == *digest && self.cache.present(o))
        };
        let lost: Vec<Digest> = digests.iter().filter(|digest| !here(digest)).copied().collect();
        match lost.is_empty() {
            false => Answer::Lost { digests: lost },
            true => Answer::Failed {
                failure: Failure::Lost,
                message: "the remote did not have its inputs any more; they are sent anew".into(),
            },
        }
    }

    /// Brings logs and small results. What does not come is fetched when somebody wants it.
    fn bring_small(&self, ends: &[(PathBuf, Exit, String)]) {
        let mut small = Vec::new();
        for (_, exit, _) in ends {
            if let Answer::Done { outputs, log } = &exit.answer {
                small.extend(outputs.iter().filter(|output| output.bytes <= SMALL).cloned());
                let log = log.filter(|(_, bytes)| *bytes <= LOG_MOST);
                small.extend(log.map(|(digest, bytes)| of_log(digest, bytes)));
            }
        }
        let _ = self.remote.fetch(&self.cache, &small, &Progress::new(), &self.cancel);
    }
}

/// A log as an artifact.
pub(super) fn of_log(digest: Digest, bytes: u64) -> Output {
    let (port, name) = ("log".to_string(), "log".to_string());
    Output { port, index: None, name, kind: Kind::File, digest, bytes }
}

/// What the step of an order gets.
pub(super) fn inputs(ordered: &Ordered) -> Vec<Output> {
    let Order::Run { frozen, .. } = &ordered.order else { return Vec::new() };
    let of = |(port, items): (&String, &Vec<crate::wire::FrozenInput>)| {
        items.iter().map(|item| item.output(port)).collect::<Vec<_>>()
    };
    frozen.inputs.iter().flat_map(of).collect()
}

/// Where those are that are the user's own.
fn places(ordered: &Ordered) -> &BTreeMap<Digest, PathBuf> {
    static NONE: BTreeMap<Digest, PathBuf> = BTreeMap::new();
    match &ordered.order {
        Order::Run { places, .. } => places,
        Order::Cancel => &NONE,
    }
}

/// In which order notes of the attempt at `dir` are taken; `None` of those that are not.
fn rank(record: &str, dir: &Path) -> Option<(u8, u64)> {
    match record {
        desk::ORDER => None,
        desk::STARTED => {
            let known = records::path(dir, records::STARTED).exists();
            (!known).then_some((0, 0))
        }
        desk::EXIT => Some((2, 0)),
        _ => Some((1, desk::piece(record)?.1)),
    }
}

/// Adds a piece to a file, unless it is there; not before what comes before it.
fn add(path: &Path, from: u64, body: &[u8]) -> io::Result<()> {
    let mut file = File::options().create(true).append(true).open(path)?;
    let there = file.metadata()?.len();
    if there < from {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let torn = there > from && there < from + body.len() as u64;
    if torn {
        // This process, or the one before, ended in the middle of it.
        File::options().write(true).open(path)?.set_len(from)?;
    }
    match there == from || torn {
        true => file.write_all(body),
        false => Ok(()),
    }
}
