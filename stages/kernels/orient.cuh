// Matrix orientation, the loss of MOHAWK's first phase (2408.10189, stage 1), in tiles: never a
// seq × seq matrix in memory. For every (sequence b, head h), l the query, s the key:
//
//   A[l,s] = exp(q_l·k_s / √dim - lse_l)                  re-formed from rotated Q, K and the row log-sum-exp
//   L[l,s] = exp(cs_l - cs_s)                             cs: inclusive cumulative sum of log a
//   M[l,s] = (C_l·B_s) L[l,s] + D [l = s]                 for starts[l] <= s <= l, else 0
//   E = M - A,   P = E∘L,   dC = P B,   dB = Pᵀ C,   dD = trace E,   all without weight / ‖E‖ (linear in it)
//   rowdot_l = C_l·dC_l,  coldot_s = B_s·dB_s             whose sums give d(log a), see orient_finish.cu
//
// Rows and columns are one body: a block owns OWN rows (columns) of E and goes through tiles of OTHER keys
// (queries). The own side's operands and the result stay in registers, the other side's come through shared
// memory, two stages. Tensor cores form S and G = C Bᵀ (or their transposes, the same sums in the same order),
// P is rounded to bf16 where it stands and is an operand at once. Both passes form P with the same bits, so that
// sums of rowdot and of coldot cancel where they have to.
//
// L costs no exponential per element below the diagonal's tiles: with m = cs at the last key of the key tile,
// exp(cs_l - cs_s) = exp(cs_l - m) exp(m - cs_s), both at most 1. Tiles that the diagonal or a document's start
// cuts take the exponential of each element.
#pragma once
#include "orient_load.cuh"

namespace orient {

// Everything is inlined, arrays live in registers.
template <int DIM, int N, bool COLUMNS, bool GRADIENTS> struct Pass : Operands<DIM, N, COLUMNS> {
  using Base = Operands<DIM, N, COLUMNS>;
  using Z = Sizes<DIM, N>;
  static constexpr int BLOCKS = Z::BLOCKS;
  using Base::p, Base::memory, Base::item, Base::tile, Base::head, Base::token, Base::lane, Base::group, Base::quad,
        Base::first, Base::grain, Base::own_qk, Base::own_bc, Base::cs, Base::lse2, Base::factor, Base::last_start,
        Base::out, Base::squares, Base::attention, Base::trace;
  using Base::qk_stage, Base::bc_stage, Base::stats, Base::cs_at, Base::start_at, Base::range, Base::load_stage,
        Base::fetch_stats, Base::store_stats, Base::load_own, Base::begin, Base::own_position;

  // S and G of this warp's own rows against 16 others.
  struct Products { float s[BLOCKS][2][4], g[BLOCKS][2][4]; };

  __device__ __forceinline__ Pass(const Problem& p, char* memory) : Base(p, memory) {}

  // `chunk`: first of 16 others in the stage.
  __device__ __forceinline__ void products(Products& to, int stage, int chunk) const {
    product<DIM, Z::QK_ROW>(to.s, own_qk, qk_stage(stage), chunk);
    product<N, Z::BC_ROW>(to.g, own_bc, bc_stage(stage), chunk);
  }
  template <int WIDTH, int ROW>
  __device__ __forceinline__ void product(float (&to)[BLOCKS][2][4], const uint32_t (&own)[BLOCKS][WIDTH / 16][4],
                                          const bf16* other, int chunk) const {
    const bf16* from = other + (chunk + lane / 16 * 8 + lane % 8) * ROW + lane / 8 % 2 * 8;
#pragma unroll
    for (int m = 0; m < BLOCKS; m++)
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) to[m][n][i] = 0;
#pragma unroll
    for (int k = 0; k < WIDTH / 16; k++) {
      uint32_t r[4];
      ldmatrix_x4(r, from + k * 16);
      const uint32_t low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
#pragma unroll
      for (int m = 0; m < BLOCKS; m++) {
        mma_bf16(to[m][0], own[m][k], low);
        mma_bf16(to[m][1], own[m][k], high);
      }
    }
  }

  __device__ __forceinline__ void sum(int m, float e, float a) {
    if (COLUMNS) return;
    squares[m] = fmaf(e, e, squares[m]);
    attention[m] = fmaf(a, a, attention[m]);
  }

  // Turns S into P where the whole tile is seen and lies below the diagonal.
  __device__ __forceinline__ void compare(Products& at, int stage, int chunk) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const float* from = stats(stage) + chunk + n * 8 + quad * 2;
      const int array = COLUMNS ? 3 + grain % GRAINS : 1;
      const float2 other = *reinterpret_cast<const float2*>(from + array * OTHER);
      const float2 lse = COLUMNS ? *reinterpret_cast<const float2*>(from + OTHER) : make_float2(0, 0);
#pragma unroll
      for (int m = 0; m < BLOCKS; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float decay = factor[m][i / 2] * (i % 2 ? other.y : other.x);
          const float minus = COLUMNS ? (i % 2 ? lse.y : lse.x) : lse2[m][i / 2];
          const float a = exp2_fast(fmaf(at.s[m][n][i], Z::SCALE2, -minus));
          const float e = fmaf(at.g[m][n][i], decay, -a);
          sum(m, e, a);
          at.s[m][n][i] = e * decay;
        }
    }
  }

  // What cut tiles alone need of the own side; read when there is one, to keep registers free.
  struct Cut { float d, cs[BLOCKS][2]; int start[BLOCKS][2]; };
  __device__ __forceinline__ void load_cut(Cut& cut) const {
    cut.d = p.d_h[head];
#pragma unroll
    for (int m = 0; m < BLOCKS; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int position = own_position(m, r);
        if (COLUMNS) cut.cs[m][r] = cs_at(position);
        else cut.start[m][r] = position < p.seq ? start_at(position) : NOBODY;
      }
  }

  // The same where the diagonal, a document's start or the end of the sequence may cut the tile.
  __device__ __forceinline__ void compare_masked(Products& at, const Cut& cut, int other, int stage, int chunk) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      const int index = chunk + n * 8 + quad * 2;
      const float* from = stats(stage) + index;
      const float2 other_cs = *reinterpret_cast<const float2*>(from);
      const float2 lse = COLUMNS ? *reinterpret_cast<const float2*>(from + OTHER) : make_float2(0, 0);
      const int2 since = COLUMNS ? *reinterpret_cast<const int2*>(from + 2 * OTHER) : make_int2(0, 0);
#pragma unroll
      for (int m = 0; m < BLOCKS; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int r = i / 2, own_at = own_position(m, r), other_at = other * OTHER + index + i % 2;
          const bool seen = COLUMNS ? other_at >= own_at && own_at >= (i % 2 ? since.y : since.x)
                                    : other_at <= own_at && other_at >= cut.start[m][r];
          const float there = i % 2 ? other_cs.y : other_cs.x;
          const float difference = COLUMNS ? exp_difference(there, cut.cs[m][r]) : exp_difference(cs[m][r], there);
          const float minus = COLUMNS ? (i % 2 ? lse.y : lse.x) : lse2[m][r];
          const float decay = seen ? difference : 0;
          const float a = seen ? exp2_fast(fmaf(at.s[m][n][i], Z::SCALE2, -minus)) : 0;
          const float skip = seen && own_at == other_at ? cut.d : 0;
          const float e = fmaf(at.g[m][n][i], decay, -a) + skip;
          sum(m, e, a);
          if (!COLUMNS) trace += seen && own_at == other_at ? e : 0;
          at.s[m][n][i] = e * decay;
        }
    }
  }

  // out += P times the other side's B or C.
  __device__ __forceinline__ void spread(const Products& at, int stage, int chunk) {
    uint32_t mix[BLOCKS][4];
#pragma unroll
    for (int m = 0; m < BLOCKS; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) mix[m][i] = pack2(at.s[m][i / 2][i % 2 * 2], at.s[m][i / 2][i % 2 * 2 + 1]);
    const bf16* from = bc_stage(stage) + (chunk + lane % 16) * Z::BC_ROW + lane / 16 * 8;
#pragma unroll
    for (int j = 0; j < N / 16; j++) {
      uint32_t r[4];
      ldmatrix_x4_trans(r, from + j * 16);
      const uint32_t low[2] = {r[0], r[1]}, high[2] = {r[2], r[3]};
#pragma unroll
      for (int m = 0; m < BLOCKS; m++) {
        mma_bf16(out[m][2 * j], mix[m], low);
        mma_bf16(out[m][2 * j + 1], mix[m], high);
      }
    }
  }

  // One chunk after the other: few registers and little code won over chunks woven into each other.
  __device__ __forceinline__ void whole_tile(int other, int stage) {
    if (!COLUMNS) {
      const float m_other = stats(stage)[OTHER - 1];
#pragma unroll
      for (int m = 0; m < BLOCKS; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) factor[m][r] = exp_difference(cs[m][r], m_other);
    }
#pragma unroll 1
    for (int c = 0; c < OTHER / 16; c++) {
      Products at;
      products(at, stage, c * 16);
      compare(at, stage, c * 16);
      if constexpr (GRADIENTS) spread(at, stage, c * 16);
    }
  }

  __device__ __forceinline__ void cut_tile(int other, int stage) {
    Cut cut;
    load_cut(cut);
#pragma unroll 1
    for (int chunk = 0; chunk < OTHER; chunk += 16) {
      const int begin = other * OTHER + chunk;
      if (COLUMNS ? begin + 15 < first : begin > first + 16 * BLOCKS - 1) continue;
      Products at;
      products(at, stage, chunk);
      compare_masked(at, cut, other, stage, chunk);
      if constexpr (GRADIENTS) spread(at, stage, chunk);
    }
  }
  // Both passes decide by the pair of tiles alone, so that they form the same L.
  __device__ __forceinline__ void one_tile(int other, int stage) {
    const int query = COLUMNS ? other : grain, key = COLUMNS ? grain : other;
    if (query < key) return;
    const int last = min(OTHER - 1, p.seq - 1 - other * OTHER);
    const int since = COLUMNS ? reinterpret_cast<const int*>(stats(stage))[2 * OTHER + last] : last_start;
    if (query > key && since <= key * OTHER) whole_tile(other, stage);
    else cut_tile(other, stage);
  }

  __device__ __forceinline__ void run() {
    load_own();  // on its way while the rest is found out
    const int2 others = range();
    load_stage(others.x, 0);
    fetch_stats(others.x);
    begin();
    store_stats(0);
#pragma unroll 1
    for (int other = others.x; other <= others.y; other++) {
      const int stage = (other - others.x) & 1;
      cp_async_wait<0>();
      __syncthreads();  // this tile is there for everybody, everybody has left the one before
      if (other < others.y) {
        load_stage(other + 1, stage ^ 1);
        fetch_stats(other + 1);
      }
      one_tile(other, stage);
      if (other < others.y) store_stats(stage ^ 1);
    }
    __syncthreads();
    if (!COLUMNS) write_sums();
    if constexpr (GRADIENTS) write_gradients();
  }

  __device__ __forceinline__ void write_sums() {
    __shared__ float sums[Z::WARPS][3];
    float a = 0, b = 0;
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) a += squares[m], b += attention[m];
    a = warp_sum(a), b = warp_sum(b);
    const float c = warp_sum(trace);
    float* own = sums[threadIdx.x / 32];
    if (lane == 0) own[0] = a, own[1] = b, own[2] = c;
    __syncthreads();
    if (threadIdx.x >= 4) return;
    float total = 0;
    for (int w = 0; w < Z::WARPS; w++) total += threadIdx.x < 3 ? sums[w][threadIdx.x] : 0;
    p.partials[(size_t(item) * ((p.seq + OWN - 1) / OWN) + tile) * 4 + threadIdx.x] = total;
  }

  // Dots from the accumulators, whose layout is that of the own operand; rows through shared memory, so that
  // they are written 16 bytes at a time.
  __device__ __forceinline__ void write_gradients() {
    auto rows = reinterpret_cast<bf16*>(memory) + (first - tile * OWN) * Z::BC_ROW;
#pragma unroll
    for (int m = 0; m < BLOCKS; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float dot = 0;
        auto to = reinterpret_cast<uint32_t*>(rows + (m * 16 + r * 8 + group) * Z::BC_ROW) + quad;
#pragma unroll
        for (int j = 0; j < N / 8; j++) {
          const uint32_t own = own_bc[m][j / 2][r + j % 2 * 2];
          const float x = out[m][j][r * 2], y = out[m][j][r * 2 + 1];
          dot = fmaf(x, low2(own), dot);
          dot = fmaf(y, high2(own), dot);
          to[j * 4] = pack2(x, y);
        }
        dot += __shfl_xor_sync(FULL, dot, 1);
        dot += __shfl_xor_sync(FULL, dot, 2);
        const int position = own_position(m, r);
        if (quad == 0 && position < p.seq) p.dot_bhl[size_t(item) * p.seq + position] = dot;
      }
    __syncwarp();
    bf16* to = p.d_own + size_t(head) * N;
#pragma unroll
    for (int i = lane; i < 16 * BLOCKS * N / 8; i += 32) {
      const int at = i / (N / 8), column = i % (N / 8) * 8;
      if (first + at >= p.seq) continue;
      const uint4 value = *reinterpret_cast<const uint4*>(rows + at * Z::BC_ROW + column);
      *reinterpret_cast<uint4*>(to + (token + first + at) * p.d_stride + column) = value;
    }
  }
};

template <int DIM, int N, bool COLUMNS, bool GRADIENTS> __device__ __forceinline__ void run(const Problem& p) {
  DYNAMIC_SHARED(char, memory);
  Pass<DIM, N, COLUMNS, GRADIENTS>(p, memory).run();
}

}  // namespace orient
