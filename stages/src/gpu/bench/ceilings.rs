//! What the device does at most: a large copy, and a large product through our own path.

use anyhow::Result;
use half::bf16;

use super::sheet::Sheet;
use crate::gpu::decode::copy_bandwidth;
use crate::gpu::gemm::{self, Epilogue, Mat};
use crate::gpu::launch::{Gpu, Slice};

/// The two limits.
#[derive(Clone, Copy, Debug)]
pub struct Ceilings {
    /// Gigabytes (10⁹) a second that a copy within the device reads and writes together.
    pub copy_gb_s: f64,
    /// TFLOP/s of a product of square matrices of bf16.
    pub gemm_tflop_s: f64,
}

impl Ceilings {
    /// Measures both; `tiny` for a device that cannot do much.
    pub fn measure(gpu: &Gpu, tiny: bool) -> Result<Ceilings> {
        let (bytes, side) = if tiny { (1 << 20, 64) } else { (1 << 30, 8192) };
        let copy_gb_s = copy_bandwidth(gpu, bytes)? / 1e9;
        Ok(Ceilings { copy_gb_s, gemm_tflop_s: product(gpu, side)? })
    }
}

fn product(gpu: &Gpu, side: usize) -> Result<f64> {
    let sheet = Sheet::new(gpu);
    let (x, w) = (sheet.half(side * side)?, sheet.half(side * side)?);
    let y = gpu.alloc::<bf16>("a product", side * side)?;
    let mat = |at: Slice<bf16>| Mat::new(at, side);
    let dims = (side, side, side);
    let ms = sheet.time(|| {
        let matrices = (mat(x.all()), mat(y.all()));
        gemm::linear(gpu, "ceiling", dims, matrices, w.all(), (None, Epilogue::None));
    })?;
    Ok(2.0 * (side as f64).powi(3) / ms / 1e9)
}
