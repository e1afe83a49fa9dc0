//! What becomes of jobs: exit records first, then one question for all, asked less and less often.
//! Only an exit record tells a success; what nobody knows is lost, after a second look.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use super::agent::waiting;
use super::batch::{End, State, Status};
use super::clerk::Ask;
use super::driver::{At, Driver, Sent};
use super::orphans::attempt_of;
use super::pilot::{FAREWELL, Farewell, Queue};
use super::records::{self, ANSWERS, BEGAN, EXIT, Exit, Place, STARTED};
use crate::event::{Failure, Job as Told};
use crate::wire::Answer;

/// How often reports are looked for.
const TAIL: Duration = Duration::from_secs(1);
/// A job whose record is missing is believed lost after so long: a file may be seen late.
const GRACE: Duration = Duration::from_secs(5);
/// As long as its node may take to end it.
const ENDING: Duration = Duration::from_secs(20);
/// And after so many questions.
const LOOKS: u32 = 2;
/// So many arrays of pilots in a row may end before they did anything.
const MOST_BARREN: u32 = 5;
/// An array that may not have been submitted is asked for after so long.
const SETTLED: Duration = Duration::from_secs(3);

impl Driver {
    /// Takes what was announced; tells whether anything was.
    pub fn read_mail(&mut self) -> bool {
        let mut any = false;
        for mail in self.mails.clone() {
            let own = mail == self.places.mail();
            for name in waiting(&mail) {
                let path = mail.join(&name);
                any |= match &name {
                    _ if name.starts_with(FAREWELL) => own && self.farewell(&path),
                    _ => self.announced(&name, &path, own),
                };
            }
        }
        any
    }

    fn announced(&mut self, name: &str, path: &Path, own: bool) -> bool {
        let (attempt, began) = match name.strip_suffix(BEGAN) {
            Some(attempt) => (attempt, true),
            None => (name, false),
        };
        match self.by_name.get(attempt).copied() {
            Some(worker) => {
                let _ = fs::remove_file(path);
                match began {
                    true => self.began(worker),
                    false => self.look_for_exit(worker),
                }
                true
            }
            None => {
                // Of an attempt that was given up; another leader's mail is not ours to remove.
                if own {
                    let _ = fs::remove_file(path);
                }
                false
            }
        }
    }

    /// A node has begun with an attempt.
    pub fn began(&mut self, worker: u64) {
        let Some(job) = self.jobs.get_mut(&worker) else { return };
        let Some(place) = records::read::<Place>(&records::path(&job.dir, STARTED)) else { return };
        self.is_at(worker, place);
    }

    fn is_at(&mut self, worker: u64, place: Place) {
        let Some(job) = self.jobs.get_mut(&worker) else { return };
        if job.place.is_none() {
            job.place = Some(place.clone());
            self.tell_job(worker, Told::Began { job: place.job, host: place.host });
        }
    }

    /// Takes the exit record of an attempt, if it is there.
    pub fn look_for_exit(&mut self, worker: u64) {
        let Some(job) = self.jobs.get(&worker) else { return };
        let Some(exit) = records::read::<Exit>(&records::path(&job.dir, EXIT)) else { return };
        let Exit { answer, place, seconds, cpus, gpus } = exit;
        // What is announced in one moment is read in the order of names: the end may come first.
        self.is_at(worker, place.clone());
        self.tail(worker);
        self.forget(worker);
        self.useful.insert(place.job.clone());
        if let Answer::Failed { failure: Failure::Lost | Failure::Crash, .. } = answer {
            self.blame(Some(&place.host));
        }
        let Place { job, host } = place;
        self.tell_job(worker, Told::Ended { job, host, seconds, cpus, gpus });
        self.tell(worker, answer);
    }

    /// A pilot has ended.
    fn farewell(&mut self, path: &Path) -> bool {
        let Some(farewell) = records::read::<Farewell>(path) else { return false };
        let _ = fs::remove_file(path);
        let job = farewell.place.job.clone();
        self.useful.insert(job.clone());
        let array = job.split('_').next().unwrap_or_default();
        let of = |state: &Sent| matches!(state, Sent::Known(id) if id == array);
        let pilots = self.arrays.values_mut().find(|batched| of(&batched.state));
        if let Some((queue, alive)) = pilots.and_then(|batched| batched.pilots.as_mut()) {
            *alive = alive.saturating_sub(1);
            let theirs = self.pilots.iter_mut().find(|pilots| pilots.queue.0 == *queue);
            theirs.into_iter().for_each(|pilots| pilots.barren = 0);
        }
        let idle = (farewell.seconds - farewell.busy_s).max(0.0);
        let (cpus, gpus) = (farewell.cpus, farewell.gpus);
        self.tell_job(u64::MAX, Told::Idle { seconds: idle, cpus, gpus });
        self.poll_soon();
        true
    }

    /// Reads on what running steps report.
    pub fn read_answers(&mut self) {
        if self.tailed.elapsed() < TAIL {
            return;
        }
        self.tailed = Instant::now();
        self.see_taken();
        let running = self.jobs.iter().filter(|(_, job)| job.place.is_some());
        for worker in running.map(|(&worker, _)| worker).collect::<Vec<_>>() {
            self.tail(worker);
        }
    }

    /// Which orders pilots have taken.
    fn see_taken(&mut self) {
        for number in 0..self.pilots.len() {
            let taken = self.pilots[number].queue.taken();
            for file in waiting(&taken) {
                let mut parts = file.split('@');
                let attempt = attempt_of(parts.next().unwrap_or_default());
                let (Some(job), Some(host)) = (parts.next(), parts.next()) else { continue };
                self.useful.insert(job.into());
                self.pilots[number].barren = 0;
                if let Some(&worker) = self.by_name.get(&attempt) {
                    self.is_at(worker, Place { job: job.into(), host: host.into() });
                }
            }
        }
    }

    fn tail(&mut self, worker: u64) {
        let Some(job) = self.jobs.get_mut(&worker) else { return };
        let Ok(mut file) = File::open(records::path(&job.dir, ANSWERS)) else { return };
        let mut bytes = Vec::new();
        if file.seek(SeekFrom::Start(job.read)).is_err() || file.read_to_end(&mut bytes).is_err() {
            return;
        }
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        job.read += whole as u64;
        for line in bytes[..whole].split(|b| *b == b'\n') {
            if let Ok(answer @ Answer::Report { .. }) = serde_json::from_slice(line) {
                self.tell(worker, answer);
            }
        }
    }

    /// Asks the batch system, if it is time.
    pub fn ask(&mut self) {
        if self.polling || Instant::now() < self.poll_at {
            return;
        }
        let jobs = &self.jobs;
        let open = |batched: &&super::driver::Batched| match batched.state {
            Sent::Known(_) => {
                batched.pilots.as_ref().is_some_and(|(_, alive)| *alive > 0)
                    || batched.workers.iter().any(|worker| jobs.contains_key(worker))
            }
            Sent::Unsure(since) => since.elapsed() > SETTLED,
            Sent::Sending | Sent::Later(_) => false,
        };
        let ours = self.arrays.values().filter(open).map(|batched| batched.array.name.clone());
        let mut names: Vec<String> = ours.filter(|name| !name.is_empty()).collect();
        let attached = jobs.values().filter_map(|job| match &job.at {
            At::Task { array, .. } => Some(array.clone()),
            _ => None,
        });
        let known =
            |name: &String| matches!(self.arrays.get(name).map(|b| &b.state), Some(Sent::Known(_)));
        names.extend(attached.filter(known));
        names.extend(self.of_taken());
        names.sort_unstable();
        names.dedup();
        if !names.is_empty() && self.clerk.send(Ask::Poll(names)).is_ok() {
            self.polling = true;
        }
    }

    /// Arrays of pilots that have taken orders, also of those that are over: what they had is lost.
    fn of_taken(&self) -> Vec<String> {
        let taken = self.jobs.values().filter(|job| matches!(job.at, At::Pilots { .. }));
        let ids: HashSet<&str> =
            taken.filter_map(|job| job.place.as_ref()?.job.split('_').next()).collect();
        let theirs = |batched: &&super::driver::Batched| matches!(&batched.state, Sent::Known(id) if ids.contains(&id[..]));
        self.arrays.values().filter(theirs).map(|batched| batched.array.name.clone()).collect()
    }

    /// The batch system has answered, or not.
    pub fn polled(
        &mut self,
        names: &[String],
        asked: Instant,
        result: Result<Vec<Status>, String>,
    ) {
        self.polling = false;
        let longest = Duration::from_secs_f64(self.settings.poll.0.max(1.0));
        self.poll_pause = (self.poll_pause * 2).min(longest);
        self.poll_at = Instant::now() + self.poll_pause;
        // Nobody answered: nothing is known, so nothing follows.
        let Ok(all) = result else { return };
        // Newer than the answer, so that no pilot that did something is taken for one that did not.
        self.read_mail();
        self.see_taken();
        self.resolve_unsure(names, asked, &all);
        let mut doubts = false;
        for name in names {
            let Some(batched) = self.arrays.get(name) else { continue };
            if batched.pilots.is_some() {
                self.count_pilots(name, &all);
            }
        }
        let workers: Vec<(u64, String, usize)> = self
            .jobs
            .iter()
            .filter_map(|(&worker, job)| match &job.at {
                At::Task { array, task } if names.contains(array) => {
                    Some((worker, array.clone(), *task))
                }
                _ => None,
            })
            .collect();
        for (worker, array, task) in workers {
            let status = all.iter().find(|status| status.name == array && status.task == task);
            doubts |= self.judge(worker, status);
        }
        doubts |= self.judge_taken(names, &all);
        if doubts {
            self.poll_soon();
        }
    }

    /// Arrays that may not have been submitted: they are there, or are submitted again.
    fn resolve_unsure(&mut self, names: &[String], asked: Instant, all: &[Status]) {
        for name in names {
            let Some(batched) = self.arrays.get_mut(name) else { continue };
            let Sent::Unsure(since) = batched.state else { continue };
            if let Some(status) = all.iter().find(|status| status.name == *name) {
                let id = status.array.clone();
                self.submitted(name, Ok(id));
            } else if asked.duration_since(since) > SETTLED {
                batched.state = Sent::Later(Instant::now());
            }
        }
    }

    /// What a task's state means for its step; `true` while that is in doubt.
    fn judge(&mut self, worker: u64, status: Option<&Status>) -> bool {
        self.look_for_exit(worker);
        let Some(job) = self.jobs.get_mut(&worker) else { return false };
        let end = match status.map(|status| status.state) {
            Some(State::Pending) => {
                job.missing = None;
                let status = status.expect("just seen");
                // Without one it is about to be looked at.
                if !status.reason.is_empty() && job.reason.as_ref() != Some(&status.reason) {
                    job.reason = Some(status.reason.clone());
                    let (job, reason) = (status.id.clone(), status.reason.clone());
                    self.tell_job(worker, Told::Queued { job, reason });
                }
                return false;
            }
            Some(State::Running) => {
                job.missing = None;
                let status = status.expect("just seen");
                let host = status.host.clone().unwrap_or_default();
                self.is_at(worker, Place { job: status.id.clone(), host });
                return false;
            }
            // Whatever ends it: its attempt is private, so another may begin.
            Some(State::Ending) => Some(End::Cancelled),
            Some(State::Ended(end)) => Some(end),
            None => None,
        };
        let ending = status.is_some_and(|status| status.state == State::Ending);
        let grace = if ending { ENDING } else { GRACE };
        let (since, looks) = job.missing.unwrap_or((Instant::now(), 0));
        job.missing = Some((since, looks + 1));
        if since.elapsed() < grace || looks + 1 < LOOKS || !self.taken_since(since) {
            return true;
        }
        // A network's file system may remember that the record was not there, until it is listed.
        if let Some(job) = self.jobs.get(&worker) {
            let _ = fs::read_dir(records::path(&job.dir, "")).map(Iterator::count);
        }
        self.look_for_exit(worker);
        let Some(job) = self.jobs.get_mut(&worker) else { return false };
        let host = status.and_then(|s| s.host.clone()).or(job.place.take().map(|p| p.host));
        let id = status.map_or(String::new(), |status| format!(" {}", status.id));
        let (failure, what, blamed) = meaning(end);
        if blamed {
            self.blame(host.as_deref());
        }
        let on = host.map_or(String::new(), |host| format!(" on {host}"));
        let said = match (end, status) {
            (Some(End::Failed | End::Completed), Some(status)) => self.said(status),
            _ => String::new(),
        };
        self.lose(worker, failure, format!("job{id}{on} {what}{said}"));
        false
    }

    /// How many pilots of an array go on.
    fn count_pilots(&mut self, name: &str, all: &[Status]) {
        let live = |status: &&Status| {
            status.name == name && matches!(status.state, State::Pending | State::Running)
        };
        let alive = all.iter().filter(live).count();
        let known = all.iter().any(|status| status.name == name);
        let Some(batched) = self.arrays.get_mut(name) else { return };
        if let Some((queue, before)) = &mut batched.pilots {
            // Of an array that nobody knows nothing is said at first: its pilots may say farewell.
            batched.unknown = if known { 0 } else { batched.unknown + 1 };
            let over = alive == 0 && *before > 0;
            if known || batched.unknown > LOOKS {
                *before = alive;
            }
            let queue = queue.clone();
            if known && over {
                self.judge_pilots(name, &queue, all);
            }
            let why = all.iter().find(|s| s.name == name && s.state == State::Pending);
            if let (Some(why), true) = (why, alive > 0) {
                self.tell_waiting(&queue, &why.id.clone(), &why.reason.clone());
            }
        }
    }

    /// Pilots that end before they took anything, again and again, never will: that is told instead
    /// of trying for ever.
    fn judge_pilots(&mut self, name: &str, queue: &Path, all: &[Status]) {
        let mine: Vec<&Status> = all.iter().filter(|status| status.name == name).collect();
        let failed = |s: &&&Status| matches!(s.state, State::Ended(End::Failed | End::Completed));
        let useful = mine.iter().any(|status| self.useful.contains(&status.id));
        let Some(pilots) = self.pilots.iter_mut().find(|p| p.queue.0 == *queue) else { return };
        let Some(last) = mine.iter().rfind(failed).filter(|_| !useful) else {
            pilots.barren = if useful { 0 } else { pilots.barren };
            return;
        };
        pilots.barren += 1;
        if pilots.barren >= MOST_BARREN {
            let host = last.host.as_deref().unwrap_or("a node");
            let message = format!(
                "jobs that take steps end before they take one; the last was {} on {host}{}\nhint: see `setup:` and `program:` of `executor: slurm:`",
                last.id,
                self.said(last)
            );
            for worker in self.in_queue(queue) {
                self.lose(worker, Failure::Error, message.clone());
            }
        }
        for status in mine.iter().filter(failed) {
            self.blame(status.host.as_deref());
        }
    }

    /// The last thing a job printed outside of its step.
    fn said(&self, status: &Status) -> String {
        let Some(batched) = self.arrays.get(&status.name) else { return String::new() };
        if self.far.is_some() {
            let output = batched.array.output_of(status.task);
            return format!(
                "; what it printed is in {} there\nhint: see that the node has {} and reaches {}, with credentials of its own",
                output.display(),
                self.program.display(),
                self.far.as_ref().map_or("", |far| &far.address.remote)
            );
        }
        let text = fs::read(batched.array.output_of(status.task)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let last = text.lines().rev().find(|line| !line.trim().is_empty());
        last.map_or(String::new(), |line| format!(": {}", line.trim()))
    }

    /// Steps in a queue wait as their pilots do.
    fn tell_waiting(&mut self, queue: &Path, id: &str, reason: &str) {
        for worker in self.in_queue(queue) {
            let Some(job) = self.jobs.get_mut(&worker) else { continue };
            if job.place.is_none() && job.reason.as_deref() != Some(reason) {
                job.reason = Some(reason.into());
                let (job, reason) = (id.to_string(), reason.to_string());
                self.tell_job(worker, Told::Queued { job, reason });
            }
        }
    }

    /// Steps that were taken by pilots which are over are lost.
    fn judge_taken(&mut self, names: &[String], all: &[Status]) -> bool {
        let mut doubts = false;
        for number in 0..self.pilots.len() {
            let queue = Queue(self.pilots[number].queue.0.clone());
            for file in waiting(&queue.taken()) {
                let mut parts = file.split('@');
                let attempt = attempt_of(parts.next().unwrap_or_default());
                let id = parts.next().unwrap_or_default();
                let Some(&worker) = self.by_name.get(&attempt) else { continue };
                let status = all.iter().find(|status| status.id == id);
                let asked = |b: &super::driver::Batched| names.contains(&b.array.name);
                let theirs = |b: &&super::driver::Batched| matches!(&b.state, Sent::Known(array) if id.split('_').next() == Some(array));
                if status.is_some() || self.arrays.values().find(theirs).is_some_and(asked) {
                    doubts |= self.judge(worker, status);
                }
            }
        }
        doubts
    }
}

/// What the end of a job without an exit record means: the failure, in words, and whether its node
/// is to blame.
fn meaning(end: Option<End>) -> (Failure, &'static str, bool) {
    match end {
        None => (Failure::Lost, "is not known to the cluster any more", false),
        Some(End::Completed) => (Failure::Lost, "ended and left no record", true),
        Some(End::Failed) => (Failure::Lost, "failed and left no record", true),
        Some(End::NodeFailed) => (Failure::Lost, "was lost with its node", true),
        Some(End::TimedOut) => (Failure::Preempted, "ran out of its time", false),
        Some(End::Preempted) => (Failure::Preempted, "had to make room for another", false),
        Some(End::Cancelled) => (Failure::Preempted, "was cancelled", false),
        Some(End::OutOfMemory) => (Failure::OutOfMemory, "took more memory than it had", false),
    }
}
