//! Fetching from a hub of ours on this machine: what comes, what is asked, what goes wrong.

mod fetch;
mod server;
mod trouble;

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use engine::hub::{self, Reference, Settings, Snapshot, Work};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use server::{Blob, Hub};

pub const OLD: &str = "00000000000000000000000000000000000000aa";
pub const NEW: &str = "00000000000000000000000000000000000000bb";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A file that the hub keeps itself, under git's name.
pub fn small(text: &str) -> Blob {
    let etag =
        Sha1::new_with_prefix(format!("blob {}\0", text.len())).chain_update(text).finalize();
    Blob { bytes: text.into(), etag: hex(&etag), elsewhere: false }
}

/// A file that the hub keeps with somebody else, under its sha256.
pub fn big(bytes: &[u8]) -> Blob {
    Blob { bytes: bytes.to_vec(), etag: hex(&Sha256::digest(bytes)), elsewhere: true }
}

/// Bytes that differ from place to place.
pub fn noise(len: usize) -> Vec<u8> {
    (0..len as u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).take(len).collect()
}

/// `o/n` with a small model on `main`.
pub fn model() -> Hub {
    let hub = Hub::new("o/n");
    hub.commit(
        "main",
        OLD,
        vec![
            ("README.md", small("no")),
            ("config.json", small("{}")),
            ("tokenizer.json", small("{\"t\": 1}")),
            ("model.safetensors", big(&noise(300_000))),
            ("onnx/model.onnx", big(b"no")),
        ],
    );
    hub
}

/// Quick to give up.
pub fn settings(hub: &Hub, cache: &Path) -> Settings {
    Settings {
        tries: 3,
        pause: Duration::from_millis(5),
        patience: Duration::from_secs(5),
        ..Settings::new(hub.url(), cache)
    }
}

/// Fetches; gives the notes too.
pub fn fetch_with(settings: &Settings, text: &str) -> (Result<Snapshot, String>, Vec<String>) {
    let notes = Mutex::new(Vec::new());
    let say = |text| notes.lock().unwrap().push(text);
    let work = Work { cancel: &AtomicBool::new(false), say: &say };
    let reference = Reference::parse(text).unwrap();
    let found = hub::fetch(settings, &reference, &work).map_err(|e| e.to_string());
    (found, notes.into_inner().unwrap())
}

pub fn fetch(settings: &Settings, text: &str) -> Result<Snapshot, String> {
    fetch_with(settings, text).0
}

/// Names and bytes of what came.
pub fn contents(snapshot: &Snapshot) -> Vec<(String, Vec<u8>)> {
    let read =
        |(name, path): &(String, std::path::PathBuf)| (name.clone(), std::fs::read(path).unwrap());
    snapshot.files.iter().map(read).collect()
}

/// Every file below `dir` by its path from there; links by where they lead.
pub fn tree(dir: &Path) -> Vec<String> {
    fn walk(dir: &Path, base: &Path, found: &mut Vec<String>) {
        for item in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = item.path();
            let name = path.strip_prefix(base).unwrap().display().to_string();
            match std::fs::read_link(&path) {
                Ok(to) => found.push(format!("{name} -> {}", to.display())),
                Err(_) if path.is_dir() => walk(&path, base, found),
                Err(_) => found.push(name),
            }
        }
    }
    let mut found = Vec::new();
    walk(dir, dir, &mut found);
    found.sort();
    found
}
