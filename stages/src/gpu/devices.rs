//! Which GPUs there are, and why there is none. Always built: without feature `cuda` there are none.

/// What is known of a GPU without using it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// `GPU-…` of the driver.
    pub uuid: String,
    /// Its number among all of the machine.
    pub index: u32,
    /// The product's name.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Bytes of memory.
    pub memory: u64,
}

/// The GPUs that stages can use, or why there are none.
#[cfg(not(feature = "cuda"))]
pub fn devices() -> Result<Vec<Device>, String> {
    Err("this build has no CUDA: build it with `--features cuda`".into())
}

/// Bytes that are free now on the GPU called `uuid`.
#[cfg(not(feature = "cuda"))]
pub fn free_memory(_uuid: &str) -> Result<u64, String> {
    Err("this build has no CUDA".into())
}

#[cfg(feature = "cuda")]
pub use with_driver::{devices, free_memory, present, usable};

#[cfg(feature = "cuda")]
mod with_driver {
    use std::ffi::CStr;

    use cudarc::driver::sys;

    use super::Device;
    use crate::gpu::cuda::ok;

    /// Kernels need bf16 on tensor cores and asynchronous copies: Ampere.
    const LEAST: (u32, u32) = crate::gpu::CAPABILITY;

    /// Whether there is a driver.
    pub fn present() -> Result<(), String> {
        // SAFETY: asks the loader only.
        match unsafe { sys::is_culib_present() } {
            true => Ok(()),
            false => Err("no NVIDIA driver was found (libcuda.so.1)".into()),
        }
    }

    /// The GPUs that stages can use, or why there are none. Makes no context.
    pub fn devices() -> Result<Vec<Device>, String> {
        present()?;
        let mut count = 0;
        // SAFETY: plain calls of the driver.
        unsafe {
            ok(sys::cuInit(0), "the NVIDIA driver cannot be used")?;
            ok(sys::cuDeviceGetCount(&mut count), "GPUs cannot be counted")?;
        }
        let (mut usable, mut refused) = (Vec::new(), Vec::new());
        for index in 0..count {
            match describe(index) {
                Ok(device) => usable.push(device),
                Err(why) => refused.push(why),
            }
        }
        match (usable.is_empty(), refused.is_empty()) {
            (false, _) => Ok(usable),
            (true, false) => Err(refused.join("; ")),
            (true, true) => Err("the NVIDIA driver shows no GPU".into()),
        }
    }

    fn describe(index: i32) -> Result<Device, String> {
        let (mut device, mut uuid, mut memory) = (0, sys::CUuuid { bytes: [0; 16] }, 0);
        // SAFETY: plain calls of the driver with room for their answers.
        unsafe {
            ok(sys::cuDeviceGet(&mut device, index), "cuDeviceGet")?;
            ok(sys::cuDeviceGetUuid_v2(&mut uuid, device), "cuDeviceGetUuid")?;
            ok(sys::cuDeviceTotalMem_v2(&mut memory, device), "cuDeviceTotalMem")?;
        }
        let name = usable(device)?;
        let hex: Vec<String> = uuid.bytes.iter().map(|b| format!("{:02x}", *b as u8)).collect();
        let part = |range: std::ops::Range<usize>| hex[range].concat();
        let parts = [part(0..4), part(4..6), part(6..8), part(8..10), part(10..16)];
        Ok(Device {
            uuid: format!("GPU-{}", parts.join("-")),
            index: index as u32,
            name,
            capability: capability(device)?,
            memory: memory as u64,
        })
    }

    fn capability(device: sys::CUdevice) -> Result<(u32, u32), String> {
        use sys::CUdevice_attribute as Name;
        let get = |name| {
            let mut value = 0;
            // SAFETY: has room for the answer.
            let status = unsafe { sys::cuDeviceGetAttribute(&mut value, name, device) };
            ok(status, "cuDeviceGetAttribute").map(|()| value as u32)
        };
        Ok((
            get(Name::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            get(Name::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ))
    }

    /// The name of `device`, or why it cannot be used.
    pub fn usable(device: sys::CUdevice) -> Result<String, String> {
        let mut name = [0; 256];
        // SAFETY: has room for 256 bytes, the last of which stays 0.
        let status = unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), 255, device) };
        ok(status, "cuDeviceGetName")?;
        // SAFETY: ends with 0.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let (major, minor) = capability(device)?;
        if (major, minor) < LEAST {
            let (a, b) = LEAST;
            return Err(format!(
                "{name} has compute capability {major}.{minor}, but kernels need {a}.{b} (Ampere \
                 or newer)"
            ));
        }
        Ok(name)
    }

    /// Bytes that are free now on the GPU called `uuid`; makes a context there for a moment.
    pub fn free_memory(uuid: &str) -> Result<u64, String> {
        let found = devices()?.into_iter().find(|device| device.uuid == uuid);
        let found = found.ok_or_else(|| format!("there is no GPU {uuid}"))?;
        let (mut device, mut context) = (0, std::ptr::null_mut());
        let (mut free, mut all) = (0, 0);
        // SAFETY: plain calls of the driver; the context is given back.
        unsafe {
            ok(sys::cuDeviceGet(&mut device, found.index as i32), "cuDeviceGet")?;
            ok(sys::cuDevicePrimaryCtxRetain(&mut context, device), "a context")?;
            let result = ok(sys::cuCtxPushCurrent_v2(context), "a context")
                .and_then(|()| ok(sys::cuMemGetInfo_v2(&mut free, &mut all), "cuMemGetInfo"));
            sys::cuCtxPopCurrent_v2(&mut context);
            sys::cuDevicePrimaryCtxRelease_v2(device);
            result?;
        }
        Ok(free as u64)
    }
}
