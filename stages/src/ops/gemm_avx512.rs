//! Matrix products for AVX-512: register tiles of 6×64 over packed panels. At the sizes of one
//! shard (hundreds of rows, inner dimensions of 16 to 512) this is two to three times faster than
//! the `gemm` crate, which serves every other machine.
//!
//! Every element is a chain of fused multiply-adds over `k` in blocks of [`DEPTH`]: its bits depend
//! on the two vectors and on nothing else, neither on the other rows nor on strides.

use std::arch::x86_64::{
    __m512, __mmask16, _mm_loadu_ps, _mm_movehl_ps, _mm_movelh_ps, _mm_storeu_ps, _mm_unpackhi_ps,
    _mm_unpacklo_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_storeu_ps,
    _mm512_maskz_loadu_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::cell::RefCell;

use super::gemm::Mat;

/// Floats of a vector.
const LANES: usize = 16;
/// Vectors of a tile's row.
const WIDE: usize = 4;
/// Rows of a tile.
const TALL: usize = 6;
/// Inner dimension that is worked on at once: a panel of [`DEPTH`] × 64 stays in the cache.
const DEPTH: usize = 256;
/// Columns that are packed at once.
const COLUMNS: usize = 256;
/// With fewer rows than this, packing a contiguous right side costs more than it gives.
const ROWS_TO_PACK: usize = 96;

/// Whether this machine can run [`gemm`].
pub fn available() -> bool {
    std::arch::is_x86_feature_detected!("avx512f")
}

/// Up to so many columns a left side that is not contiguous is read where it is.
const NARROW: usize = 32;

struct Packed {
    a: Vec<f32>,
    b: Vec<f32>,
}

thread_local! {
    static PACKED: RefCell<Packed> = RefCell::new(Packed {
        a: vec![0.0; DEPTH * TALL],
        b: vec![0.0; DEPTH * COLUMNS],
    });
}

/// As [`super::gemm::gemm`], whose checks have been made: `out` spans `a.rows` rows `stride` apart.
///
/// # Safety
///
/// The machine has AVX-512 F, and all three matrices lie within their slices.
pub unsafe fn gemm(out: &mut [f32], stride: usize, beta: f32, alpha: f32, a: Mat, b: Mat) {
    PACKED.with_borrow_mut(|packed| {
        // SAFETY: passed on to the caller.
        unsafe { blocks(packed, out, stride, beta, alpha, a, b) }
    });
}

#[target_feature(enable = "avx512f")]
unsafe fn blocks(
    packed: &mut Packed,
    out: &mut [f32],
    stride: usize,
    beta: f32,
    alpha: f32,
    a: Mat,
    b: Mat,
) {
    let direct = b.col == 1 && a.rows < ROWS_TO_PACK;
    for first in (0..a.cols).step_by(DEPTH) {
        let depth = DEPTH.min(a.cols - first);
        let beta = if first == 0 { beta } else { 1.0 };
        for left in (0..b.cols).step_by(COLUMNS) {
            let columns = COLUMNS.min(b.cols - left);
            if !direct {
                pack_right(&mut packed.b, b, first..first + depth, left..left + columns);
            }
            for top in (0..a.rows).step_by(TALL) {
                let rows = TALL.min(a.rows - top);
                let start = top * a.row + first * a.col;
                // SAFETY: `start` is an element of `a`, or `depth` is 0 and nothing is read.
                let mut side =
                    unsafe { Side { at: a.data.as_ptr().add(start), row: a.row, step: a.col } };
                if a.col != 1 && columns > NARROW {
                    pack_left(&mut packed.a, &a.data[start..], (a.row, a.col), rows, depth);
                    side = Side { at: packed.a.as_ptr(), row: 1, step: TALL };
                }
                for panel in (0..columns).step_by(LANES * WIDE) {
                    let width = (columns - panel).min(LANES * WIDE);
                    let (right, step) = match direct {
                        true => (b.data[first * b.row + left + panel..].as_ptr(), b.row),
                        false => {
                            (packed.b[panel * depth..].as_ptr(), width.next_multiple_of(LANES))
                        }
                    };
                    let to = &mut out[top * stride + left + panel..];
                    let tile = Tile {
                        depth,
                        right,
                        step,
                        to: to.as_mut_ptr(),
                        stride,
                        width,
                        beta,
                        alpha,
                    };
                    // SAFETY: all sides span `depth`; `to` has `rows` rows of `width`.
                    unsafe { tile.any(rows, side) };
                }
            }
        }
    }
}

/// Rows `depth` of columns `columns` of `b` as panels of 64 columns, each row after row, padded
/// with zeros to whole vectors.
#[target_feature(enable = "avx512f")]
fn pack_right(
    to: &mut [f32],
    b: Mat,
    depth: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
) {
    let mut at = 0;
    for left in columns.clone().step_by(LANES * WIDE) {
        let width = (columns.end - left).min(LANES * WIDE);
        let step = width.next_multiple_of(LANES);
        let panel = &mut to[at..at + depth.len() * step];
        at += panel.len();
        if step != width {
            panel.fill(0.0);
        }
        if b.col == 1 {
            for (row, k) in panel.chunks_exact_mut(step).zip(depth.clone()) {
                row[..width].copy_from_slice(&b.data[k * b.row + left..][..width]);
            }
            continue;
        }
        // Transposed: `k` runs along rows of `b`'s storage. Squares of four, then what is left.
        let square = if b.row == 1 { (width & !3, depth.len() & !3) } else { (0, 0) };
        for j in (0..square.0).step_by(4) {
            let from = (left + j) * b.col + depth.start;
            for k in (0..square.1).step_by(4) {
                let source = &b.data[from + k..from + k + 3 * b.col + 4];
                transpose(
                    source,
                    b.col,
                    &mut panel[k * step + j..k * step + j + 3 * step + 4],
                    step,
                );
            }
        }
        for j in 0..width {
            let done = if j < square.0 { square.1 } else { 0 };
            for k in done..depth.len() {
                panel[k * step + j] = b.data[(left + j) * b.col + (depth.start + k) * b.row];
            }
        }
    }
}

/// Four rows of four, `from_row` apart, to four columns of four, rows `to_row` apart.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(from: &[f32], from_row: usize, to: &mut [f32], to_row: usize) {
    assert!(from.len() >= 3 * from_row + 4 && to.len() >= 3 * to_row + 4);
    let (from, to) = (from.as_ptr(), to.as_mut_ptr());
    // SAFETY: the assertion covers all eight rows.
    unsafe {
        let row = |i: usize| _mm_loadu_ps(from.add(i * from_row));
        let (a, b, c, d) = (row(0), row(1), row(2), row(3));
        let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
        _mm_storeu_ps(to, _mm_movelh_ps(ab, cd));
        _mm_storeu_ps(to.add(to_row), _mm_movehl_ps(cd, ab));
        _mm_storeu_ps(to.add(2 * to_row), _mm_movelh_ps(ab_high, cd_high));
        _mm_storeu_ps(to.add(3 * to_row), _mm_movehl_ps(cd_high, ab_high));
    }
}

/// `rows` × `depth` of the left side, column after column, [`TALL`] apart.
#[target_feature(enable = "avx512f")]
fn pack_left(to: &mut [f32], a: &[f32], (row, col): (usize, usize), rows: usize, depth: usize) {
    let columns = to.chunks_exact_mut(TALL).take(depth).enumerate();
    if row == 1 && rows == TALL {
        columns.for_each(|(k, to)| to.copy_from_slice(&a[k * col..][..TALL]));
        return;
    }
    for (k, to) in columns {
        for (i, to) in to[..rows].iter_mut().enumerate() {
            *to = a[k * col + i * row];
        }
    }
}

/// The left side of a tile: element `(i, k)` is `at[i * row + k * step]`.
#[derive(Clone, Copy)]
struct Side {
    at: *const f32,
    row: usize,
    step: usize,
}

/// A loop written out, since indices must be constants for sums to stay in registers.
macro_rules! unroll {
    ($i:ident in [$($n:literal)*] if $condition:expr, $body:block) => {
        $({
            const $i: usize = $n;
            if $condition $body
        })*
    };
}

/// The rest of a tile.
struct Tile {
    depth: usize,
    right: *const f32,
    step: usize,
    to: *mut f32,
    stride: usize,
    width: usize,
    beta: f32,
    alpha: f32,
}

impl Tile {
    /// The tile for any number of `rows` up to [`TALL`] and any width up to 64.
    #[target_feature(enable = "avx512f")]
    unsafe fn any(&self, rows: usize, side: Side) {
        // SAFETY: passed on to the caller; a tile of R rows is only made when they are there.
        unsafe {
            match self.width.div_ceil(LANES) {
                1 => self.rows::<1>(rows, side),
                2 => self.rows::<2>(rows, side),
                3 => self.rows::<3>(rows, side),
                _ => self.rows::<WIDE>(rows, side),
            }
        }
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn rows<const V: usize>(&self, rows: usize, side: Side) {
        // SAFETY: as in `any`.
        unsafe {
            match rows {
                1 => self.run::<1, V>(side),
                2 => self.run::<2, V>(side),
                3 => self.run::<3, V>(side),
                4 => self.run::<4, V>(side),
                5 => self.run::<5, V>(side),
                _ => self.run::<TALL, V>(side),
            }
        }
    }

    /// `R` rows of `V` vectors. The last vector is masked, so that a right side that is not packed
    /// is never read beyond its row.
    #[target_feature(enable = "avx512f")]
    unsafe fn run<const R: usize, const V: usize>(&self, side: Side) {
        let last: __mmask16 = u16::MAX >> (V * LANES - self.width);
        let mut sums = [[_mm512_setzero_ps(); WIDE]; TALL];
        // SAFETY: the sides span `depth`, rows have `width` elements, of which `last` covers the
        // last vector's.
        unsafe {
            for k in 0..self.depth {
                let (row, column) = (self.right.add(k * self.step), side.at.add(k * side.step));
                let mut right = [_mm512_setzero_ps(); WIDE];
                unroll!(J in [0 1 2 3] if J < V, {
                    right[J] = load(row.add(J * LANES), J + 1 == V, last);
                });
                unroll!(I in [0 1 2 3 4 5] if I < R, {
                    let left = _mm512_set1_ps(*column.add(I * side.row));
                    unroll!(J in [0 1 2 3] if J < V, {
                        sums[I][J] = _mm512_fmadd_ps(left, right[J], sums[I][J]);
                    });
                });
            }
            let (alpha, beta) = (_mm512_set1_ps(self.alpha), _mm512_set1_ps(self.beta));
            unroll!(I in [0 1 2 3 4 5] if I < R, {
                unroll!(J in [0 1 2 3] if J < V, {
                    let (to, partial) = (self.to.add(I * self.stride + J * LANES), J + 1 == V);
                    let mut value = _mm512_mul_ps(sums[I][J], alpha);
                    if self.beta != 0.0 {
                        value = _mm512_fmadd_ps(load(to, partial, last), beta, value);
                    }
                    match partial {
                        true => _mm512_mask_storeu_ps(to, last, value),
                        false => _mm512_storeu_ps(to, value),
                    }
                });
            });
        }
    }
}

/// Sixteen floats, or those of `mask` if `partial`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(from: *const f32, partial: bool, mask: __mmask16) -> __m512 {
    // SAFETY: the caller's: sixteen floats are there, or those of the mask.
    unsafe {
        match partial {
            true => _mm512_maskz_loadu_ps(mask, from),
            false => _mm512_loadu_ps(from),
        }
    }
}
