//! The binary from outside, in one test program: fewer links, faster builds.

mod crash;
mod errors;
mod flow;
mod phases;
mod support;
mod tidy;
mod verbs;
