// Rotary positions (Su et al. 2021), "rotate-half" pairing, in place on the first heads of every row.
//
//   low' = low·cos - high·sin, high' = high·cos + low·sin    with high = element j + rotary/2 of the head
//
// cos and sin: f32 tables [positions, rotary/2]. Row i is at position i mod seq + position0, plus what its sequence
// has had before (before[i / seq · before_stride]; may be null). `sign` -1 turns a gradient back. Elements of a head
// from `rotary` on pass.
#include "prims.cuh"

namespace rotation {

__device__ __forceinline__ void turn(float& low, float& high, float cos, float sin) {
  float a = low, b = high;
  low = a * cos - b * sin;
  high = b * cos + a * sin;
}

// 8 pairs at once; all three places are aligned to 16 bytes.
__device__ __forceinline__ void turn8(bf16* low, bf16* high, const float* cos, const float* sin, float sign) {
  uint4 a4 = *reinterpret_cast<const uint4*>(low), b4 = *reinterpret_cast<const uint4*>(high);
  float4 c[2], s[2];
  for (int i = 0; i < 2; i++) {
    c[i] = __ldg(reinterpret_cast<const float4*>(cos) + i);
    s[i] = __ldg(reinterpret_cast<const float4*>(sin) + i);
  }
  uint32_t a[4] = {a4.x, a4.y, a4.z, a4.w}, b[4] = {b4.x, b4.y, b4.z, b4.w};
  float cs[8] = {c[0].x, c[0].y, c[0].z, c[0].w, c[1].x, c[1].y, c[1].z, c[1].w};
  float ss[8] = {s[0].x, s[0].y, s[0].z, s[0].w, s[1].x, s[1].y, s[1].z, s[1].w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float low0 = low2(a[i]), low1 = high2(a[i]), high0 = low2(b[i]), high1 = high2(b[i]);
    turn(low0, high0, cs[2 * i], ss[2 * i] * sign);
    turn(low1, high1, cs[2 * i + 1], ss[2 * i + 1] * sign);
    a[i] = pack2(low0, low1);
    b[i] = pack2(high0, high1);
  }
  *reinterpret_cast<uint4*>(low) = make_uint4(a[0], a[1], a[2], a[3]);
  *reinterpret_cast<uint4*>(high) = make_uint4(b[0], b[1], b[2], b[3]);
}

}  // namespace rotation

// qkv: n rows of `stride`; the first `turned_heads` heads of `dim` turn. A thread takes 8 pairs (one where
// rotary/2 is no multiple of 8).
// Grid: any; ceil(n · turned_heads · ceil(rotary/2 / 8) / 256) gives each thread one unit. Block: 256.
extern "C" __global__ void __launch_bounds__(256)
    rope(bf16* qkv, int n, int stride, int turned_heads, int dim, int rotary, const float* cos, const float* sin,
         int seq, int position0, float sign, const int* before, int before_stride) {
  int half = rotary / 2, width = half % 8 == 0 ? 8 : 1, units = half / width, row_units = turned_heads * units;
  size_t total = size_t(n) * row_units, step = size_t(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < total; i += step) {
    uint32_t token, in_row;
    if (total <= 0xffffffffu) {  // 64-bit divisions are slow
      token = uint32_t(i) / uint32_t(row_units);
      in_row = uint32_t(i) - token * row_units;
    } else {
      token = uint32_t(i / row_units);
      in_row = uint32_t(i - size_t(token) * row_units);
    }
    uint32_t head = in_row / uint32_t(units), at = (in_row - head * units) * width;
    bf16* low = qkv + size_t(token) * stride + head * dim + at;
    uint32_t sequence = token / uint32_t(seq), position = token - sequence * seq + position0;
    if (before) position += before[size_t(sequence) * before_stride];
    size_t table = size_t(position) * half + at;
    if (width == 8) {
      rotation::turn8(low, low + half, cos + table, sin + table, sign);
    } else {
      float a = to_float(low[0]), b = to_float(low[half]);
      rotation::turn(a, b, cos[table], sin[table] * sign);
      low[0] = to_bf16(a);
      low[half] = to_bf16(b);
    }
  }
}
REGISTER(rope)
