// Rows of shared memory times a matrix stored as fragments (mlp_encoder_view.h), which come
// straight from global memory: every load of a warp is contiguous, a few steps ahead.
//
// Half precision goes through tensor cores, fp32 through multiply-adds of the same partition: lane
// (g, t) = (lane / 4, lane % 4) holds columns 8 j + 2 t and 8 j + 2 t + 1 of rows g (sum[m][j][0],
// [1]) and g + 8 ([2], [3]) of tile m. The order of a sum depends on its length alone.
#pragma once

#include <type_traits>

#include "cuda/ptx/mma.cuh"
#include "cuda/sm90/mlp_encoder/numbers.cuh"
#include "cuda/sm90/mlp_encoder/shape.h"
#include "cuda/warp.cuh"

namespace sidmlp::cuda::sm90 {

constexpr int kStep = 16;            // of the inner sum
constexpr int kBlockElements = 256;  // of 16 columns and a step
constexpr int kUnitTiles = 3;        // tiles of rows that a warp multiplies at once

struct MlpRows {
  uint32_t address;  // shared
  int bytes;         // of a row
};

// sum += tiles of rows from first_row on times kC blocks of 16 columns, whose fragments begin at
// weight[c]. The first fragments are on their way once this is made.
template <class W, int kM, int kC>
struct Multiply {
  static constexpr int kAhead = 8 / kC;
  int steps;
  uint32_t at[kM];
  const uint4* from[kC];
  uint4 ring[kAhead][kC];

  __device__ __forceinline__ Multiply(const MlpRows& rows, int first_row, int inner,
                                      const W* const (&weight)[kC])
      : steps(inner / kStep) {
    const int lane = lane_index();
#pragma unroll
    for (int m = 0; m < kM; ++m)
      at[m] = rows.address +
              static_cast<uint32_t>((first_row + kMlpTileRows * m + lane % 16) * rows.bytes +
                                    lane / 16 * 16);
#pragma unroll
    for (int c = 0; c < kC; ++c) from[c] = reinterpret_cast<const uint4*>(weight[c]) + lane;
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int c = 0; c < kC; ++c) ring[i][c] = __ldg(from[c] + min(i, steps - 1) * kWarp);
  }

  __device__ __forceinline__ void step(int i, float (&sum)[kM][2 * kC][4]) const {
    uint32_t a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) ptx::load_matrices(a[m], at[m] + 32 * i);
#pragma unroll
    for (int c = 0; c < kC; ++c)
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint4& b = ring[i][c];
        ptx::mma<W>(sum[m][2 * c], a[m][0], a[m][1], a[m][2], a[m][3], b.x, b.y);
        ptx::mma<W>(sum[m][2 * c + 1], a[m][0], a[m][1], a[m][2], a[m][3], b.z, b.w);
      }
  }

  __device__ __forceinline__ void add_to(float (&sum)[kM][2 * kC][4]) {
    int left = steps;
#pragma unroll 1
    for (; left >= kAhead; left -= kAhead) {
#pragma unroll
      for (int c = 0; c < kC; ++c) from[c] += kAhead * kWarp;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        step(i, sum);
        if (i + kAhead < left) {
#pragma unroll
          for (int c = 0; c < kC; ++c) ring[i][c] = __ldg(from[c] + i * kWarp);
        }
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) at[m] += 32 * kAhead;
    }
#pragma unroll
    for (int i = 0; i + 1 < kAhead; ++i)
      if (i < left) step(i, sum);
  }
};

template <int kM, int kC>
struct Multiply<float, kM, kC> {
  int quads;  // of the inner sum
  uint32_t base;
  int row_bytes;
  const float4* from[kC];

  __device__ __forceinline__ Multiply(const MlpRows& rows, int first_row, int inner,
                                      const float* const (&weight)[kC])
      : quads(inner / 4), row_bytes(rows.bytes) {
    base = rows.address + static_cast<uint32_t>((first_row + lane_index() / 4) * rows.bytes);
#pragma unroll
    for (int c = 0; c < kC; ++c)
      from[c] = reinterpret_cast<const float4*>(weight[c]) + lane_index() % 4 * 4;
  }

  __device__ __forceinline__ void add_to(float (&sum)[kM][2 * kC][4]) const {
#pragma unroll 1
    for (int quad = 0; quad < quads; ++quad) {
      float4 w[kC][4];  // columns (j, e) = (0, 0), (0, 1), (1, 0), (1, 1); four k each
#pragma unroll
      for (int c = 0; c < kC; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) w[c][i] = __ldg(from[c] + quad * 16 + i);
#pragma unroll
      for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 raw = ptx::load_piece(
              base + static_cast<uint32_t>((kMlpTileRows * m + 8 * half) * row_bytes + 16 * quad));
          const float x = __uint_as_float(raw.x), y = __uint_as_float(raw.y);
          const float z = __uint_as_float(raw.z), u = __uint_as_float(raw.w);
#pragma unroll
          for (int c = 0; c < kC; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              float& to = sum[m][2 * c + i / 2][2 * half + i % 2];
              to = fmaf(x, w[c][i].x, to), to = fmaf(y, w[c][i].y, to);
              to = fmaf(z, w[c][i].z, to), to = fmaf(u, w[c][i].w, to);
            }
        }
    }
  }
};

// What the sums begin with is loaded before the products, all of it at once: a load after them
// would wait for the one before. In fp32 it is added last: hundreds of products would each be
// rounded to its size.
template <class W, int kM, int kC, class Begin, class Store>
__device__ __forceinline__ void product_unit(const MlpRows& rows, int first_tile, int inner,
                                             const W* weight, int column_blocks, int first_block,
                                             const Begin& begin, const Store& store) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const W* from[kC];
#pragma unroll
  for (int c = 0; c < kC; ++c)
    from[c] = weight +
              static_cast<int64_t>(min(first_block + c, column_blocks - 1)) * kMlpTileRows * inner;
  Multiply<W, kM, kC> multiply(rows, kMlpTileRows * first_tile, inner, from);
  float sum[kM][2 * kC][4];
  auto each = [&](auto visit) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < 2 * kC; ++j)
          visit(kMlpTileRows * (first_tile + m) + 8 * half + g, 16 * first_block + 8 * j + 2 * t,
                first_block + j / 2 < column_blocks, sum[m][j][2 * half], sum[m][j][2 * half + 1]);
  };
  constexpr bool kLast = std::is_same_v<W, float>;
  each([&](int row, int column, bool real, float& low, float& high) {
    const float2 value = real && !kLast ? begin(row, column) : float2{0.0f, 0.0f};
    low = value.x, high = value.y;
  });
  multiply.add_to(sum);
  if constexpr (kLast) {
    each([&](int row, int column, bool real, float& low, float& high) {
      const float2 value = real ? begin(row, column) : float2{0.0f, 0.0f};
      low += value.x, high += value.y;
    });
  }
  each([&](int row, int column, bool real, float& low, float& high) {
    if (real) store(row, column, low, high);
  });
}

// rows [16 * tiles, inner] times 16 * column_blocks columns, shared out among the block's warps,
// kC blocks of columns and up to three tiles of rows at a time. begin(row, column) gives what the
// sums of a pair of neighbouring columns begin with, store(row, column, value, next) gets them;
// each sees every pair once.
template <class W, int kC, class Begin, class Store>
__device__ __forceinline__ void product(const MlpRows& rows, int tiles, int inner, const W* weight,
                                        int column_blocks, const Begin& begin, const Store& store) {
  const int wide = (column_blocks + kC - 1) / kC;
  // Of rows: as few as there may be, or else a part for each warp.
  const int parts = max((tiles + kUnitTiles - 1) / kUnitTiles, min(kMlpWarps / wide, tiles));
  for (int unit = warp_index(); unit < wide * parts;
       unit += kMlpWarps) {  // neighbours share columns
    const int part = unit % parts, block = unit / parts * kC;
    const int first = tiles * part / parts, count = tiles * (part + 1) / parts - first;
    if (count == 3) {
      product_unit<W, 3, kC>(rows, first, inner, weight, column_blocks, block, begin, store);
    } else if (count == 2) {
      product_unit<W, 2, kC>(rows, first, inner, weight, column_blocks, block, begin, store);
    } else {
      product_unit<W, 1, kC>(rows, first, inner, weight, column_blocks, block, begin, store);
    }
  }
}

}  // namespace sidmlp::cuda::sm90
