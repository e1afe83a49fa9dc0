// The SSD scan with skip and gate, forward: gated = (y + D x) · SiLU(z + z_bias), see ssd.cuh.
//
// A block walks over the chunks of one head's columns [P tile] of one sequence; the state stays in
// registers (f32), its bf16 copy is what the next chunk multiplies. A warp owns 16 tokens of the chunk
// for y and a part of the state. One barrier a chunk: whatever the next chunk needs is double.
//   grid (heads, batch, width / P), 128 threads, shared bytes 256 (P + 2N) + 4 P N + 2048 + 4 P
//   xbc_nc [n, channels] x | B | C, proj_nr [n, proj_stride] z at column `channels`, a_log_nh [n, a_stride]
//   d_h [heads], z_bias [inner], starts_n [n];  channels = heads (width + 2 N), inner = heads width
//   gated_nd [n, inner]; y_nd [n, inner] with the skip, or null; states [batch, heads, chunks, width, N]
//   entering the chunks (the first is zero), or null; final_state f32 [batch, heads, width, N], or null
#include "ssd.cuh"

namespace ssd {

constexpr int FORWARD_WARPS = 4;

template <int P, int N> struct ForwardShared {
  bf16 x[2][Q * P], b[2][Q * N], c[2][Q * N], state[2][P * N];
  Decays decays[2];
  float z_bias[P];
};

struct ForwardArgs {
  const bf16 *xbc_nc, *proj_nr;
  const float *a_log_nh, *d_h, *z_bias;
  const uint32_t* starts_n;
  bf16 *gated_nd, *y_nd, *states;
  float* final_state;
  int heads, width, seq, proj_stride, a_stride;
};

// y of the warp's rows from the entering state, then from the chunk itself.
template <int P, int N>
__device__ __forceinline__ void rows_of_y(float (&y)[P / 8][4], int warp, int lane, bf16* x, bf16* b, bf16* c,
                                          bf16* state, const Decays& decays) {
  int g = lane / 4, t = lane % 4, row = 16 * warp + g;
  uint32_t a[N / 16][4];
#pragma unroll
  for (int k = 0; k < N / 16; k++) load_a<N>(a[k], c, 16 * warp, 16 * k, lane);
  clear(y);
  if (decays.first[16 * warp] != 0.0f) {
#pragma unroll
    for (int k = 0; k < N / 16; k++)
#pragma unroll
      for (int j = 0; j < P / 8; j += 2) mma_by_n<N>(y[j], y[j + 1], a[k], state, 8 * j, 16 * k, lane);
    scale_rows(y, decays.first[row], decays.first[row + 8]);
  }
  float sum[2] = {decays.sum[row], decays.sum[row + 8]};
  int low[2] = {decays.low[row], decays.low[row + 8]};
  for (int s0 = max(0, decays.low[16 * warp]) / 16 * 16; s0 <= 16 * warp; s0 += 16) {
    float mix[2][4] = {};
#pragma unroll
    for (int k = 0; k < N / 16; k++) mma_by_n<N>(mix[0], mix[1], a[k], b, s0, 16 * k, lane);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      int s = s0 + 8 * j + 2 * t;
      float2 from = *reinterpret_cast<const float2*>(decays.sum + s);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int l = row + 8 * half;
        float near = exp2_fast(sum[half] - from.x), far = exp2_fast(sum[half] - from.y);
        mix[j][2 * half] = is_seen(s, l, low[half]) ? mix[j][2 * half] * near : 0.0f;
        mix[j][2 * half + 1] = is_seen(s + 1, l, low[half]) ? mix[j][2 * half + 1] * far : 0.0f;
      }
    }
    const uint32_t m[4] = {pack2(mix[0][0], mix[0][1]), pack2(mix[0][2], mix[0][3]), pack2(mix[1][0], mix[1][1]),
                           pack2(mix[1][2], mix[1][3])};
#pragma unroll
    for (int j = 0; j < P / 8; j += 2) mma_by_k<P>(y[j], y[j + 1], m, x, 8 * j, s0, lane);
  }
}

// Skip and gate of the warp's rows; z as it came from memory, 16 bytes a lane.
template <int P>
__device__ __forceinline__ void gate_rows(float (&y)[P / 8][4], const uint4 (&z)[2][P / 32], float skip,
                                          const float* z_bias, bf16* x, bf16* y_rows, bf16* gated_rows, size_t stride,
                                          int warp, int lane, int len) {
  int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = 16 * warp + g + 8 * half;
    uint32_t open[P / 8], words[P / 8];
#pragma unroll
    for (int q = 0; q < P / 32; q++) {
      uint32_t v[4] = {z[half][q].x, z[half][q].y, z[half][q].z, z[half][q].w};
      transpose_quad(v);
      for (int i = 0; i < 4; i++) open[4 * q + i] = v[i];
    }
#pragma unroll
    for (int j = 0; j < P / 8; j++) {
      uint32_t own = pair_at<P>(x, 16 * warp + 8 * half, j, lane);
      float2 bias = *reinterpret_cast<const float2*>(z_bias + 8 * j + 2 * t);
      float y0 = y[j][2 * half] + skip * low2(own), y1 = y[j][2 * half + 1] + skip * high2(own);
      float z0 = low2(open[j]) + bias.x, z1 = high2(open[j]) + bias.y;
      words[j] = pack2(y0, y1);
      open[j] = pack2(y0 * z0 * sigmoid_fast(z0), y1 * z1 * sigmoid_fast(z1));
    }
    bool valid = row < len;
    store_row<P / 8>(open, gated_rows + row * stride, valid);
    if (y_rows) store_row<P / 8>(words, y_rows + row * stride, valid);
  }
}

template <int P, int N> __device__ __forceinline__ void forward(const ForwardArgs& args) {
  using S = Share<P, N, FORWARD_WARPS>;
  constexpr int THREADS = 32 * FORWARD_WARPS;
  using Shared = ForwardShared<P, N>;
  DYNAMIC_SHARED(Shared, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int head = blockIdx.x, column = head * args.width + blockIdx.z * P, seq = args.seq, chunks = (seq + Q - 1) / Q;
  const int inner = args.heads * args.width, channels = inner + 2 * args.heads * N;
  const size_t first = size_t(blockIdx.y) * seq, sequence = size_t(blockIdx.y) * args.heads + head;
  const bf16* xbc = args.xbc_nc + first * channels;
  const bf16* z_column = args.proj_nr + first * args.proj_stride + channels + column;
  const size_t y_at = first * inner + column;

  auto load = [&](int chunk) {
    const bf16* rows = xbc + size_t(chunk) * Q * channels;
    int to = chunk % 2, len = seq - chunk * Q;
    load_tile<Q, P, THREADS>(shared->x[to], rows + column, channels, len);
    load_tile<Q, N, THREADS>(shared->b[to], rows + inner + head * N, channels, len);
    load_tile<Q, N, THREADS>(shared->c[to], rows + inner + (args.heads + head) * N, channels, len);
    cp_async_commit();
  };
  auto fetch = [&](int chunk) {
    return fetch_decays(args.a_log_nh + head, args.a_stride, args.starts_n, first + size_t(chunk) * Q,
                        min(Q, seq - chunk * Q));
  };
  auto state_of = [&](int chunk) {
    return args.states ? args.states + ((sequence * chunks + chunk) * args.width + blockIdx.z * P) * N : nullptr;
  };

  load(0);
  if (warp == 0) make_decays(shared->decays[0], fetch(0), 0, min(Q, seq));
  for (int i = threadIdx.x; i < P; i += THREADS) shared->z_bias[i] = args.z_bias[column + i];
  if (bf16* to = state_of(0))
    for (int i = threadIdx.x; i < P * N / 8; i += THREADS) reinterpret_cast<uint4*>(to)[i] = make_uint4(0, 0, 0, 0);
  const float skip = args.d_h[head];
  float state[S::RT][S::NT][4];
#pragma unroll
  for (int i = 0; i < S::RT; i++) clear(state[i]);

  for (int chunk = 0; chunk < chunks; chunk++) {
    const int now = chunk % 2, next = 1 - now, len = min(Q, seq - chunk * Q);
    const bool more = chunk + 1 < chunks;
    cp_async_wait<0>();
    __syncthreads();
    Raw raw;
    if (more) {
      load(chunk + 1);
      if (warp == 0) raw = fetch(chunk + 1);
    }
    uint4 z[2][P / 32];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = 16 * warp + g + 8 * half;
      const bf16* from = z_column + (size_t(chunk) * Q + min(row, len - 1)) * args.proj_stride;
#pragma unroll
      for (int q = 0; q < P / 32; q++) z[half][q] = *reinterpret_cast<const uint4*>(from + 8 * (4 * q + t));
    }
    const Decays& decays = shared->decays[now];
    {
      float y[P / 8][4];
      rows_of_y<P, N>(y, warp, lane, shared->x[now], shared->b[now], shared->c[now], shared->state[now], decays);
      size_t at = y_at + size_t(chunk) * Q * inner;
      gate_rows<P>(y, z, skip, shared->z_bias, shared->x[now], args.y_nd ? args.y_nd + at : nullptr,
                   args.gated_nd + at, inner, warp, lane, len);
    }
    if (S::active(warp) && (more || args.final_state)) {
      float kept = decays.first[Q - 1];
#pragma unroll
      for (int i = 0; i < S::RT; i++) scale_rows(state[i], kept, kept);
      add_outer<P, N, FORWARD_WARPS, true>(state, warp, lane, shared->x[now], shared->b[now], decays.last);
      if (more) store_state<P, N, FORWARD_WARPS>(state, warp, lane, shared->state[next], state_of(chunk + 1));
    }
    if (more && warp == 0) make_decays(shared->decays[next], raw, (chunk + 1) * Q, min(Q, seq - (chunk + 1) * Q));
  }

  if (!args.final_state || !S::active(warp)) return;
  float* to = args.final_state + (sequence * args.width + blockIdx.z * P) * N;
#pragma unroll
  for (int i = 0; i < S::RT; i++)
#pragma unroll
    for (int j = 0; j < S::NT; j++) {
      float* at = to + (S::row(warp, i) + g) * N + S::column(warp) + 8 * j + 2 * t;
      *reinterpret_cast<float2*>(at) = make_float2(state[i][j][0], state[i][j][1]);
      *reinterpret_cast<float2*>(at + 8 * N) = make_float2(state[i][j][2], state[i][j][3]);
    }
}

}  // namespace ssd

#define SSD_FORWARD(P, N, BLOCKS)                                                                                    \
  extern "C" __global__ void __launch_bounds__(128, BLOCKS) ssd_forward_p##P##_n##N(                                 \
      const bf16* __restrict__ xbc_nc, const bf16* __restrict__ proj_nr, const float* __restrict__ a_log_nh,         \
      const float* __restrict__ d_h, const float* __restrict__ z_bias, const uint32_t* __restrict__ starts_n,        \
      bf16* __restrict__ gated_nd, bf16* __restrict__ y_nd, bf16* __restrict__ states,                               \
      float* __restrict__ final_state, int heads, int width, int seq, int proj_stride, int a_stride) {               \
    ssd::forward<P, N>({xbc_nc, proj_nr, a_log_nh, d_h, z_bias, starts_n, gated_nd, y_nd, states, final_state,       \
                        heads, width, seq, proj_stride, a_stride});                                                  \
  }                                                                                                                  \
  REGISTER(ssd_forward_p##P##_n##N)

SSD_FORWARD(32, 16, 4)
SSD_FORWARD(32, 32, 4)
SSD_FORWARD(32, 64, 4)
SSD_FORWARD(32, 128, 2)
SSD_FORWARD(64, 16, 3)
SSD_FORWARD(64, 32, 3)
SSD_FORWARD(64, 64, 3)
SSD_FORWARD(64, 128, 2)
