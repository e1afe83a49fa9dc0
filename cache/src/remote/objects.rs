//! A bucket of an object store as a [`Transport`]. Knows S3, GCS and Azure only through
//! `object_store`; says what went wrong in words of its own, since errors of the library hold
//! URLs and whole answers.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetRange, GetResultPayload, ObjectStore, ObjectStoreExt, PutMode,
    PutOptions, PutPayload,
};

use crate::remote::secrets::Secrets;
use crate::remote::transport::{Body, Fault, Piece, Put, Transport, Upload};
use crate::remote::watch::{Seen, seen};

/// Bodies go out in frames of this size, so that a stall is seen.
const FRAME: usize = 256 << 10;

/// What an object store of the library can do.
pub(super) trait Both: ObjectStore + MultipartStore {}
impl<T: ObjectStore + MultipartStore> Both for T {}

/// The objects below a prefix.
pub(super) struct Objects {
    store: Arc<dyn Both>,
    prefix: String,
    secrets: Secrets,
}

impl Objects {
    pub fn new(store: Arc<dyn Both>, prefix: String, secrets: Secrets) -> Objects {
        Objects { store, prefix, secrets }
    }

    fn path(&self, name: &str) -> Path {
        Path::from_iter(self.prefix.split('/').chain(name.split('/')))
    }

    /// Does one request and puts what went wrong in words.
    async fn ask<T>(
        &self,
        work: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, Fault> {
        let (result, answer) = seen(work).await;
        result.map_err(|error| self.fault(&error, answer))
    }

    fn fault(&self, error: &Error, answer: Option<Seen>) -> Fault {
        match (error, answer) {
            (_, Some(Seen::Answer(_, Some(code)))) if code == "NoSuchBucket" => {
                Fault::Refused("there is no such bucket".to_string())
            }
            (Error::NotFound { .. }, _) => Fault::Absent,
            (Error::AlreadyExists { .. } | Error::Precondition { .. }, _) => Fault::Exists,
            (_, Some(Seen::Answer(status, code))) => refusal(status, code),
            (_, Some(Seen::Broken(why))) => Fault::Down(self.secrets.scrub(why)),
            // Nothing was sent: credentials could not be had, or the request not be made.
            (error, None) => Fault::Refused(self.secrets.scrub(error.to_string())),
        }
    }
}

fn refusal(status: u16, code: Option<String>) -> Fault {
    let code = code.map(|code| format!(" ({code})")).unwrap_or_default();
    let why = format!("it answers {status}{code}");
    match status {
        301 | 302 | 307 | 308 => Fault::Refused(format!(
            "{why}: the bucket is elsewhere\nhint: set AWS_REGION or AWS_ENDPOINT_URL"
        )),
        401 | 403 => Fault::Refused(format!("{why}: the credentials do not give this right")),
        408 | 409 | 425 | 429 | 500.. => Fault::Down(why),
        400..500 => Fault::Refused(why),
        _ => Fault::Down(format!("{why} and something that cannot be read")),
    }
}

impl fmt::Debug for Objects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Objects").field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

#[async_trait]
impl Transport for Objects {
    async fn head(&self, name: &str) -> Result<u64, Fault> {
        Ok(self.ask(self.store.head(&self.path(name))).await?.size)
    }

    async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Body, Fault> {
        let path = self.path(name);
        let options = GetOptions { range: range.map(GetRange::Bounded), ..GetOptions::default() };
        let got = self.ask(self.store.get_opts(&path, options)).await?;
        let size = got.meta.size;
        let GetResultPayload::Stream(stream) = got.payload;
        let secrets = self.secrets.clone();
        let stream = stream
            .map(move |piece| piece.map_err(|error| Fault::Down(secrets.scrub(innermost(&error)))));
        Ok(Body { size, stream: stream.boxed() })
    }

    async fn put(&self, name: &str, bytes: Bytes, put: Put) -> Result<(), Fault> {
        let mode = match put {
            Put::Over => PutMode::Overwrite,
            Put::New => PutMode::Create,
        };
        let options = PutOptions::from(mode);
        let path = self.path(name);
        match self.ask(self.store.put_opts(&path, framed(&bytes), options)).await {
            Ok(_) => Ok(()),
            // Of a plain put it means that somebody else is putting the same.
            Err(Fault::Exists) if put == Put::Over => Err(refusal(409, None)),
            Err(fault) => Err(fault),
        }
    }

    async fn delete(&self, name: &str) -> Result<(), Fault> {
        match self.ask(self.store.delete(&self.path(name))).await {
            Err(Fault::Absent) => Ok(()),
            result => result,
        }
    }

    async fn list(&self, dir: &str) -> Result<Vec<String>, Fault> {
        let (root, below) = (Path::from_iter(self.prefix.split('/')), self.path(dir));
        let listed = match self.ask(self.store.list(Some(&below)).try_collect::<Vec<_>>()).await {
            Err(Fault::Absent) => Vec::new(),
            result => result?,
        };
        let name = |location: &Path| {
            let parts = location.prefix_match(&root)?;
            Some(parts.map(|part| part.as_ref().to_string()).collect::<Vec<_>>().join("/"))
        };
        Ok(listed.iter().filter_map(|meta| name(&meta.location)).collect())
    }

    async fn begin(&self, name: &str) -> Result<String, Fault> {
        self.ask(self.store.create_multipart(&self.path(name))).await
    }

    async fn part(&self, upload: Upload<'_>, part: Piece) -> Result<String, Fault> {
        let (path, id) = (self.path(upload.name), upload.id.to_string());
        let sent = self.store.put_part(&path, &id, part.index, framed(&part.bytes));
        Ok(self.ask(sent).await?.content_id)
    }

    async fn complete(&self, upload: Upload<'_>, parts: Vec<String>) -> Result<(), Fault> {
        let (path, id) = (self.path(upload.name), upload.id.to_string());
        let parts = parts.into_iter().map(|content_id| PartId { content_id }).collect();
        self.ask(self.store.complete_multipart(&path, &id, parts)).await.map(drop)
    }

    async fn abort(&self, upload: Upload<'_>) -> Result<(), Fault> {
        let (path, id) = (self.path(upload.name), upload.id.to_string());
        match self.ask(self.store.abort_multipart(&path, &id)).await {
            Err(Fault::Absent) => Ok(()),
            result => result,
        }
    }
}

fn framed(bytes: &Bytes) -> PutPayload {
    let starts = (0..bytes.len()).step_by(FRAME);
    starts.map(|at| bytes.slice(at..bytes.len().min(at + FRAME))).collect()
}

fn innermost(error: &Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(below) = cause.source() {
        cause = below;
    }
    cause.to_string()
}
