// Around the tiles of the orientation loss (see orient.cuh): the decays' sums before, norms and the gradient of
// the decays after.
//
//   log a = -softplus(A_log),  cs_l = Σ_{k <= l} log a_k
//   norm = sqrt(ΣE² + 1e-12),  factor = weight / norm     of each (sequence, head); true gradients = factor · unscaled
//   d(log a_k) = Σ_{j >= k} (rowdot_j - coldot_j)         over the document of k
//   dA_log = -sigmoid(A_log) d(log a)
// Rows and columns of one document have equal sums, so the sum over j >= k is minus the one over j < k; that needs
// the document's start only, and is 0 there.
#include "prims.cuh"

namespace orient {

constexpr int THREADS = 256, WARPS = THREADS / 32;

// Inclusive sums over the block's threads, in a fixed order. `room`: WARPS numbers of shared memory.
__device__ __forceinline__ double scan(double x, double* room) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int by = 1; by < 32; by *= 2) {
    const double below = __shfl_up_sync(FULL, x, by);
    if (lane >= by) x += below;
  }
  if (lane == 31) room[warp] = x;
  __syncthreads();
  double before = 0;
  for (int w = 0; w < warp; w++) before += room[w];
  __syncthreads();
  return before + x;
}

}  // namespace orient

// a_log_nh f32 [n, a_stride] -> cs_bhl f32 [batch·heads, seq], rounded from double.
// grid (batch·heads), block 256.
extern "C" __global__ void __launch_bounds__(256)
    decay_cumsum(const float* a_log_nh, int a_stride, float* cs_bhl, int seq, int heads) {
  constexpr int EACH = 4;
  __shared__ double room[orient::WARPS];
  __shared__ double total;
  const int item = blockIdx.x, head = item % heads;
  const float* from = a_log_nh + size_t(item / heads) * seq * a_stride + head;
  double carry = 0;
  for (int begin = 0; begin < seq; begin += orient::THREADS * EACH) {
    const int at = begin + int(threadIdx.x) * EACH;
    float log_a[EACH];
    for (int i = 0; i < EACH; i++) {
      const float x = at + i < seq ? from[size_t(at + i) * a_stride] : 0;
      log_a[i] = at + i < seq ? -(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)))) : 0;
    }
    double own = 0;
    for (int i = 0; i < EACH; i++) own += log_a[i];
    const double all = carry + orient::scan(own, room);
    if (threadIdx.x == orient::THREADS - 1) total = all;
    double sum = all - own;
    for (int i = 0; i < EACH; i++) {
      sum += log_a[i];
      if (at + i < seq) cs_bhl[size_t(item) * seq + at + i] = float(sum);
    }
    __syncthreads();
    carry = total;
  }
}
REGISTER(decay_cumsum)

// partials f32 [batch·heads, tiles, 4] -> norm, factor, ‖A‖ f32 [batch·heads] each. With gradients (rowdot_bhl not
// null) also d_d_bh f32 [batch, heads] = factor · trace, and dA_log as bf16 in columns a_column..a_column + heads of
// d_proj [n, proj_stride]; the columns after those are zeroed up to proj_stride.
// grid (batch·heads), block 256, shared 8·seq bytes (0 without gradients).
extern "C" __global__ void __launch_bounds__(256)
    orient_finish(const float* partials, int tiles, float weight, float* norm_bh, float* factor_bh,
                  float* attention_bh, float* d_d_bh, const float* rowdot_bhl, const float* coldot_bhl,
                  const uint32_t* starts_n, const float* a_log_nh, int a_stride, bf16* d_proj, int proj_stride,
                  int a_column, int seq, int heads) {
  DYNAMIC_SHARED(double, before_l);  // Σ_{j < l} (rowdot_j - coldot_j)
  __shared__ double room[orient::WARPS];
  __shared__ double total;
  __shared__ float factor;
  const int item = blockIdx.x, head = item % heads;
  if (threadIdx.x < 32) {
    double sums[3] = {0, 0, 0};
    for (int i = threadIdx.x; i < tiles; i += 32) {
      const float4 part = reinterpret_cast<const float4*>(partials)[size_t(item) * tiles + i];
      sums[0] += part.x, sums[1] += part.y, sums[2] += part.z;
    }
    for (int i = 0; i < 3; i++)
      for (int m = 16; m > 0; m /= 2) sums[i] += __shfl_xor_sync(FULL, sums[i], m);
    if (threadIdx.x == 0) {
      const double norm = sqrt(sums[0] + 1e-12);
      norm_bh[item] = float(norm);
      factor_bh[item] = factor = float(weight / norm);
      attention_bh[item] = float(sqrt(sums[1]));
      if (rowdot_bhl) d_d_bh[item] = float(sums[2] * weight / norm);
    }
  }
  if (!rowdot_bhl) return;
  constexpr int EACH = 4;
  const size_t row = size_t(item) * seq, token = size_t(item / heads) * seq;
  double carry = 0;
  for (int begin = 0; begin < seq; begin += orient::THREADS * EACH) {
    const int at = begin + int(threadIdx.x) * EACH;
    double change[EACH], own = 0;
    for (int i = 0; i < EACH; i++) {
      change[i] = at + i < seq ? double(rowdot_bhl[row + at + i]) - double(coldot_bhl[row + at + i]) : 0;
      own += change[i];
    }
    const double all = carry + orient::scan(own, room);
    if (threadIdx.x == orient::THREADS - 1) total = all;
    double sum = all - own;
    for (int i = 0; i < EACH; i++) {
      if (at + i < seq) before_l[at + i] = sum;
      sum += change[i];
    }
    __syncthreads();
    carry = total;
  }
  for (int l = threadIdx.x; l < seq; l += orient::THREADS) {
    const float d_log_a = float(before_l[starts_n[token + l]] - before_l[l]) * factor;
    const float x = a_log_nh[(token + l) * a_stride + head];
    bf16* to = d_proj + (token + l) * proj_stride;
    to[a_column + head] = to_bf16(-d_log_a / (1.0f + expf(-x)));
    if (head == 0)
      for (int column = a_column + heads; column < proj_stride; column++) to[column] = to_bf16(0.0f);
  }
}
REGISTER(orient_finish)

// loss and extra f32 [1] += weight · Σ norm_bh and weight · Σ attention_bh (what M = 0 would score). If d_d_h is not
// null, d_d_h f32 [heads] += Σ over the sequences of d_d_bh.
// grid (1), block 256.
extern "C" __global__ void __launch_bounds__(256)
    orient_total(const float* norm_bh, const float* attention_bh, float weight, float* loss, float* extra,
                 const float* d_d_bh, float* d_d_h, int batch, int heads) {
  __shared__ double room[orient::WARPS];
  double norm = 0, attention = 0;
  for (int i = threadIdx.x; i < batch * heads; i += orient::THREADS) norm += norm_bh[i], attention += attention_bh[i];
  norm = orient::scan(norm, room);
  attention = orient::scan(attention, room);
  if (threadIdx.x == orient::THREADS - 1) *loss += float(norm * weight), *extra += float(attention * weight);
  if (!d_d_h) return;
  for (int h = threadIdx.x; h < heads; h += orient::THREADS) {
    double sum = 0;
    for (int b = 0; b < batch; b++) sum += d_d_bh[size_t(b) * heads + h];
    d_d_h[h] += float(sum);
  }
}
REGISTER(orient_total)
