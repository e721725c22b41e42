// The T5 encoder for long requests, by wgmma: one cooperative launch whose blocks, one a
// multiprocessor, go together from phase to phase.
//
// Rows are the valid tokens of a request, padded to tiles of 64. Phases of a layer, with a barrier
// of the whole grid after each:
//
//   dense      a block takes two tiles at a time, a warpgroup each: output product of the last
//              attention and feed-forward into the fp32 residual, which is an accumulator in
//              registers and is in the workspace between phases; then queries, keys and values
//   attention  a block takes two tiles of queries of one head: softmax over all keys of the
//              request, 128 at a time, corrected block by block; queries go straight to registers
//
// A warp of its own copies what products read (weights, keys, values, mixed values) in bulk into a
// ring of 16 KB stages. Which block computes a tile changes no bit of it.
#pragma once

#include "cuda/ptx/bulk.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/wgmma_long.cuh"
#include "cuda/sm90/encoder/long.h"
#include "cuda/sm90/encoder/operands.cuh"
#include "cuda/warp.cuh"

namespace sidmlp::cuda::sm90 {

constexpr int kLongStages = 8;
constexpr int kLongStageBytes = 2 * kLongBlock;  // of a piece, two blocks
constexpr int kLongWarps = 8;                    // that compute
constexpr int kLongWindow = 512;                 // requests among which the next ones are chosen
constexpr int kLongBiasBytes = 64 << 10;         // of the position bias in shared memory
constexpr int kLongKeys = 128;                   // keys between two corrections of a softmax

struct LongShared {
  char stages[kLongStages][kLongStageBytes];
  // Normed rows of a warpgroup, 64 columns after 64; while attention lasts the position bias, in
  // units of log2: float [heads][2 * span + 1], see LongBias.
  alignas(1024) char normed[2][kLongBiasBytes / 2];
  char staging[kLongWarps][16 * kRowBytes];
  alignas(8) uint64_t full[kLongStages], empty[kLongStages];
  int2 tokens[kLongWindow];           // see LongShape::requests
  int tiles_before[kLongWindow + 1];  // of the requests before this one, and the same of pairs of
  int pairs_before[kLongWindow + 1];  // tiles, the last of a request possibly a single one
  int requests;
};

extern __shared__ __align__(1024) char long_memory[];
__device__ __forceinline__ LongShared& long_shared() {
  return *reinterpret_cast<LongShared*>(long_memory);
}

// A barrier of the block for warps whose code has parted: each of its threads, counted.
__device__ __forceinline__ void long_block_barrier() { ptx::named_barrier(4, kLongThreads); }

// A barrier of the grid. All that was written before, by whatever means, is visible after it, by
// whatever means. It is not that of cooperative groups because that one expects all warps of a
// block in one place of the code.
struct LongBarrier {
  unsigned* arrived;  // zero before the first, for all blocks
  unsigned expected;  // so far

  __device__ __forceinline__ void sync() {
    asm volatile("fence.proxy.async;" ::: "memory");
    long_block_barrier();
    expected += gridDim.x;
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1);
      while (*const_cast<volatile unsigned*>(arrived) < expected) {
      }
      __threadfence();
    }
    long_block_barrier();
    asm volatile("fence.proxy.async;" ::: "memory");
  }
};

// A reader's or the writer's place in the ring.
struct LongRing {
  int stage, parity;

  __device__ __forceinline__ uint32_t await(int further = 0) const {
    int at = stage + further, phase = parity;
    if (at >= kLongStages) at -= kLongStages, phase ^= 1;
    auto& shared = long_shared();
    while (!ptx::barrier_try(ptx::shared_address(&shared.full[at]), phase)) {
    }
    __syncwarp();
    return ptx::shared_address(shared.stages[at]);
  }
  __device__ __forceinline__ void step() {
    if (++stage == kLongStages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void release() {
    if (lane_index() == 0) ptx::barrier_arrive(ptx::shared_address(&long_shared().empty[stage]), 1);
    step();
  }
  // Pieces that this warp has no use for.
  __device__ __forceinline__ void pass(int pieces) {
    for (int i = 0; i < pieces; ++i) {
      await();
      release();
    }
  }
};

// Sizes of a model in blocks and pieces; kDim: D.
template <int kDim>
struct LongSizes {
  static constexpr int kWide = kDim / 64;     // blocks along D, and pieces of 128 columns [128, D]
  static constexpr int kHalves = kDim / 128;  // pieces of 64 k [D, 64]

  int heads, chunks, layers;  // chunks: of 128 feed-forward columns

  __device__ __forceinline__ explicit LongSizes(const T5View& m)
      : heads(m.num_heads), chunks(m.ffn_dim / 128), layers(m.num_layers) {}

  // Of the dense phase before layer `layer`.
  __device__ __forceinline__ int dense_pieces(int layer) const {
    const int before = heads * (1 + kHalves) + chunks * (kWide + 2 * kHalves);
    return (layer > 0 ? before : 0) + (layer < layers ? (3 * heads + 1) / 2 * kWide : 0);
  }
};

// The requests whose activations are in the workspace.
struct LongSegment {
  int64_t first;
  int requests, tiles, pairs;

  // Of a place in one of the arrays *_before.
  __device__ __forceinline__ int request_of(const int* before, int at) const {
    int low = 0, high = requests;  // before[low] <= at < before[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (before[middle] <= at) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// Two tiles of queries of one head.
struct LongQueries {
  int request, head, tile, tiles, keys;  // of the segment; tile: the first; tiles: 1 or 2
  int first_tile;                        // of the request
  int blocks;                            // of keys

  __device__ __forceinline__ LongQueries(const LongSegment& segment, int heads, int item) {
    const auto& shared = long_shared();
    request = uniform(segment.request_of(shared.pairs_before, item / heads));
    const int before = uniform(shared.pairs_before[request]);
    const int pairs = uniform(shared.pairs_before[request + 1]) - before;
    const int own = item - before * heads;
    head = own / pairs;
    first_tile = uniform(shared.tiles_before[request]);
    keys = uniform(shared.tiles_before[request + 1]) - first_tile;
    tile = first_tile + 2 * (own % pairs);
    tiles = min(2, first_tile + keys - tile);
    blocks = (keys + 1) / 2;
  }
};

// Where the position bias no longer changes with the distance, and the part of it that is in shared
// memory: offsets -span .. span, or nothing where that is too much.
struct LongBias {
  int reach, span;

  __device__ __forceinline__ LongBias(int reach, int heads) : reach(reach), span(reach + 191) {
    if (static_cast<int64_t>(heads) * (2 * span + 1) * 4 > kLongBiasBytes) span = 0;
  }
};

// 16 rows of 64 columns, of this warp's accumulator, -> their place in a block in global memory;
// `staging`: shared memory of the warp.
template <class W>
__device__ __forceinline__ void long_store_rows(const float (&sum)[8][4], uint32_t staging,
                                                char* block, int warp) {
  const int lane = lane_index();
  store_head_rows<W>(sum, staging);
  __syncwarp();
  auto* to = reinterpret_cast<uint4*>(block + 16 * warp * kRowBytes) + lane;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    __stcg(to + i * kWarp, ptx::load_piece(staging + (i * kWarp + lane) * 16));
  __syncwarp();
}

}  // namespace sidmlp::cuda::sm90
