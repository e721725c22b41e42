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

// ---- products with a weight matrix [out, in] straight from global memory ----
//
// The weights are the left operand of mma and the rows the right one: what a lane reads of a row is
// then the operand as it is.

// 16 columns of the product (rows of the weight matrix) times 8 rows: lane (g, t) holds columns g
// and g + 8 of rows 2t and 2t + 1 in sum[2 * (column / 8) + row % 2].
using ColumnTile = float[4];

// This lane's part of the weights of kC column tiles for 32 steps of the inner sum.
template <int kC>
struct WeightPiece {
  uint4 low[kC], high[kC];  // of columns g and g + 8

  template <class W>
  __device__ __forceinline__ void load(const W* const (&from)[kC], int stride8, int k) {
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      low[c] = __ldg(reinterpret_cast<const uint4*>(from[c] + k));
      high[c] = __ldg(reinterpret_cast<const uint4*>(from[c] + stride8 + k));
    }
  }
};

// sum[c][n] += column tile c times rows 8n .. 8n + 7 from `base` on, over 32 steps.
template <class W, int kC, int kN>
__device__ __forceinline__ void multiply_step(uint32_t base, int row_bytes,
                                              const WeightPiece<kC>& w, ColumnTile (&sum)[kC][kN]) {
  uint4 x[kN];
#pragma unroll
  for (int n = 0; n < kN; ++n)
    x[n] = ptx::load_piece(base + static_cast<uint32_t>(8 * n * row_bytes));
#pragma unroll
  for (int c = 0; c < kC; ++c)
#pragma unroll
    for (int n = 0; n < kN; ++n)
      ptx::mma<W>(sum[c][n], w.low[c].x, w.high[c].x, w.low[c].y, w.high[c].y, x[n].x, x[n].y);
#pragma unroll
  for (int c = 0; c < kC; ++c)
#pragma unroll
    for (int n = 0; n < kN; ++n)
      ptx::mma<W>(sum[c][n], w.low[c].z, w.high[c].z, w.low[c].w, w.high[c].w, x[n].z, x[n].w);
}

// sum <- kC column tiles, whose weight rows begin at from[c] for this lane's column g and at
// from[c] + stride8 for g + 8, times 8 * kN rows from first_row on. `inner` is a multiple of 16.
// The order of the additions depends on `inner` alone.
template <class W, int kC, int kN>
__device__ __forceinline__ void multiply(const Rows& rows, int first_row, int inner,
                                         const W* const (&weight)[kC], int stride8,
                                         ColumnTile (&sum)[kC][kN]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const LanePieces pieces;
  const uint32_t base = rows.row(first_row + g);
#pragma unroll
  for (int c = 0; c < kC; ++c)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[c][n][j] = 0.0f;
  const int whole = inner / 32 * 32;
  const W* from[kC];
#pragma unroll
  for (int c = 0; c < kC; ++c) from[c] = weight[c] + 8 * t;
  WeightPiece<kC> even{}, odd{};  // a register that may not be set would be kept for all the kernel
  if (whole > 0) even.load(from, stride8, 0);
  if (whole > 32) odd.load(from, stride8, 32);
#pragma unroll 1
  for (int k = 0; k < whole; k += 64) {
    multiply_step<W, kC, kN>(base + pieces.at(k), rows.bytes, even, sum);
    if (k + 64 < whole) even.load(from, stride8, k + 64);
    if (k + 32 < whole) {
      multiply_step<W, kC, kN>(base + pieces.at(k + 32), rows.bytes, odd, sum);
      if (k + 96 < whole) odd.load(from, stride8, k + 96);
    }
  }
  if (whole < inner) {
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      const W* at = weight[c] + whole + 4 * t;
      const uint2 low = __ldg(reinterpret_cast<const uint2*>(at));
      const uint2 high = __ldg(reinterpret_cast<const uint2*>(at + stride8));
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const uint2 x = ptx::load_half_piece(base + pieces.half_at(whole) +
                                             static_cast<uint32_t>(8 * n * rows.bytes));
        ptx::mma<W>(sum[c][n], low.x, high.x, low.y, high.y, x.x, x.y);
      }
    }
  }
}

constexpr int kPartTiles = 3;  // tiles of rows that a warp multiplies at once

template <class W, int kC, int kTiles, class RowOf, class Store>
__device__ __forceinline__ void product_unit(const Rows& rows, int first_tile, int inner,
                                             const W* weight, int stride, int column_tiles,
                                             int begin, const RowOf& row_of, const Store& store) {
  const W* from[kC];
#pragma unroll
  for (int c = 0; c < kC; ++c)
    from[c] =
        weight +
        static_cast<int64_t>(row_of(min(begin + c, column_tiles - 1)) + lane_index() / 4) * stride;
  ColumnTile sum[kC][2 * kTiles];
  multiply<W, kC, 2 * kTiles>(rows, kTileRows * first_tile, inner, from, 8 * stride, sum);
  store(first_tile, begin, sum);
}

// rows [16 * tiles, inner] times columns: column tile c is 16 weight rows from row_of(c) on.
// store(first tile of rows, first column tile, sum[kC][..]) gets each part of the product; column
// tiles from `column_tiles` on are nobody's.
template <class W, int kC, int kBlockWarps, class RowOf, class Store>
__device__ __forceinline__ void product(const Rows& rows, int tiles, int inner, const W* weight,
                                        int stride, int column_tiles, const RowOf& row_of,
                                        const Store& store) {
  const int wide = max((column_tiles + kC - 1) / kC, 1);
  // Of rows: as few as there may be, or else a part for each warp.
  const int parts = max((tiles + kPartTiles - 1) / kPartTiles, min(kBlockWarps / wide, tiles));
  const int units = (column_tiles + kC - 1) / kC * parts;
  for (int unit = warp_index(); unit < units; unit += kBlockWarps) {  // neighbours share columns
    const int part = unit % parts, begin = unit / parts * kC;
    const int first = tiles * part / parts, count = tiles * (part + 1) / parts - first;
    if (count == 3) {
      product_unit<W, kC, 3>(rows, first, inner, weight, stride, column_tiles, begin, row_of,
                             store);
    } else if (count == 2) {
      product_unit<W, kC, 2>(rows, first, inner, weight, stride, column_tiles, begin, row_of,
                             store);
    } else {
      product_unit<W, kC, 1>(rows, first, inner, weight, stride, column_tiles, begin, row_of,
                             store);
    }
  }
}

// 16 rows from `row` on and 16 columns from `column` on, from tiles of rows 0-7 and 8-15 that
// value(half of the rows, i) gives, i as in ColumnTile.
template <class W, class Value>
__device__ __forceinline__ void store_block(const Rows& to, int row, int column,
                                            const Value& value) {
  const int lane = lane_index();
  ptx::store_transposed(
      to.at(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8),
      narrow_two<W>(value(0, 0), value(0, 1)), narrow_two<W>(value(0, 2), value(0, 3)),
      narrow_two<W>(value(1, 0), value(1, 1)), narrow_two<W>(value(1, 2), value(1, 3)));
}

}  // namespace sidmlp::cuda::sm90
