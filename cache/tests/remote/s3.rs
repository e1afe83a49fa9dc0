//! Over a real S3 server on this machine. `PIPE_TEST_S3` is the path of the script that starts,
//! stops, freezes and kills one; without it these tests say that they skip.

#![allow(clippy::print_stdout)] // what is skipped is said

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cache::remote::{Found, Leased, Progress, Remote, Settings, Trouble, Trust, artifacts};
use cache::{Cache, Entry, Finished};
use serde_json::json;

use crate::made::*;
use crate::support::*;

/// A server of its own, with its state in a temporary directory.
struct Server {
    script: PathBuf,
    dir: tempfile::TempDir,
    env: HashMap<String, String>,
}

impl Server {
    fn start(test: &str) -> Option<Server> {
        let Some(script) = std::env::var_os("PIPE_TEST_S3").map(PathBuf::from) else {
            println!("{test}: skipped, since PIPE_TEST_S3 names no script that starts a server");
            return None;
        };
        // A short path: it has sockets in it.
        let dir = tempfile::Builder::new().prefix("s3").tempdir_in("/tmp").unwrap();
        let mut server = Server { script, dir, env: HashMap::new() };
        server.run("start");
        let output = Command::new(&server.script).arg("env").arg(server.dir.path()).output();
        for line in String::from_utf8(output.unwrap().stdout).unwrap().lines() {
            let (name, value) = line.strip_prefix("export ").unwrap().split_once('=').unwrap();
            server.env.insert(name.to_string(), value.to_string());
        }
        Some(server)
    }

    fn run(&self, verb: &str) {
        let status = Command::new(&self.script).arg(verb).arg(self.dir.path()).status();
        assert!(status.unwrap().success(), "{verb}");
    }

    /// Whether a killed server comes back with its objects.
    fn keeps(&self) -> bool {
        std::env::var_os("S3_LOOPBACK_SERVER").is_none_or(|name| name == "seaweedfs")
    }

    fn remote(&self, prefix: &str) -> Remote {
        let mut settings = Settings::new(format!("s3://{}/{prefix}", self.env["S3_BUCKET"]));
        settings.trust = Trust::Writers;
        // A server that is started anew takes its time on a busy machine.
        settings.timeouts.patience = Duration::from_secs(120);
        settings.timeouts.pause = Duration::from_secs(1);
        settings.timeouts.reply = Duration::from_secs(20);
        settings.timeouts.find = Duration::from_secs(60);
        self.remote_with(settings)
    }

    fn remote_with(&self, settings: Settings) -> Remote {
        let env = self.env.clone();
        Remote::open(settings, &move |name| env.get(name).map(OsString::from)).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = Command::new(&self.script).arg("stop").arg(self.dir.path()).status();
    }
}

/// A result with one file of so many MiB that no other test makes.
fn big(cache: &Cache, name: &str, mib: usize) -> Entry {
    let attempt = cache.attempt(&key(name)).unwrap();
    let path = attempt.dir.join("big");
    let mut bytes = Vec::with_capacity(mib << 20);
    let mut x = u64::from_le_bytes(key(name).as_bytes()[..8].try_into().unwrap()) | 1;
    while bytes.len() < mib << 20 {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    std::fs::write(&path, &bytes).unwrap();
    let outputs = vec![attempt.absorb("big", None, "big", &path).unwrap()];
    let provenance = json!({ "stage": "toy", "step": name });
    let finished = Finished { outputs: outputs.clone(), log: None, provenance };
    attempt.finish(&finished).unwrap();
    let entry = Entry::new(preimage(name), outputs, None, finished.provenance);
    publish(cache, &entry, false);
    entry
}

/// Does something to the server once so many bytes have moved.
fn in_the_middle(progress: &Progress, bytes: u64, what: impl FnOnce()) {
    let until = Instant::now() + Duration::from_secs(300);
    while progress.done() < bytes {
        assert!(Instant::now() < until, "nothing moves");
        std::thread::sleep(Duration::from_millis(5));
    }
    what();
}

#[test]
fn results_go_and_come() {
    let Some(server) = Server::start("results_go_and_come") else { return };
    let (from, to) = (Home::new(), Home::new());
    let remote = server.remote("some/prefix");
    assert_eq!(remote.name(), format!("s3://{}/some/prefix", server.env["S3_BUCKET"]));
    let probed = remote.probe().unwrap();
    assert!(probed.conditional);
    let entry = result(&from.cache, "one", true);
    assert_eq!(remote.find(&to.cache, &entry.key), Found::Miss);
    let sent = push(&remote, &from.cache, &entry).unwrap();
    assert!(sent.entry && sent.bytes > LARGE as u64);
    assert_eq!(push(&remote, &from.cache, &entry).unwrap().bytes, 0);
    let other = server.remote("some/prefix");
    assert_eq!(pull(&other, &to.cache, &entry.key), entry);
    assert_eq!(server.remote("other").find(&to.cache, &entry.key), Found::Miss);

    let Leased::Mine(lease) = remote.lease(&key("x"), "a test") else { panic!() };
    let Leased::Busy(holder) = other.lease(&key("x"), "another") else { panic!() };
    assert_eq!(holder.owner, "a test");
    drop(lease);
    assert!(matches!(other.lease(&key("x"), "another"), Leased::Mine(_)));

    let (first, _) = put(&from.cache, "two", "first");
    let (second, _) = put(&to.cache, "two", "second");
    assert!(push(&remote, &from.cache, &first).unwrap().entry);
    assert!(push(&other, &to.cache, &second).unwrap().diverged);
}

#[test]
fn wrong_credentials_and_wrong_buckets_are_told_in_words() {
    let Some(mut server) = Server::start("wrong_credentials") else { return };
    let home = Home::new();
    let mut settings = Settings::new("s3://no-such-bucket-here/prefix");
    settings.trust = Trust::Writers;
    let found = server.remote_with(settings).find(&home.cache, &key("one"));
    let Found::Unavailable(why) = found else { panic!("{found:?}") };
    assert!(why.contains("no such bucket"), "{why}");
    server.env.insert("AWS_SECRET_ACCESS_KEY".into(), "planted-wrong-secret".into());
    let remote = server.remote("prefix");
    let found = remote.find(&home.cache, &key("one"));
    let Found::Unavailable(why) = found else { panic!("{found:?}") };
    assert!(why.contains("403") && !why.contains("planted"), "{why}");
    let (entry, _) = put(&home.cache, "one", "text");
    let error = push(&remote, &home.cache, &entry).unwrap_err();
    assert!(matches!(error, Trouble::Refused { .. }), "{error}");
}

/// Pushes and pulls while `stop` and, after a while, `go` is done to the server.
fn outage(name: &str, stop: &str, go: &str) {
    let Some(server) = Server::start(name) else { return };
    if go == "restart" && !server.keeps() {
        println!("{name}: skipped, since this server forgets its objects when it is killed");
        return;
    }
    let (from, to) = (Home::new(), Home::new());
    let entry = big(&from.cache, name, 160);
    let remote = server.remote("prefix");
    let bytes = entry.outputs[0].bytes;
    let cancel = AtomicBool::new(false);
    let broken = |progress: &Progress| {
        in_the_middle(progress, bytes / 5, || server.run(stop));
        std::thread::sleep(Duration::from_secs(2));
        server.run(go);
    };
    let progress = Progress::new();
    let sent = std::thread::scope(|scope| {
        scope.spawn(|| broken(&progress));
        remote.push(&from.cache, &entry, &progress, &cancel)
    });
    assert!(sent.unwrap().entry);
    let reader = server.remote("prefix");
    hit(reader.find(&to.cache, &entry.key));
    let progress = Progress::new();
    let fetched = std::thread::scope(|scope| {
        scope.spawn(|| broken(&progress));
        reader.fetch(&to.cache, &artifacts(&entry), &progress, &cancel)
    });
    fetched.unwrap();
    whole(&to.cache, &entry);
}

#[test]
fn a_server_that_is_killed_and_started_again_in_the_middle() {
    outage("killed_in_the_middle", "kill", "restart");
}

#[test]
fn a_server_that_hangs_for_a_while_in_the_middle() {
    outage("hangs_in_the_middle", "freeze", "thaw");
}

#[test]
fn a_dead_server_ends_every_wait_and_costs_nothing_later() {
    let Some(server) = Server::start("a_dead_server") else { return };
    let home = Home::new();
    let entry = result(&home.cache, "one", false);
    let mut settings = Settings::new(format!("s3://{}/prefix", server.env["S3_BUCKET"]));
    settings.trust = Trust::Writers;
    settings.timeouts = crate::memory::short();
    settings.timeouts.pause = Duration::from_secs(600);
    let remote = server.remote_with(settings);
    for verb in ["freeze", "kill"] {
        server.run(verb);
        assert!(matches!(remote.find(&home.cache, &entry.key), Found::Unavailable(_)));
        push(&remote, &home.cache, &entry).unwrap_err();
        let start = Instant::now();
        for _ in 0..1000 {
            assert!(matches!(remote.find(&home.cache, &entry.key), Found::Unavailable(_)));
        }
        // A thousand requests would take minutes.
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}

#[test]
fn a_push_that_was_killed_goes_on_with_what_is_missing() {
    let Some(server) = Server::start("killed_push") else { return };
    let home = Home::new();
    let entry = big(&home.cache, "killed push", 80);
    let mut child = child("s3::child_pushes", &home.root());
    child.envs(&server.env).env("PIPE_CRASH_AT", "push.after-part@5");
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(child.status().unwrap().signal(), Some(9));
    let remote = server.remote("prefix");
    assert_eq!(remote.find(&Home::new().cache, &entry.key), Found::Miss);
    let sent = push(&remote, &home.cache, &entry).unwrap();
    assert!(sent.bytes <= (80 - 5 * 8) << 20, "{sent:?}");
    pull(&remote, &Home::new().cache, &entry.key);
}

/// Run as a child.
#[test]
fn child_pushes() {
    let (Some(cache), Some(bucket)) = (as_child(), std::env::var_os("S3_BUCKET")) else { return };
    let mut settings = Settings::new(format!("s3://{}/prefix", bucket.to_str().unwrap()));
    settings.trust = Trust::Writers;
    let remote = Remote::open(settings, &|name| std::env::var_os(name)).unwrap();
    let entry = cache.lookup(&key("killed push")).unwrap().unwrap();
    push(&remote, &cache, &entry).unwrap();
}

#[test]
fn two_caches_with_one_bucket_run_each_key_once() {
    let Some(server) = Server::start("two_caches") else { return };
    crate::exchange::each_once([server.remote("prefix"), server.remote("prefix")]);
}

#[test]
fn a_holder_that_dies_or_stalls_stops_nobody() {
    let Some(server) = Server::start("a_holder") else { return };
    let mut settings = Settings::new(format!("s3://{}/prefix", server.env["S3_BUCKET"]));
    settings.trust = Trust::Writers;
    settings.timeouts.heartbeat = Duration::from_millis(500);
    let home = Home::new();
    let mut holder = child("s3::child_holds", &home.root());
    let mut holder = holder.envs(&server.env).spawn().unwrap();
    let remote = server.remote_with(settings);
    let until = Instant::now() + Duration::from_secs(120);
    let waiting = || {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(100));
    };
    let stopped = AtomicBool::new(false);
    loop {
        match remote.lease(&key("held"), "the next") {
            Leased::Mine(lease) if stopped.load(Ordering::SeqCst) => {
                assert_eq!(lease.fence(), 2);
                break;
            }
            Leased::Mine(lease) => drop(lease),
            Leased::Busy(holder) if !stopped.load(Ordering::SeqCst) => {
                assert_eq!(holder.owner, "a child");
                stopped.store(true, Ordering::SeqCst);
            }
            Leased::Busy(_) => {
                // Frozen, as a machine that sleeps.
                let id = holder.id().to_string();
                let _ = Command::new("kill").args(["-STOP", &id]).status();
            }
            Leased::Unavailable(why) => panic!("{why}"),
        }
        waiting();
    }
    holder.kill().unwrap();
    holder.wait().unwrap();
}

/// Run as a child: takes a lease and holds it.
#[test]
fn child_holds() {
    let (Some(_), Some(bucket)) = (as_child(), std::env::var_os("S3_BUCKET")) else { return };
    let mut settings = Settings::new(format!("s3://{}/prefix", bucket.to_str().unwrap()));
    settings.trust = Trust::Writers;
    settings.timeouts.heartbeat = Duration::from_millis(500);
    let remote = Remote::open(settings, &|name| std::env::var_os(name)).unwrap();
    let until = Instant::now() + Duration::from_secs(120);
    let _lease = loop {
        match remote.lease(&key("held"), "a child") {
            Leased::Mine(lease) => break lease,
            _ => assert!(Instant::now() < until),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    std::thread::sleep(Duration::from_secs(600));
}
