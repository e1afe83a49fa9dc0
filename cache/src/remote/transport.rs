//! What a remote is made of: objects by name. Knows no digests, no entries, no retries.

use std::fmt;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;

/// Objects by name: a bucket of an object store, a directory, or a test's own.
///
/// Names are `/`-separated and plain. An object is there whole or not at all, and what is put is
/// what is got, as far as a store can be believed: the rest of a remote checks both.
#[async_trait]
pub trait Transport: fmt::Debug + Send + Sync + 'static {
    /// The size of an object in bytes.
    async fn head(&self, name: &str) -> Result<u64, Fault>;

    /// Bytes of an object: those of `range`, or all.
    async fn get(&self, name: &str, range: Option<Range<u64>>) -> Result<Body, Fault>;

    /// Makes an object, over what is there unless `put` says otherwise.
    async fn put(&self, name: &str, bytes: Bytes, put: Put) -> Result<(), Fault>;

    /// Removes an object; one that is not there is no fault.
    async fn delete(&self, name: &str) -> Result<(), Fault>;

    /// Begins an object that comes in parts; gives the upload's id, which outlives this process.
    async fn begin(&self, name: &str) -> Result<String, Fault>;

    /// Sends one part; gives what [`Transport::complete`] wants to know of it. All parts but the
    /// last have the same size.
    async fn part(&self, upload: Upload<'_>, part: Piece) -> Result<String, Fault>;

    /// Makes the object of all its parts.
    async fn complete(&self, upload: Upload<'_>, parts: Vec<String>) -> Result<(), Fault>;

    /// Drops an upload that will not be completed.
    async fn abort(&self, upload: Upload<'_>) -> Result<(), Fault>;

    /// Names of the objects below `dir`, in any order.
    async fn list(&self, dir: &str) -> Result<Vec<String>, Fault> {
        Err(Fault::Refused(format!("it cannot say what is below `{dir}`")))
    }

    /// Removes what killed clients left long ago, where the store does not do so by itself.
    async fn tidy(&self) {}
}

/// An object on its way.
#[derive(Debug, Clone, Copy)]
pub struct Upload<'a> {
    pub name: &'a str,
    pub id: &'a str,
}

/// One part of an upload: which, from where in the object on, and its bytes.
#[derive(Debug, Clone)]
pub struct Piece {
    pub index: usize,
    pub offset: u64,
    pub bytes: Bytes,
}

/// Whether a put may replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    Over,
    /// [`Fault::Exists`] when something has the name. Stores exist that replace it all the same.
    New,
}

/// Bytes on their way.
pub struct Body {
    /// Of the whole object, whatever the range.
    pub size: u64,
    pub stream: BoxStream<'static, Result<Bytes, Fault>>,
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Body").field("size", &self.size).finish_non_exhaustive()
    }
}

/// Why a store did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// There is no such object, or no such upload.
    Absent,
    /// There is one already ([`Put::New`]).
    Exists,
    /// It answers and says no: credentials, rights, quota, a request that it does not take.
    Refused(String),
    /// No answer, a broken one, or one that says "later".
    Down(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Absent => f.write_str("there is no such object"),
            Fault::Exists => f.write_str("there is such an object already"),
            Fault::Refused(why) | Fault::Down(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Fault {}
