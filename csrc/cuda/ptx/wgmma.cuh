// Products of a warpgroup on Hopper's tensor cores: one PTX instruction a function.
//
// sum [64, N] (+)= a [64, 16] b [16, N]: warp w of the group holds rows 16 w .. 16 w + 15, with g =
// lane / 4 and t = lane % 4 columns 8j + 2t, 8j + 2t + 1 of rows g (sum[j][0], [1]) and g + 8
// (sum[j][2], [3]). b, and a where it is not in registers, lies in shared memory with its k
// contiguous, in rows of 128 bytes swizzled as encoder_view.h says of blocks, by descriptor.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sidmlp::cuda::ptx {

// 128-byte swizzle, 1,024 bytes from eight rows to the next; `address` is shared, 1,024-byte
// aligned but for 32 bytes a step of 16 along k.
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t address) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | uint64_t{1} << 16 | uint64_t{64} << 32 |
         uint64_t{1} << 62;
}

// Before the first product after registers of operands were written.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending groups of products are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Operand lists of the instructions below: accumulators first.
#define SIDMLP_FOUR(j) "+f"(sum[j][0]), "+f"(sum[j][1]), "+f"(sum[j][2]), "+f"(sum[j][3])
#define SIDMLP_SUMS_64                                                                            \
  SIDMLP_FOUR(0), SIDMLP_FOUR(1), SIDMLP_FOUR(2), SIDMLP_FOUR(3), SIDMLP_FOUR(4), SIDMLP_FOUR(5), \
      SIDMLP_FOUR(6), SIDMLP_FOUR(7)
#define SIDMLP_SUMS_96 \
  SIDMLP_SUMS_64, SIDMLP_FOUR(8), SIDMLP_FOUR(9), SIDMLP_FOUR(10), SIDMLP_FOUR(11)
#define SIDMLP_SUMS_128 \
  SIDMLP_SUMS_96, SIDMLP_FOUR(12), SIDMLP_FOUR(13), SIDMLP_FOUR(14), SIDMLP_FOUR(15)
#define SIDMLP_NAMES_64                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define SIDMLP_NAMES_96                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "  \
  "%47}, "
#define SIDMLP_NAMES_128                                                         \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, " \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "  \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "  \
  "%62, %63}, "

// N = 64, both operands from shared memory; without kAdd the sum begins at 0.
template <class W, bool kAdd>
__device__ __forceinline__ void wgmma_shared(float (&sum)[8][4], uint64_t a, uint64_t b) {
#define SIDMLP_SHARED(type)                                                           \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type " " SIDMLP_NAMES_64 \
               "%32, %33, %34, 1, 1, 0, 0;"                                           \
               : SIDMLP_SUMS_64                                                       \
               : "l"(a), "l"(b), "n"(kAdd ? 1 : 0))
  if constexpr (std::is_same_v<W, __nv_bfloat16>) {
    SIDMLP_SHARED("bf16.bf16");
  } else {
    SIDMLP_SHARED("f16.f16");
  }
#undef SIDMLP_SHARED
}

// N = 64, 96 or 128 by the sum, a in registers. kAcross: b lies with its columns contiguous, 64 of
// them in a row of 128 bytes, and a step of 16 along k is 2,048 bytes; N = 64 alone.
template <class W, bool kAdd, bool kAcross = false, int kTiles>
__device__ __forceinline__ void wgmma_registers(float (&sum)[kTiles][4], uint32_t a0, uint32_t a1,
                                                uint32_t a2, uint32_t a3, uint64_t b) {
  static_assert(kTiles == 8 || (!kAcross && (kTiles == 12 || kTiles == 16)));
#define SIDMLP_REGISTERS(type, n, k, b0, b1, b2, b3, b4, b5, b6)                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type " " k "{" b0 ", " b1 ", " b2 \
               ", " b3 "}, " b4 ", " b5 ", 1, 1, " b6 ";"                                         \
               : SIDMLP_SUMS                                                                      \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(kAdd ? 1 : 0),                   \
                 "n"(kAcross ? 1 : 0))
  if constexpr (kTiles == 8) {
#define SIDMLP_SUMS SIDMLP_SUMS_64
    if constexpr (std::is_same_v<W, __nv_bfloat16>) {
      SIDMLP_REGISTERS("bf16.bf16", "64", SIDMLP_NAMES_64, "%32", "%33", "%34", "%35", "%36", "%37",
                       "%38");
    } else {
      SIDMLP_REGISTERS("f16.f16", "64", SIDMLP_NAMES_64, "%32", "%33", "%34", "%35", "%36", "%37",
                       "%38");
    }
#undef SIDMLP_SUMS
  } else if constexpr (kTiles == 12) {
#define SIDMLP_SUMS SIDMLP_SUMS_96
    if constexpr (std::is_same_v<W, __nv_bfloat16>) {
      SIDMLP_REGISTERS("bf16.bf16", "96", SIDMLP_NAMES_96, "%48", "%49", "%50", "%51", "%52", "%53",
                       "%54");
    } else {
      SIDMLP_REGISTERS("f16.f16", "96", SIDMLP_NAMES_96, "%48", "%49", "%50", "%51", "%52", "%53",
                       "%54");
    }
#undef SIDMLP_SUMS
  } else if constexpr (kTiles == 16) {
#define SIDMLP_SUMS SIDMLP_SUMS_128
    if constexpr (std::is_same_v<W, __nv_bfloat16>) {
      SIDMLP_REGISTERS("bf16.bf16", "128", SIDMLP_NAMES_128, "%64", "%65", "%66", "%67", "%68",
                       "%69", "%70");
    } else {
      SIDMLP_REGISTERS("f16.f16", "128", SIDMLP_NAMES_128, "%64", "%65", "%66", "%67", "%68", "%69",
                       "%70");
    }
#undef SIDMLP_SUMS
  }
#undef SIDMLP_REGISTERS
}

#undef SIDMLP_FOUR
#undef SIDMLP_SUMS_64
#undef SIDMLP_SUMS_96
#undef SIDMLP_SUMS_128
#undef SIDMLP_NAMES_64
#undef SIDMLP_NAMES_96
#undef SIDMLP_NAMES_128

}  // namespace sidmlp::cuda::ptx
