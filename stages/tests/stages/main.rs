//! The stages from outside, in one test program: fewer links, faster builds.

mod cache_teacher;
mod data;
mod evaluate;
mod model;
mod phases;
mod pretrain;
mod reference;
mod registry;
mod versions;
