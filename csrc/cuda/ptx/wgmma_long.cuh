// Products of a warpgroup with sums of 128 columns, both operands from shared memory: as
// wgmma.cuh, one PTX instruction a function.
#pragma once

#include "cuda/ptx/wgmma.cuh"

namespace sidmlp::cuda::ptx {

#define SIDMLP_FOUR(j) "+f"(sum[j][0]), "+f"(sum[j][1]), "+f"(sum[j][2]), "+f"(sum[j][3])
#define SIDMLP_SIXTEEN(j) SIDMLP_FOUR(j), SIDMLP_FOUR(j + 1), SIDMLP_FOUR(j + 2), SIDMLP_FOUR(j + 3)

// N = 128; without kAdd the sum begins at 0.
template <class W, bool kAdd>
__device__ __forceinline__ void wgmma_shared(float (&sum)[16][4], uint64_t a, uint64_t b) {
#define SIDMLP_SHARED(type)                                                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type                           \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "         \
               "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, "      \
               "%29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, "      \
               "%43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, "      \
               "%57, %58, %59, %60, %61, %62, %63}, %64, %65, %66, 1, 1, 0, 0;"              \
               : SIDMLP_SIXTEEN(0), SIDMLP_SIXTEEN(4), SIDMLP_SIXTEEN(8), SIDMLP_SIXTEEN(12) \
               : "l"(a), "l"(b), "n"(kAdd ? 1 : 0))
  if constexpr (std::is_same_v<W, __nv_bfloat16>) {
    SIDMLP_SHARED("bf16.bf16");
  } else {
    SIDMLP_SHARED("f16.f16");
  }
#undef SIDMLP_SHARED
}

#undef SIDMLP_FOUR
#undef SIDMLP_SIXTEEN

}  // namespace sidmlp::cuda::ptx
