// AdamW for one or many learners, whose parameters lie in flat f32 buffers (weights, gradients, first
// and second moments, and a bf16 copy of the weights, all with the same offsets). Norms, clipping, the
// step count and the reaction to numbers that are none stay on the device: nothing here waits for the
// host, and a recorded graph of it can be launched again and again.
// CPU twins: src/train/adamw.rs, clip.rs, learner.rs. Loshchilov and Hutter (ICLR 2019), algorithm 2:
//
//   g = grad·factor,   m = β1 m + (1-β1) g,   v = β2 v + (1-β2) g²,   w = w·keep - rate·m/(√v·root + ε)
//   factor = min(1, clip/‖grad‖),  rate = lr·scale/(1-β1^t),  root = 1/√(1-β2^t),  keep = 1 - lr·scale·decay
//
// Every rounding of the update is that of the CPU (no fused multiply-add), so equal gradients and an
// equal factor give equal bits. The norm is summed in another order than there, in f32 over at most
// MOST/THREADS values of a thread and then in f64.
//
// Work comes as chunks of at most MOST parameters of one learner with one decay; the chunks of learner
// i are first_i[i]..first_i[i + 1] of the list, which is also the order that their norms are added in.
#include "prims.cuh"

namespace adamw {

constexpr int THREADS = 256;

// As in src/gpu/ops/adamw.rs. Offsets may be any; multiples of 8 are fastest.
struct Chunk {
  uint64_t offset;
  uint32_t len, learner;
  float decay, scale;
};
// What the update of a learner needs to know, [learners].
struct Step {
  double correct1;
  float root, factor;
  uint32_t finite, spare;
};

#ifdef PIPE_EMULATE
__device__ inline float mul(float a, float b) { return a * b; }
__device__ inline float add(float a, float b) { return a + b; }
__device__ inline float sub(float a, float b) { return a - b; }
__device__ inline float over(float a, float b) { return a / b; }
__device__ inline float root_of(float a) { return sqrtf(a); }
__device__ inline double mul(double a, double b) { return a * b; }
#else
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float over(float a, float b) { return __fdiv_rn(a, b); }
__device__ __forceinline__ float root_of(float a) { return __fsqrt_rn(a); }
__device__ __forceinline__ double mul(double a, double b) { return __dmul_rn(a, b); }
#endif

// Calls eight(at) for runs of eight that begin at multiples of 8, one(at) for what is left at both ends.
template <class Eight, class One>
__device__ __forceinline__ void each(const Chunk& chunk, Eight eight, One one) {
  uint64_t start = chunk.offset;
  uint32_t head = min(chunk.len, uint32_t(-start & 7)), eights = (chunk.len - head) / 8;
  uint32_t tail = head + 8 * eights;
  for (uint32_t i = threadIdx.x; i < eights; i += THREADS) eight(start + head + 8 * uint64_t(i));
  if (threadIdx.x < head) one(start + threadIdx.x);
  if (threadIdx.x < chunk.len - tail) one(start + tail + threadIdx.x);
}

__device__ __forceinline__ void read8(float (&to)[8], const float* from) {
  float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
  to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}
__device__ __forceinline__ void write8(float* to, const float (&from)[8]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(from[0], from[1], from[2], from[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(from[4], from[5], from[6], from[7]);
}

// The block's sum for thread 0; `part` is shared, one for each warp.
__device__ __forceinline__ double sum_block(double x, double* part) {
  for (int m = 16; m > 0; m >>= 1) x += __shfl_xor_sync(FULL, x, m);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0)
    for (int w = 0; w < THREADS / 32; w++) sum += part[w];
  return sum;
}

// x^n by squaring, as `f64::powi`.
__device__ __forceinline__ double power(double x, uint32_t n) {
  double result = 1.0;
  for (;; x = mul(x, x)) {
    if (n & 1) result = mul(result, x);
    n >>= 1;
    if (n == 0) return result;
  }
}

struct Rule {
  float beta1, beta2, rest1, rest2, eps, factor, rate, root, keep;

  __device__ __forceinline__ void update(float& w, float grad, float& m, float& v) const {
    float g = mul(grad, factor);
    m = add(mul(beta1, m), mul(rest1, g));
    v = add(mul(beta2, v), mul(rest2, mul(g, g)));
    w = sub(mul(w, keep), over(mul(rate, m), add(mul(root_of(v), root), eps)));
  }
};

}  // namespace adamw

// Sums of squares: grad f32, partial f64 [chunks]. Grid: chunks, block 256.
extern "C" __global__ void __launch_bounds__(256) grad_norm_partial(const adamw::Chunk* chunks, const float* grad,
                                                                    double* partial) {
  using namespace adamw;
  __shared__ double part[THREADS / 32];
  float sum = 0.0f;
  each(
      chunks[blockIdx.x],
      [&](uint64_t at) {
        float g[8];
        read8(g, grad + at);
        sum += ((g[0] * g[0] + g[1] * g[1]) + (g[2] * g[2] + g[3] * g[3])) +
               ((g[4] * g[4] + g[5] * g[5]) + (g[6] * g[6] + g[7] * g[7]));
      },
      [&](uint64_t at) { sum += grad[at] * grad[at]; });
  double all = sum_block(sum, part);
  if (threadIdx.x == 0) partial[blockIdx.x] = all;
}
REGISTER(grad_norm_partial)

// From partial f64 [chunks], first_i u32 [learners + 1], loss_i and extra_i f32 [learners] (null: none): the norm,
// whether the learner is updated (if its norm and loss are finite) and with what. updates_i and skipped_i
// u32 [learners] count; steps_i [learners] is for `adamw_update`; history f32 [slots, learners, 4] gets
// (loss, norm, extra, factor if updated else 0) at slot *slot, if that is below `slots`.
// Grid: learners, block 256.
extern "C" __global__ void __launch_bounds__(256) clip_factors(
    const double* partial, const uint32_t* first_i, const float* loss_i, const float* extra_i, float clip, float beta1,
    float beta2, uint32_t* updates_i, uint32_t* skipped_i, adamw::Step* steps_i, float4* history, const uint32_t* slot,
    int slots) {
  using namespace adamw;
  __shared__ double part[THREADS / 32];
  uint32_t learner = blockIdx.x, end = first_i[learner + 1];
  double sum = 0.0;
#pragma unroll 4
  for (uint32_t i = first_i[learner] + threadIdx.x; i < end; i += THREADS) sum += partial[i];
  sum = sum_block(sum, part);
  if (threadIdx.x != 0) return;
  double norm = sqrt(sum);
  float loss = loss_i ? loss_i[learner] : 0.0f;
  bool finite = norm - norm == 0.0 && loss - loss == 0.0f;
  Step step = {1.0, 1.0f, 1.0f, finite, 0};
  if (norm > clip) step.factor = float(double(clip) / norm);
  if (finite) {
    uint32_t n = ++updates_i[learner];
    step.correct1 = 1.0 - power(beta1, n);
    step.root = float(1.0 / sqrt(1.0 - power(beta2, n)));
  } else {
    skipped_i[learner]++;
  }
  steps_i[learner] = step;
  uint32_t at = *slot;
  float extra = extra_i ? extra_i[learner] : 0.0f;
  if (at < uint32_t(slots))
    history[size_t(at) * gridDim.x + learner] = make_float4(loss, float(norm), extra, finite ? step.factor : 0.0f);
}
REGISTER(clip_factors)

// One update of all chunks at rate *lr (f32 on the device): w, grad, m, v f32 and shadow bf16 (null: none).
// Learners that are not finite stay as they are. Gradients become 0 if `zero`, also of those.
// Grid: chunks, block 256.
extern "C" __global__ void __launch_bounds__(256, 4) adamw_update(const adamw::Chunk* chunks,
                                                                  const adamw::Step* steps_i, const float* lr,
                                                                  float beta1, float beta2, float eps, float* w,
                                                                  float* grad, float* m, float* v, bf16* shadow,
                                                                  int zero) {
  using namespace adamw;
  Chunk chunk = chunks[blockIdx.x];
  Step step = steps_i[chunk.learner];
  const float none[8] = {};
  if (!step.finite) {
    if (zero) each(chunk, [&](uint64_t at) { write8(grad + at, none); }, [&](uint64_t at) { grad[at] = 0.0f; });
    return;
  }
  float rate = mul(*lr, chunk.scale);
  Rule rule = {beta1, beta2, sub(1.0f, beta1), sub(1.0f, beta2), eps, step.factor, float(double(rate) / step.correct1),
               step.root, sub(1.0f, mul(rate, chunk.decay))};
  each(
      chunk,
      [&](uint64_t at) {
        float w8[8], g8[8], m8[8], v8[8];
        read8(w8, w + at), read8(g8, grad + at), read8(m8, m + at), read8(v8, v + at);
#pragma unroll
        for (int i = 0; i < 8; i++) rule.update(w8[i], g8[i], m8[i], v8[i]);
        write8(w + at, w8), write8(m + at, m8), write8(v + at, v8);
        if (shadow)
          *reinterpret_cast<uint4*>(shadow + at) =
              make_uint4(pack2(w8[0], w8[1]), pack2(w8[2], w8[3]), pack2(w8[4], w8[5]), pack2(w8[6], w8[7]));
        if (zero) write8(grad + at, none);
      },
      [&](uint64_t at) {
        rule.update(w[at], grad[at], m[at], v[at]);
        if (shadow) shadow[at] = to_bf16(w[at]);
        if (zero) grad[at] = 0.0f;
      });
}
REGISTER(adamw_update)
