//! What a command costs that is run as `pipe` runs one, bit by bit and without `pipe`: each row does
//! what the one above does and one thing more. What a run takes beyond the last row is the engine:
//! keys, claims, events, the index.
//!
//! `cargo bench --bench sandbox -- [DIRECTORY] [STEPS]`: two threads, directories made anew by each step
//! (the engine uses those of earlier ones again), medians of three rounds. Best on a file system on
//! which nothing was removed lately: ext4 looks at every inode removed in the last minutes before it
//! makes a file.

#![expect(clippy::print_stdout, reason = "a table is what it is for")]

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use cache::Digest;

const THREADS: usize = 2;
const ROUNDS: usize = 3;
/// As the store's groups.
const GROUP: Duration = Duration::from_millis(50);

/// What is done, each with what is before it.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd)]
enum Doing {
    Started,
    Private,
    Logged,
    Stored,
    Recorded,
}

const ALL: [(Doing, &str); 5] = [
    (Doing::Started, "`sh -c 'cat FILE > OUT'` is started and waited for"),
    (Doing::Private, "in a directory of its own, with a link to its input, removed at the end"),
    (Doing::Logged, "with a log of what it prints"),
    (Doing::Stored, "its output is hashed, made read-only and named by its digest"),
    (Doing::Recorded, "a record of it is written, synced in groups of 50 ms"),
];

fn main() -> std::io::Result<()> {
    let given: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let place = given.first().map_or_else(std::env::temp_dir, PathBuf::from);
    let steps: usize = given.get(1).and_then(|n| n.parse().ok()).unwrap_or(2000);
    let root = place.join(format!("sandbox-{}", std::process::id()));
    fs::create_dir_all(root.join("inputs"))?;
    for i in 0..steps {
        fs::write(root.join("inputs").join(i.to_string()), format!("input {i}\n"))?;
    }
    println!("| {THREADS} threads, {steps} steps | ms a step | more |\n|---|---|---|");
    let mut before = None;
    // One after the other in every round, so that all meet the same load.
    let mut taken = vec![Vec::new(); ALL.len()];
    for round in 0..ROUNDS {
        for (at, (doing, _)) in ALL.into_iter().enumerate() {
            taken[at].push(all(&root, &root.join(format!("{round}-{at}")), doing, steps)?);
        }
    }
    for (times, (_, what)) in taken.iter_mut().zip(ALL) {
        times.sort_by(f64::total_cmp);
        let ms = times[times.len() / 2] / steps as f64 * 1e3;
        let more = before.map_or(String::new(), |before: f64| format!("{:+.2}", ms - before));
        println!("| {what} | {ms:.2} | {more} |");
        before = Some(ms);
    }
    fs::remove_dir_all(root)
}

/// Seconds that all steps take.
fn all(root: &Path, dir: &Path, doing: Doing, steps: usize) -> std::io::Result<f64> {
    for name in ["o", "attempts", "store", "records", "staging"] {
        fs::create_dir_all(dir.join(name))?;
    }
    let (next, ended) = (AtomicUsize::new(0), AtomicBool::new(false));
    let started = Instant::now();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|_| {
                scope.spawn(|| -> std::io::Result<()> {
                    loop {
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        if i >= steps {
                            return Ok(());
                        }
                        step(root, dir, doing, i)?;
                    }
                })
            })
            .collect();
        let syncing = scope.spawn(|| -> std::io::Result<()> {
            let disk = File::open(dir)?;
            while doing == Doing::Recorded && !ended.load(Ordering::Relaxed) {
                std::thread::sleep(GROUP);
                rustix::fs::syncfs(&disk)?;
            }
            Ok(())
        });
        let results: Vec<_> = workers.into_iter().map(|w| w.join().expect("no panic")).collect();
        ended.store(true, Ordering::Relaxed);
        syncing.join().expect("no panic")?;
        results.into_iter().collect::<std::io::Result<()>>()
    })?;
    Ok(started.elapsed().as_secs_f64())
}

fn step(root: &Path, dir: &Path, doing: Doing, i: usize) -> std::io::Result<()> {
    let input = root.join("inputs").join(i.to_string());
    let mut command = Command::new("sh");
    command.stdin(Stdio::null());
    if doing == Doing::Started {
        let text =
            format!("cat {} > {}", input.display(), dir.join("o").join(i.to_string()).display());
        return ran(command.arg("-c").arg(text));
    }
    let own = dir.join("attempts").join(i.to_string());
    for name in
        ["", "work", "work/in", "work/in/src", "work/out", "work/scratch", "work/checkpoint"]
    {
        fs::create_dir(own.join(name))?;
    }
    let work = own.join("work");
    symlink(&input, work.join("in/src/input"))?;
    if doing >= Doing::Logged {
        let log = File::create(own.join("log"))?;
        command.stdout(log.try_clone()?).stderr(log);
    }
    let program = std::env::var_os("PATH");
    command.env_clear().envs(program.map(|path| ("PATH", path))).current_dir(&work);
    ran(command.args(["-c", "cat in/src/input > out/out.txt"]))?;
    let output = work.join("out/out.txt");
    if doing >= Doing::Stored {
        fs::set_permissions(&output, fs::Permissions::from_mode(0o444))?;
        let digest = Digest::of(&fs::read(&output)?).to_string();
        let shard = dir.join("store").join(&digest[..2]);
        fs::create_dir_all(&shard)?;
        fs::rename(&output, shard.join(&digest))?;
        if doing == Doing::Recorded {
            record(dir, i, &digest)?;
        }
    }
    fs::remove_dir_all(own)
}

/// A text as long as an entry of the store, whole or not at all.
fn record(dir: &Path, i: usize, digest: &str) -> std::io::Result<()> {
    let staged = dir.join("staging").join(i.to_string());
    fs::write(&staged, format!("{digest} {}\n", "x".repeat(900)))?;
    let shard = dir.join("records").join(&digest[..2]);
    fs::create_dir_all(&shard)?;
    fs::hard_link(&staged, shard.join(digest))?;
    fs::remove_file(staged)
}

fn ran(command: &mut Command) -> std::io::Result<()> {
    match command.status()?.success() {
        true => Ok(()),
        false => Err(std::io::Error::other("the command failed")),
    }
}
