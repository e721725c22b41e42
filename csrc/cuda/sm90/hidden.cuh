// A hidden row by one warp, in registers: h = GELU(LN(first + sum_j P_{l,j}[c_j])), where `first`
// is the context part of the first layer; in units of gelu_unit<W>.
#pragma once

#include "cuda/sm90/products.cuh"
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

// Element 8 * (32 v + lane) + i of the row is x[v][i]; elements past H are zero. kFull: there are
// none.
template <int kVectors, bool kFull>
struct HiddenRow {
  float x[kVectors][8];
};

// Gain and shift of a head's LayerNorm where a lane needs them: of few elements in registers, for
// all rows of a level, of many loaded again for each row.
template <int kVectors, bool kFull>
struct NormVectors {
  static constexpr bool kHeld = kVectors <= 2;
  static constexpr int kParts = kHeld ? 2 * kVectors : 1;
  const float* gain;
  int hidden;
  float4 held[2][kParts];

  __device__ __forceinline__ NormVectors(const HeadsView& heads, int level)
      : gain(heads.heads[level].vectors), hidden(kFull ? 8 * kWarp * kVectors : heads.hidden_dim) {
    if constexpr (kHeld) {
#pragma unroll
      for (int which = 0; which < 2; ++which)
#pragma unroll
        for (int part = 0; part < kParts; ++part) held[which][part] = load(which, part);
    }
  }
  // Gain (0) or shift (1) of elements 8 * (32 v + lane) + 4 * half ..; part = 2 v + half.
  __device__ __forceinline__ float4 get(int which, int part) const {
    if constexpr (kHeld) return held[which][part];
    return load(which, part);
  }

 private:
  __device__ __forceinline__ float4 load(int which, int part) const {
    const int at = 8 * (kWarp * (part / 2) + lane_index());
    if (!kFull && at >= hidden) return {0.0f, 0.0f, 0.0f, 0.0f};
    return ptx::load_here(gain + which * hidden + at + part % 2 * 4);
  }
};

// `staged`: rows of the prefix tables of the first `num_staged` codes are in shared memory already,
// staged_bytes apart.
template <class W, int kVectors, bool kFull>
__device__ __forceinline__ void hidden_row(const HeadsView& heads, int level,
                                           const NormVectors<kVectors, kFull>& norm,
                                           const float* first, const Prefix& prefix,
                                           const char* staged, int staged_bytes, int num_staged,
                                           HiddenRow<kVectors, kFull>& row) {
  const int lane = lane_index(), hidden = kFull ? 8 * kWarp * kVectors : heads.hidden_dim;
  const W* table = static_cast<const W*>(heads.heads[level].prefix_table);
  bool inside[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = 8 * (kWarp * v + lane);
    inside[v] = kFull || at < hidden;
    float4 a{0.0f, 0.0f, 0.0f, 0.0f}, b = a;
    if (inside[v]) {
      a = *reinterpret_cast<const float4*>(first + at);
      b = *reinterpret_cast<const float4*>(first + at + 4);
    }
    row.x[v][0] = a.x, row.x[v][1] = a.y, row.x[v][2] = a.z, row.x[v][3] = a.w;
    row.x[v][4] = b.x, row.x[v][5] = b.y, row.x[v][6] = b.z, row.x[v][7] = b.w;
  }
  int offset = 0;  // of a level's rows in the table
  auto load = [&](int j, uint4(&raw)[kVectors]) {
    const auto at = static_cast<uint32_t>((offset + prefix.code(j)) * hidden + 8 * lane);
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (inside[v]) raw[v] = __ldg(reinterpret_cast<const uint4*>(table + at + 8 * kWarp * v));
    offset += heads.heads[j].num_codes;
  };
  auto add = [&](const uint4(&raw)[kVectors]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!inside[v]) continue;
      float entry[8];
      widen_eight<W>(raw[v], entry);
#pragma unroll
      for (int i = 0; i < 8; ++i) row.x[v][i] += entry[i];
    }
  };
#pragma unroll 1
  for (int j = 0; j < level; ++j) {
    uint4 raw[kVectors];
    if (j < num_staged) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (inside[v])
          raw[v] =
              *reinterpret_cast<const uint4*>(staged + j * staged_bytes + 16 * (kWarp * v + lane));
      offset += heads.heads[j].num_codes;
    } else {
      load(j, raw);
    }
    add(raw);
  }

  // Four sums each: a chain of 16 additions is longer than the reduction that follows.
  float part[4] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int i = 0; i < 8; ++i) part[i % 4] += row.x[v][i];
  const float scale_width = 1.0f / static_cast<float>(hidden);
  const float mean = warp_sum((part[0] + part[1]) + (part[2] + part[3])) * scale_width;
#pragma unroll
  for (int i = 0; i < 4; ++i) part[i] = 0.0f;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      row.x[v][i] -= mean;
      if (inside[v]) part[i % 4] = fmaf(row.x[v][i], row.x[v][i], part[i % 4]);
    }
  }
  const float squares = warp_sum((part[0] + part[1]) + (part[2] + part[3]));
  const float scale = rsqrtf(fmaf(squares, scale_width, heads.layer_norm_eps));
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (!inside[v]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) row.x[v][i] = 0.0f;
      continue;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 a = norm.get(0, 2 * v + half), b = norm.get(1, 2 * v + half);
      float* x = row.x[v] + 4 * half;
      x[0] = gelu<W>(fmaf(x[0] * scale, a.x, b.x));
      x[1] = gelu<W>(fmaf(x[1] * scale, a.y, b.y));
      x[2] = gelu<W>(fmaf(x[2] * scale, a.z, b.z));
      x[3] = gelu<W>(fmaf(x[3] * scale, a.w, b.w));
    }
  }
}

// Begins to copy the rows of the prefix tables of the first `num_staged` codes to `staged`.
template <class W, int kVectors, bool kFull>
__device__ __forceinline__ void stage_row(const HeadsView& heads, int level, const Prefix& prefix,
                                          char* staged, int staged_bytes, int num_staged) {
  const int lane = lane_index(), hidden = kFull ? 8 * kWarp * kVectors : heads.hidden_dim;
  const W* table = static_cast<const W*>(heads.heads[level].prefix_table);
  int offset = 0;
#pragma unroll 1
  for (int j = 0; j < num_staged; ++j) {
    const W* from = table + static_cast<uint32_t>((offset + prefix.code(j)) * hidden);
    const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(staged + j * staged_bytes));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int at = 8 * (kWarp * v + lane);
      if (kFull || at < hidden) ptx::copy_piece(to + 2 * at, from + at);
    }
    offset += heads.heads[j].num_codes;
  }
}

// body(byte offset, word) for the 4-byte words of the row in W, where RowWords places them.
template <class W, int kVectors, bool kFull, class Body>
__device__ __forceinline__ void for_words(const HiddenRow<kVectors, kFull>& row, int hidden,
                                          const Body& body) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = 8 * (kWarp * v + lane_index());
    if (!kFull && at >= hidden) continue;
    const RowWords words(at);
#pragma unroll
    for (int i = 0; i < 4; ++i) body(words[i], narrow_two<W>(row.x[v][2 * i], row.x[v][2 * i + 1]));
  }
}

// Dot products of the row with four rows of codes; lane / 8 says whose sum a lane returns.
template <class W, int kVectors, bool kFull>
__device__ __forceinline__ float four_dots(const HiddenRow<kVectors, kFull>& row, int hidden,
                                           const W* const (&codes)[4]) {
  float sum[4] = {};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int at = 8 * (kWarp * v + lane_index());
    uint4 raw[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      raw[j] = uint4{0, 0, 0, 0};
      if (kFull || at < hidden) raw[j] = __ldg(reinterpret_cast<const uint4*>(codes[j] + at));
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
