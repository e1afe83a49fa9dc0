//! Kill it anywhere, any time; run again; nothing to unlock, nothing wrong, nobody left behind.

use rustix::process::Signal;

use crate::support::{Project, signal};

/// One step that says when it began and takes long the first time only.
fn slow() -> Project {
    let project = Project::new();
    let dir = project.path().display().to_string();
    let [near, far] = seconds();
    project.write(
        "p.yaml",
        &format!(
            "steps:
  quick: {{ stage: command, run: [sh, -c, 'echo 1 > ${{out.o}}'], out: [o] }}
  slow:
    stage: command
    in: {{ i: quick.o }}
    run: [sh, -c, 'echo x >> {dir}/began; if [ ! -e {dir}/fast ]; then sleep {near} & setsid sleep {far} & wait; fi; cp ${{in.i}} ${{out.o}}']
    out: [o]
"
        ),
    );
    project
}

/// Waits for the first step to be durable and the second to be in the middle of its work.
fn began(project: &Project) {
    project.wait_until("the step began", || {
        let entries = std::fs::read_dir(project.cache().join("entries")).into_iter().flatten();
        let durable = entries.flatten().filter_map(|d| std::fs::read_dir(d.path()).ok());
        project.count("began") == 1 && sleeping() && durable.flatten().count() == 1
    });
}

fn nobody_left(project: &Project) {
    project.wait_until("every process has ended", || {
        let left = project.processes();
        left.is_empty() && !sleeping()
    });
}

/// Numbers that no other process sleeps for.
fn seconds() -> [String; 2] {
    ["1", "2"].map(|digit| format!("{digit}{}", std::process::id()))
}

/// Whether one of the sleeps above is still there, wherever it hangs in the process tree.
fn sleeping() -> bool {
    let lines = seconds().map(|n| format!("sleep\0{n}\0").into_bytes());
    let items = std::fs::read_dir("/proc").unwrap().flatten();
    let commands = items.filter_map(|i| std::fs::read(i.path().join("cmdline")).ok());
    commands.into_iter().any(|line| lines.contains(&line))
}

// One test after the other: they look for the same sleeps.
#[test]
fn killed_and_stopped_runs_leave_nobody_and_go_on() {
    kill_leader();
    kill_worker();
    interrupt_once();
    interrupt_twice();
}

fn kill_leader() {
    let project = slow();
    let mut leader = project.start(&["run", "p.yaml"]);
    began(&project);
    signal(leader.id(), Signal::KILL);
    leader.wait().unwrap();
    nobody_left(&project);
    project.write("fast", "");
    assert_eq!(project.run(&[]), "1 cached, 1 ran");
    assert_eq!(project.run(&[]), "2 cached, 0 ran");
}

fn kill_worker() {
    let project = slow();
    let leader = project.start(&["run", "p.yaml"]);
    began(&project);
    for pid in project.processes() {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        if line.windows(7).any(|w| w == b"\0worker") {
            signal(pid, Signal::KILL);
        }
    }
    let output = leader.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("the worker was killed (SIGKILL)"), "{stderr}");
    nobody_left(&project);
    project.write("fast", "");
    assert_eq!(project.run(&[]), "1 cached, 1 ran");
}

fn interrupt_once() {
    let project = slow();
    let leader = project.start(&["run", "p.yaml"]);
    began(&project);
    signal(leader.id(), Signal::INT);
    let output = leader.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.starts_with("interrupted: 0 cached, 1 ran, 1 skipped"), "{stdout}");
    nobody_left(&project);
    project.write("fast", "");
    assert_eq!(project.run(&[]), "1 cached, 1 ran");
}

fn interrupt_twice() {
    let project = Project::new();
    let dir = project.path().display().to_string();
    // A program that does not want to stop.
    project.write(
        "p.yaml",
        &format!("steps:
  stubborn: {{ stage: command, run: [sh, -c, 'trap \"\" TERM; echo x >> {dir}/began; while :; do sleep 0.1; done'], out: [o] }}
"),
    );
    let leader = project.start(&["run", "p.yaml"]);
    project.wait_until("the step began", || project.count("began") == 1);
    signal(leader.id(), Signal::INT);
    std::thread::sleep(std::time::Duration::from_millis(200));
    signal(leader.id(), Signal::INT);
    assert_eq!(leader.wait_with_output().unwrap().status.code(), Some(130));
    project.wait_until("every process has ended", || project.processes().is_empty());
}

#[test]
fn a_command_resumes_from_its_own_checkpoint() {
    let project = Project::new();
    let dir = project.path().display().to_string();
    project.write(
        "p.yaml",
        &format!(
            "steps:
  count:
    stage: command
    run:
      - sh
      - -c
      - |
        n=$(cat ${{checkpoint}}/n 2>/dev/null || echo 0)
        echo from $n >> {dir}/starts
        if [ $n -lt 5 ]; then echo 5 > ${{checkpoint}}/n; exit 1; fi
        echo $n > ${{out.o}}
    out: [o]
outputs: {{ o: {{ from: count.o, to: o.txt }} }}
"
        ),
    );
    assert_eq!(project.pipe(&["run", "p.yaml"]).code, Some(1));
    assert_eq!(project.run(&[]), "0 cached, 1 ran");
    assert_eq!(project.read("starts"), "from 0\nfrom 5\n");
    assert_eq!(project.read("o.txt"), "5\n");
}

#[test]
fn what_was_finished_but_not_published_is_adopted() {
    for point in ["commit.before-sync", "commit.before-link"] {
        let project = Project::with(
            "steps:\n  a: { stage: command, run: [sh, -c, 'echo x >> ${params.dir}/ran; echo 1 > ${out.o}'], out: [o] }\nparams: { dir: . }\n",
        );
        let dir = format!("dir={}", project.path().display());
        // So that the memo of the run that adopts it could vouch for all.
        std::thread::sleep(std::time::Duration::from_millis(2300));
        let mut leader = project.command(&["run", "p.yaml", "--set", &dir]);
        let status = leader.env("PIPE_CRASH_AT", point).output().unwrap().status;
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{point}");
        let ran = project.pipe(&["run", "p.yaml", "--set", &dir]);
        assert_eq!(
            (ran.code, ran.counts().as_str()),
            (Some(0), "1 cached, 0 ran"),
            "{}",
            ran.stderr
        );
        assert!(ran.stderr.contains("it is kept now"), "{}", ran.stderr);
        assert_eq!(project.count("ran"), 1, "{point}");
        assert_eq!(project.run(&["--set", &dir]), "1 cached, 0 ran");
        std::fs::remove_dir_all(project.cache().join("entries")).unwrap();
        std::fs::create_dir(project.cache().join("entries")).unwrap();
        assert_eq!(project.run(&["--set", &dir]), "0 cached, 1 ran", "{point}");
    }
}
