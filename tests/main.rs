//! The binary from outside, in one test program: fewer links, faster builds.

mod crash;
mod damage;
mod errors;
mod export;
mod families;
mod flow;
mod generate;
mod gpus;
mod hub;
#[path = "../engine/tests/hub/server.rs"]
mod hub_server;
mod leaders;
mod phases;
mod support;
mod tidy;
mod verbs;
