//! From orders to jobs: like steps that came together become one array; pilots get theirs through a
//! directory. What is about to be submitted is in the journal before.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::batch::{Array, Cancel, Refusal, Shape};
use super::clerk::Ask;
use super::driver::{At, Batched, Driver, Pilots, Sent};
use super::journal::Line;
use super::pilot::{BRIEF, Brief, Queue};
use super::records::{self, ORDER, Ordered};
use super::slurm::script::script;
use crate::event::{Failure, Job as Told};

/// First pause between two questions to the batch system.
pub(super) const POLL: Duration = Duration::from_secs(2);
/// After so long without another order, jobs are submitted for those that came.
const GATHER: Duration = Duration::from_millis(100);
/// So long after the first of them, pilots are submitted while others still come, and arrays.
const LONGEST: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(4));
/// An array that was refused for now is submitted again after so long.
pub(super) const AGAIN: Duration = Duration::from_secs(10);
/// After so long a node that failed steps is tried again.
const FORGIVEN: Duration = Duration::from_secs(600);
/// So many failures of steps by a node's fault are too many.
const TOO_MANY: usize = 2;

impl Driver {
    /// Submits what is ready for it.
    pub fn submit(&mut self) {
        let (to_pilots, waiting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.waiting).into_iter().partition(|(_, pilot)| *pilot);
        self.waiting = waiting;
        to_pilots.into_iter().for_each(|(worker, _)| self.enqueue(worker));
        let quiet = self.came.is_none_or(|(_, last)| last.elapsed() > GATHER);
        let since = self.came.map_or(Duration::ZERO, |(first, _)| first.elapsed());
        if quiet || since > LONGEST.0 {
            self.more_pilots();
        }
        if quiet || since > LONGEST.1 {
            self.came = None;
            self.arrays_of_waiting();
        }
        self.again();
    }

    /// Steps of equal shape become one array.
    fn arrays_of_waiting(&mut self) {
        let mut alike: BTreeMap<Shape, Vec<u64>> = BTreeMap::new();
        for (worker, _) in std::mem::take(&mut self.waiting) {
            let Some(job) = self.jobs.get(&worker) else { continue };
            alike.entry(job.shape.clone()).or_default().push(worker);
        }
        for (shape, workers) in alike {
            for part in workers.chunks(self.max_array) {
                self.array(&shape, part);
            }
        }
    }

    /// Submits one array of steps.
    fn array(&mut self, shape: &Shape, workers: &[u64]) {
        let (limit_s, margin_s) = self.times(shape.time_s);
        let mut names = Vec::new();
        for &worker in workers {
            let written = match (&self.far, self.jobs.get(&worker)) {
                // It is there already.
                (Some(_), Some(job)) => Ok(job.name.clone()),
                _ => self.write_order(worker, limit_s, margin_s),
            };
            match written {
                Ok(name) => names.push((worker, name)),
                Err(error) => {
                    let message = format!("cannot write its order: {error}");
                    self.lose(worker, Failure::Lost, message);
                }
            }
        }
        let Some((_, first)) = names.first() else { return };
        self.numbers += 1;
        let name = format!("pipe-{}-{}-{}", self.id, self.numbers, &first[..8]);
        let attempts: Vec<String> = names.iter().map(|(_, name)| name.clone()).collect();
        let command = self.command_of(&attempts);
        let workers: Vec<u64> = names.iter().map(|(worker, _)| *worker).collect();
        for (task, &worker) in workers.iter().enumerate() {
            let at = At::Task { array: name.clone(), task };
            self.jobs.get_mut(&worker).expect("just written").at = at;
        }
        let batched = command
            .and_then(|command| self.batched(name, shape, workers.len(), margin_s, &command));
        match batched {
            Ok(batched) => self.send(Batched { workers, ..batched }, attempts),
            Err(error) => {
                for worker in workers {
                    self.lose(worker, Failure::Lost, format!("cannot write its job: {error}"));
                }
            }
        }
    }

    /// Writes an order where its job will find it; gives the attempt's name.
    fn write_order(
        &mut self,
        worker: u64,
        limit_s: Option<f64>,
        margin_s: f64,
    ) -> std::io::Result<String> {
        let (dir, ordered) = self.ordered(worker, limit_s, margin_s);
        records::prepare(&dir)?;
        records::write_new(&records::path(&dir, ORDER), &ordered)?;
        Ok(records::name_of(&dir))
    }

    pub fn ordered(
        &mut self,
        worker: u64,
        limit_s: Option<f64>,
        margin_s: f64,
    ) -> (PathBuf, Ordered) {
        let job = self.jobs.get_mut(&worker).expect("it waits");
        let order = *job.order.take().expect("it is written once");
        let ordered = Ordered {
            build: self.build.clone(),
            order,
            mail: self.places.mail(),
            limit_s,
            margin_s,
            cpus: job.shape.cpus,
            gpus: job.shape.gpus,
            checkpoint: None,
        };
        (job.dir.clone(), ordered)
    }

    /// Wall time of a job, if it is known, and how long before its end steps stop.
    pub fn times(&self, time_s: Option<u64>) -> (Option<f64>, f64) {
        // Slurm counts minutes.
        let limit = time_s.map(|s| s.div_ceil(60).max(1) * 60).or(self.default_s);
        let limit = limit.map(|s| s as f64);
        let margin = self.settings.margin.0;
        (limit, limit.map_or(margin, |limit| margin.min(limit / 4.0)))
    }

    /// The script and everything else of an array.
    fn batched(
        &mut self,
        name: String,
        shape: &Shape,
        count: usize,
        margin_s: f64,
        (args, input): &(Vec<String>, String),
    ) -> std::io::Result<Batched> {
        let path = self.places.jobs().join(format!("{}.sh", self.numbers));
        let mut command = vec![self.program.display().to_string(), "worker".into()];
        command.extend_from_slice(args);
        records::write_private(&path, &script(&self.settings.setup, &command, input))?;
        let output = match self.far {
            // On the node.
            Some(_) => Path::new("/tmp").join(&name),
            None => self.places.jobs().join(self.numbers.to_string()),
        };
        let array = Array {
            name,
            script: path,
            shape: shape.clone(),
            count,
            output,
            exclude: self.excluded(),
            margin_s: margin_s.ceil() as u64,
        };
        Ok(Batched {
            array,
            state: Sent::Sending,
            workers: Vec::new(),
            pilots: None,
            unknown: 0,
            unwanted: Vec::new(),
        })
    }

    /// Notes it in the journal, then submits it.
    fn send(&mut self, batched: Batched, attempts: Vec<String>) {
        let line = Line::Submits { name: batched.array.name.clone(), attempts };
        if let Err(error) = self.journal.write(&line) {
            let message = format!("cannot write the journal of the run: {error}");
            for worker in batched.workers {
                self.lose(worker, Failure::Lost, message.clone());
            }
            return;
        }
        let _ = self.clerk.send(Ask::Submit(batched.array.clone()));
        self.arrays.insert(batched.array.name.clone(), batched);
    }

    /// What became of a submission.
    pub fn submitted(&mut self, name: &str, result: Result<String, Refusal>) {
        let Some(batched) = self.arrays.get_mut(name) else { return };
        match result {
            Ok(id) => {
                batched.state = Sent::Known(id.clone());
                let unwanted = std::mem::take(&mut batched.unwanted);
                for how in [Cancel::Now, Cancel::Gently] {
                    let these = unwanted.iter().filter(|(_, wanted)| *wanted == how);
                    let ids =
                        these.map(|(task, _)| self.arrays[name].task_id(&id, *task)).collect();
                    self.cancel(ids, how);
                }
                self.refused = None;
                let _ = self.journal.write(&Line::Submitted { name: name.into(), id });
                self.tell_queued(name, "submitted");
                self.poll_soon();
            }
            Err(Refusal::Later(why)) => {
                batched.state = Sent::Later(Instant::now() + AGAIN);
                self.refused = Some(why.clone());
                self.tell_queued(name, &why);
            }
            Err(Refusal::Unsure(why)) => {
                batched.state = Sent::Unsure(Instant::now());
                self.tell_queued(name, &why);
                self.poll_soon();
            }
            Err(Refusal::Never(why)) => {
                let batched = self.arrays.remove(name).expect("just seen");
                let mut workers = batched.workers;
                if let Some((queue, _)) = &batched.pilots {
                    workers.extend(self.in_queue(queue));
                }
                let message = format!("the cluster refuses its job: {why}");
                for worker in
                    workers.into_iter().filter(|w| self.jobs.contains_key(w)).collect::<Vec<_>>()
                {
                    self.lose(worker, Failure::Error, message.clone());
                }
            }
        }
    }

    fn tell_queued(&mut self, name: &str, reason: &str) {
        let Some(batched) = self.arrays.get(name) else { return };
        let id = match &batched.state {
            Sent::Known(id) => id.clone(),
            _ => String::new(),
        };
        let of = |(task, worker): (usize, &u64)| {
            let job = if id.is_empty() { String::new() } else { batched.task_id(&id, task) };
            (*worker, job)
        };
        let all: Vec<(u64, String)> = batched.workers.iter().enumerate().map(of).collect();
        for (worker, id) in all {
            let Some(job) = self.jobs.get_mut(&worker) else { continue };
            job.reason = Some(reason.to_string());
            self.tell_job(worker, Told::Queued { job: id, reason: reason.into() });
        }
    }

    /// Submits again what was refused for now, unless nobody wants it any more.
    fn again(&mut self) {
        self.send_cancels();
        let now = Instant::now();
        let due = |batched: &Batched| matches!(batched.state, Sent::Later(at) if at <= now);
        if !self.arrays.values().any(due) {
            return;
        }
        let (jobs, mut arrays) = (&self.jobs, std::mem::take(&mut self.arrays));
        arrays.retain(|_, batched| {
            let waited_for = match &batched.pilots {
                Some((queue, _)) => !self.in_queue(queue).is_empty(),
                None => batched.workers.iter().any(|worker| jobs.contains_key(worker)),
            };
            !due(batched) || waited_for
        });
        self.arrays = arrays;
        for batched in self.arrays.values_mut() {
            if due(batched) {
                batched.state = Sent::Sending;
                let _ = self.clerk.send(Ask::Submit(batched.array.clone()));
            }
        }
    }

    /// Gives an order to the pilots of its shape.
    fn enqueue(&mut self, worker: u64) {
        let Some(shape) = self.jobs.get(&worker).map(|job| job.shape.clone()) else { return };
        let number = match self.pilots.iter().position(|pilots| pilots.shape == shape) {
            Some(number) => number,
            None => match self.new_pilots(shape.clone()) {
                Ok(number) => number,
                Err(error) => {
                    let message = format!("cannot make a queue for pilots: {error}");
                    return self.lose(worker, Failure::Lost, message);
                }
            },
        };
        let (limit_s, margin_s) = self.times(self.pilot_time(&shape));
        let (_, ordered) = self.ordered(worker, limit_s, margin_s);
        let pilots = &mut self.pilots[number];
        pilots.next += 1;
        let job = self.jobs.get_mut(&worker).expect("it waits");
        let file = format!("{:08}-{}", pilots.next, job.name);
        job.at = At::Pilots { queue: pilots.queue.0.clone(), file: file.clone() };
        if let Err(error) = records::write(&pilots.queue.queue().join(file), &ordered) {
            self.lose(worker, Failure::Lost, format!("cannot write its order: {error}"));
        }
    }

    /// A pilot runs many steps, so its time is at least that of a site's usual job.
    fn pilot_time(&self, shape: &Shape) -> Option<u64> {
        let usual = self.settings.time.map(|time| time.0.ceil() as u64);
        usual.max(shape.time_s)
    }

    fn new_pilots(&mut self, shape: Shape) -> std::io::Result<usize> {
        let number = self.pilots.len();
        let queue = Queue(self.places.pilots(number));
        queue.make()?;
        let brief = Brief {
            beat: self.places.beat(),
            mail: self.places.mail(),
            idle_s: self.settings.idle.0,
            cpus: shape.cpus,
            gpus: shape.gpus,
        };
        records::write(&queue.0.join(BRIEF), &brief)?;
        self.pilots.push(Pilots { shape, queue, next: 0, barren: 0 });
        Ok(number)
    }

    /// Submits pilots where orders wait for some.
    fn more_pilots(&mut self) {
        for number in 0..self.pilots.len() {
            let queue = self.pilots[number].queue.0.clone();
            // What a pilot had that may be lost is given to no other, until that is known.
            let orders = self.in_queue(&queue);
            let orders = orders.iter().filter(|id| self.jobs[id].missing.is_none()).count();
            let of = |b: &&Batched| b.pilots.as_ref().is_some_and(|(q, _)| *q == queue);
            let alive: usize = self
                .arrays
                .values()
                .filter(of)
                .filter_map(|b| b.pilots.as_ref())
                .map(|p| p.1)
                .sum();
            let wanted = orders.min(self.settings.pilots as usize);
            if wanted <= alive {
                continue;
            }
            self.numbers += 1;
            let name = format!("pipe-{}-{}-pilot", self.id, self.numbers);
            let shape = self.pilots[number].shape.clone();
            let shape = Shape { time_s: self.pilot_time(&shape), ..shape };
            let (_, margin_s) = self.times(shape.time_s);
            let store = self.store.display().to_string();
            let command = [store, "--pilot".to_string(), queue.display().to_string()].to_vec();
            let count = wanted - alive;
            match self.batched(name, &shape, count, margin_s, &(command, String::new())) {
                Ok(batched) => {
                    let pilots = Some((queue, count));
                    self.send(Batched { pilots, ..batched }, Vec::new());
                }
                Err(error) => self.refused = Some(error.to_string()),
            }
        }
    }

    /// Attempts that wait in, or were taken from, a queue of pilots.
    pub fn in_queue(&self, queue: &Path) -> Vec<u64> {
        let is = |at: &At| matches!(at, At::Pilots { queue: theirs, .. } if theirs == queue);
        self.jobs.iter().filter(|(_, job)| is(&job.at)).map(|(&worker, _)| worker).collect()
    }

    /// A step failed on `host` by no fault of its own.
    pub fn blame(&mut self, host: Option<&str>) {
        if let Some(host) = host.filter(|host| !host.is_empty()) {
            self.bad.entry(host.into()).or_default().push(Instant::now());
        }
    }

    /// Nodes that failed steps of late, the worst first, and never so many that few are left.
    fn excluded(&mut self) -> Vec<String> {
        self.bad.retain(|_, times| {
            times.retain(|time| time.elapsed() < FORGIVEN);
            !times.is_empty()
        });
        let mut bad: Vec<(usize, &String)> =
            self.bad.iter().map(|(host, times)| (times.len(), host)).collect();
        bad.retain(|(times, _)| *times >= TOO_MANY);
        bad.sort_by(|a, b| b.cmp(a));
        bad.truncate(self.nodes.saturating_sub(1) / 2);
        bad.into_iter().map(|(_, host)| host.clone()).collect()
    }
}
