// Causal softmax attention, backward: FlashAttention-2 (Dao 2023, algorithm 2), without atomics.
//
//   p = exp(q·k/sqrt(D) - lse), delta = d_ctx·ctx, ds = p (d_ctx·v - delta)
//   d_v = Σ_queries p d_ctx, d_k = Σ_queries ds q / sqrt(D), d_q = Σ_keys ds k / sqrt(D)
//
// Three kernels in this order: delta; d_k and d_v, a block for 128 keys of a kv head, which sums over all query
// heads that share it; d_q (attention_backward_queries.cu), a block for 128 queries of a head. The last computes p
// and ds again: that is cheaper than sums of d_q from many blocks in a fixed order.
#include "attention.cuh"

namespace attention {

// A tile of the other side in the keys' kernel: what belongs to its queries.
struct Stats {
  float lse[TILE];  // log2; infinite beyond the sequence, so that p is 0
  float delta[TILE];
  int starts[TILE];
};

// d_k and d_v of a warp's keys. Scores are transposed: rows are keys, columns queries.
template <int D> struct Keys {
  static constexpr int M = Shape<D>::M;
  float d_k[M][D / 8][4], d_v[M][D / 8][4];

  // 32 queries. `key` is the warp's first key less the first query's position.
  template <bool MASK>
  __device__ __forceinline__ void add(const bf16* keys, const bf16* values, const bf16* queries, const bf16* d_ctx,
                                      const float* lse, const float* delta, const int* starts, int key, int query) {
    int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float p[M][4][4], ds[M][4][4];
    clear(p);
    clear(ds);
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
      uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; m++) load_a<D>(a[m], keys + m * 16 * D, kk);
      multiply_step<D, M>(p, a, queries, kk);
    }
#pragma unroll
    for (int kk = 0; kk < D / 16; kk++) {
      uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; m++) load_a<D>(a[m], values + m * 16 * D, kk);
      multiply_step<D, M>(ds, a, d_ctx, kk);
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
      float2 l = *reinterpret_cast<const float2*>(lse + n * 8 + 2 * t);
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          p[m][n][i] = exp2_fast(p[m][n][i] * (softmax_scale<D>() * LOG2E) - (i % 2 ? l.y : l.x));
      if (MASK) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          int column = n * 8 + 2 * t + j, first = starts[column] - query;
#pragma unroll
          for (int m = 0; m < M; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
              int row = key + m * 16 + half * 8 + g;
              if (row > column || row < first) p[m][n][2 * half + j] = 0;
            }
        }
      }
    }
#pragma unroll
    for (int step = 0; step < 2; step++) {
      uint32_t a[M][4];
      pack_a(a, p, step);
      multiply_rows<D, M>(d_v, a, d_ctx + step * 16 * D);
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
      float2 pull = *reinterpret_cast<const float2*>(delta + n * 8 + 2 * t);
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - (i % 2 ? pull.y : pull.x));
    }
#pragma unroll
    for (int step = 0; step < 2; step++) {
      uint32_t a[M][4];
      pack_a(a, ds, step);
      multiply_rows<D, M>(d_k, a, queries + step * 16 * D);
    }
  }
};

// The first position whose document begins after `key`: from there on nobody sees it.
__device__ __forceinline__ int seen_until(const uint32_t* starts, int key, int seq) {
  if (!starts || int(starts[seq - 1]) <= key) return seq;
  int low = key, high = seq - 1;  // starts[low] <= key < starts[high]
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (int(starts[middle]) <= key) low = middle;
    else high = middle;
  }
  return high;
}

template <int D>
__device__ __forceinline__ void keys_body(const bf16* qkv, size_t stride, const uint32_t* starts, const bf16* d_ctx,
                                          size_t d_ctx_stride, const float* lse, const float* delta, bf16* d_qkv,
                                          size_t d_stride, int batch, int seq, int hq, int hkv) {
  using S = Shape<D>;
  constexpr int M = S::M;
  DYNAMIC_SHARED(bf16, shared);
  bf16 *ks = shared, *vs = ks + S::ROWS * D, *qs = vs + S::ROWS * D, *ds = qs + 2 * TILE * D;
  Stats* stats = reinterpret_cast<Stats*>(ds + 2 * TILE * D);

  int group = hq / hkv, tiles = (seq + S::ROWS - 1) / S::ROWS;
  Place at = place(batch * hkv, tiles, 2 * size_t(seq) * D * (1 + group));
  int b = at.pair / hkv, kv = at.pair % hkv, key = at.turn * S::ROWS;
  const bf16* rows = qkv + b * size_t(seq) * stride;
  const bf16* d_rows = d_ctx + b * size_t(seq) * d_ctx_stride;
  if (starts) starts += b * size_t(seq);
  load_tile<D, S::THREADS>(ks, rows + (hq + kv) * D, stride, key, S::ROWS, seq);
  load_tile<D, S::THREADS>(vs, rows + (hq + hkv + kv) * D, stride, key, S::ROWS, seq);

  // Tiles of queries, head after head.
  int until = seen_until(starts, min(key + S::ROWS, seq) - 1, seq);
  int first_tile = key / TILE, count = (until + TILE - 1) / TILE - first_tile, total = count * group;
  int h = kv * group, tile = first_tile;
  auto load = [&](int buffer) {
    load_tile<D, S::THREADS>(qs + buffer * TILE * D, rows + h * D, stride, tile * TILE, TILE, seq);
    load_tile<D, S::THREADS>(ds + buffer * TILE * D, d_rows + h * D, d_ctx_stride, tile * TILE, TILE, seq);
  };
  float stat = 0;  // on its way from memory to `stats`
  int start = 0;
  auto fetch_stats = [&]() {
    int i = threadIdx.x % TILE, position = tile * TILE + i;
    bool valid = position < seq;
    size_t from = (size_t(b) * hq + h) * seq + position;
    if (threadIdx.x < TILE) {
      stat = valid ? lse[from] * LOG2E : INF;
      start = starts ? starts[min(position, seq - 1)] : 0;
    } else if (threadIdx.x < 2 * TILE) {
      stat = valid ? delta[from] : 0;
    }
  };
  auto put_stats = [&](int buffer) {
    if (threadIdx.x < TILE) {
      stats[buffer].lse[threadIdx.x] = stat;
      stats[buffer].starts[threadIdx.x] = start;
    } else if (threadIdx.x < 2 * TILE) {
      stats[buffer].delta[threadIdx.x - TILE] = stat;
    }
  };
  load(0);
  cp_async_commit();
  fetch_stats();
  put_stats(0);

  int own = threadIdx.x / 32 * S::OWN, first = key + own, last = min(first + S::OWN, seq) - 1;
  Keys<D> keys;
  clear(keys.d_k);
  clear(keys.d_v);
  for (int turn = 0; turn < total; turn++) {
    int buffer = turn & 1, query0 = tile * TILE;
    cp_async_wait<0>();
    __syncthreads();
    if (++tile == first_tile + count) tile = first_tile, h++;
    if (turn + 1 < total) {
      load(buffer ^ 1);
      fetch_stats();
    }
    cp_async_commit();
    const Stats& s = stats[buffer];
#pragma unroll 1
    for (int c = 0; c < TILE; c += CHUNK) {
      int query = query0 + c;
      if (query + CHUNK - 1 < first || s.starts[c] > last || first >= seq) continue;
      const bf16 *q = qs + (buffer * TILE + c) * D, *d = ds + (buffer * TILE + c) * D;
      const bf16 *k = ks + own * D, *v = vs + own * D;
      if (query < last || s.starts[c + CHUNK - 1] > first)
        keys.template add<true>(k, v, q, d, s.lse + c, s.delta + c, s.starts + c, first - query, query);
      else
        keys.template add<false>(k, v, q, d, s.lse + c, s.delta + c, s.starts + c, first - query, query);
    }
    if (turn + 1 < total) put_stats(buffer ^ 1);
  }

  float factor[M][2], one[M][2];
#pragma unroll
  for (int m = 0; m < M; m++) {
    factor[m][0] = factor[m][1] = softmax_scale<D>();
    one[m][0] = one[m][1] = 1;
  }
  // Through the warp's own rows of K and V, which nobody else reads.
  bf16* out = d_qkv + b * size_t(seq) * d_stride;
  store_rows<D, M>(ks + own * D, keys.d_k, factor, out + (hq + kv) * D, d_stride, first, seq);
  store_rows<D, M>(vs + own * D, keys.d_v, one, out + (hq + hkv + kv) * D, d_stride, first, seq);
}

}  // namespace attention

// delta[b][h][l] = Σ_d d_ctx·ctx of a head; rows of ctx and d_ctx are `..._stride` apart. dim/8 threads a row.
// Grid: ceil(seq / (2048 / dim)), hq, batch. Block: 256.
extern "C" __global__ void __launch_bounds__(256)
    attention_backward_delta(const bf16* ctx, int ctx_stride, const bf16* d_ctx, int d_ctx_stride, float* delta,
                             int seq, int hq, int dim) {
  int lanes = dim / 8, lane = threadIdx.x % lanes, h = blockIdx.y, b = blockIdx.z;
  int position = blockIdx.x * (256 / lanes) + threadIdx.x / lanes;
  float sum = 0;
  if (position < seq) {
    size_t token = b * size_t(seq) + position;
    uint4 x = *reinterpret_cast<const uint4*>(ctx + token * ctx_stride + h * dim + lane * 8);
    uint4 y = *reinterpret_cast<const uint4*>(d_ctx + token * d_ctx_stride + h * dim + lane * 8);
    uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; i++) sum += low2(xs[i]) * low2(ys[i]) + high2(xs[i]) * high2(ys[i]);
  }
  for (int m = lanes / 2; m > 0; m >>= 1) sum += __shfl_xor_sync(FULL, sum, m);
  if (position < seq && lane == 0) delta[(size_t(b) * hq + h) * seq + position] = sum;
}
REGISTER(attention_backward_delta)

// qkv: rows of `stride`, d_ctx: of `d_ctx_stride`, d_qkv: of `d_stride`; writes its k and v columns. lse, delta:
// [batch, hq, seq]. Grid: batch · hkv · ceil(seq / 128). Block: 128 threads (256 where D = 128). Shared: 1024 D + 1536.
#define ATTENTION_BACKWARD_KEYS(D)                                                                                   \
  extern "C" __global__ void __launch_bounds__(attention::Shape<D>::THREADS, attention::Shape<D>::BLOCKS)            \
      attention_backward_keys_d##D(const bf16* qkv, int stride, const uint32_t* starts, const bf16* d_ctx,           \
                                 int d_ctx_stride, const float* lse, const float* delta, bf16* d_qkv,                \
                                 int d_stride, int batch, int seq, int hq, int hkv) {                                \
    attention::keys_body<D>(qkv, stride, starts, d_ctx, d_ctx_stride, lse, delta, d_qkv, d_stride, batch, seq,       \
                          hq, hkv);                                                                                  \
  }                                                                                                                  \
  REGISTER(attention_backward_keys_d##D)
ATTENTION_BACKWARD_KEYS(32)
ATTENTION_BACKWARD_KEYS(64)
ATTENTION_BACKWARD_KEYS(128)
