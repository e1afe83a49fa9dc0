//! The GPUs of this machine as the engine takes them: data, and a question for free memory.

use engine::gpu::Gpus;

/// Least compute capability: kernels need bf16 on tensor cores and asynchronous copies.
pub const CAPABILITY: (u32, u32) = (8, 0);

/// The GPUs that stages can compute on and CUDA_VISIBLE_DEVICES leaves (the driver reads it), or why
/// there is none.
pub fn offered() -> Gpus {
    Gpus::none("this build has no CUDA")
}
