// Causal softmax attention, backward: d_q. See attention_backward.cu for the formulas and the other kernels.
#include "attention.cuh"

namespace attention {

// d_q of a warp's queries.
template <int D> struct Queries {
  static constexpr int M = Shape<D>::M;
  uint32_t q[M][D / 16][4], d_ctx[M][D / 16][4];
  float d_q[M][D / 8][4];
  float lse[M][2], delta[M][2];  // of rows g and g + 8; lse in log2, infinite beyond the sequence

  // 32 keys from position `key` on; `row` is the warp's first.
  template <bool MASK>
  __device__ __forceinline__ void add(const bf16* keys, const bf16* values, const int* starts, int key, int row) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float p[M][4][4], ds[M][4][4];
    clear(p);
    clear(ds);
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) step(p, q, keys, kk);
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) step(ds, d_ctx, values, kk);
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int own = m * 16 + half * 8 + g, first = MASK ? starts[own] - key : 0, last = row + own - key;
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            int i = 2 * half + j, at = n * 8 + 2 * t + j;
            float a = exp2_fast(p[m][n][i] * (softmax_scale<D>() * LOG2E) - lse[m][half]);
            if (MASK && (at < first || at > last)) a = 0;
            ds[m][n][i] = a * (ds[m][n][i] - delta[m][half]);
          }
      }
#pragma unroll
    for (int s = 0; s < 2; s++) {
      uint32_t a[M][4];
      pack_a(a, ds, s);
      multiply_rows<D, M>(d_q, a, keys + s * 16 * D);
    }
  }

  static __device__ __forceinline__ void step(float (&out)[M][4][4], const uint32_t (&rows)[M][D / 16][4],
                                              const bf16* other, int kk) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) a[m][i] = rows[m][kk][i];
    multiply_step<D, M>(out, a, other, kk);
  }
};

template <int D>
__device__ __forceinline__ void queries_body(const bf16* qkv, size_t stride, const uint32_t* starts, const bf16* d_ctx,
                                             size_t d_ctx_stride, const float* lse, const float* delta, bf16* d_qkv,
                                             size_t d_stride, int batch, int seq, int hq, int hkv) {
  using S = Shape<D>;
  constexpr int M = S::M;
  DYNAMIC_SHARED(bf16, shared);
  bf16 *ks = shared, *vs = ks + 2 * TILE * D;
  int* starts_s = reinterpret_cast<int*>(vs + 2 * TILE * D);

  int tiles = (seq + S::ROWS - 1) / S::ROWS;
  Place at = place(batch * hq, tiles, 2 * size_t(seq) * D / (hq / hkv));
  int b = at.pair / hq, h = at.pair % hq, row = (tiles - 1 - at.turn) * S::ROWS;
  const bf16* query = qkv + b * size_t(seq) * stride + h * D;
  const bf16* key = query + (hq - h + h / (hq / hkv)) * D;
  const bf16* value = key + hkv * D;
  if (starts) starts += b * size_t(seq);
  // Queries and d_ctx pass through the buffers of keys and values into registers.
  load_tile<D, S::THREADS>(ks, query, stride, row, S::ROWS, seq);
  load_tile<D, S::THREADS>(vs, d_ctx + b * size_t(seq) * d_ctx_stride + h * D, d_ctx_stride, row, S::ROWS, seq);
  cp_async_commit();
  int tile = starts ? starts[row] / TILE : 0, last_tile = (min(row + S::ROWS, seq) - 1) / TILE;
  for (int i = threadIdx.x; i < S::ROWS; i += S::THREADS) starts_s[i] = starts ? starts[min(row + i, seq - 1)] : 0;
  int own = threadIdx.x / 32 * S::OWN, first = row + own, g = threadIdx.x % 32 / 4;
  Queries<D> work;
  clear(work.d_q);
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int position = first + m * 16 + half * 8 + g;
      bool valid = position < seq;
      size_t from = size_t(at.pair) * seq + position;
      work.lse[m][half] = valid ? lse[from] * LOG2E : INF;
      work.delta[m][half] = valid ? delta[from] : 0;
    }
  cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
      load_a<D>(work.q[m][kk], ks + (own + m * 16) * D, kk);
      load_a<D>(work.d_ctx[m][kk], vs + (own + m * 16) * D, kk);
    }
  __syncthreads();

  auto load = [&](int tile, int buffer) {
    load_tile<D, S::THREADS>(ks + buffer * TILE * D, key, stride, tile * TILE, TILE, seq);
    load_tile<D, S::THREADS>(vs + buffer * TILE * D, value, stride, tile * TILE, TILE, seq);
  };
  const int* warp_starts = starts_s + own;
  int earliest = warp_starts[0], latest = warp_starts[S::OWN - 1], last = min(first + S::OWN, seq) - 1;
  load(tile, 0);
  cp_async_commit();
  for (int buffer = 0; tile <= last_tile; tile++, buffer ^= 1) {
    cp_async_wait<0>();
    __syncthreads();
    if (tile < last_tile) load(tile + 1, buffer ^ 1);
    cp_async_commit();
#pragma unroll 1
    for (int c = 0; c < TILE; c += CHUNK) {
      int begin = tile * TILE + c, end = begin + CHUNK - 1;
      if (begin > last || end < earliest || first >= seq) continue;
      const bf16 *k = ks + (buffer * TILE + c) * D, *v = vs + (buffer * TILE + c) * D;
      if (end > first || begin < latest) work.template add<true>(k, v, warp_starts, begin, first);
      else work.template add<false>(k, v, warp_starts, begin, first);
    }
  }
  __syncthreads();
  float factor[M][2];
#pragma unroll
  for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = softmax_scale<D>();
  store_rows<D, M>(shared + own * D, work.d_q, factor, d_qkv + b * size_t(seq) * d_stride + h * D, d_stride, first,
                   seq);
}

}  // namespace attention

// qkv: rows of `stride`, d_ctx: of `d_ctx_stride`, d_qkv: of `d_stride`; writes its q columns. lse, delta:
// [batch, hq, seq]. Grid: batch · hq · ceil(seq / 128). Block: 128 threads (256 where D = 128). Shared: 512 D + 512.
#define ATTENTION_BACKWARD_QUERIES(D)                                                                                \
  extern "C" __global__ void __launch_bounds__(attention::Shape<D>::THREADS, attention::Shape<D>::BLOCKS)            \
      attention_backward_queries_d##D(const bf16* qkv, int stride, const uint32_t* starts, const bf16* d_ctx,        \
                                 int d_ctx_stride, const float* lse, const float* delta, bf16* d_qkv,                \
                                 int d_stride, int batch, int seq, int hq, int hkv) {                                \
    attention::queries_body<D>(qkv, stride, starts, d_ctx, d_ctx_stride, lse, delta, d_qkv, d_stride, batch, seq,    \
                          hq, hkv);                                                                                  \
  }                                                                                                                  \
  REGISTER(attention_backward_queries_d##D)
ATTENTION_BACKWARD_QUERIES(32)
ATTENTION_BACKWARD_QUERIES(64)
ATTENTION_BACKWARD_QUERIES(128)
