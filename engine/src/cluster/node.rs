//! A job on a node that shares no file system with its leader: it gets its order and the inputs of
//! its step from a remote into a cache of its own, has the step run there as any agent does, and
//! sends what came of it to the remote: results before the record that tells of them.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cache::gc::{Plan, Policy};
use cache::remote::{Progress, Remote, Trouble};
use cache::{Attempt, Cache, Digest, Output};
use serde_json::json;

use super::agent::{Agent, Setting};
use super::courier::{inputs, of_log};
use super::desk::{self, Desk};
use super::records::{self, Exit, Ordered};
use super::saved::{self, Keeper, Saved};
use crate::event::Failure;
use crate::wire::{Answer, Order};
use crate::worker::LOG;

/// Pauses between two pieces of a log, from first to longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// How often there is a look at what is to be sent.
const TICK: Duration = Duration::from_millis(100);
/// A piece of a log has at most so many bytes.
const PIECE: u64 = 1 << 20;
/// Of a log, so many bytes are sent while it grows, and of what is more the last.
const LIVE: (u64, u64) = (32 << 20, 64 << 10);
/// Checkpoints are sent so long after each other, at least, and so many times as long as one takes.
const CHECKPOINTS: Duration = Duration::from_secs(5);
const SHARE: u32 = 5;
/// So long a remote that does not answer is asked again, when the job has no end of its own.
const PATIENCE: Duration = Duration::from_secs(900);
/// And so long for what is only for people.
const SHORT: Duration = Duration::from_secs(20);
/// A node's cache keeps what no job uses so long, and is looked through so often.
const KEPT: Duration = Duration::from_secs(2 * 86_400);
const TIDY: Duration = Duration::from_secs(3600);
/// Between two tries.
const AGAIN: Duration = Duration::from_secs(1);
/// A remote that was down is asked again within so long: what a job has is worth more than requests.
pub const ASKED_AGAIN: Duration = Duration::from_secs(5);

/// For a node that is to choose where its cache is.
pub const NO_CACHE: &str = "-";

/// `text` with the values of variables: `$NAME` or `${NAME}`.
///
/// # Errors
/// In words, which variable is not set.
pub fn expand(text: &str, var: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let (mut all, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once('$') {
        all.push_str(before);
        let braced = after.strip_prefix('{').and_then(|inner| inner.split_once('}'));
        let plain = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
        let (name, next) = match braced {
            Some((name, next)) => (name, next),
            None => after.split_at(after.find(plain).unwrap_or(after.len())),
        };
        let value = var(name);
        all.push_str(&value.ok_or_else(|| {
            format!("`node_cache: {text}` names `{name}`, which is not set in the job")
        })?);
        rest = next;
    }
    all.push_str(rest);
    match all.starts_with('/') {
        true => Ok(all),
        false => Err(format!("`node_cache: {text}` is no absolute path on the node: {all}")),
    }
}

/// A job at its remote.
struct Node {
    setting: Setting,
    remote: Remote,
    desk: Desk,
    /// Its attempt's name.
    attempt: String,
    began: Instant,
    /// Set when it is told to go, or its time is nearly over.
    cancel: Arc<AtomicBool>,
}

/// Runs the attempt of task `task`: the main function of a job. `told` is what its script says: the
/// word of the run's notes, then the attempts of all tasks, a line each.
///
/// # Errors
/// What kept it from telling its leader how the step ended.
pub fn job(setting: Setting, remote: &Remote, run: &str, told: &str, task: usize) -> Result<()> {
    let mut lines = told.lines();
    let word = lines.next().unwrap_or_default();
    let Some(attempt) = lines.nth(task) else { bail!("the job's script names no task {task}") };
    let desk = Desk::new(remote, run, word);
    let node = Node {
        setting,
        remote: remote.clone(),
        desk,
        attempt: attempt.into(),
        began: Instant::now(),
        cancel: Arc::default(),
    };
    node.run()
}

impl Node {
    fn run(&self) -> Result<()> {
        let name = desk::note(&self.attempt, desk::ORDER);
        let mut read = self.persist(PATIENCE, || self.desk.read(std::slice::from_ref(&name)))?;
        // Taken back by the leader, or done long ago.
        let Some((_, body)) = read.pop() else { return Ok(()) };
        // Its own, so that one whose answer was lost knows it again, and another start does not.
        let place = &self.setting.place;
        let nonce = cache::remote::nonce();
        let started = json!({ "job": place.job, "host": place.host, "by": nonce }).to_string();
        let note = desk::note(&self.attempt, desk::STARTED);
        let first = self.persist(PATIENCE, || self.desk.put_new(&note, started.as_bytes()))?;
        let ordered = serde_json::from_slice::<Ordered>(&body);
        let (exit, kept) = match (first, &ordered) {
            (false, _) => (failed(Failure::Preempted, "its job was started a second time"), None),
            (true, Ok(ordered)) => self.work(ordered),
            (true, Err(error)) => {
                let build = &self.setting.build;
                let why = format!(
                    "the node runs `{build}` and does not understand its order: {error}\nhint: name the leader's binary under `program:`"
                );
                (failed(Failure::Error, why), None)
            }
        };
        let exit = Exit {
            answer: exit,
            place: place.clone(),
            seconds: self.began.elapsed().as_secs_f64(),
            cpus: ordered.as_ref().map_or(0, |ordered| ordered.cpus),
            gpus: ordered.as_ref().map_or(0, |ordered| ordered.gpus),
        };
        let (note, body) = (desk::note(&self.attempt, desk::EXIT), serde_json::to_vec(&exit)?);
        self.persist(self.patience(ordered.as_ref().ok()), || self.desk.put_new(&note, &body))?;
        if let Some(kept) = kept {
            let cache = kept.cache.clone();
            drop(kept);
            let _ = tidy(&cache, KEPT);
        }
        Ok(())
    }

    /// Does the work of an order, as far as it gets; what is to be held until its end is told.
    fn work(&self, ordered: &Ordered) -> (Answer, Option<Kept>) {
        self.listen(ordered);
        match self.kept(ordered) {
            Ok(kept) => (self.step(ordered, &kept), Some(kept)),
            Err(answer) => (answer, None),
        }
    }

    /// Prepares the node's cache: inputs, and a fresh attempt.
    fn kept(&self, ordered: &Ordered) -> Result<Kept, Answer> {
        let Order::Run { frozen, .. } = &ordered.order else {
            return Err(failed(Failure::Error, "its order is none to run a step"));
        };
        let store = &self.setting.store;
        let of_cache = |error: &dyn std::fmt::Display| {
            let why = format!(
                "the node's cache, {}, cannot be used: {error}\nhint: name a directory on a disk of the node under `node_cache:`",
                store.display()
            );
            failed(Failure::Lost, why)
        };
        let cache = Cache::open(store).map_err(|e| of_cache(&e))?;
        let wanted = inputs(ordered);
        let lease = cache.lease(&format!("job {}", self.setting.place.job));
        let lease = lease.map_err(|e| of_cache(&e))?;
        let digests: Vec<Digest> = wanted.iter().map(|input| input.digest).collect();
        lease.hold(&digests).map_err(|e| of_cache(&e))?;
        if ordered.build == self.setting.build {
            self.fetch(&cache, &wanted)?;
        }
        // What earlier jobs left of this key: an order says all that is to be gone on from.
        let _ = cache.attempts_clean(&frozen.key);
        let attempt = cache.attempt(&frozen.key).map_err(|e| of_cache(&e))?;
        records::prepare(&attempt.dir).map_err(|e| of_cache(&e))?;
        let from = match &ordered.checkpoint {
            Some(saved) => self.restore(&cache, &attempt, saved)?,
            None => None,
        };
        Ok(Kept { cache, _lease: lease, attempt: Some(attempt), from })
    }

    /// What the attempt goes on from.
    fn restore(
        &self,
        cache: &Cache,
        attempt: &Attempt,
        saved: &Saved,
    ) -> Result<Option<Saved>, Answer> {
        let restore = || saved::restore(&self.remote, cache, attempt, saved, &self.cancel);
        match self.persist(PATIENCE, restore) {
            Ok(()) => Ok(Some(saved.clone())),
            // Then all is done once more.
            Err(Trouble::Missing { .. } | Trouble::Damaged { .. }) => Ok(None),
            Err(trouble) => Err(not_come("its checkpoint", trouble)),
        }
    }

    fn fetch(&self, cache: &Cache, wanted: &[Output]) -> Result<(), Answer> {
        let fetch = |wanted: &[Output]| {
            self.remote.fetch(cache, wanted, &Progress::new(), &self.cancel).map(drop)
        };
        let trouble = match self.persist(PATIENCE, || fetch(wanted)) {
            Ok(()) => return Ok(()),
            Err(trouble) => trouble,
        };
        match trouble {
            Trouble::Missing { .. } | Trouble::Damaged { .. } => {
                let mut digests = Vec::new();
                for input in wanted {
                    let one = || fetch(std::slice::from_ref(input));
                    match self.persist(PATIENCE, one) {
                        Ok(()) => continue,
                        Err(Trouble::Missing { .. }) => {}
                        Err(Trouble::Damaged { digest, .. }) => {
                            let _ = self.remote.discard(&digest);
                        }
                        // Of this one nothing is known.
                        Err(trouble) => return Err(not_come("its inputs", trouble)),
                    }
                    digests.push(input.digest);
                }
                Err(Answer::Lost { digests })
            }
            trouble => Err(not_come("its inputs", trouble)),
        }
    }

    /// Runs the step and sends what it prints meanwhile, and what it made after.
    fn step(&self, ordered: &Ordered, kept: &Kept) -> Answer {
        let mut mine = ordered.clone();
        let attempt = kept.attempt.as_ref().expect("there until the drop");
        if let Order::Run { attempt: dir, .. } = &mut mine.order {
            dir.clone_from(&attempt.dir);
        }
        let (ended, done) = (AtomicBool::new(false), AtomicBool::new(false));
        let mut streams = Streams::new(&attempt.dir);
        let answer = std::thread::scope(|scope| {
            scope.spawn(|| {
                self.stream(&mut streams, &ended);
            });
            scope.spawn(|| self.keep(ordered, kept, (&ended, &done)));
            let answer = match Agent::new(self.setting.clone()) {
                Ok(mut agent) => {
                    // The clock of the job runs since its inputs were fetched, and longer.
                    agent.began = self.began;
                    agent.step(&mine, &|| false).answer
                }
                Err(error) => {
                    failed(Failure::Lost, format!("no worker could be started: {error:#}"))
                }
            };
            done.store(matches!(answer, Answer::Done { .. }), Ordering::Relaxed);
            ended.store(true, Ordering::Relaxed);
            answer
        });
        let Answer::Done { outputs, log } = &answer else { return answer };
        let log = log.map(|(digest, bytes)| of_log(digest, bytes));
        let made: Vec<Output> = outputs.iter().cloned().chain(log).collect();
        // Whatever signals say: the work is done, and until the job is killed it may get there.
        let (none, never) = (Default::default(), AtomicBool::new(false));
        let send = || self.remote.send(&kept.cache, &made, &none, &never);
        match self.persist(self.patience(Some(ordered)), send) {
            Ok(_) => answer,
            Err(trouble) => {
                failed(Failure::Lost, format!("its results could not be sent: {trouble}"))
            }
        }
    }

    /// Sends what the step prints and reports, less and less often.
    fn stream(&self, streams: &mut Streams, ended: &AtomicBool) {
        let (mut pause, mut last) = (PAUSE.0, Instant::now());
        loop {
            let over = ended.load(Ordering::Relaxed);
            if over || last.elapsed() > pause {
                let patience = if over { SHORT } else { Duration::ZERO };
                let sent = streams.send(over, &mut |name, body| {
                    let note = desk::note(&self.attempt, name);
                    self.persist(patience, || self.desk.put(&note, body)).is_ok()
                });
                last = Instant::now();
                pause = if sent { (pause * 5 / 4).min(PAUSE.1) } else { PAUSE.0 };
            }
            if over {
                return;
            }
            std::thread::sleep(TICK);
        }
    }

    /// Sends what the step seals, not too often while it runs, and the last when it ended without
    /// being done.
    fn keep(&self, ordered: &Ordered, kept: &Kept, (ended, done): (&AtomicBool, &AtomicBool)) {
        let attempt = kept.attempt.as_ref().expect("there until the drop");
        let (name, from) = (self.desk.place(&self.attempt), kept.from.as_ref());
        let keeper = Keeper::new(&self.remote, name, (&kept.cache, attempt), from);
        let Ok(mut keeper) = keeper else { return };
        let tell = |saved: &Saved| {
            let record = format!("{}-{}", desk::CHECKPOINT, saved.position);
            let body = serde_json::to_vec(saved).expect("plain values");
            self.desk.put(&desk::note(&self.attempt, &record), &body).is_ok()
        };
        let mut next = Instant::now();
        while !ended.load(Ordering::Relaxed) {
            if Instant::now() >= next {
                let began = Instant::now();
                // What does not go now may go the next time. That the step is done ends it.
                let _ = keeper.look(done, tell);
                next = Instant::now() + (began.elapsed() * SHARE).max(CHECKPOINTS);
            }
            std::thread::sleep(TICK);
        }
        if !done.load(Ordering::Relaxed) {
            let (keeper, never) = (RefCell::new(keeper), AtomicBool::new(false));
            let patience = self.patience(Some(ordered)).min(PATIENCE);
            let _ = self.persist(patience, || keeper.borrow_mut().look(&never, tell));
        }
    }

    /// Looks for signals and the clock, for what cannot do so itself. The step can.
    fn listen(&self, ordered: &Ordered) {
        let (weak, signals) = (Arc::downgrade(&self.cancel), self.setting.signals);
        let (began, limit, margin) = (self.began, ordered.limit_s, ordered.margin_s);
        std::thread::spawn(move || {
            while let Some(cancel) = weak.upgrade() {
                let over =
                    limit.is_some_and(|limit| limit - began.elapsed().as_secs_f64() < margin);
                if over || signals.load(Ordering::Relaxed) > 0 {
                    return cancel.store(true, Ordering::Relaxed);
                }
                drop(cancel);
                std::thread::sleep(TICK);
            }
        });
    }

    /// How long the end of a step may take to be told.
    fn patience(&self, ordered: Option<&Ordered>) -> Duration {
        let limit = ordered.and_then(|ordered| ordered.limit_s);
        let left = limit.map(|limit| (limit - self.began.elapsed().as_secs_f64()).max(1.0));
        left.map_or(PATIENCE, |left| Duration::from_secs_f64(left).min(PATIENCE * 4))
    }

    /// Asks a remote again that does not answer, for so long.
    fn persist<T>(
        &self,
        patience: Duration,
        ask: impl Fn() -> Result<T, Trouble>,
    ) -> Result<T, Trouble> {
        let started = Instant::now();
        loop {
            match ask() {
                Err(Trouble::Unavailable { .. }) if started.elapsed() < patience => {
                    std::thread::sleep(AGAIN);
                }
                result => return result,
            }
        }
    }
}

fn failed(failure: Failure, message: impl Into<String>) -> Answer {
    Answer::Failed { failure, message: message.into() }
}

fn not_come(what: &str, trouble: Trouble) -> Answer {
    match trouble {
        Trouble::Cancelled => failed(Failure::Preempted, "its job was told to end"),
        trouble => failed(Failure::Lost, format!("{what} did not come: {trouble}")),
    }
}

/// What a job holds of its node's cache. Nothing of its attempt stays.
struct Kept {
    cache: Cache,
    _lease: cache::Lease,
    attempt: Option<Attempt>,
    /// What it began with.
    from: Option<Saved>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        let Some(attempt) = self.attempt.take() else { return };
        let key = attempt.dir.parent().and_then(Path::file_name).map(|name| name.to_owned());
        drop(attempt);
        if let Some(Ok(key)) = key.and_then(|key| Some(key.to_str()?.parse())) {
            let _ = self.cache.attempts_clean(&key);
        }
    }
}

/// Removes from a node's cache what no job uses and is older than `kept`, now and then: nobody else
/// does.
fn tidy(cache: &Cache, kept: Duration) -> cache::Result<()> {
    let mark = cache.root().join("tidied");
    let age = std::fs::metadata(&mark).and_then(|meta| meta.modified()).map(|at| at.elapsed());
    match age {
        Ok(Ok(age)) if age < TIDY => return Ok(()),
        Ok(_) => {}
        // The first job of a node has nothing to remove.
        Err(_) => return cache.write(&mark, b""),
    }
    cache.write(&mark, b"")?;
    let mut collector = cache.collector(|| ())?;
    let facts = collector.survey(&[], &[])?;
    let policy = Policy { grace: kept, attempts_older_than: kept, ..Policy::default() };
    let plan = Plan::new(&facts, &policy);
    collector.carry_out(&facts, &plan, &mut |_| ()).map(drop)
}

/// What is sent in pieces of the two files of an attempt that grow.
struct Streams {
    log: Stream,
    answers: Stream,
}

impl Streams {
    fn new(dir: &Path) -> Streams {
        let answers = records::path(dir, records::ANSWERS);
        Streams {
            log: Stream { path: dir.join(LOG), what: desk::LOG, read: 0, sent: 0, most: LIVE.0 },
            answers: Stream {
                path: answers,
                what: desk::ANSWERS,
                read: 0,
                sent: 0,
                most: u64::MAX,
            },
        }
    }

    /// Gives new pieces to `put`; tells whether there were any. `last`: nothing more will come.
    fn send(&mut self, last: bool, put: &mut dyn FnMut(&str, &[u8]) -> bool) -> bool {
        let mut any = false;
        for stream in [&mut self.log, &mut self.answers] {
            while let Ok(Some(piece)) = stream.next(last) {
                let name = format!("{}-{}", stream.what, stream.sent);
                if !put(&name, &piece.body) {
                    break;
                }
                any = true;
                stream.read = piece.read;
                stream.sent += piece.body.len() as u64;
            }
        }
        any
    }
}

/// A file that grows.
struct Stream {
    path: PathBuf,
    what: &'static str,
    /// How far it was read, and how many bytes were sent.
    read: u64,
    sent: u64,
    /// So much of it is sent while it grows.
    most: u64,
}

/// The next bytes, and how far they go.
struct Piece {
    body: Vec<u8>,
    read: u64,
}

impl Stream {
    fn next(&self, last: bool) -> io::Result<Option<Piece>> {
        let mut file = File::open(&self.path)?;
        let length = file.metadata()?.len();
        let (mut from, mut body) = (self.read, Vec::new());
        if from >= self.most {
            let tail = length.saturating_sub(LIVE.1).max(from);
            if !last || length <= from {
                return Ok(None);
            }
            if tail > from {
                body = format!("\n[{} bytes are left out here]\n", tail - from).into_bytes();
            }
            from = tail;
        }
        file.seek(SeekFrom::Start(from))?;
        let read = file.take(PIECE).read_to_end(&mut body)? as u64;
        Ok((read > 0).then_some(Piece { body, read: from + read }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_node_s_cache_may_be_named_by_variables() {
        let var = |name: &str| (name == "NODE").then(|| "n1".to_string());
        assert_eq!(expand("/scratch/$NODE/x", &var).unwrap(), "/scratch/n1/x");
        assert_eq!(expand("/scratch/${NODE}y", &var).unwrap(), "/scratch/n1y");
        assert_eq!(expand("/plain", &var).unwrap(), "/plain");
        assert!(expand("/x/$OTHER", &var).unwrap_err().contains("`OTHER`"));
        assert!(expand("/x/$", &var).is_err());
        assert!(expand("$NODE/x", &var).unwrap_err().contains("absolute"));
    }

    #[test]
    fn a_node_s_cache_keeps_what_was_used_of_late() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let absorb = |text: &str| {
            let key = Digest::of(text.as_bytes()).to_string().parse().unwrap();
            let attempt = cache.attempt(&key).unwrap();
            std::fs::write(attempt.dir.join("x"), text).unwrap();
            let output = attempt.absorb("x", None, "x", attempt.dir.join("x")).unwrap();
            drop(attempt);
            cache.attempts_clean(&key).unwrap();
            output
        };
        let (free, held) = (absorb("free"), absorb("held"));
        let lease = cache.lease("a job").unwrap();
        lease.hold(&[held.digest]).unwrap();
        let present = || [&free, &held].map(|output| cache.present(output));
        let later = || {
            let mark = File::open(dir.path().join("tidied")).unwrap();
            mark.set_modified(std::time::SystemTime::now() - TIDY * 2).unwrap();
        };
        tidy(&cache, Duration::ZERO).unwrap();
        tidy(&cache, Duration::ZERO).unwrap();
        assert_eq!(present(), [true, true], "not so soon");
        later();
        tidy(&cache, KEPT).unwrap();
        assert_eq!(present(), [true, true], "it is young");
        later();
        tidy(&cache, Duration::ZERO).unwrap();
        assert_eq!(present(), [false, true]);
    }

    #[test]
    fn a_log_is_sent_in_pieces_and_of_a_long_one_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut streams = Streams::new(dir.path());
        streams.log.most = 3 * PIECE;
        let mut file = File::create(dir.path().join(LOG)).unwrap();
        let mut text = Vec::new();
        let mut send = |streams: &mut Streams, last, lose: bool| {
            streams.send(last, &mut |name, body| {
                assert_eq!(name, format!("log-{}", text.len()));
                if !lose {
                    text.extend_from_slice(body);
                }
                !lose
            })
        };
        assert!(!send(&mut streams, false, false), "nothing is there");
        file.write_all(b"one\n").unwrap();
        assert!(!send(&mut streams, false, true), "nothing went");
        assert!(send(&mut streams, false, false));
        file.write_all(&vec![b'x'; 3 << 20]).unwrap();
        assert!(send(&mut streams, false, false));
        file.write_all(&vec![b'y'; 100_000]).unwrap();
        file.write_all(b"the end\n").unwrap();
        assert!(!send(&mut streams, false, false), "enough while it grows");
        assert!(send(&mut streams, true, false));
        assert!(!send(&mut streams, true, false));
        let text = String::from_utf8(text).unwrap();
        assert!(text.starts_with("one\nxxx") && text.ends_with("yyythe end\n"));
        assert!(text.contains("x\n[34472 bytes are left out here]\nyyy"), "{}", text.len());
        assert_eq!(text.len() as u64, streams.log.sent);
    }
}
