// What kernels are made of: bf16, warp sums, tensor-core and copy instructions. Each has a twin for
// the emulator, so that kernels hold no inline assembly of their own.
//
// Fragments of `mma_bf16` (PTX m16n8k16, row.col): lane = 4 g + t.
//   a[0] = A[g][2t..2t+1]      a[1] = A[g+8][2t..2t+1]      a[2] = A[g][2t+8..]   a[3] = A[g+8][2t+8..]
//   b[0] = B[2t..2t+1][g]      b[1] = B[2t+8..2t+9][g]      (B is k × n; pairs run along k)
//   c[0..1] = C[g][2t..2t+1]   c[2..3] = C[g+8][2t..2t+1]
#pragma once

#ifdef PIPE_EMULATE
#include "emulate.h"
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulate::block->shared)
#define REGISTER(name) static emulate::Registration registered_##name(#name, &emulate::Call<&name>::entry);
#else
#include <cuda_bf16.h>
#include <stdint.h>
#define DYNAMIC_SHARED(type, name) \
  extern __shared__ __align__(128) char dynamic_shared_memory[]; \
  type* name = reinterpret_cast<type*>(dynamic_shared_memory)
#define REGISTER(name)
#endif

#define FULL 0xffffffffu
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

#ifdef PIPE_EMULATE
struct bf16 { uint16_t bits; };
__device__ inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline bf16 to_bf16(float x) {  // to nearest, ties to even; NaN stays one
  uint32_t u = __float_as_uint(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40)};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
__device__ inline uint32_t pack2(float low, float high) {
  return uint32_t(to_bf16(low).bits) | uint32_t(to_bf16(high).bits) << 16;
}
__device__ inline float exp2_fast(float x) { return exp2f(x); }
__device__ inline float rcp_fast(float x) { return 1.0f / x; }
#else
typedef __nv_bfloat16 bf16;
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ bf16 to_bf16(float x) { return __float2bfloat16_rn(x); }
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif
// The two halves of a packed pair; the low half is the first element.
__device__ __forceinline__ float low2(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high2(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float exp_fast(float x) { return exp2_fast(x * LOG2E); }
__device__ __forceinline__ float sigmoid_fast(float x) { return rcp_fast(1.0f + exp_fast(-x)); }

// Sums (maxima) over a warp in a fixed order; every lane gets the result.
__device__ __forceinline__ float warp_sum(float x) {
  for (int m = 16; m > 0; m >>= 1) x += __shfl_xor_sync(FULL, x, m);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
  for (int m = 16; m > 0; m >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, m));
  return x;
}

#ifdef PIPE_EMULATE
// C += A·B, 16×8×16, see above.
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct In { uint32_t a[4], b[2]; } in;
  memcpy(in.a, a, 16);
  memcpy(in.b, b, 8);
  emulate::collective(&in, &c, [](const void** given, void** wanted) {
    float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; lane++) {
      auto& own = *static_cast<const In*>(given[lane]);
      int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; i++) {
        int row = g + (i & 1) * 8, k = 2 * t + (i >> 1) * 8;
        A[row][k] = low2(own.a[i]);
        A[row][k + 1] = high2(own.a[i]);
      }
      for (int i = 0; i < 2; i++) {
        B[2 * t + 8 * i][g] = low2(own.b[i]);
        B[2 * t + 8 * i + 1][g] = high2(own.b[i]);
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      auto c = static_cast<float*>(wanted[lane]);
      int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; i++) {
        int row = g + (i >> 1) * 8, column = 2 * t + (i & 1);
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += A[row][k] * B[k][column];
        c[i] += sum;
      }
    }
  });
}
namespace emulate {
template <int N, bool Transposed> void ldmatrix(uint32_t* out, const void* row) {
  struct Out { uint32_t* to; };
  Out result{out};
  collective(row, &result, [](const void** given, void** wanted) {
    uint16_t m[N][8][8];
    for (int i = 0; i < 8 * N; i++) {
      if (reinterpret_cast<uintptr_t>(given[i]) % 16) { fprintf(stderr, "ldmatrix: address not aligned\n"); abort(); }
      memcpy(m[i / 8][i % 8], given[i], 16);
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < N; i++) {
        int g = lane / 4, t = 2 * (lane % 4);
        uint32_t low = Transposed ? m[i][t][g] : m[i][g][t], high = Transposed ? m[i][t + 1][g] : m[i][g][t + 1];
        static_cast<Out*>(wanted[lane])->to[i] = low | high << 16;
      }
  });
}
inline void do_copy(const Copy& copy) {
  memset(copy.to, 0, copy.bytes);
  memcpy(copy.to, copy.from, copy.source_bytes);
}
}  // namespace emulate
// Lane i gives the address (shared memory, 16-byte aligned) of row i % 8 of 8×8 matrix i / 8.
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulate::ldmatrix<4, false>(r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emulate::ldmatrix<4, true>(r, row); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) { emulate::ldmatrix<2, false>(r, row); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) { emulate::ldmatrix<2, true>(r, row); }
// 16 bytes from global to shared memory in the background; zeros instead when not `valid`.
inline void cp_async16(void* to, const void* from, bool valid = true) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16)) {
    fprintf(stderr, "cp_async16: address not aligned\n");
    abort();
  }
  emulate::Copy copy{to, from, 16, valid ? 16 : 0};
  if (emulate::order & emulate::COPY_AT_ONCE) return emulate::do_copy(copy);
  emulate::block->current->open.push_back(copy);
}
inline void cp_async_commit() {
  auto self = emulate::block->current;
  self->copies.push_back(std::move(self->open));
  self->open.clear();
}
// Waits until at most N of this thread's newest groups are open.
template <int N> void cp_async_wait() {
  auto& copies = emulate::block->current->copies;
  while (int(copies.size()) > N) {
    for (auto& copy : copies.front()) emulate::do_copy(copy);
    copies.pop_front();
  }
}
#else
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void cp_async16(void* to, const void* from, bool valid = true) {
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}
#endif
