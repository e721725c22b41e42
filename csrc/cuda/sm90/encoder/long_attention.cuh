// The attention phases of the long form.
#pragma once

#include "cuda/sm90/encoder/long.cuh"

namespace sidmlp::cuda::sm90 {

// How 128 keys get their position bias.
enum class LongKeys {
  kFar,    // the same for all, and all are there
  kTable,  // from shared memory by row: the request's tokens follow each other
  kLast,   // the same, and some are not there
  kAny     // from global memory by position; some may not be there
};

template <class W>
struct LongAttention {
  const EncodeT5Problem& problem;
  const LongShape& shape;
  char* workspace;
  const LongBias bias;
  const int group, warp, lane;
  LongRing ring;
  float ends[2];            // the bias beyond the reach, before and after the queries
  float most[2], total[2];  // in units of log2, of rows g and g + 8; total: of this lane's keys
  int head, first, count;   // first: row of this warpgroup's queries in the request; its tokens
  int tile, first_tile;     // of the queries, of the request

  __device__ __forceinline__ uint32_t table() const {
    return ptx::shared_address(long_shared().normed);
  }
  __device__ __forceinline__ uint32_t staging() const {
    return ptx::shared_address(long_shared().staging) + (4 * group + warp) * 16 * kRowBytes;
  }
  __device__ __forceinline__ const float* bias_of(int of) const {  // offset 0
    return problem.model.position_bias +
           static_cast<int64_t>(of) * (2 * problem.model.bias_tokens - 1) +
           problem.model.bias_tokens - 1;
  }
  // The bias -> shared memory, where both warpgroups are done with their normed rows.
  __device__ __forceinline__ void load_table() const {
    ptx::named_barrier(3, kLongWarps * kWarp);
    if (bias.span == 0) return;
    const int width = 2 * bias.span + 1, limit = problem.model.bias_tokens - 1;
    auto* to = reinterpret_cast<float*>(long_shared().normed);
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < problem.model.num_heads * width;
         i += kLongWarps * kWarp)
      to[i] = __ldg(bias_of(i / width) + max(-limit, min(limit, i % width - bias.span))) * kLog2E;
  }

  // ---- softmax ----

  // Scores of 128 keys from row `key` on -> weights; `shrink`: of the sums so far.
  template <LongKeys kKeys>
  __device__ __forceinline__ void weigh(float (&s)[16][4], int key, float (&shrink)[2]) {
    const int t = lane % 4, row = 16 * warp + lane / 4;
    float high[2] = {kMaskedScore, kMaskedScore};
    float constant = 0.0f;
    if constexpr (kKeys == LongKeys::kFar) {
      constant = key > first ? ends[1] : ends[0];
#pragma unroll
      for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) high[e / 2] = fmaxf(high[e / 2], s[j][e]);
#pragma unroll
      for (int r = 0; r < 2; ++r) high[r] = fmaf(high[r], kLog2E, constant);
    } else if constexpr (kKeys == LongKeys::kAny) {
      const int* position =
          reinterpret_cast<const int*>(workspace + shape.position) + kLongRows * first_tile;
      const float* from[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) from[r] = bias_of(head) - __ldcg(position + first + row + 8 * r);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int at = key + 8 * j + 2 * t;
        // A last tile without a partner ends the request's positions.
        const int2 of = at < count ? __ldcg(reinterpret_cast<const int2*>(position + at)) : int2{};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float b = __ldg(from[e / 2] + (e % 2 == 0 ? of.x : of.y)) * kLog2E;
          s[j][e] = at + e % 2 < count ? fmaf(s[j][e], kLog2E, b) : kMaskedScore;
          high[e / 2] = fmaxf(high[e / 2], s[j][e]);
        }
      }
    } else {
      // Beyond the reach all offsets are the same: a last block may be there.
      const int offset = max(-(bias.reach + 127), min(bias.reach + 63, key - first));
      const uint32_t from =
          table() + 4 * (head * (2 * bias.span + 1) + bias.span + offset + 2 * t - row);
      float before[2];  // of the row below by eight
#pragma unroll
      for (int e = 0; e < 2; ++e) before[e] = ptx::load_float(from + 4 * (e - 8));
#pragma unroll
      for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float b = ptx::load_float(from + 4 * (8 * j + e));
          const bool there = kKeys == LongKeys::kTable || key + 8 * j + 2 * t + e < count;
          s[j][e] = there ? fmaf(s[j][e], kLog2E, b) : kMaskedScore;
          s[j][2 + e] = there ? fmaf(s[j][2 + e], kLog2E, before[e]) : kMaskedScore;
          before[e] = b;
          high[0] = fmaxf(high[0], s[j][e]), high[1] = fmaxf(high[1], s[j][2 + e]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      high[r] = fmaxf(high[r], __shfl_xor_sync(kAllLanes, high[r], 1));
      high[r] = fmaxf(high[r], __shfl_xor_sync(kAllLanes, high[r], 2));
      high[r] = fmaxf(high[r], most[r]);
      shrink[r] = ptx::exp2(most[r] - high[r]);
      most[r] = high[r];
      total[r] *= shrink[r];
      high[r] = constant - high[r];
    }
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[j][e] = ptx::exp2(kKeys == LongKeys::kFar ? fmaf(s[j][e], kLog2E, high[e / 2])
                                                    : s[j][e] + high[e / 2]);
        total[e / 2] += s[j][e];
      }
  }
  __device__ __forceinline__ LongKeys keys_at(int key, bool follows) const {
    const int offset = key - first;
    const bool whole = key + kLongKeys <= count;
    if (whole && (offset - 63 >= bias.reach || offset + 127 <= -bias.reach)) return LongKeys::kFar;
    if (!follows || bias.span == 0) return LongKeys::kAny;
    return whole ? LongKeys::kTable : LongKeys::kLast;
  }

  // ---- products ----

  __device__ __forceinline__ void begin_scores(const uint32_t (&q)[4][4], uint32_t at,
                                               float (&s)[16][4]) const {
    const uint64_t keys = ptx::swizzled_descriptor(here(at));
    ptx::wgmma_registers<W, false>(s, q[0][0], q[0][1], q[0][2], q[0][3], keys);
#pragma unroll
    for (int k = 1; k < 4; ++k)
      ptx::wgmma_registers<W, true>(s, q[k][0], q[k][1], q[k][2], q[k][3], keys + 2 * k);
    ptx::wgmma_commit();
  }
  __device__ __forceinline__ void begin_values(const uint32_t (&p)[8][4], uint32_t at,
                                               float (&o)[8][4]) const {
    const uint64_t values = ptx::swizzled_descriptor(here(at));
    constexpr uint64_t kStep = 16 * kRowBytes / 16;
#pragma unroll
    for (int k = 0; k < 8; ++k)
      ptx::wgmma_registers<W, true, true>(o, p[k][0], p[k][1], p[k][2], p[k][3],
                                          values + k * kStep);
    ptx::wgmma_commit();
  }

  template <LongKeys kKeys>
  __device__ __forceinline__ void begin(const uint32_t (&q)[4][4], float (&s)[16][4],
                                        uint32_t (&p)[8][4]) {
    float shrink[2];
    const uint32_t at = ring.await();
    ptx::wgmma_fence();
    begin_scores(q, at, s);
    ptx::wgmma_wait<0>();
    ring.release();
    weigh<kKeys>(s, 0, shrink);
    to_operand<W>(s, p, [](float v, int) { return v; });
  }
  // The scores of 128 keys from row `key` on, while the values of those before are added.
  template <LongKeys kKeys>
  __device__ __forceinline__ void advance(const uint32_t (&q)[4][4], int key, float (&s)[16][4],
                                          uint32_t (&p)[8][4], float (&o)[8][4]) {
    float shrink[2];
    const uint32_t keys = ring.await(), values = ring.await(1);
    ptx::wgmma_fence();
    begin_scores(q, keys, s);
    begin_values(p, values, o);
    ptx::wgmma_wait<1>();
    ring.release();
    weigh<kKeys>(s, key, shrink);
    ptx::wgmma_wait<0>();
    ring.release();
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[j][e] *= shrink[e / 2];
    to_operand<W>(s, p, [](float v, int) { return v; });
  }

  // The left operand of scores, from the rows of this warp.
  __device__ __forceinline__ void load_queries(uint32_t (&q)[4][4]) const {
    const int64_t block = static_cast<int64_t>(tile) * 3 * problem.model.num_heads + head;
    const char* rows = workspace + shape.qkv + block * kLongBlock +
                       (16 * warp + lane / 4) * kRowBytes + lane % 4 * 4;
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        q[k][i] = __ldcg(reinterpret_cast<const uint32_t*>(rows + i % 2 * 8 * kRowBytes +
                                                           ((2 * k + i / 2) ^ (lane / 4)) * 16));
  }

  __device__ __forceinline__ void attend(const LongQueries& queries, bool follows) {
    uint32_t q[4][4], p[8][4];
    load_queries(q);
    float s[16][4], o[8][4];
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[j][e] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) most[r] = kMaskedScore, total[r] = 0.0f;
    switch (keys_at(0, follows)) {
      case LongKeys::kFar:
        begin<LongKeys::kFar>(q, s, p);
        break;
      case LongKeys::kTable:
        begin<LongKeys::kTable>(q, s, p);
        break;
      case LongKeys::kLast:
        begin<LongKeys::kLast>(q, s, p);
        break;
      default:
        begin<LongKeys::kAny>(q, s, p);
    }
#pragma unroll 1
    for (int block = 1; block < queries.blocks; ++block) {
      const int key = kLongKeys * block;
      switch (keys_at(key, follows)) {
        case LongKeys::kFar:
          advance<LongKeys::kFar>(q, key, s, p, o);
          break;
        case LongKeys::kTable:
          advance<LongKeys::kTable>(q, key, s, p, o);
          break;
        case LongKeys::kLast:
          advance<LongKeys::kLast>(q, key, s, p, o);
          break;
        default:
          advance<LongKeys::kAny>(q, key, s, p, o);
      }
    }
    const uint32_t at = ring.await();
    ptx::wgmma_fence();
    begin_values(p, at, o);
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += __shfl_xor_sync(kAllLanes, total[r], 1);
      total[r] += __shfl_xor_sync(kAllLanes, total[r], 2);
      scale[r] = 1.0f / total[r];
    }
    ptx::wgmma_wait<0>();
    ring.release();
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[j][e] *= scale[e / 2];
    const int64_t block = static_cast<int64_t>(tile) * problem.model.num_heads + head;
    long_store_rows<W>(o, staging(), workspace + shape.mixed + block * kLongBlock, warp);
  }

  __device__ __forceinline__ void run(const LongSegment& segment) {
    const int heads = problem.model.num_heads;
    for (int item = static_cast<int>(blockIdx.x); item < segment.pairs * heads;
         item += static_cast<int>(gridDim.x)) {
      const LongQueries queries(segment, heads, item);
      if (group >= queries.tiles) {
        ring.pass(2 * queries.blocks);
        continue;
      }
      head = queries.head;
      tile = queries.tile + group, first_tile = queries.first_tile;
      first = kLongRows * (tile - first_tile);
      const int2 tokens = long_shared().tokens[queries.request];
      const int limit = problem.model.bias_tokens - 1;
      ends[0] = __ldg(bias_of(head) - limit) * kLog2E;
      ends[1] = __ldg(bias_of(head) + limit) * kLog2E;
      count = uniform(tokens.x);
      attend(queries, uniform(tokens.y) >= 0);
    }
  }
};

}  // namespace sidmlp::cuda::sm90
