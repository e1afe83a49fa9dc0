//! NVIDIA GPUs.

mod offered;

pub use offered::{CAPABILITY, offered};
