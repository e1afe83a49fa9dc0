// What memory-bound kernels share: vectors of eight bf16 (16 bytes), and rows that stay in the
// registers of W warps, V vectors a thread.
//
// Kernels over rows are named `…_{W}w{V}v` and serve every width d up to 256·W·V (d a multiple of 8).
// Their blocks have max(256, 32·W) threads, so several rows at once where W < 8.
#pragma once
#include "prims.cuh"

// Named, so that the emulated kernels, one program, cannot mix these up with those of another file.
namespace row_kernels {
__device__ __forceinline__ uint4 load16(const bf16* p) { return *reinterpret_cast<const uint4*>(p); }
__device__ __forceinline__ void store16(bf16* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }

__device__ __forceinline__ void unpack8(float (&x)[8], uint4 v) {
  x[0] = low2(v.x), x[1] = high2(v.x), x[2] = low2(v.y), x[3] = high2(v.y);
  x[4] = low2(v.z), x[5] = high2(v.z), x[6] = low2(v.w), x[7] = high2(v.w);
}
__device__ __forceinline__ uint4 pack8(const float (&x)[8]) {
  return make_uint4(pack2(x[0], x[1]), pack2(x[2], x[3]), pack2(x[4], x[5]), pack2(x[6], x[7]));
}
__device__ __forceinline__ void load8(float (&x)[8], const float* p) {
  float4 a = *reinterpret_cast<const float4*>(p), b = *reinterpret_cast<const float4*>(p + 4);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}
__device__ __forceinline__ void store8(float* p, const float (&x)[8]) {
  *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
  *reinterpret_cast<float4*>(p + 4) = make_float4(x[4], x[5], x[6], x[7]);
}

// Where a thread stands: `group` of the block's GROUPS rows, `lane` among the row's 32·W threads.
template <int W> struct Place {
  static constexpr int THREADS = W > 8 ? 32 * W : 256;
  static constexpr int GROUPS = THREADS / (32 * W);
  int group = int(threadIdx.x) / (32 * W), lane = int(threadIdx.x) % (32 * W);
  // The thread's v-th vector of the row.
  __device__ __forceinline__ int vector(int v) const { return v * 32 * W + lane; }
};

// Vectors of row `row`; what is beyond the row or the matrix is not touched.
template <int W, int V>
__device__ __forceinline__ void load_row(uint4 (&x)[V], const bf16* from, Place<W> place, int row, int n, int d) {
#pragma unroll
  for (int v = 0; v < V; v++) {
    int at = place.vector(v);
    x[v] = make_uint4(0, 0, 0, 0);
    if (row < n && at < d / 8) x[v] = load16(from + size_t(row) * d + at * 8);
  }
}

// Sums over the threads of each row, in a fixed order; all threads of the block must call it.
// `turn` is flipped: the buffers alternate, so that one barrier a call is enough.
template <int W, int K>
__device__ __forceinline__ void row_sums(float (&sums)[K], int& turn) {
#pragma unroll
  for (int k = 0; k < K; k++) sums[k] = warp_sum(sums[k]);
  if (W == 1) return;
  constexpr int WARPS = Place<W>::THREADS / 32;
  __shared__ float shared[2][WARPS][K];
  int warp = threadIdx.x / 32, first = warp / W * W;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int k = 0; k < K; k++) shared[turn][warp][k] = sums[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; k++) {
    sums[k] = 0;
#pragma unroll
    for (int i = 0; i < W; i++) sums[k] += shared[turn][first + i][k];
  }
  turn ^= 1;
}

// Threads that should fit on a multiprocessor at once: as many as leave registers for V vectors.
constexpr int resident(int v) { return v < 3 ? 1024 : v == 3 ? 768 : 512; }
}  // namespace row_kernels
using namespace row_kernels;

// The sizes that a kernel over rows comes in.
#define FOR_ROW_SIZES(define) define(1, 3) define(2, 2) define(4, 2) define(8, 2) define(16, 2) define(16, 4)
