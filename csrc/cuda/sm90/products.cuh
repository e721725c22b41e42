// Matrix products of one warp on tensor cores.
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
template <class W, int kTiles, int kAhead>
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
  for (int begin = 0; begin < inner; begin += 16 * kAhead) {
    uint4 raw[kAhead][4];
#pragma unroll
    for (int step = 0; step < kAhead; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        raw[step][i] = ptx::load_once(from + (min(begin + 16 * step, inner - 16) + i) * stride);
#pragma unroll
    for (int step = 0; step < kAhead; ++step) {
      const int k = begin + 16 * step;
      if (k >= inner) break;
      const uint32_t words[4][4] = {
          {raw[step][0].x, raw[step][0].y, raw[step][0].z, raw[step][0].w},
          {raw[step][1].x, raw[step][1].y, raw[step][1].z, raw[step][1].w},
          {raw[step][2].x, raw[step][2].y, raw[step][2].z, raw[step][2].w},
          {raw[step][3].x, raw[step][3].y, raw[step][3].z, raw[step][3].w}};
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
}

// ---- rows of activations times a weight matrix with a row per column ----
//
// A lane reads 16 bytes of a weight row: k 8t .. 8t + 7 of each 32, the right operand of two steps.
// Rows of activations lie in shared memory so that load_matrices finds the same k in the same
// place: element 8t + 4s + 2h + e of each 32 is element 2t + e of piece 2s + h of 16 bytes. In the
// second two of each four 32s, s is 1 - s, which spreads stores over banks.

// Where the 4-byte words of elements at .. at + 7 go, as byte offsets into the row.
struct RowWords {
  int begin, swap;

  __device__ __forceinline__ explicit RowWords(int at)
      : begin(at / 32 * 64 + at / 8 % 4 * 4), swap(at / 64 % 2 * 2) {}
  __device__ __forceinline__ int operator[](int word) const { return begin + 16 * (word ^ swap); }
};

// The weight rows of the 8 * kCodeTiles codes from `code` on; kCodeRows, the padding of a weight
// matrix, is a multiple of that many. One pointer and constant steps: a pointer a row costs
// registers that spill (batch 512: 149 us, so 142 on an H200, 2026-11-22).
template <class W, int kCodeTiles>
struct CodeTile {
  static_assert(kCodeRows % (8 * kCodeTiles) == 0, "rows past the last code are in memory");
  const W* first;
  int hidden;

  __device__ __forceinline__ CodeTile(const W* weight, int width, int code)
      : first(weight + static_cast<int64_t>(code + lane_index() / 4) * width +
              8 * (lane_index() % 4)),
        hidden(width) {}
  __device__ __forceinline__ void load(uint4 (&piece)[kCodeTiles], int k) const {
#pragma unroll
    for (int i = 0; i < kCodeTiles; ++i) piece[i] = ptx::load_once(first + 8 * i * hidden + k);
  }
};

// The rows of kRowTiles tiles, row_bytes apart, as this lane hands them to load_matrices. Only
// `limit` rows are there; those of the last tile beyond it are read as the last one.
template <int kRowTiles>
struct RowTiles {
  uint32_t first, last;  // of this lane's rows
  int row_bytes;

  __device__ __forceinline__ RowTiles(const char* rows, int bytes, int limit) : row_bytes(bytes) {
    const int lane = lane_index();
    const auto base = static_cast<uint32_t>(__cvta_generic_to_shared(rows)) +
                      16 * static_cast<uint32_t>(lane / 16);
    first = base + static_cast<uint32_t>(lane % 16 * bytes);
    last = base + static_cast<uint32_t>(min(16 * (kRowTiles - 1) + lane % 16, limit - 1) * bytes);
  }
  __device__ __forceinline__ uint32_t address(int tile) const {
    return tile + 1 < kRowTiles ? first + static_cast<uint32_t>(16 * tile * row_bytes) : last;
  }
};

// sum[m][i] += rows of tile m times codes of tile i over k .. k + 31. Lane (g, t) holds rows g and
// g + 8 and codes 2t and 2t + 1: sum[m][i][2 * (row / 8) + code % 2].
template <class W, int kRowTiles, int kCodeTiles>
__device__ __forceinline__ void multiply_rows(const RowTiles<kRowTiles>& rows, int k,
                                              const uint4 (&w)[kCodeTiles],
                                              float (&sum)[kRowTiles][kCodeTiles][4]) {
  const int swap = k / 64 % 2;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const auto offset = static_cast<uint32_t>(2 * k + 32 * (s ^ swap));
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      uint32_t a[4];
      ptx::load_matrices(a, rows.address(m) + offset);
#pragma unroll
      for (int i = 0; i < kCodeTiles; ++i) {
        if (s == 0) {
          ptx::mma<W>(sum[m][i], a[0], a[1], a[2], a[3], w[i].x, w[i].y);
        } else {
          ptx::mma<W>(sum[m][i], a[0], a[1], a[2], a[3], w[i].z, w[i].w);
        }
      }
    }
  }
}

}  // namespace sidmlp::cuda::sm90
