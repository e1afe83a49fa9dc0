//! The NVIDIA driver as a [`Backend`]: one context, one stream, modules, graphs.
//!
//! The libraries are loaded when the device is opened, so that a binary with CUDA also starts where
//! there is none.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::ptr::null_mut;

use cudarc::driver::sys;

use super::cublas::Cublas;
use super::gemm::Gemm;
use super::launch::{Argument, Backend, Shape};

/// Name and fat binary of every file of kernels.
static KERNELS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// An open device.
pub struct Cuda {
    name: String,
    device: sys::CUdevice,
    stream: sys::CUstream,
    /// Work beside that of `stream`, and whether it is queued now.
    side: sys::CUstream,
    beside: Cell<bool>,
    /// Edges between the two: as many as a phase has at a time, used in turn.
    edge_events: Vec<sys::CUevent>,
    edges: Cell<usize>,
    modules: Vec<sys::CUmodule>,
    /// Every kernel, with the dynamic shared memory that it may have so far.
    functions: RefCell<HashMap<String, (sys::CUfunction, usize)>>,
    graphs: RefCell<Vec<sys::CUgraphExec>>,
    events: RefCell<Vec<sys::CUevent>>,
    /// Marks are numbers that go up; only the newest of them still have an event.
    marks: Cell<usize>,
    cublas: Cublas,
}

/// Edges between the streams that can be waited for at a time.
const EDGES: usize = 64;
/// Marks that can be asked for at a time.
const MARKS: usize = 4096;

pub(super) fn ok(status: sys::CUresult, what: &str) -> Result<(), String> {
    if status == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: gives a static string, or leaves null.
    unsafe { sys::cuGetErrorString(status, &mut text) };
    let why = match text.is_null() {
        true => format!("{status:?}"),
        // SAFETY: not null, so it is a C string of the driver.
        false => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
    };
    Err(format!("{what}: {why} ({status:?})"))
}

/// Dynamic shared memory that needs no leave, whatever static memory a kernel has.
const FREE_SHARED: usize = 16 << 10;

/// The kernels of a loaded module.
fn kernels(module: sys::CUmodule) -> Result<Vec<(String, (sys::CUfunction, usize))>, String> {
    let mut count = 0;
    // SAFETY: the module is loaded; there is room for as many answers as it has.
    let functions = unsafe {
        ok(sys::cuModuleGetFunctionCount(&mut count, module), "counting kernels")?;
        let mut functions = vec![null_mut(); count as usize];
        let status = sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module);
        ok(status, "listing kernels")?;
        functions
    };
    let named = |function| {
        let mut name = std::ptr::null();
        // SAFETY: the function was just listed; its name lives as long as the module.
        let name = unsafe {
            ok(sys::cuFuncGetName(&mut name, function), "a kernel's name")?;
            CStr::from_ptr(name)
        };
        Ok((name.to_string_lossy().into_owned(), (function, FREE_SHARED)))
    };
    functions.into_iter().map(named).collect()
}

impl Cuda {
    /// Opens device `index` of those that CUDA_VISIBLE_DEVICES leaves.
    pub fn open(index: i32) -> Result<Cuda, String> {
        super::devices::present()?;
        // SAFETY: plain calls of the driver in the order that it asks for.
        unsafe {
            ok(sys::cuInit(0), "cuInit")?;
            let mut device = 0;
            ok(sys::cuDeviceGet(&mut device, index), "cuDeviceGet")?;
            let name = super::devices::usable(device)?;
            let mut context = null_mut();
            ok(sys::cuDevicePrimaryCtxRetain(&mut context, device), "cuDevicePrimaryCtxRetain")?;
            ok(sys::cuCtxSetCurrent(context), "cuCtxSetCurrent")?;
            let mut stream = null_mut();
            ok(sys::cuStreamCreate(&mut stream, 1), "cuStreamCreate")?;
            let mut side = null_mut();
            ok(sys::cuStreamCreate(&mut side, 1), "cuStreamCreate")?;
            let edge = |_| {
                let mut event = null_mut();
                // 2: without times.
                ok(sys::cuEventCreate(&mut event, 2), "cuEventCreate").map(|()| event)
            };
            let edge_events = (0..EDGES).map(edge).collect::<Result<_, _>>()?;
            let modules = KERNELS.iter().map(|(file, bytes)| {
                let mut module = null_mut();
                let status = sys::cuModuleLoadData(&mut module, bytes.as_ptr().cast());
                ok(status, &format!("loading kernels/{file}.cu")).map(|()| module)
            });
            let modules: Vec<sys::CUmodule> = modules.collect::<Result<_, _>>()?;
            let mut functions = HashMap::new();
            for module in &modules {
                functions.extend(kernels(*module)?);
            }
            Ok(Cuda {
                name,
                device,
                stream,
                side,
                beside: Cell::new(false),
                edge_events,
                edges: Cell::new(0),
                modules,
                functions: RefCell::new(functions),
                graphs: RefCell::default(),
                events: RefCell::default(),
                marks: Cell::new(0),
                cublas: Cublas::open()?,
            })
        }
    }

    fn function(&self, name: &'static str, shared: usize) -> Result<sys::CUfunction, String> {
        let mut functions = self.functions.borrow_mut();
        let (function, most) = functions.get_mut(name).ok_or("there is no such kernel")?;
        if shared > *most {
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is of a module that is loaded.
            let status = unsafe { sys::cuFuncSetAttribute(*function, attribute, shared as i32) };
            ok(status, &format!("{shared} bytes of shared memory"))?;
            *most = shared;
        }
        Ok(*function)
    }

    fn stream(&self) -> sys::CUstream {
        if self.beside.get() { self.side } else { self.stream }
    }

    /// Marks the end of what `stream` holds.
    fn edge(&self, stream: sys::CUstream) -> Result<sys::CUevent, String> {
        let number = self.edges.get();
        self.edges.set(number + 1);
        let event = self.edge_events[number % EDGES];
        // SAFETY: stream and event are open.
        ok(unsafe { sys::cuEventRecord(event, stream) }, "cuEventRecord")?;
        Ok(event)
    }

    fn event(&self, mark: usize) -> sys::CUevent {
        self.events.borrow()[mark % MARKS]
    }
}

impl Backend for Cuda {
    fn alloc(&self, bytes: usize) -> Result<u64, String> {
        let mut address = 0;
        // SAFETY: the context is current on this thread.
        ok(unsafe { sys::cuMemAlloc_v2(&mut address, bytes) }, "cuMemAlloc")?;
        Ok(address)
    }

    fn free(&self, address: u64) {
        // SAFETY: `address` is of `alloc`; work that uses it is waited for by the driver.
        unsafe { sys::cuMemFree_v2(address) };
    }

    fn memory(&self) -> Result<(usize, usize), String> {
        let (mut free, mut all) = (0, 0);
        // SAFETY: the context is current.
        ok(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut all) }, "cuMemGetInfo")?;
        Ok((free, all))
    }

    fn upload(&self, to: u64, from: &[u8], later: bool) -> Result<(), String> {
        // SAFETY: `to` has room for `from`, by the caller, who keeps it until it is copied.
        unsafe {
            let at = from.as_ptr().cast::<c_void>();
            let status = sys::cuMemcpyHtoDAsync_v2(to, at, from.len(), self.stream());
            ok(status, "copy to the device")?;
            if !later {
                ok(sys::cuStreamSynchronize(self.stream()), "copy to the device")?;
            }
        }
        Ok(())
    }

    fn download(&self, from: u64, to: &mut [u8]) -> Result<(), String> {
        // SAFETY: `from` holds as much as `to`, by the caller; it is waited for.
        unsafe {
            let at = to.as_mut_ptr().cast::<c_void>();
            let status = sys::cuMemcpyDtoHAsync_v2(at, from, to.len(), self.stream());
            ok(status, "copy from the device")?;
            ok(sys::cuStreamSynchronize(self.stream()), "earlier work")
        }
    }

    fn fill(&self, at: u64, byte: u8, bytes: usize) -> Result<(), String> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the memory has `bytes` bytes, by the caller.
        ok(unsafe { sys::cuMemsetD8Async(at, byte, bytes, self.stream()) }, "fill")
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), String> {
        // SAFETY: both sides have `bytes` bytes, by the caller.
        ok(unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream()) }, "copy")
    }

    fn launch(&self, name: &'static str, shape: Shape, args: &[Argument]) -> Result<(), String> {
        let function = self.function(name, shape.shared)?;
        let mut bytes: Vec<[u8; 8]> = args.iter().map(|arg| arg.bytes).collect();
        let mut pointers: Vec<*mut c_void> =
            bytes.iter_mut().map(|b| b.as_mut_ptr().cast()).collect();
        let ([x, y, z], shared) = (shape.grid, shape.shared as u32);
        // SAFETY: wrappers pass as many arguments of the kernel's types as it takes, and check
        // that the memory they point to is large enough.
        let status = unsafe {
            let args = pointers.as_mut_ptr();
            let (block, stream) = (shape.block, self.stream());
            sys::cuLaunchKernel(function, x, y, z, block, 1, 1, shared, stream, args, null_mut())
        };
        ok(status, "launch")
    }

    fn gemm(&self, gemm: &Gemm) -> Result<(), String> {
        self.cublas.run(gemm, self.stream(), usize::from(self.beside.get()))
    }

    fn synchronise(&self) -> Result<(), String> {
        // SAFETY: the stream is open.
        ok(unsafe { sys::cuStreamSynchronize(self.stream()) }, "earlier work")
    }

    fn record(&self) -> Result<(), String> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is open and not capturing.
        ok(unsafe { sys::cuStreamBeginCapture_v2(self.stream(), mode) }, "begin of a capture")
    }

    fn recorded(&self) -> Result<usize, String> {
        // SAFETY: the stream captures since `record`.
        unsafe {
            let mut graph = null_mut();
            ok(sys::cuStreamEndCapture(self.stream(), &mut graph), "end of a capture")?;
            let mut exec = null_mut();
            ok(sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0), "making a graph")?;
            sys::cuGraphDestroy(graph);
            self.graphs.borrow_mut().push(exec);
        }
        Ok(self.graphs.borrow().len() - 1)
    }

    fn replay(&self, graph: usize) -> Result<(), String> {
        let graph = self.graphs.borrow()[graph];
        // SAFETY: the graph was made by `recorded`.
        ok(unsafe { sys::cuGraphLaunch(graph, self.stream()) }, "launch of a graph")
    }

    fn part(&self) -> Result<(), String> {
        let event = self.edge(self.stream)?;
        // SAFETY: stream and event are open.
        ok(unsafe { sys::cuStreamWaitEvent(self.side, event, 0) }, "cuStreamWaitEvent")?;
        self.beside.set(true);
        Ok(())
    }

    fn rejoin(&self) -> Result<usize, String> {
        self.beside.set(false);
        self.edge(self.side)?;
        Ok(self.edges.get() - 1)
    }

    fn after(&self, beside: usize) -> Result<(), String> {
        let event = self.edge_events[beside % EDGES];
        // SAFETY: stream and event are open.
        ok(unsafe { sys::cuStreamWaitEvent(self.stream, event, 0) }, "cuStreamWaitEvent")
    }

    fn pin(&self, bytes: usize) -> Result<*mut u8, String> {
        let mut at = null_mut();
        // SAFETY: the context is current.
        ok(unsafe { sys::cuMemHostAlloc(&mut at, bytes, 0) }, "cuMemHostAlloc")?;
        Ok(at.cast())
    }

    fn unpin(&self, at: *mut u8) {
        // SAFETY: `at` is of `pin`.
        unsafe { sys::cuMemFreeHost(at.cast()) };
    }

    fn mark(&self) -> Result<usize, String> {
        let mark = self.marks.get();
        self.marks.set(mark + 1);
        if self.events.borrow().len() < MARKS.min(mark + 1) {
            let mut event = null_mut();
            // SAFETY: the context is current.
            ok(unsafe { sys::cuEventCreate(&mut event, 0) }, "cuEventCreate")?;
            self.events.borrow_mut().push(event);
        }
        // SAFETY: event and stream are open.
        ok(unsafe { sys::cuEventRecord(self.event(mark), self.stream()) }, "cuEventRecord")?;
        Ok(mark)
    }

    fn passed(&self, mark: usize) -> Result<(), String> {
        // SAFETY: the event is open.
        ok(unsafe { sys::cuEventSynchronize(self.event(mark)) }, "earlier work")
    }

    fn between(&self, from: usize, to: usize) -> Result<f32, String> {
        let mut time = 0.0;
        let (from, to) = (self.event(from), self.event(to));
        // SAFETY: both events are open.
        ok(unsafe { sys::cuEventElapsedTime_v2(&mut time, from, to) }, "cuEventElapsedTime")?;
        Ok(time)
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        // SAFETY: everything was opened by this value; buffers are gone, they keep it alive.
        unsafe {
            sys::cuStreamSynchronize(self.stream);
            self.graphs.borrow().iter().for_each(|graph| _ = sys::cuGraphExecDestroy(*graph));
            self.events.borrow().iter().for_each(|event| _ = sys::cuEventDestroy_v2(*event));
            self.modules.iter().for_each(|module| _ = sys::cuModuleUnload(*module));
            self.edge_events.iter().for_each(|event| _ = sys::cuEventDestroy_v2(*event));
            sys::cuStreamDestroy_v2(self.side);
            sys::cuStreamDestroy_v2(self.stream);
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}
