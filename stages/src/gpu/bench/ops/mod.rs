//! Every op at the sizes of a model and a micro-batch, alone and with cold caches: milliseconds, and
//! the bytes that must be read and written once, or the arithmetic that it needs at least.

mod mixers;
mod parts;
mod products;

use anyhow::Result;

use super::ceilings::Ceilings;
use super::phases::{Amount, sizes};
use super::sheet::Sheet;
use super::subject::Subject;
use crate::gpu::gemm::Mat;
use crate::gpu::launch::{Buf, Gpu};
use crate::models::Config;
use crate::ops::Dims;

/// Bytes read before each call: several times what caches hold.
const FLUSH: usize = 256 << 20;

/// What an op has to do at least.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Work {
    /// Move so many bytes.
    Bytes(f64),
    /// Make so many FLOPs.
    Flops(f64),
}

/// What an op took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Op {
    /// Its name.
    pub name: &'static str,
    /// Milliseconds: the median of a few calls.
    pub ms: f64,
    /// What it had to do.
    pub work: Work,
}

impl Op {
    /// GB/s or TFLOP/s.
    pub fn rate(&self) -> f64 {
        match self.work {
            Work::Bytes(bytes) => bytes / self.ms / 1e6,
            Work::Flops(flops) => flops / self.ms / 1e9,
        }
    }

    /// The rate as a part of its ceiling.
    pub fn share(&self, ceilings: &Ceilings) -> f64 {
        match self.work {
            Work::Bytes(_) => self.rate() / ceilings.copy_gb_s,
            Work::Flops(_) => self.rate() / ceilings.gemm_tflop_s,
        }
    }
}

/// Where ops are measured.
struct Bench<'a> {
    gpu: Gpu,
    sheet: Sheet,
    student: Config,
    teacher: Config,
    dims: Dims,
    /// One document a sequence.
    starts_n: Buf<u32>,
    visit: &'a mut dyn FnMut(Op),
}

impl Bench<'_> {
    fn op(&mut self, name: &'static str, work: Work, queue: impl Fn()) -> Result<()> {
        let ms = self.sheet.time(queue)?;
        (self.visit)(Op { name, ms, work });
        Ok(())
    }

    /// Tokens.
    fn n(&self) -> usize {
        self.dims.tokens()
    }
}

/// Columns and rows of a student's mixer.
#[derive(Clone, Copy)]
struct Mixer {
    heads: usize,
    width: usize,
    state: usize,
}

impl Mixer {
    fn of(config: &Config) -> Mixer {
        Mixer { heads: config.heads, width: config.head_dim, state: config.d_state }
    }

    fn inner(self) -> usize {
        self.heads * self.width
    }

    /// x, B and C.
    fn channels(self) -> usize {
        self.inner() + 2 * self.heads * self.state
    }

    /// Where A_log begins.
    fn a_at(self) -> usize {
        self.channels() + self.inner()
    }

    /// A_log, filled up.
    fn a_stride(self) -> usize {
        self.heads.next_multiple_of(crate::gpu::weights::PAD)
    }

    fn rows(self) -> usize {
        self.a_at() + self.a_stride()
    }
}

fn mat(buf: &Buf<half::bf16>, stride: usize) -> Mat {
    Mat::new(buf.all(), stride)
}

/// Bytes of so many bf16 elements.
fn halves(elements: usize) -> Work {
    Work::Bytes(2.0 * elements as f64)
}

/// Bytes of so many elements of bf16, and of f32.
fn bytes(halves: usize, fulls: usize) -> Work {
    Work::Bytes(2.0 * halves as f64 + 4.0 * fulls as f64)
}

/// Measures every op of `subject`, teacher and student; `visit` sees each as it is done.
pub fn measure(
    gpu: &Gpu,
    subject: &Subject,
    amount: Amount,
    visit: &mut dyn FnMut(Op),
) -> Result<()> {
    let (_, micro) = sizes(subject, amount)?;
    let dims = Dims { batch: micro, seq: subject.seq };
    let flush = if subject.name == "tiny" { 1 << 12 } else { FLUSH };
    let mut bench = Bench {
        gpu: gpu.clone(),
        sheet: Sheet::flushing(gpu, flush)?,
        student: subject.student(),
        teacher: subject.teacher.clone(),
        dims,
        starts_n: gpu.zeros("document starts", dims.tokens())?,
        visit,
    };
    parts::norms(&mut bench)?;
    parts::mlp(&mut bench)?;
    parts::embedding(&mut bench)?;
    parts::losses(&mut bench)?;
    mixers::convolution(&mut bench)?;
    mixers::scan(&mut bench)?;
    mixers::attention(&mut bench)?;
    mixers::orient(&mut bench)?;
    parts::optimiser(&mut bench, subject)?;
    products::all(&mut bench)
}
