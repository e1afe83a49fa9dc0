// Depthwise causal convolution over the channels x‖B‖C, without activation; see stages/src/ops/conv.rs.
//
//   y[t] = bias + Σ_back w[taps−1−back] · x[t−back]      over t−back that t sees (back < taps)
//   back: d_x[t] = f · Σ_back w[taps−1−back] · d_y[t+back]      over t+back that see t
//         d_w[taps−1−back] = Σ_t f · x[t] · d_y[t+back],  d_bias = Σ_t f · d_y[t]
//
// x: the first `channels` columns of proj_nr, bf16 [n, proj_stride]; y: xbc_nc, bf16 [n, channels]; w_ck:
// f32 [channels, taps], oldest tap first; bias_c: f32 [channels]; starts_n: see ops/mod.rs. Only channels
// first..last (multiples of 8) are read and written. f is 1, or a factor of the head that a B or C
// channel belongs to (of factor_bh, f32 [batch · heads]); channels below `inner` have none.
//
// A thread has eight channels and slides over tokens with its inputs in registers: each is read once,
// but for the few at the seams. `TAPS` is 4 or 8; fewer taps are those with zeros before them.
#include "rows.cuh"

namespace {
constexpr int TURN = 4;  // tokens that are loaded at once
constexpr int RUN = 32;  // tokens of a thread in the forward pass
constexpr int FORWARD_WARPS = 8, BACKWARD_WARPS = 4;

template <int TAPS>
__device__ __forceinline__ void load_taps(float (&w)[TAPS][8], const float* w_ck, int channel, int taps) {
#pragma unroll
  for (int c = 0; c < 8; c++) {
    const float* own = w_ck + size_t(channel + c) * taps;
    if (TAPS == 4 && taps == 4) {
      float4 all = *reinterpret_cast<const float4*>(own);
      w[0][c] = all.x, w[1][c] = all.y, w[2][c] = all.z, w[3][c] = all.w;
      continue;
    }
#pragma unroll
    for (int k = 0; k < TAPS; k++) w[k][c] = k >= TAPS - taps ? own[k - (TAPS - taps)] : 0.0f;
  }
}

// Block (32 lanes · 8 channels, 8 warps · RUN tokens).
template <int TAPS>
__device__ __forceinline__ void conv_forward(bf16* xbc_nc, const bf16* proj_nr, const float* w_ck,
                                             const float* bias_c, const uint32_t* starts_n, int n, int seq,
                                             int channels, int proj_stride, int taps, int first, int last) {
  int channel = first + (blockIdx.x * 32 + threadIdx.x % 32) * 8;
  int begin = (blockIdx.y * FORWARD_WARPS + threadIdx.x / 32) * RUN, end = min(begin + RUN, n);
  if (channel >= last || begin >= n) return;
  const bf16* from = proj_nr + channel;
  float w[TAPS][8], bias[8];
  load_taps<TAPS>(w, w_ck, channel, taps);
  load8(bias, bias_c + channel);

  // x[TAPS−1+u] is token u of this turn, x[TAPS−2] the one before the turn, and so on.
  uint4 x[TAPS - 1 + TURN];
  int position = begin % seq;
#pragma unroll
  for (int i = 0; i < TAPS - 1; i++) {
    int back = TAPS - 1 - i;
    x[i] = make_uint4(0, 0, 0, 0);
    if (back <= position) x[i] = load16(from + size_t(begin - back) * proj_stride);
  }
  for (int turn = begin; turn < end; turn += TURN) {
    int start[TURN];
#pragma unroll
    for (int u = 0; u < TURN; u++) {
      if (turn + u >= end) continue;
      x[TAPS - 1 + u] = load16(from + size_t(turn + u) * proj_stride);
      start[u] = starts_n[turn + u];
    }
#pragma unroll
    for (int u = 0; u < TURN; u++) {
      if (turn + u >= end) continue;
      // What this token cannot see, those after it cannot see either.
      int seen = position - start[u];
      if (seen < TAPS - 1) {
#pragma unroll
        for (int back = 1; back < TAPS; back++) {
          if (back > seen) x[u + TAPS - 1 - back] = make_uint4(0, 0, 0, 0);
        }
      }
      float y[8], value[8];
#pragma unroll
      for (int c = 0; c < 8; c++) y[c] = bias[c];
#pragma unroll
      for (int k = TAPS - 1; k >= 0; k--) {
        unpack8(value, x[u + k]);
#pragma unroll
        for (int c = 0; c < 8; c++) y[c] += w[k][c] * value[c];
      }
      store16(xbc_nc + size_t(turn + u) * channels + channel, pack8(y));
      position = position + 1 == seq ? 0 : position + 1;
    }
#pragma unroll
    for (int i = 0; i < TAPS - 1; i++) x[i] = x[i + TURN];
  }
}

// Adds up the sums of the block's warps, first to last. One row of partials: d_w [last−first, taps], then
// d_bias [last−first].
template <int TAPS>
__device__ __forceinline__ void write_sums(float* row, const float (&d_w)[TAPS][8], const float (&d_bias)[8],
                                           int taps, int width) {
  constexpr int VALUES = (TAPS + 1) * 8;
  __shared__ float shared[BACKWARD_WARPS][VALUES][32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < 8; c++) {
#pragma unroll
    for (int k = 0; k < TAPS; k++) shared[warp][k * 8 + c][lane] = d_w[k][c];
    shared[warp][TAPS * 8 + c][lane] = d_bias[c];
  }
  __syncthreads();
  int at = blockIdx.x * 256, mine = min(256, width - at);
  auto total = [&](int tap, int c) {
    float sum = 0;
    for (int i = 0; i < BACKWARD_WARPS; i++) sum += shared[i][tap * 8 + c % 8][c / 8];
    return sum;
  };
  for (int i = threadIdx.x; i < mine * taps; i += 32 * BACKWARD_WARPS)
    row[at * taps + i] = total(i % taps + TAPS - taps, i / taps);
  for (int c = threadIdx.x; c < mine; c += 32 * BACKWARD_WARPS) row[width * taps + at + c] = total(TAPS, c);
}

// Block (32 lanes · 8 channels, 4 warps · `range` tokens, a multiple of TURN). Walks from the last token
// of its range to the first, so that a d_y that does not see a token can be forgotten.
template <int TAPS>
__device__ __forceinline__ void conv_backward(bf16* d_proj_nr, float* partials, const bf16* d_xbc_nc,
                                              const bf16* proj_nr, const float* w_ck, const uint32_t* starts_n,
                                              const float* factor_bh, int n, int seq, int channels, int proj_stride,
                                              int taps, int first, int last, int inner, int heads, int state,
                                              int range) {
  int channel = first + (blockIdx.x * 32 + threadIdx.x % 32) * 8;
  bool active = channel < last;
  int begin = int(min((long long)(blockIdx.y * BACKWARD_WARPS + threadIdx.x / 32) * range, (long long)n));
  int end = min(begin + range, n);
  float w[TAPS][8], d_w[TAPS][8], d_bias[8];
  if (active) load_taps<TAPS>(w, w_ck, channel, taps);
#pragma unroll
  for (int c = 0; c < 8; c++) {
    d_bias[c] = 0;
#pragma unroll
    for (int k = 0; k < TAPS; k++) d_w[k][c] = 0;
  }
  const float* factors = factor_bh && channel >= inner ? factor_bh + (channel - inner) / state % heads : nullptr;
  float factor = 1;
  const bf16 *from_x = proj_nr + channel, *from_y = d_xbc_nc + channel;

  // d_y[u] is that of token u of this turn, d_y[TURN] that of the one after the turn, and so on.
  uint4 d_y[TURN + TAPS - 1], x[TURN];
  int turn = begin + (end - begin + TURN - 1) / TURN * TURN;
#pragma unroll
  for (int i = 0; i < TAPS - 1; i++) {
    d_y[TURN + i] = make_uint4(0, 0, 0, 0);
    if (active && begin < end && turn + i < n) d_y[TURN + i] = load16(from_y + size_t(turn + i) * channels);
  }
  int position = end > 0 ? (end - 1) % seq : 0;
  if (active && factors && begin < end) factor = factors[(end - 1) / seq * heads];
  while (active && turn > begin) {
    turn -= TURN;
    int farthest[TURN];  // the start of the last token that might see this one
#pragma unroll
    for (int u = 0; u < TURN; u++) {
      d_y[u] = x[u] = make_uint4(0, 0, 0, 0);
      if (turn + u >= end) continue;
      d_y[u] = load16(from_y + size_t(turn + u) * channels);
      x[u] = load16(from_x + size_t(turn + u) * proj_stride);
      farthest[u] = turn + u + TAPS - 1 < n ? starts_n[turn + u + TAPS - 1] : 0;
    }
#pragma unroll
    for (int u = TURN - 1; u >= 0; u--) {
      if (turn + u >= end) continue;
      if (position + TAPS > seq || farthest[u] > position) {
#pragma unroll
        for (int back = 1; back < TAPS; back++) {
          bool seen = position + back < seq && int(starts_n[turn + u + back]) <= position;
          if (!seen) d_y[u + back] = make_uint4(0, 0, 0, 0);
        }
      }
      float value[8], d_x[8], own[8];
      unpack8(own, x[u]);
#pragma unroll
      for (int c = 0; c < 8; c++) own[c] *= factor, d_x[c] = 0;
#pragma unroll
      for (int back = 0; back < TAPS; back++) {
        unpack8(value, d_y[u + back]);
#pragma unroll
        for (int c = 0; c < 8; c++) {
          d_x[c] += w[TAPS - 1 - back][c] * value[c];
          d_w[TAPS - 1 - back][c] += own[c] * value[c];
          if (back == 0) d_bias[c] += factor * value[c];
        }
      }
#pragma unroll
      for (int c = 0; c < 8; c++) d_x[c] *= factor;
      store16(d_proj_nr + size_t(turn + u) * proj_stride + channel, pack8(d_x));
      if (--position < 0) {
        position = seq - 1;
        if (factors && turn + u > 0) factor = factors[(turn + u - 1) / seq * heads];
      }
    }
#pragma unroll
    for (int i = TAPS - 2; i >= 0; i--) d_y[TURN + i] = d_y[i];
  }
  if (!partials) return;
  int width = last - first;
  write_sums<TAPS>(partials + size_t(blockIdx.y) * width * (taps + 1), d_w, d_bias, taps, width);
}
}  // namespace

// Forward: grid (ceil((last − first)/256), ceil(n/256)), 256 threads. Backward: grid (the same, blocks),
// 128 threads, with blocks · 4 · range ≥ n; partials (f32 [blocks, (last − first)·(taps + 1)]), factor_bh
// may be null. Every block writes its row of partials.
#define CONV(TAPS, BLOCKS)                                                                                        \
  extern "C" __global__ void __launch_bounds__(32 * FORWARD_WARPS, BLOCKS)                                        \
      conv_forward_##TAPS(bf16* xbc_nc, const bf16* proj_nr, const float* w_ck, const float* bias_c,              \
                          const uint32_t* starts_n, int n, int seq, int channels, int proj_stride, int taps,      \
                          int first, int last) {                                                                  \
    conv_forward<TAPS>(xbc_nc, proj_nr, w_ck, bias_c, starts_n, n, seq, channels, proj_stride, taps, first,       \
                       last);                                                                                     \
  }                                                                                                               \
  REGISTER(conv_forward_##TAPS)                                                                                   \
  extern "C" __global__ void __launch_bounds__(32 * BACKWARD_WARPS, BLOCKS + 1)                                   \
      conv_backward_##TAPS(bf16* d_proj_nr, float* partials, const bf16* d_xbc_nc, const bf16* proj_nr,           \
                           const float* w_ck, const uint32_t* starts_n, const float* factor_bh, int n, int seq,   \
                           int channels, int proj_stride, int taps, int first, int last, int inner, int heads,    \
                           int state, int range) {                                                                \
    conv_backward<TAPS>(d_proj_nr, partials, d_xbc_nc, proj_nr, w_ck, starts_n, factor_bh, n, seq, channels,      \
                        proj_stride, taps, first, last, inner, heads, state, range);                              \
  }                                                                                                               \
  REGISTER(conv_backward_##TAPS)

CONV(4, 2)
CONV(8, 1)
