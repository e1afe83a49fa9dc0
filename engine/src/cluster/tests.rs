//! The leader's side against a batch system that does what a test says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cache::{Cache, Digest, Key};
use serde_json::Value;

use super::batch::{Array, Batch, Cancel, End, Refusal, Shape, State, Status};
use super::{Cluster, Settings, Setup, journal};
use crate::event::Failure;
use crate::pool::{Kind, Message, Runner, Wanted};
use crate::wire::{Answer, Frozen, Order};

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
    _dir: tempfile::TempDir,
}

fn stage(fake: &Fake) -> Stage {
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
        remote: None,
    };
    let (sender, said) = channel();
    let messages = Arc::new(move |message| sender.send(message).is_ok());
    let cluster = Cluster::start(setup, &cache, "build", messages).unwrap();
    Stage { fake: fake.clone(), cluster, said, run, cache, _dir: dir }
}

impl Stage {
    /// Orders a step whose key is made from `name`.
    fn order(&mut self, name: &str) -> u64 {
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
            inputs: BTreeMap::new(),
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
