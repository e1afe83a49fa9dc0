// Attention of one new token a sequence over remembered keys and values (split-KV flash decoding, Dao et al. 2023).
//
// k_cache, v_cache: [batch, hkv, capacity, D]. What sequence b holds is length[b · length_stride] positions (stride 0:
// one number for all), read by the kernels, so that a captured graph can be replayed while it grows.
//
// Bound by memory. A block reads one split of the keys and values of a kv head, once for up to 8 query heads: these
// are the rows of matrix instructions (the other 8 rows are idle; the tensor cores have time). Keys and values go from
// memory into fragments without shared memory: a sum over d may run in any order, so a lane's 16 bytes of a key (and of
// its query) count as neighbours in that order; of values a lane reads D/8 neighbours, one for each matrix of columns.
#include "attention.cuh"

namespace decode {

using attention::INF;
constexpr int HEADS = 8, WARPS = 4, THREADS = 32 * WARPS;
constexpr float SLACK = 8;  // see attention_forward.cu

// A lane's share of STEP keys and values. Lane = 4 g + t.
template <int D> struct Fragments {
  static constexpr int STEP = D <= 64 ? 32 : 16, PER_LANE = D / 8, WORDS = PER_LANE / 2;
  uint4 k[STEP / 8][D / 32];     // keys 8 i + g, elements 32 j + 8 t..
  uint32_t v[STEP / 8][2][WORDS];  // keys 8 i + 2 t and the one after, elements PER_LANE · g..

  // From position `key` on; those from `end` on are replaced by the last.
  __device__ __forceinline__ void load_keys(const bf16* keys, int key, int end) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < STEP / 8; i++) {
      auto row = reinterpret_cast<const uint4*>(keys + size_t(min(key + 8 * i + g, end - 1)) * D + 8 * t);
#pragma unroll
      for (int j = 0; j < D / 32; j++) k[i][j] = __ldg(row + 4 * j);
    }
  }
  __device__ __forceinline__ void load_values(const bf16* values, int key, int end) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < STEP / 8; i++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        auto row = values + size_t(min(key + 8 * i + 2 * t + r, end - 1)) * D + PER_LANE * g;
        if (WORDS == 2) {
          uint2 x = __ldg(reinterpret_cast<const uint2*>(row));
          v[i][r][0] = x.x, v[i][r][1] = x.y;
        } else {
#pragma unroll
          for (int j = 0; j < WORDS / 4; j++) {
            uint4 x = __ldg(reinterpret_cast<const uint4*>(row) + j);
            v[i][r][4 * j] = x.x, v[i][r][4 * j + 1] = x.y, v[i][r][4 * j + 2] = x.z, v[i][r][4 * j + 3] = x.w;
          }
        }
      }
  }
};

template <int D> struct Warp {
  using F = Fragments<D>;
  static constexpr int STEP = F::STEP, N = D / 8;
  uint32_t q[D / 16][4];  // rows 8..15 are zero
  float o[N][4];          // columns of matrix n: elements N · column + n
  float top, sum;         // of head g: reference (log2, scaled), this lane's part of the sum

  __device__ __forceinline__ void begin(const bf16* queries, int heads) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < D / 32; j++) {
      uint4 x = make_uint4(0, 0, 0, 0);
      if (g < heads) x = *reinterpret_cast<const uint4*>(queries + g * D + 32 * j + 8 * t);
      q[2 * j][0] = x.x, q[2 * j][2] = x.y, q[2 * j + 1][0] = x.z, q[2 * j + 1][2] = x.w;
      q[2 * j][1] = q[2 * j][3] = q[2 * j + 1][1] = q[2 * j + 1][3] = 0;
    }
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) o[n][i] = 0;
    top = -1e30f;
    sum = 0;
  }

  __device__ __forceinline__ void scores(float (&s)[STEP / 8][4], const F& f) {
#pragma unroll
    for (int i = 0; i < STEP / 8; i++) {
      s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0;
#pragma unroll
      for (int j = 0; j < D / 32; j++) {
        uint32_t low[2] = {f.k[i][j].x, f.k[i][j].y}, high[2] = {f.k[i][j].z, f.k[i][j].w};
        mma_bf16(s[i], q[2 * j], low);
        mma_bf16(s[i], q[2 * j + 1], high);
      }
    }
  }

  // Scores → exponentials; keys from `count` on get none.
  __device__ __forceinline__ void exponentials(float (&s)[STEP / 8][4], int count) {
    constexpr float SCALE = attention::softmax_scale<D>() * LOG2E;
    int t = threadIdx.x % 4;
    float most = -INF;
#pragma unroll
    for (int i = 0; i < STEP / 8; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        s[i][j] = 8 * i + 2 * t + j < count ? s[i][j] * SCALE : -INF;
        most = fmaxf(most, s[i][j]);
      }
    if (__any_sync(FULL, most > top + SLACK)) {
      most = fmaxf(most, __shfl_xor_sync(FULL, most, 1));
      most = fmaxf(most, __shfl_xor_sync(FULL, most, 2));
      float now = fmaxf(top, most), shrink = exp2_fast(top - now);
      top = now;
      sum *= shrink;
#pragma unroll
      for (int n = 0; n < N; n++) o[n][0] *= shrink, o[n][1] *= shrink;
    }
#pragma unroll
    for (int i = 0; i < STEP / 8; i++) {
#pragma unroll
      for (int j = 0; j < 2; j++) s[i][j] = exp2_fast(s[i][j] - top);
      sum += s[i][0] + s[i][1];
    }
  }

  __device__ __forceinline__ void add(const float (&p)[STEP / 8][4], const F& f) {
#pragma unroll
    for (int i = 0; i < STEP / 8; i += 2) {
      uint32_t a[4] = {pack2(p[i][0], p[i][1]), 0, pack2(p[i + 1][0], p[i + 1][1]), 0};
#pragma unroll
      for (int n = 0; n < N; n++) {
        uint32_t b[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
          uint32_t x = f.v[i + r][0][n / 2], y = f.v[i + r][1][n / 2];
          b[r] = n % 2 ? x >> 16 | (y & 0xffff0000u) : (x & 0xffffu) | y << 16;
        }
        mma_bf16(o[n], a, b);
      }
    }
  }
};

template <int D>
__device__ __forceinline__ void split_body(const bf16* q, size_t q_stride, const bf16* k_cache, const bf16* v_cache,
                                           const int* length, int length_stride, int extra, float* part_o,
                                           float* part_ms, int hq, int hkv, int capacity) {
  using W = Warp<D>;
  constexpr int STEP = W::STEP, ALL = WARPS * STEP;
  DYNAMIC_SHARED(float, shared);  // o [warps][heads][D], then reference and sum [warps][heads][2]
  float* ms = shared + WARPS * HEADS * D;
  int group = hq / hkv, blocks = (group + HEADS - 1) / HEADS, kv = blockIdx.y / blocks;
  int in_group = blockIdx.y % blocks * HEADS, heads = min(HEADS, group - in_group), first = kv * group + in_group;
  int b = blockIdx.z, split = blockIdx.x, splits = gridDim.x, tid = threadIdx.x;
  int total = min(length[size_t(b) * length_stride] + extra, capacity);
  int share = ((total + splits - 1) / splits + ALL - 1) / ALL * ALL;
  int end = min(total, (split + 1) * share), warp = tid / 32, key = split * share + warp * STEP;
  size_t out = (size_t(b) * hq + first) * splits + split;  // of the first head; the next is `splits` on
  if (split * share >= end) {
    if (tid < heads) {
      part_ms[2 * (out + tid * splits)] = -1e30f;
      part_ms[2 * (out + tid * splits) + 1] = 0;
    }
    return;
  }
  const bf16* keys = k_cache + (size_t(b) * hkv + kv) * capacity * D;
  const bf16* values = v_cache + (size_t(b) * hkv + kv) * capacity * D;
  W work;
  work.begin(q + b * q_stride + first * D, heads);
  Fragments<D> f;
  if (key < end) {
    f.load_keys(keys, key, end);
    f.load_values(values, key, end);
  }
  for (; key < end; key += ALL) {
    float s[STEP / 8][4];
    work.scores(s, f);
    if (key + ALL < end) f.load_keys(keys, key + ALL, end);
    work.exponentials(s, end - key);
    work.add(s, f);
    if (key + ALL < end) f.load_values(values, key + ALL, end);
  }

  int lane = tid % 32, g = lane / 4, t = lane % 4;
  work.sum += __shfl_xor_sync(FULL, work.sum, 1);
  work.sum += __shfl_xor_sync(FULL, work.sum, 2);
  float* own = shared + (warp * HEADS + g) * D + 2 * W::N * t;
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int n = 0; n < W::N; n++) own[j * W::N + n] = work.o[n][j];
  if (t == 0) {
    ms[2 * (warp * HEADS + g)] = work.top;
    ms[2 * (warp * HEADS + g) + 1] = work.sum;
  }
  __syncthreads();
  for (int i = tid; i < heads * D; i += THREADS) {
    int head = i / D, d = i % D;
    float top = -1e30f, o = 0, sum = 0;
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, ms[2 * (w * HEADS + head)]);
    for (int w = 0; w < WARPS; w++) {
      float weight = exp2_fast(ms[2 * (w * HEADS + head)] - top);
      o += weight * shared[(w * HEADS + head) * D + d];
      sum += weight * ms[2 * (w * HEADS + head) + 1];
    }
    size_t to = out + size_t(head) * splits;
    part_o[to * D + d] = o;
    if (d == 0) {
      part_ms[2 * to] = top;
      part_ms[2 * to + 1] = sum;
    }
  }
}

}  // namespace decode

// q: rows of `q_stride`, one a sequence, rotated query heads first. Attends to length + extra positions (`extra` 1
// where kv_append came before and the length has not grown yet). part_o: f32 [batch, hq, splits, D], part_ms: f32
// [batch, hq, splits, 2]. Grid: splits, hkv · ceil(hq / hkv / 8), batch. Block: 128. Shared: 128 (D + 2) bytes.
#define ATTENTION_DECODE(D, blocks)                                                                                  \
  extern "C" __global__ void __launch_bounds__(decode::THREADS, blocks)                                              \
      attention_decode_d##D(const bf16* q, int q_stride, const bf16* k_cache, const bf16* v_cache, const int* length, \
                            int length_stride, int extra, float* part_o, float* part_ms, int hq, int hkv,            \
                            int capacity) {                                                                          \
    decode::split_body<D>(q, q_stride, k_cache, v_cache, length, length_stride, extra, part_o, part_ms, hq, hkv,     \
                          capacity);                                                                                 \
  }                                                                                                                  \
  REGISTER(attention_decode_d##D)
ATTENTION_DECODE(32, 4)
ATTENTION_DECODE(64, 3)
ATTENTION_DECODE(128, 2)

// Parts → out, bf16, rows of `out_stride`. Grid: hq, batch. Block: 128. Shared: 4 (splits + 136) bytes.
extern "C" __global__ void __launch_bounds__(128)
    attention_decode_combine(const float* part_o, const float* part_ms, bf16* out, int out_stride, int hq, int dim,
                             int splits) {
  DYNAMIC_SHARED(float, shared);
  float *weights = shared + 136, *sums = shared, *lanes = shared + 8;  // 8 of warps; 128 of threads; weights
  int h = blockIdx.x, b = blockIdx.y, tid = threadIdx.x, warp = tid / 32;
  size_t first = (size_t(b) * hq + h) * splits;
  part_ms += 2 * first;
  part_o += first * dim;
  float top = -1e30f;
  for (int s = tid; s < splits; s += 128) top = fmaxf(top, part_ms[2 * s]);
  top = warp_max(top);
  if (tid % 32 == 0) sums[warp] = top;
  __syncthreads();
  top = fmaxf(fmaxf(sums[0], sums[1]), fmaxf(sums[2], sums[3]));
  float sum = 0;
  for (int s = tid; s < splits; s += 128) {
    float z = part_ms[2 * s + 1], weight = z > 0 ? exp2_fast(part_ms[2 * s] - top) : 0;
    weights[s] = weight;
    sum += weight * z;
  }
  sum = warp_sum(sum);
  if (tid % 32 == 0) sums[4 + warp] = sum;
  __syncthreads();
  sum = sums[4] + sums[5] + sums[6] + sums[7];
  // 128 / dim threads an element. Splits without a key have no part_o.
  int d = tid % dim;
  float o = 0;
#pragma unroll 4
  for (int s = tid / dim; s < splits; s += 128 / dim) {
    float weight = weights[s];
    if (weight != 0) o += weight * part_o[size_t(s) * dim + d];
  }
  lanes[tid] = o;
  __syncthreads();
  if (tid < dim) {
    for (int i = tid + dim; i < 128; i += dim) o += lanes[i];
    out[size_t(b) * out_stride + h * dim + d] = to_bf16(o / sum);
  }
}
REGISTER(attention_decode_combine)
