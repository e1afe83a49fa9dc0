//! The cache from outside: through its public functions, over processes and crashes.

mod claim;
mod crash;
mod files;
mod gc;
mod gc_beside;
mod gc_plan;
mod index;
mod model;
mod parts;
mod result;
mod scrub;
mod support;
