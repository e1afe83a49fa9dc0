// What the two directions of the SSD scan share: tiles in shared memory, fragments, decays of a chunk.
//
// A head's sequence is cut into chunks of Q tokens, worked on as matrices (Dao and Gu, "Transformers
// are SSMs", 2405.21060, section 6). With cs_l the sum of log2 a over the chunk's tokens up to l and S
// the state entering the chunk (P × N):
//   y_l = Σ_{s≤l} (C_l·B_s) 2^(cs_l−cs_s) x_s + 2^cs_l S C_l       S_out = 2^cs_Q S + Σ_s 2^(cs_Q−cs_s) x_s B_sᵀ
// A document's start forgets what came before: pairs s < start(l) count as zero, and so does S for rows
// with start(l) in this chunk. Decays only ever meet as differences within a chunk, never above zero.
#pragma once
#include "prims.cuh"

namespace ssd {

constexpr int Q = 64;      // tokens of a chunk
constexpr int TILES = 4;   // tiles of 16 rows in it

// Tiles are rows of COLS bf16 without padding; the 16-byte pieces of a row are permuted so that eight
// rows of one column lie in different banks.
template <int COLS> __device__ __forceinline__ int turn(int row) {
  return COLS >= 64 ? row & 7 : COLS == 32 ? row >> 1 & 3 : row >> 2 & 1;
}
template <int COLS> __device__ __forceinline__ bf16* piece_at(bf16* tile, int row, int piece) {
  return tile + row * COLS + (piece ^ turn<COLS>(row)) * 8;
}
// The same for row0 + row, piece0 + piece where row0 is a multiple of 8 and piece0 of what is above
// `piece`: then what follows from the lane (row, piece) is one number, and a constant turns it.
template <int COLS>
__device__ __forceinline__ bf16* piece_at(bf16* tile, int row0, int row, int piece0, int piece) {
  return tile + row0 * COLS + ((row * COLS + (piece ^ turn<COLS>(row)) * 8) ^ piece0 * 8);
}
// Two neighbours of row row0 + g as the fragments have them: columns 8 piece + 2 t.
template <int COLS> __device__ __forceinline__ uint32_t& pair_at(bf16* tile, int row0, int piece, int lane) {
  return *reinterpret_cast<uint32_t*>(piece_at<COLS>(tile, row0, lane / 4, piece, 0) + lane % 4 * 2);
}

// Copies ROWS rows in the background, a share by each of THREADS threads; those from `valid` on become zeros.
template <int ROWS, int COLS, int THREADS>
__device__ __forceinline__ void load_tile(bf16* tile, const bf16* from, size_t stride, int valid) {
  constexpr int PIECES = COLS / 8, STEP = THREADS / PIECES;
  int row = threadIdx.x % THREADS / PIECES, piece = threadIdx.x % PIECES;
  const bf16* at = from + row * stride + piece * 8;
#pragma unroll
  for (int i = 0; i < (ROWS + STEP - 1) / STEP; i++) {
    bool there = row + i * STEP < valid;
    if (ROWS % STEP == 0 || row + i * STEP < ROWS) cp_async16(piece_at<COLS>(tile, row + i * STEP, piece), at, there);
    at += STEP * stride;
  }
}

// A warp's lane, hidden from the compiler: inside a loop it keeps the dozens of addresses that follow from
// the lane from being made once and kept in registers, which are better used.
__device__ __forceinline__ int hidden_lane() {
  int lane = threadIdx.x % 32;
  return __shfl_sync(FULL, lane, lane) & 31;
}

// Fragments. The A operand from a tile whose rows are A's rows, or whose rows are A's columns (k).
template <int COLS> __device__ __forceinline__ void load_a(uint32_t (&a)[4], bf16* tile, int m0, int k0, int lane) {
  ldmatrix_x4(a, piece_at<COLS>(tile, m0, lane % 16, k0 / 8, lane / 16));
}
template <int COLS>
__device__ __forceinline__ void load_a_by_k(uint32_t (&a)[4], bf16* tile, int m0, int k0, int lane) {
  ldmatrix_x4_trans(a, piece_at<COLS>(tile, k0, lane / 16 * 8 + lane % 8, m0 / 8, lane / 8 % 2));
}
// C[·, n0..n0+16] += A·B for one step of k, B from a tile whose rows are its columns n, or its rows k.
__device__ __forceinline__ void mma_pair(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
  const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
  mma_bf16(c0, a, b0);
  mma_bf16(c1, a, b1);
}
template <int COLS>
__device__ __forceinline__ void mma_by_n(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4], bf16* tile, int n0,
                                         int k0, int lane) {
  uint32_t b[4];
  ldmatrix_x4(b, piece_at<COLS>(tile, n0, lane / 16 * 8 + lane % 8, k0 / 8, lane / 8 % 2));
  mma_pair(c0, c1, a, b);
}
template <int COLS>
__device__ __forceinline__ void mma_by_k(float (&c0)[4], float (&c1)[4], const uint32_t (&a)[4], bf16* tile, int n0,
                                         int k0, int lane) {
  uint32_t b[4];
  ldmatrix_x4_trans(b, piece_at<COLS>(tile, k0, lane % 16, n0 / 8, lane / 16));
  mma_pair(c0, c1, a, b);
}

// Rows g and g + 8 of accumulators times a factor each.
template <int NT> __device__ __forceinline__ void scale_rows(float (&c)[NT][4], float low, float high) {
#pragma unroll
  for (int j = 0; j < NT; j++) {
    c[j][0] *= low, c[j][1] *= low;
    c[j][2] *= high, c[j][3] *= high;
  }
}
template <int NT> __device__ __forceinline__ void clear(float (&c)[NT][4]) {
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) c[j][i] = 0.0f;
}
// Scales the columns (k) of an A fragment: those of k0 + 2t.. by `near`, of k0 + 2t + 8.. by `far`.
__device__ __forceinline__ void scale_k(uint32_t (&a)[4], float2 near, float2 far) {
  a[0] = pack2(low2(a[0]) * near.x, high2(a[0]) * near.y);
  a[1] = pack2(low2(a[1]) * near.x, high2(a[1]) * near.y);
  a[2] = pack2(low2(a[2]) * far.x, high2(a[2]) * far.y);
  a[3] = pack2(low2(a[3]) * far.x, high2(a[3]) * far.y);
}

// Four words of four lanes, transposed: word i of lane t becomes word t of lane i. Turns a fragment's
// four neighbouring tiles (2 columns a lane each) into 16 bytes a lane, and back.
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4]) {
  int t = threadIdx.x % 4;
  bool odd = t & 1, high = t & 2;
  uint32_t r0 = __shfl_xor_sync(FULL, odd ? v[0] : v[1], 1), r1 = __shfl_xor_sync(FULL, odd ? v[2] : v[3], 1);
  uint32_t w0 = odd ? r0 : v[0], w1 = odd ? v[1] : r0, w2 = odd ? r1 : v[2], w3 = odd ? v[3] : r1;
  uint32_t s0 = __shfl_xor_sync(FULL, high ? w0 : w2, 2), s1 = __shfl_xor_sync(FULL, high ? w1 : w3, 2);
  v[0] = high ? s0 : w0, v[1] = high ? s1 : w1, v[2] = high ? w2 : s0, v[3] = high ? w3 : s1;
}
// Stores a row of NT fragment words, 16 bytes a lane where there are enough: `put(column, value)` gets
// the row's columns from `column` on. All lanes of the warp must call.
template <int NT, class Put> __device__ __forceinline__ void store_row(const uint32_t (&words)[NT], Put put) {
  int t = threadIdx.x % 4;
  if constexpr (NT % 4 == 0) {
#pragma unroll
    for (int q = 0; q < NT; q += 4) {
      uint32_t v[4] = {words[q], words[q + 1], words[q + 2], words[q + 3]};
      transpose_quad(v);
      put(8 * (q + t), make_uint4(v[0], v[1], v[2], v[3]));
    }
  } else {
#pragma unroll
    for (int j = 0; j < NT; j++) put(8 * j + 2 * t, words[j]);
  }
}
// To global memory, where the row exists.
template <int NT> __device__ __forceinline__ void store_row(const uint32_t (&words)[NT], bf16* row, bool valid) {
  store_row<NT>(words, [&](int column, auto value) {
    if (valid) *reinterpret_cast<decltype(value)*>(row + column) = value;
  });
}
// Row g (half 0) or g + 8 (half 1) of accumulators as words.
template <int NT> __device__ __forceinline__ void pack_half(uint32_t (&words)[NT], const float (&c)[NT][4], int half) {
#pragma unroll
  for (int j = 0; j < NT; j++) words[j] = pack2(c[j][2 * half], c[j][2 * half + 1]);
}

// How the warps share a P × N state: WP of them along P with RT tiles of 16 rows, WN along N with NT
// tiles of 8 columns.
template <int P, int N, int WARPS> struct Share {
  static constexpr int WP = P / 16 < WARPS ? P / 16 : WARPS;
  static constexpr int RT = P / 16 / WP;
  static constexpr int WN = WARPS / WP < N / 16 ? WARPS / WP : N / 16;
  static constexpr int NT = N / WN / 8;
  static __device__ __forceinline__ bool active(int warp) { return warp < WP * WN; }
  static __device__ __forceinline__ int row(int warp, int i) { return (warp % WP * RT + i) * 16; }
  static __device__ __forceinline__ int column(int warp) { return warp / WP * NT * 8; }
};

// state += Σ_k weight_k rows_k columns_kᵀ over the chunk, `rows` [Q, P] and `columns` [Q, N]. Weights
// rise or fall along the chunk, so that a tile whose `heaviest` end is zero has none.
template <int P, int N, int WARPS, bool RISING>
__device__ __forceinline__ void add_outer(float (&state)[Share<P, N, WARPS>::RT][Share<P, N, WARPS>::NT][4], int warp,
                                          int lane, bf16* rows, bf16* columns, const float* weight) {
  using S = Share<P, N, WARPS>;
  int t = lane % 4;
#pragma unroll
  for (int k0 = 0; k0 < Q; k0 += 16) {
    if (weight[RISING ? k0 + 15 : k0] == 0.0f) continue;
    float2 near = *reinterpret_cast<const float2*>(weight + k0 + 2 * t);
    float2 far = *reinterpret_cast<const float2*>(weight + k0 + 2 * t + 8);
#pragma unroll
    for (int i = 0; i < S::RT; i++) {
      uint32_t a[4];
      load_a_by_k<P>(a, rows, S::row(warp, i), k0, lane);
      scale_k(a, near, far);
#pragma unroll
      for (int j = 0; j < S::NT; j += 2)
        mma_by_k<N>(state[i][j], state[i][j + 1], a, columns, S::column(warp) + 8 * j, k0, lane);
    }
  }
}

// The state as bf16: to a tile and, where wanted, to a [P, N] matrix.
template <int P, int N, int WARPS>
__device__ __forceinline__ void store_state(const float (&state)[Share<P, N, WARPS>::RT][Share<P, N, WARPS>::NT][4],
                                            int warp, int lane, bf16* tile, bf16* matrix) {
  using S = Share<P, N, WARPS>;
  int g = lane / 4, first = S::column(warp);
#pragma unroll
  for (int i = 0; i < S::RT; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = S::row(warp, i) + g + 8 * half;
      uint32_t words[S::NT];
      pack_half(words, state[i], half);
      store_row<S::NT>(words, [&](int column, auto value) {
        using V = decltype(value);
        *reinterpret_cast<V*>(piece_at<N>(tile, row, (first + column) / 8) + column % 8) = value;
        if (matrix) *reinterpret_cast<V*>(matrix + row * N + first + column) = value;
      });
    }
}

// log2 a = −log2(1 + e^A_log).
__device__ __forceinline__ float log2_decay(float a_log) {
  return -LOG2E * (a_log > 20.0f ? a_log : log1pf(exp_fast(a_log)));
}

// Decays of a chunk.
struct Decays {
  float sum[Q];    // cs
  float first[Q];  // 2^cs_l: how much of the entering state token l sees; 0 after a start
  float last[Q];   // 2^(cs_Q − cs_s): how much of token s the leaving state keeps; 0 before the last start
  int low[Q];      // first position (of the chunk, may be negative) that token l sees; non-decreasing
};
// low ≤ s ≤ l, for low ≤ l.
__device__ __forceinline__ bool is_seen(int s, int l, int low) { return unsigned(s - low) <= unsigned(l - low); }
// What a lane needs of its two tokens 2 lane and 2 lane + 1 to make them.
struct Raw {
  float a_log[2];
  int start[2];
};
// Fetches them; `token` is the chunk's first one, of which `len` exist.
__device__ __forceinline__ Raw fetch_decays(const float* a_log, int stride, const uint32_t* starts, size_t token,
                                            int len) {
  Raw raw;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int at = 2 * (threadIdx.x % 32) + i, there = min(at, len - 1);
    raw.a_log[i] = a_log[(token + there) * stride];
    raw.start[i] = int(starts[token + there]);
  }
  return raw;
}
// A warp's work. Missing tokens at the end decay nothing and belong to the last document.
__device__ __forceinline__ void make_decays(Decays& to, const Raw& raw, int position, int len) {
  int lane = threadIdx.x % 32, at = 2 * lane;
  float step[2] = {at < len ? log2_decay(raw.a_log[0]) : 0.0f, at + 1 < len ? log2_decay(raw.a_log[1]) : 0.0f};
  float sum = step[0] + step[1];
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    float below = __shfl_up_sync(FULL, sum, d);
    if (lane >= d) sum += below;
  }
  float before = __shfl_up_sync(FULL, sum, 1), total = __shfl_sync(FULL, sum, 31);
  float sums[2] = {(lane ? before : 0.0f) + step[0], sum};
  int last_low = __shfl_sync(FULL, raw.start[1], 31) - position;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int low = raw.start[i] - position;
    to.sum[at + i] = sums[i];
    to.low[at + i] = low;
    to.first[at + i] = low < 0 ? exp2_fast(sums[i]) : 0.0f;
    to.last[at + i] = at + i >= last_low ? exp2_fast(total - sums[i]) : 0.0f;
  }
}

}  // namespace ssd
