//! Matrix orientation, the loss of phase 1: see `kernels/orient.cuh` and, on the CPU,
//! [`crate::ops::orient`]. In this order: [`decay_cumsum`], [`rows`], [`columns`], [`finish`],
//! [`total`]; for held-out figures [`decay_cumsum`], [`sums`], [`finish`], [`total`].

use half::bf16;

use crate::gpu::launch::{Gpu, Slice};
use crate::launch;

/// Rows of a block.
const TILE: usize = 128;

/// Sizes. "Pairs" are `[batch, heads]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Sequences.
    pub batch: usize,
    /// Positions of each.
    pub seq: usize,
    /// Query heads, and the student's.
    pub heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Width of a query or key: 32, 64 or 128.
    pub dim: usize,
    /// State size N: 16, 32, 64 or 128.
    pub state: usize,
}

/// The teacher's attention: rows `stride` apart.
#[derive(Clone, Copy)]
pub struct Teacher {
    /// Rotated queries, from the first one's first element on.
    pub q: Slice<bf16>,
    /// Rotated keys, likewise.
    pub k: Slice<bf16>,
    /// Distance between rows of both.
    pub stride: usize,
    /// Log-sum-exp of the scaled scores, `[pairs, seq]`.
    pub lse_bhl: Slice<f32>,
}

/// The student's side: rows `stride` apart.
#[derive(Clone, Copy)]
pub struct Student {
    /// B, from the first one's first element on, heads side by side.
    pub b: Slice<bf16>,
    /// C, likewise.
    pub c: Slice<bf16>,
    /// Distance between rows of both.
    pub stride: usize,
    /// Of [`decay_cumsum`], `[pairs, seq]`.
    pub cs_bhl: Slice<f32>,
    /// Skip of each head.
    pub d_h: Slice<f32>,
}

/// Both, and the documents.
#[derive(Clone, Copy)]
pub struct Inputs {
    /// The teacher's attention.
    pub teacher: Teacher,
    /// The student's side.
    pub student: Student,
    /// For each token the position of its document's first, `[n]`.
    pub starts_n: Slice<u32>,
}

impl Shape {
    /// Tokens in all.
    pub fn tokens(self) -> usize {
        self.batch * self.seq
    }

    /// Sequences times heads.
    pub fn pairs(self) -> usize {
        self.batch * self.heads
    }

    /// Length of the sums of [`rows`]: `[pairs, tiles, 4]`.
    pub fn partials(self) -> usize {
        self.pairs() * self.tiles() * 4
    }

    fn tiles(self) -> usize {
        self.seq.div_ceil(TILE)
    }

    /// Threads of a block: a warp owns 32 rows where its registers hold them, else 16.
    fn threads(self) -> usize {
        if self.dim + 3 * self.state <= 256 { 128 } else { 256 }
    }

    /// Two stages of a tile of both sides' operands, padded, and of four statistics.
    fn shared(self) -> usize {
        2 * (TILE * (self.dim + self.state + 16) * 2 + 4 * TILE * 4)
    }

    fn check(self, Inputs { teacher, student, starts_n }: Inputs) {
        assert!(self.heads.is_multiple_of(self.kv_heads), "query heads share key heads evenly");
        rows_fit(self, teacher.q, teacher.stride, self.heads * self.dim);
        rows_fit(self, teacher.k, teacher.stride, self.kv_heads * self.dim);
        rows_fit(self, student.b, student.stride, self.heads * self.state);
        rows_fit(self, student.c, student.stride, self.heads * self.state);
        assert_eq!(teacher.lse_bhl.len(), self.pairs() * self.seq);
        assert_eq!(student.cs_bhl.len(), self.pairs() * self.seq);
        assert_eq!(student.d_h.len(), self.heads);
        assert_eq!(starts_n.len(), self.tokens());
    }
}

fn rows_fit<T>(shape: Shape, at: Slice<T>, stride: usize, width: usize) {
    assert!(stride.is_multiple_of(8) && at.address().is_multiple_of(16), "rows are not aligned");
    assert!(width <= stride && (shape.tokens() - 1) * stride + width <= at.len(), "rows too short");
}

macro_rules! kernel {
    ($shape:expr, $what:literal) => {
        kernel!($shape, $what; 32 16, 32 32, 32 64, 32 128, 64 16, 64 32, 64 64, 64 128,
            128 16, 128 32, 128 64, 128 128)
    };
    ($shape:expr, $what:literal; $($dim:literal $state:literal),*) => {
        match ($shape.dim, $shape.state) {
            $(($dim, $state) => concat!($what, "_d", $dim, "_n", $state),)*
            (dim, state) => panic!("no kernel for heads of {dim} and a state of {state}"),
        }
    };
}

/// `cs_bhl [pairs, seq]`: sums of log a = −softplus(A_log) up to and with each position, of
/// `a_log_nh [n, a_stride]`.
pub fn decay_cumsum(
    gpu: &Gpu,
    shape: Shape,
    (a_log_nh, a_stride): (Slice<f32>, usize),
    cs_bhl: Slice<f32>,
) {
    let (heads, last) = (shape.heads, shape.tokens() - 1);
    assert!(a_stride >= heads && a_log_nh.len() >= last * a_stride + heads, "rows too short");
    assert_eq!(cs_bhl.len(), shape.pairs() * shape.seq);
    launch!(gpu, "decay_cumsum", grid: [shape.pairs(), 1, 1], block: 256, shared: 0;
        a_log_nh, a_stride as i32, cs_bhl, shape.seq as i32, shape.heads as i32);
}

/// Sums of squares into `partials` (see [`Shape::partials`]), dC without its factor into `dc`
/// (rows `d_stride` apart), and `rowdot_bhl [pairs, seq]`.
pub fn rows(
    gpu: &Gpu,
    shape: Shape,
    inputs: Inputs,
    (dc, d_stride): (Slice<bf16>, usize),
    rowdot_bhl: Slice<f32>,
    partials: Slice<f32>,
) {
    shape.check(inputs);
    rows_fit(shape, dc, d_stride, shape.heads * shape.state);
    assert_eq!(rowdot_bhl.len(), shape.pairs() * shape.seq);
    assert_eq!(partials.len(), shape.partials());
    let Shape { batch, seq, heads, kv_heads, .. } = shape;
    let Inputs { teacher, student, starts_n } = inputs;
    launch!(gpu, kernel!(shape, "orient_rows"),
        grid: [shape.pairs() * shape.tiles(), 1, 1], block: shape.threads(), shared: shape.shared();
        teacher.q, teacher.k, teacher.stride as i32, teacher.lse_bhl,
        student.b, student.c, student.stride as i32, student.cs_bhl, student.d_h, starts_n,
        dc, d_stride as i32, rowdot_bhl, partials,
        batch as i32, seq as i32, heads as i32, kv_heads as i32);
}

/// The sums of [`rows`] alone.
pub fn sums(gpu: &Gpu, shape: Shape, inputs: Inputs, partials: Slice<f32>) {
    shape.check(inputs);
    assert_eq!(partials.len(), shape.partials());
    let Shape { batch, seq, heads, kv_heads, .. } = shape;
    let Inputs { teacher, student, starts_n } = inputs;
    launch!(gpu, kernel!(shape, "orient_sums"),
        grid: [shape.pairs() * shape.tiles(), 1, 1], block: shape.threads(), shared: shape.shared();
        teacher.q, teacher.k, teacher.stride as i32, teacher.lse_bhl,
        student.b, student.c, student.stride as i32, student.cs_bhl, student.d_h, starts_n,
        partials, batch as i32, seq as i32, heads as i32, kv_heads as i32);
}

/// dB without its factor into `db` (rows `d_stride` apart), and `coldot_bhl [pairs, seq]`.
pub fn columns(
    gpu: &Gpu,
    shape: Shape,
    inputs: Inputs,
    (db, d_stride): (Slice<bf16>, usize),
    coldot_bhl: Slice<f32>,
) {
    shape.check(inputs);
    rows_fit(shape, db, d_stride, shape.heads * shape.state);
    assert_eq!(coldot_bhl.len(), shape.pairs() * shape.seq);
    let Shape { batch, seq, heads, kv_heads, .. } = shape;
    let Inputs { teacher, student, starts_n } = inputs;
    launch!(gpu, kernel!(shape, "orient_columns"),
        grid: [shape.pairs() * shape.tiles(), 1, 1], block: shape.threads(), shared: shape.shared();
        teacher.q, teacher.k, teacher.stride as i32, teacher.lse_bhl,
        student.b, student.c, student.stride as i32, student.cs_bhl, student.d_h, starts_n,
        db, d_stride as i32, coldot_bhl,
        batch as i32, seq as i32, heads as i32, kv_heads as i32);
}

/// What [`finish`] makes of each pair, `[pairs]` each.
#[derive(Clone, Copy)]
pub struct Norms {
    /// ‖M − A‖.
    pub norm_bh: Slice<f32>,
    /// weight / ‖M − A‖: what dB and dC have to be multiplied with.
    pub factor_bh: Slice<f32>,
    /// ‖A‖.
    pub attention_bh: Slice<f32>,
}

/// What [`finish`] needs for gradients, and where they go.
#[derive(Clone, Copy)]
pub struct Decay {
    /// Of [`rows`].
    pub rowdot_bhl: Slice<f32>,
    /// Of [`columns`].
    pub coldot_bhl: Slice<f32>,
    /// A_log, rows `a_stride` apart.
    pub a_log_nh: Slice<f32>,
    /// Distance between them.
    pub a_stride: usize,
    /// Rows of the projection's gradient: dA_log from `a_column` on, zeros after it.
    pub d_proj: Slice<bf16>,
    /// Distance between them.
    pub proj_stride: usize,
    /// Column of the first head's A_log.
    pub a_column: usize,
    /// Gradient of the skips of each sequence, `[pairs]`, overwritten.
    pub d_d_bh: Slice<f32>,
}

/// Norms of the pairs and, with `decay`, the gradients of A_log and of the skips by sequence.
pub fn finish(
    gpu: &Gpu,
    shape: Shape,
    partials: Slice<f32>,
    weight: f32,
    norms: Norms,
    starts_n: Slice<u32>,
    decay: Option<Decay>,
) {
    assert_eq!(partials.len(), shape.partials());
    for of in [norms.norm_bh, norms.factor_bh, norms.attention_bh] {
        assert_eq!(of.len(), shape.pairs());
    }
    assert_eq!(starts_n.len(), shape.tokens());
    if let Some(decay) = decay {
        let (heads, last) = (shape.heads, shape.tokens() - 1);
        for of in [decay.rowdot_bhl, decay.coldot_bhl] {
            assert_eq!(of.len(), shape.pairs() * shape.seq);
        }
        assert!(decay.a_stride >= heads && decay.a_log_nh.len() >= last * decay.a_stride + heads);
        assert!(decay.a_column + heads <= decay.proj_stride, "A_log has no room");
        assert!(decay.d_proj.len() >= (last + 1) * decay.proj_stride, "rows too short");
        assert_eq!(decay.d_d_bh.len(), shape.pairs());
    }
    // Sums before every position, in double.
    let shared = if decay.is_some() { 8 * shape.seq } else { 0 };
    let of = |stride: fn(&Decay) -> usize| decay.as_ref().map_or(0, stride) as i32;
    launch!(gpu, "orient_finish", grid: [shape.pairs(), 1, 1], block: 256, shared: shared;
        partials, shape.tiles() as i32, weight, norms.norm_bh, norms.factor_bh, norms.attention_bh,
        decay.map(|d| d.d_d_bh), decay.map(|d| d.rowdot_bhl), decay.map(|d| d.coldot_bhl),
        starts_n, decay.map(|d| d.a_log_nh), of(|d| d.a_stride), decay.map(|d| d.d_proj),
        of(|d| d.proj_stride), of(|d| d.a_column), shape.seq as i32, shape.heads as i32);
}

/// Adds `weight · Σ ‖M − A‖` and `weight · Σ ‖A‖` to the two elements of `sums`; with `skips = (d_d_bh, d_d_h)` adds the sum over
/// sequences of the first to the second.
pub fn total(
    gpu: &Gpu,
    shape: Shape,
    norms: Norms,
    weight: f32,
    sums: (Slice<f32>, Slice<f32>),
    skips: Option<(Slice<f32>, Slice<f32>)>,
) {
    assert_eq!((norms.norm_bh.len(), norms.attention_bh.len()), (shape.pairs(), shape.pairs()));
    assert_eq!((sums.0.len(), sums.1.len()), (1, 1));
    if let Some((d_d_bh, d_d_h)) = skips {
        assert_eq!((d_d_bh.len(), d_d_h.len()), (shape.pairs(), shape.heads));
    }
    launch!(gpu, "orient_total", grid: [1, 1, 1], block: 256, shared: 0;
        norms.norm_bh, norms.attention_bh, weight, sums.0, sums.1,
        skips.map(|(from, _)| from), skips.map(|(_, to)| to),
        shape.batch as i32, shape.heads as i32);
}
