// Rows of half-precision activations in shared memory, as shape.h places them, and their product
// with a weight matrix [out, in] that comes straight from global memory.
#pragma once

#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/matrices.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sm90/encoder/shape.h"
#include "cuda/sm90/values.cuh"

namespace sidmlp::cuda::sm90 {

__device__ __forceinline__ uint32_t swizzle(int row) {  // xor'd into a byte offset of a row
  return static_cast<uint32_t>((row & 1) << 6 | (row >> 1 & 3) << 4);
}

struct Rows {
  uint32_t address;  // shared
  int bytes;         // of a row

  __device__ __forceinline__ uint32_t row(int row) const {
    return address + static_cast<uint32_t>(row * bytes);
  }
  // Of the element `column`; the 16 bytes around it are together.
  __device__ __forceinline__ uint32_t at(int row_index, int column) const {
    return row(row_index) + (static_cast<uint32_t>(2 * column) ^ swizzle(row_index));
  }
};

// The pieces of one row that lane t of a group of four reads as its part of a product's operand:
// elements 8t .. 8t + 7 of each 32, which are two steps of mma, or 4t .. 4t + 3 of a last 16. Which
// element stands for which k of mma is free as long as both operands agree.
struct LanePieces {
  uint32_t lane, half, flip;

  __device__ __forceinline__ LanePieces() {
    const uint32_t g = static_cast<uint32_t>(lane_index()) / 4, t = lane_index() % 4;
    const uint32_t s = swizzle(static_cast<int>(g));
    lane = (t << 4) ^ (s & 0x30);
    half = ((t >> 1) << 4 ^ (s & 0x30)) + (t & 1) * 8;
    flip = s & 0x40;
  }
  __device__ __forceinline__ uint32_t at(int k) const {  // k a multiple of 32
    return (static_cast<uint32_t>(2 * k) ^ flip) + lane;
  }
  __device__ __forceinline__ uint32_t half_at(int k) const {
    return (static_cast<uint32_t>(2 * k) ^ flip) + half;
  }
};

// sum[m][i] <- rows of tile m (of `tiles`) times eight columns i, whose weight rows begin at
// weight[i] for this lane's column g. `inner` is a multiple of 16. Lane (g, t) holds rows g, g + 8
// and columns 2t, 2t + 1: sum[m][i][2 * (row / 8) + column % 2]. The order of the additions depends
// on `inner` alone.
template <class W, int kN>
__device__ __forceinline__ void multiply(const Rows& rows, int tiles, int inner,
                                         const W* const (&weight)[kN],
                                         float (&sum)[kMaxTiles][kN][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const LanePieces pieces;
  const uint32_t base = rows.row(g), step = static_cast<uint32_t>(8 * rows.bytes);
#pragma unroll
  for (int m = 0; m < kMaxTiles; ++m)
#pragma unroll
    for (int i = 0; i < kN; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[m][i][j] = 0.0f;
  const int whole = inner / 32 * 32;
  uint4 next[kN];
  if (whole > 0) {
#pragma unroll
    for (int i = 0; i < kN; ++i) next[i] = ptx::load_once(weight[i] + 8 * t);
  }
#pragma unroll 1
  for (int k = 0; k < whole; k += 32) {
    uint4 b[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i) b[i] = next[i];
    if (k + 32 < whole) {
#pragma unroll
      for (int i = 0; i < kN; ++i) next[i] = ptx::load_once(weight[i] + k + 32 + 8 * t);
    }
    const uint32_t from = base + pieces.at(k);
#pragma unroll
    for (int m = 0; m < kMaxTiles; ++m) {
      if (m < tiles) {
        const uint4 low = ptx::load_piece(from + 2 * m * step);
        const uint4 high = ptx::load_piece(from + (2 * m + 1) * step);
#pragma unroll
        for (int i = 0; i < kN; ++i)
          ptx::mma<W>(sum[m][i], low.x, high.x, low.y, high.y, b[i].x, b[i].y);
#pragma unroll
        for (int i = 0; i < kN; ++i)
          ptx::mma<W>(sum[m][i], low.z, high.z, low.w, high.w, b[i].z, b[i].w);
      }
    }
  }
  if (whole < inner) {
    uint2 b[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i)
      b[i] = __ldg(reinterpret_cast<const uint2*>(weight[i] + whole + 4 * t));
    const uint32_t from = base + pieces.half_at(whole);
#pragma unroll
    for (int m = 0; m < kMaxTiles; ++m) {
      if (m < tiles) {
        const uint2 low = ptx::load_half_piece(from + 2 * m * step);
        const uint2 high = ptx::load_half_piece(from + (2 * m + 1) * step);
#pragma unroll
        for (int i = 0; i < kN; ++i)
          ptx::mma<W>(sum[m][i], low.x, high.x, low.y, high.y, b[i].x, b[i].y);
      }
    }
  }
}

// How many columns of eight a warp takes at once, so that the warps are done together.
__device__ __forceinline__ int unit_width(int column_tiles, bool pairs) {
  int best = 4, best_cost = 1 << 30;
#pragma unroll
  for (int n = 4; n >= 2; --n) {
    if (pairs && n == 3) continue;
    const int units = (column_tiles + n - 1) / n;
    const int cost = (units + kWarps - 1) / kWarps * (4 * n + 1);
    if (cost < best_cost) best = n, best_cost = cost;
  }
  return best;
}

template <class W, int kN, class RowOf, class Store>
__device__ __forceinline__ void product_units(const Rows& rows, int tiles, int inner,
                                              const W* weight, int weight_stride, int column_tiles,
                                              const RowOf& row_of, const Store& store) {
  const int g = lane_index() / 4;
  for (int unit = warp_index(); unit * kN < column_tiles; unit += kWarps) {
    const W* from[kN];
#pragma unroll
    for (int i = 0; i < kN; ++i)
      from[i] = weight + static_cast<int64_t>(row_of(min(unit * kN + i, column_tiles - 1)) + g) *
                             weight_stride;
    float sum[kMaxTiles][kN][4];
    multiply<W, kN>(rows, tiles, inner, from, sum);
#pragma unroll
    for (int m = 0; m < kMaxTiles; ++m) {
      if (m < tiles) store(m, unit * kN, sum[m]);
    }
  }
}

// rows [16 * tiles, inner] times columns of eight: column tile c is eight weight rows from
// row_of(c) on, and store(m, first column tile, sum[kN][4]) gets every tile of rows m with kN
// column tiles; those from `column_tiles` on are nobody's. pairs: kN is even.
template <class W, bool kPairs, class RowOf, class Store>
__device__ __forceinline__ void product(const Rows& rows, int tiles, int inner, const W* weight,
                                        int weight_stride, int column_tiles, const RowOf& row_of,
                                        const Store& store) {
  const int width = unit_width(column_tiles, kPairs);
  if (width == 4) {
    product_units<W, 4>(rows, tiles, inner, weight, weight_stride, column_tiles, row_of, store);
  } else if (!kPairs && width == 3) {
    if constexpr (!kPairs)
      product_units<W, 3>(rows, tiles, inner, weight, weight_stride, column_tiles, row_of, store);
  } else {
    product_units<W, 2>(rows, tiles, inner, weight, weight_stride, column_tiles, row_of, store);
  }
}

}  // namespace sidmlp::cuda::sm90
