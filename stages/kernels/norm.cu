// RMSNorm and LayerNorm, forward and backward; see stages/src/ops/{norm,layer_norm}.rs.
//
//   RMS:    y = x · inv · w,               inv = 1/√(mean(x²) + eps)
//   Layer:  y = (x − mean) · inv · w + b,  inv = 1/√(var(x) + eps), the variance divided by d
//   back, with x̂ = (x − mean)·inv (RMS: mean 0) and g = d_y · w:
//     d_x = d_residual + inv · (g − mean(g) − x̂ · mean(g · x̂))       (RMS: without mean(g))
//     d_w = Σ_n d_y · x̂,  d_b = Σ_n d_y
//
// x, y, d_x, d_y, d_y2, d_residual: bf16 [n, d]; mean, inv: f32 [n]; w, b: f32 [d].
// Rows are dealt to blocks in turn. The forward result depends on no grid; `partials` of the backward
// pass (f32 [grid, d], LayerNorm [grid, 2d]: d_w, then d_b) is one row a block, to be added up by
// `reduce_rows`; its grid must be a function of n and d alone.
#include "rows.cuh"

namespace {
template <int W, int V, bool LAYER>
__device__ __forceinline__ void norm_forward(bf16* y, float* mean_n, float* inv_n, const bf16* x, const float* w,
                                             const float* b, int n, int d, float eps) {
  Place<W> place;
  float w_own[V][8], b_own[V][8];
#pragma unroll
  for (int v = 0; v < V; v++) {
    int at = place.vector(v);
    if (at >= d / 8) continue;
    load8(w_own[v], w + at * 8);
    if (LAYER) load8(b_own[v], b + at * 8);
  }
  int step = gridDim.x * place.GROUPS, turn = 0;
  uint4 next[V], own[V];
  load_row<W, V>(next, x, place, blockIdx.x * place.GROUPS + place.group, n, d);
  for (int first = blockIdx.x * place.GROUPS; first < n; first += step) {
    int row = first + place.group;
#pragma unroll
    for (int v = 0; v < V; v++) own[v] = next[v];
    load_row<W, V>(next, x, place, row + step, n, d);
    float mean = 0, value[8];
    if (LAYER) {
      float sum[1] = {0};
#pragma unroll
      for (int v = 0; v < V; v++) {
        unpack8(value, own[v]);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[0] += value[i];
      }
      row_sums<W>(sum, turn);
      mean = sum[0] / d;
    }
    float squares[1] = {0};
#pragma unroll
    for (int v = 0; v < V; v++) {
      if (place.vector(v) >= d / 8) continue;
      unpack8(value, own[v]);
#pragma unroll
      for (int i = 0; i < 8; i++) squares[0] += (value[i] - mean) * (value[i] - mean);
    }
    row_sums<W>(squares, turn);
    float inv = rsqrtf(squares[0] / d + eps);
    if (row >= n) continue;
    if (place.lane == 0) {
      if (inv_n) inv_n[row] = inv;
      if (LAYER && mean_n) mean_n[row] = mean;
    }
#pragma unroll
    for (int v = 0; v < V; v++) {
      int at = place.vector(v);
      if (at >= d / 8) continue;
      unpack8(value, own[v]);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        value[i] = LAYER ? (value[i] - mean) * inv * w_own[v][i] + b_own[v][i] : value[i] * inv * w_own[v][i];
      }
      store16(y + size_t(row) * d + at * 8, pack8(value));
    }
  }
}

// The rows that a thread works on, fetched one turn ahead into shared memory that no other thread
// reads: x, d_y, and those of d_y2 and d_residual that there are. There is no room for the last where
// V is 4.
template <int W, int V> struct Fetched {
  static constexpr int THREADS = Place<W>::THREADS;
  static constexpr bool STAGED = V < 4;
  uint4* stage;
  Place<W> place;
  const bf16 *x, *d_y, *d_y2, *d_residual;
  int n, d, streams;

  __device__ __forceinline__ uint4* slot(int half, int stream, int v) const {
    return stage + ((half * streams + stream) * V + v) * THREADS + threadIdx.x;
  }
  __device__ __forceinline__ void fetch(int half, int row) const {
    if (row < n) {
#pragma unroll
      for (int v = 0; v < V; v++) {
        int at = place.vector(v);
        if (at >= d / 8) continue;
        size_t from = size_t(row) * d + at * 8;
        cp_async16(slot(half, 0, v), x + from);
        cp_async16(slot(half, 1, v), d_y + from);
        if (d_y2) cp_async16(slot(half, 2, v), d_y2 + from);
        if (STAGED && d_residual) cp_async16(slot(half, streams - 1, v), d_residual + from);
      }
    }
    cp_async_commit();
  }
  __device__ __forceinline__ void gradient(float (&g)[8], int half, int v) const {
    unpack8(g, *slot(half, 1, v));
    if (d_y2) {
      float more[8];
      unpack8(more, *slot(half, 2, v));
#pragma unroll
      for (int i = 0; i < 8; i++) g[i] += more[i];
    }
  }
  __device__ __forceinline__ void residual(float (&out)[8], int half, int v, size_t from) const {
    if (d_residual) unpack8(out, STAGED ? *slot(half, streams - 1, v) : load16(d_residual + from));
  }
};

// Adds up what the block's rows gave, first row group to last, into row `blockIdx.x` of the partials.
template <int W, int V>
__device__ __forceinline__ void write_partials(float* partials, const float (&sums)[V][8], float* shared, int d,
                                               int offset, int width) {
  Place<W> place;
  __syncthreads();
#pragma unroll
  for (int v = 0; v < V; v++) {
    int at = place.vector(v);
    if (at < d / 8) store8(shared + place.group * d + at * 8, sums[v]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < d; i += place.THREADS) {
    float sum = shared[i];
    for (int g = 1; g < place.GROUPS; g++) sum += shared[g * d + i];
    partials[size_t(blockIdx.x) * width + offset + i] = sum;
  }
}

template <int W, int V, bool LAYER>
__device__ __forceinline__ void norm_backward(bf16* d_x, const bf16* d_residual, const bf16* d_y, const bf16* d_y2,
                                              const bf16* x, const float* mean_n, const float* inv_n, const float* w,
                                              float* partials, int n, int d) {
  DYNAMIC_SHARED(uint4, stage);
  Place<W> place;
  int streams = 2 + (d_y2 != nullptr) + (d_residual != nullptr && Fetched<W, V>::STAGED);
  Fetched<W, V> rows{stage, place, x, d_y, d_y2, d_residual, n, d, streams};
  // With four vectors a thread the factors would not leave room for the sums.
  constexpr bool KEEP = V < 4;
  float w_own[KEEP ? V : 1][8], d_w[V][8], d_b[V][8];
#pragma unroll
  for (int v = 0; v < V; v++) {
    if (KEEP && place.vector(v) < d / 8) load8(w_own[v], w + place.vector(v) * 8);
#pragma unroll
    for (int i = 0; i < 8; i++) d_w[v][i] = d_b[v][i] = 0;
  }
  int step = gridDim.x * place.GROUPS, turn = 0, half = 0;
  rows.fetch(0, blockIdx.x * place.GROUPS + place.group);
  for (int first = blockIdx.x * place.GROUPS; first < n; first += step, half ^= 1) {
    int row = first + place.group;
    float inv = row < n ? inv_n[row] : 0, mean = LAYER && row < n ? mean_n[row] : 0;
    rows.fetch(half ^ 1, row + step);
    cp_async_wait<1>();
    // Σ g · x̂ and, for LayerNorm, Σ g.
    float sums[LAYER ? 2 : 1] = {}, hat[8], g[8], factor[8];
#pragma unroll
    for (int v = 0; v < V; v++) {
      int at = place.vector(v);
      if (row >= n || at >= d / 8) continue;
      unpack8(hat, *rows.slot(half, 0, v));
      rows.gradient(g, half, v);
      if (!KEEP) load8(factor, w + at * 8);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        hat[i] = (LAYER ? hat[i] - mean : hat[i]) * inv;
        d_w[v][i] += g[i] * hat[i];
        if (LAYER) d_b[v][i] += g[i];
        g[i] *= KEEP ? w_own[KEEP ? v : 0][i] : factor[i];
        sums[0] += g[i] * hat[i];
        if (LAYER) sums[LAYER ? 1 : 0] += g[i];
      }
    }
    row_sums<W>(sums, turn);
    float pull = sums[0] / d, level = LAYER ? sums[LAYER ? 1 : 0] / d : 0;
#pragma unroll
    for (int v = 0; v < V; v++) {
      int at = place.vector(v);
      if (row >= n || at >= d / 8) continue;
      unpack8(hat, *rows.slot(half, 0, v));
      rows.gradient(g, half, v);
      if (!KEEP) load8(factor, w + at * 8);
      float out[8] = {};
      rows.residual(out, half, v, size_t(row) * d + at * 8);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        hat[i] = (LAYER ? hat[i] - mean : hat[i]) * inv;
        g[i] *= KEEP ? w_own[KEEP ? v : 0][i] : factor[i];
        out[i] += inv * (g[i] - level - hat[i] * pull);
      }
      store16(d_x + size_t(row) * d + at * 8, pack8(out));
    }
  }
  if (!partials) return;
  cp_async_wait<0>();
  auto shared = reinterpret_cast<float*>(stage);
  int width = LAYER ? 2 * d : d;
  write_partials<W, V>(partials, d_w, shared, d, 0, width);
  if (LAYER) write_partials<W, V>(partials, d_b, shared, d, d, width);
}
}  // namespace

// Threads: 256 (512 where W is 16). Shared bytes of the backward pass: threads · 32 · V · streams, with
// streams = 2, +1 for d_y2, +1 for d_residual if V < 4. `inv` (forward), `mean` (forward), d_y2, d_residual and
// `partials` may be null; d_x may be d_residual.
#define NORM(W, V)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(Place<W>::THREADS, resident(V) / Place<W>::THREADS)                   \
      rms_forward_##W##w##V##v(bf16* y, float* inv, const bf16* x, const float* w, int n, int d, float eps) {        \
    norm_forward<W, V, false>(y, nullptr, inv, x, w, nullptr, n, d, eps);                                            \
  }                                                                                                                  \
  REGISTER(rms_forward_##W##w##V##v)                                                                                 \
  extern "C" __global__ void __launch_bounds__(Place<W>::THREADS, resident(V < 3 ? V : 4) / Place<W>::THREADS)       \
      layer_forward_##W##w##V##v(bf16* y, float* mean, float* inv, const bf16* x, const float* w, const float* b,    \
                                 int n, int d, float eps) {                                                          \
    norm_forward<W, V, true>(y, mean, inv, x, w, b, n, d, eps);                                                      \
  }                                                                                                                  \
  REGISTER(layer_forward_##W##w##V##v)                                                                               \
  extern "C" __global__ void __launch_bounds__(Place<W>::THREADS, 512 / Place<W>::THREADS)                           \
      rms_backward_##W##w##V##v(bf16* d_x, const bf16* d_residual, const bf16* d_y, const bf16* d_y2,                \
                                const bf16* x, const float* inv, const float* w, float* partials, int n, int d) {    \
    norm_backward<W, V, false>(d_x, d_residual, d_y, d_y2, x, nullptr, inv, w, partials, n, d);                      \
  }                                                                                                                  \
  REGISTER(rms_backward_##W##w##V##v)                                                                                \
  extern "C" __global__ void __launch_bounds__(Place<W>::THREADS, 512 / Place<W>::THREADS)                           \
      layer_backward_##W##w##V##v(bf16* d_x, const bf16* d_residual, const bf16* d_y, const bf16* d_y2,              \
                                  const bf16* x, const float* mean, const float* inv, const float* w,                \
                                  float* partials, int n, int d) {                                                   \
    norm_backward<W, V, true>(d_x, d_residual, d_y, d_y2, x, mean, inv, w, partials, n, d);                          \
  }                                                                                                                  \
  REGISTER(layer_backward_##W##w##V##v)

FOR_ROW_SIZES(NORM)
