// Rows of logits for the kernels of the vocabulary head: eight at a time, log-sum-exps that are made
// in one pass, sums over a block in a fixed order.
//
// A log-sum-exp is kept as (max, sum), meaning max + ln(sum), and takes in more values by
//   top = max(max, x…),   sum = sum · e^(max - top) + Σ e^(x - top)
// (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"), so that a row is read
// once before its gradient is known.
#pragma once
#include "prims.cuh"

namespace logits {

// Below every logit that counts; finite, so that differences are. A row's unseen part is (LOWEST, 0).
constexpr float LOWEST = -1e38f;
// Target of a row that is not scored.
constexpr uint32_t IGNORE = 0xffffffffu;

struct LogSum {
  float max = LOWEST, sum = 0.0f;
};

__device__ __forceinline__ float add8(const float (&x)[8]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}
__device__ __forceinline__ float max8(const float (&x)[8]) {
  return fmaxf(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])), fmaxf(fmaxf(x[4], x[5]), fmaxf(x[6], x[7])));
}

// Eight bf16 logits and, if there is one, the head's bias (f32, at the first of the eight).
__device__ __forceinline__ void unpack8(float (&x)[8], uint4 packed, const float* bias) {
  x[0] = low2(packed.x), x[1] = high2(packed.x), x[2] = low2(packed.y), x[3] = high2(packed.y);
  x[4] = low2(packed.z), x[5] = high2(packed.z), x[6] = low2(packed.w), x[7] = high2(packed.w);
  if (bias) {
    float4 a = reinterpret_cast<const float4*>(bias)[0], b = reinterpret_cast<const float4*>(bias)[1];
    x[0] += a.x, x[1] += a.y, x[2] += a.z, x[3] += a.w;
    x[4] += b.x, x[5] += b.y, x[6] += b.z, x[7] += b.w;
  }
}
__device__ __forceinline__ uint4 pack8(const float (&x)[8]) {
  return make_uint4(pack2(x[0], x[1]), pack2(x[2], x[3]), pack2(x[4], x[5]), pack2(x[6], x[7]));
}
__device__ __forceinline__ const float* at(const float* bias, int vector) {
  return bias ? bias + 8 * size_t(vector) : nullptr;
}

// e^(x - max) as 2^(x·log2 e - shift), where shift = max·log2 e (+ log2 of the sum, for a probability).
__device__ __forceinline__ float power(float x, float shift) { return exp2_fast(fmaf(x, LOG2E, -shift)); }

// What values relative to `from` are multiplied by to be relative to `to`.
__device__ __forceinline__ float rescale(float from, float to) { return exp2_fast((from - to) * LOG2E); }

// Takes in eight; e_i = e^(x_i - max), and the result is what older sums shrink by.
__device__ __forceinline__ float absorb(LogSum& all, const float (&x)[8], float (&e)[8]) {
  float top = fmaxf(all.max, max8(x)), shrink = rescale(all.max, top), shift = top * LOG2E;
#pragma unroll
  for (int i = 0; i < 8; i++) e[i] = power(x[i], shift);
  all.sum = all.sum * shrink + add8(e);
  all.max = top;
  return shrink;
}

// All lanes' parts together; lanes of a warp end with the same bits, since a + b = b + a.
__device__ __forceinline__ float join_warp(LogSum& all) {
  float top = warp_max(all.max), shrink = rescale(all.max, top);
  all.sum = warp_sum(all.sum * shrink);
  all.max = top;
  return shrink;
}

// The whole block's, for every thread. `part` is shared, one for each warp, and free again after the
// next barrier but this function's own.
__device__ __forceinline__ void join_block(LogSum& all, float2* part) {
  int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  join_warp(all);
  if (lane == 0) part[threadIdx.x / 32] = make_float2(all.max, all.sum);
  __syncthreads();
  all = LogSum();
  if (lane < warps) all.max = part[lane].x, all.sum = part[lane].y;
  join_warp(all);
}

__device__ __forceinline__ float log_of(const LogSum& all) { return all.max + logf(all.sum); }
// The shift that makes `power` a probability.
__device__ __forceinline__ float shift_of(const LogSum& all) { return fmaf(all.max, LOG2E, log2f(all.sum)); }

// One row of logits by a block of THREADS threads, read from device memory once: the first N vectors
// of eight of every thread wait in shared memory between the two passes (each in a slot of this
// thread alone, so that no barrier is needed), and those of a later row take their place as soon as
// they are done with. What does not fit is read again.
template <int N, int THREADS> struct Row {
  uint4* slots;  // shared, [N, THREADS]
  const float* bias;
  int vectors;

  __device__ __forceinline__ int vector(int i) const { return i * THREADS + int(threadIdx.x); }
  __device__ __forceinline__ uint4* slot(int i) const { return slots + vector(i); }

  // Asks for vector i of `row` (null: none); always one group of copies.
  __device__ __forceinline__ void fetch(const bf16* row, int i) const {
    if (row && vector(i) < vectors) cp_async16(slot(i), row + 8 * size_t(vector(i)));
    cp_async_commit();
  }
  __device__ __forceinline__ void fetch_all(const bf16* row) const {
#pragma unroll
    for (int i = 0; i < N; i++) fetch(row, i);
  }

  // First pass, over a row that was asked for.
  __device__ __forceinline__ LogSum sum(const bf16* row) const {
    LogSum all;
    sum_slots(all, std_index<0>());
    for (int j = vector(N); j < vectors; j += THREADS) take(all, reinterpret_cast<const uint4*>(row)[j], j);
    return all;
  }
  // Second pass: every eight become what `f(x, vector)` makes of them; asks for `next`.
  template <class F> __device__ __forceinline__ void rewrite(bf16* row, const bf16* next, F f) const {
    uint4* out = reinterpret_cast<uint4*>(row);
    for (int j = vector(N); j < vectors; j += THREADS) out[j] = apply(out[j], j, f);
#pragma unroll
    for (int i = 0; i < N; i++) {
      int j = vector(i);
      if (j < vectors) out[j] = apply(*slot(i), j, f);
      fetch(next, i);
    }
  }
  __device__ __forceinline__ void clear(bf16* row) const {
    for (int j = threadIdx.x; j < vectors; j += THREADS) reinterpret_cast<uint4*>(row)[j] = make_uint4(0, 0, 0, 0);
  }

 private:
  template <int I> struct std_index {};
  __device__ __forceinline__ void take(LogSum& all, uint4 packed, int j) const {
    float x[8], e[8];
    unpack8(x, packed, at(bias, j));
    absorb(all, x, e);
  }
  // Vector after vector, as they come in.
  template <int I> __device__ __forceinline__ void sum_slots(LogSum& all, std_index<I>) const {
    if constexpr (I < N) {
      cp_async_wait<N - 1 - I>();
      if (vector(I) < vectors) take(all, *slot(I), vector(I));
      sum_slots(all, std_index<I + 1>());
    }
  }
  template <class F> __device__ __forceinline__ uint4 apply(uint4 packed, int j, F f) const {
    float x[8];
    unpack8(x, packed, at(bias, j));
    f(x, j);
    return pack8(x);
  }
};

}  // namespace logits
