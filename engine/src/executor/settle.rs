//! Takes what came back: publishes a success, retries or ends a failure.

use std::collections::BTreeMap;
use std::path::Path;

use cache::{Digest, Entry, Key, Output, Publication, Published};
use rustix::process::Signal;
use serde_json::json;

use super::Executor;
use crate::event::{Event, Failure};
use crate::lookup;
use crate::plan::Source;
use crate::worker::LOG;

impl Executor<'_> {
    /// The worker's step succeeded: its artifacts are visible to this run now, and durable for
    /// everybody after the next group commit.
    pub(super) fn succeeded(
        &mut self,
        at: usize,
        outputs: Vec<Output>,
        log: Option<(Digest, u64)>,
    ) {
        let step = self.steps[at];
        if let Err(message) = self.unchanged_inputs(step) {
            let worker = self.running[&at].worker;
            self.pool.give_back(worker);
            return self.attempt_failed(at, Failure::Input, message);
        }
        // While the attempt is still held. If it cannot be noted, it may have to be made again.
        let log_digest = log.iter().map(|(digest, _)| *digest);
        let made = outputs.iter().map(|output| output.digest).chain(log_digest);
        let _ = self.lease.hold(&made.collect::<Vec<Digest>>());
        let running = self.running.remove(&at).expect("it was running");
        self.by_worker.remove(&running.worker);
        self.pool.give_back(running.worker);
        self.desk.give_back(&running.gpus);
        outputs.iter().for_each(|output| self.cache.trust(output));
        let seconds = running.started.elapsed().as_secs_f64();
        let rekeyed = self.settled[step].outputs.as_ref().is_some_and(|old| *old != outputs);
        self.settled[step].outputs = Some(outputs.clone());
        if self.plan.steps[step].cache {
            let entry = self.entry(step, &outputs, log, seconds);
            let replace = self.options.force.contains(&step) || self.rewound[step];
            let (key, claim, attempt) = (running.key, running.claim, Some(running.attempt));
            let publication = Publication { key, entry, claim, attempt, replace };
            self.publish(step, publication);
        }
        if rekeyed {
            // Who needs it may have been settled with the key of the lost bytes.
            self.finder.forget();
            let text = format!(
                "`{}` gave other bytes than the lost ones; what needs it is keyed anew",
                self.plan.steps[step].name
            );
            self.emit(Event::Note { text });
        }
        self.images.remove(&step);
        self.keep_lease(at, running.key);
        self.rewound[step] = false;
        self.summary.ran += 1;
        self.emit(Event::Finished { step, key: running.key, seconds, outputs });
        self.schedule.done(at);
    }

    pub(super) fn entry(
        &self,
        step: usize,
        outputs: &[Output],
        log: Option<(Digest, u64)>,
        seconds: f64,
    ) -> Entry {
        let image = &self.images[&step];
        let planned = &self.plan.steps[step];
        let mut provenance = json!({
            "stage": planned.stage,
            "step": planned.name,
            "pipeline": self.plan.name,
            "run": self.run_id,
            "build": self.build,
            "seconds": seconds,
            "machine": std::env::consts::ARCH,
        });
        let origins = self.origins(step);
        if !origins.is_empty() {
            provenance["hub"] = json!(origins);
        }
        Entry::new(image.text(), outputs.to_vec(), log, provenance)
    }

    /// What came from a hub, by what was asked for.
    fn origins(&self, step: usize) -> BTreeMap<String, String> {
        let names = lookup::hub_names(self.plan, &[step]).into_iter();
        let origin = |name: String| {
            let fetched = self.fetching.found().get(&name)?.as_ref().ok()?;
            Some((format!("hf:{name}"), fetched.origin.clone()))
        };
        names.filter_map(origin).collect()
    }

    fn unchanged_inputs(&self, step: usize) -> Result<(), String> {
        for source in self.plan.steps[step].inputs.iter().flat_map(|port| &port.sources) {
            if let Source::Path { path } = source
                && let Some(Ok(files)) = self.files.get(path.as_os_str())
            {
                files.iter().try_for_each(|file| file.unchanged())?;
            }
        }
        for name in lookup::hub_names(self.plan, &[step]) {
            if let Some(Ok(fetched)) = self.fetching.found().get(&name) {
                fetched.unchanged()?;
            }
        }
        Ok(())
    }

    /// The worker is gone, or is to go.
    pub(super) fn lost(&mut self, at: usize, failure: Failure) {
        let Some(running) = self.running.get(&at) else { return };
        let signal = self.pool.throw_away(running.worker, failure == Failure::Crash);
        let limit = self.plan.steps[self.steps[at]].timeout_s.unwrap_or_default();
        let (failure, message) = match failure {
            Failure::Timeout => (
                failure,
                format!(
                    "it ran longer than its timeout of {limit} s\nhint: raise `timeout` of the step; what it \
                     kept as checkpoint is not lost"
                ),
            ),
            Failure::Cancelled => (failure, "stopped".into()),
            // As the kernel does when memory runs out.
            _ if signal == Some(Signal::KILL) => (
                Failure::OutOfMemory,
                "the worker was killed (SIGKILL): out of memory, or by hand".into(),
            ),
            _ => (failure, crashed(signal)),
        };
        self.attempt_failed(at, failure, message);
    }

    /// An attempt failed and its worker is taken care of.
    pub(super) fn attempt_failed(&mut self, at: usize, failure: Failure, message: String) {
        let step = self.steps[at];
        let running = self.running.remove(&at).expect("it was running");
        self.by_worker.remove(&running.worker);
        self.desk.give_back(&running.gpus);
        let log = tail(&running.attempt.dir.join(LOG));
        let stopped = failure == Failure::Cancelled || self.stopping > 0;
        let retry = !stopped && self.tries_again(at, &running, failure);
        self.emit(Event::Failed { step, key: Some(running.key), failure, message, log, retry });
        self.give_lease_back(at);
        if retry {
            self.schedule.again(at);
        } else if stopped {
            self.schedule.again(at); // after a stop this means skipped
        } else {
            self.summary.failed += 1;
            self.schedule.failed(at);
        }
    }

    /// Hands a step's result to the committer.
    pub(super) fn publish(&mut self, step: usize, publication: Publication) {
        let (of, times) = self.publishing.entry(publication.key).or_default();
        (*of, *times) = (step, *times + 1);
        // A committer that died tells so at the flush, which ends the run with an error.
        let _ = self.committer.publish(publication);
    }

    /// The step that one of the results handed over at `key` is of, and whether it was the last of
    /// them; `None` if it was no step's here.
    fn published(&mut self, key: &Key) -> Option<(usize, bool)> {
        let (step, times) = self.publishing.get_mut(key)?;
        let step = *step;
        *times -= 1;
        let last = *times == 0;
        if last {
            self.publishing.remove(key);
        }
        Some((step, last))
    }

    /// A group commit is through.
    pub(super) fn durable(&mut self, done: Vec<(Key, Published)>) {
        for (key, published) in done {
            let Some((step, last)) = self.published(&key) else { continue };
            let name = &self.plan.steps[step].name;
            match published {
                Published::Diverged { .. } if self.is_imported(&key) => {
                    let text = format!(
                        "the remote has other bytes of `{name}` than the cache here, \
                         whose result stays; the evidence is kept"
                    );
                    self.emit(Event::Note { text });
                }
                Published::Diverged { .. } => {
                    let text = format!(
                        "`{name}` gave other bytes than an earlier run with the same key; \
                         the earlier result stays, the evidence is kept"
                    );
                    self.emit(Event::Note { text });
                }
                Published::Failed { reason } => {
                    let text = format!("`{name}` is done but could not be kept: {reason}");
                    self.emit(Event::Note { text });
                    if last {
                        self.drop_kept_lease(&key);
                    }
                    continue;
                }
                Published::New | Published::Same | Published::Replaced => {}
            }
            // What came from a remote may have been made again since.
            if !last || !self.send(&key) {
                continue;
            }
            self.tidy.clean(key);
            self.emit(Event::Durable { step });
        }
    }
}

/// What a worker's end without an answer may mean.
fn crashed(signal: Option<Signal>) -> String {
    let how = match signal {
        Some(Signal::SEGV) => " (SIGSEGV: native code touched memory that is not its own)",
        Some(Signal::BUS) => " (SIGBUS: a mapped file was cut off, or memory is gone)",
        Some(Signal::ABORT) => " (SIGABRT: it gave up; the log says why)",
        Some(Signal::ILL) => " (SIGILL: this processor lacks an instruction)",
        Some(other) => return format!("the worker ended without an answer ({other:?})"),
        None => "",
    };
    format!("the worker ended without an answer{how}")
}

/// The end of a log, for a message.
fn tail(path: &Path) -> String {
    use std::io::{Read, Seek, SeekFrom};
    let read = || -> std::io::Result<String> {
        let mut file = std::fs::File::open(path)?;
        let start = file.metadata()?.len().saturating_sub(4096);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}
