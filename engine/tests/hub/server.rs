//! A hub on this machine: HTTP over `std::net`, one answer a connection, and what it was asked.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// What was asked.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: String,
    pub path: String,
    /// By lower-case name.
    pub headers: BTreeMap<String, String>,
}

/// What is answered.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(&'static str, String)>,
    pub body: Vec<u8>,
    /// The connection ends after so many bytes of the body.
    pub cut: Option<usize>,
}

impl Reply {
    pub fn status(status: u16) -> Reply {
        Reply { status, ..Reply::default() }
    }

    pub fn text(text: impl Into<String>) -> Reply {
        Reply { body: text.into().into_bytes(), ..Reply::status(200) }
    }

    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Reply {
        self.headers.push((name, value.into()));
        self
    }
}

type Answer = dyn Fn(&Request) -> Reply + Send + Sync;

/// A server that ends with this value.
pub struct Server {
    address: String,
    asked: Arc<Mutex<Vec<Request>>>,
    over: Arc<AtomicBool>,
}

impl Server {
    pub fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let over = Arc::new(AtomicBool::new(false));
        let answer: Arc<Answer> = Arc::new(answer);
        let (log, end) = (asked.clone(), over.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if end.load(Ordering::Relaxed) {
                    return;
                }
                let (answer, log) = (answer.clone(), log.clone());
                std::thread::spawn(move || serve(stream, &*answer, &log));
            }
        });
        Server { address, asked, over }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// What was asked since the last call.
    pub fn asked(&self) -> Vec<Request> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(&self.address);
    }
}

fn serve(mut stream: TcpStream, answer: &Answer, log: &Mutex<Vec<Request>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let mut words = first.split(' ').map(String::from);
    let (Some(method), Some(path)) = (words.next(), words.next()) else { return };
    let headers = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_lowercase(), value.trim().to_string()))
        })
        .collect();
    let request = Request { method, path, headers };
    log.lock().unwrap().push(request.clone());
    let reply = answer(&request);
    let mut head = format!("HTTP/1.1 {} Told\r\nConnection: close\r\n", reply.status);
    if !reply.headers.iter().any(|(name, _)| *name == "Content-Length") {
        head += &format!("Content-Length: {}\r\n", reply.body.len());
    }
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let mut bytes = format!("{head}\r\n").into_bytes();
    if request.method != "HEAD" {
        bytes.extend(&reply.body[..reply.cut.unwrap_or(reply.body.len())]);
    }
    // Whoever asked may be gone.
    let _ = stream.write_all(&bytes);
}

/// A file on the hub.
#[derive(Clone, Debug)]
pub struct Blob {
    pub bytes: Vec<u8>,
    pub etag: String,
    /// Whether its bytes come from another server, as big files do.
    pub elsewhere: bool,
}

/// `elsewhere`, and what is asked of it first.
type Hook = Box<dyn FnMut(&Request) -> Option<Reply> + Send>;

#[derive(Default)]
struct State {
    name: String,
    refs: BTreeMap<String, String>,
    commits: BTreeMap<String, BTreeMap<String, Blob>>,
    elsewhere: String,
    hook: Option<Hook>,
}

/// A hub with one repository, and the other server that keeps big files.
pub struct Hub {
    state: Arc<Mutex<State>>,
    pub hub: Server,
    pub elsewhere: Server,
}

impl Hub {
    pub fn new(name: &str) -> Hub {
        let state = Arc::new(Mutex::new(State { name: name.into(), ..State::default() }));
        let (one, two) = (state.clone(), state.clone());
        let hub = Server::start(move |request| one.lock().unwrap().answer(request));
        let elsewhere = Server::start(move |request| two.lock().unwrap().answer(request));
        state.lock().unwrap().elsewhere = elsewhere.url();
        Hub { state, hub, elsewhere }
    }

    pub fn url(&self) -> String {
        self.hub.url()
    }

    /// Puts a commit on a branch.
    pub fn commit(&self, branch: &str, commit: &str, files: Vec<(&str, Blob)>) {
        let files = files.into_iter().map(|(name, blob)| (name.to_string(), blob)).collect();
        let mut state = self.state.lock().unwrap();
        state.refs.insert(branch.into(), commit.into());
        state.commits.insert(commit.into(), files);
    }

    /// Lets `hook` answer first, on both servers.
    pub fn hook(&self, hook: impl FnMut(&Request) -> Option<Reply> + Send + 'static) {
        self.state.lock().unwrap().hook = Some(Box::new(hook));
    }

    /// `GET path` and so on, of both servers since the last call; paths without commits.
    pub fn asked(&self) -> Vec<String> {
        let short = |r: Request| {
            let path = r.path.split("/resolve/").map(|p| p.split_once('/').map_or(p, |p| p.1));
            let path: Vec<&str> = path.collect();
            match &path[..] {
                [_, file] => format!("{} {file}", r.method),
                _ => format!("{} {}", r.method, r.path),
            }
        };
        let mut asked: Vec<String> =
            self.hub.asked().into_iter().chain(self.elsewhere.asked()).map(short).collect();
        asked.sort();
        asked
    }
}

impl State {
    fn answer(&mut self, request: &Request) -> Reply {
        if let Some(reply) = self.hook.as_mut().and_then(|hook| hook(request)) {
            return reply;
        }
        let path = request.path.replace("%2F", "/");
        let missing = |code: &str| Reply::status(404).with("X-Error-Code", code);
        if path.starts_with("/api/models?search=") {
            return Reply::text(format!("[{{\"id\": \"{}\"}}]", self.name));
        }
        let api = format!("/api/models/{}/", self.name);
        if let Some(rest) = path.strip_prefix(&api) {
            return match rest.strip_prefix("revision/") {
                Some(revision) => self.listing(revision),
                None => self.revisions(),
            };
        }
        if let Some(etag) = path.strip_prefix("/bytes/") {
            let blob = self.commits.values().flat_map(|files| files.values());
            let blob = blob.into_iter().find(|blob| blob.etag == etag);
            return blob.map_or(missing("EntryNotFound"), |blob| ranged(blob, request));
        }
        let file = path
            .strip_prefix(&format!("/{}/resolve/", self.name))
            .and_then(|rest| rest.split_once('/'))
            .and_then(|(commit, file)| Some((commit, self.commits.get(commit)?.get(file)?)));
        match file {
            Some((commit, blob)) if blob.elsewhere => Reply::status(302)
                .with("Location", format!("{}/bytes/{}", self.elsewhere, blob.etag))
                .with("X-Repo-Commit", commit)
                .with("X-Linked-Etag", format!("\"{}\"", blob.etag))
                .with("X-Linked-Size", blob.bytes.len().to_string()),
            Some((commit, blob)) => ranged(blob, request).with("X-Repo-Commit", commit),
            None if path.starts_with(&format!("/{}/", self.name)) => missing("EntryNotFound"),
            None => missing("RepoNotFound"),
        }
    }

    fn listing(&self, revision: &str) -> Reply {
        let commit = self.refs.get(revision).map_or(revision, String::as_str);
        let Some(files) = self.commits.get(commit) else {
            return Reply::status(404).with("X-Error-Code", "RevisionNotFound");
        };
        let files = files.keys().map(|name| format!("{{\"rfilename\": {name:?}}}"));
        let files = files.collect::<Vec<_>>().join(", ");
        Reply::text(format!("{{\"sha\": \"{commit}\", \"siblings\": [{files}]}}"))
    }

    fn revisions(&self) -> Reply {
        let names = self.refs.keys().map(|name| format!("{{\"name\": {name:?}}}"));
        let names = names.collect::<Vec<_>>().join(", ");
        Reply::text(format!("{{\"branches\": [{names}], \"tags\": []}}"))
    }
}

/// The bytes, or those from where the request wants them.
fn ranged(blob: &Blob, request: &Request) -> Reply {
    let range = request.headers.get("range").and_then(|r| r.strip_prefix("bytes="));
    let from = range.and_then(|r| r.trim_end_matches('-').parse::<usize>().ok());
    let len = blob.bytes.len();
    let reply = match from {
        Some(from) if from >= len => return Reply::status(416),
        Some(from) => Reply { body: blob.bytes[from..].to_vec(), ..Reply::status(206) }
            .with("Content-Range", format!("bytes {from}-{}/{len}", len - 1)),
        None => Reply { body: blob.bytes.clone(), ..Reply::status(200) },
    };
    reply.with("ETag", format!("\"{}\"", blob.etag))
}
