// The next token of every row of logits: the likeliest, or drawn. CPU twin: src/generate/sample.rs.
//
//   weight = e^((x - max)/temperature) of the top_k largest logits x (0: of all), of equals the first;
//   the token is the first one, by number, at which the running sum of weights exceeds u·total (f64).
//
// One block of 1024 threads a row. The vocabulary is cut into segments of 256, each summed by a warp;
// one warp then finds the segment, and the token inside of it. A sum that has come to a limit is found
// by adding in the order of the tokens, so there is always one, and never one of weight 0.
#include "logits.cuh"

namespace sample {
using namespace logits;

constexpr int THREADS = 1024, WARPS = 32, SEGMENTS = 1024;  // at most 262,144 tokens
// For rows that say nothing: with NaN or +∞, or all -∞.
constexpr uint32_t NOTHING = 0xffffffffu;

__device__ __forceinline__ void read8(float (&x)[8], const bf16* row, int j) {
  unpack8(x, reinterpret_cast<const uint4*>(row)[j], nullptr);
}
__device__ __forceinline__ void read8(float (&x)[8], const float* row, int j) {
  float4 a = reinterpret_cast<const float4*>(row)[2 * j], b = reinterpret_cast<const float4*>(row)[2 * j + 1];
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// Unsigned numbers in the order of floats; -0 is 0.
__device__ __forceinline__ uint32_t key_of(float x) {
  uint32_t bits = __float_as_uint(x == 0.0f ? 0.0f : x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

struct Shared {
  double sums[SEGMENTS];
  float value[WARPS];
  int id[WARPS], count[2][3][WARPS];
  uint32_t found;
};

template <class T> struct Logits {
  const T* row;
  const float* bias;
  int v;

  // Eight at vector j; -∞ beyond the end.
  __device__ __forceinline__ void get(float (&x)[8], int j) const {
    if (8 * j < v) {
      read8(x, row, j);
      if (bias) {
        float b[8];
        read8(b, bias, j);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] += b[i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] = -INFINITY;
    }
  }

  // The largest and its first token, which is NOTHING if the row says nothing.
  __device__ __forceinline__ float largest(uint32_t& first, Shared& shared) const {
    float value = -INFINITY;
    int id = 0x7fffffff, lane = threadIdx.x % 32;
    bool broken = false;
    auto take = [&](float x, int other) {
      if (x > value || (x == value && other < id)) value = x, id = other;
    };
#pragma unroll 2
    for (int j = threadIdx.x; 8 * j < v; j += THREADS) {
      float x[8];
      get(x, j);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        broken |= !(x[i] < INFINITY);
        take(x[i], 8 * j + i);
      }
    }
    auto join = [&] {
      for (int m = 16; m > 0; m >>= 1) {
        float x = __shfl_xor_sync(FULL, value, m);
        int other = __shfl_xor_sync(FULL, id, m);
        take(x, other);
      }
    };
    join();
    broken = __any_sync(FULL, broken);
    if (lane == 0) shared.value[threadIdx.x / 32] = value, shared.id[threadIdx.x / 32] = broken ? -1 : id;
    __syncthreads();
    value = shared.value[lane], id = shared.id[lane];
    broken = __any_sync(FULL, id < 0);
    join();
    first = broken || value == -INFINITY ? NOTHING : uint32_t(id);
    return value;
  }

  // How many keys are at least low + (1, 2, 3)·step.
  __device__ __forceinline__ void count(int (&counts)[3], uint32_t low, uint32_t step, int turn, Shared& shared) const {
    int own[3] = {}, lane = threadIdx.x % 32;
#pragma unroll 2
    for (int j = threadIdx.x; 8 * j < v; j += THREADS) {
      float x[8];
      get(x, j);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        uint32_t key = key_of(x[i]);
        own[0] += key >= low + step, own[1] += key >= low + 2 * step, own[2] += key >= low + 3 * step;
      }
    }
    for (int c = 0; c < 3; c++) {
      for (int m = 16; m > 0; m >>= 1) own[c] += __shfl_xor_sync(FULL, own[c], m);
      if (lane == 0) shared.count[turn][c][threadIdx.x / 32] = own[c];
    }
    __syncthreads();
    for (int c = 0; c < 3; c++) {
      counts[c] = shared.count[turn][c][lane];
      for (int m = 16; m > 0; m >>= 1) counts[c] += __shfl_xor_sync(FULL, counts[c], m);
    }
  }

  // The first token at which the running sum of weight(x, token) exceeds limit(total); for all threads.
  template <class Weight, class Limit>
  __device__ __forceinline__ uint32_t find(Weight weight, Limit limit, Shared& shared) const {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, segments = (v + 255) / 256;
    auto weights = [&](float (&x)[8], int segment) {  // eight of this lane; gives their sum
      int j = segment * 32 + lane;
      get(x, j);
      double sum = 0.0;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        x[i] = 8 * j < v ? weight(x[i], uint32_t(8 * j + i)) : 0.0f;
        sum += x[i];
      }
      return sum;
    };
    __syncthreads();
    for (int segment = warp; segment < segments; segment += WARPS) {
      float x[8];
      double sum = weights(x, segment);
      for (int m = 16; m > 0; m >>= 1) sum += __shfl_xor_sync(FULL, sum, m);
      if (lane == 0) shared.sums[segment] = sum;
    }
    __syncthreads();
    if (warp == 0) {
      int each = (segments + 31) / 32, start = lane * each, end = min(start + each, segments);
      double own = 0.0, total = 0.0;
      for (int s = start; s < end; s++) own += shared.sums[s];
      for (int l = 0; l < 32; l++) total += __shfl_sync(FULL, own, l);
      Walk walk{0.0, limit(total)};
      for (int l = 0; l < 32 && !walk.there; l++) walk.step(__shfl_sync(FULL, own, l), l);
      start = walk.again() * each, end = min(start + each, segments);
      for (int s = start; s < end && !walk.there; s++) walk.step(shared.sums[s], s);
      int segment = walk.again();
      float x[8];
      own = weights(x, segment);
      for (int l = 0; l < 32 && !walk.there; l++) walk.step(__shfl_sync(FULL, own, l), l);
      int owner = walk.again();
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (!walk.there) walk.step(x[i], i);
      int place = __shfl_sync(FULL, walk.again(), owner);
      if (lane == 0) shared.found = segment * 256 + owner * 8 + place;
    }
    __syncthreads();
    return shared.found;
  }

 private:
  // Adds parts until the sum exceeds the limit; the last part above 0 if it never does by a rounding.
  struct Walk {
    double before, limit;
    double sum = before;
    int last = 0;
    bool there = false;

    __device__ Walk(double start, double limit) : before(start), limit(limit) {}
    __device__ __forceinline__ void step(double part, int at) {
      if (!(part > 0.0)) return;
      before = sum;
      sum += part;
      last = at;
      there = sum > limit;
    }
    // Where that was; walks on from before it, through what it is made of.
    __device__ __forceinline__ int again() {
      sum = before;
      there = false;
      return last;
    }
  };
};

// What is left by a cut to the k largest: keys above `key`, and `key` itself up to token `last`.
struct Cut {
  uint32_t key, last;
  __device__ __forceinline__ bool keeps(float x, uint32_t token) const {
    uint32_t own = key_of(x);
    return own > key || (own == key && token <= last);
  }
};

template <class T> __device__ __forceinline__ Cut cut(const Logits<T>& logits, int k, Shared& shared) {
  uint32_t low = 0;  // at least k keys are ≥ low; two more of its bits each time
  int kept = logits.v, turn = 0;
  for (int shift = 30; shift >= 0 && kept > k; shift -= 2, turn ^= 1) {
    int counts[3], digit = 0;
    logits.count(counts, low, 1u << shift, turn, shared);
    for (int c = 0; c < 3; c++)
      if (counts[c] >= k) digit = c + 1, kept = counts[c];
    low += uint32_t(digit) << shift;
  }
  if (kept == k) return {low, NOTHING};
  // Too many are as large as the last one.
  int counts[3] = {};
  if (low != 0xffffffffu) logits.count(counts, low, 1, turn, shared);
  float left = float(k - counts[0]);
  auto same = [&](float x, uint32_t) { return key_of(x) == low ? 1.0f : 0.0f; };
  return {low, logits.find(same, [&](double) { return left - 0.5; }, shared)};
}

template <class T>
__device__ __forceinline__ void rows(const T* logits_bv, const float* bias, const float* u_b, uint32_t* ids_b, int v,
                                     float temperature, int top_k) {
  __shared__ Shared shared;
  Logits<T> logits{logits_bv + size_t(blockIdx.x) * v, bias, v};
  uint32_t id;
  float largest = logits.largest(id, shared);
  if (temperature > 0.0f && id != NOTHING) {
    Cut kept = {0, NOTHING};
    if (top_k > 0 && top_k < v) kept = cut(logits, top_k, shared);
    float u = u_b[blockIdx.x];
    auto weight = [&](float x, uint32_t token) {
      return kept.keeps(x, token) ? exp2_fast((x - largest) / temperature * LOG2E) : 0.0f;
    };
    id = logits.find(weight, [&](double total) { return u * total; }, shared);
  }
  if (threadIdx.x == 0) ids_b[blockIdx.x] = id;
}

}  // namespace sample

// logits_bv bf16 [b, v] (f32: `…_f32`); bias f32 [v] or null; u_b f32 [b], from [0, 1), not read when
// temperature is 0; ids_b u32 [b] (0xffffffff: the row says nothing). Grid: b, block 1024. v ≤ 262,144.
extern "C" __global__ void __launch_bounds__(1024) sample_rows(const bf16* logits_bv, const float* bias,
                                                               const float* u_b, uint32_t* ids_b, int v,
                                                               float temperature, int top_k) {
  sample::rows(logits_bv, bias, u_b, ids_b, v, temperature, top_k);
}
REGISTER(sample_rows)

extern "C" __global__ void __launch_bounds__(1024) sample_rows_f32(const float* logits_bv, const float* bias,
                                                                   const float* u_b, uint32_t* ids_b, int v,
                                                                   float temperature, int top_k) {
  sample::rows(logits_bv, bias, u_b, ids_b, v, temperature, top_k);
}
REGISTER(sample_rows_f32)
