//! Remote caches from outside: over a directory, over a store in memory with faults, over a real
//! S3 server.

mod crash;
mod damage;
mod exchange;
mod faults;
mod hostile;
mod lease;
mod made;
mod memory;
mod s3;
mod secrets;
#[expect(dead_code, reason = "shared with the tests of the cache")]
#[path = "../cache/support.rs"]
mod support;
mod trust;
mod uploader;
