//! The GPUs of this machine that stages can compute on, as the engine wants to know them.
//!
//! Knows no pipeline. The build without CUDA has none, and says so.

use std::sync::Arc;

use engine::gpu::{Gpu, Gpus};

/// The least compute capability that the kernels are made for: bf16 on tensor cores and asynchronous
/// copies (Ampere).
pub const CAPABILITY: (u32, u32) = (8, 0);

/// The GPUs that stages of this build can use on this machine, or why there is none.
pub fn offered() -> Gpus {
    match super::devices() {
        Err(why) => Gpus::none(why),
        Ok(list) => {
            let list = list.into_iter().map(described).collect();
            Gpus { list, ..Gpus::none(String::new()) }
        }
    }
}

fn described(device: super::Device) -> Gpu {
    let uuid = device.uuid.clone();
    Gpu {
        uuid: device.uuid,
        index: device.index,
        name: device.name,
        capability: device.capability,
        memory: device.memory,
        free: Arc::new(move || super::free_memory(&uuid).ok()),
    }
}
