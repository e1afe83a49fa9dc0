//! Documents and tokens on disk: readers, token shards, the sample text. Knows no model.

pub mod corpus;
pub mod document;
pub mod random;
pub mod read;
pub mod sample;
pub mod separator;
pub mod shard;
