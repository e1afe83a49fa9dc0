//! A cache in a temporary directory, results to put into it, and this test binary as a child.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use cache::{Attempt, Cache, Entry, Finished, Key, Output, Publication, Published};
use serde_json::json;
use tempfile::TempDir;

pub struct Home {
    pub dir: TempDir,
    pub cache: Cache,
}

impl Home {
    pub fn new() -> Home {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path().join("c")).unwrap();
        Home { dir, cache }
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("c")
    }

    /// One that needs no disk, where there is memory for files: for tests that end processes and
    /// not machines.
    pub fn in_memory() -> Home {
        let shm = Path::new("/dev/shm");
        let place = if shm.is_dir() { shm.to_path_buf() } else { std::env::temp_dir() };
        let dir = tempfile::tempdir_in(place).unwrap();
        let cache = Cache::open(dir.path().join("c")).unwrap();
        Home { dir, cache }
    }

    /// Another handle, as another process would have.
    pub fn reopened(&self) -> Cache {
        Cache::open(self.root()).unwrap()
    }

    pub fn drop_index(&self) {
        drop_index(&self.root());
    }
}

pub fn drop_index(root: &Path) {
    let _ = fs::remove_dir_all(root.join("index"));
}

pub fn preimage(name: &str) -> String {
    json!({ "format": 1, "name": name }).to_string()
}

pub fn key(name: &str) -> Key {
    Key::of(preimage(name).as_bytes())
}

/// One attempt at `name` that makes the file `model` with `text` and a directory `report` beside.
pub fn make(cache: &Cache, name: &str, text: &str) -> (Attempt, Entry) {
    let attempt = cache.attempt(&key(name)).unwrap();
    let file = attempt.dir.join("weights");
    fs::write(&file, text).unwrap();
    let dir = attempt.dir.join("report");
    fs::create_dir_all(dir.join("deep")).unwrap();
    fs::write(dir.join("deep/a"), format!("a of {text}")).unwrap();
    fs::write(dir.join("b"), "b").unwrap();
    let outputs = vec![
        attempt.absorb("model", None, "weights.bin", &file).unwrap(),
        attempt.absorb("report", Some(0), "report", &dir).unwrap(),
    ];
    let provenance = json!({ "stage": "toy", "step": name, "seconds": 1.5 });
    let finished = Finished { outputs: outputs.clone(), log: None, provenance };
    attempt.finish(&finished).unwrap();
    let entry = Entry::new(preimage(name), outputs, None, finished.provenance);
    (attempt, entry)
}

/// Publishes and waits; gives what became of it.
pub fn publish(cache: &Cache, entry: &Entry, replace: bool) -> Published {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = seen.clone();
    let committer = cache.committer(move |done| sink.lock().unwrap().extend(done));
    let (key, entry) = (entry.key, entry.clone());
    let publication = Publication { key, entry, claim: None, attempt: None, replace };
    committer.publish(publication).unwrap();
    committer.flush().unwrap();
    let outcome = seen.lock().unwrap().pop().unwrap();
    assert_eq!(outcome.0, key);
    outcome.1
}

/// Makes and publishes.
pub fn put(cache: &Cache, name: &str, text: &str) -> (Entry, Published) {
    let (_attempt, entry) = make(cache, name, text);
    let outcome = publish(cache, &entry, false);
    (entry, outcome)
}

pub fn output<'a>(entry: &'a Entry, port: &str) -> &'a Output {
    entry.outputs.iter().find(|o| o.port == port).unwrap()
}

pub fn read(cache: &Cache, output: &Output) -> String {
    fs::read_to_string(cache.object(&output.digest)).unwrap()
}

/// Removes an object, as a careless hand would.
pub fn lose(cache: &Cache, digest: &cache::Digest) {
    let path = cache.object(digest);
    for item in walk(&path) {
        if item.is_dir() {
            fs::set_permissions(&item, PermissionsExt::from_mode(0o700)).unwrap();
        }
    }
    if path.is_dir() { fs::remove_dir_all(path).unwrap() } else { fs::remove_file(path).unwrap() }
}

fn walk(path: &Path) -> Vec<PathBuf> {
    let mut all = vec![path.to_path_buf()];
    if path.is_dir() {
        all.extend(fs::read_dir(path).unwrap().flat_map(|item| walk(&item.unwrap().path())));
    }
    all
}

/// A safetensors file of three tensors, the middle one `shared`.
pub fn tensors(own: u8, shared: u8) -> Vec<u8> {
    const N: usize = 5000;
    let mut header = String::from("{\"__metadata__\":{\"kind\":\"toy\"}");
    for (i, name) in ["a", "b", "c"].iter().enumerate() {
        let (from, to) = (i * N * 4, (i + 1) * N * 4);
        header += &format!(
            ",\"{name}\":{{\"dtype\":\"F32\",\"shape\":[{N}],\"data_offsets\":[{from},{to}]}}"
        );
    }
    header.push('}');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    for (i, fill) in [own, shared, own ^ 0x55].iter().enumerate() {
        bytes.extend((0..N * 4).map(|at| fill ^ (at + i) as u8));
    }
    bytes
}

/// Overwrites read-only bytes.
pub fn scribble(path: &Path, bytes: &[u8]) {
    let _ = fs::remove_file(path);
    fs::write(path, bytes).unwrap();
}

/// This test binary, running only `test` of it on `root`.
pub fn child(test: &str, root: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]);
    command.env("CACHE_TEST_ROOT", root).stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(Stdio::null());
    command
}

/// The cache to work on when this process is such a child.
pub fn as_child() -> Option<Cache> {
    let root = std::env::var_os("CACHE_TEST_ROOT")?;
    // A test that is killed leaves no child that goes on for ever.
    let parent = rustix::process::getppid();
    std::thread::spawn(move || {
        while rustix::process::getppid() == parent {
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        std::process::exit(1);
    });
    Some(Cache::open(root).unwrap())
}
