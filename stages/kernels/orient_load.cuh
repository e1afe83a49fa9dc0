// What a block of the orientation loss works on (see orient.cuh): sizes, which tiles it sees, and how its operands
// and their statistics come to registers and shared memory.
#pragma once
#include "prims.cuh"

namespace orient {

constexpr int OWN = 128;    // rows (columns) of a block
constexpr int OTHER = 128;  // keys (queries) of a tile, also the grain of m
constexpr int GRAINS = OWN / OTHER;
static_assert(OWN % OTHER == 0, "a block's own rows are whole tiles");
constexpr int GROUP = 32;   // (sequence, head) pairs whose blocks run together, so that K and B come from L2
constexpr int STATS = 3 + GRAINS;  // arrays of OTHER numbers beside a stage
constexpr float NEVER = 1e30f;
constexpr int NOBODY = 0x7fffffff;

struct Problem {
  const bf16 *own_qk, *other_qk;  // rotated q and k (rows) or k and q (columns)
  int qk_stride;
  const float* lse_bhl;
  const bf16 *own_bc, *other_bc;  // C and B (rows) or B and C (columns), at head 0
  int bc_stride;
  const float* cs_bhl;
  const float* d_h;
  const uint32_t* starts_n;
  bf16* d_own;  // gradient of own_bc, rows d_stride apart
  int d_stride;
  float* dot_bhl;
  float* partials;  // [batch·heads, tiles, 4]: ΣE², ΣA², trace E, 0
  int batch, seq, heads, kv_heads;
};

template <int DIM, int N> struct Sizes {
  // Of 16 own rows for a warp: what registers hold.
  static constexpr int BLOCKS = DIM + 3 * N <= 256 ? 2 : 1;
  static constexpr int WARPS = OWN / (16 * BLOCKS);
  static constexpr int THREADS = 32 * WARPS;
  static constexpr int RESIDENT = 8 / WARPS;  // blocks of a multiprocessor
  static constexpr bool ALONE = THREADS < 2 * OTHER;  // one thread fetches all statistics of a position
  static_assert(!ALONE || GRAINS == 1, "a thread stores the factor of one grain");
  static constexpr int QK_ROW = DIM + 8, BC_ROW = N + 8;  // padded: eight rows lie in different banks
  static constexpr int STAGE = OTHER * (QK_ROW + BC_ROW) * 2 + STATS * OTHER * 4;  // bytes
  static constexpr float SCALE = DIM == 32 ? 0.17677669529663687f : DIM == 64 ? 0.125f : 0.08838834764831845f;
  static constexpr float SCALE2 = LOG2E * SCALE;  // to base 2
};

__device__ __forceinline__ float exp_difference(float high, float low) { return exp2_fast((high - low) * LOG2E); }

// One block's work and one thread's part of it. Everything is inlined, arrays live in registers.
template <int DIM, int N, bool COLUMNS> struct Operands {
  using Z = Sizes<DIM, N>;
  static constexpr int BLOCKS = Z::BLOCKS;

  const Problem& p;
  char* memory;
  int item, tile, head;            // pair (sequence, head), own tile
  size_t token;                    // first token of the sequence
  int lane, group, quad, first;    // first: own position of the warp's first row
  int grain;                       // first's tile of OTHER
  uint32_t own_qk[BLOCKS][DIM / 16][4], own_bc[BLOCKS][N / 16][4];
  float cs[BLOCKS][2], lse2[BLOCKS][2], factor[BLOCKS][2];  // rows: cs and lse in base 2; factor of the tile at hand
  int last_start;                  // rows: the latest start of a document seen by a query of the grain
  float out[BLOCKS][N / 8][4];
  float squares[BLOCKS], attention[BLOCKS], trace;
  float next_cs, next_m, next_extra, next_since;  // statistics of the next tile on their way to shared memory

  __device__ __forceinline__ Operands(const Problem& p, char* memory) : p(p), memory(memory) {
    const int tiles = (p.seq + OWN - 1) / OWN, index = blockIdx.x, at = index / (GROUP * tiles);
    const int rest = index - at * GROUP * tiles, width = min(GROUP, p.batch * p.heads - at * GROUP);
    item = at * GROUP + rest % width;
    tile = COLUMNS ? rest / width : tiles - 1 - rest / width;  // long ones first
    head = item % p.heads;
    token = size_t(item / p.heads) * p.seq;
    lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    first = tile * OWN + int(threadIdx.x) / 32 * 16 * BLOCKS;
    grain = first / OTHER;
  }

  __device__ __forceinline__ int qk_head(bool key) const { return key ? head / (p.heads / p.kv_heads) : head; }
  __device__ __forceinline__ bf16* qk_stage(int stage) const {
    return reinterpret_cast<bf16*>(memory + stage * Z::STAGE);
  }
  __device__ __forceinline__ bf16* bc_stage(int stage) const { return qk_stage(stage) + OTHER * Z::QK_ROW; }
  // Rows: cs, factor. Columns: cs, lse in base 2, starts (as int), factors for the first and the second own grain.
  __device__ __forceinline__ float* stats(int stage) const {
    return reinterpret_cast<float*>(bc_stage(stage) + OTHER * Z::BC_ROW);
  }
  __device__ __forceinline__ float cs_at(int position) const {
    return p.cs_bhl[size_t(item) * p.seq + min(position, p.seq - 1)];
  }
  __device__ __forceinline__ int start_at(int position) const {
    return int(p.starts_n[token + min(position, p.seq - 1)]);
  }
  __device__ __forceinline__ float m_of(int key_tile) const { return cs_at(key_tile * OTHER + OTHER - 1); }

  // The other tiles that anybody of this block sees: first and last.
  __device__ __forceinline__ int2 range() const {
    const int begin = tile * OWN, end = min(begin + OWN, p.seq) - 1;
    if (!COLUMNS) return make_int2(start_at(begin) / OTHER, end / OTHER);
    float last = begin / OTHER;
    for (int at = begin / OTHER + lane; at * OTHER < p.seq; at += 32)
      if (start_at(at * OTHER) <= end) last = at;
    return make_int2(begin / OTHER, int(warp_max(last)));
  }

  __device__ __forceinline__ void load_stage(int other, int stage) {
    load_rows<DIM>(p.other_qk + size_t(qk_head(!COLUMNS)) * DIM, p.qk_stride, other, qk_stage(stage), Z::QK_ROW);
    load_rows<N>(p.other_bc + size_t(head) * N, p.bc_stride, other, bc_stage(stage), Z::BC_ROW);
    cp_async_commit();
  }
  template <int WIDTH>
  __device__ __forceinline__ void load_rows(const bf16* from, int stride, int other, bf16* to, int row) {
    constexpr int PIECES = WIDTH / 8, STEP = Z::THREADS / PIECES;
    static_assert(Z::THREADS % PIECES == 0 && (OTHER % STEP == 0 || STEP % OTHER == 0), "all copy as many pieces");
    const int at = int(threadIdx.x) / PIECES, column = int(threadIdx.x) % PIECES * 8;
    if (STEP > OTHER && at >= OTHER) return;
    const int left = p.seq - other * OTHER - at;
    const bf16* source = from + (token + other * OTHER + at) * stride + column;
    to += at * row + column;
#pragma unroll
    for (int i = 0; i < OTHER; i += STEP) {
      const bool valid = i < left;
      cp_async16(to + i * row, valid ? source : from, valid);
      source += STEP * stride;
    }
  }

  // A query beyond the end has A = 0 and L = 0, so that tiles without a mask need not know of it.
  __device__ __forceinline__ void fetch_stats(int other) {
    const int position = other * OTHER + int(threadIdx.x) % OTHER, side = int(threadIdx.x) / OTHER;
    if (side >= (COLUMNS && !Z::ALONE ? 2 : 1)) return;
    const bool valid = position < p.seq;
    next_cs = valid || !COLUMNS ? cs_at(position) : -NEVER;
    next_m = m_of(COLUMNS ? tile * GRAINS + side : other);
    if (!COLUMNS) return;
    if (Z::ALONE) next_since = __uint_as_float(valid ? start_at(position) : NOBODY);
    if (side == 0) next_extra = valid ? p.lse_bhl[size_t(item) * p.seq + position] * LOG2E : NEVER;
    else next_extra = __uint_as_float(valid ? start_at(position) : NOBODY);
  }
  __device__ __forceinline__ void store_stats(int stage) {
    const int at = int(threadIdx.x) % OTHER, side = int(threadIdx.x) / OTHER;
    if (side >= (COLUMNS && !Z::ALONE ? 2 : 1)) return;
    float* to = stats(stage) + at;
    if (side == 0) to[0] = next_cs;
    if (!COLUMNS) {
      to[OTHER] = exp_difference(next_m, next_cs);
      return;
    }
    to[(1 + side) * OTHER] = next_extra;
    if (Z::ALONE) to[2 * OTHER] = next_since;
    if (side < GRAINS) to[(3 + side) * OTHER] = exp_difference(next_cs, next_m);
  }

  __device__ __forceinline__ void load_own() {
    own_rows<DIM>(own_qk, p.own_qk + size_t(qk_head(COLUMNS)) * DIM, p.qk_stride);
    own_rows<N>(own_bc, p.own_bc + size_t(head) * N, p.bc_stride);
  }
  __device__ __forceinline__ void begin() {
    trace = 0;
    if (!COLUMNS) last_start = start_at(grain * OTHER + OTHER - 1);
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
      squares[m] = attention[m] = 0;
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int position = own_position(m, r);
        const bool valid = position < p.seq;
        if (COLUMNS) {
          factor[m][r] = exp_difference(m_of(grain), cs_at(position));
        } else {
          cs[m][r] = valid ? cs_at(position) : -NEVER;
          lse2[m][r] = valid ? p.lse_bhl[size_t(item) * p.seq + position] * LOG2E : NEVER;
        }
      }
#pragma unroll
      for (int j = 0; j < N / 8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) out[m][j][i] = 0;
    }
  }
  __device__ __forceinline__ int own_position(int m, int r) const { return first + m * 16 + r * 8 + group; }
  template <int WIDTH>
  __device__ __forceinline__ void own_rows(uint32_t (&to)[BLOCKS][WIDTH / 16][4], const bf16* from, int stride) {
#pragma unroll
    for (int m = 0; m < BLOCKS; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int position = own_position(m, r);
        auto row = reinterpret_cast<const uint32_t*>(from + (token + min(position, p.seq - 1)) * stride) + quad;
#pragma unroll
        for (int k = 0; k < WIDTH / 16; k++) {
          to[m][k][r] = position < p.seq ? row[k * 8] : 0;
          to[m][k][r + 2] = position < p.seq ? row[k * 8 + 4] : 0;
        }
      }
  }
};

}  // namespace orient
