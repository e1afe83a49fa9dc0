// Columns of the orientation loss (see orient.cuh): dB, unscaled, with coldot.
//
//   grid (batch·heads·⌈seq/128⌉), block Sizes<dim, N>::THREADS (128, or 256 where dim + 3 N > 256),
//   shared 2·(64·(dim + N + 16)·2 + 1280) bytes
#include "orient.cuh"

#define COLUMNS(DIM, N)                                                                                           \
  extern "C" __global__ void __launch_bounds__(orient::Sizes<DIM, N>::THREADS, orient::Sizes<DIM, N>::RESIDENT) \
      orient_columns_d##DIM##_n##N(const bf16* q, const bf16* k, int qk_stride, const float* lse_bhl,             \
                                   const bf16* b, const bf16* c, int bc_stride, const float* cs_bhl,              \
                                   const float* d_h, const uint32_t* starts_n, bf16* db, int d_stride,            \
                                   float* coldot_bhl, int batch, int seq, int heads, int kv_heads) {              \
    orient::run<DIM, N, true, true>({k, q, qk_stride, lse_bhl, b, c, bc_stride, cs_bhl, d_h, starts_n, db,        \
                                     d_stride, coldot_bhl, nullptr, batch, seq, heads, kv_heads});                \
  }                                                                                                               \
  REGISTER(orient_columns_d##DIM##_n##N)

COLUMNS(32, 16)
COLUMNS(32, 32)
COLUMNS(32, 64)
COLUMNS(32, 128)
COLUMNS(64, 16)
COLUMNS(64, 32)
COLUMNS(64, 64)
COLUMNS(64, 128)
COLUMNS(128, 16)
COLUMNS(128, 32)
COLUMNS(128, 64)
COLUMNS(128, 128)
