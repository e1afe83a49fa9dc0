//! What comes, where it lies, and what is not asked a second time.

use std::fs;
use std::os::unix::fs::symlink;

use engine::hub::{self, Looked, Reference, Settings};

use crate::{NEW, OLD, big, contents, fetch, fetch_with, model, noise, settings, small, tree};

#[test]
fn a_model_comes_whole_and_lies_where_other_tools_look() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    let (found, notes) = fetch_with(&settings(&hub, dir.path()), "o/n");
    let found = found.unwrap();
    assert_eq!((&*found.origin, &*found.name, found.single), (&*format!("o/n@{OLD}"), "n", false));
    let wanted = [
        ("config.json".to_string(), b"{}".to_vec()),
        ("model.safetensors".to_string(), noise(300_000)),
        ("tokenizer.json".to_string(), b"{\"t\": 1}".to_vec()),
    ];
    assert_eq!(contents(&found), wanted);
    let (config, tokens) = (small("{}").etag, small("{\"t\": 1}").etag);
    let weights = big(&noise(300_000)).etag;
    let of = "models--o--n";
    let mut all = [
        format!(".locks/{of}/{config}.lock"),
        format!(".locks/{of}/{tokens}.lock"),
        format!(".locks/{of}/{weights}.lock"),
        format!("{of}/.pipe/{OLD}"),
        format!("{of}/blobs/{config}"),
        format!("{of}/blobs/{tokens}"),
        format!("{of}/blobs/{weights}"),
        format!("{of}/refs/main"),
        format!("{of}/snapshots/{OLD}/config.json -> ../../blobs/{config}"),
        format!("{of}/snapshots/{OLD}/model.safetensors -> ../../blobs/{weights}"),
        format!("{of}/snapshots/{OLD}/tokenizer.json -> ../../blobs/{tokens}"),
    ];
    all.sort();
    assert_eq!(tree(dir.path()), all);
    assert_eq!(fs::read_to_string(dir.path().join(of).join("refs/main")).unwrap(), OLD);
    assert!(notes[0].contains("3 files, 0.3 MB from 127.0.0.1"), "{notes:?}");
}

#[test]
fn a_branch_is_asked_for_once_and_a_commit_never_again() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    let settings = settings(&hub, dir.path());
    let first = fetch(&settings, "o/n@main").unwrap();
    assert_eq!(hub.asked().len(), 1 + 2 * 3 + 1, "listing, two a file, one elsewhere");
    assert_eq!(fetch(&settings, "o/n@main").unwrap(), first);
    assert_eq!(hub.asked(), ["GET /api/models/o/n/revision/main"]);
    assert_eq!(fetch(&settings, &format!("o/n@{OLD}")).unwrap(), first);
    assert_eq!(hub.asked(), [""; 0]);
    // A new commit brings only what is new of it.
    let files = vec![("config.json", small("{ }")), ("model.safetensors", big(&noise(300_000)))];
    hub.commit("main", NEW, files);
    let second = fetch(&settings, "o/n").unwrap();
    assert_eq!(second.origin, format!("o/n@{NEW}"));
    assert_eq!(contents(&second)[0].1, b"{ }");
    let got: Vec<String> = hub.asked().into_iter().filter(|a| a.starts_with("GET")).collect();
    assert_eq!(got, ["GET /api/models/o/n/revision/main", "GET config.json"]);
    assert_eq!(fetch(&settings, &format!("o/n@{OLD}")).unwrap(), first, "the old one stays");
}

#[test]
fn a_token_goes_to_the_hub_and_to_nobody_else() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    // The repository has moved on the same host, which is told relatively.
    hub.hook(|request| {
        let rest = request.path.strip_prefix("/api/models/old/n/")?;
        Some(super::server::Reply::status(307).with("Location", format!("/api/models/o/n/{rest}")))
    });
    let settings = Settings { token: Some("secret".into()), ..settings(&hub, dir.path()) };
    let moved = Reference::parse("old/n").unwrap();
    assert_eq!(hub::look(&settings, &moved).unwrap(), Looked::Absent);
    fetch(&settings, "o/n").unwrap();
    let (here, there) = (hub.hub.asked(), hub.elsewhere.asked());
    assert!(here.iter().all(|r| r.headers.get("authorization").unwrap() == "Bearer secret"));
    assert_eq!(there.len(), 1, "the weights");
    assert!(there.iter().all(|r| !r.headers.contains_key("authorization")), "{there:?}");
    let leaks = |r: &super::server::Request| format!("{r:?}").contains("secret");
    assert!(here.len() > 5 && !there.iter().any(leaks));
}

#[test]
fn an_index_brings_its_files_and_no_others() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    let index = r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}"#;
    let mut files = vec![
        ("config.json", small("{}")),
        ("m-1.safetensors", big(b"one")),
        ("m-2.safetensors", big(b"two")),
        ("m-3.safetensors", big(b"not named")),
        ("model.safetensors.index.json", small(index)),
    ];
    hub.commit("v1", OLD, files.clone());
    let settings = settings(&hub, dir.path());
    let found = fetch(&settings, "o/n@v1").unwrap();
    let names: Vec<&str> = found.files.iter().map(|(name, _)| name.as_str()).collect();
    let wanted =
        ["config.json", "m-1.safetensors", "m-2.safetensors", "model.safetensors.index.json"];
    assert_eq!(names, wanted);
    files.remove(2);
    hub.commit("v2", NEW, files);
    let told = fetch(&settings, "o/n@v2").unwrap_err();
    assert!(told.contains("its index names `m-2.safetensors`, which it does not have"), "{told}");
}

#[test]
fn one_file_is_named_after_the_revision() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    hub.commit("refs/pr/1", NEW, vec![("q/a-q4.gguf", big(b"gguf")), ("b.gguf", big(b"b"))]);
    let settings = settings(&hub, dir.path());
    let found = fetch(&settings, "o/n@refs/pr/1#q/a-q4.gguf").unwrap();
    assert_eq!(found.origin, format!("o/n@{NEW}#q/a-q4.gguf"));
    assert_eq!((&*found.name, found.single), ("a-q4.gguf", true));
    assert_eq!(contents(&found), [("q/a-q4.gguf".to_string(), b"gguf".to_vec())]);
    hub.asked();
    fetch(&settings, &format!("o/n@{NEW}#q/a-q4.gguf")).unwrap();
    assert_eq!(hub.asked(), [""; 0]);
    let told = fetch(&settings, "o/n@refs/pr/1").unwrap_err();
    assert!(told.contains("2 GGUF files only\nhint: name one of them"), "{told}");
    let told = fetch(&settings, "o/n@refs/pr/1#a.gguf").unwrap_err();
    assert!(told.contains("has no file `a.gguf`") && told.contains("`b.gguf`"), "{told}");
}

/// What `huggingface_hub` leaves of a whole download: no mark of ours, and a README.
fn made_by_others(dir: &std::path::Path, whole: bool) {
    let repository = dir.join("models--o--n");
    let snapshot = repository.join("snapshots").join(OLD);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(repository.join("blobs")).unwrap();
    fs::create_dir_all(repository.join("refs")).unwrap();
    fs::write(repository.join("refs/main"), OLD).unwrap();
    let mut files = vec![
        ("README.md", small("no")),
        ("config.json", small("{}")),
        ("tokenizer.json", small("{\"t\": 1}")),
    ];
    files.extend(whole.then(|| ("model.safetensors", big(&noise(300_000)))));
    for (name, blob) in files {
        fs::write(repository.join("blobs").join(&blob.etag), &blob.bytes).unwrap();
        symlink(format!("../../blobs/{}", blob.etag), snapshot.join(name)).unwrap();
    }
}

#[test]
fn what_other_tools_fetched_is_used() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    made_by_others(dir.path(), true);
    let settings = settings(&hub, dir.path());
    let pinned = format!("o/n@{OLD}");
    let found = fetch(&settings, &pinned).unwrap();
    assert_eq!(hub.asked(), [format!("GET /api/models/o/n/revision/{OLD}")]);
    assert_eq!(found.files.len(), 3, "the README is not part of the model");
    // Now it is known to be whole.
    assert_eq!(fetch(&settings, &pinned).unwrap(), found);
    assert_eq!(hub.asked(), [""; 0]);
    let other = tempfile::tempdir().unwrap();
    made_by_others(other.path(), false);
    fetch(&Settings { cache: other.path().into(), ..settings }, "o/n").unwrap();
    let got: Vec<String> = hub.asked().into_iter().filter(|a| a.starts_with("GET")).collect();
    assert_eq!(got.len(), 3, "the listing and the weights from two servers: {got:?}");
}

#[test]
fn without_a_network_the_last_known_commit_is_taken() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    let online = settings(&hub, dir.path());
    let first = fetch(&online, "o/n").unwrap();
    hub.asked();
    let offline = Settings { offline: true, ..online.clone() };
    let (found, notes) = fetch_with(&offline, "o/n");
    assert_eq!(found.unwrap(), first);
    assert!(notes[0].ends_with("as it was when last fetched: commit 000000000000"), "{notes:?}");
    assert_eq!(
        hub::look(&offline, &Reference::parse("o/n").unwrap()).unwrap(),
        Looked::Here(first.clone())
    );
    assert_eq!(hub.asked(), [""; 0]);
    let told = fetch(&offline, "o/other").unwrap_err();
    assert!(told.contains("nothing of it is here, and HF_HUB_OFFLINE forbids"), "{told}");
    // A port where nobody listens.
    let gone = Settings { endpoint: "http://127.0.0.1:1".into(), ..online };
    let (found, notes) = fetch_with(&gone, "o/n");
    assert_eq!(found.unwrap(), first);
    assert!(notes[0].contains("127.0.0.1 cannot be reached"), "{notes:?}");
    assert!(notes[1].contains("commit 000000000000"), "{notes:?}");
    let told = fetch(&gone, "o/other").unwrap_err();
    assert!(told.contains("cannot be reached") && told.contains("nothing of it is here"), "{told}");
}

#[test]
fn offline_takes_what_others_fetched_only_if_it_is_whole() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    let offline = |dir: &std::path::Path| Settings { offline: true, ..settings(&hub, dir) };
    made_by_others(dir.path(), true);
    assert_eq!(fetch(&offline(dir.path()), "o/n").unwrap().files.len(), 3);
    let other = tempfile::tempdir().unwrap();
    made_by_others(other.path(), false);
    let told = fetch(&offline(other.path()), "o/n").unwrap_err();
    assert!(told.contains("not whole") && told.contains("no weights"), "{told}");
    // A link whose bytes are gone does not count either.
    let weights = big(&noise(300_000)).etag;
    fs::remove_file(dir.path().join("models--o--n/blobs").join(weights)).unwrap();
    assert!(fetch(&offline(dir.path()), "o/n").unwrap_err().contains("not whole"));
}

#[test]
fn planning_fetches_nothing() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    let settings = settings(&hub, dir.path());
    let reference = Reference::parse("o/n").unwrap();
    assert_eq!(hub::look(&settings, &reference).unwrap(), Looked::Absent);
    assert_eq!(hub.asked(), ["GET /api/models/o/n/revision/main"]);
    assert_eq!(tree(dir.path()), [""; 0]);
    let found = fetch(&settings, "o/n").unwrap();
    assert_eq!(hub::look(&settings, &reference).unwrap(), Looked::Here(found));
    hub.commit("main", NEW, vec![("config.json", small("1")), ("model.safetensors", big(b"2"))]);
    assert_eq!(hub::look(&settings, &reference).unwrap(), Looked::Absent);
    let wrong = hub::look(&settings, &Reference::parse("o/n@mian").unwrap()).unwrap_err();
    assert!(wrong.to_string().contains("did you mean `main`?"), "{wrong}");
}

#[test]
fn two_at_once_fetch_every_byte_once() {
    let (hub, dir) = (model(), tempfile::tempdir().unwrap());
    let settings = settings(&hub, dir.path());
    let found: Vec<_> = std::thread::scope(|scope| {
        let both: Vec<_> =
            (0..4).map(|_| scope.spawn(|| fetch(&settings, "o/n").unwrap())).collect();
        both.into_iter().map(|one| one.join().unwrap()).collect()
    });
    assert!(found.iter().all(|one| contents(one) == contents(&found[0])));
    let weights = format!("GET /bytes/{}", big(&noise(300_000)).etag);
    assert_eq!(hub.asked().iter().filter(|asked| **asked == weights).count(), 1);
}
