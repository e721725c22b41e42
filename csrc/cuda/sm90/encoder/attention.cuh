// Attention of one warp: 16 queries of one head over keys and values in shared memory, with a
// softmax that is corrected block by block.
#pragma once

#include "cuda/sm90/encoder/rows.cuh"

namespace sidmlp::cuda::sm90 {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMasked = -3.0e38f;  // finite: 2^-inf is 0, and it is never the highest

// kHead: the most elements of a head; the head has exactly as many where kExact.
template <class W, int kHead, bool kExact>
struct QueryTile {
  static constexpr int kPairs = kHead / 32, kColumns = kHead / 16;

  int head_dim;
  uint32_t query[kPairs][2][4];
  float sum[kColumns][2][4];  // unnormalised output; columns 16 i + 8 j + 2t, 2t + 1
  float most[2], total[2];    // of rows g and g + 8; `total` of this lane's keys only
  uint32_t offset[2];         // T - 1 - position of the query

  __device__ __forceinline__ bool has(int begin, int width) const {
    return kExact || begin + width <= head_dim;
  }

  // Rows 16 * tile .. of `rows`, columns from `column` on.
  __device__ __forceinline__ void begin(const Rows& rows, int tile, int column, int head,
                                        const int* position, int tokens) {
    head_dim = head;
    const int g = lane_index() / 4;
    const LanePieces pieces;
    const uint32_t low = rows.row(kTileRows * tile + g), high = low + 8 * rows.bytes;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) query[i][e / 4][e % 4] = 0;
      if (has(32 * i, 32)) {
        const uint4 a = ptx::load_piece(low + pieces.at(column + 32 * i));
        const uint4 b = ptx::load_piece(high + pieces.at(column + 32 * i));
        query[i][0][0] = a.x, query[i][0][1] = b.x, query[i][0][2] = a.y, query[i][0][3] = b.y;
        query[i][1][0] = a.z, query[i][1][1] = b.z, query[i][1][2] = a.w, query[i][1][3] = b.w;
      } else if (has(32 * i, 16)) {
        const uint2 a = ptx::load_half_piece(low + pieces.half_at(column + 32 * i));
        const uint2 b = ptx::load_half_piece(high + pieces.half_at(column + 32 * i));
        query[i][0][0] = a.x, query[i][0][1] = b.x, query[i][0][2] = a.y, query[i][0][3] = b.y;
      }
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      most[r] = kMasked;
      total[r] = 0.0f;
      offset[r] = tokens - 1 - position[kTileRows * tile + g + 8 * r];
    }
  }

  // position, bias: shared addresses of int [..], by row, and float [2 T - 1].
  // The keys and values of rows first .. first + count - 1, count in 1 .. kKeyBlock; `column` a
  // multiple of 32.
  __device__ __forceinline__ void add_block(const Rows& keys, const Rows& values, int first,
                                            int count, int column, uint32_t position,
                                            uint32_t bias) {
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    const LanePieces pieces;
    float score[kKeyBlock / 8][4];
    float high[2] = {kMasked, kMasked};
    const uint32_t key_row = keys.row(first + g);
#pragma unroll
    for (int j = 0; j < kKeyBlock / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) score[j][e] = 0.0f;
      if (j / 2 * 16 < count) {
        const uint32_t row = key_row + static_cast<uint32_t>(8 * j * keys.bytes);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          if (has(32 * i, 32)) {
            const uint4 b = ptx::load_piece(row + pieces.at(column + 32 * i));
            ptx::mma<W>(score[j], query[i][0][0], query[i][0][1], query[i][0][2], query[i][0][3],
                        b.x, b.y);
            ptx::mma<W>(score[j], query[i][1][0], query[i][1][1], query[i][1][2], query[i][1][3],
                        b.z, b.w);
          } else if (has(32 * i, 16)) {
            const uint2 b = ptx::load_half_piece(row + pieces.half_at(column + 32 * i));
            ptx::mma<W>(score[j], query[i][0][0], query[i][0][1], query[i][0][2], query[i][0][3],
                        b.x, b.y);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kKeyBlock / 8; ++j) {
      if (j / 2 * 16 < count) {
        const uint2 at = ptx::load_half_piece(position + 4 * (first + 8 * j + 2 * t));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float b = ptx::load_float(bias + 4 * ((e % 2 == 0 ? at.x : at.y) + offset[e / 2]));
          const bool valid = 8 * j + 2 * t + e % 2 < count;
          score[j][e] = valid ? score[j][e] + b : kMasked;
          high[e / 2] = fmaxf(high[e / 2], score[j][e]);
        }
      }
    }
    float shrink[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      high[r] = fmaxf(high[r], __shfl_xor_sync(kAllLanes, high[r], 1));
      high[r] = fmaxf(high[r], __shfl_xor_sync(kAllLanes, high[r], 2));
      high[r] = fmaxf(high[r], most[r]);
      shrink[r] = ptx::exp2((most[r] - high[r]) * kLog2E);
      most[r] = high[r];
      high[r] *= -kLog2E;
      total[r] *= shrink[r];
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] *= shrink[e / 2];
    // Matrix lane / 8: keys 0-7 or 8-15 of a step, columns 0-7 or 8-15.
    const uint32_t value_row = values.row(first + lane % 8 + lane / 8 % 2 * 8);
    const uint32_t value_column = static_cast<uint32_t>(2 * column + lane / 16 * 16);
    const uint32_t flip = swizzle(lane % 8);  // `first` is a multiple of 8
#pragma unroll
    for (int s = 0; s < kKeyBlock / 16; ++s) {
      if (16 * s < count) {
        float p[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            p[j][e] = ptx::exp2(fmaf(score[2 * s + j][e], kLog2E, high[e / 2]));
            total[e / 2] += p[j][e];
          }
        const uint32_t a0 = narrow_two<W>(p[0][0], p[0][1]), a1 = narrow_two<W>(p[0][2], p[0][3]);
        const uint32_t a2 = narrow_two<W>(p[1][0], p[1][1]), a3 = narrow_two<W>(p[1][2], p[1][3]);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          if (has(16 * i, 16)) {
            uint32_t b[4];
            ptx::load_transposed(b, value_row + static_cast<uint32_t>(16 * s * values.bytes) +
                                        ((value_column + 32 * i) ^ flip));
            ptx::mma<W>(sum[i][0], a0, a1, a2, a3, b[0], b[1]);
            ptx::mma<W>(sum[i][1], a0, a1, a2, a3, b[2], b[3]);
          }
        }
      }
    }
  }

  // Normalised output -> rows 16 * tile .. of `to`, columns from `column` on.
  __device__ __forceinline__ void store(const Rows& to, int tile, int column) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += __shfl_xor_sync(kAllLanes, total[r], 1);
      total[r] += __shfl_xor_sync(kAllLanes, total[r], 2);
      scale[r] = 1.0f / total[r];
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (has(16 * i, 16)) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int r = 0; r < 2; ++r)
            ptx::store_word(
                to.at(kTileRows * tile + g + 8 * r, column + 16 * i + 8 * j + 2 * t),
                narrow_two<W>(sum[i][j][2 * r] * scale[r], sum[i][j][2 * r + 1] * scale[r]));
      }
    }
  }
};

}  // namespace sidmlp::cuda::sm90
