//! A GPU made of the CPU: the same kernels through `kernels/emulate.h`, products by plain loops.
//! For tests; recorded work is kept as a list and done again.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::time::Instant;

use half::bf16;

use super::gemm::{Epilogue, Gemm, Out};
use super::launch::{Argument, Backend, Shape};
use crate::ops::gelu;
use crate::ops::gemm::{Mat, gemm};

unsafe extern "C" {
    fn pipe_emulate_launch(
        name: *const c_char,
        grid: *const u32,
        block: *const u32,
        shared: u64,
        arguments: *mut *mut c_void,
        order: c_int,
    ) -> c_int;
}

/// The emulated GPU.
#[derive(Default)]
pub struct Emulator {
    /// One of [`Emulator::ORDERS`].
    order: u8,
    /// Bytes it may hold; 0: no limit.
    limit: usize,
    /// A kernel that fails, and how.
    fails: Option<(&'static str, &'static str)>,
    used: Cell<usize>,
    memory: RefCell<HashMap<u64, Vec<u128>>>,
    recording: RefCell<Option<Vec<Work>>>,
    graphs: RefCell<Vec<Vec<Work>>>,
    marks: RefCell<Vec<Instant>>,
}

#[derive(Clone)]
enum Work {
    Upload(u64, Vec<u8>),
    Fill(u64, u8, usize),
    Copy(u64, u64, usize),
    Launch(&'static str, Shape, Vec<Argument>),
    Gemm(Gemm),
}

impl Emulator {
    /// How many orders there are in which threads and their copies can run, see `emulate::Order` in
    /// `kernels/emulate.h`: where a barrier is missing, some of them change results.
    pub const ORDERS: u8 = 4;

    /// With threads in falling order if `backwards`.
    pub fn new(backwards: bool) -> Emulator {
        Emulator::ordered(u8::from(backwards))
    }

    /// With threads and copies in one of the [`Emulator::ORDERS`].
    pub fn ordered(order: u8) -> Emulator {
        assert!(order < Emulator::ORDERS, "there is no order {order}");
        Emulator { order, ..Emulator::default() }
    }

    /// With no more than `limit` bytes.
    pub fn with_memory(limit: usize) -> Emulator {
        Emulator { limit, ..Emulator::default() }
    }

    /// On which kernel `name` fails with `message`, as a broken one does on a device.
    pub fn failing(name: &'static str, message: &'static str) -> Emulator {
        Emulator { fails: Some((name, message)), ..Emulator::default() }
    }

    fn queue(&self, work: Work) -> Result<(), String> {
        match &mut *self.recording.borrow_mut() {
            Some(list) => list.push(work),
            None => return self.work(&work),
        }
        Ok(())
    }

    fn work(&self, work: &Work) -> Result<(), String> {
        match work {
            // SAFETY: addresses are of memory that this emulator gave and that callers keep alive,
            // as with a real device.
            Work::Upload(to, bytes) => unsafe {
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), *to as *mut u8, bytes.len());
            },
            // SAFETY: as above.
            Work::Fill(at, byte, bytes) => unsafe {
                std::ptr::write_bytes(*at as *mut u8, *byte, *bytes);
            },
            // SAFETY: as above.
            Work::Copy(from, to, bytes) => unsafe {
                std::ptr::copy(*from as *const u8, *to as *mut u8, *bytes);
            },
            Work::Launch(name, shape, args) => self.run(name, *shape, args)?,
            Work::Gemm(gemm) => product(gemm),
        }
        Ok(())
    }

    fn run(&self, name: &str, shape: Shape, args: &[Argument]) -> Result<(), String> {
        if let Some((_, message)) = self.fails.filter(|(fails, _)| *fails == name) {
            return Err(format!("{name}: {message}"));
        }
        let name = CString::new(name).map_err(|e| e.to_string())?;
        let mut bytes: Vec<[u8; 8]> = args.iter().map(|arg| arg.bytes).collect();
        let mut pointers: Vec<*mut c_void> =
            bytes.iter_mut().map(|b| b.as_mut_ptr().cast()).collect();
        let block = [shape.block, 1, 1];
        if shape.shared > 227 << 10 || shape.block > 1024 {
            return Err(format!("{shape:?} does not fit a multiprocessor"));
        }
        // SAFETY: kernels are registered with their argument types, and their wrappers pass as
        // many arguments of these types as they take; pointers are checked by the wrappers.
        let status = unsafe {
            pipe_emulate_launch(
                name.as_ptr(),
                shape.grid.as_ptr(),
                block.as_ptr(),
                shape.shared as u64,
                pointers.as_mut_ptr(),
                c_int::from(self.order),
            )
        };
        if status == 0 { Ok(()) } else { Err("there is no such kernel".into()) }
    }
}

impl Backend for Emulator {
    fn alloc(&self, bytes: usize) -> Result<u64, String> {
        if self.limit > 0 && self.used.get() + bytes > self.limit {
            return Err("out of memory".into());
        }
        self.used.set(self.used.get() + bytes);
        // Poisoned: all ones are NaN in every float type.
        let mut memory = vec![u128::MAX; bytes.div_ceil(16) + 16];
        let start = memory.as_mut_ptr() as u64;
        let address = start.next_multiple_of(256);
        self.memory.borrow_mut().insert(address, memory);
        Ok(address)
    }

    fn free(&self, address: u64) {
        if let Some(memory) = self.memory.borrow_mut().remove(&address) {
            self.used.set(self.used.get().saturating_sub((memory.len() - 16) * 16));
        }
    }

    fn memory(&self) -> Result<(usize, usize), String> {
        let all = if self.limit > 0 { self.limit } else { 1 << 40 };
        Ok((all.saturating_sub(self.used.get()), all))
    }

    fn upload(&self, to: u64, from: &[u8], _: bool) -> Result<(), String> {
        self.queue(Work::Upload(to, from.to_vec()))
    }

    fn download(&self, from: u64, to: &mut [u8]) -> Result<(), String> {
        // SAFETY: `from` is as in `work`, and what is read is as long as what is given.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn fill(&self, at: u64, byte: u8, bytes: usize) -> Result<(), String> {
        self.queue(Work::Fill(at, byte, bytes))
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), String> {
        self.queue(Work::Copy(from, to, bytes))
    }

    fn launch(&self, name: &'static str, shape: Shape, args: &[Argument]) -> Result<(), String> {
        self.queue(Work::Launch(name, shape, args.to_vec()))
    }

    fn gemm(&self, gemm: &Gemm) -> Result<(), String> {
        self.queue(Work::Gemm(*gemm))
    }

    fn synchronise(&self) -> Result<(), String> {
        Ok(())
    }

    fn record(&self) -> Result<(), String> {
        self.recording.replace(Some(Vec::new()));
        Ok(())
    }

    fn recorded(&self) -> Result<usize, String> {
        let list = self.recording.take().ok_or("nothing is being recorded")?;
        self.graphs.borrow_mut().push(list);
        Ok(self.graphs.borrow().len() - 1)
    }

    fn replay(&self, graph: usize) -> Result<(), String> {
        let list = self.graphs.borrow()[graph].clone();
        list.into_iter().try_for_each(|work| self.queue(work))
    }

    fn part(&self) -> Result<(), String> {
        Ok(())
    }

    fn rejoin(&self) -> Result<usize, String> {
        Ok(0)
    }

    fn after(&self, _: usize) -> Result<(), String> {
        Ok(())
    }

    fn pin(&self, bytes: usize) -> Result<*mut u8, String> {
        let address = self.alloc(bytes)?;
        Ok(address as *mut u8)
    }

    fn unpin(&self, at: *mut u8) {
        self.free(at as u64);
    }

    fn mark(&self) -> Result<usize, String> {
        self.marks.borrow_mut().push(Instant::now());
        Ok(self.marks.borrow().len() - 1)
    }

    fn passed(&self, _: usize) -> Result<(), String> {
        Ok(())
    }

    fn between(&self, from: usize, to: usize) -> Result<f32, String> {
        let marks = self.marks.borrow();
        Ok(marks[to].duration_since(marks[from]).as_secs_f32() * 1e3)
    }

    fn name(&self) -> String {
        "the emulated GPU".into()
    }
}

/// Rows of bf16 as f32.
fn read((at, stride): (u64, usize), rows: usize, columns: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows * columns);
    for row in 0..rows {
        let start = (at as *const bf16).wrapping_add(row * stride);
        // SAFETY: a product's matrices lie in memory of this emulator.
        let row = unsafe { std::slice::from_raw_parts(start, columns) };
        out.extend(row.iter().map(|v| v.to_f32()));
    }
    out
}

fn product(g: &Gemm) {
    let (m, n, k) = (g.m, g.n, g.k);
    let stored = |rows: usize, columns: usize, turned: bool| match turned {
        true => (columns, rows),
        false => (rows, columns),
    };
    let ((ar, ac), (br, bc)) = (stored(m, k, g.a.2), stored(k, n, g.b.2));
    let (a, b) = (read((g.a.0, g.a.1), ar, ac), read((g.b.0, g.b.1), br, bc));
    let (a, b) = (Mat::new(&a, ar, ac, ac), Mat::new(&b, br, bc, bc));
    let (a, b) = (if g.a.2 { a.t() } else { a }, if g.b.2 { b.t() } else { b });
    let mut sums = vec![0.0; m * n];
    gemm(&mut sums, n, 0.0, 1.0, a, b);
    for row in 0..m {
        for column in 0..n {
            let at = |(base, stride): (u64, usize), size: usize| {
                base as usize + (row * stride + column) * size
            };
            let mut value = g.alpha * sums[row * n + column];
            // SAFETY: C, D and the bias lie in memory of this emulator.
            unsafe {
                if g.beta != 0.0 {
                    value += g.beta
                        * match g.out {
                            Out::F32 => *(at(g.c, 4) as *const f32),
                            Out::Bf16 => (*(at(g.c, 2) as *const bf16)).to_f32(),
                        };
                }
                let bias = |at: u64| (*(at as *const bf16).add(column)).to_f32();
                value = match g.epilogue {
                    Epilogue::None => value,
                    Epilogue::Bias(at) => value + bias(at),
                    Epilogue::GeluBias(at) => {
                        let mut y = [0.0];
                        gelu::forward(&[value + bias(at)], &mut y);
                        y[0]
                    }
                };
                match g.out {
                    Out::F32 => *(at(g.d, 4) as *mut f32) = value,
                    Out::Bf16 => *(at(g.d, 2) as *mut bf16) = bf16::from_f32(value),
                }
            }
        }
    }
}
