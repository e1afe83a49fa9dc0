//! Kernels and what is made of them against the f32 code of the CPU. Runs on the GPU where there is
//! one (feature `cuda`, with `--test-threads 1`: what one thread does ends another's recording), else
//! on the emulator (feature `emulate`); without either feature there is nothing to test.
#![cfg(any(feature = "cuda", feature = "emulate"))]

mod adamw;
mod attention;
mod bench;
mod cache;
mod cast;
mod conv;
mod cross_entropy;
mod decode;
mod distance;
mod embed;
mod evaluate;
mod gemm;
mod mlp;
mod norm;
mod orient;
mod phases;
mod pretrain;
mod reduce;
mod rope;
mod sample;
mod ssd;
mod support;
mod trouble;
