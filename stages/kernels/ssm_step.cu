// One token of decoding for a batch of sequences: convolution, step of the scan, skip and gate.
//   x|B|C = bias + Σ_k w_k input_k over the last `taps` inputs (oldest tap first, no activation)
//   S ← a S + x Bᵀ, a = sigmoid(−A_log);  gated = (S C + D x) · SiLU(z + z_bias)
// Memory bound on S (f32, read and written once): a block has one head of one sequence, N / 4 lanes have
// a row of S, and a thread's first rows are on their way before anything else is done.
//   grid (heads, batch), 128 threads, shared bytes 4 (width + 2 N)
//   proj_nr bf16 [batch, proj_stride] x|B|C|z before the convolution, a_log_nh f32 [batch, a_stride]
//   window f32 [batch, channels, taps − 1] the inputs before this one, oldest first; moved on
//   state f32 [batch, heads, width, N]; moved on. gated_nd bf16 [batch, inner]
//   w_ck f32 [channels, taps], bias_c f32 [channels], d_h [heads], z_bias [inner]
#include "prims.cuh"

namespace ssm_step {

constexpr int THREADS = 128;

// The convolution of one channel; its window is moved on.
__device__ __forceinline__ float convolve(float input, float* window, const float* w, float bias, int taps) {
  float sum = bias;
  for (int k = 0; k + 1 < taps; k++) {
    float old = window[k];
    sum += w[k] * old;
    if (k > 0) window[k - 1] = old;
  }
  if (taps > 1) window[taps - 2] = input;
  return sum + w[taps - 1] * input;
}

struct Args {
  const bf16* proj_nr;
  const float *a_log_nh, *w_ck, *bias_c, *d_h, *z_bias;
  float *window, *state;
  bf16* gated_nd;
  int heads, width, taps, proj_stride, a_stride;
};

template <int N> __device__ __forceinline__ void step(const Args& args) {
  constexpr int LANES = N / 4, ROWS = THREADS / LANES, AHEAD = 8;  // rows at once, and steps of them on their way
  DYNAMIC_SHARED(float, shared);
  const int head = blockIdx.x, width = args.width, inner = args.heads * width;
  const int channels = inner + 2 * args.heads * N, lane = threadIdx.x % LANES, first = threadIdx.x / LANES;
  const size_t sequence = blockIdx.y;
  float *x = shared, *b = x + width, *c = b + N;
  const bf16* proj = args.proj_nr + sequence * args.proj_stride;
  float* state = args.state + (sequence * args.heads + head) * width * N + 4 * lane;

  float4 rows[AHEAD];
  auto fetch = [&](int from) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      int row = from + first + i * ROWS;
      if (row < width) rows[i] = *reinterpret_cast<const float4*>(state + size_t(row) * N);
    }
  };
  fetch(0);
  for (int i = threadIdx.x; i < width + 2 * N; i += THREADS) {
    int channel = i < width       ? head * width + i
                  : i < width + N ? inner + head * N + i - width
                                  : inner + (args.heads + head) * N + i - width - N;
    shared[i] = convolve(to_float(proj[channel]), args.window + (sequence * channels + channel) * (args.taps - 1),
                         args.w_ck + size_t(channel) * args.taps, args.bias_c[channel], args.taps);
  }
  const float a = sigmoid_fast(-args.a_log_nh[sequence * args.a_stride + head]), skip = args.d_h[head];
  __syncthreads();
  const float4 own_b = *reinterpret_cast<const float4*>(b + 4 * lane);
  const float4 own_c = *reinterpret_cast<const float4*>(c + 4 * lane);
  // The same number of turns for all lanes of a warp: they sum together.
  for (int from = 0; from < width; from += AHEAD * ROWS) {
    if (from > 0) fetch(from);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      int row = from + first + i * ROWS;
      bool there = row < width;
      float input = there ? x[row] : 0.0f, y = 0.0f;
      if (there) {
        float4 s = rows[i];
        s.x = a * s.x + input * own_b.x, s.y = a * s.y + input * own_b.y;
        s.z = a * s.z + input * own_b.z, s.w = a * s.w + input * own_b.w;
        *reinterpret_cast<float4*>(state + size_t(row) * N) = s;
        y = s.x * own_c.x + s.y * own_c.y + s.z * own_c.z + s.w * own_c.w;
      }
#pragma unroll
      for (int d = LANES / 2; d > 0; d /= 2) y += __shfl_xor_sync(FULL, y, d);
      if (there && lane == 0) {
        int column = head * width + row;
        float z = to_float(proj[channels + column]) + args.z_bias[column];
        args.gated_nd[sequence * inner + column] = to_bf16((y + skip * input) * z * sigmoid_fast(z));
      }
    }
  }
}

}  // namespace ssm_step

#define SSM_STEP(N)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(ssm_step::THREADS) ssm_step_n##N(                                      \
      const bf16* __restrict__ proj_nr, const float* __restrict__ a_log_nh, const float* __restrict__ w_ck,           \
      const float* __restrict__ bias_c, const float* __restrict__ d_h, const float* __restrict__ z_bias,              \
      float* __restrict__ window, float* __restrict__ state, bf16* __restrict__ gated_nd, int heads, int width,       \
      int taps, int proj_stride, int a_stride) {                                                                      \
    ssm_step::step<N>({proj_nr, a_log_nh, w_ck, bias_c, d_h, z_bias, window, state, gated_nd, heads, width, taps,     \
                       proj_stride, a_stride});                                                                       \
  }                                                                                                                   \
  REGISTER(ssm_step_n##N)

SSM_STEP(16)
SSM_STEP(32)
SSM_STEP(64)
SSM_STEP(128)
