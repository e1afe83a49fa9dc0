// The loss of MOHAWK's phase 2, ‖s − t‖₂ of every token, and its gradient; see
// stages/src/ops/distance.rs. With a gradient, the distance is √(Σ(s − t)² + 1e-12) as there.
//
//   d_s = weight · (s − t) / ‖s − t‖, plus what d_s holds with `accumulate`
//
// s, t, d_s: bf16 [n, d]; distance_n, norm_n (‖t‖₂): f32 [n]; all outputs may be null. The sum over
// tokens is left to `sum_partial` and `sum_final`.
#include "rows.cuh"

namespace {
template <int W, int V>
__device__ __forceinline__ void distances(float* distance_n, float* norm_n, bf16* d_s, const bf16* s, const bf16* t,
                                          int n, int d, float weight, int accumulate) {
  Place<W> place;
  int step = gridDim.x * place.GROUPS, turn = 0;
  uint4 s_own[V], t_own[V], s_next[V], t_next[V], old[V];
  int begin = blockIdx.x * place.GROUPS + place.group;
  load_row<W, V>(s_next, s, place, begin, n, d);
  load_row<W, V>(t_next, t, place, begin, n, d);
  for (int first = blockIdx.x * place.GROUPS; first < n; first += step) {
    int row = first + place.group;
#pragma unroll
    for (int v = 0; v < V; v++) s_own[v] = s_next[v], t_own[v] = t_next[v];
    load_row<W, V>(s_next, s, place, row + step, n, d);
    load_row<W, V>(t_next, t, place, row + step, n, d);
    if (accumulate && d_s) load_row<W, V>(old, d_s, place, row, n, d);
    float sums[2] = {0, 0}, a[8], b[8];
#pragma unroll
    for (int v = 0; v < V; v++) {
      unpack8(a, s_own[v]);
      unpack8(b, t_own[v]);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        sums[0] += (a[i] - b[i]) * (a[i] - b[i]);
        sums[1] += b[i] * b[i];
      }
    }
    row_sums<W>(sums, turn);
    if (row >= n) continue;
    float distance = sqrtf(sums[0] + (d_s ? 1e-12f : 0.0f));
    if (place.lane == 0) {
      if (distance_n) distance_n[row] = distance;
      if (norm_n) norm_n[row] = sqrtf(sums[1]);
    }
    if (!d_s) continue;
    float scale = weight / distance;
#pragma unroll
    for (int v = 0; v < V; v++) {
      int at = place.vector(v);
      if (at >= d / 8) continue;
      unpack8(a, s_own[v]);
      unpack8(b, t_own[v]);
      float out[8] = {};
      if (accumulate) unpack8(out, old[v]);
#pragma unroll
      for (int i = 0; i < 8; i++) out[i] += (a[i] - b[i]) * scale;
      store16(d_s + size_t(row) * d + at * 8, pack8(out));
    }
  }
}
}  // namespace

#define DISTANCE(W, V)                                                                                               \
  extern "C" __global__ void __launch_bounds__(Place<W>::THREADS, resident(V) / Place<W>::THREADS)                   \
      distance_##W##w##V##v(float* distance_n, float* norm_n, bf16* d_s, const bf16* s, const bf16* t, int n,        \
                            int d, float weight, int accumulate) {                                                   \
    distances<W, V>(distance_n, norm_n, d_s, s, t, n, d, weight, accumulate);                                        \
  }                                                                                                                  \
  REGISTER(distance_##W##w##V##v)

FOR_ROW_SIZES(DISTANCE)
