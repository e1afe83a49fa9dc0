//! The one loop: schedule ↔ cache ↔ workers. Decides nothing that [`crate::schedule`] decides.
//!
//! `budget.rs` leaves what would end too late, `found.rs` looks keys up and remembers what was found,
//! `standing.rs` settles what is as an earlier run found it, `fetch.rs` brings what steps want of a
//! hub, `launch.rs` brings a granted step to a worker, `gpus.rs` finds GPUs for it, `settle.rs` takes
//! what came back. Everything observable leaves as an [`Event`] through one function, in the order in
//! which it happened.

mod budget;
mod fetch;
mod found;
mod gpus;
mod jobs;
mod launch;
mod needed;
mod options;
mod remote;
mod settle;
mod standing;
mod tidy;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::Result;
use cache::{Attempt, Cache, Claim, Committer, Digest, Hit, Key, Lease, Output, Published};

pub use budget::{Budget, Left, Why};
pub use found::Found;
pub use options::{OnCluster, Options};

use crate::event::{Event, Failure, Summary};
use crate::gpu::desk::Desk;
use crate::hub;
use crate::key::PreImage;
use crate::lookup::{self, Inputs};
use crate::plan::Plan;
use crate::pool::{Crew, Message, Runner};
use crate::schedule::{Command, Need, Schedule, Slots, State};
use crate::stage::{Cpu, Registry};
use crate::wire::{Answer, Order};

/// How often time-outs, foreign claims and the user's Ctrl-C are looked at.
const TICK: Duration = Duration::from_millis(40);
/// How often each of the foreign claims and GPUs is.
const POLL: Duration = Duration::from_millis(150);
/// From so many steps on, a run is prepared on two threads.
const MANY: usize = 1000;
/// How often leases of other machines are.
const POLL_REMOTE: Duration = Duration::from_secs(2);

/// What is known of each step after a run.
#[derive(Clone, Debug, Default)]
pub struct Settled {
    /// Its key, once its inputs were known.
    pub key: Option<Key>,
    /// Its artifacts, once it was done. Of what stands as an earlier run found it, only where another
    /// step asks for them.
    pub outputs: Option<Vec<Output>>,
}

/// What a run came to.
pub struct Outcome {
    /// Totals.
    pub summary: Summary,
    /// By position in the plan.
    pub steps: Vec<Settled>,
    /// What was left for want of time, each without those that need it.
    pub left: Vec<Left>,
    /// Why results could not be kept, if some could not (a full disk).
    pub unkept: Option<cache::Error>,
    /// What it found, to be kept for the next one that asks the same.
    pub found: Option<Found>,
    /// Keeps what the run used and made from garbage collection until it is dropped.
    pub lease: Lease,
}

/// What a run needs beside the plan.
pub struct Setting<'a> {
    /// All stages.
    pub registry: Registry,
    /// The store.
    pub cache: &'a Cache,
    /// Who runs the steps.
    pub crew: Crew,
    /// Build of the binary, for the handshake and the record.
    pub build: &'a str,
    /// Id of the run, shown to whoever waits for it.
    pub run: &'a str,
    /// Where models come from.
    pub hub: &'a hub::Settings,
    /// Where results are shared with other machines.
    pub remote: Option<&'a cache::remote::Remote>,
    /// Raised by each Ctrl-C: 1 stops cleanly, 2 at once.
    pub interrupts: &'a AtomicU32,
    /// When the run is stopped, jobs of a cluster go on without it.
    pub leave: &'a AtomicBool,
}

/// Runs `plan`. Events go to `sink` as they happen.
pub fn run(
    plan: &Plan,
    setting: Setting<'_>,
    options: &Options,
    sink: &mut dyn FnMut(Event),
) -> Result<Outcome> {
    crate::descendants::adopt();
    Executor::new(plan, setting, options, sink)?.run()
}

enum Heard {
    Worker(Message),
    Durable(Vec<(Key, Published)>),
    Hub(fetch::Said),
    Remote(remote::Said),
}

/// A launched step.
struct Running {
    worker: u64,
    claim: Option<Claim>,
    attempt: Attempt,
    started: Instant,
    /// Whether somebody works at it: not while its job waits in a queue.
    begun: bool,
    gpus: Vec<String>,
    key: Key,
}

/// What a step waits for that another process has, and when that was (or is to be) looked at.
enum Blocked {
    Claim(Instant),
    Gpus(Instant),
    /// A lease that another machine has.
    Lease(Instant),
    /// The answer of a remote, which ends the waiting.
    Remote,
}

impl Blocked {
    /// Whether it is to be looked at again.
    fn due(&self) -> bool {
        match self {
            Blocked::Claim(at) | Blocked::Gpus(at) => at.elapsed() > POLL,
            Blocked::Lease(at) => at.elapsed() > POLL_REMOTE,
            Blocked::Remote => false,
        }
    }
}

struct Executor<'a> {
    plan: &'a Plan,
    options: &'a Options,
    registry: Registry,
    cache: &'a Cache,
    run_id: &'a str,
    build: &'a str,
    interrupts: &'a AtomicU32,
    leave: &'a AtomicBool,
    sink: &'a mut dyn FnMut(Event),
    schedule: Schedule,
    /// Positions in the plan of the steps this run looks at, and back.
    steps: Vec<usize>,
    settled: Vec<Settled>,
    /// Pre-images of steps that are to run.
    images: HashMap<usize, PreImage>,
    files: lookup::Files<'a>,
    fetching: fetch::Fetching<'a>,
    sharing: Option<remote::Sharing<'a>>,
    finder: found::Finder,
    attempts: Vec<u32>,
    rewound: Vec<bool>,
    /// How often each step ran again because its bytes were lost.
    rewinds: Vec<u32>,
    running: HashMap<usize, Running>,
    by_worker: HashMap<u64, usize>,
    blocked: HashMap<usize, Blocked>,
    waiting: HashSet<usize>,
    /// Steps whose results the committer has, and how often: what was imported may be made again meanwhile.
    publishing: HashMap<Key, (usize, u32)>,
    desk: Desk,
    /// Since when a step has had too little GPU memory.
    short: HashMap<usize, Instant>,
    pool: Box<dyn Runner>,
    foreign: HashMap<usize, jobs::Tries>,
    committer: Committer,
    tidy: tidy::Tidy,
    lease: Lease,
    /// Of hits, to be noted in the lease with the next ones.
    hits: Vec<Digest>,
    heard: Receiver<Heard>,
    started: Instant,
    summary: Summary,
    left: Vec<Left>,
    /// Whether the budget is used up.
    out_of_time: bool,
    stopping: u32,
}

impl<'a> Executor<'a> {
    fn new(
        plan: &'a Plan,
        setting: Setting<'a>,
        options: &'a Options,
        sink: &'a mut dyn FnMut(Event),
    ) -> Result<Executor<'a>> {
        let steps = options.selection(plan);
        let pool = options.slots();
        let (sender, heard) = channel();
        let durable = sender.clone();
        let fetching = fetch::Fetching::new(setting.hub, sender.clone());
        let sharing = setting.remote.map(|remote| {
            remote::Sharing::new(remote, setting.cache, options.remote_required, sender.clone())
        });
        let crew = setting.crew.start(
            setting.cache,
            setting.build,
            Arc::new(move |m| sender.send(Heard::Worker(m)).is_ok()),
        )?;
        let committer =
            setting.cache.committer(move |done| drop(durable.send(Heard::Durable(done))));
        let (cache, registry, run) = (setting.cache, setting.registry, setting.run);
        let needs = || needs(plan, &steps, registry, options);
        let find = || standing::find(plan, &steps, cache, options, run);
        // To start threads takes longer than a few steps do.
        let (needs, (finder, files)) = match steps.len() < MANY {
            true => (needs(), find()),
            false => rayon::join(needs, find),
        };
        Ok(Executor {
            schedule: Schedule::new(&needs, pool, options.keep_going),
            files,
            finder,
            steps,
            plan,
            options,
            registry: setting.registry,
            cache: setting.cache,
            fetching,
            sharing,
            run_id: setting.run,
            build: setting.build,
            interrupts: setting.interrupts,
            leave: setting.leave,
            sink,
            settled: vec![Settled::default(); plan.steps.len()],
            images: HashMap::new(),
            attempts: vec![0; plan.steps.len()],
            rewound: vec![false; plan.steps.len()],
            rewinds: vec![0; plan.steps.len()],
            running: HashMap::new(),
            by_worker: HashMap::new(),
            blocked: HashMap::new(),
            waiting: HashSet::new(),
            publishing: HashMap::new(),
            desk: Desk::new(&options.gpus, &options.gpu_locks),
            short: HashMap::new(),
            pool: crew,
            foreign: HashMap::new(),
            committer,
            tidy: tidy::Tidy::new(setting.cache, options.cluster.is_none()),
            lease: setting.cache.lease(&format!("run {}", setting.run))?,
            hits: Vec::new(),
            heard,
            started: Instant::now(),
            summary: Summary::default(),
            left: Vec::new(),
            out_of_time: false,
            stopping: 0,
        })
    }

    fn run(mut self) -> Result<Outcome> {
        self.emit(Event::Started { steps: self.steps.len(), jobs: self.options.jobs as usize });
        self.start_fetching();
        self.settle_standing();
        while !self.schedule.finished() {
            while let Some(command) = self.schedule.next_command() {
                match command {
                    Command::Look(at) => self.look(at),
                    Command::Launch(at) => self.launch(at),
                }
            }
            self.tell_skipped();
            self.keep_hits();
            self.tell_damage();
            if self.schedule.finished() {
                break;
            }
            match self.heard.recv_timeout(TICK) {
                Ok(heard) => self.hear(heard),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            self.tick();
        }
        self.tell_skipped();
        self.fetching.stop();
        // What is done becomes durable while the workers end; that it fails is told by the flush.
        let _ = self.committer.hurry();
        self.pool.close();
        // What a cluster said at its end.
        while let Ok(heard) = self.heard.try_recv() {
            self.hear(heard);
        }
        let flushed = self.committer.flush();
        while let Ok(heard) = self.heard.try_recv() {
            self.hear(heard);
        }
        self.bring_outputs();
        self.finish_sharing();
        self.tell_damage();
        self.summary.seconds = self.started.elapsed().as_secs_f64();
        self.summary.interrupted = self.interrupts.load(Ordering::Relaxed) > 0;
        let summary = self.summary.clone();
        self.emit(Event::Ended { summary: summary.clone() });
        // Some that were told to stop were done.
        self.left.retain(|left| self.settled[left.step].outputs.is_none());
        let look = (self.cache, self.plan, &*self.steps);
        drop(self.schedule);
        let found = self.finder.found(look, &self.settled, self.files, &summary);
        let (steps, left, unkept) = (self.settled, self.left, flushed.err());
        Ok(Outcome { summary, steps, left, unkept, found, lease: self.lease })
    }

    fn emit(&mut self, event: Event) {
        (self.sink)(event);
    }

    fn tell_skipped(&mut self) {
        for (at, because) in self.schedule.take_skipped() {
            self.summary.skipped += 1;
            self.summary.left += usize::from(because.is_none() && !self.left.is_empty());
            self.blocked.remove(&at);
            let because = because.map(|at| self.steps[at]);
            self.emit(Event::Skipped { step: self.steps[at], because });
        }
    }

    /// Computes the key of a step whose inputs are known, and looks it up.
    fn look(&mut self, at: usize) {
        let step = self.steps[at];
        if self.waits_for_hub(at) {
            return;
        }
        let key = match self.pre_image(step) {
            Ok(image) => image.key(),
            Err(message) => return self.fail_early(at, Failure::Input, message),
        };
        self.settled[step].key = Some(key);
        if self.must_run(step) {
            return self.schedule.miss(at);
        }
        match self.finder.look(self.cache, &key) {
            Ok(Some(hit)) => self.hit(at, key, hit),
            Ok(None) if self.asks_remote(at, key) => {}
            Ok(None) if self.options.only.is_some_and(|only| only != step) => {
                let message = "its result is not in the cache\nhint: `--only` runs one step and takes the rest as it is; run without it, or with `--until`";
                self.fail_early(at, Failure::Input, message.into());
            }
            Ok(None) => match self.remote_is_missed(&key) {
                Some(why) => self.fail_for_remote(at, why),
                None => self.schedule.miss(at),
            },
            Err(error) => {
                self.fail_early(at, Failure::Error, format!("the cache cannot be read: {error}"))
            }
        }
    }

    fn pre_image(&self, step: usize) -> Result<PreImage, String> {
        let inputs = Inputs {
            plan: self.plan,
            files: &self.files,
            hub: self.fetching.found(),
            outputs: &|s| self.settled[s].outputs.as_deref(),
        };
        lookup::pre_image(&inputs, step, self.registry)
    }

    /// Whether the step is to run though an entry may be there.
    fn must_run(&self, step: usize) -> bool {
        let once = self.options.force.contains(&step) && self.attempts[step] == 0;
        once || !self.plan.steps[step].cache || self.rewound[step]
    }

    /// An entry is there; its bytes matter only if the user wants them.
    fn hit(&mut self, at: usize, key: Key, hit: Hit) {
        let step = self.steps[at];
        let wanted = self.undelivered(step, &hit.outputs);
        if wanted.is_empty() || self.options.only.is_some_and(|only| only != step) {
            self.cached(step, key, hit);
            return self.schedule.hit(at);
        }
        if self.fetches(at, wanted, false) {
            return;
        }
        let text = format!(
            "`{}` runs again: `outputs` wants its artifacts, which are gone from the store",
            self.plan.steps[step].name
        );
        self.emit(Event::Note { text });
        self.rewound[step] = true;
        self.schedule.miss(at);
    }

    fn cached(&mut self, step: usize, key: Key, hit: Hit) {
        self.summary.cached += 1;
        self.summary.saved_s += hit.seconds;
        self.settled[step].outputs = Some(hit.outputs.clone());
        self.hits.extend(hit.outputs.iter().map(|output| output.digest));
        self.emit(Event::Cached { step, key, saved_s: hit.seconds, outputs: hit.outputs });
    }

    /// Notes what hits gave, so that it does not go while this run may still want it; where nothing
    /// runs, nothing is wanted. A failure costs at most that it is made again: inputs are noted
    /// before they are used.
    fn keep_hits(&mut self) {
        if self.running.is_empty() && self.plan.outputs.is_empty() {
            return;
        }
        let hits = std::mem::take(&mut self.hits);
        let _ = self.lease.hold(&hits);
    }

    /// Tells what the store met that is damaged, once each.
    fn tell_damage(&mut self) {
        for text in self.cache.take_reports() {
            self.emit(Event::Note { text });
        }
    }

    fn fail_early(&mut self, at: usize, failure: Failure, message: String) {
        let step = self.steps[at];
        self.summary.failed += 1;
        let key = self.settled[step].key;
        self.emit(Event::Failed { step, key, failure, message, log: String::new(), retry: false });
        self.schedule.failed(at);
    }

    fn tick(&mut self) {
        self.end_budget();
        // Time that is up counts as the first Ctrl-C.
        let stops = self.interrupts.load(Ordering::Relaxed) + u32::from(self.out_of_time);
        if stops > self.stopping {
            self.stop(stops);
        }
        self.end_overdue();
        self.poll_blocked();
        self.release_gpus();
    }

    /// The first Ctrl-C lets running steps save a checkpoint; the second ends them.
    fn stop(&mut self, interrupts: u32) {
        self.stopping = interrupts;
        self.schedule.stop();
        self.fetching.stop();
        if let Some(sharing) = &mut self.sharing {
            sharing.stop();
        }
        self.blocked.clear();
        if self.leaves_jobs() {
            return;
        }
        for at in self.running.keys().copied().collect::<Vec<_>>() {
            let worker = self.running[&at].worker;
            if interrupts > 1 || self.pool.order(worker, &Order::Cancel).is_err() {
                self.lost(at, Failure::Cancelled);
            }
        }
    }

    fn end_overdue(&mut self) {
        let overdue = |(&at, running): (&usize, &Running)| {
            let limit = self.plan.steps[self.steps[at]].timeout_s.filter(|_| running.begun)?;
            (running.started.elapsed().as_secs_f64() > limit).then_some(at)
        };
        for at in self.running.iter().filter_map(overdue).collect::<Vec<_>>() {
            self.lost(at, Failure::Timeout);
        }
    }

    /// Looks again at steps whose key another process is working on, or whose GPUs others use.
    fn poll_blocked(&mut self) {
        let due: Vec<usize> =
            self.blocked.iter().filter(|(_, blocked)| blocked.due()).map(|(&at, _)| at).collect();
        for at in due {
            if let Some(Blocked::Claim(_)) = self.blocked.get(&at) {
                let key = self.settled[self.steps[at]].key.expect("a blocked step has a key");
                if let Ok(cache::Claimed::Busy(_)) = self.cache.claim(&key, "poll") {
                    self.blocked.insert(at, Blocked::Claim(Instant::now()));
                    continue;
                }
            }
            // Whether GPUs are free is seen when the step is launched.
            self.blocked.remove(&at);
            if self.schedule.state(at) == State::Blocked {
                self.schedule.released(at);
            }
        }
    }

    fn hear(&mut self, heard: Heard) {
        match heard {
            Heard::Durable(done) => self.durable(done),
            Heard::Hub(said) => self.hub_said(said),
            Heard::Remote(said) => self.remote_said(said),
            Heard::Worker(Message { answer: Some(Answer::Cancelled), .. }) => self.cancelled(),
            Heard::Worker(Message { worker, answer: Some(Answer::Job { said }) }) => {
                self.of_job(worker, said);
            }
            Heard::Worker(Message { worker, answer }) => {
                let Some(&at) = self.by_worker.get(&worker) else {
                    if answer.is_none() {
                        self.pool.throw_away(worker, true);
                    }
                    return;
                };
                match answer {
                    Some(Answer::Report { report }) => {
                        self.emit(Event::Reported { step: self.steps[at], report });
                    }
                    Some(Answer::Done { outputs, log }) => self.succeeded(at, outputs, log),
                    Some(Answer::Lost { digests }) => self.inputs_lost(at, &digests),
                    Some(Answer::Failed { failure, message }) => {
                        self.pool.throw_away(worker, false);
                        self.attempt_failed(at, failure, message);
                    }
                    Some(Answer::Hello { .. } | Answer::Job { .. } | Answer::Cancelled) => {}
                    None => self.lost(at, Failure::Crash),
                }
            }
        }
    }
}

/// What each of `steps` waits for and takes.
fn needs(plan: &Plan, steps: &[usize], registry: Registry, options: &Options) -> Vec<Need> {
    let mut place = vec![None; plan.steps.len()];
    steps.iter().enumerate().for_each(|(at, &step)| place[step] = Some(at));
    let known = options.budget.as_ref().map(|budget| &budget.estimates);
    let need = |&step: &usize| {
        let upstream = lookup::upstream(plan, step).into_iter();
        Need {
            after: upstream.filter_map(|step| place[step]).collect(),
            slots: slots(plan, step, registry, options),
            cost: known.and_then(|known| known.get(&step)).map_or(1.0, |seconds| *seconds),
        }
    };
    steps.iter().map(need).collect()
}

/// What a step takes of the pool. A job of a cluster is one slot, whatever it takes there.
fn slots(plan: &Plan, step: usize, registry: Registry, options: &Options) -> Slots {
    match options.cluster {
        Some(_) => Slots { cpu: 1, ..Slots::default() },
        None => here(plan, step, registry, options),
    }
}

/// What a step takes: its own `resources`, else the stage's default; beside a GPU one cpu will do.
fn here(plan: &Plan, step: usize, registry: Registry, options: &Options) -> Slots {
    let step = &plan.steps[step];
    let default = match registry.get(&step.stage).map(|stage| stage.cpu) {
        Some(Cpu::All) if step.resources.gpu == 0 => options.jobs,
        _ => 1,
    };
    Slots {
        cpu: step.resources.cpu.unwrap_or(default).clamp(1, options.jobs),
        gpu: step.resources.gpu.min(options.gpus.len() as u32),
        memory: step.resources.memory.min(options.memory),
    }
}
