//! What a caller says of a remote: where, whom to believe, how long to wait. Knows no store.

use std::time::Duration;

use crate::remote::signature::{PublicKey, SigningKey};

/// A remote as its user wants it.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `s3://bucket/prefix`, `gs://…`, `az://…`, `file:///…` or the path of a directory.
    pub url: String,
    pub trust: Trust,
    /// Signs entries that are pushed.
    pub sign_with: Option<SigningKey>,
    pub timeouts: Timeouts,
}

/// Whose entries are believed. Bytes never are: they are compared with their digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// Of everybody who can write to the remote.
    Writers,
    /// Those that one of these keys has signed.
    Keys(Vec<PublicKey>),
}

/// How long is waited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeouts {
    /// For a connection.
    pub connect: Duration,
    /// For the answer to a request without a large body.
    pub reply: Duration,
    /// While no byte moves of a body on its way.
    pub stall: Duration,
    /// For all of [`find`](crate::remote::Remote::find) and each step of a lease.
    pub find: Duration,
    /// How long a transfer tries on while nothing succeeds.
    pub patience: Duration,
    /// How long a remote is left alone at first once it counts as down.
    pub pause: Duration,
    /// And at most, however long it has been down.
    pub longest_pause: Duration,
    /// How often the holder of a lease says that it lives; after three of these without a word it
    /// is taken for dead.
    pub heartbeat: Duration,
}

impl Settings {
    /// A remote at `url` that nobody is believed of, with the usual time-outs.
    pub fn new(url: impl Into<String>) -> Settings {
        let (url, trust) = (url.into(), Trust::Keys(Vec::new()));
        Settings { url, trust, sign_with: None, timeouts: Timeouts::default() }
    }
}

impl Default for Timeouts {
    fn default() -> Timeouts {
        Timeouts {
            connect: Duration::from_secs(3),
            reply: Duration::from_secs(5),
            stall: Duration::from_secs(10),
            find: Duration::from_secs(10),
            patience: Duration::from_secs(20),
            pause: Duration::from_secs(30),
            longest_pause: Duration::from_secs(600),
            heartbeat: Duration::from_secs(10),
        }
    }
}
