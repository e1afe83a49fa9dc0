//! Workers as processes: what they are started with, how they die, and what they leave behind.
//!
//! The workers are this binary too: its test `serve`, with the store as the last argument.

mod checkpoints;
mod early;
mod faults;
mod gpus;
mod toys;

use std::path::PathBuf;

#[test]
fn serve() {
    let store = std::env::args().next_back().map(PathBuf::from).unwrap_or_default();
    if store.join("objects").is_dir() {
        engine::worker::main(&store, toys::REGISTRY, toys::BUILD).unwrap();
    }
}
