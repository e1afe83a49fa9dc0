// Pieces of the SSD scan's way back, see ssd_backward.cu: what a block keeps, what comes from and goes to
// memory, the gate, and dA_log.
#pragma once
#include "ssd.cuh"

namespace ssd {

struct BackwardArgs {
  const bf16 *d_gated_nd, *y_nd, *xbc_nc, *proj_nr;
  const float* a_log_nh;
  const bf16* states;
  const float *d_h, *z_bias;
  const uint32_t* starts_n;
  bf16 *d_xbc_nc, *d_proj_nr;
  float *d_z_bias_part, *d_d_part;
  int heads, seq, proj_stride, a_stride;
};

// What d log a of a chunk is made of; read one chunk later, so there are two.
template <int H> struct Flow {
  float step[H][Q];      // C·dC − B·dB^chunk
  float leaving[H][Q];   // B·dB^leaving
  float through[4 * H];  // e_Q ⟨S, dS⟩
  float slope[Q];        // d log a / d A_log, 0 at starts
};
// With H = 2 the two warps of 16 tokens make the same E, each for itself: they need not wait for each other.
template <int P, int N, int H> struct BackwardShared {
  bf16 b[2][Q * N], c[2][Q * N], x[H][Q * P], state[P * N];
  bf16 dy[Q * P], e[H][Q * Q], d_state[P * N];
  Decays decays;
  Flow<H> flow[2];
};

// Heads of P × N on 4 H warps: warp r + 4 h has the tokens 16 r.. of the chunk and share h of the columns.
template <int P_, int N_, int H_> struct Shape {
  static constexpr int P = P_, N = N_, H = H_, WARPS = 4 * H, THREADS = 32 * WARPS;
  static constexpr int VECTORS = Q * P / 8 / THREADS;  // 16-byte pieces of [Q, P] a thread
  static constexpr int STEP = THREADS * 8 / P;         // rows between them
  static constexpr int KEPT = P / 32;                  // columns of d_z_bias a lane sums
  static constexpr int PH = P / H, NH = N / H;         // columns a warp makes
  using Shared = BackwardShared<P, N, H>;
  using Part = Share<P, N, WARPS>;
};

// A chunk's rows on their way to the gate.
template <class K> struct Rows {
  uint4 d_gated[K::VECTORS], z[K::VECTORS], y[K::VECTORS];
  Raw raw;
};

__device__ __forceinline__ uint4 load16_if(const bf16* from, bool there) {
  return there ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
}

// Where a block works.
struct Place {
  int head, inner, channels;
  size_t token, sequence;  // the sequence's first token; sequence and head as one index
};

template <class K>
__device__ __forceinline__ void fetch_rows(Rows<K>& rows, const BackwardArgs& args, const Place& at, int chunk) {
  constexpr int PIECES = K::P / 8;
  const int len = min(Q, args.seq - chunk * Q);
  const size_t token = at.token + size_t(chunk) * Q;
  const int row = threadIdx.x / PIECES, column = at.head * K::P + threadIdx.x % PIECES * 8;
  if (threadIdx.x < 32) rows.raw = fetch_decays(args.a_log_nh + at.head, args.a_stride, args.starts_n, token, len);
  const bf16* d_gated = args.d_gated_nd + (token + row) * at.inner + column;
  const bf16* y = args.y_nd + (token + row) * at.inner + column;
  const bf16* z = args.proj_nr + (token + row) * args.proj_stride + at.channels + column;
#pragma unroll
  for (int i = 0; i < K::VECTORS; i++) {
    bool there = row + i * K::STEP < len;
    rows.d_gated[i] = load16_if(d_gated, there);
    rows.z[i] = load16_if(z, there);
    rows.y[i] = load16_if(y, there);
    d_gated += K::STEP * size_t(at.inner), y += K::STEP * size_t(at.inner), z += K::STEP * size_t(args.proj_stride);
  }
}

// Sums over the lanes with the same piece of a row; lane's share of the 8 sums is added to `kept`.
template <class K> __device__ __forceinline__ void keep_bias(float (&kept)[K::KEPT], float (&sums)[8]) {
  int lane = threadIdx.x % 32, n = 8;
#pragma unroll
  for (int d = 16; d >= K::P / 8; d /= 2) {
    n /= 2;
    bool high = lane & d;
#pragma unroll
    for (int i = 0; i < n; i++) {
      float other = __shfl_xor_sync(FULL, high ? sums[i] : sums[n + i], d);
      sums[i] = (high ? sums[n + i] : sums[i]) + other;
    }
  }
#pragma unroll
  for (int i = 0; i < K::KEPT; i++) kept[i] += sums[i];
}
// First column of that share.
template <class K> __device__ __forceinline__ int kept_column() {
  int lane = threadIdx.x % 32, n = 8, column = lane % (K::P / 8) * 8;
#pragma unroll
  for (int d = 16; d >= K::P / 8; d /= 2) {
    n /= 2;
    if (lane & d) column += n;
  }
  return column;
}

// Back through the gate: dy to shared memory, dz to memory.
template <class K>
__device__ __forceinline__ void back_through_gate(const Rows<K>& rows, const BackwardArgs& args, const Place& at,
                                                  int chunk, bf16* dy, float (&bias_sums)[K::KEPT]) {
  constexpr int PIECES = K::P / 8;
  const int len = min(Q, args.seq - chunk * Q), piece = threadIdx.x % PIECES, column = at.head * K::P + piece * 8;
  float bias[8], sums[8] = {};
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    float4 four = *reinterpret_cast<const float4*>(args.z_bias + column + i);
    bias[i] = four.x, bias[i + 1] = four.y, bias[i + 2] = four.z, bias[i + 3] = four.w;
  }
#pragma unroll
  for (int i = 0; i < K::VECTORS; i++) {
    int row = threadIdx.x / PIECES + i * K::STEP;
    const uint32_t dg[4] = {rows.d_gated[i].x, rows.d_gated[i].y, rows.d_gated[i].z, rows.d_gated[i].w};
    const uint32_t z[4] = {rows.z[i].x, rows.z[i].y, rows.z[i].z, rows.z[i].w};
    const uint32_t y[4] = {rows.y[i].x, rows.y[i].y, rows.y[i].z, rows.y[i].w};
    uint32_t dy_words[4], dz_words[4];
#pragma unroll
    for (int w = 0; w < 4; w++) {
      float d[2] = {low2(dg[w]), high2(dg[w])}, dz[2];
      const float open[2] = {low2(z[w]) + bias[2 * w], high2(z[w]) + bias[2 * w + 1]};
      const float out[2] = {low2(y[w]), high2(y[w])};
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float s = sigmoid_fast(open[e]), silu = open[e] * s;
        dz[e] = d[e] * out[e] * (s + silu * (1.0f - s));
        d[e] *= silu;
        sums[2 * w + e] += dz[e];
      }
      dy_words[w] = pack2(d[0], d[1]);
      dz_words[w] = pack2(dz[0], dz[1]);
    }
    *reinterpret_cast<uint4*>(piece_at<K::P>(dy, row, piece)) =
        make_uint4(dy_words[0], dy_words[1], dy_words[2], dy_words[3]);
    bf16* to = args.d_proj_nr + (at.token + size_t(chunk) * Q + row) * args.proj_stride + at.channels + column;
    if (row < len) *reinterpret_cast<uint4*>(to) = make_uint4(dz_words[0], dz_words[1], dz_words[2], dz_words[3]);
  }
  keep_bias<K>(bias_sums, sums);
}

// A warp's work: slopes of the chunk's A_log.
__device__ __forceinline__ void make_slopes(float* slope, const Raw& raw, int position, int len) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    int at = 2 * (threadIdx.x % 32) + i;
    slope[at] = at >= len || raw.start[i] == position + at ? 0.0f : -sigmoid_fast(raw.a_log[i]);
  }
}

// Stores rows g and g + 8 of the warp's tile; `to` is the chunk's first row at the warp's first column.
template <int NT>
__device__ __forceinline__ void store_tile(const float (&c)[NT][4], bf16* to, size_t stride, int r, int lane,
                                           int len) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = 16 * r + lane / 4 + 8 * half;
    uint32_t words[NT];
    pack_half(words, c, half);
    store_row(words, to + row * stride, row < len);
  }
}

// dA_log of a chunk, a warp's work.
template <int H> __device__ __forceinline__ void store_d_a_log(const Flow<H>& flow, bf16* to, size_t stride, int len) {
  const int lane = threadIdx.x % 32, at = 2 * lane;
  float step[2] = {}, leaving[2] = {}, through = 0.0f;
#pragma unroll
  for (int h = 0; h < H; h++)
#pragma unroll
    for (int i = 0; i < 2; i++) step[i] += flow.step[h][at + i], leaving[i] += flow.leaving[h][at + i];
#pragma unroll
  for (int w = 0; w < 4 * H; w++) through += flow.through[w];
  float from = step[0] + step[1], before = leaving[0] + leaving[1];
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    float above = __shfl_down_sync(FULL, from, d), below = __shfl_up_sync(FULL, before, d);
    if (lane + d < 32) from += above;
    if (lane >= d) before += below;
  }
  float above = __shfl_down_sync(FULL, from, 1), below = __shfl_up_sync(FULL, before, 1);
  if (lane == 31) above = 0.0f;
  if (lane == 0) below = 0.0f;
  const float sums[2] = {from + below, above + step[1] + below + leaving[0]};
#pragma unroll
  for (int i = 0; i < 2; i++)
    if (at + i < len) to[(at + i) * stride] = to_bf16(flow.slope[at + i] * (sums[i] + through));
}

}  // namespace ssd
