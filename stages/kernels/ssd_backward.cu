// The SSD scan with skip and gate, backward, see ssd.cuh.
//
// A block walks over the chunks of one head of one sequence from last to first, carrying dS, the gradient
// of the state leaving the chunk, in registers (f32) with a bf16 copy to multiply by. With M = G∘L the
// chunk's matrix (G_ls = C_l·B_s, L the decays), E = dM∘L, dM_ls = dy_l·x_s, e_l = 2^cs_l, w_s = 2^(cs_Q−cs_s):
//   dy = d_gated · SiLU(z̃), dz = d_gated · y · SiLU'(z̃), z̃ = z + z_bias
//   dx_s = Σ_l M_ls dy_l + w_s dS B_s + D dy_s      dB_s = Σ_l E_ls C_l + w_s dSᵀ x_s
//   dC_l = Σ_s E_ls B_s + e_l Sᵀ dy_l               dS ← e_Q dS + Σ_l e_l dy_l C_lᵀ
// d log a_k gathers what flows over k: pairs l ≥ k > s of the chunk, the entering state into l ≥ k, s < k
// into the leaving state, and the entering state into the leaving one:
//   Σ_{j≥k} (C_j·dC_j − B_j·dB_j^chunk) + Σ_{s<k} B_s·dB_s^leaving + e_Q ⟨S, dS⟩
// where dB^chunk and dB^leaving are dB's two terms: all sums are over one chunk. E's diagonal, which no decay
// meets, is left out of them (dB and dC get it afterwards), so that they stay exact for the smallest decays.
// 0 where a document starts.
//   grid (heads, batch), 128 H threads with H = 2 where N ≥ 64 and P N ≥ 8192, else 1; shared bytes
//   512 N + 4 P N + 128 P (1 + H) + 8192 H + 1024 + 512 (2 H + 1) + 32 H
//   d_gated_nd, y_nd [n, inner], xbc_nc, proj_nr, a_log_nh, states, d_h, z_bias, starts_n as in ssd_forward
//   d_xbc_nc [n, channels]; d_proj_nr [n, proj_stride]: columns from `channels` on, dz | dA_log | zeros
//   d_z_bias_part f32 [batch, inner], d_d_part f32 [batch, heads]: sums over a sequence
#include "ssd_backward.cuh"

namespace ssd {

// The chunk's matrices for the warp's 16 tokens s and the tokens l of tile j: M as A fragment of its
// transpose, E to its tile (rows s) without its diagonal, which comes in `diagonal` for rows g and g + 8.
template <class K>
__device__ __forceinline__ void mix_tile(uint32_t (&m)[4], float (&diagonal)[2], const uint32_t (&x)[K::P / 16][4],
                                         int r, int j, int lane, bf16* b, bf16* c, bf16* e_tile,
                                         typename K::Shared* shared) {
  const int g = lane / 4, t = lane % 4;
  const Decays& decays = shared->decays;
  float mix[2][4] = {}, grad[2][4] = {};
#pragma unroll
  for (int k = 0; k < K::P / 16; k++) mma_by_n<K::P>(grad[0], grad[1], x[k], shared->dy, 16 * j, 16 * k, lane);
#pragma unroll
  for (int k = 0; k < K::N / 16; k++) {
    uint32_t a[4];
    load_a<K::N>(a, b, 16 * r, 16 * k, lane);
    mma_by_n<K::N>(mix[0], mix[1], a, c, 16 * j, 16 * k, lane);
  }
  if (j == r) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float& even = grad[half][2 * half];
      float& odd = grad[half][2 * half + 1];
      diagonal[half] = __shfl_sync(FULL, g % 2 ? odd : even, 4 * g + g / 2);
      if (g == 2 * t) even = 0.0f;
      if (g == 2 * t + 1) odd = 0.0f;
    }
  }
#pragma unroll
  for (int tile = 0; tile < 2; tile++) {
    int l = 16 * j + 8 * tile + 2 * t;
    float2 sum = *reinterpret_cast<const float2*>(decays.sum + l);
    int2 low = *reinterpret_cast<const int2*>(decays.low + l);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int s = 16 * r + g + 8 * half;
      float own = decays.sum[s];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float decay = exp2_fast((i ? sum.y : sum.x) - own);
        if (!is_seen(s, l + i, i ? low.y : low.x)) decay = 0.0f;
        mix[tile][2 * half + i] *= decay;
        grad[tile][2 * half + i] *= decay;
      }
      m[2 * tile + half] = pack2(mix[tile][2 * half], mix[tile][2 * half + 1]);
      uint32_t& e = pair_at<Q>(e_tile, 16 * r + 8 * half, 2 * j + tile, lane);
      e = pack2(grad[tile][2 * half], grad[tile][2 * half + 1]);
    }
  }
}

// Σ_columns tile · c over a lane's columns, for rows g and g + 8 of the warp's tile r.
template <class K>
__device__ __forceinline__ void dot_rows(float (&dots)[2], const float (&c)[K::NH / 8][4], bf16* tile, int r, int h,
                                         int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    dots[half] = 0.0f;
#pragma unroll
    for (int j = 0; j < K::NH / 8; j++) {
      uint32_t pair = pair_at<K::N>(tile, 16 * r + 8 * half, h * (K::NH / 8) + j, lane);
      dots[half] += low2(pair) * c[j][2 * half] + high2(pair) * c[j][2 * half + 1];
    }
  }
}
// Adds `factor` times the rows of `tile`.
template <class K>
__device__ __forceinline__ void add_rows(float (&c)[K::NH / 8][4], const float (&factor)[2], bf16* tile, int r, int h,
                                         int lane) {
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int j = 0; j < K::NH / 8; j++) {
      uint32_t pair = pair_at<K::N>(tile, 16 * r + 8 * half, h * (K::NH / 8) + j, lane);
      c[j][2 * half] += factor[half] * low2(pair);
      c[j][2 * half + 1] += factor[half] * high2(pair);
    }
}
// Dot products as above for x, which is in fragments, and its columns.
template <class K>
__device__ __forceinline__ void dot_x(float (&dots)[2], const float (&c)[K::PH / 8][4],
                                      const uint32_t (&x)[K::P / 16][4], int h) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    dots[half] = 0.0f;
#pragma unroll
    for (int j = 0; j < K::PH / 8; j++) {
      uint32_t pair = x[j / 2][j % 2 * 2 + half];
      if (K::H == 2 && h == 1) pair = x[(j + K::P / 16) / 2 % (K::P / 16)][j % 2 * 2 + half];
      dots[half] += low2(pair) * c[j][2 * half] + high2(pair) * c[j][2 * half + 1];
    }
  }
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(FULL, x, 1);
  return x + __shfl_xor_sync(FULL, x, 2);
}

// ⟨S, dS⟩ over the warp's part of dS.
template <class K>
__device__ __forceinline__ float dot_state(const float (&d_state)[K::Part::RT][K::Part::NT][4], bf16* state, int warp,
                                           int lane) {
  using S = typename K::Part;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < S::RT; i++)
#pragma unroll
    for (int j = 0; j < S::NT; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t pair = pair_at<K::N>(state, S::row(warp, i) + 8 * half, S::column(warp) / 8 + j, lane);
        sum += low2(pair) * d_state[i][j][2 * half] + high2(pair) * d_state[i][j][2 * half + 1];
      }
  return sum;
}

// A warp at work on a chunk.
template <class K> struct Work {
  typename K::Shared* shared;
  bf16 *b, *c, *e;  // the chunk's tiles
  int r, h, lane;   // its tile of rows, its share of the columns
  unsigned seen;    // bit j: tile j of tokens l sees some of its tokens s
  bool keeps;       // the leaving state keeps some of them,
  float last[2];    // so much of rows g and g + 8
};

// dx of the warp's rows and columns; `leaving` is x · (what the leaving state gives dx), a lane's part:
// the same as B · dB^leaving.
template <class K>
__device__ __forceinline__ void rows_of_dx(float (&dx)[K::PH / 8][4], float (&leaving)[2], const Work<K>& own,
                                           const uint32_t (&x)[K::P / 16][4], const uint32_t (&m)[TILES][4],
                                           float skip) {
  typename K::Shared* shared = own.shared;
  const int column = own.h * K::PH;
  clear(dx);
  if (own.keeps) {
#pragma unroll
    for (int k = 0; k < K::N / 16; k++) {
      uint32_t a[4];
      load_a<K::N>(a, own.b, 16 * own.r, 16 * k, own.lane);
#pragma unroll
      for (int j = 0; j < K::PH / 8; j += 2)
        mma_by_n<K::N>(dx[j], dx[j + 1], a, shared->d_state, column + 8 * j, 16 * k, own.lane);
    }
    scale_rows(dx, own.last[0], own.last[1]);
  }
  dot_x<K>(leaving, dx, x, own.h);
#pragma unroll
  for (int l = 0; l < TILES; l++) {
    if (!(own.seen >> l & 1)) continue;
#pragma unroll
    for (int j = 0; j < K::PH / 8; j += 2)
      mma_by_k<K::P>(dx[j], dx[j + 1], m[l], shared->dy, column + 8 * j, 16 * l, own.lane);
  }
#pragma unroll
  for (int j = 0; j < K::PH / 8; j++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t dy = pair_at<K::P>(shared->dy, 16 * own.r + 8 * half, column / 8 + j, own.lane);
      dx[j][2 * half] += skip * low2(dy);
      dx[j][2 * half + 1] += skip * high2(dy);
    }
}

template <class K>
__device__ __forceinline__ void rows_of_db(float (&db)[K::NH / 8][4], const Work<K>& own,
                                           const uint32_t (&x)[K::P / 16][4]) {
  const int column = own.h * K::NH;
  clear(db);
  if (own.keeps) {
#pragma unroll
    for (int k = 0; k < K::P / 16; k++)
#pragma unroll
      for (int j = 0; j < K::NH / 8; j += 2)
        mma_by_k<K::N>(db[j], db[j + 1], x[k], own.shared->d_state, column + 8 * j, 16 * k, own.lane);
    scale_rows(db, own.last[0], own.last[1]);
  }
#pragma unroll
  for (int l = 0; l < TILES; l++) {
    if (!(own.seen >> l & 1)) continue;
    uint32_t a[4];
    load_a<Q>(a, own.e, 16 * own.r, 16 * l, own.lane);
#pragma unroll
    for (int j = 0; j < K::NH / 8; j += 2) mma_by_k<K::N>(db[j], db[j + 1], a, own.c, column + 8 * j, 16 * l, own.lane);
  }
}

// dC of the warp's rows, from the entering state, then (all warps have made E) from the chunk.
template <class K>
__device__ __forceinline__ void entering_dc(float (&dc)[K::NH / 8][4], const Work<K>& own) {
  const float* first = own.shared->decays.first + 16 * own.r;
  if (first[0] == 0.0f) return;
#pragma unroll
  for (int k = 0; k < K::P / 16; k++) {
    uint32_t a[4];
    load_a<K::P>(a, own.shared->dy, 16 * own.r, 16 * k, own.lane);
#pragma unroll
    for (int j = 0; j < K::NH / 8; j += 2)
      mma_by_k<K::N>(dc[j], dc[j + 1], a, own.shared->state, own.h * K::NH + 8 * j, 16 * k, own.lane);
  }
  scale_rows(dc, first[own.lane / 4], first[own.lane / 4 + 8]);
}
template <class K>
__device__ __forceinline__ void chunk_dc(float (&dc)[K::NH / 8][4], const Work<K>& own, int oldest) {
#pragma unroll
  for (int s = 0; s < TILES; s++) {
    if (s < oldest || s > own.r) continue;
    uint32_t a[4];
    load_a_by_k<Q>(a, own.e, 16 * own.r, 16 * s, own.lane);
#pragma unroll
    for (int j = 0; j < K::NH / 8; j += 2)
      mma_by_k<K::N>(dc[j], dc[j + 1], a, own.b, own.h * K::NH + 8 * j, 16 * s, own.lane);
  }
}

// What is summed over the sequence: lanes, then warps.
template <class K>
__device__ __forceinline__ void store_sums(const float (&bias_sums)[K::KEPT], float d_skip, const BackwardArgs& args,
                                           const Place& at, typename K::Shared* shared) {
  const int warp = threadIdx.x / 32;
  float* sums = reinterpret_cast<float*>(shared->dy);
  float* skips = reinterpret_cast<float*>(shared->e);
#pragma unroll
  for (int i = 0; i < K::KEPT; i++) sums[warp * K::P + kept_column<K>() + i] = bias_sums[i];
  d_skip = warp_sum(d_skip);
  if (threadIdx.x % 32 == 0) skips[warp] = d_skip;
  __syncthreads();
  for (int i = threadIdx.x; i < K::P; i += K::THREADS) {
    float sum = 0.0f;
    for (int w = 0; w < K::WARPS; w++) sum += sums[w * K::P + i];
    args.d_z_bias_part[size_t(blockIdx.y) * at.inner + at.head * K::P + i] = sum;
  }
  if (threadIdx.x == 0) args.d_d_part[at.sequence] = skips[0] + skips[1] + skips[2] + skips[3];
}

template <class K> __device__ __forceinline__ void backward(const BackwardArgs& args) {
  using S = typename K::Part;
  using Shared = typename K::Shared;
  constexpr int P = K::P, N = K::N, H = K::H;
  DYNAMIC_SHARED(Shared, shared);
  const int warp = threadIdx.x / 32, r = warp % 4, h = warp / 4;
  const int seq = args.seq, chunks = (seq + Q - 1) / Q;
  Place at;
  at.head = blockIdx.x, at.inner = args.heads * P, at.channels = at.inner + 2 * args.heads * N;
  at.token = size_t(blockIdx.y) * seq, at.sequence = size_t(blockIdx.y) * args.heads + at.head;
  const int channels = at.channels, b_at = at.inner + at.head * N, c_at = b_at + args.heads * N;
  const int a_at = channels + at.inner, padding = args.proj_stride - a_at - args.heads;
  const float skip = args.d_h[at.head];
  const Decays& decays = shared->decays;

  auto load = [&](int chunk) {
    const bf16* rows = args.xbc_nc + (at.token + size_t(chunk) * Q) * channels;
    int to = chunk % 2, len = seq - chunk * Q;
    load_tile<Q, N, K::THREADS>(shared->b[to], rows + b_at, channels, len);
    load_tile<Q, N, K::THREADS>(shared->c[to], rows + c_at, channels, len);
    // Only the warps of a tile read its x: with H = 1 it may be overwritten as soon as that is done.
    if (h == 0)
      load_tile<16, P, 32>(shared->x[chunk % H] + 16 * r * P, rows + 16 * r * channels + at.head * P, channels,
                           len - 16 * r);
    cp_async_commit();
  };
  auto load_state = [&](int chunk) {
    if (chunk > 0)
      load_tile<P, N, K::THREADS>(shared->state, args.states + (at.sequence * chunks + chunk) * P * N, N, P);
    cp_async_commit();
  };
  auto flush_a_log = [&](int chunk) {
    store_d_a_log<H>(shared->flow[chunk % 2],
                     args.d_proj_nr + (at.token + size_t(chunk) * Q) * args.proj_stride + a_at + at.head,
                     args.proj_stride, min(Q, seq - chunk * Q));
  };

  Rows<K> rows;
  load(chunks - 1);
  load_state(chunks - 1);
  fetch_rows<K>(rows, args, at, chunks - 1);
  float d_state[S::RT][S::NT][4], bias_sums[K::KEPT] = {}, d_skip = 0.0f;
#pragma unroll
  for (int i = 0; i < S::RT; i++) clear(d_state[i]);

  for (int chunk = chunks - 1; chunk >= 0; chunk--) {
    const int now = chunk % 2, len = min(Q, seq - chunk * Q);
    const bool leaves = chunk + 1 < chunks, enters = chunk > 0;
    Flow<H>& flow = shared->flow[now];
    bf16* d_xbc = args.d_xbc_nc + (at.token + size_t(chunk) * Q) * channels;
    Work<K> own = {shared, shared->b[now], shared->c[now], shared->e[H == 1 ? 0 : h], r, h, hidden_lane(), 0};
    const int lane = own.lane, row = 16 * r + lane / 4;

    if (warp == 0) {
      make_decays(shared->decays, rows.raw, chunk * Q, len);
      make_slopes(flow.slope, rows.raw, chunk * Q, len);
    }
    back_through_gate<K>(rows, args, at, chunk, shared->dy, bias_sums);
    if (at.head == 0)
      for (int i = threadIdx.x; i < len * padding; i += K::THREADS)
        args.d_proj_nr[(at.token + size_t(chunk) * Q + i / padding) * args.proj_stride + a_at + args.heads +
                       i % padding] = to_bf16(0.0f);
    cp_async_wait<0>();
    __syncthreads();
    uint32_t x[P / 16][4];
#pragma unroll
    for (int k = 0; k < P / 16; k++) load_a<P>(x[k], shared->x[chunk % H], 16 * r, 16 * k, lane);
    __syncwarp();
    if (enters) load(chunk - 1);
    if (leaves && warp == 3) flush_a_log(chunk + 1);

    uint32_t m[TILES][4];
    float diagonal[2] = {};
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      if (j < r || decays.low[16 * j] > 16 * r + 15) continue;
      own.seen |= 1u << j;
      mix_tile<K>(m[j], diagonal, x, r, j, lane, own.b, own.c, own.e, shared);
    }
    if (h == 0 && lane % 4 == 0) d_skip += diagonal[0] + diagonal[1];
    __syncwarp();
    own.keeps = leaves && decays.last[16 * r + 15] != 0.0f;
    own.last[0] = decays.last[row], own.last[1] = decays.last[row + 8];
    float step[2];
    {
      float dx[K::PH / 8][4];
      rows_of_dx<K>(dx, step, own, x, m, skip);
      store_tile(dx, d_xbc + at.head * P + h * K::PH, channels, r, lane, len);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float leaving = quad_sum(step[half]);
      if (lane % 4 == 0) flow.leaving[h][row + 8 * half] = leaving;
    }
    {
      float db[K::NH / 8][4], all[2];
      rows_of_db<K>(db, own, x);
      dot_rows<K>(all, db, own.b, r, h, lane);
      step[0] -= all[0], step[1] -= all[1];
      add_rows<K>(db, diagonal, own.c, r, h, lane);
      store_tile(db, d_xbc + b_at + h * K::NH, channels, r, lane, len);
    }

    float dc[K::NH / 8][4], through = 0.0f;
    clear(dc);
    if (enters) entering_dc<K>(dc, own);
    if (enters && S::active(warp)) {
      float kept = decays.first[Q - 1];
      if (leaves && kept != 0.0f) through = kept * dot_state<K>(d_state, shared->state, warp, lane);
#pragma unroll
      for (int i = 0; i < S::RT; i++) scale_rows(d_state[i], kept, kept);
      add_outer<P, N, K::WARPS, false>(d_state, warp, lane, shared->dy, own.c, decays.first);
    }
    if (enters) fetch_rows<K>(rows, args, at, chunk - 1);
    through = warp_sum(through);
    if (lane == 0) flow.through[warp] = through;
    const int oldest = max(0, decays.low[16 * r]) / 16;
    __syncthreads();

    // E of all warps is there; nobody reads dy, the states and decays of this chunk any more.
    if (enters) load_state(chunk - 1);
    chunk_dc<K>(dc, own, oldest);
    float seeing[2];
    dot_rows<K>(seeing, dc, own.c, r, h, lane);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float sum = quad_sum(step[half] + seeing[half]);
      if (lane % 4 == 0) flow.step[h][row + 8 * half] = sum;
    }
    add_rows<K>(dc, diagonal, own.b, r, h, lane);
    store_tile(dc, d_xbc + c_at + h * K::NH, channels, r, lane, len);
    if (enters && S::active(warp)) store_state<P, N, K::WARPS>(d_state, warp, lane, shared->d_state, nullptr);
  }
  __syncthreads();
  if (warp == 3) flush_a_log(0);
  store_sums<K>(bias_sums, d_skip, args, at, shared);
}

}  // namespace ssd

#define SSD_BACKWARD(P, N, H, BLOCKS)                                                                               \
  extern "C" __global__ void __launch_bounds__(128 * H, BLOCKS) ssd_backward_p##P##_n##N(                           \
      const bf16* __restrict__ d_gated_nd, const bf16* __restrict__ y_nd, const bf16* __restrict__ xbc_nc,          \
      const bf16* __restrict__ proj_nr, const float* __restrict__ a_log_nh, const bf16* __restrict__ states,        \
      const float* __restrict__ d_h, const float* __restrict__ z_bias, const uint32_t* __restrict__ starts_n,       \
      bf16* __restrict__ d_xbc_nc, bf16* __restrict__ d_proj_nr, float* __restrict__ d_z_bias_part,                 \
      float* __restrict__ d_d_part, int heads, int seq, int proj_stride, int a_stride) {                            \
    ssd::backward<ssd::Shape<P, N, H>>({d_gated_nd, y_nd, xbc_nc, proj_nr, a_log_nh, states, d_h, z_bias, starts_n, \
                                        d_xbc_nc, d_proj_nr, d_z_bias_part, d_d_part, heads, seq, proj_stride,      \
                                        a_stride});                                                                 \
  }                                                                                                                 \
  REGISTER(ssd_backward_p##P##_n##N)

SSD_BACKWARD(32, 16, 1, 4)
SSD_BACKWARD(32, 32, 1, 4)
SSD_BACKWARD(32, 64, 1, 3)
SSD_BACKWARD(32, 128, 1, 2)
SSD_BACKWARD(64, 16, 1, 3)
SSD_BACKWARD(64, 32, 1, 3)
SSD_BACKWARD(64, 64, 1, 2)
SSD_BACKWARD(64, 128, 2, 1)
SSD_BACKWARD(128, 16, 1, 2)
SSD_BACKWARD(128, 32, 1, 2)
SSD_BACKWARD(128, 64, 2, 1)
SSD_BACKWARD(128, 128, 2, 1)
