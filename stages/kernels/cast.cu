// Between f32 and bf16 (to nearest, ties to even), and rows by number.
#include "rows.cuh"

namespace {
constexpr int CAST_THREADS = 256, CAST_UNROLL = 2;

// The first elements of the thread's groups of eight.
__device__ __forceinline__ long long own_eight(int u) {
  return ((long long)(blockIdx.x * CAST_UNROLL + u) * CAST_THREADS + threadIdx.x) * 8;
}
}  // namespace

// n elements, any number; grid ceil(n/4096), 256 threads.
extern "C" __global__ void __launch_bounds__(CAST_THREADS) cast_to_bf16(bf16* out, const float* x, long long n) {
  float value[CAST_UNROLL][8];
#pragma unroll
  for (int u = 0; u < CAST_UNROLL; u++) {
    long long i = own_eight(u);
    if (i + 8 <= n) load8(value[u], x + i);
  }
#pragma unroll
  for (int u = 0; u < CAST_UNROLL; u++) {
    long long i = own_eight(u);
    if (i + 8 <= n) {
      store16(out + i, pack8(value[u]));
    } else {
      for (; i < n; i++) out[i] = to_bf16(x[i]);
    }
  }
}
REGISTER(cast_to_bf16)

extern "C" __global__ void __launch_bounds__(CAST_THREADS) cast_to_f32(float* out, const bf16* x, long long n) {
  uint4 own[CAST_UNROLL];
#pragma unroll
  for (int u = 0; u < CAST_UNROLL; u++) {
    long long i = own_eight(u);
    if (i + 8 <= n) own[u] = load16(x + i);
  }
#pragma unroll
  for (int u = 0; u < CAST_UNROLL; u++) {
    long long i = own_eight(u);
    if (i + 8 <= n) {
      float value[8];
      unpack8(value, own[u]);
      store8(out + i, value);
    } else {
      for (; i < n; i++) out[i] = to_float(x[i]);
    }
  }
}
REGISTER(cast_to_f32)

// Row i of out (bf16 [n, out_stride]) is row index[i] of x (bf16 [.., x_stride]), d columns of it. Grid
// ceil(n·d/8 / 256), 256 threads; n·d/8 below 2^31.
extern "C" __global__ void __launch_bounds__(CAST_THREADS)
    gather_rows(bf16* out, const bf16* x, const uint32_t* index, int n, int d, int out_stride, int x_stride) {
  uint32_t width = d / 8, i = blockIdx.x * uint32_t(CAST_THREADS) + threadIdx.x;
  if (i >= uint32_t(n) * width) return;
  uint32_t row = i / width, column = i % width * 8;
  store16(out + size_t(row) * out_stride + column, load16(x + size_t(index[row]) * x_stride + column));
}
REGISTER(gather_rows)
