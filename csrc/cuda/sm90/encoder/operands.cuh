// Operands of the encoders by wgmma: accumulators as left operands and as rows in shared memory.
#pragma once

#include "cuda/ptx/matrices.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/encoder/activation.cuh"

namespace sidmlp::cuda::sm90 {

constexpr int kRowBytes = 128;               // of a head's row, and of half a normed row
constexpr int kPieceBytes = 16 * 1024;       // weights of one product
constexpr int kTileBytes = kPieceBytes / 2;  // a block of encoder_view.h
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMaskedScore = -3.0e38f;

// The same, computed where it stands: descriptors that are moved out of loops fill the registers.
__device__ __forceinline__ uint32_t here(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The same in every lane, and known to be: else branches on it would serialise wgmma.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(kAllLanes, x, 0); }

// An accumulator [64, 16 * kSteps] as the left operand of the next product; value(element, row of
// two).
template <class W, int kSteps, class Value>
__device__ __forceinline__ void to_operand(const float (&sum)[2 * kSteps][4],
                                           uint32_t (&a)[kSteps][4], const Value& value) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[k][i] = narrow_two<W>(value(sum[2 * k + i / 2][i % 2 * 2], i % 2),
                              value(sum[2 * k + i / 2][i % 2 * 2 + 1], i % 2));
}

// 16 rows of 64 columns, of this warp's accumulator, -> shared memory from `to` on.
template <class W>
__device__ __forceinline__ void store_head_rows(const float (&sum)[8][4], uint32_t to) {
  const int lane = lane_index(), row = lane % 8 + lane / 8 % 2 * 8;
  to += row * kRowBytes;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const uint32_t piece = (j + lane / 16) ^ (row & 7);
    ptx::store_matrices(
        to + 16 * piece, narrow_two<W>(sum[j][0], sum[j][1]), narrow_two<W>(sum[j][2], sum[j][3]),
        narrow_two<W>(sum[j + 1][0], sum[j + 1][1]), narrow_two<W>(sum[j + 1][2], sum[j + 1][3]));
  }
}

}  // namespace sidmlp::cuda::sm90
