//! Bytes and digests: results by key, bytes by digest, on one directory that all pipelines of a
//! user share. Knows no steps, no YAML, no devices.
//!
//! ```text
//! <root>/                  the user's alone (0700), or a group's (02770)
//!   version                the layout's
//!   entries/aa/<key>       truth: one sealed text a key, created once by a link that never replaces
//!   objects/aa/<digest>    read-only files and directories, whole or absent
//!   recipes/aa/<digest>    of which objects a file of tensors consists
//!   attempts/<key>/<id>/   private to one try: lock, attempt.json, checkpoints/<position>/, files
//!   locks/aa/<key>         who works on the key; a kernel lock that ends with its process
//!   leases/<name>          what a running process uses; its lock ends with the process
//!   lives/<process>        on a network's file system: who lives, and so whose locks count
//!   pins/<key>             what stays whatever is collected, and why
//!   divergences/<key>/     results that differ from the entry, as evidence
//!   runs/                  the engine's records
//!   delivered/             the engine's marks of what it wrote outside
//!   index/                 SQLite, and memos of runs; copies, to be deleted at will
//!   uploads/<remote>/      what is on its way to a remote, or did not get there
//!   staging/ trash/        not yet, and no more
//! ```
//!
//! A result's life: [`Cache::claim`], [`Cache::attempt`], [`Attempt::absorb`], [`Attempt::finish`],
//! [`Committer::publish`]; afterwards [`Cache::lookup`] gives its [`Entry`]. Bytes are durable
//! before the entry that names them; the entry before its row in the index.

mod access;
mod attempt;
mod bytes;
mod bytes_of;
mod cache;
pub mod checkpoint;
mod claim;
mod commit;
pub mod crash;
mod digest;
pub mod disk;
mod entry;
mod error;
pub mod gc;
mod index;
mod layout;
mod lease;
mod leased;
mod leftovers;
mod lives;
mod loss;
mod memo;
mod nearby;
mod parts;
mod patch;
mod pins;
mod place;
mod recall;
mod recipe;
mod reindex;
pub mod remote;
mod scrub;
mod sealed;
mod spares;
mod stat;
mod store;
mod sums;
mod tree;

pub use attempt::{Attempt, Finished};
pub use cache::{Cache, Reader};
pub use claim::{Claim, Claimed, Holder};
pub use commit::{Committer, Publication, Published};
pub use digest::{Digest, Key, hash_file};
pub use entry::{Entry, Output};
pub use error::{Error, Result};
pub use lease::{Lease, Presence};
pub use lives::{Times, set_times};
pub use memo::{Carried, Hit, Memo};
pub use parts::Pieces;
pub use pins::Pin;
pub use place::{Locks, set_index_home, set_locks};
pub use recall::Recalled;
pub use recipe::{Item, Part, Recipe};
pub use reindex::Reindexed;
pub use scrub::{Damage, Scrubbed};
pub use stat::Stamp;
pub use tree::{Kind, hash_path};
