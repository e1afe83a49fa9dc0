//! Two machines (caches) and one remote: results are made once, bytes come when they are needed, and
//! whatever is wrong with the remote, the run is right.

use std::fs;
use std::path::PathBuf;

use crate::support::{Project, Ran};

/// Three steps in a row; the first two say that they ran. `word` changes the last one only.
fn yaml(project: &Project) -> String {
    let dir = project.path().display().to_string();
    format!(
        "params: {{ word: one }}
steps:
  a:
    stage: command
    run: [sh, -c, 'echo a >> {dir}/ran; sleep 0.2; seq 1 20000 > ${{out.o}}; mkdir ${{out.d}}; echo deep > ${{out.d}}/x']
    out: [o, d]
  b:
    stage: command
    in: {{ i: a.o, d: a.d }}
    run: [sh, -c, 'echo b >> {dir}/ran; sleep 0.2; cat ${{in.i}} ${{in.d}}/x | wc -l > ${{out.o}}']
    out: [o]
  c:
    stage: command
    in: {{ i: a.o, b: b.o }}
    run: [sh, -c, 'echo c >> {dir}/ran; tail -n 1 ${{in.i}} > ${{out.o}}; cat ${{in.b}} >> ${{out.o}}; echo ${{params.word}} >> ${{out.o}}']
    out: [o]
outputs: {{ o: {{ from: c.o, to: o.txt }} }}
"
    )
}

struct Two {
    project: Project,
    remote: PathBuf,
}

impl Two {
    fn new() -> Two {
        let project = Project::new();
        project.write("p.yaml", &yaml(&project));
        let remote = project.path().join("../remote");
        fs::create_dir(&remote).unwrap();
        Two { project, remote: fs::canonicalize(remote).unwrap() }
    }

    /// `pipe run` with the cache of machine `of`.
    fn run(&self, of: &str, args: &[&str]) -> Ran {
        self.pipe(of, &[&["run", "p.yaml"], args].concat())
    }

    fn pipe(&self, of: &str, args: &[&str]) -> Ran {
        let cache = self.project.path().join("..").join(of);
        let output = self
            .project
            .command(args)
            .env("PIPE_CACHE", cache)
            .env("PIPE_REMOTE", &self.remote)
            .env("XDG_CONFIG_HOME", self.project.path().join("../config"))
            .output()
            .unwrap();
        Ran {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn ran(&self) -> String {
        self.project.read("ran").replace('\n', "")
    }

    fn objects(&self, of: &str) -> usize {
        let dir = self.project.path().join("..").join(of).join("objects");
        fs::read_dir(dir).map_or(0, |shards| {
            shards.map(|shard| fs::read_dir(shard.unwrap().path()).unwrap().count()).sum()
        })
    }
}

fn good(ran: &Ran) -> &str {
    assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
    ran.stdout.lines().find(|line| line.starts_with("remote ")).unwrap_or_default()
}

const OUT: &str = "20000\n20001\none\n";

#[test]
fn what_one_machine_made_the_other_has() {
    let two = Two::new();
    let first = two.run("one", &["--trust-remote"]);
    assert!(good(&first).contains("0 hits, 3 misses, 3 uploaded, 0 failed"), "{}", first.stdout);
    fs::remove_file(two.project.path().join("o.txt")).unwrap();
    let second = two.run("two", &["--trust-remote"]);
    assert!(good(&second).contains("3 hits, 0 misses, 0 uploaded"), "{}", second.stdout);
    assert_eq!(two.project.read("o.txt"), OUT);
    assert_eq!(two.ran(), "abc");
    assert_eq!(two.objects("two"), 1, "only what was delivered came");
    // The bytes of what a step needs come when it runs.
    let third = two.run("two", &["--trust-remote", "--set", "word=two"]);
    assert!(good(&third).contains("0 hits, 1 misses, 1 uploaded"), "{}", third.stdout);
    assert_eq!(two.project.read("o.txt"), OUT.replace("one", "two"));
    assert_eq!(two.ran(), "abcc");
}

#[test]
fn entries_of_strangers_are_not_believed_and_signed_ones_are() {
    let two = Two::new();
    good(&two.run("one", &["--trust-remote"]));
    let stranger = two.run("two", &[]);
    assert!(good(&stranger).contains("0 hits, 3 misses"), "{}", stranger.stdout);
    assert_eq!(two.ran(), "abcabc");

    let two = Two::new();
    let key = two.project.path().join("key");
    let made = two.pipe("one", &["cache", "keygen", key.to_str().unwrap(), "--comment", "me"]);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    let line = made.stdout.trim();
    let config = format!("keys: [\"{line}\"]\nsign_with: {}\n", key.display());
    fs::create_dir_all(two.project.path().join("../config/pipe")).unwrap();
    fs::write(two.project.path().join("../config/pipe/config.yaml"), config).unwrap();
    good(&two.run("one", &[]));
    assert!(good(&two.run("two", &[])).contains("3 hits, 0 misses"));
    assert_eq!(two.ran(), "abc");
}

#[test]
fn damaged_and_lost_bytes_of_a_remote_are_made_again() {
    for kind in ["flip", "cut", "remove"] {
        let two = Two::new();
        good(&two.run("one", &["--trust-remote"]));
        let mut hit = 0;
        for path in walk(&two.remote.join("objects")) {
            let bytes = fs::read(&path).unwrap();
            if bytes.starts_with(b"1\n2\n3\n") {
                hit += 1;
                let _ = fs::remove_file(&path);
                match kind {
                    "flip" => fs::write(&path, [&bytes[..9], b"!", &bytes[10..]].concat()).unwrap(),
                    "cut" => fs::write(&path, &bytes[..100]).unwrap(),
                    _ => {}
                }
            }
        }
        assert_eq!(hit, 1);
        fs::remove_file(two.project.path().join("o.txt")).unwrap();
        let second = two.run("two", &["--trust-remote", "--set", "word=two"]);
        good(&second);
        assert_eq!(two.project.read("o.txt"), OUT.replace("one", "two"), "{kind}");
        assert!(two.ran().starts_with("abca"), "{kind}: {}", two.ran());
        // It was sent again, so a third has all of it.
        let ran = two.ran();
        fs::remove_file(two.project.path().join("o.txt")).unwrap();
        good(&two.run("three", &["--trust-remote", "--set", "word=three"]));
        assert_eq!(two.ran(), ran + "c", "{kind}");
    }
}

fn walk(path: &std::path::Path) -> Vec<PathBuf> {
    match path.is_dir() {
        false => vec![path.to_path_buf()],
        true => fs::read_dir(path).unwrap().flat_map(|i| walk(&i.unwrap().path())).collect(),
    }
}

#[test]
fn a_remote_that_is_not_there_costs_nothing_but_a_note() {
    let project = Project::new();
    project.write("p.yaml", &yaml(&project));
    // Nobody listens there.
    let args = ["run", "p.yaml", "--remote", "s3://bucket/x", "--trust-remote"];
    let run = |more: &[&str]| {
        let mut command = project.command(&[&args[..], more].concat());
        command.env("AWS_ENDPOINT_URL", "http://127.0.0.1:9").env("AWS_ALLOW_HTTP", "true");
        command
            .env("AWS_ACCESS_KEY_ID", "planted-id")
            .env("AWS_SECRET_ACCESS_KEY", "planted-secret");
        command.env("AWS_REGION", "us-east-1");
        let output = command.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(text).unwrap())
    };
    let (code, text) = run(&["--remote-required"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("--remote-required"), "{text}");
    let (code, text) = run(&[]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("without an answer") && text.contains("3 failed"), "{text}");
    assert_eq!(project.read("o.txt"), OUT);
    for path in walk(project.cache()) {
        let bytes = fs::read(&path).unwrap_or_default();
        let planted = bytes.windows(14).any(|w| w == b"planted-secret");
        assert!(!planted, "{}", path.display());
    }
    assert!(!text.contains("planted"), "{text}");
}

#[test]
fn two_machines_at_once_do_each_step_once() {
    let two = Two::new();
    let start = |of: &str| {
        let mut command = two.project.command(&["run", "p.yaml", "--trust-remote"]);
        command.env("PIPE_CACHE", two.project.path().join("..").join(of));
        command.env("PIPE_REMOTE", &two.remote);
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        command.spawn().unwrap()
    };
    let both = [start("one"), start("two")];
    for child in both {
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        // Whoever is second to deliver finds the same bytes there.
        assert_eq!(output.status.code(), Some(0), "{text}");
    }
    assert_eq!(two.project.read("o.txt"), OUT);
    let mut ran: Vec<char> = two.ran().chars().collect();
    ran.sort_unstable();
    assert_eq!(String::from_iter(ran), "abc");
}

#[test]
fn push_and_pull_by_hand() {
    let two = Two::new();
    good(&two.run("one", &["--no-remote"]));
    let pushed = two.pipe("one", &["push"]);
    assert_eq!(pushed.code, Some(0), "{}", pushed.stderr);
    assert!(pushed.stdout.starts_with("3 pushed"), "{}", pushed.stdout);
    let pulled = two.pipe("two", &["pull", "b", "-f", "p.yaml", "--trust-remote"]);
    assert_eq!(pulled.code, Some(0), "{}", pulled.stderr);
    assert!(pulled.stdout.starts_with("2 pulled"), "{}", pulled.stdout);
    let ran = two.run("two", &["--no-remote"]);
    assert_eq!((ran.code, ran.counts().as_str()), (Some(0), "2 cached, 1 ran"));
}

#[test]
fn outputs_that_were_evicted_are_made_again() {
    let two = Two::new();
    good(&two.run("one", &["--no-remote"]));
    let cache = two.project.path().join("../one");
    for path in walk(&cache.join("objects")) {
        if fs::read(&path).unwrap() == OUT.as_bytes() {
            fs::remove_file(path).unwrap();
        }
    }
    // What was delivered is still there: nothing has to be done.
    assert_eq!(two.run("one", &["--no-remote"]).counts(), "3 cached, 0 ran");
    fs::remove_file(two.project.path().join("o.txt")).unwrap();
    assert_eq!(two.run("one", &["--no-remote"]).counts(), "2 cached, 1 ran");
    assert_eq!(two.project.read("o.txt"), OUT);
}

#[test]
fn a_forced_step_runs_though_the_remote_has_its_result() {
    let two = Two::new();
    good(&two.run("one", &["--trust-remote"]));
    // Here and in the remote; in the remote only.
    for (of, ran) in [("one", "abca"), ("two", "abcaa")] {
        good(&two.run(of, &["--trust-remote", "--force", "a"]));
        assert!(two.ran().starts_with(ran), "{of}: {}", two.ran());
    }
}
