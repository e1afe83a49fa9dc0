//! The stages from outside, in one test program: fewer links, faster builds.

mod cache_teacher;
mod costs;
mod data;
mod decode;
mod evaluate;
mod formats;
mod formats_random;
mod generate;
mod harness;
mod likelihood;
mod model;
mod packing;
mod phases;
mod pretrain;
mod reference;
mod registry;
mod teacher;
mod tokenizers;
mod versions;
