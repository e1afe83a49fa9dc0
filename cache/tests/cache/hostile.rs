//! What programs leave and what others write: no path leaves its directory, nothing hangs.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;

use cache::{Cache, Digest, Entry, Error, Finished, Kind};
use rustix::fs::{CWD, FileType, Mode, OFlags, mkdirat, mknodat, openat};
use serde_json::json;

use crate::support::*;

/// A text as the store seals it.
fn sealed(kind: &str, body: &str) -> String {
    format!("{kind} 1 {}\n{body}", Digest::of(body.as_bytes()))
}

fn special(path: &Path, kind: FileType) {
    mknodat(CWD, path, kind, Mode::from_raw_mode(0o600), 0).unwrap();
}

/// Directories in each other whose path is far longer than the system takes.
fn nest(at: &Path, name: &str, depth: usize) {
    fs::create_dir(at).unwrap();
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let mut dir: OwnedFd = openat(CWD, at, flags, Mode::empty()).unwrap();
    for _ in 0..depth {
        mkdirat(&dir, name, Mode::from_raw_mode(0o700)).unwrap();
        dir = openat(&dir, name, flags, Mode::empty()).unwrap();
    }
    openat(&dir, "file", OFlags::CREATE | OFlags::WRONLY, Mode::from_raw_mode(0o600)).unwrap();
}

#[test]
fn what_is_no_file_is_refused_by_name_wherever_it_is() {
    let home = Home::new();
    let attempt = home.cache.attempt(&key("one")).unwrap();
    let outside = home.dir.path().join("outside");
    fs::write(&outside, "theirs").unwrap();
    type Make<'a> = (&'a str, &'a dyn Fn(&Path));
    let make: [Make<'_>; 5] = [
        ("fifo", &|path| special(path, FileType::Fifo)),
        ("socket", &|path| special(path, FileType::Socket)),
        ("link", &|path| symlink(&outside, path).unwrap()),
        ("nowhere", &|path| symlink("no/such/file", path).unwrap()),
        ("round", &|path| symlink(path.file_name().unwrap(), path).unwrap()),
    ];
    for (name, make) in make {
        let file = attempt.dir.join(name);
        make(&file);
        let dir = attempt.dir.join(format!("{name}.d"));
        fs::create_dir_all(dir.join("deep")).unwrap();
        fs::write(dir.join("a"), "a").unwrap();
        make(&dir.join("deep").join(name));
        for path in [&file, &dir] {
            let error = attempt.absorb("p", None, "n", path).unwrap_err();
            let text = error.to_string();
            assert!(matches!(error, Error::Symlink { .. } | Error::Special { .. }), "{text}");
            assert!(text.contains(name), "{text}");
        }
    }
    let device = attempt.dir.join("device");
    if mknodat(CWD, &device, FileType::CharacterDevice, Mode::from_raw_mode(0o600), 0x103).is_ok() {
        let error = attempt.absorb("p", None, "n", &device).unwrap_err();
        assert!(matches!(error, Error::Special { .. }), "{error}");
    }
    assert_eq!(fs::read_to_string(&outside).unwrap(), "theirs");
}

#[test]
fn names_are_bytes() {
    let home = Home::new();
    let attempt = home.cache.attempt(&key("one")).unwrap();
    let dir = attempt.dir.join("d");
    fs::create_dir(&dir).unwrap();
    let long = [b'x'; 255];
    let names: [&[u8]; 7] =
        [b"line\nbreak", b"\x1b[31mred", b" ", b"-rf", b"\xff\xfe", b"...", &long];
    for name in names {
        fs::write(dir.join(OsStr::from_bytes(name)), name).unwrap();
    }
    for name in ["a\nb", "\x1b[2J", &"n".repeat(255)] {
        fs::write(attempt.dir.join("f"), name).unwrap();
        let made = attempt.absorb("f", None, name, attempt.dir.join("f")).unwrap();
        assert_eq!((&made.name[..], read(&home.cache, &made)), (name, name.to_string()));
    }
    let made = attempt.absorb("d", None, "d", &dir).unwrap();
    let there = home.cache.object(&made.digest);
    for name in names {
        assert_eq!(fs::read(there.join(OsStr::from_bytes(name))).unwrap(), name);
    }
    home.cache.verify(&made).unwrap();
    let error = attempt.absorb("d", None, &"n".repeat(256), &dir).unwrap_err();
    assert!(matches!(error, Error::BadName { .. }));
}

#[test]
fn what_is_nested_too_deep_is_refused_and_goes_with_its_attempt() {
    for (name, depth) in [("n".repeat(200), 60), ("n".into(), 3000)] {
        let home = Home::new();
        let attempt = home.cache.attempt(&key("one")).unwrap();
        nest(&attempt.dir.join("deep"), &name, depth);
        let error = attempt.absorb("p", None, "n", attempt.dir.join("deep")).unwrap_err();
        assert!(error.to_string().contains("name too long"), "{error}");
        drop(attempt);
        home.cache.attempts_clean(&key("one")).unwrap();
        for dir in ["attempts", "trash"] {
            assert_eq!(fs::read_dir(home.root().join(dir)).unwrap().count(), 0, "{dir}");
        }
    }
    // As deep as the system takes it is like any other.
    let home = Home::new();
    let attempt = home.cache.attempt(&key("one")).unwrap();
    nest(&attempt.dir.join("deep"), "n", 1500);
    let made = attempt.absorb("p", None, "n", attempt.dir.join("deep")).unwrap();
    home.cache.verify(&made).unwrap();
    assert!(home.cache.scrub(false, &|_, _| {}).unwrap().damage.is_empty());
    home.cache.discard(&made).unwrap();
    assert!(home.cache.present(&made), "what is right stays");
}

#[test]
fn no_link_in_an_attempt_is_written_through() {
    let home = Home::new();
    let theirs = home.dir.path().join("theirs");
    fs::write(&theirs, "theirs").unwrap();
    let attempt = home.cache.attempt(&key("one")).unwrap();
    symlink(&theirs, attempt.dir.join("attempt.json.tmp")).unwrap();
    symlink(&theirs, attempt.dir.join("attempt.json")).unwrap();
    let made = Finished { outputs: vec![], log: None, provenance: json!({}) };
    attempt.finish(&made).unwrap();
    assert_eq!(home.cache.finished(&key("one")), Some(made));
    let other = home.cache.attempt(&key("two")).unwrap();
    symlink(&theirs, other.dir.join("holds")).unwrap();
    fs::write(other.dir.join("f"), "x").unwrap();
    assert!(other.absorb("p", None, "f", other.dir.join("f")).is_err());
    let text = key("one").to_string();
    fs::create_dir_all(home.root().join("locks").join(&text[..2])).unwrap();
    symlink(&theirs, home.root().join("locks").join(&text[..2]).join(&text)).unwrap();
    assert!(home.cache.claim(&key("one"), "a test").is_err());
    assert_eq!(fs::read_to_string(&theirs).unwrap(), "theirs");
}

#[test]
fn no_entry_and_no_attempt_names_a_path() {
    let home = Home::new();
    let (good, _) = put(&home.cache, "good", "text");
    let path = |entry: &Entry| {
        let text = entry.key.to_string();
        home.root().join("entries").join(&text[..2]).join(&text)
    };
    let names = ["..", ".", "", "/etc/passwd", "../../x", "a/b", "a\0b", &"n".repeat(256)];
    for (i, name) in names.iter().enumerate() {
        for field in ["name", "port"] {
            let mut body = serde_json::to_value(&good).unwrap();
            body["outputs"][0][field] = json!(name);
            let text = sealed("pipe-entry", &body.to_string());
            scribble(&path(&good), text.as_bytes());
            assert_eq!(home.reopened().lookup(&good.key).unwrap(), None, "{field} {name:?}");
            let found = home.cache.scrub(false, &|_, _| {}).unwrap().damage;
            assert!(found[0].what.contains("one path component"), "{found:?}");
            // The same by an attempt that says it is finished.
            let trial = key(&format!("{i} {field}"));
            let attempt = home.cache.attempt(&trial).unwrap();
            let mut outputs = json!(good.outputs);
            outputs[0][field] = json!(name);
            let left = |outputs: &serde_json::Value| {
                let made = json!({ "outputs": outputs, "log": null, "provenance": {} });
                let body = json!({ "key": trial, "finished": made });
                let text = sealed("pipe-attempt", &body.to_string());
                fs::write(attempt.dir.join("attempt.json"), text).unwrap();
                home.cache.finished(&trial)
            };
            assert!(left(&json!(good.outputs)).is_some(), "this one is sound");
            assert_eq!(left(&outputs), None, "{name:?}");
        }
    }
}

#[test]
fn sizes_and_kinds_that_lie_are_no_trouble() {
    let home = Home::new();
    let (good, _) = put(&home.cache, "good", "text");
    let lies: [&dyn Fn(&mut Entry); 4] = [
        &|entry| entry.outputs.iter_mut().for_each(|output| output.bytes = u64::MAX),
        &|entry| entry.outputs.iter_mut().for_each(|output| output.kind = Kind::Dir),
        &|entry| entry.log = Some((Digest::of(b"no such log"), u64::MAX)),
        &|entry| entry.provenance = json!([1e300, { "seconds": "many" }]),
    ];
    for lie in lies {
        let mut entry = good.clone();
        lie(&mut entry);
        publish(&home.cache, &entry, true);
        let cache: Cache = home.reopened();
        let found = cache.lookup(&good.key).unwrap().unwrap();
        for output in &found.outputs {
            let right = cache.check(output).is_ok() && cache.present(output);
            assert!(!right || good.outputs.contains(output), "{output:?}");
        }
        cache.rebuild();
        cache.scrub(false, &|_, _| {}).unwrap();
        let mut look = cache.inspector().unwrap();
        let facts = look.survey(&[], &[]).unwrap();
        cache::gc::Plan::new(&facts, &crate::gc::all());
    }
}
