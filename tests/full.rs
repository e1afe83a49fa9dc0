//! Disks that fill up at random moments: a clear error that names the disk, earlier results whole,
//! and on it goes when there is room. Small disks of memory, in a mount namespace of their own.

#![allow(clippy::print_stdout)] // what is skipped, and with which seed, is said

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cache::{Cache, Scrubbed};

use crate::support::{Project, Ran};

/// Runs this test again in a namespace in which it may mount; whether this process is that one.
fn in_namespace(test: &str) -> bool {
    if std::env::var_os("PIPE_TEST_MOUNTS").is_some() {
        return true;
    }
    let ways: [&[&str]; 2] = [&["-m"], &["-Urm"]];
    let may = |way: &&&[&str]| {
        let probe =
            "d=$(mktemp -d) && mount -t tmpfs none $d && umount $d; s=$?; rmdir $d; exit $s";
        let output = Command::new("unshare").args(**way).args(["sh", "-c", probe]).output();
        output.is_ok_and(|output| output.status.success())
    };
    let Some(way) = ways.iter().find(may) else {
        println!("skipped: no file system can be mounted here");
        return false;
    };
    let output = Command::new("unshare")
        .args(*way)
        .arg(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env("PIPE_TEST_MOUNTS", "1")
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let told = told + &String::from_utf8_lossy(&output.stderr);
    print!("{told}");
    assert!(output.status.success() && told.contains("1 passed"), "{told}");
    false
}

/// Mounts a disk of memory; it goes with the namespace.
fn mount(at: &Path, options: &str) {
    fs::create_dir_all(at).unwrap();
    let status =
        Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(at).status();
    assert!(status.unwrap().success());
}

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
}

fn trials() -> u64 {
    let soak: u64 = std::env::var("PIPE_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    5 * soak
}

/// Writes a file of tensors with parts of its own and parts that all have.
const WRITER: &str = r#"
import json, struct, sys
own, to = int(sys.argv[1]), sys.argv[2]
n = 40000
header = {}
for i, name in enumerate(["a", "b", "c"]):
    header[name] = {"dtype": "U8", "shape": [n], "data_offsets": [i * n, (i + 1) * n]}
text = json.dumps(header).encode()
with open(to, "wb") as f:
    f.write(struct.pack("<Q", len(text)) + text)
    for fill in [own, 200, own ^ 85]:
        f.write(bytes((fill + i * 7) % 256 for i in range(n)))
"#;

/// Ten steps: files, directories and tensors in turn, each also reading the one before.
fn pipeline(project: &Project) {
    project.write("w.py", WRITER);
    let writer = project.path().join("w.py").display().to_string();
    let mut text = String::from("steps:\n");
    for i in 0..10 {
        let input = if i > 0 { format!("    in: {{ i: s{}.o }}\n", i - 1) } else { String::new() };
        let script = match i % 3 {
            0 => format!("head -c 60000 /dev/zero | tr \"\\\\0\" {i} > ${{out.o}}"),
            1 => {
                format!("mkdir ${{out.o}} && for n in 1 2 3; do seq {i} 2000 > ${{out.o}}/$n; done")
            }
            _ => format!("python3 {writer} {i} ${{out.o}}"),
        };
        text += &format!(
            "  s{i}:\n    stage: command\n{input}    run: [sh, -ec, '{script}']\n    out: [o]\n"
        );
    }
    text += "outputs: { o: { from: s9.o, to: o.txt } }\n";
    project.write("p.yaml", &text);
}

fn verify(project: &Project) -> Scrubbed {
    Cache::open(project.cache()).unwrap().scrub(false, &|_, _| {}).unwrap()
}

/// Fills the disk at `at`, but for `but` bytes.
fn fill(at: &Path, but: u64) -> PathBuf {
    let path = at.join("filler");
    let mut file = fs::File::create(&path).unwrap();
    let block = [7; 4096];
    while file.write_all(&block).is_ok() {}
    let size = file.metadata().unwrap().len();
    file.set_len(size.saturating_sub(but)).unwrap();
    path
}

fn tells_of_the_disk(ran: &Ran, disk: &Path) {
    let told = format!("{}{}", ran.stdout, ran.stderr);
    let name = format!("the disk at `{}`", disk.display());
    assert!(told.contains(&name), "{name} is not named in {told}");
    assert!(told.contains("make room there"), "{told}");
    assert!(!told.contains("panicked"), "{told}");
}

fn python() -> bool {
    Command::new("python3").arg("--version").output().is_ok_and(|o| o.status.success())
}

#[test]
fn a_disk_that_fills_at_any_moment() {
    if !python() {
        println!("skipped: no python3");
        return;
    }
    if !in_namespace("full::a_disk_that_fills_at_any_moment") {
        return;
    }
    let mut random = Random::new();
    let plain = Project::new();
    pipeline(&plain);
    plain.run(&[]);
    let right = plain.digests(&[]);
    let mut failed = 0;
    for trial in 0..trials() {
        let project = Project::new();
        mount(project.cache(), "size=24m");
        pipeline(&project);
        let run = project.start(&["run", "p.yaml", "-j", "2"]);
        // What fills the disk lies in the cache, which has to be one by then.
        let version = project.cache().join("version");
        project.wait_until("the cache is there", || version.exists());
        std::thread::sleep(Duration::from_millis(random.below(700)));
        let filler = fill(project.cache(), random.below(3) * 100_000);
        let output = run.wait_with_output().unwrap();
        let ran = Ran {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        };
        if ran.code != Some(0) {
            failed += 1;
            tells_of_the_disk(&ran, project.cache());
        }
        // Still full: what there is can be looked at, and is whole.
        assert_eq!(verify(&project).damage, [], "trial {trial}");
        assert_eq!(project.pipe(&["plan", "p.yaml"]).code, Some(0), "trial {trial}");
        let again = project.pipe(&["run", "p.yaml"]);
        if again.code != Some(0) {
            tells_of_the_disk(&again, project.cache());
        }
        fs::remove_file(filler).unwrap();
        project.run(&[]);
        assert_eq!(project.digests(&[]), right, "trial {trial}");
        assert_eq!(project.read("o.txt"), plain.read("o.txt"));
        assert_eq!(verify(&project).damage, [], "trial {trial}");
        assert_eq!(fs::read_dir(project.cache().join("attempts")).unwrap().count(), 0);
    }
    println!("{failed} of {} runs met a full disk", trials());
}

#[test]
fn a_disk_without_inodes() {
    if !python() || !in_namespace("full::a_disk_without_inodes") {
        return;
    }
    let mut random = Random::new();
    for trial in 0..trials().min(50) {
        let project = Project::new();
        let inodes = 60 + random.below(120);
        mount(project.cache(), &format!("size=24m,nr_inodes={inodes}"));
        pipeline(&project);
        let ran = project.pipe(&["run", "p.yaml", "-j", "2"]);
        if ran.code != Some(0) {
            tells_of_the_disk(&ran, project.cache());
            assert!((ran.stdout + &ran.stderr).contains("inodes are used"), "{inodes}");
        }
        assert_eq!(verify(&project).damage, [], "trial {trial}, {inodes} inodes");
        let more = ["-o", "remount,nr_inodes=4000"];
        let status = Command::new("mount").args(more).arg(project.cache()).status();
        assert!(status.unwrap().success());
        project.run(&[]);
        assert_eq!(verify(&project).damage, [], "trial {trial}, {inodes} inodes");
    }
}

/// Where results go there is room, and where they are delivered to there is none.
#[test]
fn an_output_that_cannot_be_delivered() {
    if !python() || !in_namespace("full::an_output_that_cannot_be_delivered") {
        return;
    }
    let project = Project::new();
    let there = project.path().join("there");
    mount(&there, "size=1m");
    pipeline(&project);
    project.write("p.yaml", &project.read("p.yaml").replace("to: o.txt", "to: there/o.txt"));
    let yaml = project.read("p.yaml");
    project.run(&[]);
    let first = project.read("there/o.txt");
    assert!(!first.is_empty());
    // Something else is to be delivered to a full disk.
    project.write("p.yaml", &yaml.replace("tr \"\\\\0\" 9", "tr \"\\\\0\" x"));
    assert_ne!(project.read("p.yaml"), yaml);
    let filler = fill(&there, 4096);
    let ran = project.pipe(&["run", "p.yaml"]);
    assert_eq!(ran.code, Some(1), "{}", ran.stdout);
    tells_of_the_disk(&ran, &there);
    assert_eq!(project.read("there/o.txt"), first, "what was delivered is whole");
    assert_eq!(fs::read_dir(&there).unwrap().count(), 2, "and nothing else is there");
    fs::remove_file(filler).unwrap();
    project.run(&[]);
    assert_eq!(project.read("there/o.txt"), first.replace('9', "x"));
}

#[test]
fn a_record_that_cannot_be_written_costs_the_record() {
    if !python() || !in_namespace("full::a_record_that_cannot_be_written_costs_the_record") {
        return;
    }
    let project = Project::new();
    pipeline(&project);
    drop(Cache::open(project.cache()).unwrap());
    let runs = project.cache().join("runs");
    mount(&runs, "size=64k");
    // From the middle on.
    let talker = "for i in $(seq 400); do echo $i; done > ${out.o}";
    let yaml = project.read("p.yaml");
    let many: String = (0..40)
        .map(|i| {
            format!("  m{i}: {{ stage: command, run: [sh, -c, '{talker} # {i}'], out: [o] }}\n")
        })
        .collect();
    project.write("p.yaml", &yaml.replace("outputs:", &format!("{many}outputs:")));
    let ran = project.pipe(&["run", "p.yaml"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let told = ran.stdout.clone() + &ran.stderr;
    assert!(told.contains("the record of this run is incomplete"), "{told}");
    assert_eq!(verify(&project).damage, []);
    // From the beginning: nothing can be begun.
    let filler = fill(&runs, 0);
    let ran = project.pipe(&["run", "p.yaml"]);
    assert_eq!(ran.code, Some(1), "{}", ran.stdout);
    tells_of_the_disk(&ran, &runs);
    fs::remove_file(filler).unwrap();
    for item in fs::read_dir(&runs).unwrap() {
        fs::remove_dir_all(item.unwrap().path()).unwrap();
    }
    assert_eq!(project.run(&[]), "50 cached, 0 ran");
}

#[test]
fn an_index_that_cannot_grow_costs_time_only() {
    if !python() || !in_namespace("full::an_index_that_cannot_grow_costs_time_only") {
        return;
    }
    for size in ["4k", "64k", "256k"] {
        let project = Project::new();
        pipeline(&project);
        drop(Cache::open(project.cache()).unwrap());
        let index = project.cache().join("index");
        fs::remove_dir_all(&index).unwrap();
        mount(&index, &format!("size={size}"));
        fill(&index, 0);
        assert_eq!(project.run(&[]), "0 cached, 10 ran", "{size}");
        assert_eq!(project.run(&[]), "10 cached, 0 ran", "{size}");
        assert_eq!(project.pipe(&["plan", "p.yaml"]).code, Some(0));
        assert_eq!(verify(&project).damage, []);
    }
}
