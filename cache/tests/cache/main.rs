//! The cache from outside: through its public functions, over processes and crashes.

mod access;
mod acts;
mod claim;
mod classes;
mod crash;
mod files;
mod gc;
mod gc_beside;
mod gc_plan;
mod hostile;
mod index;
mod leases;
mod loss;
mod model;
mod orphan;
mod parts;
mod result;
mod scrub;
mod single;
mod soak;
mod story;
mod support;
