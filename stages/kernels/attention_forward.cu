// Causal softmax attention, forward: FlashAttention-2 (Dao 2023, algorithm 1).
//
//   s = q·k / sqrt(D), p = exp(s - lse), ctx = Σ p v,  lse = log Σ exp(s)
//
// A row's reference for its exponentials need not be its maximum, only near enough: it is raised when a score tops it
// by more than 2^8, which is rare after the first chunk of keys. So there are hardly any shuffles among the lanes of a
// row, and hardly any rescaling of the context. The softmax of one warp hides behind the products of others: three
// blocks a multiprocessor (dim 64) took 0.88 of the time of two with their queries in registers.
#include "attention.cuh"

namespace attention {

// A block has ROWS query rows, a warp 16 M of them; keys come in tiles of KEYS and are worked in chunks of WIDE.
// Queries are read from shared memory again for every chunk: registers are what limits the blocks of a multiprocessor.
template <int D_, int M_, int WARPS_, int BLOCKS_> struct Plan {
  static constexpr int D = D_, M = M_, WARPS = WARPS_, WIDE = 32, KEYS = 64, BLOCKS = BLOCKS_;
  static constexpr int THREADS = 32 * WARPS, OWN = 16 * M, ROWS = OWN * WARPS;
  static_assert(ROWS == 128, "launched alike");
};
template <int D> struct Chosen;
template <> struct Chosen<32> : Plan<32, 2, 4, 4> {};
template <> struct Chosen<64> : Plan<64, 2, 4, 3> {};
template <> struct Chosen<128> : Plan<128, 1, 8, 2> {};

template <class P> struct Worker {
  static constexpr int D = P::D, M = P::M, STEPS = D / 16, N = P::WIDE / 8;
  static constexpr float SCALE = softmax_scale<D>() * LOG2E, SLACK = 8;
  float o[M][D / 8][4];
  float top[M][2], sum[M][2];

  __device__ __forceinline__ void begin() {
    clear(o);
#pragma unroll
    for (int m = 0; m < M; m++) {
      top[m][0] = top[m][1] = -1e30f;
      sum[m][0] = sum[m][1] = 0;
    }
  }

  __device__ __forceinline__ void scores(float (&s)[M][N][4], const bf16* queries, const bf16* keys) {
    clear(s);
#pragma unroll
    for (int kk = 0; kk < STEPS; kk++) {
      uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; m++) load_a<D>(a[m], queries + m * 16 * D, kk);
#pragma unroll
      for (int pair = 0; pair < N / 2; pair++) {
        uint32_t b[2][2];
        load_b<D>(b, keys + pair * 16 * D, kk);
#pragma unroll
        for (int m = 0; m < M; m++) {
          mma_bf16(s[m][2 * pair], a[m], b[0]);
          mma_bf16(s[m][2 * pair + 1], a[m], b[1]);
        }
      }
    }
  }

  static __device__ __forceinline__ void mask(float (&s)[M][N][4], int key, int row, const int* starts) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int own = m * 16 + half * 8 + g, first = starts[own] - key, last = row + own - key;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            int at = n * 8 + 2 * t + j;
            if (at < first || at > last) s[m][n][2 * half + j] = -INF;
          }
      }
  }

  __device__ __forceinline__ void raise(const float (&s)[M][N][4]) {
    float most[M][2], worst = -INF;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float x = -INF;
#pragma unroll
        for (int n = 0; n < N; n++) x = fmaxf(x, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        most[m][half] = x;
        worst = fmaxf(worst, x * SCALE - top[m][half]);
      }
    if (!__any_sync(FULL, worst > SLACK)) return;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float x = most[m][half];
        x = fmaxf(x, __shfl_xor_sync(FULL, x, 1));
        x = fmaxf(x, __shfl_xor_sync(FULL, x, 2));
        float now = fmaxf(top[m][half], x * SCALE), shrink = exp2_fast(top[m][half] - now);
        top[m][half] = now;
        sum[m][half] *= shrink;
#pragma unroll
        for (int n = 0; n < D / 8; n++) o[m][n][2 * half] *= shrink, o[m][n][2 * half + 1] *= shrink;
      }
  }

  __device__ __forceinline__ void weigh(uint32_t (&p)[N / 2][M][4], float (&part)[M][2], const float (&s)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float total = 0;
#pragma unroll
        for (int n = 0; n < N; n++) {
          float a = exp2_fast(s[m][n][2 * half] * SCALE - top[m][half]);
          float b = exp2_fast(s[m][n][2 * half + 1] * SCALE - top[m][half]);
          total = n ? total + (a + b) : a + b;
          p[n / 2][m][n % 2 * 2 + half] = pack2(a, b);
        }
        part[m][half] = total;
      }
  }

  __device__ __forceinline__ void chunk(const bf16* queries, const bf16* keys, const bf16* values, int key, int row,
                                        const int* starts, bool partial) {
    uint32_t p[N / 2][M][4];
    float part[M][2];
    {
      float s[M][N][4];
      scores(s, queries, keys);
      if (partial) mask(s, key, row, starts);
      raise(s);
      weigh(p, part, s);
    }
#pragma unroll
    for (int m = 0; m < M; m++) sum[m][0] += part[m][0], sum[m][1] += part[m][1];
#pragma unroll
    for (int step = 0; step < N / 2; step++) multiply_rows<D, M>(o, p[step], values + step * 16 * D);
  }

  __device__ __forceinline__ void finish(float (&factor)[M][2]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float x = sum[m][half];
        x += __shfl_xor_sync(FULL, x, 1);
        x += __shfl_xor_sync(FULL, x, 2);
        sum[m][half] = x;
        factor[m][half] = 1.0f / x;
      }
  }
};

template <int D>
__device__ __forceinline__ void forward_body(const bf16* qkv, size_t stride, const uint32_t* starts, bf16* ctx,
                                             size_t ctx_stride, float* lse, int batch, int seq, int hq, int hkv) {
  using P = Chosen<D>;
  constexpr int M = P::M, KEYS = P::KEYS;
  DYNAMIC_SHARED(bf16, shared);
  bf16 *qs = shared, *ks = qs + P::ROWS * D, *vs = ks + 2 * KEYS * D;
  int* starts_s = reinterpret_cast<int*>(vs + 2 * KEYS * D);
  int tiles = (seq + P::ROWS - 1) / P::ROWS;
  Place at = place(batch * hq, tiles, 2 * size_t(seq) * D / (hq / hkv));
  int b = at.pair / hq, h = at.pair % hq, row = (tiles - 1 - at.turn) * P::ROWS;
  const bf16* query = qkv + b * size_t(seq) * stride + h * D;
  const bf16* key = query + (hq - h + h / (hq / hkv)) * D;
  const bf16* value = key + hkv * D;
  const uint32_t* own_starts = starts ? starts + b * size_t(seq) : nullptr;
  int end = min(row + P::ROWS, seq);
  int tile = own_starts ? own_starts[row] / KEYS : 0, last_tile = (end - 1) / KEYS;
  load_tile<D, P::THREADS>(qs, query, stride, row, P::ROWS, seq);
  load_tile<D, P::THREADS>(ks, key, stride, tile * KEYS, KEYS, seq);
  load_tile<D, P::THREADS>(vs, value, stride, tile * KEYS, KEYS, seq);
  cp_async_commit();
  for (int i = threadIdx.x; i < P::ROWS; i += P::THREADS)
    starts_s[i] = own_starts ? own_starts[min(row + i, seq - 1)] : 0;
  cp_async_wait<0>();
  __syncthreads();

  // This warp's rows, and the chunks of keys that they see.
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = warp * P::OWN, first = row + own;
  const int* warp_starts = starts_s + own;
  bf16* queries = qs + own * D;
  int latest = warp_starts[P::OWN - 1];
  int from = warp_starts[0] / P::WIDE, to = first < seq ? (min(first + P::OWN, seq) - 1) / P::WIDE : -1;
  Worker<P> f;
  f.begin();
  for (int buffer = 0; tile <= last_tile; tile++, buffer ^= 1) {
    if (tile < last_tile) {
      load_tile<D, P::THREADS>(ks + (buffer ^ 1) * KEYS * D, key, stride, (tile + 1) * KEYS, KEYS, seq);
      load_tile<D, P::THREADS>(vs + (buffer ^ 1) * KEYS * D, value, stride, (tile + 1) * KEYS, KEYS, seq);
    }
    cp_async_commit();
    const bf16 *keys = ks + buffer * KEYS * D, *values = vs + buffer * KEYS * D;
#pragma unroll 1
    for (int i = 0; i < KEYS / P::WIDE; i++) {
      int chunk = tile * (KEYS / P::WIDE) + i, begin = chunk * P::WIDE;
      if (chunk >= from && chunk <= to)
        f.chunk(queries, keys + i * P::WIDE * D, values + i * P::WIDE * D, begin, first, warp_starts,
                begin + P::WIDE - 1 > first || begin < latest);
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  float factor[M][2];
  f.finish(factor);
  store_rows<D, M>(queries, f.o, factor, ctx + b * size_t(seq) * ctx_stride + h * D, ctx_stride, first, seq);
  if (lane % 4 == 0) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int position = first + m * 16 + half * 8 + lane / 4;
        if (position < seq)
          lse[size_t(at.pair) * seq + position] = f.top[m][half] * LN2 + logf(f.sum[m][half]);
      }
  }
}

}  // namespace attention

// qkv: rows of `stride` (rotated q and k). ctx: rows of `ctx_stride`, hq·D written. lse: [batch, hq, seq].
// Grid: batch · hq · ceil(seq / 128). Block: 256 threads where D = 128, else 128. Shared: 768 D + 512 bytes.
#define ATTENTION_FORWARD(D)                                                                                         \
  extern "C" __global__ void __launch_bounds__(attention::Chosen<D>::THREADS, attention::Chosen<D>::BLOCKS)          \
      attention_forward_d##D(const bf16* qkv, int stride, const uint32_t* starts, bf16* ctx, int ctx_stride,         \
                             float* lse, int batch, int seq, int hq, int hkv) {                                      \
    attention::forward_body<D>(qkv, stride, starts, ctx, ctx_stride, lse, batch, seq, hq, hkv);                      \
  }                                                                                                                  \
  REGISTER(attention_forward_d##D)
ATTENTION_FORWARD(32)
ATTENTION_FORWARD(64)
ATTENTION_FORWARD(128)
