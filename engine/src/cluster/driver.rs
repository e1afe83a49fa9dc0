//! The leader's thread for a cluster: orders come in, messages as from workers go out. `submit.rs`
//! brings orders to the batch system or to pilots, `watch.rs` finds out what becomes of them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::batch::{Cancel, Shape};
use super::clerk::{self, Ask, Said};
use super::courier::{Carrier, News};
use super::far::Far;
use super::journal::{self, Journal, Line, Places};
use super::orphans::{By, Orphan};
use super::pilot::Queue;
use super::records::{self, Place};
use super::settings::Settings;
use super::{Setup, submit};
use crate::event::{Failure, Job as Told};
use crate::pool::{Message, Messages};
use crate::wire::{Answer, Order};

/// How often the leader says that it lives, and looks whether it is to end.
const BEAT: Duration = Duration::from_secs(2);
/// At its end, pilots' farewells are waited for so long.
const FAREWELLS: Duration = Duration::from_secs(2);
/// And the batch system's answers.
const LAST_WORDS: Duration = Duration::from_secs(20);
/// Pauses between looks at the mailbox, from first to longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));

/// What comes to the driver.
pub(super) enum Inbox {
    Command(Command),
    Said(Said),
    News(News),
}

impl From<News> for Inbox {
    fn from(news: News) -> Inbox {
        Inbox::News(news)
    }
}

impl From<Said> for Inbox {
    fn from(said: Said) -> Inbox {
        Inbox::Said(said)
    }
}

/// From the executor.
pub(super) enum Command {
    Run {
        worker: u64,
        order: Box<Order>,
        shape: Shape,
        pilot: bool,
    },
    /// Goes on with an attempt of another leader.
    Attach {
        worker: u64,
        orphan: Orphan,
    },
    /// Let it save a checkpoint and stop.
    Stop(u64),
    /// Nobody waits for it any more.
    Drop(u64),
    /// All is over; what goes on is ended, or left.
    Close {
        leave: bool,
    },
}

/// A step's attempt.
pub(super) struct Job {
    pub dir: PathBuf,
    pub name: String,
    pub shape: Shape,
    /// Until it is submitted.
    pub order: Option<Box<Order>>,
    pub at: At,
    /// How much of its reports was read.
    pub read: u64,
    pub place: Option<Place>,
    /// What was last said of its place in the queue.
    pub reason: Option<String>,
    /// Since when the batch system does not know it, or says that it is over, while no exit record
    /// is there; and how often it was asked since.
    pub missing: Option<(Instant, u32)>,
}

/// Where an attempt is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum At {
    /// Here.
    Waiting,
    /// A task of an array.
    Task { array: String, task: usize },
    /// In the queue of the pilots of a shape, or taken by one of them.
    Pilots { queue: PathBuf, file: String },
}

/// An array that was, or is to be, submitted.
pub(super) struct Batched {
    pub array: super::batch::Array,
    pub state: Sent,
    /// Attempts of its tasks; none of pilots.
    pub workers: Vec<u64>,
    /// Of pilots, the queue they serve, and how many of them go on.
    pub pilots: Option<(PathBuf, usize)>,
    /// Of pilots, how often in a row the batch system did not know them.
    pub unknown: u32,
    /// Tasks that were to end before the array had an id.
    pub unwanted: Vec<(usize, Cancel)>,
}

impl Batched {
    /// A task of the array that has the id `id`.
    pub fn task_id(&self, id: &str, task: usize) -> String {
        match self.array.count {
            0 | 1 => id.to_string(),
            _ => format!("{id}_{task}"),
        }
    }
}

/// Whether an array is in the batch system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// Being submitted.
    Sending,
    /// To be submitted again, not before this.
    Later(Instant),
    /// Nobody knows since when; to be asked for.
    Unsure(Instant),
    /// It is there.
    Known(String),
}

/// Pilots of one shape.
pub(super) struct Pilots {
    pub shape: Shape,
    pub queue: Queue,
    pub next: u64,
    /// Arrays of them in a row that ended before they did anything.
    pub barren: u32,
}

pub(super) struct Driver {
    pub settings: Settings,
    pub run: PathBuf,
    pub id: String,
    pub program: PathBuf,
    pub max_array: usize,
    pub nodes: usize,
    pub default_s: Option<u64>,
    pub places: Places,
    pub store: PathBuf,
    /// Where nodes share no directory with this machine, and when all was taken that they had left.
    pub far: Option<Far>,
    pub looked: Option<Instant>,
    pub build: String,
    messages: Messages,
    inbox: Receiver<Inbox>,
    pub clerk: Sender<Ask>,
    pub journal: Journal,
    pub jobs: HashMap<u64, Job>,
    pub by_name: HashMap<String, u64>,
    pub waiting: Vec<(u64, bool)>,
    /// When the first and the last of those came.
    pub came: Option<(Instant, Instant)>,
    pub arrays: BTreeMap<String, Batched>,
    pub pilots: Vec<Pilots>,
    pub numbers: usize,
    pub mails: BTreeSet<PathBuf>,
    pub pause: Duration,
    pub polling: bool,
    pub poll_at: Instant,
    pub poll_pause: Duration,
    pub tailed: Instant,
    beat: (Instant, u64),
    /// When steps failed on a node by no fault of theirs.
    pub bad: HashMap<String, Vec<Instant>>,
    /// Why arrays wait that the batch system refuses for now.
    pub refused: Option<String>,
    /// Pilots that took an order or said farewell.
    pub useful: HashSet<String>,
    /// What is to be cancelled, how many requests are on their way, and those that nobody heard.
    ends: Vec<(String, Cancel)>,
    cancelling: usize,
    unheard: Vec<(Instant, Vec<String>, Cancel)>,
    closing: Option<bool>,
}

impl Job {
    /// An attempt of which nothing was heard yet.
    pub fn new(dir: PathBuf, name: String, shape: Shape, order: Option<Box<Order>>, at: At) -> Job {
        let (read, place, reason, missing) = (0, None, None, None);
        Job { dir, name, shape, order, at, read, place, reason, missing }
    }
}

impl Driver {
    pub fn new(
        setup: Setup,
        store: &Path,
        carrier: Option<Carrier>,
        build: &str,
        messages: Messages,
    ) -> io::Result<(Sender<Inbox>, Driver)> {
        let places = Places::of(&setup.run);
        for dir in [&places.root, &places.mail(), &places.jobs()] {
            fs::create_dir_all(dir)?;
        }
        let journal = Journal::create(&setup.run)?;
        let (sender, inbox) = channel();
        let far = carrier.map(|carrier| Far::start(carrier, &setup, &places, &sender));
        let far = far.transpose()?;
        let now = Instant::now();
        let driver = Driver {
            settings: setup.settings,
            run: setup.run,
            id: setup.id,
            program: setup.program,
            max_array: setup.max_array.max(1),
            nodes: setup.nodes,
            default_s: setup.default_s,
            mails: BTreeSet::from([places.mail()]),
            places,
            store: store.to_path_buf(),
            far,
            looked: None,
            build: build.into(),
            messages,
            inbox,
            clerk: clerk::start(setup.batch, sender.clone()),
            journal,
            jobs: HashMap::new(),
            by_name: HashMap::new(),
            waiting: Vec::new(),
            came: None,
            arrays: BTreeMap::new(),
            pilots: Vec::new(),
            numbers: 0,
            pause: PAUSE.0,
            polling: false,
            poll_at: now,
            poll_pause: submit::POLL,
            tailed: now,
            beat: (now.checked_sub(BEAT).unwrap_or(now), 0),
            bad: HashMap::new(),
            refused: None,
            useful: HashSet::new(),
            ends: Vec::new(),
            cancelling: 0,
            unheard: Vec::new(),
            closing: None,
        };
        Ok((sender, driver))
    }

    pub fn run(mut self) {
        loop {
            match self.inbox.recv_timeout(self.pause) {
                Ok(first) => {
                    self.hear(first);
                    while let Ok(next) = self.inbox.try_recv() {
                        self.hear(next);
                    }
                    self.pause = PAUSE.0;
                }
                Err(RecvTimeoutError::Timeout) => self.pause = (self.pause * 3 / 2).min(PAUSE.1),
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if let Some(leave) = self.closing {
                return self.close(leave);
            }
            self.live();
            self.submit();
            if self.read_mail() {
                self.pause = PAUSE.0;
            }
            self.read_answers();
            self.ask();
        }
    }

    fn hear(&mut self, what: Inbox) {
        match what {
            Inbox::Command(Command::Run { worker, order, shape, pilot }) => {
                self.accept(worker, order, shape, pilot);
            }
            Inbox::Command(Command::Attach { worker, orphan }) => self.attach(worker, orphan),
            Inbox::Command(Command::Stop(worker)) => self.stop(worker, Cancel::Gently),
            Inbox::Command(Command::Drop(worker)) => {
                self.stop(worker, Cancel::Now);
                self.forget(worker);
            }
            Inbox::Command(Command::Close { leave }) => self.closing = Some(leave),
            Inbox::Said(Said::Submitted { name, result }) => self.submitted(&name, result),
            Inbox::Said(Said::Polled { names, asked, result }) => {
                self.polled(&names, asked, result);
            }
            Inbox::News(news) => self.take_news(news),
            Inbox::Said(Said::Cancelled { ids, how, well }) => {
                self.cancelling -= 1;
                if !well {
                    self.unheard.push((Instant::now() + submit::AGAIN, ids, how));
                }
            }
        }
    }

    fn accept(&mut self, worker: u64, order: Box<Order>, shape: Shape, pilot: bool) {
        let Order::Run { attempt, .. } = &*order else { return };
        let name = records::name_of(attempt);
        let job = Job::new(attempt.clone(), name.clone(), shape, Some(order), At::Waiting);
        self.by_name.insert(name, worker);
        self.jobs.insert(worker, job);
        match self.far {
            Some(_) => self.dispatch(worker),
            None => self.wait(worker, pilot),
        }
    }

    /// Lets an order wait for others that can be submitted with it.
    pub fn wait(&mut self, worker: u64, pilot: bool) {
        self.waiting.push((worker, pilot));
        let now = Instant::now();
        self.came = Some((self.came.map_or(now, |(first, _)| first), now));
    }

    fn attach(&mut self, worker: u64, orphan: Orphan) {
        let Some(dir) = records::dir_of(&self.store, &orphan.attempt) else { return };
        let (name, array, task, single) = match &orphan.by {
            By::Task { name, array, task, single } | By::Pilot { name, array, task, single } => {
                (name.clone(), array.clone(), *task, *single)
            }
            By::Nobody => return self.attach_finished(worker, orphan.attempt, dir),
            By::Queue { .. } => return,
        };
        if let Some(far) = &self.far {
            far.courier.also(&orphan.run, orphan.mail.clone());
        }
        let line = Line::Attached {
            name: name.clone(),
            id: array.clone(),
            task,
            attempt: orphan.attempt.clone(),
        };
        // Without it, whoever comes after this leader does the work once more.
        let _ = self.journal.write(&line);
        let job = Job::new(
            dir,
            orphan.attempt.clone(),
            Shape::default(),
            None,
            At::Task { array: name.clone(), task },
        );
        self.by_name.insert(orphan.attempt, worker);
        self.jobs.insert(worker, job);
        self.mails.insert(orphan.mail);
        let count = if single { 1 } else { (task + 1).max(2) };
        self.arrays.entry(name.clone()).or_insert_with(|| Batched {
            array: super::batch::Array { name, count, ..Default::default() },
            state: Sent::Known(array),
            workers: Vec::new(),
            pilots: None,
            unknown: 0,
            unwanted: Vec::new(),
        });
        self.began(worker);
        // It may have ended in the moment in which its mailbox was not ours.
        self.look_for_exit(worker);
        self.poll_soon();
    }

    /// Tells the executor something of a step.
    pub fn tell(&self, worker: u64, answer: Answer) {
        (self.messages)(Message { worker, answer: Some(answer) });
    }

    pub fn tell_job(&self, worker: u64, said: Told) {
        self.tell(worker, Answer::Job { said });
    }

    /// A step failed by no fault of its own.
    pub fn lose(&mut self, worker: u64, failure: Failure, message: String) {
        self.forget(worker);
        self.tell(worker, Answer::Failed { failure, message });
    }

    pub fn forget(&mut self, worker: u64) {
        self.waiting.retain(|(waiting, _)| *waiting != worker);
        if let Some(job) = self.jobs.remove(&worker) {
            self.by_name.remove(&job.name);
        }
    }

    /// Ends an attempt, or lets it end.
    fn stop(&mut self, worker: u64, how: Cancel) {
        let Some(job) = self.jobs.get(&worker) else { return };
        match job.at.clone() {
            At::Waiting => {
                if how == Cancel::Gently {
                    self.lose(worker, Failure::Cancelled, "stopped".into());
                }
            }
            At::Task { array, task } => {
                let Some(batched) = self.arrays.get_mut(&array) else { return };
                match &batched.state {
                    Sent::Known(id) => {
                        let id = batched.task_id(id, task);
                        self.cancel(vec![id], how);
                        self.poll_soon();
                    }
                    Sent::Later(_) if how == Cancel::Gently => {
                        self.lose(worker, Failure::Cancelled, "stopped".into());
                    }
                    _ => batched.unwanted.push((task, how)),
                }
            }
            At::Pilots { queue, file } => {
                let queue = Queue(queue);
                let revoked = fs::remove_file(queue.queue().join(&file)).is_ok();
                if revoked && how == Cancel::Gently {
                    self.lose(worker, Failure::Cancelled, "stopped".into());
                } else if !revoked {
                    let _ = fs::write(queue.cancel().join(&job.name), "");
                }
            }
        }
    }

    /// Has jobs ended, soon.
    pub fn cancel(&mut self, ids: Vec<String>, how: Cancel) {
        self.ends.extend(ids.into_iter().map(|id| (id, how)));
    }

    /// Asks once for all ends that are wanted, and again for those that nobody heard of.
    pub fn send_cancels(&mut self) {
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.unheard).into_iter().partition(|u| u.0 <= now);
        self.unheard = later;
        let due: Vec<(Instant, Vec<String>, Cancel)> = due;
        due.into_iter().for_each(|(_, ids, how)| self.cancel(ids, how));
        let ends = std::mem::take(&mut self.ends);
        for how in [Cancel::Gently, Cancel::Now] {
            let ids = ends.iter().filter(|(_, wanted)| *wanted == how).map(|(id, _)| id.clone());
            let ids: Vec<String> = ids.collect();
            if !ids.is_empty() && self.clerk.send(Ask::Cancel(ids, how)).is_ok() {
                self.cancelling += 1;
            }
        }
    }

    /// Says that the leader lives; looks whether somebody wants it to end.
    fn live(&mut self) {
        let (last, count) = self.beat;
        if last.elapsed() < BEAT {
            return;
        }
        self.beat = (Instant::now(), count + 1);
        let _ = records::write(&self.places.beat(), &(count + 1));
        if journal::is_to_end(&self.run) {
            (self.messages)(Message { worker: u64::MAX, answer: Some(Answer::Cancelled) });
        }
    }

    /// Ends pilots and what else goes on, or leaves it all.
    fn close(mut self, leave: bool) {
        if leave {
            return;
        }
        for pilots in &self.pilots {
            let _ = fs::write(pilots.queue.end(), "");
        }
        let started = Instant::now();
        while self.pilots_alive() > 0 && started.elapsed() < FAREWELLS {
            std::thread::sleep(PAUSE.0 * 4);
            self.read_mail();
        }
        // What is being submitted gets an id first.
        self.hear_while(|driver| driver.arrays.values().any(|b| b.state == Sent::Sending));
        let ids = self.still_there();
        self.unheard.clear();
        self.cancel(ids, Cancel::Now);
        self.send_cancels();
        self.hear_while(|driver| driver.cancelling > 0);
        // What may be left is found by whoever comes, while the journal says so.
        let unsure = |b: &Batched| matches!(b.state, Sent::Sending | Sent::Unsure(_));
        let left = self.cancelling > 0 || !self.unheard.is_empty();
        if !left && !self.arrays.values().any(unsure) {
            Journal::close(&self.run);
            if let Some(far) = self.far.take() {
                far.clear(&self.run);
            }
        }
    }

    /// Ids of what may be in the batch system though nobody wants it any more.
    fn still_there(&self) -> Vec<String> {
        let mut ids: BTreeSet<String> =
            self.unheard.iter().flat_map(|(_, ids, _)| ids.clone()).collect();
        for batched in self.arrays.values() {
            let Sent::Known(id) = &batched.state else { continue };
            // What still waits in the queue would find nothing to do.
            let pilots = batched.pilots.as_ref().is_some_and(|(_, alive)| *alive > 0);
            if pilots || batched.workers.iter().any(|worker| self.jobs.contains_key(worker)) {
                ids.insert(id.clone());
            }
        }
        for job in self.jobs.values() {
            let At::Task { array, task } = &job.at else { continue };
            let Some(batched) = self.arrays.get(array) else { continue };
            if let (Sent::Known(id), true) = (&batched.state, batched.workers.is_empty()) {
                ids.insert(batched.task_id(id, *task));
            }
        }
        ids.into_iter().collect()
    }

    /// Listens to the clerk while something is `open`, but not for long.
    fn hear_while(&mut self, open: impl Fn(&Driver) -> bool) {
        let end = Instant::now() + LAST_WORDS;
        while open(self) {
            let left = end.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(Inbox::Said(Said::Polled { .. })) | Ok(Inbox::Command(_)) => {}
                Ok(said) => self.hear(said),
                Err(_) => return,
            }
        }
    }

    pub fn pilots_alive(&self) -> usize {
        self.arrays.values().filter_map(|b| b.pilots.as_ref()).map(|(_, alive)| alive).sum()
    }

    pub fn poll_soon(&mut self) {
        self.poll_pause = submit::POLL;
        self.poll_at = self.poll_at.min(Instant::now() + submit::POLL);
    }
}
