//! Runs on a real Slurm of this machine, where `PIPE_TEST_SLURM` names the script that starts one.

#![allow(clippy::print_stdout)] // what is skipped, and with which seed, is said

mod chaos;
mod cluster;
mod leaders;
mod load;
mod remote;
mod steps;
mod store;
