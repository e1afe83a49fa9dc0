// What the attention kernels share: tiles of heads in shared memory, fragments read from them, and the
// order in which blocks take up rows.
//
// qkv_nr: a row of a token holds query heads (hq·D) | key heads (hkv·D) | value heads (hkv·D); query head h
// uses kv head h / (hq / hkv). A row at position l sees keys starts[l]..=l of its sequence; `starts` may be
// null (all zero) and never falls within a sequence, so what a tile of rows sees is one range of keys.
#pragma once
#include "prims.cuh"

namespace attention {

constexpr float INF = __builtin_huge_valf();

template <int D> __device__ constexpr float softmax_scale() {  // 1/sqrt(D)
  return D == 32 ? 0.17677669529663687f : D == 64 ? 0.125f : 0.08838834764831845f;
}

// How a block cuts its work: warps × M × 16 = 128 rows, M fragments of rows a warp. Each fragment of the other
// side that is read from shared memory serves M matrix instructions; wide heads have no registers for two.
template <int D> struct Shape {
  static constexpr int M = D <= 64 ? 2 : 1;
  static constexpr int WARPS = 8 / M;
  static constexpr int THREADS = WARPS * 32;
  static constexpr int ROWS = 128;
  static constexpr int OWN = 16 * M;  // rows of a warp
  static constexpr int BLOCKS = D <= 64 ? 2 : 1;  // a multiprocessor
};
constexpr int TILE = 64;   // rows of the other side that come at once
constexpr int CHUNK = 32;  // rows of it that are worked at once

// Where the 16-byte chunk of a row lies in a tile of rows of D elements (in elements): chunks are turned round
// by the row, so that neither 8 rows of one chunk (ldmatrix) nor a row's chunks share a bank.
template <int D> __device__ __forceinline__ int swizzled(int row, int chunk) {
  int turn = D >= 64 ? row & 7 : (row >> 1) & 3;
  return row * D + ((chunk ^ turn) << 3);
}

// Copies `count` rows from `first` on of a head (`head`: its element 0 of position 0) in the background; zeros
// for positions beyond the sequence.
template <int D, int THREADS>
__device__ __forceinline__ void load_tile(bf16* tile, const bf16* head, size_t stride, int first, int count, int seq) {
  constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS;
  int chunk = threadIdx.x % CHUNKS;
#pragma unroll
  for (int row = threadIdx.x / CHUNKS; row < count; row += STEP) {
    int position = first + row;
    bool valid = position < seq;
    cp_async16(tile + swizzled<D>(row, chunk), head + (valid ? position : 0) * stride + chunk * 8, valid);
  }
}

// A lane's chunk 2 kk + i lies at its chunk i's place with bits of 16 kk turned: nothing carries.
//
// Rows 0..15 × elements 16 kk..16 kk + 15 as the A of a product whose sum runs along the row.
template <int D> __device__ __forceinline__ void load_a(uint32_t (&a)[4], const bf16* rows, int kk) {
  int lane = threadIdx.x % 32;
  ldmatrix_x4(a, rows + (swizzled<D>(lane % 16, lane / 16) ^ 16 * kk));
}
// The same as two B's (rows 0..7 and 8..15 are the columns, the sum runs along the row).
template <int D> __device__ __forceinline__ void load_b(uint32_t (&b)[2][2], const bf16* rows, int kk) {
  int lane = threadIdx.x % 32;
  uint32_t r[4];
  ldmatrix_x4(r, rows + (swizzled<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2) ^ 16 * kk));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}
// The same as two B's whose sum runs over the 16 rows; elements 16 c.. and 16 c + 8.. are the columns.
template <int D> __device__ __forceinline__ void load_b_rows(uint32_t (&b)[2][2], const bf16* rows, int c) {
  int lane = threadIdx.x % 32;
  uint32_t r[4];
  ldmatrix_x4_trans(r, rows + (swizzled<D>(lane % 16, lane / 16) ^ 16 * c));
  b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// out[16 M × 32] += a · rowsᵀ, one step of 16 along the rows of `other` (32 rows of a tile).
template <int D, int M>
__device__ __forceinline__ void multiply_step(float (&out)[M][4][4], const uint32_t (&a)[M][4], const bf16* other,
                                              int kk) {
#pragma unroll
  for (int pair = 0; pair < 2; pair++) {
    uint32_t b[2][2];
    load_b<D>(b, other + pair * 16 * D, kk);
#pragma unroll
    for (int m = 0; m < M; m++) {
      mma_bf16(out[m][2 * pair], a[m], b[0]);
      mma_bf16(out[m][2 * pair + 1], a[m], b[1]);
    }
  }
}

// out[16 M × D] += a[16 M × 16] · rows[16 × D].
template <int D, int M>
__device__ __forceinline__ void multiply_rows(float (&out)[M][D / 8][4], const uint32_t (&a)[M][4],
                                              const bf16* rows) {
#pragma unroll
  for (int c = 0; c < D / 16; c++) {
    uint32_t b[2][2];
    load_b_rows<D>(b, rows, c);
#pragma unroll
    for (int m = 0; m < M; m++) {
      mma_bf16(out[m][2 * c], a[m], b[0]);
      mma_bf16(out[m][2 * c + 1], a[m], b[1]);
    }
  }
}

template <int M, int N> __device__ __forceinline__ void clear(float (&x)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) x[m][n][i] = 0;
}

// Columns 16 step.. of a chunk's 32 as the A of a product whose sum runs along them.
template <int M>
__device__ __forceinline__ void pack_a(uint32_t (&a)[M][4], const float (&x)[M][4][4], int step) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* pair = &x[m][2 * step + i / 2][i % 2 * 2];
      a[m][i] = pack2(pair[0], pair[1]);
    }
}

// Writes a warp's 16 M rows × D, times a factor a row, as bf16: through its own rows of a tile, so that whole
// 16-byte chunks go out. Rows from `first` on that are not below `seq` are left out.
template <int D, int M>
__device__ __forceinline__ void store_rows(bf16* tile, const float (&x)[M][D / 8][4], const float (&factor)[M][2],
                                           bf16* head, size_t stride, int first, int seq) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float f = factor[m][half];
        auto at = tile + swizzled<D>(m * 16 + half * 8 + g, n) + 2 * t;
        *reinterpret_cast<uint32_t*>(at) = pack2(x[m][n][2 * half] * f, x[m][n][2 * half + 1] * f);
      }
  __syncwarp();
  constexpr int CHUNKS = D / 8;
#pragma unroll
  for (int i = lane; i < 16 * M * CHUNKS; i += 32) {
    int row = i / CHUNKS, chunk = i % CHUNKS, position = first + row;
    if (position < seq)
      *reinterpret_cast<uint4*>(head + position * stride + chunk * 8) =
          *reinterpret_cast<const uint4*>(tile + swizzled<D>(row, chunk));
  }
}

// Which sequence and head (together `pair`) and which tile of 128 rows a block works on. Blocks go through all tiles
// of some pairs, as many as the L2 cache holds the `elements` of (those that its blocks share), before the next; `turn`
// 0 comes first there and is meant for the tile with most work.
struct Place {
  int pair, turn;
};
__device__ __forceinline__ Place place(int pairs, int tiles, size_t elements) {
  int section = min(pairs, max(1, int((1 << 23) / elements)));
  int id = blockIdx.x, begin = id / (section * tiles) * section;
  int rest = id - begin * tiles, wide = min(section, pairs - begin);
  return {begin + rest % wide, rest / wide};
}

}  // namespace attention
