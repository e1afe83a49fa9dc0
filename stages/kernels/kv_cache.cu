// The upkeep of remembered keys and values: k_cache, v_cache [batch, hkv, capacity, dim], of which sequence b holds
// length[b · length_stride] positions (stride 0: one number for all).
#include "prims.cuh"

// k and v heads of qkv rows (batch · tokens rows of `stride`, rotated) → positions length.. of the caches.
// Grid: ceil(batch · tokens · hkv · dim / 4 / 256). Block: 256.
extern "C" __global__ void __launch_bounds__(256)
    kv_append(const bf16* qkv, int stride, bf16* k_cache, bf16* v_cache, const int* length, int length_stride,
              int batch, int tokens, int hq, int hkv, int dim, int capacity) {
  int chunks = hkv * dim / 8;
  size_t i = blockIdx.x * size_t(256) + threadIdx.x;
  if (i >= size_t(batch) * tokens * 2 * chunks) return;
  size_t row = i / (2 * chunks);
  int in_row = int(i - row * (2 * chunks)), b = int(row / tokens), token = int(row - size_t(b) * tokens);
  bool value = in_row >= chunks;
  int chunk = value ? in_row - chunks : in_row, head = chunk / (dim / 8), at = chunk % (dim / 8) * 8;
  int position = length[size_t(b) * length_stride] + token;
  if (position >= capacity) return;
  auto from = reinterpret_cast<const uint4*>(qkv + row * stride + hq * dim + in_row * 8);
  bf16* to = (value ? v_cache : k_cache) + ((size_t(b) * hkv + head) * capacity + position) * dim + at;
  *reinterpret_cast<uint4*>(to) = *from;
}
REGISTER(kv_append)

// length[i] += tokens, i < count. Grid: ceil(count / 256). Block: 256.
extern "C" __global__ void kv_advance(int* length, int count, int tokens) {
  int i = blockIdx.x * 256 + threadIdx.x;
  if (i < count) length[i] += tokens;
}
REGISTER(kv_advance)
