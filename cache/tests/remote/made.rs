//! Results with every kind of artifact, and what must hold of them wherever they are.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use cache::remote::{Fetched, Found, Progress, Remote, Sent, Trouble, artifacts};
use cache::{Cache, Digest, Entry, Finished, Key, Kind, Output};
use serde_json::json;

use crate::support::{key, preimage, publish, tensors};

/// A file of several parts of an upload: 8 MiB each.
pub const LARGE: usize = (20 << 20) + 5;

/// Makes and publishes a result: a small file, a file of tensors, a directory with everything that
/// one may hold, a log, and a large file when asked.
pub fn result(cache: &Cache, name: &str, large: bool) -> Entry {
    let attempt = cache.attempt(&key(name)).unwrap();
    let file = |path: &str, bytes: &[u8]| {
        let path = attempt.dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    };
    let mut outputs = Vec::new();
    let mut absorb = |port: &str, path: &Path| {
        outputs.push(attempt.absorb(port, None, port, path).unwrap());
    };
    absorb("model", &file("model", format!("model of {name}").as_bytes()));
    absorb("empty", &file("empty", b""));
    let own = Digest::of(name.as_bytes()).as_bytes()[0];
    absorb("tensors", &file("tensors", &tensors(own, 9)));
    for (path, text) in [("deep/a", name), ("deep/er/b", "b"), ("same", "b"), ("tool", "#!")] {
        file(&format!("report/{path}"), text.as_bytes());
    }
    file("report/more.safetensors", &tensors(own ^ 1, 9));
    fs::create_dir_all(attempt.dir.join("report/nothing/here")).unwrap();
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(attempt.dir.join("report/tool"), executable).unwrap();
    absorb("report", &attempt.dir.join("report"));
    if large {
        absorb("large", &file("large", &large_bytes(name)));
    }
    let log = attempt.absorb("log", None, "log", file("log", b"a line\n")).unwrap();
    let log = Some((log.digest, log.bytes));
    let provenance = json!({ "stage": "toy", "step": name, "seconds": 1.5 });
    attempt
        .finish(&Finished { outputs: outputs.clone(), log, provenance: provenance.clone() })
        .unwrap();
    let entry = Entry::new(preimage(name), outputs, log, provenance);
    publish(cache, &entry, false);
    entry
}

pub fn large_bytes(name: &str) -> Vec<u8> {
    let start = Digest::of(name.as_bytes()).as_bytes()[1];
    (0..LARGE).map(|i| (i * 31 % 251) as u8 ^ start).collect()
}

pub fn push(remote: &Remote, cache: &Cache, entry: &Entry) -> Result<Sent, Trouble> {
    remote.push(cache, entry, &Progress::new(), &AtomicBool::new(false))
}

pub fn fetch(remote: &Remote, cache: &Cache, entry: &Entry) -> Result<Fetched, Trouble> {
    remote.fetch(cache, &artifacts(entry), &Progress::new(), &AtomicBool::new(false))
}

pub fn hit(found: Found) -> Entry {
    match found {
        Found::Hit(entry) => *entry,
        other => panic!("{other:?}"),
    }
}

/// Finds, fetches and checks all of a result.
pub fn pull(remote: &Remote, cache: &Cache, key: &Key) -> Entry {
    let entry = hit(remote.find(cache, key));
    fetch(remote, cache, &entry).unwrap();
    whole(cache, &entry);
    entry
}

/// Every artifact is here, and its bytes are what it is called.
pub fn whole(cache: &Cache, entry: &Entry) {
    for output in artifacts(entry) {
        assert!(cache.present(&output), "{}", output.port);
        cache.verify(&output).unwrap();
        cache.check(&output).unwrap();
    }
}

/// Whatever of these outputs claims to be here is right.
pub fn nothing_wrong(cache: &Cache, outputs: &[Output]) {
    for output in outputs.iter().filter(|output| cache.present(output)) {
        cache.verify(output).unwrap();
    }
    for (name, path) in files(&cache.root().join("objects")) {
        if path.parent().unwrap().file_name().unwrap().len() == 2 {
            let digest: Digest = name.parse().unwrap();
            assert_eq!(cache::hash_path(&path).unwrap().0, digest, "{}", path.display());
        }
    }
}

/// All objects, with their names: files and directories below the shards.
fn files(dir: &Path) -> BTreeMap<String, std::path::PathBuf> {
    let list = |dir: &Path| fs::read_dir(dir).unwrap().map(|item| item.unwrap().path());
    let objects = list(dir).flat_map(|shard| list(&shard).collect::<Vec<_>>());
    objects.map(|p| (p.file_name().unwrap().to_str().unwrap().to_string(), p)).collect()
}

pub fn kinds(entry: &Entry) -> (usize, usize) {
    let dirs = entry.outputs.iter().filter(|output| output.kind == Kind::Dir).count();
    (dirs, entry.outputs.len() - dirs)
}
