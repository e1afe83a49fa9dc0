//! A GPU as ops see it: memory, kernels by name, products, graphs. Knows no model.
//!
//! Work is queued in order on one stream and nothing here waits, but for [`Gpu::download`] and
//! [`Gpu::synchronise`]. An op that cannot be queued, or a fault of one that runs, is remembered
//! with the op's name; from then on nothing is queued, and the next synchronisation reports it.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::ops::Range;
use std::rc::Rc;

use super::fault::{DeviceFault, OutOfDeviceMemory};
use anyhow::Result;
use bytemuck::Pod;

use super::gemm::Gemm;

/// What runs the work: a driver, or the emulator of kernels.
pub trait Backend {
    /// Reserves memory; its content is undefined.
    fn alloc(&self, bytes: usize) -> Result<u64, String>;
    /// Gives it back.
    fn free(&self, address: u64);
    /// Bytes that are free and that there are.
    fn memory(&self) -> Result<(usize, usize), String>;
    /// Copies host memory to the device; waits for it unless `later` (then it must be pinned).
    fn upload(&self, to: u64, from: &[u8], later: bool) -> Result<(), String>;
    /// Waits for all work and copies device memory to the host.
    fn download(&self, from: u64, to: &mut [u8]) -> Result<(), String>;
    /// Fills with a byte.
    fn fill(&self, at: u64, byte: u8, bytes: usize) -> Result<(), String>;
    /// Copies within the device.
    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), String>;
    /// Queues a kernel.
    fn launch(&self, name: &'static str, shape: Shape, args: &[Argument]) -> Result<(), String>;
    /// Queues a product.
    fn gemm(&self, gemm: &Gemm) -> Result<(), String>;
    /// Waits for all work.
    fn synchronise(&self) -> Result<(), String>;
    /// From here on work is recorded and not done.
    fn record(&self) -> Result<(), String>;
    /// The work recorded since, as a number for [`Backend::replay`].
    fn recorded(&self) -> Result<usize, String>;
    /// Queues recorded work.
    fn replay(&self, graph: usize) -> Result<(), String>;
    /// From here on work is queued beside the rest: after what was queued so far, but what follows
    /// [`Backend::rejoin`] does not wait for it.
    fn part(&self) -> Result<(), String>;
    /// The end of that, and a number for [`Backend::after`].
    fn rejoin(&self) -> Result<usize, String>;
    /// What follows waits for work that was queued beside.
    fn after(&self, beside: usize) -> Result<(), String>;
    /// Host memory that can be copied from in the background.
    fn pin(&self, bytes: usize) -> Result<*mut u8, String>;
    /// Gives it back.
    fn unpin(&self, at: *mut u8);
    /// Marks a moment of the queue.
    fn mark(&self) -> Result<usize, String>;
    /// Waits until the queue has passed a mark.
    fn passed(&self, mark: usize) -> Result<(), String>;
    /// Milliseconds between two passed marks.
    fn between(&self, from: usize, to: usize) -> Result<f32, String>;
    /// What it is, for messages.
    fn name(&self) -> String;
}

/// Grid and block of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block, in x.
    pub block: u32,
    /// Bytes of dynamic shared memory.
    pub shared: usize,
}

/// One argument of a kernel, as its bytes.
#[derive(Clone, Copy, Debug)]
pub struct Argument {
    /// Little-endian; as many as the type has.
    pub bytes: [u8; 8],
}

/// What can be an argument of a kernel.
pub trait IntoArgument {
    /// Its bytes.
    fn argument(self) -> Argument;
}

macro_rules! argument {
    ($($type:ty),*) => {$(
        impl IntoArgument for $type {
            fn argument(self) -> Argument {
                let mut bytes = [0; 8];
                bytes[..size_of::<$type>()].copy_from_slice(&self.to_ne_bytes());
                Argument { bytes }
            }
        }
    )*};
}
argument!(i32, u32, f32, u64, i64);

/// An open GPU. Cheap to clone; not for several threads.
#[derive(Clone)]
pub struct Gpu {
    inner: Rc<Inner>,
}

struct Inner {
    backend: Box<dyn Backend>,
    fault: RefCell<Option<DeviceFault>>,
    /// Wait after every op, so that a fault is blamed on the right one.
    check: bool,
    launched: Cell<u64>,
    allocated: Cell<usize>,
    peak: Cell<usize>,
}

/// Memory of a GPU, given back when dropped.
pub struct Buf<T> {
    gpu: Gpu,
    slice: Slice<T>,
}

/// A part of a [`Buf`], as ops take it; whoever makes one keeps the buffer alive.
#[derive(Debug, PartialEq, Eq)]
pub struct Slice<T> {
    address: u64,
    len: usize,
    of: PhantomData<T>,
}

impl<T> Clone for Slice<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Slice<T> {}

impl<T> IntoArgument for Slice<T> {
    fn argument(self) -> Argument {
        self.address.argument()
    }
}

impl<T> IntoArgument for Option<Slice<T>> {
    /// A null pointer for `None`.
    fn argument(self) -> Argument {
        self.map_or(0, |slice| slice.address).argument()
    }
}

impl<T> Slice<T> {
    /// Elements.
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The first byte's address on the device.
    pub fn address(self) -> u64 {
        self.address
    }

    /// From element `first` on.
    pub fn from(self, first: usize) -> Slice<T> {
        self.range(first..self.len)
    }

    /// The elements of `range`.
    pub fn range(self, range: Range<usize>) -> Slice<T> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        let address = self.address + (range.start * size_of::<T>()) as u64;
        Slice { address, len: range.len(), of: PhantomData }
    }
}

impl<T> Buf<T> {
    /// All of it.
    pub fn all(&self) -> Slice<T> {
        self.slice
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.slice.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.slice.len == 0
    }
}

impl<T> Drop for Buf<T> {
    fn drop(&mut self) {
        let bytes = self.slice.len * size_of::<T>();
        let inner = &self.gpu.inner;
        inner.allocated.set(inner.allocated.get() - bytes);
        inner.backend.free(self.slice.address);
    }
}

/// Work that was queued beside other work.
#[must_use = "somebody has to wait for it"]
pub struct Beside(Option<usize>);

/// Recorded work.
pub struct Graph {
    gpu: Gpu,
    name: &'static str,
    /// `None` where every op is checked: then the work is queued anew each time.
    number: Option<usize>,
}

impl Gpu {
    /// With `backend`; with `PIPE_GPU_CHECK` set, every op is waited for.
    pub fn new(backend: Box<dyn Backend>) -> Gpu {
        let check = std::env::var_os("PIPE_GPU_CHECK").is_some_and(|v| !v.is_empty());
        let inner = Inner {
            backend,
            fault: RefCell::new(None),
            check,
            launched: Cell::new(0),
            allocated: Cell::new(0),
            peak: Cell::new(0),
        };
        Gpu { inner: Rc::new(inner) }
    }

    /// What it is, for messages.
    pub fn name(&self) -> String {
        self.inner.backend.name()
    }

    /// Ops queued since it was opened.
    pub fn launched(&self) -> u64 {
        self.inner.launched.get()
    }

    /// Bytes allocated now, and the most there were.
    pub fn allocated(&self) -> (usize, usize) {
        (self.inner.allocated.get(), self.inner.peak.get())
    }

    /// Bytes of its memory that are free, and all.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.inner.backend.memory().map_err(|message| fault("memory", message).into())
    }

    /// Room for `len` elements, undefined. Out of memory is an error that names `what`.
    pub fn alloc<T>(&self, what: &str, len: usize) -> Result<Buf<T>> {
        let inner = &self.inner;
        let bytes = len * size_of::<T>();
        let address = inner.backend.alloc(bytes.max(1)).map_err(|message| {
            let (free, all) = inner.backend.memory().unwrap_or_default();
            let gib = |bytes: usize| bytes as f64 / (1u64 << 30) as f64;
            OutOfDeviceMemory(format!(
                "no room on {} for {what} ({:.2} GiB): {:.2} GiB in use by this step, {:.2} of \
                 {:.2} GiB free ({message}); lower `micro_batch`, or take a GPU that nobody else \
                 uses",
                self.name(),
                gib(bytes),
                gib(inner.allocated.get()),
                gib(free),
                gib(all),
            ))
        })?;
        inner.allocated.set(inner.allocated.get() + bytes);
        inner.peak.set(inner.peak.get().max(inner.allocated.get()));
        Ok(Buf { gpu: self.clone(), slice: Slice { address, len, of: PhantomData } })
    }

    /// The same, filled with zero bytes.
    pub fn zeros<T>(&self, what: &str, len: usize) -> Result<Buf<T>> {
        let buf = self.alloc(what, len)?;
        self.fill(buf.all(), 0);
        Ok(buf)
    }

    /// A copy of `values` on the device.
    pub fn buf<T: Pod>(&self, what: &str, values: &[T]) -> Result<Buf<T>> {
        let buf = self.alloc(what, values.len())?;
        self.upload(buf.all(), values);
        Ok(buf)
    }

    /// Copies `values` to `to`, waiting for it.
    pub fn upload<T: Pod>(&self, to: Slice<T>, values: &[T]) {
        assert_eq!(to.len, values.len(), "lengths differ");
        let from = bytemuck::cast_slice(values);
        self.queue("upload", |backend| backend.upload(to.address, from, false));
    }

    /// Copies `range` of pinned `from` to `to` in the background; `from` must not change until a
    /// mark set after this has passed.
    pub fn upload_later<T: Pod>(&self, to: Slice<T>, from: &Pinned<T>, range: Range<usize>) {
        assert_eq!(to.len, range.len(), "lengths differ");
        let from = bytemuck::cast_slice(&from.values()[range]);
        self.queue("upload", |backend| backend.upload(to.address, from, true));
    }

    /// Waits for all queued work and copies `from` to the host.
    pub fn download<T: Pod>(&self, from: Slice<T>) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); from.len];
        self.download_to(from, &mut values)?;
        Ok(values)
    }

    /// The same, into `to`.
    pub fn download_to<T: Pod>(&self, from: Slice<T>, to: &mut [T]) -> Result<()> {
        assert_eq!(from.len, to.len(), "lengths differ");
        let to = bytemuck::cast_slice_mut(to);
        self.queue("download", |backend| backend.download(from.address, to));
        self.status()
    }

    /// Fills with a byte.
    pub fn fill<T>(&self, at: Slice<T>, byte: u8) {
        let bytes = at.len * size_of::<T>();
        self.queue("fill", |backend| backend.fill(at.address, byte, bytes));
    }

    /// Copies within the device.
    pub fn copy<T>(&self, from: Slice<T>, to: Slice<T>) {
        assert_eq!(from.len, to.len, "lengths differ");
        let bytes = from.len * size_of::<T>();
        self.queue("copy", |backend| backend.copy(from.address, to.address, bytes));
    }

    /// Queues kernel `name`; see [`crate::launch!`].
    pub fn launch(&self, name: &'static str, shape: Shape, args: &[Argument]) {
        if shape.grid.contains(&0) {
            return;
        }
        self.queue(name, |backend| backend.launch(name, shape, args));
    }

    /// Queues a product.
    pub fn gemm(&self, gemm: &Gemm) {
        if gemm.m > 0 && gemm.n > 0 {
            self.queue(gemm.name, |backend| backend.gemm(gemm));
        }
    }

    /// Waits for all queued work; the first fault there was.
    pub fn synchronise(&self) -> Result<()> {
        self.queue("synchronise", |backend| backend.synchronise());
        self.status()
    }

    /// The first fault that is known of, without waiting.
    pub fn status(&self) -> Result<()> {
        match &*self.inner.fault.borrow() {
            Some(fault) => Err(fault.clone().into()),
            None => Ok(()),
        }
    }

    /// Records what `work` queues as one graph called `name`.
    pub fn capture(&self, name: &'static str, work: impl FnOnce()) -> Result<Graph> {
        if self.inner.check {
            return Ok(Graph { gpu: self.clone(), name, number: None });
        }
        let backend = &self.inner.backend;
        backend.record().map_err(|message| fault(name, message))?;
        work();
        let number = backend.recorded();
        self.status()?;
        let number = Some(number.map_err(|message| fault(name, message))?);
        Ok(Graph { gpu: self.clone(), name, number })
    }

    /// Queues `work` beside what follows: it waits for all that was queued before, and only
    /// [`Gpu::after`] waits for it. Neither may write what the other uses.
    pub fn beside(&self, work: impl FnOnce()) -> Beside {
        if self.inner.check {
            work();
            return Beside(None);
        }
        self.queue("beside", |backend| backend.part());
        work();
        let mut number = None;
        self.queue("beside", |backend| backend.rejoin().map(|found| number = Some(found)));
        Beside(number)
    }

    /// What follows waits for `beside`.
    pub fn after(&self, beside: &Beside) {
        if let Some(number) = beside.0 {
            self.queue("after", |backend| backend.after(number));
        }
    }

    /// Host memory for [`Gpu::upload_later`].
    pub fn pinned<T: Pod>(&self, len: usize) -> Result<Pinned<T>> {
        let bytes = (len * size_of::<T>()).max(1);
        let at = self.inner.backend.pin(bytes).map_err(|message| fault("pin", message))?;
        // SAFETY: the backend gave at least `bytes` bytes, aligned for any element.
        unsafe { std::ptr::write_bytes(at, 0, bytes) };
        Ok(Pinned { gpu: self.clone(), at: at.cast(), len })
    }

    /// Marks this moment of the queue.
    pub fn mark(&self) -> usize {
        let mut mark = 0;
        self.queue("mark", |backend| backend.mark().map(|found| mark = found));
        mark
    }

    /// Waits until the queue has passed `mark`.
    pub fn passed(&self, mark: usize) -> Result<()> {
        self.queue("wait", |backend| backend.passed(mark));
        self.status()
    }

    /// Milliseconds of the device between two marks that have passed.
    pub fn between(&self, from: usize, to: usize) -> Result<f32> {
        self.inner.backend.between(from, to).map_err(|message| fault("time", message).into())
    }

    fn queue(&self, op: &'static str, work: impl FnOnce(&dyn Backend) -> Result<(), String>) {
        let Inner { backend, fault: known, check, launched, .. } = &*self.inner;
        if known.borrow().is_some() {
            return;
        }
        launched.set(launched.get() + 1);
        let mut result = work(&**backend);
        if *check && result.is_ok() {
            result = backend.synchronise();
        }
        if let Err(mut message) = result {
            // A fault shows where the host waits, or at the next graph.
            if !check && LATE.contains(&op) {
                message += "; run it again with PIPE_GPU_CHECK=1 to learn which op it was";
            }
            known.replace(Some(fault(op, message)));
        }
    }
}

/// Ops that report what went wrong before them, and graphs.
const LATE: &[&str] =
    &["download", "synchronise", "wait", "micro-batch", "optimiser step", "decoding"];

fn fault(op: &str, message: String) -> DeviceFault {
    DeviceFault { op: op.to_string(), message }
}

impl Graph {
    /// Queues the recorded work; `work` must be what was recorded.
    pub fn launch(&self, work: impl FnOnce()) {
        match self.number {
            Some(number) => self.gpu.queue(self.name, |backend| backend.replay(number)),
            None => work(),
        }
    }
}

/// Host memory that the device can read in the background.
pub struct Pinned<T> {
    gpu: Gpu,
    at: *mut T,
    len: usize,
}

impl<T: Pod> Pinned<T> {
    /// The values.
    pub fn values(&self) -> &[T] {
        // SAFETY: `at` points to `len` elements that live as long as `self`.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }

    /// The values, to be changed once the device has read them.
    pub fn values_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        self.gpu.inner.backend.unpin(self.at.cast());
    }
}

/// `launch!(gpu, "kernel", grid: [x, y, z], block: threads, shared: bytes; arguments…)`.
#[macro_export]
macro_rules! launch {
    ($gpu:expr, $name:expr, grid: $grid:expr, block: $block:expr, shared: $shared:expr; $($arg:expr),* $(,)?) => {{
        use $crate::gpu::launch::IntoArgument as _;
        let shape = $crate::gpu::launch::Shape {
            grid: $grid.map(|blocks| u32::try_from(blocks).expect("a grid is not that large")),
            block: $block as u32,
            shared: $shared as usize,
        };
        $gpu.launch($name, shape, &[$($arg.argument()),*])
    }};
}
