// Activations of the MLP and other maps from element to element; see stages/src/ops/{mlp,gelu}.rs.
//
//   SwiGLU: h = gate · σ(gate) · up, a row of gate_up being gate, then up
//   GELU:   h = x · σ(2√(2/π) (x + 0.044715 x³)), x = pre + bias    (tanh approximation, "gelu_new",
//           Hendrycks and Gimpel 2016)
//
// h, d_h, pre, d_pre: bf16 [n, f]; gate_up, d_gate_up: bf16 [n, 2f]; bias: f32 [f]. f is a multiple of
// 8, n·f/8 below 2^31. A thread takes UNROLL vectors of eight, blocks have 256 threads, the grid has
// ceil(n·f/8 / (256·UNROLL)) of them. Gradients may take the place of what they are computed from.
#include "rows.cuh"

namespace {
constexpr int MAP_THREADS = 256;
constexpr int UNROLL = 2;
constexpr float GELU_SCALE = 1.5957692f;  // 2√(2/π)
constexpr float GELU_CUBIC = 0.044715f;

// Numbers of the thread's vectors; those from `count` on are none.
__device__ __forceinline__ uint32_t own_vector(int u) {
  return (blockIdx.x * UNROLL + u) * uint32_t(MAP_THREADS) + threadIdx.x;
}

// x = pre + bias of vector i.
__device__ __forceinline__ void biased(float (&x)[8], uint4 pre, const float* bias, uint32_t i, uint32_t width) {
  unpack8(x, pre);
  if (!bias) return;
  float b[8];
  load8(b, bias + i % width * 8);
#pragma unroll
  for (int k = 0; k < 8; k++) x[k] += b[k];
}

__device__ __forceinline__ float gelu_sigmoid(float x) {
  return sigmoid_fast(GELU_SCALE * (x + GELU_CUBIC * x * x * x));
}
}  // namespace

extern "C" __global__ void __launch_bounds__(MAP_THREADS) swiglu_forward(bf16* h, const bf16* gate_up, int n, int f) {
  uint32_t width = f / 8, count = uint32_t(n) * width;
  uint4 gates[UNROLL], ups[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    uint32_t i = own_vector(u);
    if (i >= count) continue;
    const bf16* row = gate_up + (size_t(i) + i / width * width) * 8;
    gates[u] = load16(row);
    ups[u] = load16(row + f);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    uint32_t i = own_vector(u);
    if (i >= count) continue;
    float gate[8], up[8];
    unpack8(gate, gates[u]);
    unpack8(up, ups[u]);
#pragma unroll
    for (int k = 0; k < 8; k++) up[k] *= gate[k] * sigmoid_fast(gate[k]);
    store16(h + size_t(i) * 8, pack8(up));
  }
}
REGISTER(swiglu_forward)

// With `h`, the activation is written again, for the weight gradient of what follows it.
extern "C" __global__ void __launch_bounds__(MAP_THREADS)
    swiglu_backward(bf16* d_gate_up, bf16* h, const bf16* d_h, const bf16* gate_up, int n, int f) {
  uint32_t width = f / 8, count = uint32_t(n) * width;
  uint4 gates[UNROLL], ups[UNROLL], d_hs[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    uint32_t i = own_vector(u);
    if (i >= count) continue;
    const bf16* row = gate_up + (size_t(i) + i / width * width) * 8;
    gates[u] = load16(row);
    ups[u] = load16(row + f);
    d_hs[u] = load16(d_h + size_t(i) * 8);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    uint32_t i = own_vector(u);
    if (i >= count) continue;
    float gate[8], up[8], d[8], d_gate[8], d_up[8], act[8];
    unpack8(gate, gates[u]);
    unpack8(up, ups[u]);
    unpack8(d, d_hs[u]);
#pragma unroll
    for (int k = 0; k < 8; k++) {
      float s = sigmoid_fast(gate[k]), silu = gate[k] * s;
      d_up[k] = d[k] * silu;
      d_gate[k] = d[k] * up[k] * (s * (1.0f + gate[k] * (1.0f - s)));
      act[k] = silu * up[k];
    }
    bf16* row = d_gate_up + (size_t(i) + i / width * width) * 8;
    store16(row, pack8(d_gate));
    store16(row + f, pack8(d_up));
    if (h) store16(h + size_t(i) * 8, pack8(act));
  }
}
REGISTER(swiglu_backward)

extern "C" __global__ void __launch_bounds__(MAP_THREADS)
    gelu_forward(bf16* h, const bf16* pre, const float* bias, int n, int f) {
  uint32_t width = f / 8, count = uint32_t(n) * width;
  uint4 pres[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    uint32_t i = own_vector(u);
    if (i < count) pres[u] = load16(pre + size_t(i) * 8);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    uint32_t i = own_vector(u);
    if (i >= count) continue;
    float x[8];
    biased(x, pres[u], bias, i, width);
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] *= gelu_sigmoid(x[k]);
    store16(h + size_t(i) * 8, pack8(x));
  }
}
REGISTER(gelu_forward)

extern "C" __global__ void __launch_bounds__(MAP_THREADS)
    gelu_backward(bf16* d_pre, bf16* h, const bf16* d_h, const bf16* pre, const float* bias, int n, int f) {
  uint32_t width = f / 8, count = uint32_t(n) * width;
  uint4 pres[UNROLL], d_hs[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    uint32_t i = own_vector(u);
    if (i >= count) continue;
    pres[u] = load16(pre + size_t(i) * 8);
    d_hs[u] = load16(d_h + size_t(i) * 8);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    uint32_t i = own_vector(u);
    if (i >= count) continue;
    float x[8], d[8], act[8];
    biased(x, pres[u], bias, i, width);
    unpack8(d, d_hs[u]);
#pragma unroll
    for (int k = 0; k < 8; k++) {
      // Beyond ±16 the slope is 0 or 1; x² must not overflow there, for 0 · ∞.
      float s = gelu_sigmoid(x[k]), near = fminf(fmaxf(x[k], -16.0f), 16.0f);
      float inner = GELU_SCALE * (1.0f + 3.0f * GELU_CUBIC * near * near);
      d[k] *= s + x[k] * s * (1.0f - s) * inner;
      act[k] = x[k] * s;
    }
    store16(d_pre + size_t(i) * 8, pack8(d));
    if (h) store16(h + size_t(i) * 8, pack8(act));
  }
}
REGISTER(gelu_backward)

// x [n, f] += bias [f], in place.
extern "C" __global__ void __launch_bounds__(MAP_THREADS) add_bias(bf16* x, const float* bias, int n, int f) {
  uint32_t width = f / 8, count = uint32_t(n) * width;
  uint4 own[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    uint32_t i = own_vector(u);
    if (i < count) own[u] = load16(x + size_t(i) * 8);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    uint32_t i = own_vector(u);
    if (i >= count) continue;
    float value[8];
    biased(value, own[u], bias, i, width);
    store16(x + size_t(i) * 8, pack8(value));
  }
}
REGISTER(add_bias)

// out = a + b, `count` vectors of eight; out may be a or b.
extern "C" __global__ void __launch_bounds__(MAP_THREADS) add_bf16(bf16* out, const bf16* a, const bf16* b, int count) {
  uint4 left[UNROLL], right[UNROLL];
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    uint32_t i = own_vector(u);
    if (i >= uint32_t(count)) continue;
    left[u] = load16(a + size_t(i) * 8);
    right[u] = load16(b + size_t(i) * 8);
  }
#pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    uint32_t i = own_vector(u);
    if (i >= uint32_t(count)) continue;
    float x[8], y[8];
    unpack8(x, left[u]);
    unpack8(y, right[u]);
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] += y[k];
    store16(out + size_t(i) * 8, pack8(x));
  }
}
REGISTER(add_bf16)
