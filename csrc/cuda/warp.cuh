// What the lanes of one warp do together.
#pragma once

#include "cuda/layout.h"

namespace sidmlp::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLargestFinite = 3.402823466e38f;

__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / kWarp); }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % kWarp); }

// Reductions: every lane gets the result, with the same bits.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

}  // namespace sidmlp::cuda
