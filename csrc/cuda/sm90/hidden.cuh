// A hidden row by one warp, in registers: h = GELU(LN(first + sum_j P_{l,j}[c_j])), where `first` is
// the context part of the first layer.
#pragma once

#include "cuda/sm90/values.cuh"

namespace sidmlp::cuda::sm90 {

// Codes of a prefix, 16 bits each.
struct Prefix {
  uint4 words;

  __device__ __forceinline__ int code(int level) const {
    const uint32_t low = level < 2 ? words.x : words.y, high = level < 6 ? words.z : words.w;
    return static_cast<int>((level < 4 ? low : high) >> (16 * (level % 2)) & 0xffffu);
  }
  __device__ __forceinline__ void set(int level, int code) {
    const uint32_t bits = static_cast<uint32_t>(code) << (16 * (level % 2));
    if (level / 2 == 0) words.x |= bits;
    if (level / 2 == 1) words.y |= bits;
    if (level / 2 == 2) words.z |= bits;
    if (level / 2 == 3) words.w |= bits;
  }
};

// Element 8 * (32 v + lane) + i of the row is x[v][i]; elements past H are zero.
template <int kVectors>
struct HiddenRow {
  float x[kVectors][8];
};

template <class W, int kVectors>
__device__ __forceinline__ void hidden_row(const HeadsView& heads, int level, const float* first,
                                           const Prefix& prefix, HiddenRow<kVectors>& row) {
  constexpr int kTables = kVectors <= 2 ? 3 : 1;  // rows of prefix tables in flight
  const int lane = lane_index(), hidden = heads.hidden_dim;
  const HeadView& head = heads.heads[level];
  const W* table = static_cast<const W*>(head.prefix_table);
  bool inside[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = 8 * (kWarp * v + lane);
    inside[v] = at < hidden;
    float4 a{0.0f, 0.0f, 0.0f, 0.0f}, b = a;
    if (inside[v]) {
      a = *reinterpret_cast<const float4*>(first + at);
      b = *reinterpret_cast<const float4*>(first + at + 4);
    }
    row.x[v][0] = a.x, row.x[v][1] = a.y, row.x[v][2] = a.z, row.x[v][3] = a.w;
    row.x[v][4] = b.x, row.x[v][5] = b.y, row.x[v][6] = b.z, row.x[v][7] = b.w;
  }
  int offset = 0;
  for (int begin = 0; begin < level; begin += kTables) {
    uint4 raw[kTables][kVectors];
#pragma unroll
    for (int j = 0; j < kTables; ++j) {
      const W* from =
          table + static_cast<int64_t>(offset + prefix.code(min(begin + j, level - 1))) * hidden;
      if (begin + j < level) offset += heads.heads[begin + j].num_codes;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        raw[j][v] = uint4{0, 0, 0, 0};
        if (begin + j < level && inside[v])
          raw[j][v] = __ldg(reinterpret_cast<const uint4*>(from + 8 * (kWarp * v + lane)));
      }
    }
#pragma unroll
    for (int j = 0; j < kTables; ++j) {
      if (begin + j >= level) break;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float entry[8];
        widen_eight<W>(raw[j][v], entry);
#pragma unroll
        for (int i = 0; i < 8; ++i) row.x[v][i] += entry[i];
      }
    }
  }

  float total = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int i = 0; i < 8; ++i) total += row.x[v][i];
  const float scale_width = 1.0f / static_cast<float>(hidden);
  const float mean = warp_sum(total) * scale_width;
  float squares = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      row.x[v][i] -= mean;
      if (inside[v]) squares = fmaf(row.x[v][i], row.x[v][i], squares);
    }
  }
  const float scale = rsqrtf(fmaf(warp_sum(squares), scale_width, heads.layer_norm_eps));
  const float* gain = head.vectors;
  const float* shift = head.vectors + hidden;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = 8 * (kWarp * v + lane);
    if (!inside[v]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) row.x[v][i] = 0.0f;
      continue;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 a = __ldg(reinterpret_cast<const float4*>(gain + at) + half);
      const float4 b = __ldg(reinterpret_cast<const float4*>(shift + at) + half);
      float* x = row.x[v] + 4 * half;
      x[0] = gelu<W>(fmaf(x[0] * scale, a.x, b.x));
      x[1] = gelu<W>(fmaf(x[1] * scale, a.y, b.y));
      x[2] = gelu<W>(fmaf(x[2] * scale, a.z, b.z));
      x[3] = gelu<W>(fmaf(x[3] * scale, a.w, b.w));
    }
  }
}

// body(byte offset, 16 bytes) for each piece of the row in W.
template <class W, int kVectors, class Body>
__device__ __forceinline__ void for_pieces(const HiddenRow<kVectors>& row, int hidden,
                                           const Body& body) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = 8 * (kWarp * v + lane_index());
    if (at < hidden) body(2 * at, narrow_eight<W>(row.x[v]));
  }
}

// Dot products of the row with four rows of codes; lane / 8 says whose sum a lane returns.
template <class W, int kVectors>
__device__ __forceinline__ float four_dots(const HiddenRow<kVectors>& row, int hidden,
                                           const W* const (&codes)[4]) {
  float sum[4] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = 8 * (kWarp * v + lane_index());
    uint4 raw[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      raw[j] = uint4{0, 0, 0, 0};
      if (at < hidden) raw[j] = __ldg(reinterpret_cast<const uint4*>(codes[j] + at));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float entry[8];
      widen_eight<W>(raw[j], entry);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[j] = fmaf(row.x[v][i], entry[i], sum[j]);
    }
  }
  // Halve the sums and the lanes that share one, in turn: 2 + 1 + 3 shuffles instead of 4 x 5.
  const int lane = lane_index();
  const bool upper = lane & 16, odd = lane & 8;
  const float a = __shfl_xor_sync(kAllLanes, upper ? sum[0] : sum[2], 16);
  const float b = __shfl_xor_sync(kAllLanes, upper ? sum[1] : sum[3], 16);
  const float first = (upper ? sum[2] : sum[0]) + a;
  const float second = (upper ? sum[3] : sum[1]) + b;
  const float c = __shfl_xor_sync(kAllLanes, odd ? first : second, 8);
  float own = (odd ? second : first) + c;
#pragma unroll
  for (int distance = 4; distance > 0; distance /= 2)
    own += __shfl_xor_sync(kAllLanes, own, distance);
  return own;
}

}  // namespace sidmlp::cuda::sm90
