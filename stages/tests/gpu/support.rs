//! Devices to test on, random values, and comparison.

use half::bf16;
use stages::gpu::launch::{Buf, Gpu, Slice};
use stages::train::philox::Philox;

/// The devices to test on: the GPU, or the emulator in all its orders.
pub fn devices() -> Vec<Gpu> {
    #[cfg(feature = "cuda")]
    return vec![Gpu::new(Box::new(stages::gpu::cuda::Cuda::open(0).expect("a GPU")))];
    #[cfg(all(feature = "emulate", not(feature = "cuda")))]
    {
        use stages::gpu::emulator::Emulator;
        (0..Emulator::ORDERS).map(|order| Gpu::new(Box::new(Emulator::ordered(order)))).collect()
    }
}

/// `len` normal values of deviation `scale`, as bf16 holds them.
pub fn normal(seed: u64, len: usize, scale: f32) -> Vec<f32> {
    let mut values = vec![0.0; len];
    Philox::new(seed, "test").fill_normal(scale, &mut values);
    values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect()
}

/// As bf16 on the device.
pub fn half(gpu: &Gpu, values: &[f32]) -> Buf<bf16> {
    let values: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
    gpu.buf("test", &values).unwrap()
}

/// f32 on the device.
pub fn full(gpu: &Gpu, values: &[f32]) -> Buf<f32> {
    gpu.buf("test", values).unwrap()
}

/// Room full of NaN.
pub fn poison<T>(gpu: &Gpu, len: usize) -> Buf<T> {
    let buf = gpu.alloc("test", len).unwrap();
    gpu.fill(buf.all(), 0xff);
    buf
}

/// Back as f32.
pub fn read(gpu: &Gpu, from: Slice<bf16>) -> Vec<f32> {
    gpu.download(from).unwrap().iter().map(|v| v.to_f32()).collect()
}

/// Back from f32.
pub fn read_full(gpu: &Gpu, from: Slice<f32>) -> Vec<f32> {
    gpu.download(from).unwrap()
}

/// Fails unless `got` is `wanted` within `tolerance` times its root mean square, everywhere.
#[track_caller]
pub fn close(what: &str, got: &[f32], wanted: &[f32], tolerance: f64) {
    assert_eq!(got.len(), wanted.len(), "{what}: lengths");
    let rms = (wanted.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>()
        / wanted.len().max(1) as f64)
        .sqrt();
    for (i, (g, w)) in got.iter().zip(wanted).enumerate() {
        let off = f64::from((g - w).abs());
        // The size of the value itself counts too: bf16 is relative.
        let most = tolerance * (rms + f64::from(w.abs()));
        assert!(off <= most, "{what}[{i}]: {g} instead of {w} (rms {rms:.3e})");
    }
}

/// Fails unless all results of [`devices`] are the same, bit for bit.
#[track_caller]
pub fn same(what: &str, results: &[Vec<f32>]) {
    let bits = |values: &Vec<f32>| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    for other in &results[1..] {
        assert!(
            bits(other) == bits(&results[0]),
            "{what}: the bits depend on the order of threads"
        );
    }
}

/// Document starts for `batch` sequences: none, or a few that differ by sequence.
pub fn starts(batch: usize, seq: usize, documents: bool) -> Vec<u32> {
    let mut all = Vec::new();
    for b in 0..batch {
        let mut start = 0;
        for l in 0..seq {
            if documents && l > 0 && (l * 7 + b * 13).is_multiple_of(23 + 6 * b) {
                start = l as u32;
            }
            all.push(start);
        }
    }
    all
}
