//! What goes wrong on a device: the engine's own errors.

pub use engine::stage::{DeviceFault, OutOfDeviceMemory};
