//! The HTTP client below object stores: sees every answer, and gives up on one that stalls. Knows
//! no objects.
//!
//! A request may take as long as it likes while bytes move. An upload is counted as its body is
//! taken by the connection; an answer, as it is read. What an answer said is kept for whoever asked
//! ([`seen`]), since the errors of the store's library do not tell it.

use std::cell::RefCell;
use std::error::Error as _;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpRequestBody,
    HttpResponse, HttpResponseBody, HttpService,
};
use object_store::{ClientConfigKey, ClientOptions};
use reqwest::redirect::Policy;
use tokio::time::{Instant, Sleep, sleep, timeout};

use crate::remote::Timeouts;

/// Of an answer that says no, so much is read.
const LARGEST_REFUSAL: usize = 64 << 10;

/// What became of the last request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seen {
    /// An answer: its status and, when it says no, the code in its text.
    Answer(u16, Option<String>),
    /// None, or a broken one.
    Broken(String),
}

tokio::task_local! {
    static SEEN: RefCell<Option<Seen>>;
}

/// Does `work` and says what its last request came to.
pub(super) async fn seen<T>(work: impl Future<Output = T>) -> (T, Option<Seen>) {
    SEEN.scope(RefCell::new(None), async {
        let done = work.await;
        (done, SEEN.with(RefCell::take))
    })
    .await
}

fn note(seen: Seen) {
    let _ = SEEN.try_with(|slot| slot.replace(Some(seen)));
}

/// Makes clients for object stores.
#[derive(Debug)]
pub(super) struct Connector {
    client: reqwest::Client,
    timeouts: Timeouts,
}

impl Connector {
    /// `roots`: certificates (PEM) to believe beside the system's.
    pub fn new(timeouts: Timeouts, roots: Option<&[u8]>) -> Result<Connector, String> {
        // Another part of the process may have chosen it already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = reqwest::Client::builder()
            .connect_timeout(timeouts.connect)
            .redirect(Policy::none())
            .tcp_nodelay(true)
            .http1_only()
            .user_agent(concat!("pipe/", env!("CARGO_PKG_VERSION")));
        if let Some(pem) = roots {
            let found = reqwest::Certificate::from_pem_bundle(pem)
                .map_err(|_| "it holds no certificates (PEM)".to_string())?;
            for certificate in found {
                builder = builder.add_root_certificate(certificate);
            }
        }
        let client = builder.build().map_err(|e| innermost(&e))?;
        Ok(Connector { client, timeouts })
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let plain = options.get_config_value(&ClientConfigKey::AllowHttp);
        let plain = plain.is_some_and(|v| v == "true");
        let (client, timeouts) = (self.client.clone(), self.timeouts.clone());
        Ok(HttpClient::new(Watched { client, timeouts, plain }))
    }
}

#[derive(Debug)]
struct Watched {
    client: reqwest::Client,
    timeouts: Timeouts,
    /// Whether `http` is allowed beside `https`.
    plain: bool,
}

#[async_trait]
impl HttpService for Watched {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let result = self.send(request).await;
        match &result {
            Err((_, why)) => note(Seen::Broken(why.clone())),
            Ok(answer) if answer.status().is_success() => {
                note(Seen::Answer(answer.status().as_u16(), None));
            }
            Ok(_) => {}
        }
        result.map_err(|(kind, why)| failure(kind, why))
    }
}

impl Watched {
    async fn send(&self, request: HttpRequest) -> Result<HttpResponse, (HttpErrorKind, String)> {
        let (parts, body) = request.into_parts();
        let unknown = |why: String| (HttpErrorKind::Unknown, why);
        let url: reqwest::Url =
            parts.uri.to_string().parse().map_err(|_| unknown("its address is no URL".into()))?;
        if url.scheme() != "https" && !self.plain {
            return Err(unknown("plain HTTP is not allowed here".to_string()));
        }
        // The last step of an upload in parts: the store puts them together before it answers.
        let long = parts.method == "POST" && body.content_length() > 0;
        let moved = Arc::new(AtomicU64::new(0));
        let mut request = reqwest::Request::new(parts.method, url);
        *request.headers_mut() = parts.headers;
        let large = body.content_length() > 0 && body.as_bytes().is_none();
        *request.body_mut() = Some(match body.as_bytes() {
            Some(bytes) => bytes.clone().into(),
            None if large => reqwest::Body::wrap(Counted { body, moved: moved.clone() }),
            None => Bytes::new().into(),
        });
        let limit = match (long, large) {
            (true, _) => self.timeouts.stall * 4,
            (_, true) => self.timeouts.stall,
            _ => self.timeouts.reply,
        };
        let answer = self.client.execute(request);
        let answer = watched(answer, &moved, limit).await?.map_err(|e| broken(&e))?;
        self.open(answer).await
    }

    /// Notes a refusal; gives the body of anything else a limit.
    async fn open(
        &self,
        answer: reqwest::Response,
    ) -> Result<HttpResponse, (HttpErrorKind, String)> {
        let status = answer.status();
        let (parts, body) = http::Response::from(answer).into_parts();
        let body = Stalling::new(body, self.timeouts.stall);
        if status.is_success() {
            return Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(body)));
        }
        let text = read(body, LARGEST_REFUSAL).await;
        note(Seen::Answer(status.as_u16(), code(&text)));
        Ok(HttpResponse::from_parts(parts, text.into()))
    }
}

/// Waits for an answer as long as bytes go out.
async fn watched<T>(
    answer: impl Future<Output = T>,
    moved: &AtomicU64,
    limit: Duration,
) -> Result<T, (HttpErrorKind, String)> {
    tokio::pin!(answer);
    let mut before = 0;
    loop {
        if let Ok(answer) = timeout(limit, &mut answer).await {
            return Ok(answer);
        }
        let now = moved.load(Ordering::Relaxed);
        if now == before {
            return Err((HttpErrorKind::Timeout, silent(limit)));
        }
        before = now;
    }
}

fn silent(limit: Duration) -> String {
    format!("no answer in {} s", limit.as_secs_f32())
}

/// The start of a body; whatever could be read.
async fn read(mut body: Stalling, limit: usize) -> Vec<u8> {
    let mut text = Vec::new();
    while text.len() < limit {
        let next = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
        let Some(Ok(frame)) = next else { break };
        text.extend(frame.into_data().unwrap_or_default());
    }
    text
}

/// The code in a refusal: `<Code>…</Code>` of S3, GCS and Azure.
fn code(text: &[u8]) -> Option<String> {
    let text = str::from_utf8(text).ok()?;
    let (_, rest) = text.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    let plain = code.len() <= 60 && code.bytes().all(|b| b.is_ascii_alphanumeric());
    plain.then(|| code.to_string())
}

fn broken(error: &reqwest::Error) -> (HttpErrorKind, String) {
    let kind = if error.is_timeout() {
        HttpErrorKind::Timeout
    } else if error.is_connect() {
        HttpErrorKind::Connect
    } else {
        HttpErrorKind::Interrupted
    };
    let why = innermost(error);
    match kind {
        HttpErrorKind::Connect => (kind, format!("no connection: {why}")),
        HttpErrorKind::Timeout => (kind, "no connection in time".to_string()),
        _ => (kind, format!("the connection broke: {why}")),
    }
}

/// The cause below all others, which names no URL.
fn innermost(error: &reqwest::Error) -> String {
    let Some(mut cause) = error.source() else {
        return if error.is_timeout() { "time-out" } else { "no cause is known" }.to_string();
    };
    while let Some(below) = cause.source() {
        cause = below;
    }
    cause.to_string()
}

fn failure(kind: HttpErrorKind, why: String) -> HttpError {
    HttpError::new(kind, std::io::Error::other(why))
}

/// A request's body that counts what is taken of it.
#[derive(Debug)]
struct Counted {
    body: HttpRequestBody,
    moved: Arc<AtomicU64>,
}

impl Body for Counted {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        self.moved.fetch_add(1, Ordering::Relaxed);
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body that fails when nothing comes for a while.
struct Stalling {
    body: reqwest::Body,
    limit: Duration,
    timer: Pin<Box<Sleep>>,
}

impl Stalling {
    fn new(body: reqwest::Body, limit: Duration) -> Stalling {
        Stalling { body, limit, timer: Box::pin(sleep(limit)) }
    }
}

impl Body for Stalling {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        let limit = self.limit;
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            self.timer.as_mut().reset(Instant::now() + limit);
            return Poll::Ready(frame.map(|frame| {
                frame.map_err(|error| {
                    let (kind, why) = broken(&error);
                    failure(kind, why)
                })
            }));
        }
        match self.timer.as_mut().poll(cx) {
            Poll::Ready(()) => {
                Poll::Ready(Some(Err(failure(HttpErrorKind::Timeout, silent(limit)))))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
