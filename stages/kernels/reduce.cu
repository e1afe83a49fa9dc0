// Sums over tokens in a fixed order, in two passes: partial sums by a kernel of the op (or
// `column_sums_partial`, `sum_partial`), then the partials by `reduce_rows` (or `sum_final`).
#include "rows.cuh"

namespace {
constexpr int REDUCE_WARPS = 32, COLUMN_WARPS = 8, SUM_THREADS = 256, FILL_THREADS = 256;
}

// out[c] = scale · Σ_r partials[r, c] (+ out[c] with `accumulate`), partials f32 [rows, stride]; columns
// from `split` on go to out2[c − split]. Grid ceil(cols/32), 1024 threads: a warp takes every 32nd row.
extern "C" __global__ void __launch_bounds__(32 * REDUCE_WARPS)
    reduce_rows(float* out, float* out2, const float* partials, int rows, int cols, int stride, int split,
                float scale, int accumulate) {
  __shared__ float shared[REDUCE_WARPS][33];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
  float sum = 0;
  if (column < cols) {
#pragma unroll 8
    for (int row = warp; row < rows; row += REDUCE_WARPS) sum += partials[size_t(row) * stride + column];
  }
  shared[warp][lane] = sum;
  __syncthreads();
  sum = warp_sum(shared[lane][warp]);
  column = blockIdx.x * 32 + warp;
  if (lane > 0 || column >= cols) return;
  float* to = column < split ? out + column : out2 + (column - split);
  *to = scale * sum + (accumulate ? *to : 0.0f);
}
REGISTER(reduce_rows)

// partials[block, c] = Σ of column c over the block's rows of x, bf16 [n, stride]. Grid (ceil(cols/256),
// blocks), 256 threads; blocks · range ≥ n, and every block writes its row of partials (f32 [blocks, cols]).
extern "C" __global__ void __launch_bounds__(32 * COLUMN_WARPS)
    column_sums_partial(float* partials, const bf16* x, int n, int cols, int stride, int range) {
  __shared__ float shared[COLUMN_WARPS][256];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = (blockIdx.x * 32 + lane) * 8;
  size_t begin = size_t(blockIdx.y) * range, end = min(begin + range, size_t(n));
  float sums[8] = {}, value[8];
  if (column < cols) {
#pragma unroll 8
    for (size_t row = begin + warp; row < end; row += COLUMN_WARPS) {
      unpack8(value, load16(x + row * stride + column));
#pragma unroll
      for (int i = 0; i < 8; i++) sums[i] += value[i];
    }
  }
  store8(&shared[warp][lane * 8], sums);
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < COLUMN_WARPS; i++) sum += shared[i][threadIdx.x];
  column = blockIdx.x * 256 + threadIdx.x;
  if (column < cols) partials[size_t(blockIdx.y) * cols + column] = sum;
}
REGISTER(column_sums_partial)

// partials[block] = Σ of every grid-th slice of x, f32 [n]. The grid must be a function of n alone; 256
// threads.
extern "C" __global__ void __launch_bounds__(SUM_THREADS) sum_partial(float* partials, const float* x, long long n) {
  __shared__ float shared[SUM_THREADS / 32];
  float sum = 0;
  size_t step = size_t(gridDim.x) * SUM_THREADS;
#pragma unroll 8
  for (size_t i = size_t(blockIdx.x) * SUM_THREADS + threadIdx.x; i < size_t(n); i += step) sum += x[i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < SUM_THREADS / 32; i++) sum += shared[i];
  partials[blockIdx.x] = sum;
}
REGISTER(sum_partial)

// *out = scale · Σ partials (+ *out with `accumulate`), in double. One block of 256 threads.
extern "C" __global__ void __launch_bounds__(SUM_THREADS)
    sum_final(float* out, const float* partials, int count, float scale, int accumulate) {
  __shared__ double shared[SUM_THREADS];
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += SUM_THREADS) sum += partials[i];
  shared[threadIdx.x] = sum;
  __syncthreads();
  for (int half = SUM_THREADS / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) *out = float(scale * shared[0] + (accumulate ? *out : 0.0));
}
REGISTER(sum_final)

namespace {
// x[i] = f(x[i]) of n floats, four at a time; the grid covers 1024 elements a block.
template <class F> __device__ __forceinline__ void map_floats(float* x, long long n, bool read, F f) {
  long long i = ((long long)blockIdx.x * FILL_THREADS + threadIdx.x) * 4;
  if (i + 4 <= n) {
    float4 v = read ? *reinterpret_cast<float4*>(x + i) : make_float4(0, 0, 0, 0);
    *reinterpret_cast<float4*>(x + i) = make_float4(f(v.x), f(v.y), f(v.z), f(v.w));
    return;
  }
  for (; i < n; i++) x[i] = f(read ? x[i] : 0.0f);
}
}  // namespace

// x[i] = value, x[i] *= factor: grid ceil(n/1024), 256 threads.
extern "C" __global__ void __launch_bounds__(FILL_THREADS) fill_f32(float* x, long long n, float value) {
  map_floats(x, n, false, [=](float) { return value; });
}
REGISTER(fill_f32)

extern "C" __global__ void __launch_bounds__(FILL_THREADS) scale_f32(float* x, long long n, float factor) {
  map_floats(x, n, true, [=](float v) { return v * factor; });
}
REGISTER(scale_f32)
