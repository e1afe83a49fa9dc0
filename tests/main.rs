//! The binary from outside, in one test program: fewer links, faster builds.

mod crash;
mod damage;
mod errors;
mod export;
mod families;
mod flow;
mod full;
mod generate;
mod gpus;
mod hostile;
mod hub;
#[path = "../engine/tests/hub/server.rs"]
mod hub_server;
mod phases;
mod secrets;
mod support;
mod tidy;
mod verbs;
