// The T5 encoder of D = 128 and heads of 64 by wgmma for few requests: each has a block, or a
// cluster of 2, 4 or 8 that splits its heads and feed-forward columns.
//
// Two warpgroups own 64 rows each; one without rows stays out. Queries, softmax weights, mixed
// values and hidden columns go from accumulator to left operand in registers. Shared memory holds
// keys and values of a head, and weights: pieces of 16 KB in the order of use, which a warp of its
// own copies in bulk into a ring. split_alone.cuh and split_cluster.cuh have the residual and the
// normed rows, which the two keep differently.
#pragma once

#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/sm90/encoder/operands.cuh"
#include "cuda/sm90/encoder/split.h"

namespace sidmlp::cuda::sm90 {

constexpr int kSplitWarps = 8;           // that compute
constexpr int kSumBytes = 4 * kWideDim;  // of a row of fp32 sums

template <int kBlocks>
struct SplitShared {
  static constexpr bool kAlone = kBlocks == 1;
  static constexpr int kStages = kBlocks == 1 ? 8 : kBlocks == 2 ? 5 : 4;
  static constexpr int kPeerBytes = kSplitRows / kBlocks * kSumBytes;

  char stages[kStages][kPieceBytes];
  // Keys and values of a head, and of the next one: no warp waits for the last head's readers. In
  // a cluster then the block's part of the sums, [128][D] fp32.
  char heads[2][2][kSplitRows * kRowBytes];
  char normed[kAlone ? 16 : 2 * kSplitRows * kRowBytes];              // columns 0-63, then 64-127
  char received[kAlone ? 16 : kBlocks - 1][kAlone ? 1 : kPeerBytes];  // peers' parts, own rows
  alignas(16) int position[kSplitRows];  // of a row's token in its request; 0 where there is none
  alignas(8) uint64_t full[kStages], empty[kStages];
  uint64_t reduced, gathered;  // peers' parts, peers' normed rows are there
  alignas(16) float bias[4];   // [heads of the block][2 T - 1]; alone, then gains [2 L + 1][D]
};
static_assert(sizeof(SplitShared<8>::heads) == kSplitRows * kSumBytes, "a part of the sums");

extern __shared__ __align__(1024) char split_memory[];

template <int kBlocks>
__device__ __forceinline__ SplitShared<kBlocks>& split_shared() {
  return *reinterpret_cast<SplitShared<kBlocks>*>(split_memory);
}

// What block `rank` computes: some heads, and some feed-forward columns in chunks of 64.
struct SplitPart {
  int first_head, heads, first_chunk, chunks;

  __device__ __forceinline__ SplitPart(const T5View& m, int rank, int blocks) {
    const int all = m.ffn_dim / 64;
    first_head = m.num_heads * rank / blocks;
    heads = m.num_heads * (rank + 1) / blocks - first_head;
    first_chunk = all * rank / blocks;
    chunks = all * (rank + 1) / blocks - first_chunk;
  }
  // Pieces a layer: of each head K, V, Q, O; of each two chunks both inputs, then both outputs.
  __device__ __forceinline__ int pieces() const { return 4 * heads + 2 * chunks; }
};

// Piece i of a layer -> a stage.
template <class Shared>
__device__ __forceinline__ void fetch_piece(const T5View& model, const SplitPart& part, int layer,
                                            int i, int stage, Shared& shared) {
  const int heads = model.num_heads, chunks = model.ffn_dim / 64;
  int first, apart = 1;  // blocks of a matrix [N, 128] are whole pieces; of [128, K], two blocks
  if (i < 4 * part.heads) {
    const int head = part.first_head + i / 4, kind = i % 4;
    first = kind == 3 ? 6 * heads + head
                      : 2 * ((kind == 0   ? heads
                              : kind == 1 ? 2 * heads
                                          : 0) +
                             head);
    if (kind == 3) apart = heads;
  } else {
    i -= 4 * part.heads;
    const bool last = i / 4 * 2 + 1 == part.chunks;  // of an odd number
    const bool out = last ? i % 4 == 1 : i % 4 >= 2;
    const int c = part.first_chunk + i / 4 * 2 + (last ? 0 : i % 2);
    first = out ? 8 * heads + 2 * chunks + c : 8 * heads + 2 * c;
    if (out) apart = chunks;
  }
  const uint32_t barrier = ptx::shared_address(&shared.full[stage]);
  const uint32_t to = ptx::shared_address(shared.stages[stage]);
  const char* from = static_cast<const char*>(model.tiles) +
                     static_cast<int64_t>(layer) * (8 * heads + 4 * chunks) * kTileBytes;
  ptx::barrier_expect(barrier, kPieceBytes);
  ptx::bulk_copy(to, from + static_cast<int64_t>(first) * kTileBytes, kTileBytes, barrier);
  ptx::bulk_copy(to + kTileBytes, from + static_cast<int64_t>(first + apart) * kTileBytes,
                 kTileBytes, barrier);
}

// A reader's place in the ring of weights.
template <int kBlocks>
struct SplitRing {
  static constexpr int kStages = SplitShared<kBlocks>::kStages;

  int stage, parity;  // of the oldest piece in use

  // The oldest piece in use, or one `further` on, is there; its shared address.
  __device__ __forceinline__ uint32_t await(int further = 0) const {
    int at = stage + further, phase = parity;
    if (at >= kStages) at -= kStages, phase ^= 1;
    auto& shared = split_shared<kBlocks>();
    while (!ptx::barrier_try(ptx::shared_address(&shared.full[at]), phase)) {
    }
    __syncwarp();
    return ptx::shared_address(shared.stages[at]);
  }
  // This warp is done with the oldest piece, and `warps` are to say so.
  __device__ __forceinline__ void release(int warps) {
    if (lane_index() == 0)
      ptx::barrier_arrive(ptx::shared_address(&split_shared<kBlocks>().empty[stage]),
                          kSplitWarps / warps);
    step();
  }
  __device__ __forceinline__ void step() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  // `pieces` that others used.
  __device__ __forceinline__ void pass(int pieces) {
    const int end = stage + pieces;
    parity ^= end / kStages & 1;
    stage = end % kStages;
  }
};

template <class W, bool kRelu, int kBlocks>
struct SplitEncoder {
  using Shared = SplitShared<kBlocks>;
  // In a cluster products read them where peers put them: own rows' residual needs the registers.
  static constexpr bool kNormedInRegisters = kBlocks == 1;

  const EncodeT5Problem& problem;
  const SplitPart& part;
  SplitRing<kBlocks> ring;
  const int rank, group, warp, lane;  // warp of the block
  int64_t request;
  int count, tiles, active;  // tokens of the request, its tiles of 16 rows, warpgroups with rows
  int buffer;                // of heads
  uint32_t a[kNormedInRegisters ? 8 : 1][4];  // normed rows
  float x[16][4];  // alone the residual, else this block's part of what is added to it

  __device__ __forceinline__ static Shared& shared() { return split_shared<kBlocks>(); }
  __device__ __forceinline__ void barrier() const { ptx::named_barrier(1, 128 * active); }
  __device__ __forceinline__ void release() { ring.release(4 * active); }

  // sum <- normed rows times the piece of 64 columns at `at`: begun, not waited for.
  __device__ __forceinline__ void begin_product(uint32_t at, float (&sum)[8][4]) const {
    const uint64_t b = ptx::swizzled_descriptor(here(at));
    const auto step = [](int k, int half_bytes) { return (k / 4 * half_bytes + k % 4 * 32) / 16; };
    if constexpr (kNormedInRegisters) {
      ptx::wgmma_registers<W, false>(sum, a[0][0], a[0][1], a[0][2], a[0][3], b);
#pragma unroll
      for (int k = 1; k < 8; ++k)
        ptx::wgmma_registers<W, true>(sum, a[k][0], a[k][1], a[k][2], a[k][3],
                                      b + step(k, kTileBytes));
    } else {
      const uint64_t rows = ptx::swizzled_descriptor(
          here(ptx::shared_address(shared().normed) + group * 64 * kRowBytes));
      ptx::wgmma_shared<W, false>(sum, rows, b);
#pragma unroll
      for (int k = 1; k < 8; ++k)
        ptx::wgmma_shared<W, true>(sum, rows + step(k, kSplitRows * kRowBytes),
                                   b + step(k, kTileBytes));
    }
    ptx::wgmma_commit();
  }
  // x += 64 columns in registers times the piece at `at`: begun, not waited for.
  __device__ __forceinline__ void begin_sum(const uint32_t (&from)[4][4], uint32_t at) {
    const uint64_t b = ptx::swizzled_descriptor(here(at));
#pragma unroll
    for (int k = 0; k < 4; ++k)
      ptx::wgmma_registers<W, true>(x, from[k][0], from[k][1], from[k][2], from[k][3], b + 2 * k);
    ptx::wgmma_commit();
  }

  // ---- attention ----

  // One head, its first kKeys keys: all there are, and those that are none weigh nothing.
  template <int kKeys>
  __device__ __forceinline__ void attend(const uint32_t (&q)[4][4], float (&score)[kKeys / 8][4],
                                         uint32_t (&mixed)[4][4]) const {
    const uint64_t keys =
        ptx::swizzled_descriptor(here(ptx::shared_address(shared().heads[buffer][0])));
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      ptx::wgmma_registers<W, true>(score, q[k][0], q[k][1], q[k][2], q[k][3], keys + 2 * k);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    float high[2] = {kMaskedScore, kMaskedScore}, total[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) high[e / 2] = fmaxf(high[e / 2], score[j][e]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      high[r] = fmaxf(high[r], __shfl_xor_sync(kAllLanes, high[r], 1));
      high[r] = fmaxf(high[r], __shfl_xor_sync(kAllLanes, high[r], 2)) * -kLog2E;
    }
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        score[j][e] = ptx::exp2(fmaf(score[j][e], kLog2E, high[e / 2]));
        total[e / 2] += score[j][e];
      }
    uint32_t p[kKeys / 16][4];
    to_operand<W>(score, p, [](float v, int) { return v; });
    float out[8][4];
    const uint64_t values =
        ptx::swizzled_descriptor(here(ptx::shared_address(shared().heads[buffer][1])));
    constexpr uint64_t kStep = 16 * kRowBytes / 16;
    ptx::wgmma_fence();
    ptx::wgmma_registers<W, false, true>(out, p[0][0], p[0][1], p[0][2], p[0][3], values);
#pragma unroll
    for (int k = 1; k < kKeys / 16; ++k)
      ptx::wgmma_registers<W, true, true>(out, p[k][0], p[k][1], p[k][2], p[k][3],
                                          values + k * kStep);
    ptx::wgmma_commit();
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += __shfl_xor_sync(kAllLanes, total[r], 1);
      total[r] += __shfl_xor_sync(kAllLanes, total[r], 2);
      scale[r] = 1.0f / total[r];
    }
    ptx::wgmma_wait<0>();
    to_operand<W>(out, mixed, [&](float v, int r) { return v * scale[r]; });
  }

  // The queries in `sum`, still being computed, and the keys and values in shared memory: mixed.
  template <int kKeys>
  __device__ __forceinline__ void finish_head(float (&sum)[8][4], int head,
                                              uint32_t (&mixed)[4][4]) {
    const int tokens = problem.tokens.tokens, row = 16 * warp + lane / 4, t = lane % 4;
    const uint32_t bias = ptx::shared_address(shared().bias) + 4 * head * (2 * tokens - 1);
    const uint32_t position = ptx::shared_address(shared().position) + 8 * t;
    const uint32_t offset[2] = {bias + 4 * (tokens - 1 - shared().position[row]),
                                bias + 4 * (tokens - 1 - shared().position[row + 8])};
    uint32_t q[4][4];
    const auto take_queries = [&] {
      ptx::wgmma_wait<0>();
      release();
      to_operand<W>(sum, q, [](float v, int) { return v; });
    };
    // While the queries are computed, where registers suffice.
    constexpr bool kEarly = kKeys <= 96;
    if constexpr (!kEarly) take_queries();
    float score[kKeys / 8][4];  // begins with the bias
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      const uint2 at = ptx::load_half_piece(position + 32 * j);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        score[j][e] = 8 * j + 2 * t + e % 2 < count
                          ? ptx::load_float((e % 2 == 0 ? at.x : at.y) * 4 + offset[e / 2])
                          : kMaskedScore;
    }
    if constexpr (kEarly) take_queries();
    barrier();  // all keys and values are stored
    attend<kKeys>(q, score, mixed);
  }

  __device__ __forceinline__ void attention() {
    uint32_t mixed[4][4];
#pragma unroll 1
    for (int head = 0; head < part.heads; ++head) {
      float key[8][4], value[8][4];
      const uint32_t first = ring.await();
      ptx::wgmma_fence();
      begin_product(first, key);
      const uint32_t second = ring.await(1);
      begin_product(second, value);
      ptx::wgmma_wait<1>();
      release();
      const uint32_t to = ptx::shared_address(shared().heads[buffer][0]) + 16 * warp * kRowBytes;
      store_head_rows<W>(key, to);
      const uint32_t third = ring.await(1);
      ptx::wgmma_fence();
      begin_product(third, key);  // now the queries
      ptx::wgmma_wait<1>();
      release();
      store_head_rows<W>(value, to + kSplitRows * kRowBytes);
      ptx::async_fence();
      if (tiles <= 4) {
        finish_head<64>(key, head, mixed);
      } else if (tiles <= 6) {
        finish_head<96>(key, head, mixed);
      } else {
        finish_head<128>(key, head, mixed);
      }
      buffer ^= 1;
      const uint32_t out = ring.await();
      ptx::wgmma_fence();
      begin_sum(mixed, out);
      ptx::wgmma_wait<0>();
      release();
    }
  }

  // ---- feed-forward ----

  __device__ __forceinline__ void feed_forward() {
    const auto act = [](float v, int) {
      return kRelu ? activate<W>(Activation::kRelu, v) : activate<W>(Activation::kGelu, v);
    };
    uint32_t hidden[4][4];
#pragma unroll 1
    for (int chunk = 0; chunk + 1 < part.chunks; chunk += 2) {
      float even[8][4], odd[8][4];
      uint32_t more[4][4];
      const uint32_t first = ring.await();
      ptx::wgmma_fence();
      begin_product(first, even);
      const uint32_t second = ring.await(1);
      begin_product(second, odd);
      ptx::wgmma_wait<1>();
      release();
      to_operand<W>(even, hidden, act);
      const uint32_t third = ring.await(1);
      ptx::wgmma_fence();
      begin_sum(hidden, third);
      ptx::wgmma_wait<1>();
      release();
      to_operand<W>(odd, more, act);
      const uint32_t fourth = ring.await(1);
      ptx::wgmma_fence();
      begin_sum(more, fourth);
      ptx::wgmma_wait<0>();
      release();
      release();
    }
    if (part.chunks % 2 == 0) return;
    float sum[8][4];
    const uint32_t in = ring.await();
    ptx::wgmma_fence();
    begin_product(in, sum);
    ptx::wgmma_wait<0>();
    release();
    to_operand<W>(sum, hidden, act);
    const uint32_t out = ring.await();
    ptx::wgmma_fence();
    begin_sum(hidden, out);
    ptx::wgmma_wait<0>();
    release();
  }

  // ---- rows in global memory ----

  __device__ __forceinline__ int64_t id_of(int row) const {  // -1: of no token
    if (row >= count) return -1;
    return __ldg(problem.tokens.ids + request * problem.tokens.tokens + shared().position[row]);
  }
  __device__ __forceinline__ const W* embedding_of(int64_t id) const {  // nullptr: of no known id
    if (id < 0 || id >= problem.model.vocab_size) return nullptr;
    return static_cast<const W*>(problem.model.embedding) + id * kWideDim;
  }
  __device__ __forceinline__ W* states_of(int row) const {
    return static_cast<W*>(problem.states) +
           (request * problem.tokens.tokens + shared().position[row]) * kWideDim;
  }
};

}  // namespace sidmlp::cuda::sm90
