// Token embedding: rows gathered; gradients added up row by row in an order that never changes.
// CPU twin: src/ops/embed.rs.
//
//   x[i] = w[id_i],   dw[id] += Σ_{i: id_i = id} dx[i]
//
// Backward goes through tokens sorted by id (`order_n`, stable, from the host) in pieces of PIECE, a
// block each. A run of equal ids inside of a piece is added to its row at once. What sticks out of a
// piece (a frequent token has runs of many pieces) is put down as a partial sum, at most two a piece:
// slot 0 for a run that comes from the piece before, slot 1 for one that begins here and goes on.
// A second kernel adds up a run's partial sums. So grids depend on the number of tokens alone.
#include "prims.cuh"

namespace embed {

constexpr int PIECE = 64, AHEAD = 8;

__device__ __forceinline__ void add8(float (&sum)[8], uint4 x) {
  sum[0] += low2(x.x), sum[1] += high2(x.x), sum[2] += low2(x.y), sum[3] += high2(x.y);
  sum[4] += low2(x.z), sum[5] += high2(x.z), sum[6] += low2(x.w), sum[7] += high2(x.w);
}
__device__ __forceinline__ void add8(float (&sum)[8], const float4& a, const float4& b) {
  sum[0] += a.x, sum[1] += a.y, sum[2] += a.z, sum[3] += a.w;
  sum[4] += b.x, sum[5] += b.y, sum[6] += b.z, sum[7] += b.w;
}
__device__ __forceinline__ void put8(float* to, const float (&sum)[8]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
}
__device__ __forceinline__ void add_to(float* to, float (&sum)[8]) {
  auto old = reinterpret_cast<const float4*>(to);
  add8(sum, old[0], old[1]);
  put8(to, sum);
}

}  // namespace embed

// x_nd bf16 [n, d] = rows of w_vd bf16 [v, d]; an id of no token (≥ v) gives NaN. A warp a token:
// block 256, grid ⌈n/8⌉.
extern "C" __global__ void __launch_bounds__(256) embed_forward(const bf16* w_vd, const uint32_t* ids_n, bf16* x_nd,
                                                                int n, int d, int v) {
  int token = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32, eights = d / 8;
  if (token >= n) return;
  uint32_t id = ids_n[token];
  bool known = id < uint32_t(v);
  auto from = reinterpret_cast<const uint4*>(w_vd + (known ? size_t(id) * d : 0));
  auto to = reinterpret_cast<uint4*>(x_nd + size_t(token) * d);
  const uint4 nan = make_uint4(0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u, 0x7fc07fc0u);
#pragma unroll 4
  for (int j = lane; j < eights; j += 32) to[j] = known ? from[j] : nan;
}
REGISTER(embed_forward)

// dx_nd bf16 [n, d]; ids_n u32 [n]; order_n u32 [n]: token numbers sorted by id, equal ones rising;
// partial f32 [⌈n/64⌉, 2, d]; dw_vd f32 [v, d], added to (ids ≥ v are passed over).
// Grid [⌈n/64⌉, ⌈d/(8·block)⌉]; block: a multiple of 32, at most 256.
extern "C" __global__ void __launch_bounds__(256) embed_backward(const bf16* dx_nd, const uint32_t* ids_n,
                                                                 const uint32_t* order_n, float* partial,
                                                                 float* dw_vd, int n, int d, int v) {
  using namespace embed;
  __shared__ uint32_t tokens[PIECE], ids[PIECE];
  int first = blockIdx.x * PIECE, count = min(PIECE, n - first);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    uint32_t token = order_n[first + i];
    tokens[i] = token;
    ids[i] = ids_n[token];
  }
  bool more = first + count < n;
  uint32_t before = first > 0 ? ids_n[order_n[first - 1]] : 0, after = more ? ids_n[order_n[first + count]] : 0;
  __syncthreads();
  int column = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (column >= d) return;
  bool open = first > 0 && before == ids[0];
  float* slots = partial + size_t(blockIdx.x) * 2 * d + column;
  float sum[8] = {};
  for (int base = 0; base < count; base += AHEAD) {
    uint4 read[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (base + i < count) read[i] = *reinterpret_cast<const uint4*>(dx_nd + size_t(tokens[base + i]) * d + column);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      int at = base + i;
      if (at >= count) break;
      add8(sum, read[i]);
      uint32_t id = ids[at];
      bool last = at + 1 == count;
      if (!last && ids[at + 1] == id) continue;
      if (open) {
        put8(slots, sum);
      } else if (last && more && after == id) {
        put8(slots + d, sum);
      } else if (id < uint32_t(v)) {
        add_to(dw_vd + size_t(id) * d + column, sum);
      }
      open = false;
#pragma unroll
      for (int c = 0; c < 8; c++) sum[c] = 0.0f;
    }
  }
}
REGISTER(embed_backward)

// Adds the partial sums of runs of several pieces; a block for the piece that a run begins in.
// Grid and block as above.
extern "C" __global__ void __launch_bounds__(256) embed_backward_join(const uint32_t* ids_n, const uint32_t* order_n,
                                                                      const float* partial, float* dw_vd, int n,
                                                                      int d, int v) {
  using namespace embed;
  __shared__ int found[8];
  int piece = blockIdx.x, pieces = gridDim.x, first = piece * PIECE, next = first + PIECE;
  if (next >= n) return;
  uint32_t id = ids_n[order_n[next - 1]];
  if (ids_n[order_n[next]] != id) return;
  if (first > 0 && ids_n[order_n[first]] == id && ids_n[order_n[first - 1]] == id) return;
  // The run goes on through those of the next pieces that begin with its id.
  int count = 0;
  for (int p = piece + 1 + threadIdx.x; p < pieces; p += blockDim.x) count += ids_n[order_n[p * PIECE]] == id;
  for (int m = 16; m > 0; m >>= 1) count += __shfl_xor_sync(FULL, count, m);
  if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = count;
  __syncthreads();
  count = 0;
  for (int w = 0; w < int(blockDim.x) / 32; w++) count += found[w];
  int column = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (column >= d || id >= uint32_t(v)) return;
  float sum[8] = {};
  auto slot = [&](int p, int which) {
    return reinterpret_cast<const float4*>(partial + (size_t(p) * 2 + which) * d + column);
  };
  add8(sum, slot(piece, 1)[0], slot(piece, 1)[1]);
  for (int base = 1; base <= count; base += AHEAD) {
    float4 low[AHEAD], high[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (base + i <= count) low[i] = slot(piece + base + i, 0)[0], high[i] = slot(piece + base + i, 0)[1];
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (base + i <= count) add8(sum, low[i], high[i]);
  }
  add_to(dw_vd + size_t(id) * d + column, sum);
}
REGISTER(embed_backward_join)
