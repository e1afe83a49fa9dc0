//! How fast the `tokenize` stage is beside the tokenizers crate in a bare loop over the same texts, and
//! what memory it takes: `PIPE_TEST_DATA=... PIPE_TEST_TEACHER=X.gguf cargo bench -p stages --bench
//! tokenize`.
#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use engine::stage::{Context, Stage};
use stages::data::document::Document;
use stages::tokenize::{Params, Tokenize};
use tokenizers::Tokenizer;

const ROUNDS: usize = 3;

/// Seconds that this process has computed so far; 100 ticks a second.
fn computed() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
    fields.skip(11).take(2).map(|ticks| ticks.parse::<f64>().unwrap()).sum::<f64>() / 100.0
}

/// Core seconds and seconds that `run` takes. Others on the machine change the latter more.
fn timed(run: impl FnOnce()) -> [f64; 2] {
    let (start, before) = (Instant::now(), computed());
    run();
    [computed() - before, start.elapsed().as_secs_f64()]
}

/// Core seconds and seconds of a run of the stage, with all it reads and writes.
fn stage(texts: &[&Path], tokenizer: &Path, threads: usize) -> [f64; 2] {
    let out = tempfile::tempdir().unwrap();
    let mut ctx =
        Context::local::<Tokenize>(out.path(), &[("text", texts), ("tokenizer", &[tokenizer])]);
    ctx.set_threads(threads);
    let params = Params { seq: 1024, ..Params::default() };
    timed(|| Tokenize::run(&params, &mut ctx).unwrap())
}

/// Of the crate's own loop, one for each thread over its share of the texts, which are parsed before.
fn bare(texts: &[String], tokenizer: &Tokenizer, threads: usize) -> [f64; 2] {
    let ids = |text: &String| tokenizer.encode_fast(text.as_str(), false).unwrap().len();
    let share = &|thread: usize| texts.iter().skip(thread).step_by(threads).map(ids).sum::<usize>();
    timed(|| {
        std::thread::scope(|scope| {
            let run = |thread| scope.spawn(move || assert!(share(thread) > 0));
            (0..threads).for_each(|thread| drop(run(thread)));
        });
    })
}

/// A run in a thread of its own, so that no cache is left from the run before.
fn fresh(run: impl FnOnce() -> [f64; 2] + Send) -> [f64; 2] {
    std::thread::scope(|scope| scope.spawn(run).join().unwrap())
}

fn median(seconds: &[[f64; 2]], which: usize) -> f64 {
    let mut seconds: Vec<f64> = seconds.iter().map(|both| both[which]).collect();
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// This process's memory that is no file, in MiB.
fn anonymous() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// The most that [`anonymous`] says while `run` runs.
fn peak(run: impl FnOnce()) -> u64 {
    let (done, most) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                most.fetch_max(anonymous(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        run();
        done.store(true, Ordering::Relaxed);
    });
    most.into_inner()
}

fn main() {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let (Some(data), Some(teacher)) = (variable("PIPE_TEST_DATA"), variable("PIPE_TEST_TEACHER"))
    else {
        return println!("skipped: PIPE_TEST_DATA and PIPE_TEST_TEACHER are not both set");
    };
    let scratch = tempfile::tempdir().unwrap();
    let json = scratch.path().join("tokenizer.json");
    let tokenizer = stages::foreign::open(&teacher, None).unwrap().tokenizer.unwrap();
    tokenizer.save(&json, false).unwrap();
    let files = ["books", "digitalgov", "handbook18f", "openstax"];
    let files = files.map(|name| data.join(format!("text/{name}.jsonl")));
    let paths: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let texts: Vec<String> = paths
        .iter()
        .flat_map(|path| {
            std::fs::read_to_string(path).unwrap().lines().map(text).collect::<Vec<_>>()
        })
        .collect();
    let megabytes = texts.iter().map(String::len).sum::<usize>() as f64 / 1e6;
    let cores = std::thread::available_parallelism().unwrap().get();
    println!("{megabytes:.1} MB of text, median of {ROUNDS}:");
    for threads in [1, cores] {
        let (mut bares, mut stages) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            bares.push(bare(&texts, &tokenizer, threads));
            stages.push(fresh(|| stage(&paths, &json, threads)));
        }
        let ratio = median(&bares, 0) / median(&stages, 0);
        for (name, runs) in [("bare loops", bares), ("stage", stages)] {
            let (core, wall) = (megabytes / median(&runs, 0), megabytes / median(&runs, 1));
            println!(
                "{threads} threads, {name}: {core:.2} MB a core second, {wall:.2} MB a second"
            );
        }
        println!("{threads} threads, stage to bare loops, a core: {ratio:.2}");
    }
    let many: Vec<&Path> = paths.iter().cycle().take(10 * paths.len()).copied().collect();
    for (times, texts) in [(1, &paths), (10, &many)] {
        let before = anonymous();
        let most = peak(|| {
            stage(texts, &json, cores);
        });
        println!(
            "{times:2} times the text: {most} MiB beside files at most, {before} of them before"
        );
    }
}

fn text(line: &str) -> String {
    serde_json::from_str::<Document>(line).unwrap().text
}
