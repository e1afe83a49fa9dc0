//! What runs, what does not, and in which order, with command steps.

use std::fs;

use crate::support::Project;

/// `a` writes a word, `b` copies it in capitals, `c` counts its bytes; each leaves a line in a file
/// of its own outside, so that executions can be counted.
fn chain(extra: &str) -> Project {
    let project = Project::new();
    let count = project.path().join("count").display().to_string();
    project.write(
        "p.yaml",
        &format!(
            "params: {{ word: hello }}
steps:
  a:
    stage: command
    run: [sh, -c, 'echo a >> \"$COUNT\"; echo ${{params.word}} > ${{out.text}}']
    out: {{ text: a.txt }}
    env: {{ COUNT: {count} }}
  b:
    stage: command
    in: {{ text: a.text }}
    run: [sh, -c, 'echo b >> \"$COUNT\"; tr a-z A-Z < ${{in.text}} > ${{out.text}}']
    out: {{ text: b.txt }}
    env: {{ COUNT: {count} }}
  c:
    stage: command
    in: {{ text: b.text }}
    run: [sh, -c, 'echo c >> \"$COUNT\"; wc -c < ${{in.text}} > ${{out.text}}']
    out: {{ text: c.txt }}
    env: {{ COUNT: {count} }}
{extra}"
        ),
    );
    project
}

#[test]
fn a_second_run_does_nothing() {
    let project = chain("");
    assert_eq!(project.run(&[]), "0 cached, 3 ran");
    assert_eq!(project.run(&[]), "3 cached, 0 ran");
    assert_eq!(project.count("count"), 3);
}

#[test]
fn the_index_may_vanish_at_any_time() {
    let project = chain("");
    project.run(&[]);
    let before = project.digests(&[]);
    fs::remove_dir_all(project.cache().join("index")).unwrap();
    assert_eq!(project.run(&[]), "3 cached, 0 ran");
    assert_eq!(project.digests(&[]), before);
}

#[test]
fn a_changed_parameter_reruns_what_depends_on_it() {
    let project = chain("");
    project.run(&[]);
    assert_eq!(project.executed(&["--set", "word=world!"]), ["a", "b", "c"]);
    // `HELLO` and `WORLD` have as many letters: the count is the same, but its input is not.
    assert_eq!(project.executed(&["--set", "word=world"]), ["a", "b", "c"]);
}

#[test]
fn equal_bytes_stop_the_ripple() {
    let project = chain("");
    project.run(&[]);
    // `a` gives other bytes, `b` the same: `c` is not run.
    assert_eq!(project.executed(&["--set", "word=Hello"]), ["a", "b"]);
}

#[test]
fn names_order_and_comments_do_not_matter() {
    let project = chain("");
    project.run(&[]);
    let yaml = project.read("p.yaml");
    let (head, steps) = yaml.split_once("  a:\n").unwrap();
    let (a, rest) = steps.split_once("  b:\n").unwrap();
    let (b, c) = rest.split_once("  c:\n").unwrap();
    let reordered = format!("# a comment\n{head}  c:\n{c}  second:\n{b}  a: # first\n{a}")
        .replace("b.text", "second.text");
    project.write("p.yaml", &reordered);
    assert_eq!(project.run(&[]), "3 cached, 0 ran");
}

#[test]
fn another_pipeline_shares_what_is_equal() {
    let project = chain("");
    project.run(&[]);
    let other = project.read("p.yaml").replace("  c:\n", "  d:\n");
    project.write("other.yaml", &format!("name: other\n{other}"));
    let ran = project.pipe(&["run", "other.yaml"]);
    assert_eq!(ran.counts(), "3 cached, 0 ran", "{}", ran.stderr);
}

#[test]
fn user_files_are_inputs() {
    let project = Project::with(
        "steps:
  n:
    stage: command
    in: { script: ./n.sh, data: ./data }
    run: [sh, '${in.script}', '${in.data}', '${out.n}']
    out: [n]
outputs: { n: { from: n.n, to: out/n.txt } }
",
    );
    project.write("n.sh", "cat \"$1\"/* | wc -l > \"$2\"\n");
    project.write("data/a.txt", "1\n2\n");
    project.write("data/b.txt", "3\n");
    assert_eq!(project.run(&[]), "0 cached, 1 ran");
    assert_eq!(project.read("out/n.txt").trim(), "3");
    assert_eq!(project.run(&[]), "1 cached, 0 ran");
    project.write("data/b.txt", "3\n4\n");
    assert_eq!(project.run(&[]), "0 cached, 1 ran");
    assert_eq!(project.read("out/n.txt").trim(), "4", "our own output is replaced");
    project.write("out/n.txt", "mine");
    project.write("data/b.txt", "3\n4\n5\n");
    let ran = project.pipe(&["run", "p.yaml"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("was not written by this pipeline"), "{}", ran.stderr);
    assert_eq!(project.read("out/n.txt"), "mine", "a file that is not ours stays");
}

#[test]
fn matrix_slices_and_lists() {
    let project = Project::with(
        "steps:
  part:
    matrix: { n: 0..3, x: [a, b], exclude: [{ n: 1, x: b }] }
    stage: command
    run: [sh, -c, 'echo ${matrix.n}${matrix.x} > ${out.o}']
    out: [o]
  all:
    stage: command
    in: { parts: 'part[*].o', some: 'part[n=*,x=b].o' }
    run: [sh, -c, 'cat ${in.parts} > ${out.o}; echo -- >> ${out.o}; cat ${in.some} >> ${out.o}']
    out: [o]
outputs: { o: { from: all.o, to: o.txt } }
",
    );
    let ran = project.pipe(&["run", "p.yaml"]);
    assert_eq!(ran.counts(), "0 cached, 6 ran", "{}", ran.stderr);
    assert_eq!(
        project.read("o.txt").split_whitespace().collect::<Vec<_>>().join(" "),
        "0a 0b 1a 2a 2b -- 0b 2b"
    );
}

#[test]
fn a_failure_stops_what_follows_and_keeps_the_rest() {
    let project = Project::with(
        "steps:
  bad: { stage: command, run: [sh, -c, 'echo oh no >&2; exit 3'], out: [o] }
  after: { stage: command, in: { i: bad.o }, run: [cp, '${in.i}', '${out.o}'], out: [o] }
  other: { stage: command, run: [sh, -c, 'sleep 0.3; echo 1 > ${out.o}'], out: [o] }
  last: { stage: command, in: { i: other.o }, run: [cp, '${in.i}', '${out.o}'], out: [o] }
",
    );
    let ran = project.pipe(&["run", "p.yaml", "-j1"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("`sh` exited with status 3"), "{}", ran.stderr);
    assert!(ran.stderr.contains("oh no"), "the log's end is shown: {}", ran.stderr);
    let ran = project.pipe(&["run", "p.yaml", "-j1", "--keep-going"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.counts().ends_with("2 ran, 1 failed, 1 skipped"), "{}", ran.counts());
}

#[test]
fn retries_are_for_time_outs_and_crashes_only() {
    let project = Project::new();
    let count = project.path().join("count").display().to_string();
    project.write("p.yaml", &format!("steps:
  slow: {{ stage: command, run: [sh, -c, 'echo x >> {count}; if [ $(wc -l < {count}) -lt 3 ]; then sleep 60; fi; echo 1 > ${{out.o}}'], out: [o], timeout: 1.5, retries: 2 }}
"));
    assert_eq!(project.run(&[]), "0 cached, 1 ran");
    assert_eq!(project.count("count"), 3);
    project.write(
        "p.yaml",
        &format!(
            "steps:
  bad: {{ stage: command, run: [sh, -c, 'echo x >> {count}; exit 1'], out: [o], retries: 2 }}
"
        ),
    );
    assert_eq!(project.pipe(&["run", "p.yaml"]).code, Some(1));
    assert_eq!(project.count("count"), 4, "an error is no crash");
    project.wait_until("nothing is left", || project.processes().is_empty());
}

#[test]
fn lost_bytes_are_made_again_when_somebody_needs_them() {
    let project = chain("");
    project.run(&[]);
    let objects = project.cache().join("objects");
    remove_objects(&objects);
    assert_eq!(project.run(&[]), "3 cached, 0 ran", "a hit needs no bytes");
    assert_eq!(project.executed(&["--from", "c"]), ["a", "b", "c"], "bytes are needed now");
    assert_eq!(project.run(&[]), "3 cached, 0 ran");
}

fn remove_objects(dir: &std::path::Path) {
    for item in fs::read_dir(dir).unwrap().flatten() {
        if item.path().is_dir() {
            remove_objects(&item.path());
        } else {
            fs::remove_file(item.path()).unwrap();
        }
    }
}

#[test]
fn selection_flags() {
    let project = chain("");
    assert_eq!(project.executed(&["--until", "b"]), ["a", "b"]);
    let ran = project.pipe(&["run", "p.yaml", "--only", "c", "--set", "word=x"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("not in the cache"), "{}", ran.stderr);
    assert_eq!(project.executed(&["--only", "c"]), ["c"]);
    assert_eq!(project.executed(&["--from", "b"]), ["b"], "the same bytes: `c` is cut off");
    assert_eq!(project.executed(&["--force", "a"]), ["a"]);
    assert_eq!(project.run(&[]), "3 cached, 0 ran");
}

#[test]
fn uncached_steps_always_run() {
    let project = chain("");
    let yaml = project
        .read("p.yaml")
        .replace("  b:\n    stage: command\n", "  b:\n    stage: command\n    cache: false\n");
    project.write("p.yaml", &yaml);
    project.run(&[]);
    assert_eq!(project.executed(&[]), ["b"]);
}

#[test]
fn commands_get_only_what_is_declared() {
    let mut project = Project::with(
        "steps:
  e:
    stage: command
    run: [sh, -c, 'env | cut -d= -f1 | sort > ${out.o}; echo token is $TOKEN; ls -A > ${out.files}']
    out: [o, files]
    env: { SEEN: yes-it-is }
    secrets: [TOKEN]
outputs: { o: { from: e.o, to: o.txt }, files: { from: e.files, to: files.txt } }
",
    );
    project.env("TOKEN", "hunter2-secret");
    project.env("UNDECLARED", "1");
    project.run(&[]);
    let names = project.read("o.txt");
    assert!(
        names.contains("SEEN") && names.contains("TOKEN") && !names.contains("UNDECLARED"),
        "{names}"
    );
    assert_eq!(
        project.read("files.txt").split_whitespace().collect::<Vec<_>>(),
        ["checkpoint", "out", "scratch"]
    );
    let log = project.pipe(&["log", "e"]);
    assert_eq!(log.stdout.trim(), "token is ***");
    let mut leaks = Vec::new();
    grep(project.cache(), b"hunter2-secret", &mut leaks);
    assert!(leaks.is_empty(), "{leaks:?}");
}

fn grep(dir: &std::path::Path, needle: &[u8], found: &mut Vec<std::path::PathBuf>) {
    for item in fs::read_dir(dir).unwrap().flatten() {
        if item.path().is_dir() {
            grep(&item.path(), needle, found);
        } else if fs::read(item.path())
            .unwrap_or_default()
            .windows(needle.len())
            .any(|w| w == needle)
        {
            found.push(item.path());
        }
    }
}

#[test]
fn two_runs_at_once_execute_each_step_once() {
    let project = chain("");
    let yaml = project.read("p.yaml").replace("echo a >>", "sleep 0.6; echo a >>");
    project.write("p.yaml", &yaml);
    let children: Vec<_> = (0..3).map(|_| project.start(&["run", "p.yaml"])).collect();
    let mut waited = 0;
    for child in children {
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
        waited += usize::from(stderr.contains("waits for `a` of run"));
    }
    assert_eq!(project.count("count"), 3);
    assert!(waited >= 1, "somebody had to wait, and said for what");
}

#[test]
fn equal_steps_in_one_pipeline_are_done_once() {
    let project = chain("");
    let yaml = project.read("p.yaml");
    let b = yaml.split_once("  b:\n").unwrap().1.split_once("  c:\n").unwrap().0.to_string();
    project.write("p.yaml", &format!("{yaml}  twin:\n{b}"));
    assert_eq!(project.run(&["-j4"]), "1 cached, 3 ran");
    assert_eq!(project.count("count"), 3);
}

/// A result keeps files open until it is durable, and results come faster than they get so.
#[test]
fn a_run_of_many_quick_steps_keeps_to_the_files_that_it_may_open() {
    let project = Project::with(
        "name: t\nsteps:\n  s: { stage: text, matrix: { i: 0..200 }, in: { files: './in/${matrix.i}.txt' } }\n",
    );
    for i in 0..200 {
        project.write(&format!("in/{i}.txt"), &format!("text {i}\n"));
    }
    let pipe = project.command(&[]);
    let mut limited = std::process::Command::new("sh");
    limited.args(["-c", "ulimit -n 128; exec \"$0\" run p.yaml --jobs 2"]).arg(pipe.get_program());
    limited.current_dir(project.path());
    for (name, value) in pipe.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    let ran = limited.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let told = text(&ran.stdout) + &text(&ran.stderr);
    assert!(ran.status.success() && told.contains("0 cached, 200 ran"), "{told}");
    assert_eq!(project.run(&[]), "200 cached, 0 ran");
}
