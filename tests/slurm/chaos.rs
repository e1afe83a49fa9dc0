//! Random faults of the cluster, of jobs and of the leader while a pipeline runs: it ends with the
//! right results, each published once, by nothing but running it again.

use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::Signal;

use super::cluster::{Cluster, FRAGILE, divergences, entries};
use super::store::Store;
use crate::support::{Project, signal};

/// A run that takes longer goes on for ever.
const PATIENCE: Duration = Duration::from_secs(600);

/// Random numbers from a printed seed.
struct Random(u64);

impl Random {
    fn new() -> Random {
        let given = std::env::var("PIPE_SEED").ok().and_then(|seed| seed.parse().ok());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let seed = given.unwrap_or(now.as_nanos() as u64 | 1);
        println!("PIPE_SEED={seed}");
        Random(seed | 1)
    }

    /// Below `n`.
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn pause(&mut self, most_ms: u64) {
        std::thread::sleep(Duration::from_millis(self.below(most_ms)));
    }
}

/// Two waves and a sum. `slow` counts to its end from a checkpoint; `first` kills its worker the
/// first time, as a lack of memory does; with `long` one outlasts its time.
fn pipeline(project: &Project, mode: &str, long: bool) {
    let dir = project.path().display().to_string();
    let (ticks, time) = if long { (500, "1m") } else { (60, "30m") };
    project.write(
        "p.yaml",
        &format!(
            "executor: {{ slurm: {{ mode: {mode}, poll: 3, pilots: 4, idle: 10 }} }}
steps:
  first:
    matrix: {{ n: 0..8 }}
    stage: command
    run:
      - sh
      - -ec
      - |
        echo ${{matrix.n}} >> {dir}/began
        if [ ${{matrix.n}} = 5 ] && [ ! -e {dir}/killed ]; then touch {dir}/killed; kill -9 $PPID; fi
        sleep 1.${{matrix.n}}
        echo ${{matrix.n}} > ${{out.o}}
    out: [o]
  slow:
    stage: command
    run:
      - sh
      - -ec
      - |
        mkdir -p ${{checkpoint}}
        n=$(cat ${{checkpoint}}/n || echo 0)
        while [ $n -lt {ticks} ]; do n=$((n + 1)); echo $n > ${{checkpoint}}/new; mv ${{checkpoint}}/new ${{checkpoint}}/n; sleep 0.1; done
        echo $n > ${{out.o}}
    out: [o]
    resources: {{ time: {time} }}
  second:
    matrix: {{ n: 0..6 }}
    stage: command
    in: {{ a: 'first[${{matrix.n}}].o' }}
    run: [sh, -ec, 'sleep 0.5; cat ${{in.a}} ${{in.a}} > ${{out.o}}']
    out: [o]
  all:
    stage: command
    in: {{ f: 'first[*].o', s: 'second[*].o', x: slow.o }}
    run: [sh, -c, 'cat ${{in.f}} ${{in.s}} ${{in.x}} > ${{out.o}}']
    out: [o]
outputs: {{ o: {{ from: all.o, to: o.txt }} }}
"
        ),
    );
}

fn expected(long: bool) -> String {
    let first: String = (0..8).map(|n| format!("{n}\n")).collect();
    let second: String = (0..6).map(|n| format!("{n}\n{n}\n")).collect();
    format!("{first}{second}{}\n", if long { 500 } else { 60 })
}

fn start(project: &Project, trial: u64) -> Child {
    let log = fs::File::options()
        .create(true)
        .append(true)
        .open(project.path().join(format!("leader-{trial}.log")))
        .unwrap();
    let mut command = project.command(&["run", "p.yaml", "--on", "slurm"]);
    command.stdout(log.try_clone().unwrap()).stderr(log).stdin(Stdio::null()).spawn().unwrap()
}

/// One fault; what it broke of the cluster is whole again some seconds later.
fn fault(random: &mut Random, cluster: &Cluster, done: &mut Vec<String>) {
    let node = format!("n{}", 1 + random.below(3));
    let job = |random: &mut Random, states: &str| {
        let jobs = cluster.jobs(states);
        (!jobs.is_empty()).then(|| jobs[random.below(jobs.len() as u64) as usize].clone())
    };
    match random.below(6) {
        0 => {
            done.push("slurmctld killed".into());
            cluster.fault("kill-ctld", None);
            random.pause(6000);
            cluster.fault("start-ctld", None);
        }
        1 => {
            done.push(format!("{node} killed with its jobs"));
            cluster.fault("kill-node", Some(&node));
            random.pause(20_000);
            cluster.fault("start-node", Some(&node));
        }
        2 => {
            done.push(format!("{node} cut off"));
            cluster.fault("kill-slurmd", Some(&node));
            random.pause(20_000);
            cluster.fault("start-node", Some(&node));
        }
        3 => {
            let Some(job) = job(random, "PENDING,RUNNING") else { return };
            done.push(format!("{job} cancelled"));
            cluster.ask("scancel", &[&job]);
        }
        4 => {
            let Some(job) = job(random, "RUNNING") else { return };
            done.push(format!("{job} requeued"));
            cluster.ask("scontrol", &["update", &format!("jobid={job}"), "requeue=1"]);
            cluster.ask("scontrol", &["requeue", &job]);
        }
        _ => {
            let Some(job) = job(random, "RUNNING") else { return };
            done.push(format!("{job} killed"));
            cluster.ask("scancel", &["-s", "KILL", "-f", &job]);
        }
    }
}

fn trial(random: &mut Random, cluster: &Cluster, trial: u64) {
    let mut project = Project::new();
    // Every third trial has no directory that nodes and leader share.
    let store = (trial % 3 == 1).then(Store::start);
    let mode = match &store {
        Some(store) => {
            store.meet(cluster, &mut project, "");
            "submit"
        }
        None => {
            cluster.meet(&mut project);
            ["submit", "pilot", "auto"][random.below(3) as usize]
        }
    };
    let locks = ["kernel", "leases"][random.below(2) as usize];
    project.env("PIPE_CACHE_LOCKS", locks);
    // A limit of Slurm's is a minute at least, so that not every trial waits for one.
    let long = trial % 5 == 4;
    pipeline(&project, mode, long);
    let far = if store.is_some() { ", over a remote" } else { "" };
    let mut done = vec![format!("trial {trial}, mode {mode}{far}, {locks}, long {long}")];
    let mut leader = start(&project, trial);
    let started = Instant::now();
    let mut faults = 1 + random.below(4);
    let log = || project.read(&format!("leader-{trial}.log"));
    loop {
        random.pause(2500);
        cluster.repair();
        if let Some(status) = leader.try_wait().unwrap() {
            assert_eq!(status.code(), Some(0), "{done:#?}\n{}", log());
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{done:#?}\n{}", log());
        if faults == 0 {
            continue;
        }
        faults -= 1;
        if random.below(3) == 0 {
            done.push("leader killed".into());
            signal(leader.id(), Signal::KILL);
            leader.wait().unwrap();
            random.pause(4000);
            leader = start(&project, trial);
        } else {
            fault(random, cluster, &mut done);
        }
    }
    println!("{done:?}: {:.0} s", started.elapsed().as_secs_f64());
    assert_eq!(project.read("o.txt"), expected(long), "{done:#?}\n{}", log());
    assert_eq!(entries(project.cache()), 16, "{done:#?}\n{}", log());
    assert_eq!(divergences(project.cache()), 0, "{done:#?}\n{}", log());
    assert_eq!(project.run(&["--on", "slurm"]), "16 cached, 0 ran");
    // Orphans of this trial are no load for the next one.
    cluster.ask("scancel", &["-u", &rustix::process::getuid().as_raw().to_string()]);
}

/// `PIPE_SLURM_RUNS`, else 100 in a soak, else what CI does.
fn trials() -> u64 {
    let number = |name: &str| std::env::var(name).ok().and_then(|n| n.parse().ok());
    let soak = std::env::var_os("PIPE_SOAK").map(|_| 100);
    number("PIPE_SLURM_RUNS").or(soak).unwrap_or(5)
}

#[test]
fn whatever_fails_results_are_right_and_published_once() {
    let Some(cluster) = Cluster::start(&[FRAGILE]) else { return };
    let mut random = Random::new();
    for n in 0..trials() {
        trial(&mut random, &cluster, n);
    }
}
