//! The cache from outside: through its public functions, over processes and crashes.

mod access;
mod claim;
mod classes;
mod crash;
mod files;
mod gc;
mod gc_beside;
mod gc_plan;
mod hostile;
mod index;
mod model;
mod parts;
mod result;
mod scrub;
mod support;
