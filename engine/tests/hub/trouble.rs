//! What goes wrong: told with the reference, the host and what to do, or got over.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use engine::hub::{self, Reference, Settings, Work};

use crate::server::{Reply, Request};
use crate::{OLD, big, contents, fetch, model, noise, settings, small};

fn weights() -> String {
    format!("/bytes/{}", big(&noise(300_000)).etag)
}

/// What a hub that answers everything so leads to.
fn told(reply: impl Fn(&Request) -> Option<Reply> + Send + 'static) -> (String, usize) {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    hub.hook(reply);
    let error = fetch(&settings(&hub, dir.path()), "o/n@v1").unwrap_err();
    assert!(error.starts_with("`hf:o/n@v1`") && error.contains("127.0.0.1"), "{error}");
    (error, hub.asked().len())
}

#[test]
fn a_closed_repository_says_how_to_open_it() {
    let gated = |_: &Request| Some(Reply::status(403).with("X-Error-Code", "GatedRepo"));
    let (error, asked) = told(gated);
    assert_eq!(asked, 1, "no is no");
    assert!(error.contains("behind a licence (403), and no token was sent"), "{error}");
    assert!(error.contains("hint: accept the licence at http://127.0.0.1"), "{error}");
    assert!(error.contains("/o/n and set HF_TOKEN"), "{error}");
    let (error, _) = told(|_| Some(Reply::status(401)));
    assert!(error.contains("private, gated or not there, and no token was sent"), "{error}");
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    hub.hook(gated);
    let settings = Settings { token: Some("secret".into()), ..settings(&hub, dir.path()) };
    let error = fetch(&settings, "o/n").unwrap_err();
    assert!(error.contains("the token that was sent") && !error.contains("secret"), "{error}");
}

#[test]
fn what_is_not_there_is_told_with_what_is() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    let settings = settings(&hub, dir.path());
    let error = fetch(&settings, "o/n@mains").unwrap_err();
    assert!(error.contains("no revision `mains`\nhint: did you mean `main`?"), "{error}");
    let error = fetch(&settings, "o/m").unwrap_err();
    assert!(error.contains("no repository `o/m`\nhint: did you mean `o/n`?"), "{error}");
    assert!(!dir.path().join("models--o--m").exists());
}

#[test]
fn trouble_that_passes_is_waited_for() {
    for (status, wait) in [(429, Some("0")), (503, None), (500, None), (408, None)] {
        let (hub, dir) = (model(), tempfile::tempdir().unwrap());
        let mut left = [("revision", 2), ("config.json", 1), ("/bytes/", 2)];
        hub.hook(move |request| {
            let hit = left.iter_mut().find(|(part, n)| request.path.contains(part) && *n > 0)?;
            hit.1 -= 1;
            let reply = Reply::status(status);
            Some(match wait {
                Some(wait) => reply.with("Retry-After", wait),
                None => reply,
            })
        });
        let found = fetch(&settings(&hub, dir.path()), "o/n").unwrap();
        assert_eq!(contents(&found).len(), 3, "{status}");
    }
}

#[test]
fn trouble_that_stays_ends() {
    let (error, asked) = told(|_| Some(Reply::status(500)));
    assert_eq!(asked, 3);
    assert!(error.contains("answers 500") && error.contains("hint: run again later"), "{error}");
    let (error, asked) = told(|_| Some(Reply::status(429).with("Retry-After", "3600")));
    assert_eq!(asked, 1, "nobody waits an hour");
    assert!(error.contains("429") && error.contains("asks to wait 3600 s"), "{error}");
}

#[test]
fn the_wish_to_wait_is_granted() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    let mut first = true;
    hub.hook(move |_| {
        std::mem::take(&mut first).then(|| Reply::status(429).with("Retry-After", "1"))
    });
    let started = Instant::now();
    fetch(&settings(&hub, dir.path()), "o/n").unwrap();
    assert!(started.elapsed() >= Duration::from_secs(1));
}

#[test]
fn half_a_file_is_taken_up_where_it_broke_off() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    let mut first = true;
    hub.hook(move |request| {
        let hit = request.path == weights() && std::mem::take(&mut first);
        hit.then(|| Reply { body: noise(300_000), cut: Some(100_000), ..Reply::status(200) })
    });
    let found = fetch(&settings(&hub, dir.path()), "o/n").unwrap();
    assert_eq!(contents(&found)[1].1, noise(300_000));
    let asked = hub.elsewhere.asked();
    let ranges: Vec<_> = asked.iter().map(|r| r.headers.get("range").cloned()).collect();
    assert_eq!(ranges, [None, Some("bytes=100000-".into())]);
}

#[test]
fn half_a_file_of_an_earlier_run_is_taken_up_too() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    let settings = settings(&hub, dir.path());
    let half = |request: &Request| {
        let body = noise(300_000)[..].to_vec();
        let hit = request.path == weights() && !request.headers.contains_key("range");
        match hit {
            true => Some(Reply { body, cut: Some(200_000), ..Reply::status(200) }),
            false if request.path == weights() => Some(Reply::status(500)),
            false => None,
        }
    };
    hub.hook(half);
    let error = fetch(&settings, "o/n").unwrap_err();
    assert!(error.contains("answers 500"), "{error}");
    let store = dir.path().join("models--o--n");
    assert!(!store.join("refs/main").exists() && !store.join(".pipe").exists());
    assert!(!store.join("snapshots").join(OLD).join("model.safetensors").exists());
    hub.asked();
    hub.hook(|_| None);
    fetch(&settings, "o/n").unwrap();
    let asked = hub.elsewhere.asked();
    assert_eq!(asked[0].headers.get("range").unwrap(), "bytes=200000-");
    // A hub that knows no ranges is taken from the beginning.
    let other = tempfile::tempdir().unwrap();
    let settings = Settings { cache: other.path().into(), ..settings };
    hub.hook(half);
    fetch(&settings, "o/n").unwrap_err();
    hub.hook(|request| {
        let whole = Reply { body: noise(300_000), ..Reply::status(200) };
        (request.path == weights()).then_some(whole)
    });
    assert_eq!(contents(&fetch(&settings, "o/n").unwrap())[1].1, noise(300_000));
}

#[test]
fn bytes_that_are_not_what_they_are_called_are_refused() {
    let other = |part: &'static str, body: Vec<u8>| {
        let (hub, dir) = (model(), tempfile::tempdir().unwrap());
        hub.hook(move |request| {
            let hit = request.method == "GET" && request.path.contains(part);
            hit.then(|| Reply { body: body.clone(), ..Reply::status(200) })
        });
        let error = fetch(&settings(&hub, dir.path()), "o/n").unwrap_err();
        let named = dir.path().join("models--o--n/snapshots").join(OLD).join(match part {
            "/bytes/" => "model.safetensors",
            part => &part[1..],
        });
        assert!(!named.exists(), "nothing wrong got its name");
        error
    };
    let mut wrong = noise(300_000);
    wrong[7] ^= 1;
    let error = other("/bytes/", wrong.clone());
    assert!(error.contains("`model.safetensors` with other bytes than it announces"), "{error}");
    let error = other("/config.json", b"[]".to_vec());
    assert!(error.contains("`config.json` with other bytes"), "git's names are checked: {error}");
    let error = other("/bytes/", noise(300_001));
    assert!(error.contains("more than the 300000 bytes"), "{error}");
    let error = other("/bytes/", noise(299_999));
    assert!(error.contains("broke off"), "{error}");
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    let settings = settings(&hub, dir.path());
    let blobs = dir.path().join("models--o--n/blobs");
    fs::create_dir_all(&blobs).unwrap();
    // Damage in what an earlier run left is got over without a word.
    fs::write(blobs.join(format!("{}.pipe-incomplete", big(&noise(300_000)).etag)), &wrong[..99])
        .unwrap();
    assert_eq!(contents(&fetch(&settings, "o/n").unwrap())[1].1, noise(300_000));
}

#[test]
fn hostile_listings_are_refused() {
    for name in ["../../x", "/etc/x", "a/../../x", "a\\\\b", "a\\u0000b", "a\\u001b[2J", ""] {
        let text = format!(
            r#"{{"sha": "{OLD}", "siblings": [{{"rfilename": "config.json"}}, {{"rfilename": "{name}"}}]}}"#
        );
        let (error, _) = told(move |_| Some(Reply::text(text.clone())));
        assert!(error.contains("would lie outside"), "{error}");
        assert!(!error.contains('\x1b'), "{error}");
    }
    for text in ["", "<html>", "[]", r#"{"siblings": []}"#, r#"{"sha": "../../x"}"#] {
        let (error, _) = told(move |_| Some(Reply::text(text)));
        assert!(error.contains("gives no listing"), "{error}");
    }
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    for (etag, size) in [("../x", "2"), ("", "2"), ("ok", "many"), ("ok", "-1")] {
        hub.hook(move |request| {
            let hit = request.method == "HEAD" && request.path.contains("config.json");
            let reply = Reply::status(200).with("ETag", format!("\"{etag}\""));
            hit.then(|| reply.with("X-Linked-Size", size))
        });
        let error = fetch(&settings(&hub, dir.path()), "o/n").unwrap_err();
        assert!(error.contains("`config.json` without"), "{error}");
    }
}

#[test]
fn an_index_that_climbs_is_refused() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    let index = r#"{"weight_map": {"a": "../../../x"}}"#;
    let files = vec![("config.json", small("{}")), ("model.safetensors.index.json", small(index))];
    hub.commit("main", OLD, files);
    let error = fetch(&settings(&hub, dir.path()), "o/n").unwrap_err();
    assert!(error.contains("names `../../../x`, which is no file beside it"), "{error}");
}

#[test]
fn redirections_end() {
    let (error, asked) = told(|_| Some(Reply::status(302).with("Location", "/again")));
    assert!(error.contains("redirects without end") && asked < 10, "{error}");
    let (error, _) = told(|_| Some(Reply::status(302).with("Location", "file:///etc/passwd")));
    assert!(!error.contains("root:"), "{error}");
}

#[test]
fn an_endpoint_that_is_none_is_told() {
    let dir = tempfile::tempdir().unwrap();
    for endpoint in ["", "hub", "ftp://hub", "http://"] {
        let error = fetch(&Settings::new(endpoint, dir.path()), "o/n").unwrap_err();
        assert!(error.contains("is no address\nhint:"), "{error}");
    }
}

#[test]
fn a_stop_is_heard_while_it_waits() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    hub.hook(|_| Some(Reply::status(429).with("Retry-After", "100")));
    let settings = settings(&hub, dir.path());
    let cancel = AtomicBool::new(false);
    let work = Work { cancel: &cancel, say: &|_| {} };
    let reference = Reference::parse("o/n").unwrap();
    let ended = std::thread::scope(|scope| {
        let fetching = scope.spawn(|| hub::fetch(&settings, &reference, &work));
        while hub.hub.asked().is_empty() {
            std::thread::yield_now();
        }
        cancel.store(true, Ordering::Relaxed);
        fetching.join().unwrap()
    });
    assert_eq!(ended.unwrap_err().to_string(), "stopped");
}

#[test]
fn certificates_that_are_none_are_told() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    let roots = dir.path().join("roots.pem");
    fs::write(&roots, "nothing\n").unwrap();
    for (path, what) in [(roots, "no list in PEM form"), (dir.path().join("no"), "No such file")] {
        let settings = Settings { roots: Some(path), ..settings(&hub, dir.path()) };
        let error = fetch(&settings, "o/n").unwrap_err();
        assert!(error.contains(what) && error.contains("SSL_CERT_FILE"), "{error}");
    }
}
