//! Names of objects in a remote. Knows no content.
//!
//! ```text
//! <prefix>/pipe-remote            the layout's version
//!          entries/aa/<key>       a sealed entry and its signatures
//!          objects/aa/<digest>    plain bytes
//!          recipes/aa/<digest>    of which objects a directory or a split file is made
//!          leases/aa/<key>        who works on a key
//!          jobs/<run>/<note>      what the leader of a run and its jobs tell each other; goes with it
//!          checkpoints/…/         places like this one, for checkpoints of steps that are not done
//!          probes/<nonce>         written and removed by a probe
//! ```

use crate::digest::{Digest, Key};

/// Places of their own.
pub(super) const CHECKPOINTS: &str = "checkpoints";
/// Of all runs.
pub(super) const NOTES: &str = "jobs";
pub(super) const VERSION: &str = "pipe-remote";
pub(super) const VERSION_TEXT: &str = "pipe remote layout 1\n";

pub(super) fn entry(key: &Key) -> String {
    sharded("entries", &key.to_string())
}

pub(super) fn object(digest: &Digest) -> String {
    sharded("objects", &digest.to_string())
}

pub(super) fn recipe(digest: &Digest) -> String {
    sharded("recipes", &digest.to_string())
}

pub(super) fn lease(key: &Key) -> String {
    sharded("leases", &key.to_string())
}

/// Where the notes of a run are.
pub(super) fn notes(run: &str) -> String {
    format!("{NOTES}/{run}")
}

pub(super) fn note(run: &str, name: &str) -> String {
    format!("{NOTES}/{run}/{name}")
}

pub(super) fn probe(nonce: &str) -> String {
    format!("probes/{nonce}")
}

fn sharded(dir: &str, name: &str) -> String {
    format!("{dir}/{}/{name}", &name[..2])
}
