// Matrix products of one warp on tensor cores. Weights are the left operand, 16 output columns a
// tile, and rows of activations the right one, 8 a tile: a batch that is small wastes little.
//
// A sum over k has no order of its own, so which k a lane's operands hold is free as long as both
// sides agree: each lane takes neighbours, and every load is 8 or 16 bytes.
//
// The order of the additions depends on K alone, never on how columns or rows are shared out.
#pragma once

#include "cuda/ptx/mma.cuh"
#include "cuda/sm90/values.cuh"

namespace sidmlp::cuda::sm90 {

__device__ __forceinline__ uint32_t low_halves(uint32_t x, uint32_t y) {
  return __byte_perm(x, y, 0x5410);
}
__device__ __forceinline__ uint32_t high_halves(uint32_t x, uint32_t y) {
  return __byte_perm(x, y, 0x7632);
}

// sum <- x [8 * kTiles, K] w [K, 64] for an input-major w: 64 columns from `column` on. K is a
// multiple of 16. Lane (g, t) ends up with columns 8g .. 8g + 7 of rows 2t and 2t + 1 of each tile:
// column 8g + 2q + i of row 8n + 2t + r is sum[q][n][2i + r].
template <class W, int kTiles>
__device__ __forceinline__ void input_major_product(const W* weight, int64_t stride, int inner,
                                                    int column, int columns, const char* x,
                                                    int x_bytes, float (&sum)[4][kTiles][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const bool inside = column + 8 * g < columns;
  const W* from = weight + 4 * t * stride + (inside ? column + 8 * g : 0);
  const char* row = x + g * x_bytes + 8 * t;
#pragma unroll
  for (int q = 0; q < 4; ++q)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[q][n][i] = 0.0f;
#pragma unroll 2
  for (int k = 0; k < inner; k += 16) {
    uint4 raw[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) raw[i] = ptx::load_once(from + (k + i) * stride);
    const uint32_t words[4][4] = {{raw[0].x, raw[0].y, raw[0].z, raw[0].w},
                                  {raw[1].x, raw[1].y, raw[1].z, raw[1].w},
                                  {raw[2].x, raw[2].y, raw[2].z, raw[2].w},
                                  {raw[3].x, raw[3].y, raw[3].z, raw[3].w}};
    uint2 b[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      b[n] = *reinterpret_cast<const uint2*>(row + 8 * n * x_bytes + 2 * k);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const uint32_t a0 = low_halves(words[0][q], words[1][q]);
      const uint32_t a1 = high_halves(words[0][q], words[1][q]);
      const uint32_t a2 = low_halves(words[2][q], words[3][q]);
      const uint32_t a3 = high_halves(words[2][q], words[3][q]);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) ptx::mma<W>(sum[q][n], a0, a1, a2, a3, b[n].x, b[n].y);
    }
  }
}

// 16-byte pieces of `kRows` * 8 rows of a weight matrix with a row per column: lane (g, t) holds
// elements 8t .. 8t + 7 of row g of each 8.
template <int kRows>
struct RowPieces {
  uint4 piece[kRows];

  template <class W>
  __device__ __forceinline__ void load(const W* const (&rows)[kRows], int k) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) piece[i] = ptx::load_once(rows[i] + k);
  }
};

// sum += x [8 * kTiles, 32] w^T for 16 * kCodeTiles rows of w; `x` points to the lane's piece of the
// first row.
template <class W, int kCodeTiles, int kTiles>
__device__ __forceinline__ void multiply_pieces(const RowPieces<2 * kCodeTiles>& w, const char* x,
                                                int x_bytes,
                                                float (&sum)[kCodeTiles][kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const uint4 b = *reinterpret_cast<const uint4*>(x + 8 * n * x_bytes);
#pragma unroll
    for (int m = 0; m < kCodeTiles; ++m) {
      const uint4& low = w.piece[2 * m];
      const uint4& high = w.piece[2 * m + 1];
      ptx::mma<W>(sum[m][n], low.x, high.x, low.y, high.y, b.x, b.y);
      ptx::mma<W>(sum[m][n], low.z, high.z, low.w, high.w, b.z, b.w);
    }
  }
}

// Rows that a lane reads of a tile of 16 * kCodeTiles codes from `code` on; beyond the last code
// that code again.
template <class W, int kRows>
__device__ __forceinline__ void code_rows(const W* weight, int hidden, int code, int num_codes,
                                          const W* (&rows)[kRows]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    rows[i] = weight + static_cast<int64_t>(min(code + 8 * i + g, num_codes - 1)) * hidden + 8 * t;
}

}  // namespace sidmlp::cuda::sm90
