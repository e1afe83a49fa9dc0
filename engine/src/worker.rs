//! The worker's side: takes frozen steps from its leader, one at a time, and runs them.
//!
//! It resolves digests in its own store, runs the stage, puts outputs into the store and answers.
//! When its leader is gone it ends everything below it and itself. It decides nothing.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use cache::{Attempt, Cache, Digest, Finished, Output};

use crate::command::{Command, WORK};
use crate::descendants;
use crate::event::Failure;
use crate::places;
use crate::stage::{
    Cancelled, Checkpoint, Context, DeviceFault, Diverged, Input, OUT, OutOfDeviceMemory, Registry,
    Report, Reporter, Stage,
};
use crate::wire::{self, Answer, Frozen, Order};

/// Name of the log in an attempt's directory.
pub const LOG: &str = "log";

/// The main function of a worker process: its standard input is the socket to the leader.
pub fn main(store: &Path, registry: Registry, build: &str) -> Result<()> {
    descendants::adopt();
    let stdin = io::stdin();
    let socket: OwnedFd = rustix::io::fcntl_dupfd_cloexec(stdin.as_fd(), 10)?;
    let null = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    let cache = Cache::open(store)?;
    if cache.is_shared() {
        // What programs leave here is the group's to read and to remove.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o007));
    }
    serve(UnixStream::from(socket), &cache, registry, build, true)
}

/// Serves the leader at the other end of `stream` until it is gone. `process`: whether this
/// process is ours alone, so that its output may be redirected and its descendants ended.
pub fn serve(
    stream: UnixStream,
    cache: &Cache,
    registry: Registry,
    build: &str,
    process: bool,
) -> Result<()> {
    wire::send(&stream, &Answer::Hello { protocol: wire::PROTOCOL, build: build.into() })?;
    let cancel = Arc::new(AtomicBool::new(false));
    let orders = listen(stream.try_clone()?, cancel.clone(), process);
    let mut last: Option<PathBuf> = None;
    for (frozen, attempt, places) in orders {
        if let Some(last) = last.filter(|_| process) {
            inherit(&last, &attempt, &frozen);
        }
        let job = Job { cache, registry, frozen: &frozen, places: &places, stream: &stream };
        let answer = job.run(&attempt, &cancel, process);
        if process {
            descendants::kill_all(&[]);
        }
        cancel.store(false, Ordering::Relaxed);
        wire::send(&stream, &answer)?;
        // Of one that failed, somebody may want to see what is there.
        last = matches!(answer, Answer::Done { .. }).then_some(attempt);
    }
    Ok(())
}

/// Moves what the attempt would make just so itself from the step before, which is over: an empty
/// log, the directories of outputs, and that of a command, for the next one to clear. Anything may be
/// gone.
fn inherit(last: &Path, attempt: &Path, frozen: &Frozen) {
    let log = last.join(LOG);
    if std::fs::symlink_metadata(&log).is_ok_and(|meta| meta.is_file() && meta.len() == 0) {
        let _ = std::fs::rename(log, attempt.join(LOG));
    }
    let out = attempt.join(OUT);
    if frozen.stage != Command::NAME && std::fs::rename(last.join(OUT), &out).is_ok() {
        let ports = frozen.ports.iter().map(|(port, ..)| PathBuf::from(port));
        // What cannot be used is away then, and made by the first who wants it.
        let _ = places::make(&out, &ports.chain(["".into()]).collect());
    }
    if frozen.stage == Command::NAME {
        let _ = std::fs::rename(last.join(WORK), attempt.join(WORK));
    }
}

type Ordered = (Box<Frozen>, PathBuf, BTreeMap<Digest, PathBuf>);

/// Hears orders while a step runs, so that a cancel gets through and the leader's end is noticed.
fn listen(stream: UnixStream, cancel: Arc<AtomicBool>, process: bool) -> Receiver<Ordered> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for order in wire::receive::<Order>(stream) {
            match order {
                Order::Cancel => cancel.store(true, Ordering::Relaxed),
                Order::Run { frozen, attempt, places } => {
                    if sender.send((frozen, attempt, places)).is_err() {
                        break;
                    }
                }
            }
        }
        cancel.store(true, Ordering::Relaxed);
        if process {
            descendants::kill_all(&[]);
            std::process::exit(0);
        }
    });
    receiver
}

struct Job<'a> {
    cache: &'a Cache,
    registry: Registry,
    frozen: &'a Frozen,
    places: &'a BTreeMap<Digest, PathBuf>,
    stream: &'a UnixStream,
}

/// Artifacts in the store, and the log with its length if there is one.
type Absorbed = (Vec<Output>, Option<(Digest, u64)>);

impl Job<'_> {
    fn run(&self, dir: &Path, cancel: &Arc<AtomicBool>, process: bool) -> Answer {
        keep_panics();
        let lost = self.lost();
        if !lost.is_empty() {
            return Answer::Lost { digests: lost };
        }
        let result = catch_unwind(AssertUnwindSafe(|| self.attempt(dir, cancel, process)));
        match result {
            Ok(Ok((outputs, log))) => Answer::Done { outputs, log },
            Ok(Err(error)) => {
                Answer::Failed { failure: kind_of(&error), message: explained(&error, dir) }
            }
            Err(_) => Answer::Failed { failure: Failure::Panic, message: kept_panic() },
        }
    }

    /// Inputs from the store whose bytes are not there or not right.
    fn lost(&self) -> Vec<Digest> {
        let inputs = self.frozen.inputs.iter();
        let inputs = inputs.flat_map(|(port, items)| items.iter().map(move |item| (port, item)));
        let ours = inputs.filter(|(_, item)| !self.places.contains_key(&item.digest));
        let wrong = ours.filter(|(port, item)| self.cache.check(&item.output(port)).is_err());
        let wrong: BTreeSet<Digest> = wrong.map(|(_, item)| item.digest).collect();
        // A worker ends without ceremony: what it learned of the bytes is kept now.
        self.cache.flush_index();
        wrong.into_iter().collect()
    }

    fn attempt(&self, dir: &Path, cancel: &Arc<AtomicBool>, process: bool) -> Result<Absorbed> {
        let stage = self.registry.get(&self.frozen.stage);
        let stage = stage.with_context(|| format!("no stage `{}`", self.frozen.stage))?;
        if stage.version != self.frozen.version {
            bail!(
                "worker has version {} of stage `{}`, the step wants {}",
                stage.version,
                stage.name,
                self.frozen.version
            );
        }
        let attempt = self.cache.attempt_at(dir)?;
        if process {
            redirect(&dir.join(LOG))?;
        }
        let mut ctx = self.context(dir, cancel)?;
        let started = Instant::now();
        (stage.run)(&self.frozen.params, &mut ctx)?;
        ctx.checkpoint_wait()?;
        ctx.check_cancelled()?;
        self.publishable(&attempt, &ctx, started.elapsed().as_secs_f64())
    }

    fn context(&self, dir: &Path, cancel: &Arc<AtomicBool>) -> Result<Context> {
        let stage = self.registry.get(&self.frozen.stage);
        let ports = stage.map_or(&[][..], |stage| (stage.ports)().inputs);
        let mut inputs = BTreeMap::new();
        for (port, items) in &self.frozen.inputs {
            let by_tensor = ports.iter().any(|p| p.name == port && p.tensors);
            let locate = |(i, item): (usize, &wire::FrozenInput)| -> Result<Input> {
                let path = match self.places.get(&item.digest) {
                    Some(path) => path.clone(),
                    None if by_tensor => self.cache.path(&item.digest),
                    None => {
                        let make = || assembled(dir, port, i, &item.name);
                        self.cache.whole(&item.output(port), make)?
                    }
                };
                Ok(Input { index: item.index, name: item.name.clone(), path })
            };
            let located: Result<Vec<Input>> = items.iter().enumerate().map(locate).collect();
            inputs.insert(port.clone(), located.with_context(|| format!("input `{port}`"))?);
        }
        let resume = self.cache.checkpoint_latest(&self.frozen.key);
        Ok(Context {
            inputs,
            ports: self.frozen.ports.clone(),
            dir: dir.to_path_buf(),
            made: Vec::new(),
            threads: self.frozen.threads.max(1),
            reporter: Box::new(Socket { stream: self.stream.try_clone()?, last: None }),
            cancel: cancel.clone(),
            resume: resume.map(|(position, dir)| Checkpoint { position, dir }),
            background: Default::default(),
            secrets: self.frozen.secrets.clone(),
        })
    }

    /// Checks that every port was served and moves the artifacts into the store.
    fn publishable(&self, attempt: &Attempt, ctx: &Context, seconds: f64) -> Result<Absorbed> {
        let stage = self.registry.get(&self.frozen.stage).map(|stage| (stage.ports)().outputs);
        let optional =
            |port: &str| stage.into_iter().flatten().any(|o| o.name == port && o.optional);
        for (port, list, _) in &self.frozen.ports {
            if !list && !optional(port) && !ctx.made.iter().any(|made| made.port == *port) {
                bail!("the stage made nothing for its output `{port}`");
            }
        }
        let mut made = ctx.made.clone();
        made.sort();
        let mut outputs = Vec::with_capacity(made.len());
        for item in &made {
            if item.path.symlink_metadata().is_err() {
                bail!("output `{}` was declared as {}, but it is not there", item.port, item.name);
            }
            let absorbed = attempt.absorb(&item.port, item.index, &item.name, &item.path);
            outputs.push(absorbed.with_context(|| format!("output `{}`", item.port))?);
        }
        let log = attempt.dir.join(LOG);
        let log = match std::fs::symlink_metadata(&log) {
            Ok(meta) if meta.is_file() && meta.len() > 0 => {
                let copy = attempt.dir.join("log.kept");
                // A program may have put a link there, which is not written through.
                let _ = std::fs::remove_file(&copy);
                std::fs::copy(&log, &copy).context("cannot keep the log")?;
                Some(attempt.absorb_log(&copy)?)
            }
            _ => None,
        };
        attempt.finish(&Finished {
            outputs: outputs.clone(),
            log,
            provenance: serde_json::json!({ "seconds": seconds }),
        })?;
        Ok((outputs, log))
    }
}

/// Where a file that the store keeps in parts is put together for a stage that wants a path.
fn assembled(dir: &Path, port: &str, i: usize, name: &str) -> PathBuf {
    let folder = dir.join("assembled").join(port).join(i.to_string());
    // What cannot be made is told by whoever writes into it.
    let _ = std::fs::create_dir_all(&folder);
    folder.join(name)
}

/// An error in words, with what helps when it happened on a full disk.
fn explained(error: &anyhow::Error, dir: &Path) -> String {
    let text = format!("{error:#}");
    match cache::disk::trouble(dir) {
        Some(full) if !text.contains("the disk at `") => format!("{text}; {full}"),
        _ => text,
    }
}

/// The kind of failure a stage's error stands for.
fn kind_of(error: &anyhow::Error) -> Failure {
    if error.is::<Cancelled>() {
        Failure::Cancelled
    } else if error.is::<Diverged>() {
        Failure::Diverged
    } else if error.is::<DeviceFault>() {
        Failure::Fault
    } else if error.is::<OutOfDeviceMemory>() {
        Failure::OutOfMemory
    } else {
        Failure::Error
    }
}

/// Sends standard output and error of this process, and so of its children, to `log`.
fn redirect(log: &Path) -> Result<()> {
    let file = std::fs::OpenOptions::new().create(true).append(true).open(log);
    let file = file.with_context(|| format!("cannot open {}", log.display()))?;
    rustix::stdio::dup2_stdout(&file)?;
    rustix::stdio::dup2_stderr(&file)?;
    Ok(())
}

/// Reports over the socket; progress at most ten times a second.
struct Socket {
    stream: UnixStream,
    last: Option<Instant>,
}

impl Reporter for Socket {
    fn report(&mut self, report: Report) {
        if let Report::Progress { done, total, .. } = &report {
            let soon = self.last.is_some_and(|last| last.elapsed() < Duration::from_millis(100));
            if soon && done != total {
                return;
            }
            self.last = Some(Instant::now());
        }
        // A leader that is gone is noticed by the listener, which ends this process.
        let _ = wire::send(&self.stream, &Answer::Report { report });
    }
}

/// Message and place of the newest panic of this process, and of this thread.
static PANIC: Mutex<Option<String>> = Mutex::new(None);
thread_local! {
    static PANIC_HERE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// From now on panics leave message and place for the answer; the hook before still writes the log.
fn keep_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let text = info.to_string();
            *PANIC.lock().unwrap_or_else(|e| e.into_inner()) = Some(text.clone());
            // A thread that ends has no such variable any more; the other one is enough then.
            let _ = PANIC_HERE.try_with(|here| *here.borrow_mut() = Some(text));
            before(info);
        }));
    });
}

/// What the panic just caught said: one of this thread, else of a thread the stage started.
fn kept_panic() -> String {
    let here = PANIC_HERE.with(|here| here.borrow_mut().take());
    let anywhere = || PANIC.lock().unwrap_or_else(|e| e.into_inner()).take();
    here.or_else(anywhere).unwrap_or_else(|| "no message".into())
}
