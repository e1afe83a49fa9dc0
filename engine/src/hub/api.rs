//! What is asked of the hub over HTTP: the files of a revision, the name and size of a file's
//! bytes, and the bytes. Redirects are followed here, so that the token reaches the hub alone.
//! Knows no disk.

use std::io::{ErrorKind, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;
use ureq::http::{Response, Uri, header};
use ureq::tls::TlsConfig;
use ureq::{Agent, Body};

use super::select::plain_path;
use super::{Error, Kind, Reference, Settings, is_commit, short};
use crate::diagnostic::{closest, suggest};

/// No listing of a true repository is near this.
const LISTING: u64 = 64 << 20;
/// Longer than this the hub's wish to wait is told instead of granted.
const LONGEST_WAIT: Duration = Duration::from_secs(120);
const REDIRECTS: usize = 8;

/// What the hub says of a revision.
#[derive(Debug)]
pub struct Listing {
    /// The commit it is now.
    pub commit: String,
    /// All its files.
    pub files: Vec<String>,
}

/// What the hub says of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Name of its bytes: sha256 of big files, git's sha1 of small ones, else anything.
    pub etag: String,
    /// Their number.
    pub size: u64,
}

/// Asks one hub about one reference.
pub struct Client<'a> {
    agent: Agent,
    settings: &'a Settings,
    reference: &'a Reference,
    origin: Origin,
    cancel: &'a AtomicBool,
    failed: AtomicBool,
}

/// Scheme, host and port: what a token is for.
type Origin = (String, String, u16);

impl<'a> Client<'a> {
    /// Fails when the endpoint is no address.
    pub fn new(
        settings: &'a Settings,
        reference: &'a Reference,
        cancel: &'a AtomicBool,
    ) -> Result<Client<'a>, Error> {
        let origin = settings.endpoint.parse().ok().and_then(|uri: Uri| origin(&uri));
        let origin = origin.ok_or_else(|| {
            Error::refused(format!(
                "HF_ENDPOINT `{}` is no address\nhint: write it as `https://huggingface.co`",
                settings.endpoint
            ))
        })?;
        let tls = TlsConfig::builder().root_certs(settings.trusted()?).build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("pipe/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_resolve(Some(settings.patience))
            .timeout_connect(Some(settings.patience))
            .timeout_recv_response(Some(settings.patience))
            .timeout_per_read(Some(settings.patience));
        // A proxy cannot know what this machine calls itself.
        let config = match origin.1.as_str() {
            "127.0.0.1" | "localhost" | "[::1]" => config.proxy(None),
            _ => config,
        };
        let agent = config.build().new_agent();
        let failed = AtomicBool::new(false);
        Ok(Client { agent, settings, reference, origin, cancel, failed })
    }

    /// The commit and the files of the reference's revision, asked at most `tries` times.
    pub fn listing(&self, tries: u32) -> Result<Listing, Error> {
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        #[derive(Deserialize)]
        struct Model {
            sha: String,
            #[serde(default)]
            siblings: Vec<Sibling>,
        }
        let url = format!(
            "{}/api/models/{}/revision/{}",
            self.settings.endpoint,
            self.reference.repository,
            quoted(&self.reference.revision, "")
        );
        let text = self.retry(tries, || {
            let response = self.send("GET", &url, None)?;
            self.accept(&response, None)?;
            self.text(response)
        })?;
        let garbled = |what: String| {
            let hint = "is HF_ENDPOINT the address of a hub?";
            Error::refused(format!("{} gives no listing: {what}\nhint: {hint}", self.who()))
        };
        let model: Model = serde_json::from_slice(&text).map_err(|e| garbled(e.to_string()))?;
        if !is_commit(&model.sha) {
            return Err(garbled(format!("`{}` is no commit", model.sha.escape_debug())));
        }
        let files: Vec<String> = model.siblings.into_iter().map(|s| s.rfilename).collect();
        match files.iter().find(|name| !plain_path(name)) {
            Some(name) => Err(Error::refused(format!(
                "{} lists a file `{}`, which would lie outside; nothing was fetched",
                self.who(),
                name.escape_debug()
            ))),
            None => Ok(Listing { commit: model.sha, files }),
        }
    }

    /// Name and number of a file's bytes.
    pub fn meta(&self, commit: &str, name: &str) -> Result<Meta, Error> {
        self.retry(self.settings.tries, || {
            let response = self.send("HEAD", &self.address(commit, name), None)?;
            if !response.status().is_redirection() {
                self.accept(&response, Some(name))?;
            }
            let of = |name: &str| text_of(&response, name);
            if let Some(other) = of("x-repo-commit").filter(|other| *other != commit) {
                return Err(self.odd(name, &format!("from commit {} instead", short(other))));
            }
            let etag = of("x-linked-etag").or_else(|| of("etag")).map(bare).unwrap_or_default();
            let ours = etag.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
            if !ours || !(1..=128).contains(&etag.len()) {
                return Err(self.odd(name, "without a usable ETag"));
            }
            // The length of a redirection is its own.
            let own = || of("content-length").filter(|_| response.status().is_success());
            let size = of("x-linked-size").or_else(own).and_then(|size| size.parse().ok());
            let size = size.ok_or_else(|| self.odd(name, "without its length"))?;
            Ok(Meta { etag: etag.into(), size })
        })
    }

    /// Asks once for a file's bytes from `from` on; the answer has status 200, 206 or 416.
    pub fn bytes(&self, commit: &str, name: &str, from: u64) -> Result<Response<Body>, Error> {
        let range = (from > 0).then(|| format!("bytes={from}-"));
        let response = self.send("GET", &self.address(commit, name), range.as_deref())?;
        if response.status() != 416 {
            self.accept(&response, Some(name))?;
        }
        Ok(response)
    }

    fn address(&self, commit: &str, name: &str) -> String {
        let repository = &self.reference.repository;
        format!("{}/{repository}/resolve/{commit}/{}", self.settings.endpoint, quoted(name, "/"))
    }

    /// One request with its redirections; a `HEAD` stops before it leaves the hub, since only the
    /// hub knows the names of bytes.
    fn send(&self, method: &str, url: &str, range: Option<&str>) -> Result<Response<Body>, Error> {
        let mut uri: Uri = url.parse().map_err(|_| self.nowhere(url))?;
        for _ in 0..REDIRECTS {
            let mut headers = Vec::new();
            if origin(&uri).as_ref() == Some(&self.origin)
                && let Some(token) = &self.settings.token
            {
                headers.push((header::AUTHORIZATION, format!("Bearer {token}")));
            }
            headers.extend(range.map(|range| (header::RANGE, range.to_string())));
            let mut request =
                if method == "HEAD" { self.agent.head(&uri) } else { self.agent.get(&uri) };
            for (name, value) in headers {
                request = request.header(name, value);
            }
            let response = request.call().map_err(|e| self.no_answer(&uri, e))?;
            let moved = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
            let Some(to) = text_of(&response, "location").filter(|_| moved) else {
                return Ok(response);
            };
            let next = resolve(&uri, to).ok_or_else(|| self.nowhere(to))?;
            let (from, to) = (origin(&uri), origin(&next));
            let secure = |origin: &Option<Origin>| origin.as_ref().is_some_and(|o| o.0 == "https");
            if secure(&from) && !secure(&to) {
                return Err(self.nowhere(&next.to_string()));
            }
            if method == "HEAD" && to.as_ref() != Some(&self.origin) {
                return Ok(response);
            }
            uri = next;
        }
        Err(Error::refused(format!("{} redirects without end", self.who())))
    }

    /// Does `ask` again after a failure that may pass, with growing pauses.
    pub fn retry<T>(
        &self,
        tries: u32,
        mut ask: impl FnMut() -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut pause = self.settings.pause;
        for tried in 1.. {
            if self.stopped() {
                return Err(Error::stopped());
            }
            let error = match ask() {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            match error.again {
                Some(wait) if tried < tries && wait.unwrap_or_default() <= LONGEST_WAIT => {
                    self.sleep(wait.unwrap_or(pause))?;
                    pause *= 2;
                }
                _ => return Err(error),
            }
        }
        Err(Error::stopped())
    }

    /// Waits, unless nobody wants it any more.
    pub fn sleep(&self, time: Duration) -> Result<(), Error> {
        let until = Instant::now() + time;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            if self.stopped() {
                return Err(Error::stopped());
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
        Ok(())
    }

    /// The settings asked with.
    pub fn settings(&self) -> &Settings {
        self.settings
    }

    /// The reference asked about.
    pub fn reference(&self) -> &Reference {
        self.reference
    }

    /// Whether nobody wants it any more, or a part of it failed.
    pub fn stopped(&self) -> bool {
        self.cancel.load(Ordering::Relaxed) || self.failed.load(Ordering::Relaxed)
    }

    /// Lets all that still goes on end.
    pub fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// The hub's host, for messages.
    pub fn host(&self) -> &str {
        &self.origin.1
    }

    fn who(&self) -> String {
        format!("`{}`: {}", self.reference, self.host())
    }

    /// The whole body of a small answer.
    fn text(&self, mut response: Response<Body>) -> Result<Vec<u8>, Error> {
        let mut text = Vec::new();
        let read = response.body_mut().as_reader().take(LISTING).read_to_end(&mut text);
        match read {
            Ok(n) if n as u64 == LISTING => {
                Err(Error::refused(format!("{} gives an endless listing", self.who())))
            }
            Ok(_) => Ok(text),
            Err(e) => Err(self.broken(&e)),
        }
    }

    /// A connection that ended in the middle.
    pub fn broken(&self, error: &dyn std::fmt::Display) -> Error {
        let text = format!("{} broke off: {error}", self.who());
        Error::new(Kind::Unreachable, text).again(None)
    }

    /// An answer about a file that no hub gives.
    pub fn odd(&self, name: &str, how: &str) -> Error {
        Error::refused(format!("{} gives `{name}` {how}", self.who()))
    }

    fn nowhere(&self, to: &str) -> Error {
        Error::refused(format!("{} leads to `{}`; not followed", self.who(), to.escape_debug()))
    }

    fn no_answer(&self, uri: &Uri, error: ureq::Error) -> Error {
        let host = uri.host().unwrap_or_default();
        let text = format!("`{}`: {host} cannot be reached: {error}", self.reference);
        match &error {
            // Somebody answered, but not who should have: no use to ask again.
            ureq::Error::Io(e) if e.kind() == ErrorKind::InvalidData => {
                let hint =
                    "behind a proxy that looks into TLS, set SSL_CERT_FILE to its certificate";
                Error::new(Kind::Unreachable, format!("{text}\nhint: {hint}"))
            }
            ureq::Error::Io(_)
            | ureq::Error::Timeout(_)
            | ureq::Error::Protocol(_)
            | ureq::Error::HostNotFound
            | ureq::Error::ConnectionFailed => Error::new(Kind::Unreachable, text).again(None),
            _ => Error::refused(text),
        }
    }

    /// An error for an answer that is none. `file`: what was asked for, if not the listing.
    fn accept(&self, response: &Response<Body>, file: Option<&str>) -> Result<(), Error> {
        let status = response.status();
        if status.is_success() {
            return Ok(());
        }
        let code = text_of(response, "x-error-code").unwrap_or_default();
        match status.as_u16() {
            401 | 403 => Err(self.denied(status.as_u16(), code)),
            404 | 410 => Err(Error::refused(match file {
                Some(file) => format!("{} has no file `{file}`", self.who()),
                None => self.missing(code),
            })),
            408 | 425 | 429 | 500..=599 => {
                let wait = text_of(response, "retry-after").and_then(|wait| wait.parse().ok());
                let wait = wait.map(Duration::from_secs);
                let asked = wait.map(|w| format!(", and asks to wait {} s", w.as_secs()));
                let hint = match status.as_u16() {
                    429 => "\nhint: run again later; HF_TOKEN raises the limit",
                    _ => "\nhint: run again later; what was fetched is kept",
                };
                let asked = asked.unwrap_or_default();
                let text = format!("{} answers {status}{asked}{hint}", self.who());
                Err(Error::new(Kind::Unreachable, text).again(wait))
            }
            _ => Err(Error::refused(format!("{} answers {status}", self.who()))),
        }
    }

    fn denied(&self, status: u16, code: &str) -> Error {
        let (who, endpoint) = (self.who(), &self.settings.endpoint);
        let page = format!("{endpoint}/{}", self.reference.repository);
        let known = self.settings.token.is_some();
        let token = match known {
            true => "the token that was sent (HF_TOKEN, or the saved one) does not open it",
            false => "no token was sent",
        };
        Error::refused(match code {
            "GatedRepo" => format!(
                "{who} keeps it behind a licence ({status}), and {token}\nhint: accept the licence at {page} and set HF_TOKEN to a token of that account"
            ),
            _ => format!(
                "{who} does not show it ({status}): it is private, gated or not there, and {token}\nhint: check the name; set HF_TOKEN and, if {page} asks for it, accept the licence"
            ),
        })
    }

    /// What is missing, and what is there that is called alike.
    fn missing(&self, code: &str) -> String {
        let Reference { repository, revision, .. } = self.reference;
        let names = |url: String, lists: &[&str], field: &str| -> Option<Vec<String>> {
            let response = self.send("GET", &url, None).ok()?;
            let response = Some(response).filter(|r| r.status().is_success())?;
            let value: Value = serde_json::from_slice(&self.text(response).ok()?).ok()?;
            let parts: Vec<&Value> = match lists {
                [] => vec![&value],
                lists => lists.iter().filter_map(|list| value.get(list)).collect(),
            };
            let items = parts.into_iter().filter_map(Value::as_array).flatten();
            Some(items.filter_map(|i| Some(i.get(field)?.as_str()?.to_string())).collect())
        };
        let api = format!("{}/api/models", self.settings.endpoint);
        let told = |hint: Option<String>| hint.map(|h| format!("\nhint: {h}")).unwrap_or_default();
        let revisions = match code {
            "RepoNotFound" => None,
            _ => names(format!("{api}/{repository}/refs"), &["branches", "tags"], "name"),
        };
        if let Some(revisions) = revisions {
            let there = revisions.iter().map(String::as_str);
            let hint = told(suggest(revision, "its branches and tags", there));
            return format!("{} has no revision `{revision}`{hint}", self.who());
        }
        if code == "RevisionNotFound" {
            return format!("{} has no revision `{revision}`", self.who());
        }
        let name = repository.rsplit('/').next().unwrap_or(repository);
        let alike = names(format!("{api}?search={}&limit=50", quoted(name, "")), &[], "id");
        let alike = alike.unwrap_or_default();
        let best = closest(repository, alike.iter().map(String::as_str));
        let hint =
            best.map_or("check its owner and name".into(), |b| format!("did you mean `{b}`?"));
        format!("{} has no repository `{repository}`\nhint: {hint}", self.who())
    }
}

/// A header as text.
pub fn text_of<'r>(response: &'r Response<Body>, name: &str) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

/// `W/"abc"` → `abc`.
fn bare(etag: &str) -> &str {
    etag.trim_start_matches("W/").trim_matches('"')
}

fn origin(uri: &Uri) -> Option<Origin> {
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let port = match (uri.port_u16(), scheme.as_str()) {
        (Some(port), "http" | "https") => port,
        (None, "https") => 443,
        (None, "http") => 80,
        _ => return None,
    };
    Some((scheme, uri.host()?.to_ascii_lowercase(), port))
}

/// Where `to`, absolute or relative, leads from `base`.
fn resolve(base: &Uri, to: &str) -> Option<Uri> {
    let (scheme, host) = (base.scheme_str()?, base.authority()?);
    if to.starts_with("http://") || to.starts_with("https://") {
        return to.parse().ok();
    }
    let text = match to {
        to if to.starts_with("//") => format!("{scheme}:{to}"),
        to if to.starts_with('/') => format!("{scheme}://{host}{to}"),
        to => {
            let folder = base.path().rsplit_once('/').map_or("", |(folder, _)| folder);
            format!("{scheme}://{host}{folder}/{to}")
        }
    };
    text.parse().ok()
}

/// Percent-encodes all but unreserved characters and `keep`.
fn quoted(text: &str, keep: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    for byte in text.bytes() {
        let c = char::from(byte);
        if c.is_ascii_alphanumeric() || "-._~".contains(c) || keep.contains(c) {
            quoted.push(c);
        } else {
            quoted += &format!("%{byte:02X}");
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_resolved() {
        let base: Uri = "https://hub:8/a/b?c".parse().unwrap();
        let to = |to: &str| resolve(&base, to).unwrap().to_string();
        assert_eq!(to("http://x/y"), "http://x/y");
        assert_eq!(to("//x/y"), "https://x/y");
        assert_eq!(to("/y?z"), "https://hub:8/y?z");
        assert_eq!(to("y"), "https://hub:8/a/y");
    }

    #[test]
    fn a_token_is_for_scheme_host_and_port() {
        let of = |text: &str| origin(&text.parse().unwrap());
        assert_eq!(of("https://HUB/a"), of("https://hub:443/b"));
        for other in ["http://hub/", "https://hub:444/", "https://hub.evil/"] {
            assert_ne!(of("https://hub/"), of(other));
        }
        assert_eq!((of("ftp://hub/"), of("/a")), (None, None));
    }

    #[test]
    fn names_are_quoted_and_etags_bare() {
        assert_eq!(quoted("refs/pr 1", ""), "refs%2Fpr%201");
        assert_eq!(quoted("a/ä.gguf", "/"), "a/%C3%A4.gguf");
        assert_eq!((bare("W/\"a\""), bare("\"a\"")), ("a", "a"));
    }
}
