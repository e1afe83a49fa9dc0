//! One measurement a call, for `benches/store`, which does the same with plain tools beside it.
//!
//! ```text
//! store put FILE CACHE       copies FILE as a program's output and keeps it: seconds
//! store open CACHE           the kept file, looked up, checked and mapped: milliseconds
//! store tensors BYTES CACHE  a file of tensors, kept in parts and read: seconds of both
//! store small COUNT CACHE    results of a few bytes: results a second
//! store hash PATH [CACHE]    for `benches/hashing`: reads PATH, or asks CACHE of it as a run does
//! ```

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use cache::{Attempt, Cache, Entry, Key, Output, Pieces, Publication};
use memmap2::Mmap;

const WHOLE: &str = "whole";
const TENSORS: &str = "tensors";

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let line = match words[..] {
        ["put", file, cache] => put(Path::new(file), &open(cache)),
        ["open", cache] => look(Path::new(cache)),
        ["tensors", bytes, cache] => tensors(bytes.parse().unwrap(), &open(cache)),
        ["small", count, cache] => small(count.parse().unwrap(), &open(cache)),
        ["hash", path] => cache::hash_path(path).unwrap().0.to_string(),
        ["hash", path, cache] => open(cache).digest_of(path).unwrap().0.to_string(),
        // `cargo test --benches` comes here.
        _ => "see the file's first lines; `benches/store` runs it".into(),
    };
    let _ = writeln!(std::io::stdout(), "{line}");
}

fn open(root: &str) -> Cache {
    Cache::open(root).unwrap()
}

fn preimage(name: &str) -> String {
    format!("{{\"name\":\"{name}\"}}")
}

fn key(name: &str) -> Key {
    Key::of(preimage(name).as_bytes())
}

fn publication(name: &str, outputs: Vec<Output>, attempt: Attempt) -> Publication {
    let provenance = serde_json::json!({ "stage": "bench", "step": name, "seconds": 1.0 });
    let entry = Entry::new(preimage(name), outputs, None, provenance);
    Publication { key: entry.key, entry, claim: None, attempt: Some(attempt), replace: false }
}

fn keep(cache: &Cache, name: &str, attempt: Attempt, path: &Path) {
    let output = attempt.absorb("o", None, "o", path).unwrap();
    let committer = cache.committer(|_| {});
    committer.publish(publication(name, vec![output], attempt)).unwrap();
    committer.flush().unwrap();
}

fn put(file: &Path, cache: &Cache) -> String {
    let started = Instant::now();
    let attempt = cache.attempt(&key(WHOLE)).unwrap();
    let path = attempt.dir.join("o");
    fs::copy(file, &path).unwrap();
    let copied = started.elapsed();
    let output = attempt.absorb("o", None, "o", &path).unwrap();
    let absorbed = started.elapsed();
    let committer = cache.committer(|_| {});
    committer.publish(publication(WHOLE, vec![output.clone()], attempt)).unwrap();
    committer.flush().unwrap();
    let all = started.elapsed();
    // As a leader does when a step of its own is done.
    cache.trust(&output);
    let [copy, hash, sync] = [copied, absorbed - copied, all - absorbed].map(|t| t.as_secs_f64());
    format!("{:.3} (copy {copy:.3}, hash {hash:.3}, sync {sync:.3})", all.as_secs_f64())
}

fn look(root: &Path) -> String {
    let started = Instant::now();
    let cache = Cache::open(root).unwrap();
    let entry = cache.lookup(&key(WHOLE)).unwrap().expect("it was put before");
    let output = &entry.outputs[0];
    cache.check(output).unwrap();
    let map = map(&cache.path(&output.digest));
    black_box((map[0], map[map.len() - 1]));
    let took = started.elapsed();
    assert_eq!(map.len() as u64, output.bytes);
    format!("{:.3}", took.as_secs_f64() * 1e3)
}

fn map(path: &Path) -> Mmap {
    // SAFETY: objects are read-only and nobody else is at work in this cache.
    unsafe { Mmap::map(&File::open(path).unwrap()) }.unwrap()
}

/// Tensors of 8 MB and some smaller ones, as of a transformer.
fn write_tensors(path: &Path, bytes: u64) {
    let sizes: Vec<u64> =
        (0..bytes / 9_000_000).flat_map(|_| [8_000_000, 500_000, 499_000, 1_000]).collect();
    let (mut header, mut at) = (String::from("{"), 0);
    for (i, size) in sizes.iter().enumerate() {
        let comma = if i > 0 { "," } else { "" };
        let end = at + size;
        header += &format!(
            "{comma}\"t{i}\":{{\"dtype\":\"U8\",\"shape\":[{size}],\"data_offsets\":[{at},{end}]}}"
        );
        at = end;
    }
    header.push('}');
    let mut out = BufWriter::new(File::create(path).unwrap());
    out.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    out.write_all(header.as_bytes()).unwrap();
    // What cannot be compressed and is nowhere twice.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut block = Vec::with_capacity(1 << 20);
    let mut left = at;
    while left > 0 {
        block.clear();
        for _ in 0..(1 << 17) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block.extend_from_slice(&state.to_le_bytes());
        }
        let n = left.min(1 << 20) as usize;
        out.write_all(&block[..n]).unwrap();
        left -= n as u64;
    }
    out.flush().unwrap();
}

fn tensors(bytes: u64, cache: &Cache) -> String {
    let attempt = cache.attempt(&key(TENSORS)).unwrap();
    let path = attempt.dir.join("m");
    write_tensors(&path, bytes);
    let started = Instant::now();
    keep(cache, TENSORS, attempt, &path);
    let kept = started.elapsed().as_secs_f64();
    let entry = cache.lookup(&key(TENSORS)).unwrap().unwrap();
    let output = &entry.outputs[0];
    cache.trust(output);
    let started = Instant::now();
    cache.check(output).unwrap();
    let pieces = Pieces::open(&cache.path(&output.digest)).unwrap().expect("kept in parts");
    let maps: Vec<Mmap> = pieces.parts.iter().map(|(path, _)| map(path)).collect();
    let opened = started.elapsed().as_secs_f64() * 1e3;
    let words = maps.iter().flat_map(|map| map.chunks_exact(8));
    let sum =
        words.fold(0u64, |sum, w| sum.wrapping_add(u64::from_le_bytes(w.try_into().unwrap())));
    black_box(sum);
    let read = started.elapsed().as_secs_f64();
    format!("{kept:.3} {opened:.3} {read:.3} ({} parts)", maps.len())
}

fn small(count: usize, cache: &Cache) -> String {
    let made = |i: usize| -> (Attempt, PathBuf) {
        let attempt = cache.attempt(&key(&i.to_string())).unwrap();
        let path = attempt.dir.join("o");
        fs::write(&path, format!("the result of step {i}")).unwrap();
        (attempt, path)
    };
    let started = Instant::now();
    let committer = cache.committer(|_| {});
    for i in 0..count {
        let (attempt, path) = made(i);
        let output = attempt.absorb("o", None, "o", &path).unwrap();
        committer.publish(publication(&i.to_string(), vec![output], attempt)).unwrap();
    }
    committer.flush().unwrap();
    let seconds = started.elapsed().as_secs_f64();
    assert!(cache.lookup(&key(&(count - 1).to_string())).unwrap().is_some());
    format!("{seconds:.3} {:.0}", count as f64 / seconds)
}
