//! Brings a granted step to a worker: claim, second look, lost bytes, attempt, order.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

use cache::{Claimed, Digest, Hit, Key, Kind, Publication};

use super::{Blocked, Executor, Running};
use crate::event::{Event, Failure};
use crate::lookup::{self, Artifact, Inputs};
use crate::wire::{Frozen, FrozenInput, Order};
use crate::worker::LOG;

/// So often a step is made anew in one run because its bytes were lost.
const MOST_REWINDS: u32 = 3;

impl Executor<'_> {
    /// Starts a step that was granted its slots, or says why it cannot start.
    pub(super) fn launch(&mut self, at: usize) {
        let step = self.steps[at];
        let key = self.settled[step].key.expect("looked up before");
        let claim = if self.plan.steps[step].cache {
            match self.cache.claim(&key, &self.who(step)) {
                Ok(Claimed::Mine(claim)) => Some(claim),
                Ok(Claimed::Busy(holder)) => {
                    return self.block(at, Blocked::Claim(Instant::now()), &holder.who);
                }
                Err(error) => return self.refuse(at, format!("cannot claim the step: {error}")),
            }
        } else {
            None
        };
        // Whoever held the claim before may have done the work meanwhile.
        if !self.must_run(step)
            && let Ok(Some(entry)) = self.cache.lookup(&key)
        {
            self.cached(step, key, Hit::of(&entry));
            return self.schedule.done(at);
        }
        // Kept, since what it is made of may change while the step runs.
        match self.pre_image(step) {
            Ok(image) => drop(self.images.insert(step, image)),
            Err(message) => return self.refuse(at, message),
        }
        let claim = match self.adopt(at, key, claim) {
            Some(claim) => claim,
            None => return,
        };
        if self.leaves(at, key) {
            return;
        }
        let inputs = match self.artifacts(step) {
            Ok(inputs) => inputs,
            Err(message) => return self.refuse(at, message),
        };
        // Before they are looked for: from here on nobody removes what is there.
        let ours = inputs.iter().flat_map(|(_, all)| all).filter(|a| a.step.is_some());
        let used: Vec<Digest> = ours.map(|a| a.digest).collect();
        if let Err(error) = self.lease.hold(&used) {
            return self.refuse(at, format!("cannot keep its inputs from being removed: {error}"));
        }
        // Nodes that have no part in this cache may find them in the remote, or tell what is lost.
        let elsewhere = self.options.cluster.as_ref().is_some_and(|cluster| cluster.remote);
        let lost = if elsewhere { Vec::new() } else { self.lost_inputs(&inputs) };
        if !lost.is_empty() {
            let absent = self.absent(&inputs);
            if !self.fetches(at, absent, true) {
                self.rewind(at, &lost);
            }
            return;
        }
        if claim.is_some() && self.waits_for_lease(at, key) {
            return;
        }
        // While it waits for a GPU, another process may do the work: the claim ends here.
        let Some(gpus) = self.take_gpus(at) else { return };
        if let Err(message) = self.start(at, key, claim, inputs, gpus.clone()) {
            self.desk.give_back(&gpus);
            self.refuse(at, message);
        }
    }

    /// Publishes what an earlier attempt finished whose leader ended before it was published; gives
    /// the claim back where there is nothing of the kind.
    fn adopt(
        &mut self,
        at: usize,
        key: Key,
        claim: Option<cache::Claim>,
    ) -> Option<Option<cache::Claim>> {
        let step = self.steps[at];
        if claim.is_none() || self.must_run(step) {
            return Some(claim);
        }
        let Some(finished) = self.cache.finished(&key) else { return Some(claim) };
        let seconds = finished.provenance["seconds"].as_f64().unwrap_or(0.0);
        let entry = self.entry(step, &finished.outputs, finished.log, seconds);
        let text = format!(
            "`{}` was finished by an earlier run that ended before it was kept: it is kept now",
            self.plan.steps[step].name
        );
        self.emit(Event::Note { text });
        let hit = Hit::of(&entry);
        let publication = Publication { key, entry, claim, attempt: None, replace: false };
        self.publish(step, publication);
        self.cached(step, key, hit);
        self.schedule.done(at);
        None
    }

    pub(super) fn who(&self, step: usize) -> String {
        format!(
            "`{}` of run {} (process {})",
            self.plan.steps[step].name,
            self.run_id,
            std::process::id()
        )
    }

    pub(super) fn block(&mut self, at: usize, blocked: Blocked, holder: &str) {
        self.schedule.blocked(at);
        if self.blocked.insert(at, blocked).is_none() && self.waiting.insert(at) {
            self.emit(Event::Waiting { step: self.steps[at], holder: holder.into() });
        }
    }

    fn refuse(&mut self, at: usize, message: String) {
        self.fail_early(at, Failure::Input, message);
    }

    fn artifacts(&self, step: usize) -> Result<Vec<(String, Vec<Artifact>)>, String> {
        let inputs = Inputs {
            plan: self.plan,
            files: &self.files,
            hub: self.fetching.found(),
            outputs: &|s| self.settled[s].outputs.as_deref(),
        };
        let ports = self.plan.steps[step].inputs.iter();
        ports.map(|port| Ok((port.name.to_string(), lookup::artifacts(&inputs, port)?))).collect()
    }

    /// Artifacts of steps that are not in the store.
    fn absent(&self, inputs: &[(String, Vec<Artifact>)]) -> Vec<cache::Output> {
        let all = inputs.iter().flat_map(|(port, artifacts)| {
            artifacts.iter().filter(|a| a.step.is_some()).map(move |a| a.output(port))
        });
        all.filter(|output| !self.cache.present(output)).collect()
    }

    /// Steps whose artifacts are needed now and are not in the store any more.
    fn lost_inputs(&self, inputs: &[(String, Vec<Artifact>)]) -> Vec<usize> {
        let mut lost: Vec<usize> = inputs
            .iter()
            .flat_map(|(port, artifacts)| artifacts.iter().map(move |a| (port, a)))
            .filter_map(|(port, a)| a.step.filter(|_| !self.cache.present(&a.output(port))))
            .collect();
        lost.sort_unstable();
        lost.dedup();
        lost
    }

    /// Sends the steps back whose bytes are gone or wrong, and lets `at`, launched, wait for them.
    pub(super) fn rewind(&mut self, at: usize, lost: &[usize]) {
        let again = lost.iter().find(|&&step| self.rewinds[step] >= MOST_REWINDS);
        if let Some(&step) = again {
            let name = &self.plan.steps[step].name;
            return self.refuse(
                at,
                format!(
                    "the artifacts of `{name}` were lost {MOST_REWINDS} times in this run, after they were made anew\nhint: something removes or damages files of the cache, {}",
                    self.cache.root().display()
                ),
            );
        }
        if let Err(message) = self.fall(lost) {
            return self.refuse(at, message);
        }
        for &step in lost {
            self.rewound[step] = true;
            self.rewinds[step] += 1;
            let name = &self.plan.steps[step].name;
            let text = format!(
                "`{name}` runs again: its artifacts are gone from the store and `{}` needs them",
                self.plan.steps[self.steps[at]].name
            );
            self.emit(Event::Note { text });
        }
        let place = |step: &usize| self.steps.binary_search(step).expect("upstream is selected");
        let lost: Vec<usize> = lost.iter().map(place).collect();
        self.schedule.rewind(at, &lost);
    }

    /// A worker found bytes of its inputs missing or damaged: what is left of them goes, and the
    /// steps that made them run again.
    pub(super) fn inputs_lost(&mut self, at: usize, digests: &[Digest]) {
        let running = self.running.remove(&at).expect("it was running");
        self.by_worker.remove(&running.worker);
        self.pool.give_back(running.worker);
        self.desk.give_back(&running.gpus);
        self.attempts[self.steps[at]] -= 1;
        drop(running);
        let inputs = self.artifacts(self.steps[at]).unwrap_or_default();
        let wrong = inputs.iter().flat_map(|(port, artifacts)| {
            artifacts.iter().filter(|a| digests.contains(&a.digest)).map(move |a| (port, a))
        });
        let mut lost = BTreeSet::new();
        for (port, artifact) in wrong {
            lost.extend(artifact.step);
            if let Err(error) = self.cache.discard(&artifact.output(port)) {
                let text = format!("damaged bytes cannot be moved away: {error}");
                self.emit(Event::Note { text });
            }
        }
        match lost.is_empty() {
            true => self.refuse(at, "its inputs are damaged and no step makes them".into()),
            false => self.rewind(at, &lost.into_iter().collect::<Vec<_>>()),
        }
    }

    fn start(
        &mut self,
        at: usize,
        key: Key,
        claim: Option<cache::Claim>,
        mut inputs: Vec<(String, Vec<Artifact>)>,
        gpus: Vec<String>,
    ) -> Result<(), String> {
        let step = self.steps[at];
        let cannot = |what: &str, e: &dyn std::fmt::Display| format!("cannot {what}: {e}");
        let anew = self.options.fresh.contains(&step) || self.options.force.contains(&step);
        if anew && self.attempts[step] == 0 {
            self.cache.checkpoints_drop(&key).map_err(|e| cannot("drop checkpoints", &e))?;
        }
        if !anew
            && claim.is_some()
            && let Some((worker, attempt)) = self.resumed(&key)
        {
            let resumed = self.resumes(&key, &attempt);
            self.started(at, key, claim, Begun { worker, attempt, gpus, resumed });
            return Ok(());
        }
        let attempt = self.cache.attempt(&key).map_err(|e| cannot("make an attempt", &e))?;
        let dir = attempt.dir.clone();
        lay_out(&mut inputs, &dir).map_err(|e| cannot("lay out what is from a hub", &e))?;
        let wanted = self.wanted(step, key, &gpus);
        let threads = wanted.shape.cpus as usize;
        let worker = self.pool.take(&wanted.wanted(), &dir.join(LOG));
        let worker = worker.map_err(|e| cannot("start a worker", &e))?;
        let order = self.order(step, key, threads, inputs, &dir);
        let resumed = self.resumes(&key, &attempt);
        // First of all, so that nobody waits for what is only told and noted.
        let ordered = self.pool.order(worker, &order);
        self.started(at, key, claim, Begun { worker, attempt, gpus, resumed });
        if self.summary.ran == 0 && self.running.len() == 1 {
            self.committer.ready();
        }
        if ordered.is_err() {
            self.lost(at, Failure::Crash);
        }
        Ok(())
    }

    /// Where the step will go on.
    fn resumes(&self, key: &Key, attempt: &cache::Attempt) -> Option<u64> {
        // Without another attempt there is none, but for what nodes keep in a remote.
        match attempt.first && self.options.cluster.is_none() {
            true => None,
            false => self.position(key),
        }
    }

    /// Somebody works at a step, or will.
    fn started(&mut self, at: usize, key: Key, claim: Option<cache::Claim>, begun: Begun) {
        let step = self.steps[at];
        let Begun { worker, attempt, gpus, resumed } = begun;
        let dir = attempt.dir.strip_prefix(self.cache.root()).unwrap_or(&attempt.dir);
        let dir = dir.display().to_string();
        self.attempts[step] += 1;
        self.by_worker.insert(worker, at);
        let (started, begun) = (Instant::now(), self.options.cluster.is_none());
        self.running.insert(at, Running { worker, claim, attempt, started, begun, gpus, key });
        self.emit(Event::Launched { step, key, attempt: self.attempts[step], dir, resumed });
    }

    fn order(
        &self,
        step: usize,
        key: Key,
        threads: usize,
        inputs: Vec<(String, Vec<Artifact>)>,
        dir: &Path,
    ) -> Order {
        let planned = &self.plan.steps[step];
        let mut places: BTreeMap<Digest, std::path::PathBuf> = BTreeMap::new();
        let mut frozen_inputs = BTreeMap::new();
        for (port, artifacts) in inputs {
            let freeze = |a: Artifact| {
                if let Some(path) = a.path {
                    places.insert(a.digest, path);
                }
                FrozenInput {
                    index: a.index,
                    name: a.name,
                    digest: a.digest,
                    kind: a.kind,
                    bytes: a.bytes,
                }
            };
            frozen_inputs.insert(port, artifacts.into_iter().map(freeze).collect());
        }
        let frozen = Frozen {
            key,
            stage: planned.stage.to_string(),
            version: self.images[&step].version,
            params: planned.params.value(),
            inputs: frozen_inputs,
            ports: planned.ports.to_vec(),
            threads,
            secrets: planned.secrets.to_vec(),
        };
        Order::Run { frozen: Box::new(frozen), attempt: dir.to_path_buf(), places }
    }
}

/// Who works at a step, and where.
struct Begun {
    worker: u64,
    attempt: cache::Attempt,
    gpus: Vec<String>,
    resumed: Option<u64>,
}

/// Gives everything from a hub one place below `dir`, with its own files and no others: links to
/// bytes that lie in a cache of many.
fn lay_out(inputs: &mut [(String, Vec<Artifact>)], dir: &Path) -> std::io::Result<()> {
    for (port, artifacts) in inputs {
        let fetched = artifacts.iter_mut().filter(|artifact| !artifact.files.is_empty());
        for (i, artifact) in fetched.enumerate() {
            let folder = dir.join("hub").join(&*port).join(i.to_string());
            let place = folder.join(&artifact.name);
            std::fs::create_dir_all(if artifact.kind == Kind::Dir { &place } else { &folder })?;
            for (name, bytes) in &artifact.files {
                let link =
                    if artifact.kind == Kind::Dir { place.join(name) } else { place.clone() };
                std::os::unix::fs::symlink(bytes, link)?;
            }
            artifact.path = Some(place);
        }
    }
    Ok(())
}
