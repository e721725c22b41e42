// The T5 encoder of D = 128 and heads of 64 by wgmma: the form for many requests.
//
// A block of three warpgroups takes 192 rows of whole requests, 16-row tiles as in kernel.cuh,
// through all layers. A warpgroup owns 64 rows. Their fp32 residual is the accumulator of the
// products that add to it, and stays in registers from the embedding to the states; queries, mixed
// values and the hidden layer go from accumulator to left operand in registers. Shared memory
// holds normed rows (left operand of the other products), keys and values of one head and of the
// next, and weights: pieces of 16 KB in the order of use, which a warp of its own copies in bulk
// into a ring.
//
// Attention is mma.sync, a warp for each tile: any 16 rows may have keys of their own.
#pragma once

#include <type_traits>

#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sm90/encoder/operands.cuh"
#include "cuda/sm90/encoder/requests.cuh"
#include "cuda/sm90/encoder/wide.h"

namespace sidmlp::cuda::sm90 {

constexpr int kStages = 4;
constexpr int kHeadBuffers = 2;  // of keys and values: no warp waits for the last head's readers
constexpr int kWideWarps = 12;   // that compute
constexpr int kWideRows = kTileRows * kWideTiles;

struct WideShared {
  char stages[kStages][kPieceBytes];
  char normed[3][2][64 * kRowBytes];  // of a warpgroup, columns 0-63 and 64-127
  char keys[kHeadBuffers][kWideRows * kRowBytes];
  char values[kHeadBuffers][kWideRows * kRowBytes];
  EncodeState<kWideTiles, kWideWarps> state;
  alignas(8) uint64_t full[kStages], empty[kStages];
  uint64_t done;              // no more pieces are used
  alignas(16) float bias[4];  // [heads][2 T - 1]
};

extern __shared__ __align__(1024) char wide_memory[];
__device__ __forceinline__ WideShared& wide() {
  return *reinterpret_cast<WideShared*>(wide_memory);
}

// The weights, in pieces as they are used: for each layer, for each head K, V, Q, O, then for each
// 64 hidden columns both matrices.
struct Pieces {
  const char* tiles;
  int heads, chunks, layers;

  __device__ __forceinline__ uint32_t of_layer() const { return 4 * heads + 2 * chunks; }
  // Piece i of a layer -> a stage.
  __device__ __forceinline__ void fetch(int layer, uint32_t i, uint32_t stage) const {
    const uint32_t own = of_layer();
    const uint32_t barrier = ptx::shared_address(&wide().full[stage]);
    const uint32_t to = ptx::shared_address(wide().stages[stage]);
    const char* from = tiles + static_cast<int64_t>(layer) * own * kPieceBytes;
    ptx::barrier_expect(barrier, kPieceBytes);
    // Blocks of a matrix [N, 128] are whole pieces; of a matrix [128, K] a piece is two blocks.
    uint32_t first, apart = 1;
    if (i < 4u * heads) {
      const uint32_t head = i / 4, part = i % 4;
      first = part == 3 ? 6 * heads + head
                        : 2 * ((part == 0   ? heads
                                : part == 1 ? 2 * heads
                                            : 0) +
                               head);
      if (part == 3) apart = heads;
    } else {
      const uint32_t c = (i - 4 * heads) / 2;
      first = i % 2 == 0 ? 8 * heads + 2 * c : 8 * heads + 2 * chunks + c;
      if (i % 2 == 1) apart = chunks;
    }
    ptx::bulk_copy(to, from + first * kTileBytes, kTileBytes, barrier);
    ptx::bulk_copy(to + kTileBytes, from + (first + apart) * kTileBytes, kTileBytes, barrier);
  }
};

template <class W, bool kRelu>
struct WideEncoder {
  const EncodeT5Problem& problem;
  const Pieces pieces;
  int group, warp, lane, g, t;  // warpgroup, warp in it
  uint32_t next;                // piece
  float x[16][4];

  __device__ __forceinline__ int tile() const { return 4 * group + warp; }
  // Shared addresses; constants, so that they hold no registers.
  __device__ __forceinline__ static uint32_t stages() { return ptx::shared_address(wide().stages); }
  __device__ __forceinline__ static uint32_t full() { return ptx::shared_address(wide().full); }
  __device__ __forceinline__ uint32_t normed() const {
    return ptx::shared_address(wide().normed) + group * 16384;
  }

  // Piece next + ahead is there; its shared address.
  __device__ __forceinline__ uint32_t await(uint32_t ahead = 0) const {
    const uint32_t piece = next + ahead, stage = piece % kStages;
    while (!ptx::barrier_try(full() + 8 * stage, piece / kStages & 1)) {
    }
    __syncwarp();
    return stages() + stage * kPieceBytes;
  }
  __device__ __forceinline__ void release() {
    if (lane == 0) ptx::barrier_arrive(ptx::shared_address(&wide().empty[next % kStages]), 1);
    ++next;
  }

  // What RMSNorm multiplies this lane's two rows of x by.
  __device__ __forceinline__ void norm_scale(float (&scale)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 16; ++j)
        sum = fmaf(x[j][2 * r], x[j][2 * r], fmaf(x[j][2 * r + 1], x[j][2 * r + 1], sum));
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      scale[r] = rsqrtf(sum * (1.0f / kWideDim) + problem.model.layer_norm_eps);
    }
  }
  // Normed rows of x -> shared memory of this warpgroup. Rows without a token become zeros.
  __device__ __forceinline__ void norm(const float* gain) const {
    float scale[2];
    norm_scale(scale);
    const bool valid[2] = {wide().state.owner[16 * tile() + g] >= 0,
                           wide().state.owner[16 * tile() + g + 8] >= 0};
    const int row = lane % 8 + lane / 8 % 2 * 8;
    const uint32_t to = normed() + (16 * warp + row) * kRowBytes;
    ptx::named_barrier(1 + group, 128);  // the other warps' products have read the last rows
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 w = __ldg(reinterpret_cast<const float2*>(gain + 8 * (j + i) + 2 * t));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float low = x[j + i][2 * r] * scale[r] * w.x;
          const float high = x[j + i][2 * r + 1] * scale[r] * w.y;
          word[2 * i + r] = valid[r] ? narrow_two<W>(low, high) : 0;
        }
      }
      const uint32_t piece = (j % 8 + lane / 16) ^ (row & 7);
      ptx::store_matrices(to + j / 8 * 8192 + 16 * piece, word[0], word[1], word[2], word[3]);
    }
    ptx::async_fence();
    ptx::named_barrier(1 + group, 128);
  }

  // sum <- normed rows times the piece of 64 columns at `at`: begun, not waited for.
  __device__ __forceinline__ void begin_product(uint32_t at, float (&sum)[8][4]) const {
    const uint64_t a = ptx::swizzled_descriptor(here(normed()));
    const uint64_t b = ptx::swizzled_descriptor(here(at));
    ptx::wgmma_shared<W, false>(sum, a, b);
#pragma unroll
    for (int k = 1; k < 8; ++k) {
      const int step = (k / 4 * 8192 + k % 4 * 32) / 16;
      ptx::wgmma_shared<W, true>(sum, a + step, b + step);
    }
    ptx::wgmma_commit();
  }
  // x += a (64 columns in registers) times the piece at `at`: begun, not waited for.
  __device__ __forceinline__ void begin_sum(const uint32_t (&a)[4][4], uint32_t at) {
    const uint64_t b = ptx::swizzled_descriptor(here(at));
#pragma unroll
    for (int k = 0; k < 4; ++k)
      ptx::wgmma_registers<W, true>(x, a[k][0], a[k][1], a[k][2], a[k][3], b + 2 * k);
    ptx::wgmma_commit();
  }
  // One head: queries in registers, keys and values of this tile's request in shared memory.
  __device__ __forceinline__ void attend(const uint32_t (&q)[4][4], uint32_t key, uint32_t value,
                                         uint32_t head_bias, uint32_t (&out)[4][4]) const {
    const auto& state = wide().state;
    const int first = state.tile_first[tile()], count = state.tile_count[tile()];
    const uint32_t position = ptx::shared_address(state.position) + 4 * first + 8 * t;
    float sum[8][4], most[2] = {kMaskedScore, kMaskedScore}, total[2] = {0.0f, 0.0f};
    uint32_t offset[2];
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[j][e] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r)
      offset[r] =
          head_bias + 4 * (problem.tokens.tokens - 1 - state.position[16 * tile() + g + 8 * r]);
    const uint32_t flip = lane & 7;
    // Keys: matrix lane / 8 is piece lane / 8 of four. Values: as QueryTile.
    const uint32_t key_row = key + (first + lane % 8) * kRowBytes;
    const uint32_t value_row = value + (first + lane % 8 + lane / 8 % 2 * 8) * kRowBytes;
    const uint32_t key_low = (lane / 8 ^ flip) * 16, key_high = ((4 + lane / 8) ^ flip) * 16;
    // Adds keys k .. k + 31; kWhole: all of them are there.
    const auto add_keys = [&](auto whole, int k) {
      constexpr bool kWhole = decltype(whole)::value;
      float score[4][4];
      float high[2] = {most[0], most[1]};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (kWhole || k + 16 * half < count) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int j = 2 * half + i;
            uint32_t low[4], up[4];
            const uint32_t row = key_row + (k + 8 * j) * kRowBytes;
            ptx::load_matrices(low, row + key_low);
            ptx::load_matrices(up, row + key_high);
#pragma unroll
            for (int e = 0; e < 4; ++e) score[j][e] = 0.0f;
            ptx::mma<W>(score[j], q[0][0], q[0][1], q[0][2], q[0][3], low[0], low[1]);
            ptx::mma<W>(score[j], q[1][0], q[1][1], q[1][2], q[1][3], low[2], low[3]);
            ptx::mma<W>(score[j], q[2][0], q[2][1], q[2][2], q[2][3], up[0], up[1]);
            ptx::mma<W>(score[j], q[3][0], q[3][1], q[3][2], q[3][3], up[2], up[3]);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int j = 2 * half + i;
            const uint2 at = ptx::load_half_piece(position + 4 * (k + 8 * j));
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const float b = ptx::load_float((e % 2 == 0 ? at.x : at.y) * 4 + offset[e / 2]);
              const bool there = kWhole || k + 8 * j + 2 * t + e % 2 < count;
              score[j][e] = there ? score[j][e] + b : kMaskedScore;
              high[e / 2] = fmaxf(high[e / 2], score[j][e]);
            }
          }
        } else {
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) score[2 * half + i][e] = kMaskedScore;
        }
      }
      float shrink[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        high[r] = fmaxf(high[r], __shfl_xor_sync(kAllLanes, high[r], 1));
        high[r] = fmaxf(high[r], __shfl_xor_sync(kAllLanes, high[r], 2));
        shrink[r] = ptx::exp2((most[r] - high[r]) * kLog2E);
        most[r] = high[r];
        high[r] *= -kLog2E;
        total[r] *= shrink[r];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] *= shrink[e / 2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (kWhole || k + 16 * half < count) {
          float p[2][4];
#pragma unroll
          for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              p[i][e] = ptx::exp2(fmaf(score[2 * half + i][e], kLog2E, high[e / 2]));
              total[e / 2] += p[i][e];
            }
          const uint32_t a0 = narrow_two<W>(p[0][0], p[0][1]), a1 = narrow_two<W>(p[0][2], p[0][3]);
          const uint32_t a2 = narrow_two<W>(p[1][0], p[1][1]), a3 = narrow_two<W>(p[1][2], p[1][3]);
#pragma unroll
          for (int j = 0; j < 8; j += 2) {
            uint32_t b[4];
            ptx::load_transposed(
                b, value_row + (k + 16 * half) * kRowBytes + ((j + lane / 16) ^ flip) * 16);
            ptx::mma<W>(sum[j], a0, a1, a2, a3, b[0], b[1]);
            ptx::mma<W>(sum[j + 1], a0, a1, a2, a3, b[2], b[3]);
          }
        }
      }
    };
    int k = 0;
#pragma unroll 1
    for (; k + 32 <= count; k += 32) add_keys(std::true_type{}, k);
    if (k < count) add_keys(std::false_type{}, k);
    float scale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += __shfl_xor_sync(kAllLanes, total[r], 1);
      total[r] += __shfl_xor_sync(kAllLanes, total[r], 2);
      scale[r] = total[r] == 0.0f ? 0.0f : 1.0f / total[r];  // 0: a tile of no request
    }
    to_operand<W>(sum, out, [&](float v, int r) { return v * scale[r]; });
  }

  // Keys and values of one head -> shared memory, its queries -> registers. The keys' product is
  // the last of those begun, and with `others` one more piece before it is in use.
  template <bool kOthers>
  __device__ __forceinline__ void finish_keys(float (&key)[8][4], int head, uint32_t (&q)[4][4]) {
    float value[8][4];
    if constexpr (kOthers) {
      ptx::wgmma_wait<1>();
      release();
    }
    const uint32_t second = await(1);
    ptx::wgmma_fence();
    begin_product(second, value);
    ptx::wgmma_wait<1>();
    release();
    store_head_rows<W>(key, keys_of(head) + 16 * tile() * kRowBytes);
    const uint32_t third = await(1);
    ptx::wgmma_fence();
    begin_product(third, key);  // now the queries
    ptx::wgmma_wait<1>();
    release();
    store_head_rows<W>(value, values_of(head) + 16 * tile() * kRowBytes);
    ptx::wgmma_wait<0>();
    release();
    to_operand<W>(key, q, [](float v, int) { return v; });
  }
  // With an odd number of heads a layer's first head has the buffer of the last layer's last one.
  // Whoever stores there has waited for a later piece than that one's output matrix: four stages
  // on, so that every warp has released that matrix, and read the keys before.
  static_assert(kStages == 4 && kHeadBuffers == 2);
  __device__ __forceinline__ static uint32_t keys_of(int head) {
    return ptx::shared_address(wide().keys[head % kHeadBuffers]);
  }
  __device__ __forceinline__ static uint32_t values_of(int head) {
    return ptx::shared_address(wide().values[head % kHeadBuffers]);
  }
  __device__ __forceinline__ void attend_head(const uint32_t (&q)[4][4], int head,
                                              uint32_t (&mixed)[4][4]) const {
    // All keys and values are stored; those of the head before were read.
    EncodeState<kWideTiles, kWideWarps>::barrier();
    attend(q, keys_of(head), values_of(head),
           ptx::shared_address(wide().bias) + 4 * head * (2 * problem.tokens.tokens - 1), mixed);
  }

  __device__ __forceinline__ void attention(const float* gain) {
    norm(gain);
    uint32_t q[4][4], mixed[4][4];
    {
      float key[8][4];
      const uint32_t in = await();
      ptx::wgmma_fence();
      begin_product(in, key);
      finish_keys<false>(key, 0, q);
    }
#pragma unroll 1
    for (int head = 1; head < pieces.heads; ++head) {
      attend_head(q, head - 1, mixed);
      float key[8][4];
      const uint32_t out = await(), in = await(1);
      ptx::wgmma_fence();
      begin_sum(mixed, out);
      begin_product(in, key);
      finish_keys<true>(key, head, q);
    }
    attend_head(q, pieces.heads - 1, mixed);
    const uint32_t out = await();
    ptx::wgmma_fence();
    begin_sum(mixed, out);
    ptx::wgmma_wait<0>();
    release();
  }

  __device__ __forceinline__ void feed_forward(const float* gain) {
    norm(gain);
    const auto act = [](float v, int) {
      return kRelu ? activate<W>(Activation::kRelu, v) : activate<W>(Activation::kGelu, v);
    };
    float sum[8][4];
    uint32_t hidden[4][4];
    const uint32_t first = await();
    ptx::wgmma_fence();
    begin_product(first, sum);
    ptx::wgmma_wait<0>();
    release();
#pragma unroll 1
    for (int chunk = 1; chunk < pieces.chunks; ++chunk) {
      to_operand<W>(sum, hidden, act);
      const uint32_t out = await(), in = await(1);
      ptx::wgmma_fence();
      begin_sum(hidden, out);
      begin_product(in, sum);
      ptx::wgmma_wait<0>();
      release();
      release();
    }
    to_operand<W>(sum, hidden, act);
    const uint32_t out = await();
    ptx::wgmma_fence();
    begin_sum(hidden, out);
    ptx::wgmma_wait<0>();
    release();
  }

  __device__ __forceinline__ void encode(const Group& requests) {
    const auto& state = wide().state;
    const T5View& model = problem.model;
    const int64_t tokens = problem.tokens.tokens;
    auto token_of = [&](int r) {  // of row g or g + 8, among all; negative: none
      const int row = 16 * tile() + g + 8 * r, owner = state.owner[row];
      return owner < 0 ? -1 : (requests.first + owner) * tokens + state.position[row];
    };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t at = token_of(r);
      const W* embedding = nullptr;
      if (at >= 0) {
        const int64_t id = __ldg(problem.tokens.ids + at);
        if (id >= 0 && id < model.vocab_size)
          embedding = static_cast<const W*>(model.embedding) + id * kWideDim;
      }
      const float none = at >= 0 ? __int_as_float(0x7fc00000) : 0.0f;  // an unknown id: NaN
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        float2 two{none, none};
        if (embedding != nullptr)
          two = widen_two<W>(__ldg(reinterpret_cast<const uint32_t*>(embedding + 8 * j + 2 * t)));
        x[j][2 * r] = two.x, x[j][2 * r + 1] = two.y;
      }
    }
#pragma unroll 1
    for (int l = 0; l < pieces.layers; ++l) {
      attention(model.layers[l].attention_gain);
      feed_forward(model.layers[l].ffn_gain);
    }
    float scale[2];
    norm_scale(scale);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (token_of(r) < 0) continue;
      W* to = static_cast<W*>(problem.states) + token_of(r) * kWideDim + 2 * t;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float2 w = __ldg(reinterpret_cast<const float2*>(model.final_gain + 8 * j + 2 * t));
        *reinterpret_cast<uint32_t*>(to + 8 * j) =
            narrow_two<W>(x[j][2 * r] * scale[r] * w.x, x[j][2 * r + 1] * scale[r] * w.y);
      }
    }
  }
};

// Weights layer by layer, again and again -> the ring, until nobody uses them; one warp.
__device__ __forceinline__ void copy_pieces(const Pieces& pieces) {
  auto& shared = wide();
  uint32_t index = 0;
  for (int layer = 0;; layer = layer + 1 == pieces.layers ? 0 : layer + 1)
    for (uint32_t i = 0; i < pieces.of_layer(); ++i, ++index) {
      const uint32_t empty = ptx::shared_address(&shared.empty[index % kStages]);
      while (!ptx::barrier_try(empty, ~(index / kStages) & 1))
        if (ptx::barrier_test(ptx::shared_address(&shared.done), 0)) return;
      if (lane_index() == 0) pieces.fetch(layer, i, index % kStages);
      __syncwarp();
    }
}

template <class W, bool kRelu>
__device__ __forceinline__ void compute_wide(const EncodeT5Problem& problem, const Pieces& pieces) {
  const T5View& model = problem.model;
  const TokensView& tokens = problem.tokens;
  auto& shared = wide();
  auto& state = shared.state;
  constexpr int kThreads = kWarp * kWideWarps;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp;
  for (int h = 0; h < model.num_heads; ++h) {
    const float* from = model.position_bias +
                        static_cast<int64_t>(h) * (2 * model.bias_tokens - 1) + model.bias_tokens -
                        tokens.tokens;
    for (int i = tid; i < 2 * tokens.tokens - 1; i += kThreads)
      shared.bias[h * (2 * tokens.tokens - 1) + i] = __ldg(from + i);
  }
  state.barrier();
  const int warp = uniform(tid / kWarp);
  WideEncoder<W, kRelu> encoder{problem,  pieces,   warp / 4, warp % 4, lane,
                                lane / 4, lane % 4, 0,        {}};
  for (int64_t segment = 0; segment < tokens.batch; segment += kSegment) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kSegment), tokens.batch - segment));
    share_of_segment(tokens, segment, count, static_cast<int>(blockIdx.x),
                     static_cast<int>(gridDim.x), kWideTiles, shared.keys, state);
    const int64_t end = segment + uniform(state.end);
    for (int64_t first = segment + uniform(state.begin); first < end;) {
      Group group = form_group(tokens, first, end, kWideTiles, nullptr, state);
      group.tiles = uniform(group.tiles), group.requests = uniform(group.requests);
      for (int i = kTileRows * group.tiles + tid; i < kWideRows; i += kThreads) {
        state.owner[i] = -1, state.position[i] = 0;
        if (i % kTileRows == 0)
          state.tile_first[i / kTileRows] = state.tile_count[i / kTileRows] = 0;
      }
      state.barrier();
      if (group.tiles > 0) encoder.encode(group);
      clear_masked(tokens, problem.states, kWideDim, group, warp, kWideWarps);
      first += group.requests;
    }
  }
  for (int i = 0; i < kStages; ++i) {  // no copy outlives the block
    encoder.await();
    ++encoder.next;
  }
  if (tid == 0) ptx::barrier_arrive(ptx::shared_address(&shared.done), 1);
}

template <class W, bool kRelu>
__global__ void __launch_bounds__(kWideThreads, 1)
    encode_t5_wide_kernel(const __grid_constant__ EncodeT5Problem problem) {
  const T5View& model = problem.model;
  auto& shared = wide();
  const Pieces pieces{static_cast<const char*>(model.tiles), model.num_heads, model.ffn_dim / 64,
                      model.num_layers};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::barrier_init(ptx::shared_address(&shared.full[i]), 1);
      ptx::barrier_init(ptx::shared_address(&shared.empty[i]), kWideWarps);
    }
    ptx::barrier_init(ptx::shared_address(&shared.done), 1);
    ptx::barrier_init_fence();
  }
  __syncthreads();
  const int warp = uniform(warp_index());
  if (warp >= kWideWarps) {
    ptx::give_registers<32>();
    if (warp == kWideWarps) copy_pieces(pieces);
  } else {
    ptx::take_registers<160>();
    compute_wide<W, kRelu>(problem, pieces);
  }
}

template <class W>
const void* wide_kernel_of(Activation activation) {
  return activation == Activation::kRelu
             ? reinterpret_cast<const void*>(&encode_t5_wide_kernel<W, true>)
             : reinterpret_cast<const void*>(&encode_t5_wide_kernel<W, false>);
}

}  // namespace sidmlp::cuda::sm90
