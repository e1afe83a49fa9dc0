//! The leader's side against a batch system that does what a test says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cache::remote::Remote;
use cache::{Cache, Digest, Key};
use serde_json::Value;

use super::batch::{Array, Batch, Cancel, End, Refusal, Shape, State, Status};
use super::desk::{Address, Desk};
use super::records::{Exit, Place};
use super::{Cluster, Settings, Setup, journal};
use crate::event::Failure;
use crate::pool::{Kind, Message, Runner, Wanted};
use crate::wire::{Answer, Frozen, FrozenInput, Order};

/// What a batch system does, and what it was asked.
#[derive(Default)]
struct Script {
    /// Submissions wait while this is set.
    held: bool,
    unsure: bool,
    deaf: bool,
    /// What is said of each task of what was submitted.
    states: Vec<State>,
    submitted: Vec<Array>,
    cancelled: Vec<(Vec<String>, Cancel)>,
}

#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Script>>);

impl Fake {
    fn with<T>(&self, f: impl FnOnce(&mut Script) -> T) -> T {
        f(&mut self.0.lock().unwrap())
    }

    fn wait(&self, what: &str, condition: impl Fn(&Script) -> bool) {
        let started = Instant::now();
        while !self.with(|script| condition(script)) {
            assert!(started.elapsed() < Duration::from_secs(60), "never happened: {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Batch for Fake {
    fn submit(&mut self, array: &Array) -> Result<String, Refusal> {
        self.with(|script| script.submitted.push(array.clone()));
        while self.with(|script| script.held) {
            std::thread::sleep(Duration::from_millis(5));
        }
        match self.with(|script| script.unsure) {
            true => Err(Refusal::Unsure("timed out".into())),
            false => Ok("7".into()),
        }
    }

    fn poll(&mut self, names: &[String]) -> Result<Vec<Status>, String> {
        let status = |(task, state): (usize, &State)| Status {
            name: names[0].clone(),
            array: "7".into(),
            task,
            id: format!("7_{task}"),
            state: *state,
            reason: String::new(),
            host: None,
        };
        self.with(|script| match script.deaf {
            true => Err("nobody answers".into()),
            false => Ok(script.states.iter().enumerate().map(status).collect()),
        })
    }

    fn cancel(&mut self, ids: &[String], how: Cancel) -> Result<(), String> {
        self.with(|script| {
            script.cancelled.push((ids.to_vec(), how));
            if script.deaf { Err("nobody answers".into()) } else { Ok(()) }
        })
    }
}

struct Stage {
    fake: Fake,
    cluster: Cluster,
    said: Receiver<Message>,
    run: PathBuf,
    cache: Cache,
    dir: tempfile::TempDir,
}

fn stage(fake: &Fake) -> Stage {
    stage_with(fake, false)
}

/// With a remote, which is a directory, nodes share no other with the leader.
fn stage_with(fake: &Fake, far: bool) -> Stage {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(dir.path().join("cache")).unwrap();
    let run = dir.path().join("run");
    let setup = Setup {
        batch: Box::new(fake.clone()),
        settings: Settings::default(),
        run: run.clone(),
        id: "test".into(),
        program: "pipe".into(),
        max_array: 100,
        nodes: 3,
        default_s: None,
        earlier: Vec::new(),
        remote: far.then(|| remote(dir.path())),
    };
    let (sender, said) = channel();
    let messages = Arc::new(move |message| sender.send(message).is_ok());
    let cluster = Cluster::start(setup, &cache, "build", messages).unwrap();
    Stage { fake: fake.clone(), cluster, said, run, cache, dir }
}

fn remote(dir: &Path) -> Remote {
    let bucket = dir.join("bucket");
    let _ = std::fs::create_dir(&bucket);
    let mut settings = cache::remote::Settings::new(bucket.display().to_string());
    settings.timeouts.pause = Duration::from_millis(100);
    Remote::open(settings, &|_| None).unwrap()
}

impl Stage {
    /// What a node sees.
    fn desk(&self) -> Desk {
        let remote = remote(self.dir.path());
        Address::of(&self.run).unwrap().desk(&remote).unwrap()
    }

    /// The note of that kind, once it is there.
    fn note(&self, record: &str) -> String {
        let (desk, started) = (self.desk(), Instant::now());
        loop {
            let names = desk.list().unwrap();
            if let Some(name) = names.into_iter().find(|name| name.ends_with(record)) {
                return name;
            }
            assert!(started.elapsed() < Duration::from_secs(60), "no {record}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Orders a step whose key is made from `name`.
    fn order(&mut self, name: &str) -> u64 {
        self.order_with(name, BTreeMap::new())
    }

    fn order_with(&mut self, name: &str, inputs: BTreeMap<String, Vec<FrozenInput>>) -> u64 {
        let key: Key = Digest::of(name.as_bytes()).to_string().parse().unwrap();
        let attempt = self.cache.root().join(format!("attempts/{key}/1"));
        std::fs::create_dir_all(&attempt).unwrap();
        let kind = Kind::Cpu(1);
        let wanted = Wanted { kind: &kind, shape: Shape::default(), key, pilot: false };
        let worker = self.cluster.take(&wanted, Path::new("log")).unwrap();
        let frozen = Box::new(Frozen {
            key,
            stage: "command".into(),
            version: 1,
            params: Value::Null,
            inputs,
            ports: Vec::new(),
            threads: 1,
            secrets: Vec::new(),
        });
        let order = Order::Run { frozen, attempt, places: BTreeMap::new() };
        self.cluster.order(worker, &order).unwrap();
        worker
    }

    /// What became of a step.
    fn end_of(&self, worker: u64) -> Answer {
        loop {
            let message = self.said.recv_timeout(Duration::from_secs(60)).expect("an end");
            match message.answer {
                Some(answer @ (Answer::Failed { .. } | Answer::Done { .. }))
                    if message.worker == worker =>
                {
                    return answer;
                }
                _ => {}
            }
        }
    }
}

#[test]
fn what_is_given_up_while_it_is_submitted_is_cancelled_after() {
    let fake = Fake::default();
    fake.with(|script| script.held = true);
    let mut stage = stage(&fake);
    let (first, second) = (stage.order("a"), stage.order("b"));
    fake.wait("it is submitted", |script| !script.submitted.is_empty());
    assert_eq!(fake.with(|script| script.submitted[0].count), 2);
    stage.cluster.throw_away(first, false);
    stage.cluster.order(second, &Order::Cancel).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(fake.with(|script| script.cancelled.is_empty()), "it has no id yet");
    fake.with(|script| script.held = false);
    fake.wait("both are cancelled", |script| script.cancelled.len() == 2);
    assert_eq!(fake.with(|script| script.submitted.len()), 1);
    let cancelled = fake.with(|script| script.cancelled.clone());
    assert!(cancelled.contains(&(vec!["7_0".into()], Cancel::Now)), "{cancelled:?}");
    assert!(cancelled.contains(&(vec!["7_1".into()], Cancel::Gently)), "{cancelled:?}");
}

#[test]
fn a_run_that_ends_while_it_submits_leaves_no_job() {
    let fake = Fake::default();
    fake.with(|script| script.held = true);
    let mut stage = stage(&fake);
    stage.order("a");
    fake.wait("it is submitted", |script| !script.submitted.is_empty());
    let release = std::thread::spawn({
        let fake = fake.clone();
        move || {
            std::thread::sleep(Duration::from_millis(300));
            fake.with(|script| script.held = false);
        }
    });
    stage.cluster.close();
    release.join().unwrap();
    assert_eq!(fake.with(|s| s.cancelled.clone()), [(vec!["7".to_string()], Cancel::Now)]);
    assert!(!journal::is_open(&stage.run), "nothing is left to look for");
}

#[test]
fn the_journal_stays_open_while_something_may_be_left() {
    for unsure in [true, false] {
        let fake = Fake::default();
        fake.with(|script| (script.unsure, script.deaf) = (unsure, true));
        let mut stage = stage(&fake);
        stage.order("a");
        let told = |message: &Message| matches!(message.answer, Some(Answer::Job { .. }));
        while !told(&stage.said.recv_timeout(Duration::from_secs(60)).unwrap()) {}
        stage.cluster.close();
        assert!(journal::is_open(&stage.run), "unsure: {unsure}");
        let lines = journal::read(&stage.run);
        assert_eq!(journal::arrays(&lines).len(), 1, "whoever comes asks for it by name");
        assert_eq!(stage.fake.with(|script| script.cancelled.len()), usize::from(!unsure));
    }
}

#[test]
fn nothing_that_a_batch_system_says_is_a_success() {
    for states in [vec![], vec![State::Ended(End::Completed)]] {
        let fake = Fake::default();
        fake.with(|script| script.states = states.clone());
        let mut stage = stage(&fake);
        let worker = stage.order("a");
        let end = stage.end_of(worker);
        assert!(
            matches!(end, Answer::Failed { failure: Failure::Lost, .. }),
            "{states:?}: {end:?}"
        );
    }
}

/// What a node makes of an order, by hand.
fn exit(answer: Answer) -> Vec<u8> {
    let place = Place { job: "7".into(), host: "n1".into() };
    serde_json::to_vec(&Exit { answer, place, seconds: 1.0, cpus: 1, gpus: 0 }).unwrap()
}

#[test]
fn orders_and_ends_travel_by_a_remote() {
    let fake = Fake::default();
    let mut stage = stage_with(&fake, true);
    let worker = stage.order("a");
    fake.wait("it is submitted", |script| !script.submitted.is_empty());
    let (order, desk) = (stage.note(".order"), stage.desk());
    let ordered = desk.read(std::slice::from_ref(&order)).unwrap().remove(0).1;
    let here = stage.cache.root().display().to_string();
    assert!(!String::from_utf8(ordered).unwrap().contains(&here), "no path of the leader's");
    let script = std::fs::read_to_string(fake.with(|s| s.submitted[0].script.clone())).unwrap();
    let attempt = order.strip_suffix(".order").unwrap();
    assert!(script.contains(attempt) && !script.contains(&here), "{script}");
    desk.put(&format!("{attempt}.log-0"), b"half ").unwrap();
    desk.put(&format!("{attempt}.log-5"), b"a line\n").unwrap();
    desk.put_new(&format!("{attempt}.exit"), &exit(Answer::Done { outputs: vec![], log: None }))
        .unwrap();
    assert!(matches!(stage.end_of(worker), Answer::Done { .. }));
    let log = super::records::dir_of(stage.cache.root(), attempt).unwrap().join("log");
    assert_eq!(std::fs::read_to_string(log).unwrap(), "half a line\n");
    stage.cluster.close();
    assert!(desk.list().unwrap().is_empty(), "nothing is left");
    assert!(!journal::is_open(&stage.run) && Address::of(&stage.run).is_none());
}

#[test]
fn a_step_whose_inputs_are_nowhere_is_not_submitted() {
    let fake = Fake::default();
    let mut stage = stage_with(&fake, true);
    let (digest, kind) = (Digest::of(b"gone"), cache::Kind::File);
    let input = FrozenInput { index: None, name: "x".into(), digest, kind, bytes: 4 };
    let worker = stage.order_with("a", BTreeMap::from([("in".to_string(), vec![input])]));
    let digests = loop {
        let message = stage.said.recv_timeout(Duration::from_secs(60)).unwrap();
        if let (true, Some(Answer::Lost { digests })) = (message.worker == worker, message.answer) {
            break digests;
        }
    };
    assert_eq!(digests, [digest]);
    assert!(fake.with(|script| script.submitted.is_empty()));
}

/// That a job is over and has left no record says nothing while records cannot be read.
#[test]
fn nothing_is_concluded_while_the_remote_does_not_answer() {
    let fake = Fake::default();
    let mut stage = stage_with(&fake, true);
    let worker = stage.order("a");
    fake.wait("it is submitted", |script| !script.submitted.is_empty());
    let order = stage.note(".order");
    let (bucket, away) = (stage.dir.path().join("bucket"), stage.dir.path().join("away"));
    std::fs::rename(&bucket, &away).unwrap();
    fake.with(|script| script.states = vec![State::Ended(End::Completed)]);
    let (end, mut why) = (Instant::now() + Duration::from_secs(12), Vec::new());
    while let Ok(message) = stage.said.recv_timeout(end.saturating_duration_since(Instant::now())) {
        let over = matches!(message.answer, Some(Answer::Failed { .. } | Answer::Done { .. }));
        assert!(message.worker != worker || !over, "{:?}", message.answer);
        if let Some(Answer::Job { said: crate::event::Job::Troubled { why: told } }) =
            message.answer
        {
            why.push(told);
        }
    }
    assert!(why.len() == 1, "it is told, and once: {why:?}");
    std::fs::rename(&away, &bucket).unwrap();
    let name = order.replace(".order", ".exit");
    stage.desk().put_new(&name, &exit(Answer::Done { outputs: vec![], log: None })).unwrap();
    assert!(matches!(stage.end_of(worker), Answer::Done { .. }));
}

/// A node that does not find the checkpoint of its order begins anew: what it saves counts.
#[test]
fn a_checkpoint_that_is_gone_is_in_nobodys_way() {
    let fake = Fake::default();
    let mut stage = stage_with(&fake, true);
    let key: Key = Digest::of(b"a").to_string().parse().unwrap();
    let saved = |position, place: &str| super::saved::Saved {
        position,
        place: place.into(),
        digest: Digest::of(b""),
        bytes: 0,
    };
    let earlier = stage.cache.root().join(format!("attempts/{key}/0"));
    super::saved::keep(&earlier, &saved(50, "test/gone")).unwrap();
    let worker = stage.order("a");
    let order = stage.note(".order");
    let attempt = order.strip_suffix(".order").unwrap();
    let body = serde_json::to_vec(&saved(30, "test/there")).unwrap();
    stage.desk().put(&format!("{attempt}.checkpoint-30"), &body).unwrap();
    let name = format!("{attempt}.exit");
    let lost = Answer::Failed { failure: Failure::Preempted, message: "its time was over".into() };
    stage.desk().put_new(&name, &exit(lost)).unwrap();
    assert!(matches!(stage.end_of(worker), Answer::Failed { .. }));
    assert_eq!(super::saved::newest(stage.cache.root(), &key), Some(saved(30, "test/there")));
}
