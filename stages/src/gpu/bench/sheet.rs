//! What measurements of single ops share: timing, and buffers that are full of noise.

use anyhow::Result;
use half::bf16;

use super::subject::noise;
use super::{WARM_UP, median, spans};
use crate::gpu::launch::{Buf, Gpu, Slice};
use crate::gpu::ops::reduce;

/// Timed calls.
const RUNS: usize = 10;
/// Elements that are made on the host; the rest repeats them.
const PATTERN: usize = 1 << 18;

/// A device to measure on.
pub(super) struct Sheet {
    gpu: Gpu,
    /// More than a cache holds, and what is needed to read it.
    flush: Option<[Buf<f32>; 3]>,
}

impl Sheet {
    /// For work that is larger than any cache.
    pub fn new(gpu: &Gpu) -> Sheet {
        Sheet { gpu: gpu.clone(), flush: None }
    }

    /// Reads `bytes` of something else before every call, so that caches are full of that.
    pub fn flushing(gpu: &Gpu, bytes: usize) -> Result<Sheet> {
        let of = |len| gpu.zeros("what flushes caches", len);
        let flush = Some([of(bytes / 4)?, of(reduce::SUM_PARTIALS)?, of(1)?]);
        Ok(Sheet { gpu: gpu.clone(), flush })
    }

    /// Milliseconds of the device that `work` takes: the median of a few calls.
    pub fn time(&self, work: impl Fn()) -> Result<f64> {
        let gpu = &self.gpu;
        let mut marks = Vec::new();
        for run in 0..WARM_UP + RUNS {
            if let Some([x, partials, sum]) = &self.flush {
                reduce::sum(gpu, x.all(), partials.all(), sum.all(), 1.0, false);
            }
            let from = gpu.mark();
            work();
            if run >= WARM_UP {
                marks.push([from, gpu.mark()]);
            }
        }
        let all: Result<Vec<f64>> = marks.iter().map(|pair| Ok(spans(gpu, pair)?[0])).collect();
        Ok(median(all?))
    }

    /// Noise in ±1.
    pub fn half(&self, len: usize) -> Result<Buf<bf16>> {
        let buf = self.gpu.alloc("noise", len)?;
        let pattern: Vec<bf16> =
            noise(len.min(PATTERN), 1.0).into_iter().map(bf16::from_f32).collect();
        self.repeat(buf.all(), &pattern);
        Ok(buf)
    }

    /// The same as f32, in ±`bound`.
    pub fn full(&self, len: usize, bound: f32) -> Result<Buf<f32>> {
        let buf = self.gpu.alloc("noise", len)?;
        self.repeat(buf.all(), &noise(len.min(PATTERN), bound));
        Ok(buf)
    }

    fn repeat<T: bytemuck::Pod>(&self, to: Slice<T>, pattern: &[T]) {
        self.gpu.upload(to.range(0..pattern.len()), pattern);
        let mut done = pattern.len();
        while done < to.len() {
            let more = done.min(to.len() - done);
            self.gpu.copy(to.range(0..more), to.range(done..done + more));
            done += more;
        }
    }
}
