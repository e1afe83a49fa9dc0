//! What can go wrong with a remote, in words for people. Knows no store.

use crate::digest::Digest;
use crate::error::Error;

/// Why something was not done. None of these makes a result wrong; no text holds a credential.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// What the user says of the remote cannot be.
    #[error("{0}")]
    Settings(String),
    /// No answer, a broken one, or one that says "later".
    #[error("the remote `{remote}` cannot be used now: {why}")]
    Unavailable { remote: String, why: String },
    /// It answers and says no.
    #[error("the remote `{remote}` refuses: {why}")]
    Refused { remote: String, why: String },
    /// It does not have bytes that an entry names. Whoever made them can make them again.
    #[error("the remote `{remote}` does not have the bytes of `{digest}`")]
    Missing { remote: String, digest: Digest },
    /// Bytes came, twice, that are not what they are called. They are not used.
    #[error("the remote `{remote}` has damaged bytes under `{digest}`: {what}")]
    Damaged { remote: String, digest: Digest, what: String },
    /// Bytes to be pushed are neither here nor there.
    #[error("the bytes of `{digest}` are not in the cache: there is nothing to push")]
    Lost { digest: Digest },
    /// Something with this machine's own files.
    #[error(transparent)]
    Local(#[from] Error),
    /// The caller said so.
    #[error("stopped")]
    Cancelled,
}
