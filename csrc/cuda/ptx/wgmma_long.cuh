// Products of a warpgroup with sums of 128 or 256 columns: as wgmma.cuh, one PTX instruction a
// function.
#pragma once

#include "cuda/ptx/wgmma.cuh"

namespace sidmlp::cuda::ptx {

#define SIDMLP_FOUR(j) "+f"(sum[j][0]), "+f"(sum[j][1]), "+f"(sum[j][2]), "+f"(sum[j][3])
#define SIDMLP_SIXTEEN(j) SIDMLP_FOUR(j), SIDMLP_FOUR(j + 1), SIDMLP_FOUR(j + 2), SIDMLP_FOUR(j + 3)
#define SIDMLP_SUMS_128 SIDMLP_SIXTEEN(0), SIDMLP_SIXTEEN(4), SIDMLP_SIXTEEN(8), SIDMLP_SIXTEEN(12)
#define SIDMLP_SUMS_256 \
  SIDMLP_SUMS_128, SIDMLP_SIXTEEN(16), SIDMLP_SIXTEEN(20), SIDMLP_SIXTEEN(24), SIDMLP_SIXTEEN(28)
#define SIDMLP_NAMES_64                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
  "%62, %63"
#define SIDMLP_NAMES_128                                                               \
  SIDMLP_NAMES_64                                                                      \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "   \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "   \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "     \
  "%123, %124, %125, %126, %127"

// Both operands from shared memory; without kAdd the sum begins at 0.
template <class W, bool kAdd, int kTiles>
__device__ __forceinline__ void wgmma_both_shared(float (&sum)[kTiles][4], uint64_t a, uint64_t b) {
  static_assert(kTiles == 16 || kTiles == 32);
#define SIDMLP_SHARED(type, n, names, sums, a_at, b_at, k_at)                              \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type " {" names "}, " a_at \
               ", " b_at ", " k_at ", 1, 1, 0, 0;"                                         \
               : sums                                                                      \
               : "l"(a), "l"(b), "n"(kAdd ? 1 : 0))
  if constexpr (kTiles == 16) {
    if constexpr (std::is_same_v<W, __nv_bfloat16>) {
      SIDMLP_SHARED("bf16.bf16", "128", SIDMLP_NAMES_64, SIDMLP_SUMS_128, "%64", "%65", "%66");
    } else {
      SIDMLP_SHARED("f16.f16", "128", SIDMLP_NAMES_64, SIDMLP_SUMS_128, "%64", "%65", "%66");
    }
  } else {
    if constexpr (std::is_same_v<W, __nv_bfloat16>) {
      SIDMLP_SHARED("bf16.bf16", "256", SIDMLP_NAMES_128, SIDMLP_SUMS_256, "%128", "%129", "%130");
    } else {
      SIDMLP_SHARED("f16.f16", "256", SIDMLP_NAMES_128, SIDMLP_SUMS_256, "%128", "%129", "%130");
    }
  }
#undef SIDMLP_SHARED
}

// sum += a in registers times b, N = 128 or 256.
template <class W, int kTiles>
__device__ __forceinline__ void wgmma_add(float (&sum)[kTiles][4], const uint32_t (&a)[4],
                                          uint64_t b) {
  static_assert(kTiles == 16 || kTiles == 32);
  if constexpr (kTiles == 16) {
    wgmma_registers<W, true>(sum, a[0], a[1], a[2], a[3], b);
  } else {
#define SIDMLP_REGISTERS(type)                                                           \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type " {" SIDMLP_NAMES_128 \
               "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 0;"                          \
               : SIDMLP_SUMS_256                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (std::is_same_v<W, __nv_bfloat16>) {
      SIDMLP_REGISTERS("bf16.bf16");
    } else {
      SIDMLP_REGISTERS("f16.f16");
    }
#undef SIDMLP_REGISTERS
  }
}

#undef SIDMLP_FOUR
#undef SIDMLP_SIXTEEN
#undef SIDMLP_SUMS_128
#undef SIDMLP_SUMS_256
#undef SIDMLP_NAMES_64
#undef SIDMLP_NAMES_128

}  // namespace sidmlp::cuda::ptx
