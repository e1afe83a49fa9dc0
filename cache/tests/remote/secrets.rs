//! A planted secret is in no error, no `Debug`, no name, no log and no file.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;

use cache::remote::{Remote, Settings, Trust};

use crate::made::*;
use crate::memory::short;
use crate::support::*;

const SECRET: &str = "hunter2/planted+secret=";
const TOKEN: &str = "planted-session-token-0123456789";

fn settings(url: &str) -> Settings {
    let mut settings = Settings::new(url);
    settings.trust = Trust::Writers;
    settings.timeouts = short();
    settings
}

fn clean(what: &str, text: &str) {
    for secret in ["hunter2", "planted", TOKEN] {
        assert!(!text.contains(secret), "{what}: {text}");
    }
}

fn clean_files(dir: &Path) {
    for item in fs::read_dir(dir).unwrap().flatten() {
        let path = item.path();
        clean("a name", path.file_name().unwrap().to_str().unwrap());
        if path.is_dir() {
            clean_files(&path);
        } else {
            clean("a file", &String::from_utf8_lossy(&fs::read(&path).unwrap()));
        }
    }
}

/// A server that sends back all it got, as an error of S3 does with what was signed.
fn echo() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut buffer = [0; 16 << 10];
            let n = stream.read(&mut buffer).unwrap_or(0);
            let got = String::from_utf8_lossy(&buffer[..n]).to_string();
            let body = format!(
                "<Error><Code>SignatureDoesNotMatch</Code><Message>{SECRET}</Message>\
                 <CanonicalRequest>{got} {TOKEN}</CanonicalRequest></Error>"
            );
            let head = "HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length:";
            let _ = stream.write_all(format!("{head} {}\r\n\r\n{body}", body.len()).as_bytes());
        }
    });
    format!("http://{address}")
}

#[test]
fn of_an_answer_that_repeats_it() {
    let endpoint = echo();
    let home = Home::new();
    let env = |name: &str| {
        Some(match name {
            "AWS_ENDPOINT_URL" => endpoint.clone().into(),
            "AWS_ACCESS_KEY_ID" => "planted-key-id".into(),
            "AWS_SECRET_ACCESS_KEY" => SECRET.into(),
            "AWS_SESSION_TOKEN" => TOKEN.into(),
            _ => return None,
        })
    };
    let remote = Remote::open(settings("s3://bucket/prefix"), &env).unwrap();
    let entry = result(&home.cache, "one", true);
    let mut texts = vec![
        format!("{remote:?} {}", remote.name()),
        format!("{:?}", remote.find(&home.cache, &entry.key)),
        format!("{:?}", remote.lease(&entry.key, "a test")),
        format!("{:?}", remote.probe()),
    ];
    let error = push(&remote, &home.cache, &entry).unwrap_err();
    texts.push(format!("{error} {error:?}"));
    let error = fetch(&remote, &Home::new().cache, &entry).unwrap_err();
    texts.push(format!("{error} {error:?}"));
    let uploader = remote.uploader(&home.cache).unwrap();
    uploader.enqueue(&entry.key);
    texts.push(format!("{uploader:?}"));
    texts.push(format!("{:?}", uploader.finish(None, &Default::default())));
    texts.extend(home.cache.take_reports());
    assert!(texts.iter().any(|text| text.contains("SignatureDoesNotMatch")), "{texts:?}");
    texts.iter().for_each(|text| clean("a text", text));
    assert_eq!(remote.pending(&home.cache), [entry.key]);
    home.cache.flush_index();
    clean_files(&home.root());
}

#[test]
fn of_settings_that_cannot_be() {
    let home = Home::new();
    let aws = home.dir.path().join(".aws");
    fs::create_dir(&aws).unwrap();
    fs::write(
        aws.join("credentials"),
        format!("[half]\naws_secret_access_key = {SECRET}\n[bad]\naws_access_key_id = a\n"),
    )
    .unwrap();
    let dir = home.dir.path().as_os_str().to_os_string();
    let urls = [
        format!("s3://key:{SECRET}@bucket/prefix"),
        format!("s3://bucket/prefix?token={TOKEN}"),
        format!("https://bucket/{TOKEN}"),
        "s3://bucket".to_string(),
        "gs://bucket".to_string(),
        "az://bucket".to_string(),
    ];
    for url in urls {
        for profile in ["half", "bad", "none"] {
            let env = |name: &str| {
                Some(match name {
                    "HOME" => dir.clone(),
                    "AWS_PROFILE" => profile.into(),
                    "AWS_SESSION_TOKEN" => TOKEN.into(),
                    "AWS_SKIP_SIGNATURE" => TOKEN.into(),
                    "GOOGLE_SERVICE_ACCOUNT_KEY" => {
                        format!("{{\"private_key\": \"{TOKEN}\"").into()
                    }
                    "AZURE_STORAGE_ACCOUNT_NAME" => "account".into(),
                    "AZURE_STORAGE_ACCOUNT_KEY" => SECRET.into(),
                    "AZURE_STORAGE_SAS_TOKEN" => TOKEN.into(),
                    _ => return None,
                })
            };
            if let Err(error) = Remote::open(settings(&url), &env) {
                clean("an error", &format!("{error} {error:?}"));
            }
            clean("settings", &format!("{:?}", Remote::open(settings("s3://b"), &env).err()));
        }
    }
}

#[test]
fn credentials_come_from_the_usual_files() {
    let home = Home::new();
    let aws = home.dir.path().join(".aws");
    fs::create_dir(&aws).unwrap();
    let text = "[lab]\naws_access_key_id = planted-id\naws_secret_access_key = planted-secret\n";
    fs::write(aws.join("credentials"), text).unwrap();
    fs::write(aws.join("config"), format!("[profile lab]\nendpoint_url = {}\n", echo())).unwrap();
    let dir = home.dir.path().as_os_str().to_os_string();
    let with = |profile: Option<&'static str>| {
        let dir = dir.clone();
        Remote::open(settings("s3://bucket"), &move |name: &str| match name {
            "HOME" => Some(dir.clone()),
            "AWS_PROFILE" => profile.map(Into::into),
            _ => None,
        })
    };
    let found = format!("{:?}", with(Some("lab")).unwrap().find(&home.cache, &key("one")));
    assert!(found.contains("SignatureDoesNotMatch"), "the endpoint of the profile: {found}");
    clean("an answer", &found);
    let error = with(None).unwrap_err().to_string();
    assert!(error.contains("no credentials") && error.contains("hint:"), "{error}");
    let error = with(Some("other")).unwrap_err().to_string();
    assert!(error.contains("no AWS profile `other`"), "{error}");
}
