//! Remote caches: a bucket of an object store, or a directory, that several machines fill and read.
//! The local cache stays what results are used from; a remote saves work and never decides.
//!
//! ```no_run
//! use std::sync::atomic::AtomicBool;
//! use cache::{Cache, Key};
//! use cache::remote::{Found, Progress, Remote, Settings, Trust, artifacts};
//!
//! # fn example(cache: &Cache, key: &Key) -> Result<(), cache::remote::Trouble> {
//! let mut settings = Settings::new("s3://team/pipe");
//! settings.trust = Trust::Writers;
//! let remote = Remote::open(settings, &|name| std::env::var_os(name))?;
//! let cancel = AtomicBool::new(false);
//! match remote.find(cache, key) {
//!     Found::Hit(entry) => {
//!         let fetched = remote.fetch(cache, &artifacts(&entry), &Progress::new(), &cancel)?;
//!         println!("{} bytes came", fetched.bytes);
//!     }
//!     Found::Miss => {} // run the step, publish, and then:
//!     Found::Rejected(why) | Found::Unavailable(why) => println!("not used: {why}"),
//! }
//! if let Some(entry) = cache.lookup(key)? {
//!     let sent = remote.push(cache, &entry, &Progress::new(), &cancel)?;
//!     println!("{} bytes went", sent.bytes);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! What a remote holds is in `layout.rs`. What is believed of it: of bytes nothing, they are
//! compared with their digest; of an entry only that of writers who are trusted ([`Trust`]); of a
//! recipe nothing but a way to bytes that are compared as a whole. What it costs when it is slow,
//! dead or hangs is bounded ([`Timeouts`]), and after some failures in a row it is left alone for a
//! while. A transfer that breaks goes on where it was, also in another process.
//!
//! All functions block; a small runtime of two threads works below, and at most 64 MiB of objects
//! are in memory. Nothing here reads the process's environment, but for the usual names of proxies,
//! which the HTTP library does: the caller hands in a function that gives variables.

mod address;
mod artifact;
mod assemble;
mod below;
mod blob;
mod breaker;
mod buffers;
mod credentials;
mod directory;
mod envelope;
mod fetch;
mod find;
mod inner;
mod journal;
mod layout;
mod lease;
mod notes;
mod objects;
mod patience;
mod probe;
mod profile;
mod progress;
mod push;
mod secrets;
mod send;
mod settings;
mod signature;
mod subtree;
mod transport;
mod trouble;
mod upload;
mod uploader;
mod watch;

pub use artifact::artifacts;
pub use fetch::Fetched;
pub use find::Found;
pub use inner::Remote;
pub use lease::{Lease, LeaseHolder, Leased};
pub use notes::Notes;
pub use probe::{Probed, nonce};
pub use progress::Progress;
pub use push::Sent;
pub use settings::{Settings, Timeouts, Trust};
pub use signature::{PublicKey, SigningKey};
pub use transport::{Body, Fault, Piece, Put, Transport, Upload};
pub use trouble::Trouble;
pub use uploader::{Totals, Uploader};
