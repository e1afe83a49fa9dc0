//! Matrix products as a request; a backend answers it (cublasLt, or plain loops in the emulator).
//!
//! Row-major: `D[m,n] = alpha · op(A)[m,k] · op(B)[k,n] + beta · C[m,n]`, sums in f32.

use half::bf16;

use super::launch::{Gpu, Slice};

/// The element type of C and D.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Out {
    /// bf16.
    Bf16,
    /// f32.
    F32,
}

/// What is done to a sum before it is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// Nothing.
    #[default]
    None,
    /// A bias of each column, bf16.
    Bias(u64),
    /// The same, then GELU (tanh approximation).
    GeluBias(u64),
}

/// A product. Addresses are of the device; leading dimensions are elements between rows.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// For messages: what it is part of.
    pub name: &'static str,
    /// Rows of D.
    pub m: usize,
    /// Columns of D.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// A, bf16: `[m, k]`, or `[k, m]` if `.2`.
    pub a: (u64, usize, bool),
    /// B, bf16: `[k, n]`, or `[n, k]` if `.2`.
    pub b: (u64, usize, bool),
    /// C, read if `beta` is not 0.
    pub c: (u64, usize),
    /// D.
    pub d: (u64, usize),
    /// Type of C and D.
    pub out: Out,
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of C.
    pub beta: f32,
    /// What follows.
    pub epilogue: Epilogue,
}

/// A matrix of bf16 on the device, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Mat {
    /// Elements, from the first of the first row.
    pub at: Slice<bf16>,
    /// Elements from a row to the next.
    pub stride: usize,
}

impl Mat {
    /// Rows of `stride` elements that begin at `at`.
    pub fn new(at: Slice<bf16>, stride: usize) -> Mat {
        Mat { at, stride }
    }

    /// The same from column `column` on.
    pub fn column(self, column: usize) -> Mat {
        Mat { at: self.at.from(column), ..self }
    }

    fn check(self, rows: usize, columns: usize) {
        let need = if rows == 0 { 0 } else { (rows - 1) * self.stride + columns };
        assert!(columns <= self.stride && need <= self.at.len(), "matrix outside of its buffer");
    }
}

/// `y[n, outputs] = x[n, inputs] · Wᵀ` with `w` `[outputs, inputs]`; adds `add` if given.
pub fn linear(
    gpu: &Gpu,
    name: &'static str,
    (n, inputs, outputs): (usize, usize, usize),
    (x, y): (Mat, Mat),
    w: Slice<bf16>,
    (add, epilogue): (Option<Mat>, Epilogue),
) {
    x.check(n, inputs);
    y.check(n, outputs);
    assert!(w.len() >= inputs * outputs, "the weight is too small");
    let c = add.unwrap_or(y);
    c.check(n, outputs);
    gpu.gemm(&Gemm {
        name,
        m: n,
        n: outputs,
        k: inputs,
        a: (x.at.address(), x.stride, false),
        b: (w.address(), inputs, true),
        c: (c.at.address(), c.stride),
        d: (y.at.address(), y.stride),
        out: Out::Bf16,
        alpha: 1.0,
        beta: if add.is_some() { 1.0 } else { 0.0 },
        epilogue,
    });
}

/// The same into f32 rows of `stride` elements.
pub fn linear_f32(
    gpu: &Gpu,
    name: &'static str,
    (n, inputs, outputs): (usize, usize, usize),
    x: Mat,
    w: Slice<bf16>,
    (y, stride): (Slice<f32>, usize),
) {
    x.check(n, inputs);
    assert!(w.len() >= inputs * outputs && y.len() >= n * stride && stride >= outputs);
    gpu.gemm(&Gemm {
        name,
        m: n,
        n: outputs,
        k: inputs,
        a: (x.at.address(), x.stride, false),
        b: (w.address(), inputs, true),
        c: (y.address(), stride),
        d: (y.address(), stride),
        out: Out::F32,
        alpha: 1.0,
        beta: 0.0,
        epilogue: Epilogue::None,
    });
}

/// `dx[n, inputs] = dy[n, outputs] · W`, added to what is there if `add`.
pub fn linear_dx(
    gpu: &Gpu,
    name: &'static str,
    (n, inputs, outputs): (usize, usize, usize),
    dy: Mat,
    w: Slice<bf16>,
    dx: Mat,
    add: bool,
) {
    dy.check(n, outputs);
    dx.check(n, inputs);
    assert!(w.len() >= inputs * outputs, "the weight is too small");
    gpu.gemm(&Gemm {
        name,
        m: n,
        n: inputs,
        k: outputs,
        a: (dy.at.address(), dy.stride, false),
        b: (w.address(), inputs, false),
        c: (dx.at.address(), dx.stride),
        d: (dx.at.address(), dx.stride),
        out: Out::Bf16,
        alpha: 1.0,
        beta: if add { 1.0 } else { 0.0 },
        epilogue: Epilogue::None,
    });
}

/// `dw[outputs, inputs] += dyᵀ · x`, in f32.
pub fn linear_dw(
    gpu: &Gpu,
    name: &'static str,
    (n, inputs, outputs): (usize, usize, usize),
    dy: Mat,
    x: Mat,
    dw: Slice<f32>,
) {
    dy.check(n, outputs);
    x.check(n, inputs);
    assert!(dw.len() >= inputs * outputs, "the gradient is too small");
    gpu.gemm(&Gemm {
        name,
        m: outputs,
        n: inputs,
        k: n,
        a: (dy.at.address(), dy.stride, true),
        b: (x.at.address(), x.stride, false),
        c: (dw.address(), inputs),
        d: (dw.address(), inputs),
        out: Out::F32,
        alpha: 1.0,
        beta: 1.0,
        epilogue: Epilogue::None,
    });
}
