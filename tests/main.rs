//! The binary from outside, in one test program: fewer links, faster builds.

mod board;
mod browser;
mod cache;
mod crash;
mod damage;
mod docs;
mod errors;
mod export;
mod families;
mod flow;
mod full;
mod generate;
mod gpus;
mod graph;
mod helps;
mod history;
mod hostile;
mod hub;
#[path = "../engine/tests/hub/server.rs"]
mod hub_server;
mod interop;
mod leaders;
mod phases;
mod plain;
mod plans;
mod reference;
mod remote;
mod schema;
mod secrets;
mod slurm;
mod support;
mod tidy;
mod unchanged;
mod verbs;
mod watch;
mod why_table;
