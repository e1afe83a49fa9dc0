//! Leader and nodes share a remote and no directory: what a step gets and gives is the same, and
//! whoever dies or is cut off costs work, never a result.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use super::cluster::{Cluster, FRAGILE, divergences, entries};
use super::store::{Store, nodes};
use crate::support::{Project, signal};

/// The caches of nodes.
fn cached_nodes(project: &Project) -> Vec<PathBuf> {
    let items = fs::read_dir(nodes(project)).into_iter().flatten().flatten();
    items.map(|item| item.path()).collect()
}

/// The leader's cache is seen by it alone: it lies elsewhere, under this name only in a name space of
/// the leader's own. So whatever nodes do at that path is seen here, and they find nothing there.
fn hidden(project: &mut Project, args: &[&str]) -> Option<(Command, PathBuf)> {
    let (real, seen) = (project.path().join("../real"), project.path().join("../seen"));
    for dir in [&real, &seen] {
        fs::create_dir_all(dir).unwrap();
    }
    let mut command = Command::new("unshare");
    let script = "mount --bind \"$1\" \"$2\" && shift 2 && exec \"$@\"";
    command.args(["-m", "sh", "-c", script, "sh"]).args([&real, &seen]);
    project.env("PIPE_CACHE", &real.display().to_string());
    let inner = project.command(args);
    command.arg(inner.get_program()).args(inner.get_args());
    command.current_dir(project.path()).stdin(Stdio::null());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.env("PIPE_CACHE", &seen);
    let works = Command::new("unshare").args(["-m", "true"]).output();
    works.is_ok_and(|output| output.status.success()).then_some((command, seen))
}

/// The run ends well after so many executions, with the right result.
fn ends_right(leader: Child, project: &Project, began: usize) {
    let output = leader.wait_with_output().unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert_eq!(project.count("began"), began, "{text}");
    right(project);
}

#[test]
fn the_method_gives_the_same_bytes_over_a_remote_alone() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let store = Store::start();
    let tiny = include_str!("../cases/tiny.yaml");
    let mut project = Project::with(tiny);
    store.meet(&cluster, &mut project, "");
    match hidden(&mut project, &["run", "p.yaml", "--on", "slurm"]) {
        Some((mut command, seen)) => {
            let output = command.output().unwrap();
            let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
            assert_eq!(output.status.code(), Some(0), "{text}");
            assert!(text.contains("0 cached, 13 ran"), "{text}");
            assert_eq!(fs::read_dir(seen).unwrap().count(), 0, "nodes did something there");
        }
        None => assert_eq!(project.run(&["--on", "slurm"]), "0 cached, 13 ran"),
    }
    let here = Project::with(tiny);
    here.run(&[]);
    assert_eq!(project.digests(&[]), here.digests(&[]));
    assert!(store.notes().is_empty(), "{:?}", store.notes());
    assert!(!cached_nodes(&project).is_empty());
    for node in cached_nodes(&project) {
        assert_eq!(entries(&node), 0, "only the leader publishes");
        assert_eq!(fs::read_dir(node.join("attempts")).unwrap().count(), 0, "all is tidy");
    }
}

/// Three steps that wait for `go`, and one that needs them and a file and a directory of the user's.
fn waiting(project: &Project) {
    let dir = project.path().display().to_string();
    project.write("more/deep/x.txt", "deep\n");
    project.write("one.txt", "mine\n");
    project.write(
        "p.yaml",
        &format!(
            "steps:
  part:
    matrix: {{ n: 0..3 }}
    stage: command
    run:
      - sh
      - -ec
      - |
        echo part ${{matrix.n}} begins
        echo ${{matrix.n}} >> {dir}/began
        while [ ! -e {dir}/go ]; do sleep 0.1; done
        seq ${{matrix.n}} 90000 > ${{out.o}}
    out: [o]
  all:
    stage: command
    in: {{ p: 'part[*].o', f: ./one.txt, d: ./more }}
    run: [sh, -ec, 'wc -l < ${{in.p}} > ${{out.o}}; cat ${{in.f}} ${{in.d}}/deep/x.txt >> ${{out.o}}; mkdir ${{out.d}}; cp ${{in.f}} ${{out.d}}']
    out: [o, d]
outputs: {{ o: {{ from: all.o, to: o.txt }}, p: {{ from: 'part[1].o', to: p.txt }}, d: {{ from: all.d, to: d }} }}
"
        )
        .replace("wc -l < ${in.p}", "cat ${in.p} | wc -l"),
    );
}

fn right(project: &Project) {
    assert_eq!(project.read("o.txt"), "270000\nmine\ndeep\n");
    assert_eq!(project.read("p.txt").lines().count(), 90_000);
    assert_eq!(project.read("d/one.txt"), "mine\n");
    assert_eq!((entries(project.cache()), divergences(project.cache())), (4, 0));
}

fn began(project: &Project, n: usize) {
    project.wait_until("all parts began", || project.count("began") == n);
}

#[test]
fn a_new_leader_takes_what_was_finished_and_goes_on_with_the_rest() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    for finished in [true, false] {
        let store = Store::start();
        let mut project = Project::new();
        store.meet(&cluster, &mut project, "");
        waiting(&project);
        let mut leader = project.start(&["run", "p.yaml", "--on", "slurm"]);
        began(&project, 3);
        signal(leader.id(), Signal::KILL);
        leader.wait().unwrap();
        if finished {
            project.write("go", "");
            project.wait_until("the jobs ended", || cluster.jobs("PENDING,RUNNING").is_empty());
            // Bytes are only in the remote from here on.
            fs::remove_dir_all(nodes(&project)).unwrap();
        }
        let second = project.start(&["run", "p.yaml", "--on", "slurm"]);
        std::thread::sleep(Duration::from_secs(2));
        project.write("go", "");
        let output = second.wait_with_output().unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert_eq!(output.status.code(), Some(0), "{text}");
        assert_eq!(project.count("began"), 3, "nothing was begun twice\n{text}");
        right(&project);
        // Whoever comes next finds nothing to ask for, and the remote is as it was.
        assert_eq!(project.run(&["--on", "slurm", "--force", "all"]), "3 cached, 1 ran");
        assert!(store.notes().is_empty(), "{:?}", store.notes());
    }
}

#[test]
fn a_node_that_is_lost_or_cut_off_harms_nothing() {
    for how in ["kill-node", "kill-slurmd"] {
        let Some(cluster) = Cluster::start(&[FRAGILE]) else { return };
        let store = Store::start();
        let mut project = Project::new();
        store.meet(&cluster, &mut project, "");
        waiting(&project);
        let leader = project.start(&["run", "p.yaml", "--on", "slurm"]);
        began(&project, 3);
        // All three have room on one node, and it is the first.
        cluster.fault(how, Some("n1"));
        project.wait_until("each was begun once more", || project.count("began") == 6);
        project.write("go", "");
        let output = leader.wait_with_output().unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert_eq!(output.status.code(), Some(0), "{how}: {text}");
        right(&project);
        let later: Vec<String> = store.notes();
        assert!(how == "kill-slurmd" || later.is_empty(), "{later:?}");
    }
}

#[test]
fn a_job_that_is_started_again_or_killed_is_done_once_more() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let store = Store::start();
    let mut project = Project::new();
    store.meet(&cluster, &mut project, "");
    waiting(&project);
    let leader = project.start(&["run", "p.yaml", "--on", "slurm"]);
    began(&project, 3);
    let jobs = cluster.jobs("RUNNING");
    cluster.ask("scontrol", &["update", &format!("jobid={}", jobs[0]), "requeue=1"]);
    cluster.ask("scontrol", &["requeue", &jobs[0]]);
    cluster.ask("scancel", &["-s", "KILL", "-f", &jobs[1]]);
    project.wait_until("two were begun once more", || project.count("began") == 5);
    project.write("go", "");
    ends_right(leader, &project, 5);
}

#[test]
fn what_a_step_says_comes_while_it_runs_and_stays() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let store = Store::start();
    let mut project = Project::new();
    store.meet(&cluster, &mut project, "");
    waiting(&project);
    let yaml = project.read("p.yaml").replace(
        "outputs:",
        "  bad: { stage: command, run: [sh, -c, 'echo told; exit 3'], retries: 5 }\noutputs:",
    );
    project.write("p.yaml", &yaml);
    let leader = project.start(&["run", "p.yaml", "--on", "slurm", "--keep-going"]);
    project.wait_until("a running step's log is here", || {
        project.pipe(&["log", "part@2"]).stdout.contains("part 2 begins")
    });
    project.write("go", "");
    let output = leader.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("exited with status 3") && stderr.contains("told"), "{stderr}");
    assert_eq!(stderr.matches("failed bad").count(), 1, "no retry: {stderr}");
    right(&project);
    assert!(project.pipe(&["log", "part@2"]).stdout.contains("part 2 begins"));
    assert!(project.pipe(&["log", "bad"]).stdout.contains("told"));
}

#[test]
fn what_is_missing_is_told_in_a_line() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let store = Store::directory();
    let mut project = Project::with("steps: { a: { stage: command, run: ['true'] } }\n");
    store.meet(&cluster, &mut project, "");
    let told = |project: &Project, args: &[&str], what: &str| {
        let ran = project.pipe(&[&["run", "p.yaml", "--on", "slurm"], args].concat());
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains(what), "{}", ran.stderr);
        assert!(ran.stderr.trim().lines().count() <= 2, "{}", ran.stderr);
    };
    told(&project, &["--no-remote"], "needs a remote that nodes reach too");
    store.meet(&cluster, &mut project, ", mode: pilot");
    told(&project, &[], "`mode: pilot` needs a directory");
    // What goes wrong on a node is told by the node, while it can reach the remote.
    let failed = |project: &Project, what: &[&str]| {
        let ran = project.pipe(&["run", "p.yaml", "--on", "slurm"]);
        assert_eq!(ran.code, Some(1), "{}", ran.stderr);
        what.iter().for_each(|what| assert!(ran.stderr.contains(what), "{what}: {}", ran.stderr));
    };
    store.meet(&cluster, &mut project, ", program: /nowhere/pipe");
    failed(&project, &["what it printed is in /tmp/pipe-", "/nowhere/pipe and reaches"]);
    project.write("file", "");
    let bad = format!(", node_cache: {}/file", project.path().display());
    store.meet_with(&cluster, &mut project, &bad);
    failed(&project, &["the node's cache", "node_cache:"]);
}

#[test]
fn bytes_that_the_remote_lost_are_made_again() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let store = Store::directory();
    let mut project = Project::new();
    store.meet(&cluster, &mut project, "");
    waiting(&project);
    project.write("go", "");
    let ran = project.pipe(&["run", "p.yaml", "--on", "slurm", "--until", "part"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    // Of the first the bytes go, those of the last are damaged, and nobody else has them; those of the
    // second go too, and the leader has them, since they were delivered.
    fs::remove_dir_all(nodes(&project)).unwrap();
    for path in walk(&store.path().join("objects")) {
        let mut bytes = fs::read(&path).unwrap();
        if bytes.len() < 400_000 {
            continue;
        }
        fs::remove_file(&path).unwrap();
        if bytes[0] == b'2' {
            bytes[7] ^= 1;
            fs::write(&path, bytes).unwrap();
        }
    }
    let ran = project.pipe(&["run", "p.yaml", "--on", "slurm"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("`part[0]` runs again"), "{}", ran.stderr);
    assert!(ran.stderr.contains("`part[2]` runs again"), "{}", ran.stderr);
    assert_eq!(project.count("began"), 5, "{}", ran.stderr);
    right(&project);
}

fn walk(path: &Path) -> Vec<PathBuf> {
    match path.is_dir() {
        false => vec![path.to_path_buf()],
        true => fs::read_dir(path).unwrap().flat_map(|i| walk(&i.unwrap().path())).collect(),
    }
}

/// While nobody answers, nothing is concluded: neither by the leader nor by nodes.
#[test]
fn a_remote_that_hangs_for_a_while_costs_time_only() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let store = Store::start();
    if !store.is_served() {
        return;
    }
    let mut project = Project::new();
    store.meet(&cluster, &mut project, "");
    waiting(&project);
    let leader = project.start(&["run", "p.yaml", "--on", "slurm"]);
    began(&project, 3);
    store.ask("freeze");
    project.write("go", "");
    std::thread::sleep(Duration::from_secs(25));
    store.ask("thaw");
    ends_right(leader, &project, 3);
}

#[test]
fn a_run_is_cancelled_and_a_leader_may_be_a_job() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let store = Store::start();
    let mut project = Project::new();
    store.meet(&cluster, &mut project, "");
    waiting(&project);
    let leader = project.start(&["run", "p.yaml", "--on", "slurm"]);
    began(&project, 3);
    let ran = project.pipe(&["cancel"]);
    assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
    assert_eq!(leader.wait_with_output().unwrap().status.code(), Some(130));
    project.wait_until("its jobs have ended", || {
        cluster.jobs("PENDING,RUNNING,COMPLETING").is_empty()
    });
    assert!(store.notes().is_empty(), "{:?}", store.notes());
    project.write("go", "");
    let ran = project.pipe(&["run", "p.yaml", "--on", "slurm", "--detach"]);
    assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
    project.wait_until("the run has ended", || project.path().join("d").exists());
    project.wait_until("its jobs have ended", || {
        cluster.jobs("PENDING,RUNNING,COMPLETING").is_empty()
    });
    right(&project);
}

/// A checkpoint goes with the step from node to node, and away with its end.
#[test]
fn a_step_goes_on_elsewhere_from_its_checkpoint() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let store = Store::start();
    let mut project = Project::new();
    store.meet(&cluster, &mut project, "");
    let dir = project.path().display().to_string();
    project.write(
        "p.yaml",
        &format!(
            "steps:
  slow:
    stage: command
    run:
      - sh
      - -ec
      - |
        mkdir -p ${{checkpoint}}
        n=$(cat ${{checkpoint}}/n || echo 0)
        echo $n >> {dir}/began
        trap 'exit 1' TERM
        while [ ! -e {dir}/go ] || [ $n -lt 40 ]; do n=$((n + 1)); echo $n > ${{checkpoint}}/new; mv ${{checkpoint}}/new ${{checkpoint}}/n; sleep 0.1; done
        echo done > ${{out.o}}
    out: [o]
outputs: {{ o: {{ from: slow.o, to: o.txt }} }}
"
        ),
    );
    let leader = project.start(&["run", "p.yaml", "--on", "slurm"]);
    let running = |n: usize| {
        project.wait_until("it runs", || project.count("began") == n);
        std::thread::sleep(Duration::from_secs(3));
        cluster.jobs("RUNNING").pop().unwrap()
    };
    // Told to go: what it has is sealed and sent. And its node has nothing of it any more.
    let job = running(1);
    cluster.ask("scancel", &["-b", "-s", "USR1", &job]);
    let job = running(2);
    // Killed: the one before is still there.
    cluster.ask("scancel", &["-s", "KILL", "-f", &job]);
    project.wait_until("it runs again", || project.count("began") == 3);
    project.write("go", "");
    let output = leader.wait_with_output().unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert_eq!(project.read("o.txt"), "done\n");
    let from: Vec<u32> = project.read("began").lines().map(|n| n.parse().unwrap()).collect();
    assert_eq!((from.len(), from[0]), (3, 0), "{text}");
    assert!(from[1] > 5 && from[2] >= from[1], "{from:?}");
    assert!(store.checkpoints().is_empty());
}

/// The store's secret is with whoever needs it and written nowhere.
#[test]
fn credentials_stay_where_they_are() {
    let Some(cluster) = Cluster::start(&[]) else { return };
    let store = Store::start();
    if !store.is_served() {
        return;
    }
    let mut project = Project::new();
    store.meet(&cluster, &mut project, "");
    waiting(&project);
    project.write("go", "");
    let ran = project.pipe(&["run", "p.yaml", "--on", "slurm", "--json"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let secret = store.secret();
    assert!(!ran.stdout.contains(&secret) && !ran.stderr.contains(&secret));
    let all = walk(&project.path().join(".."));
    assert!(all.iter().any(|path| path.ends_with("1.sh")), "scripts are among them");
    for path in all {
        let bytes = fs::read(&path).unwrap_or_default();
        let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
        assert!(!found, "{}", path.display());
    }
}
