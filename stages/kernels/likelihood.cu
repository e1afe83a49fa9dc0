// What evaluation asks of rows of logits: the log-probability of a token and whether it is the
// likeliest; whether two models find the same token likeliest. Of equals the first is the likeliest.
// CPU twin: src/eval/score.rs, src/eval/likelihood.rs. One block of 256 threads a row, which reads it once.
#include "logits.cuh"

namespace likelihood {
using namespace logits;

constexpr int THREADS = 256, AHEAD = 4;

// Calls f(x, first) for all eights of a row that are this thread's, in rising order; several loads fly.
template <class F> __device__ __forceinline__ void each_eight(const bf16* row, const float* bias, int v, F f) {
  auto packed = reinterpret_cast<const uint4*>(row);
  int vectors = v / 8;
  for (int base = threadIdx.x; base < vectors; base += AHEAD * THREADS) {
    uint4 read[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (base + i * THREADS < vectors) read[i] = packed[base + i * THREADS];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      int j = base + i * THREADS;
      if (j >= vectors) break;
      float x[8];
      unpack8(x, read[i], at(bias, j));
      f(x, 8 * j);
    }
  }
}

struct Best {
  float value;
  int id;

  __device__ __forceinline__ void take(float other, int other_id) {
    if (other > value || (other == value && other_id < id)) value = other, id = other_id;
  }
};

// For thread 0 the first of the largest; `part` is shared, one for each warp.
__device__ __forceinline__ int first_of_largest(const bf16* row, const float* bias, int v, Best* part) {
  Best best = {-INFINITY, 0x7fffffff};
  each_eight(row, bias, v, [&](const float (&x)[8], int first) {
#pragma unroll
    for (int i = 0; i < 8; i++) best.take(x[i], first + i);
  });
  for (int m = 16; m > 0; m >>= 1) {
    float value = __shfl_xor_sync(FULL, best.value, m);
    int id = __shfl_xor_sync(FULL, best.id, m);
    best.take(value, id);
  }
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < THREADS / 32; w++) best.take(part[w].value, part[w].id);
  return best.id;
}

}  // namespace likelihood

// s_nv bf16 [rows, v]; bias f32 [v] or null; targets_n u32 [rows] (0xffffffff: none);
// out_n f32 [rows]: ln softmax(s + bias)[target], 0 if there is none; first_n u8 [rows]: 1 where the
// target is the likeliest of all, else 0.
extern "C" __global__ void __launch_bounds__(256, 4) likelihood_pick(const bf16* s_nv, const float* bias,
                                                                     const uint32_t* targets_n, float* out_n,
                                                                     uint8_t* first_n, int v) {
  using namespace likelihood;
  __shared__ float2 part[THREADS / 32];
  __shared__ int beaten[THREADS / 32];
  int row = blockIdx.x;
  uint32_t target = targets_n[row];
  const bf16* row_v = s_nv + size_t(row) * v;
  if (target >= uint32_t(v)) {
    if (threadIdx.x == 0) out_n[row] = target == IGNORE ? 0.0f : NAN, first_n[row] = 0;
    return;
  }
  float own = to_float(row_v[target]) + (bias ? bias[target] : 0.0f);
  LogSum all;
  int better = 0;
  each_eight(row_v, bias, v, [&](const float (&x)[8], int first) {
    float e[8];
    absorb(all, x, e);
#pragma unroll
    for (int i = 0; i < 8; i++) better |= x[i] > own || (x[i] == own && first + i < int(target));
  });
  better = __any_sync(FULL, better);
  if (threadIdx.x % 32 == 0) beaten[threadIdx.x / 32] = better;
  join_block(all, part);
  if (threadIdx.x == 0) {
    for (int w = 1; w < THREADS / 32; w++) better |= beaten[w];
    out_n[row] = (own - all.max) - logf(all.sum);
    first_n[row] = better ? 0 : 1;
  }
}
REGISTER(likelihood_pick)

// a_nv, b_nv bf16 [rows, v] with biases f32 [v] or null; same_n u8 [rows]: 1 where both have the same
// likeliest token.
extern "C" __global__ void __launch_bounds__(256, 4) likelihood_same(const bf16* a_nv, const float* bias_a,
                                                                     const bf16* b_nv, const float* bias_b,
                                                                     uint8_t* same_n, int v) {
  using namespace likelihood;
  __shared__ Best part[2][THREADS / 32];
  size_t start = size_t(blockIdx.x) * v;
  int a = first_of_largest(a_nv + start, bias_a, v, part[0]);
  int b = first_of_largest(b_nv + start, bias_b, v, part[1]);
  if (threadIdx.x == 0) same_n[blockIdx.x] = a == b ? 1 : 0;
}
REGISTER(likelihood_same)
