// Cross-entropy of a student against a teacher's k most likely tokens and the mass of the rest; logits
// become their gradient in place. CPU twin: src/ops/top_k.rs (`soft`).
//
//   q = softmax(s + bias),  q_tail = max(1 - Σ_k q, 1e-6)
//   L = -Σ_k p ln q - r ln q_tail
//   ds = weight·(q - p) on the k,  weight·q·(1 - r/q_tail) elsewhere
//
// Blocks and shared memory as in cross_entropy.cu's hard targets: 512 threads, N·8 KiB.
#include "logits.cuh"

namespace top_k {
using namespace logits;

constexpr int THREADS = 512;
// Least probability that a student's tail counts as, so that its logarithm stays finite.
constexpr double TAIL_FLOOR = 1e-6;

// An IEEE half as f32: the exponent is moved by a product, which is right for subnormal ones, too.
__device__ __forceinline__ float half_to_float(uint16_t half) {
  uint32_t magnitude = uint32_t(half & 0x7fff) << 13, sign = uint32_t(half & 0x8000) << 16;
  float value = __uint_as_float(magnitude) * 5.192296858534828e33f;  // 2^112
  if (magnitude >= 0x0f800000u) value = __uint_as_float(magnitude | 0x7f800000u);
  return __uint_as_float(__float_as_uint(value) | sign);
}
__device__ __forceinline__ float log_p_of(uint16_t value) { return half_to_float(value); }
__device__ __forceinline__ float log_p_of(float value) { return value; }

struct Sums {
  double mass, kept, top;  // of p, p·(s - max) and e^(s - max) over the k
};
__device__ __forceinline__ Sums warp_sums(Sums x) {
  for (int m = 16; m > 0; m >>= 1) {
    x.mass += __shfl_xor_sync(FULL, x.mass, m);
    x.kept += __shfl_xor_sync(FULL, x.kept, m);
    x.top += __shfl_xor_sync(FULL, x.top, m);
  }
  return x;
}

template <int N, class LogP>
__device__ __forceinline__ void soft(bf16* s_nv, const uint32_t* ids_nk, const LogP* log_p_nk, const float* tail_n,
                                     const float* bias, const uint8_t* scored_n, float weight, const float* factor,
                                     float* out_n, int rows, int v, int k, int learn) {
  DYNAMIC_SHARED(uint4, slots);
  __shared__ float2 part[THREADS / 32];
  __shared__ Sums sums[THREADS / 32];
  Row<N, THREADS> tile{slots, bias, v / 8};
  if (factor) weight *= *factor;
  auto on = [&](int row) { return row < rows && (!scored_n || scored_n[row]); };
  auto at_row = [&](int row) { return on(row) ? s_nv + size_t(row) * v : nullptr; };
  int own = threadIdx.x, warp = own / 32, lane = own % 32, warps_k = (k + 31) / 32;

  int step = gridDim.x;
  tile.fetch_all(at_row(blockIdx.x));
  for (int row = blockIdx.x; row < rows; row += step) {
    const bf16* next = at_row(row + step);
    bf16* row_v = s_nv + size_t(row) * v;
    if (!on(row)) {
      if (own == 0) out_n[row] = 0.0f;
      if (learn) tile.clear(row_v);
      tile.fetch_all(next);
      continue;
    }
    uint32_t id = 0;
    float logit = 0.0f, p = 0.0f;
    if (own < k) {  // before the barrier of join_block, since the second pass overwrites logits
      id = ids_nk[size_t(row) * k + own];
      p = expf(log_p_of(log_p_nk[size_t(row) * k + own]));
      logit = to_float(row_v[id]) + (bias ? bias[id] : 0.0f);
    }
    LogSum all = tile.sum(row_v);
    join_block(all, part);
    float e = own < k ? power(logit, all.max * LOG2E) : 0.0f;
    if (warp < warps_k) {
      Sums mine = {p, own < k ? double(p) * double(logit - all.max) : 0.0, e};
      mine = warp_sums(mine);
      if (lane == 0) sums[warp] = mine;
    }
    __syncthreads();
    Sums total = {0.0, 0.0, 0.0};
    for (int w = 0; w < warps_k; w++) total.mass += sums[w].mass, total.kept += sums[w].kept, total.top += sums[w].top;
    double q_tail = 1.0 - total.top / double(all.sum), tail = tail_n[row];
    if (q_tail < TAIL_FLOOR) q_tail = TAIL_FLOOR;  // a NaN stays one
    if (own == 0) out_n[row] = float(total.mass * log(double(all.sum)) - total.kept - tail * log(q_tail));
    float share = weight / all.sum, others = float(1.0 - tail / q_tail) * share, shift = all.max * LOG2E;
    if (learn) {
      tile.rewrite(row_v, next, [&](float (&x)[8], int) {
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] = power(x[i], shift) * others;
      });
    } else {
      tile.fetch_all(next);
    }
    __syncthreads();
    if (learn && own < k) row_v[id] = to_bf16(e * share - p * weight);
  }
}

}  // namespace top_k

// s_nv bf16 [rows, v], the gradient afterwards if `learn`; ids_nk u32 [rows, k], k at most 512, all
// below v and different in a row; log_p_nk f16 (or f32: `…_f32_…`) [rows, k]; tail_n f32 [rows];
// bias f32 [v] or null; scored_n u8 [rows] or null; factor: null, or f32 on the device that `weight`
// is multiplied by; out_n f32 [rows], 0 where not scored.
#define TOP_K_SOFT(NAME, N, TYPE)                                                                                \
  extern "C" __global__ void __launch_bounds__(512, 2) NAME##N(                                                  \
      bf16* s_nv, const uint32_t* ids_nk, const TYPE* log_p_nk, const float* tail_n, const float* bias,          \
      const uint8_t* scored_n, float weight, const float* factor, float* out_n, int rows, int v, int k,          \
      int learn) {                                                                                               \
    top_k::soft<N>(s_nv, ids_nk, log_p_nk, tail_n, bias, scored_n, weight, factor, out_n, rows, v, k, learn);    \
  }                                                                                                              \
  REGISTER(NAME##N)
#define TOP_K_SOFT_BOTH(N)                      \
  TOP_K_SOFT(top_k_soft_n, N, uint16_t)         \
  TOP_K_SOFT(top_k_soft_f32_n, N, float)
TOP_K_SOFT_BOTH(2)
TOP_K_SOFT_BOTH(4)
TOP_K_SOFT_BOTH(8)
TOP_K_SOFT_BOTH(12)
TOP_K_SOFT_BOTH(13)
