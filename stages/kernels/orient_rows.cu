// Rows of the orientation loss (see orient.cuh): sums and, unscaled, dC with rowdot.
//
//   grid (batch·heads·⌈seq/128⌉), block Sizes<dim, N>::THREADS (128, or 256 where dim + 3 N > 256),
//   shared 2·(64·(dim + N + 16)·2 + 1280) bytes
//   partials f32 [batch·heads, ⌈seq/128⌉, 4]: Σ(M − A)², ΣA², trace(M − A), 0
// `orient_sums_*` writes the partials alone, for held-out figures.
#include "orient.cuh"

#define ROWS(DIM, N)                                                                                              \
  extern "C" __global__ void __launch_bounds__(orient::Sizes<DIM, N>::THREADS, orient::Sizes<DIM, N>::RESIDENT) \
      orient_rows_d##DIM##_n##N(const bf16* q, const bf16* k, int qk_stride, const float* lse_bhl, const bf16* b,  \
                                const bf16* c, int bc_stride, const float* cs_bhl, const float* d_h,              \
                                const uint32_t* starts_n, bf16* dc, int d_stride, float* rowdot_bhl,              \
                                float* partials, int batch, int seq, int heads, int kv_heads) {                   \
    orient::run<DIM, N, false, true>({q, k, qk_stride, lse_bhl, c, b, bc_stride, cs_bhl, d_h, starts_n, dc,       \
                                      d_stride, rowdot_bhl, partials, batch, seq, heads, kv_heads});              \
  }                                                                                                               \
  extern "C" __global__ void __launch_bounds__(orient::Sizes<DIM, N>::THREADS, orient::Sizes<DIM, N>::RESIDENT) \
      orient_sums_d##DIM##_n##N(const bf16* q, const bf16* k, int qk_stride, const float* lse_bhl, const bf16* b,  \
                                const bf16* c, int bc_stride, const float* cs_bhl, const float* d_h,              \
                                const uint32_t* starts_n, float* partials, int batch, int seq, int heads,         \
                                int kv_heads) {                                                                   \
    orient::run<DIM, N, false, false>({q, k, qk_stride, lse_bhl, c, b, bc_stride, cs_bhl, d_h, starts_n, nullptr, \
                                       0, nullptr, partials, batch, seq, heads, kv_heads});                       \
  }                                                                                                               \
  REGISTER(orient_rows_d##DIM##_n##N)                                                                             \
  REGISTER(orient_sums_d##DIM##_n##N)

ROWS(32, 16)
ROWS(32, 32)
ROWS(32, 64)
ROWS(32, 128)
ROWS(64, 16)
ROWS(64, 32)
ROWS(64, 64)
ROWS(64, 128)
ROWS(128, 16)
ROWS(128, 32)
ROWS(128, 64)
ROWS(128, 128)
