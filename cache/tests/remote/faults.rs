//! A remote that fails, hangs, cuts off, flips bits and forgets, at random: never wrong bytes,
//! always an end, and all is well once it is well again.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use cache::remote::{Found, Leased, Remote, Settings, Trouble, Trust, artifacts};

use crate::made::*;
use crate::memory::{Client, Faults, Memory, short};
use crate::support::*;

/// Far more than all time-outs of one operation together, on a machine that is busy.
const FOREVER: Duration = Duration::from_secs(120);

/// How many random schedules; more for a soak.
fn schedules() -> u64 {
    std::env::var("PIPE_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(6)
}

fn random_faults(seed: u64) -> Faults {
    let pick = |shift: u64, most: u64| {
        let x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(shift as u32 * 9) >> 32;
        if x.is_multiple_of(3) { x / 3 % (most + 1) } else { 0 }
    };
    Faults {
        down: pick(1, 30),
        refused: pick(2, 10),
        hangs: pick(3, 10),
        cut: pick(4, 40),
        flips: pick(5, 40),
        lost: pick(6, 30),
        replaces: pick(7, 1) == 1,
    }
}

fn bounded<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let done = work();
    assert!(start.elapsed() < FOREVER, "{what} took {:?}", start.elapsed());
    done
}

#[test]
fn random_faults_never_give_wrong_bytes_and_always_end() {
    for seed in 1..=schedules() {
        let store = Arc::new(Memory::default());
        let (from, to) = (Home::new(), Home::new());
        let entries = ["one", "two"].map(|name| result(&from.cache, name, name == "two"));
        let (writer, reader) = (Client::new(&store, seed), Client::new(&store, seed + 1000));
        writer.set(random_faults(seed));
        reader.set(random_faults(seed + 7));
        let (write, read) = (writer.remote(), reader.remote());
        for _ in 0..3 {
            for entry in &entries {
                let _ = bounded("push", || push(&write, &from.cache, entry));
                let found = bounded("find", || read.find(&to.cache, &entry.key));
                if let Found::Hit(found) = found {
                    assert_eq!(*found, *entry, "seed {seed}");
                    if bounded("fetch", || fetch(&read, &to.cache, &found)).is_ok() {
                        whole(&to.cache, &found);
                    }
                }
                nothing_wrong(&to.cache, &artifacts(entry));
                drop(bounded("lease", || read.lease(&entry.key, "a test")));
            }
        }
        // The faults pass, and nothing has to be done about what they left.
        writer.set(Faults::default());
        reader.set(Faults::default());
        let (write, read) = (writer.remote(), reader.remote());
        for entry in &entries {
            // What was lost on its way lies under no name, or is seen by its size.
            let sent = push(&write, &from.cache, entry);
            assert!(sent.is_ok(), "seed {seed}: {sent:?}");
            assert_eq!(pull(&read, &to.cache, &entry.key), *entry, "seed {seed}");
        }
    }
}

#[test]
fn a_broken_connection_costs_only_what_was_not_there_yet() {
    let store = Arc::new(Memory::default());
    let (from, to) = (Home::new(), Home::new());
    let entry = result(&from.cache, "one", true);
    let client = Client::new(&store, 1);
    let remote = client.patient();
    push(&remote, &from.cache, &entry).unwrap();
    hit(remote.find(&to.cache, &entry.key));
    client.set(Faults { cut: 60, ..Default::default() });
    let before = client.read.load(Ordering::SeqCst);
    fetch(&remote, &to.cache, &entry).unwrap();
    whole(&to.cache, &entry);
    let moved = client.read.load(Ordering::SeqCst) - before;
    let all: u64 = artifacts(&entry).iter().map(|output| output.bytes).sum();
    assert!(moved < all + all / 4, "{moved} bytes for {all}");
}

#[test]
fn a_remote_that_is_down_is_left_alone_and_asked_again() {
    let store = Arc::new(Memory::default());
    let home = Home::new();
    let client = Client::new(&store, 1);
    let remote = client.remote();
    client.set(Faults { down: 100, ..Default::default() });
    let ask = |name: &str| remote.find(&home.cache, &key(name));
    for i in 0..50 {
        let found = ask(&i.to_string());
        assert!(matches!(&found, Found::Unavailable(why) if why.contains("down")), "{found:?}");
    }
    let asked = client.requests.load(Ordering::SeqCst);
    assert!(asked < 30, "{asked} requests of a remote that is down");
    assert!(remote.usable().is_err());
    client.set(Faults::default());
    let until = Instant::now() + FOREVER;
    while ask("later") != Found::Miss {
        assert!(Instant::now() < until, "never asked again");
        std::thread::sleep(Duration::from_millis(20));
    }
    remote.usable().unwrap();
}

#[test]
fn a_remote_that_refuses_writes_can_still_be_read() {
    let store = Arc::new(Memory::default());
    let (home, to) = (Home::new(), Home::new());
    let entry = result(&home.cache, "one", false);
    push(&Client::new(&store, 1).remote(), &home.cache, &entry).unwrap();
    let client = Client::new(&store, 2);
    let remote = client.remote();
    let (other, _) = put(&home.cache, "two", "text");
    hit(remote.find(&to.cache, &entry.key));
    client.set(Faults { refused: 100, ..Default::default() });
    for _ in 0..5 {
        push(&remote, &home.cache, &other).unwrap_err();
    }
    let error = push(&remote, &home.cache, &other).unwrap_err();
    assert!(matches!(error, Trouble::Unavailable { .. }), "left alone: {error}");
    client.set(Faults::default());
    pull(&remote, &to.cache, &entry.key);
}

fn s3(endpoint: &str) -> Remote {
    let mut settings = Settings::new("s3://bucket/prefix");
    settings.trust = Trust::Writers;
    settings.timeouts = short();
    let endpoint = endpoint.to_string();
    let env = move |name: &str| {
        Some(match name {
            "AWS_ENDPOINT_URL" => endpoint.clone().into(),
            "AWS_ACCESS_KEY_ID" => "somekeyid".into(),
            "AWS_SECRET_ACCESS_KEY" => "somesecret".into(),
            _ => return None,
        })
    };
    Remote::open(settings, &env).unwrap()
}

fn useless(remote: &Remote, home: &Home) {
    let entry = result(&home.cache, "one", false);
    let found = bounded("find", || remote.find(&home.cache, &entry.key));
    assert!(matches!(found, Found::Unavailable(_)), "{found:?}");
    let leased = bounded("lease", || remote.lease(&entry.key, "a test"));
    assert!(matches!(leased, Leased::Unavailable(_)), "{leased:?}");
    let error = bounded("push", || push(remote, &home.cache, &entry)).unwrap_err();
    assert!(matches!(error, Trouble::Unavailable { .. }), "{error}");
    let output = artifacts(&entry).remove(0);
    lose(&home.cache, &output.digest);
    let error = bounded("fetch", || fetch(remote, &home.cache, &entry)).unwrap_err();
    assert!(matches!(error, Trouble::Unavailable { .. }), "{error}");
    bounded("probe", || remote.probe()).unwrap_err();
}

#[test]
fn nobody_listens() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    useless(&s3(&format!("http://{free}")), &Home::new());
}

#[test]
fn somebody_listens_and_never_answers() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let held: Vec<_> = listener.incoming().collect();
        drop(held);
    });
    useless(&s3(&format!("http://{address}")), &Home::new());
}

#[test]
fn somebody_answers_something_else() {
    use std::io::{Read, Write};
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: \"x\"\r\n\r\n<a><b",
        "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 900000000\r\n\r\nshort",
        "nonsense",
        "",
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let mut buffer = [0; 4096];
                let _ = stream.read(&mut buffer);
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        let home = Home::new();
        let remote = s3(&format!("http://{address}"));
        let found = bounded("find", || remote.find(&home.cache, &key("one")));
        assert!(!matches!(found, Found::Hit(_) | Found::Miss), "{answer:?}: {found:?}");
        let (entry, _) = put(&home.cache, "one", "text");
        bounded("push", || push(&remote, &home.cache, &entry)).unwrap_err();
    }
}
