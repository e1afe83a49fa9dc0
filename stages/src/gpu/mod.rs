//! Stages on an NVIDIA GPU: a model's blocks over device memory, with kernels of `kernels/*.cu` and
//! products of cublasLt. bf16 activations and weights, f32 master weights, sums and losses.
//!
//! ```text
//! launch    memory, kernels by name, graphs      devices  which GPUs there are
//! cuda      the driver, cublas its products      emulator the same kernels on the CPU, for tests
//! ops/      one file an op: checks sizes, launches
//! bench/    what the device can do, and how much of it ops and phases get
//! ```
//!
//! The f32 code in [`crate::ops`] and [`crate::models`] is the slow twin of everything here, and
//! tests compare them.

#[cfg(any(feature = "cuda", feature = "emulate"))]
pub mod batch;
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub mod bench;
#[cfg(feature = "cuda")]
mod cublas;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub mod decode;
pub mod devices;
#[cfg(feature = "emulate")]
pub mod emulator;
pub mod fault;
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub mod gemm;
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub mod launch;
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub mod learners;
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub mod model;
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub mod ops;
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub mod phases;
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub mod weights;

mod offered;

pub use devices::{Device, devices, free_memory};
pub use offered::{CAPABILITY, offered};

/// Opens the first GPU that `CUDA_VISIBLE_DEVICES` leaves; in a build without CUDA, the emulator.
#[cfg(any(feature = "cuda", feature = "emulate"))]
pub fn open() -> anyhow::Result<launch::Gpu> {
    #[cfg(feature = "cuda")]
    let backend = cuda::Cuda::open(0).map_err(anyhow::Error::msg)?;
    #[cfg(not(feature = "cuda"))]
    let backend = emulator::Emulator::new(false);
    Ok(launch::Gpu::new(Box::new(backend)))
}
