// Cross-entropy over rows of logits with soft or hard targets; logits become their gradient in place.
// CPU twin: src/ops/cross_entropy.rs.
//
//   p = softmax(t + bias_t),  q = softmax(s + bias_s)
//   soft:  L = -Σ p ln q,       ds = weight·(q - p),       entropy -Σ p ln p: the least L can be
//          with labels, ds = weight·(q - (1 - share)·p - share·onehot)
//   hard:  L = -ln q[target],   ds = weight·(q - onehot)
//
// Soft targets at temperature 1 (Bick et al. 2024, MOHAWK, stage 3; reference 2.5). A block takes row
// after row (grid: as many blocks as run at once): logits are read once, and a row's are copied in
// while the gradient of the one before is made (see logits.cuh). Shared memory: soft N·32 KiB,
// hard N·8 KiB; N is in the kernel's name, any is right, V/8 ≤ N·threads is fast.
#include "logits.cuh"

namespace cross_entropy {
using namespace logits;

constexpr int SOFT_THREADS = 1024, HARD_THREADS = 512;

// Log-sum-exps of both rows, and Σ e^(t - max)·s and Σ e^(t - max)·t.
struct Both {
  LogSum s, t;
  float cross = 0.0f, own = 0.0f;

  __device__ __forceinline__ void take(const float (&x)[8], const float (&y)[8]) {
    float e[8], products[8];
    absorb(s, x, e);
    float shrink = absorb(t, y, e);
#pragma unroll
    for (int i = 0; i < 8; i++) products[i] = e[i] * x[i];
    cross = cross * shrink + add8(products);
#pragma unroll
    for (int i = 0; i < 8; i++) products[i] = e[i] * y[i];
    own = own * shrink + add8(products);
  }
  __device__ __forceinline__ void join() {
    join_warp(s);
    float shrink = join_warp(t);
    cross = warp_sum(cross * shrink);
    own = warp_sum(own * shrink);
  }
};

// `part` is shared, [6][32].
__device__ __forceinline__ void join_block(Both& all, float (*part)[32]) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  all.join();
  if (lane == 0) {
    part[0][warp] = all.s.max, part[1][warp] = all.s.sum, part[2][warp] = all.t.max;
    part[3][warp] = all.t.sum, part[4][warp] = all.cross, part[5][warp] = all.own;
  }
  __syncthreads();
  all.s.max = part[0][lane], all.s.sum = part[1][lane], all.t.max = part[2][lane];
  all.t.sum = part[3][lane], all.cross = part[4][lane], all.own = part[5][lane];
  all.join();
}

// What the gradient of a row is made of.
struct Slope {
  float s_shift, t_shift, weight;
  float keep, share;  // of the teacher and of the label: 1 and 0 without one
  int label;          // below 0: none
};

template <int N> struct Pair {
  Row<N, SOFT_THREADS> s, t;

  __device__ __forceinline__ void fetch(const bf16* s_row, const bf16* t_row, int i) const {
    if (s_row && s.vector(i) < s.vectors) {
      cp_async16(s.slot(i), s_row + 8 * size_t(s.vector(i)));
      cp_async16(t.slot(i), t_row + 8 * size_t(s.vector(i)));
    }
    cp_async_commit();
  }
  __device__ __forceinline__ void take(Both& all, uint4 a, uint4 b, int j) const {
    float x[8], y[8];
    unpack8(x, a, at(s.bias, j));
    unpack8(y, b, at(t.bias, j));
    all.take(x, y);
  }
  template <int I> __device__ __forceinline__ void take_slots(Both& all) const {
    if constexpr (I < N) {
      cp_async_wait<N - 1 - I>();
      int j = s.vector(I);
      if (j < s.vectors) take(all, *s.slot(I), *t.slot(I), j);
      take_slots<I + 1>(all);
    }
  }
  __device__ __forceinline__ Both sum(const bf16* s_row, const bf16* t_row) const {
    Both all;
    take_slots<0>(all);
    auto a = reinterpret_cast<const uint4*>(s_row), b = reinterpret_cast<const uint4*>(t_row);
    for (int j = s.vector(N); j < s.vectors; j += SOFT_THREADS) take(all, a[j], b[j], j);
    return all;
  }
  // weight·(q - p) of eight, and with a label weight·(q - (1 - share)·p - share·onehot).
  __device__ __forceinline__ uint4 slope(uint4 a, uint4 b, int j, const Slope& of) const {
    float x[8], y[8];
    unpack8(x, a, at(s.bias, j));
    unpack8(y, b, at(t.bias, j));
    int place = j == of.label / 8 ? of.label % 8 : -1;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float wanted = of.keep * power(y[i], of.t_shift) + (i == place ? of.share : 0.0f);
      x[i] = of.weight * (power(x[i], of.s_shift) - wanted);
    }
    return pack8(x);
  }
};

template <int N>
__device__ __forceinline__ void soft(bf16* s_nv, const bf16* t_nv, const float* bias_s, const float* bias_t,
                                     const uint8_t* scored_n, const uint32_t* labels_n, float share, float weight,
                                     const float* factor, float2* out_n, int rows, int v, int learn) {
  DYNAMIC_SHARED(uint4, slots);
  __shared__ float part[2][6][32];
  int vectors = v / 8;
  Pair<N> pair{{slots, bias_s, vectors}, {slots + N * SOFT_THREADS, bias_t, vectors}};
  if (factor) weight *= *factor;
  auto on = [&](int row) { return row < rows && (!scored_n || scored_n[row]); };
  auto s_at = [&](int row) { return on(row) ? s_nv + size_t(row) * v : nullptr; };
  auto t_at = [&](int row) { return t_nv + size_t(row) * v; };

  int step = gridDim.x, turn = 0;
#pragma unroll
  for (int i = 0; i < N; i++) pair.fetch(s_at(blockIdx.x), t_at(blockIdx.x), i);
  for (int row = blockIdx.x; row < rows; row += step) {
    const bf16 *s_next = s_at(row + step), *t_next = t_at(row + step);
    if (!on(row)) {
      if (threadIdx.x == 0) out_n[row] = make_float2(0.0f, 0.0f);
      if (learn) pair.s.clear(s_nv + size_t(row) * v);
#pragma unroll
      for (int i = 0; i < N; i++) pair.fetch(s_next, t_next, i);
      continue;
    }
    Both all = pair.sum(s_at(row), t_at(row));
    join_block(all, part[turn]);
    turn ^= 1;  // the other one is read by nobody any more once all have come to this row's barrier
    if (threadIdx.x == 0) {
      float cross = log_of(all.s) - all.cross / all.t.sum, own = log_of(all.t) - all.own / all.t.sum;
      out_n[row] = make_float2(cross, own);
    }
    int label = labels_n ? int(labels_n[row]) : -1;  // IGNORE is -1
    float given = label < 0 ? 0.0f : share;
    Slope of{shift_of(all.s), shift_of(all.t), weight, 1.0f - given, given, label < 0 ? -8 : label};
    auto out = reinterpret_cast<uint4*>(s_nv + size_t(row) * v);
    auto other = reinterpret_cast<const uint4*>(t_at(row));
    // First what was read last: most likely it is still in the cache.
    if (learn)
      for (int j = pair.s.vector(N); j < vectors; j += SOFT_THREADS)
        out[j] = pair.slope(out[j], other[j], j, of);
#pragma unroll
    for (int i = 0; i < N; i++) {
      int j = pair.s.vector(i);
      if (learn && j < vectors) out[j] = pair.slope(*pair.s.slot(i), *pair.t.slot(i), j, of);
      pair.fetch(s_next, t_next, i);
    }
  }
}

template <int N>
__device__ __forceinline__ void hard(bf16* s_nv, const uint32_t* targets_n, const float* bias, float weight,
                                     const float* factor, float* out_n, int rows, int v, int learn) {
  DYNAMIC_SHARED(uint4, slots);
  __shared__ float2 part[2][HARD_THREADS / 32];
  Row<N, HARD_THREADS> tile{slots, bias, v / 8};
  if (factor) weight *= *factor;
  auto at_row = [&](int row) { return row < rows && targets_n[row] < uint32_t(v) ? s_nv + size_t(row) * v : nullptr; };

  int step = gridDim.x, turn = 0;
  tile.fetch_all(at_row(blockIdx.x));
  for (int row = blockIdx.x; row < rows; row += step) {
    uint32_t target = targets_n[row];
    const bf16* next = at_row(row + step);
    if (target >= uint32_t(v)) {  // IGNORE; an id of no token makes the loss a NaN
      if (threadIdx.x == 0) out_n[row] = target == IGNORE ? 0.0f : NAN;
      if (learn) tile.clear(s_nv + size_t(row) * v);
      tile.fetch_all(next);
      continue;
    }
    bf16* own = s_nv + size_t(row) * v;
    // Before the barrier of join_block, since the second pass overwrites it.
    float logit = threadIdx.x == 0 ? to_float(own[target]) + (bias ? bias[target] : 0.0f) : 0.0f;
    LogSum all = tile.sum(own);
    join_block(all, part[turn]);
    turn ^= 1;
    if (threadIdx.x == 0) out_n[row] = (all.max - logit) + logf(all.sum);
    if (!learn) {
      tile.fetch_all(next);
      continue;
    }
    float shift = shift_of(all);
    tile.rewrite(own, next, [&](float (&x)[8], int j) {
      int place = j == int(target / 8) ? int(target % 8) : -1;
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] = weight * (power(x[i], shift) - (i == place ? 1.0f : 0.0f));
    });
  }
}

}  // namespace cross_entropy

// s_nv bf16 [rows, v], the gradient afterwards if `learn`; t_nv bf16 [rows, v]; biases f32 [v] or null;
// scored_n u8 [rows] or null (all); labels_n u32 [rows] (0xffffffff: none) or null, and their share;
// factor: null, or f32 on the device that `weight` is multiplied by;
// out_n f32 [rows, 2]: cross-entropy and entropy, 0 where not scored.
#define CROSS_ENTROPY_SOFT(N)                                                                                   \
  extern "C" __global__ void __launch_bounds__(1024, 1) cross_entropy_soft_n##N(                                \
      bf16* s_nv, const bf16* t_nv, const float* bias_s, const float* bias_t, const uint8_t* scored_n,          \
      const uint32_t* labels_n, float share, float weight, const float* factor, float2* out_n, int rows, int v, \
      int learn) {                                                                                              \
    cross_entropy::soft<N>(s_nv, t_nv, bias_s, bias_t, scored_n, labels_n, share, weight, factor, out_n, rows,  \
                           v, learn);                                                                           \
  }                                                                                                             \
  REGISTER(cross_entropy_soft_n##N)
CROSS_ENTROPY_SOFT(1)
CROSS_ENTROPY_SOFT(2)
CROSS_ENTROPY_SOFT(4)
CROSS_ENTROPY_SOFT(6)
CROSS_ENTROPY_SOFT(7)

// targets_n u32 [rows] (0xffffffff: not scored); out_n f32 [rows]; the rest as above.
#define CROSS_ENTROPY_HARD(N)                                                                                   \
  extern "C" __global__ void __launch_bounds__(512, 2) cross_entropy_hard_n##N(                                 \
      bf16* s_nv, const uint32_t* targets_n, const float* bias, float weight, const float* factor,              \
      float* out_n, int rows, int v, int learn) {                                                               \
    cross_entropy::hard<N>(s_nv, targets_n, bias, weight, factor, out_n, rows, v, learn);                       \
  }                                                                                                             \
  REGISTER(cross_entropy_hard_n##N)
CROSS_ENTROPY_HARD(2)
CROSS_ENTROPY_HARD(4)
CROSS_ENTROPY_HARD(8)
CROSS_ENTROPY_HARD(12)
CROSS_ENTROPY_HARD(13)
