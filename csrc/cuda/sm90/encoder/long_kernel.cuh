// The kernel of long.cuh: what is found out about a batch first, the copies, and the phases.
#pragma once

#include <cooperative_groups.h>

#include "cuda/sm90/encoder/long_attention.cuh"
#include "cuda/sm90/encoder/long_dense.cuh"

namespace sidmlp::cuda::sm90 {

// ---- before all phases ----

// Tokens of every request, and where its first one is, or -1 where they do not follow each other.
__device__ __forceinline__ void long_count(const TokensView& tokens, int2* requests, int warp,
                                           int warps) {
  const int lane = lane_index();
  for (int64_t request = warp; request < tokens.batch; request += warps) {
    const uint8_t* mask = tokens.mask + request * tokens.tokens;
    int count = 0, low = tokens.tokens, high = -1;
#pragma unroll 8
    for (int t = lane; t < tokens.tokens; t += kWarp) {
      const bool valid = __ldg(mask + t) != 0;
      count += valid;
      low = valid ? min(low, t) : low;
      high = valid ? t : high;
    }
    count = __reduce_add_sync(kAllLanes, count);
    low = __reduce_min_sync(kAllLanes, low);
    high = __reduce_max_sync(kAllLanes, high);
    if (lane == 0) requests[request] = {count, high - low + 1 == count ? low : -1};
  }
}
// States of masked tokens <- zeros.
__device__ __forceinline__ void long_clear(const TokensView& tokens, void* states, int dim,
                                           int warp, int warps) {
  const int64_t count = tokens.batch * tokens.tokens;
  const int lane = lane_index(), pieces = dim / 8;
  for (int64_t begin = static_cast<int64_t>(warp) * kWarp; begin < count;
       begin += static_cast<int64_t>(warps) * kWarp) {
    const bool masked = begin + lane < count && __ldg(tokens.mask + begin + lane) == 0;
    for (unsigned left = __ballot_sync(kAllLanes, masked); left != 0; left &= left - 1) {
      auto* to = static_cast<uint4*>(states) + (begin + __ffs(left) - 1) * pieces;
      for (int piece = lane; piece < pieces; piece += kWarp) to[piece] = uint4{0, 0, 0, 0};
    }
  }
}
// The first distance from which on the position bias does not change, among those that this block
// looks at.
__device__ __forceinline__ void long_reach(const T5View& m, int* reach) {
  const int limit = m.bias_tokens - 1, width = 2 * limit + 1;
  int most = 0;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < m.num_heads * width;
       i += static_cast<int>(gridDim.x * blockDim.x)) {
    const int offset = i % width - limit;
    const float* row = m.position_bias + static_cast<int64_t>(i / width) * width;
    if (__ldg(row + offset + limit) != __ldg(row + (offset < 0 ? 0 : width - 1)))
      most = max(most, abs(offset) + 1);
  }
  int& found = long_shared().requests;
  if (threadIdx.x == 0) found = 0;
  __syncthreads();
  most = __reduce_max_sync(kAllLanes, most);
  if (lane_index() == 0 && most > 0) atomicMax(&found, most);
  __syncthreads();
  if (threadIdx.x == 0) reach[blockIdx.x] = found;
}

// Chooses the longest run of requests from `first` on whose tiles fit; one warp.
__device__ __forceinline__ void long_choose(const int2* requests, int64_t batch, int64_t first,
                                            int most_tiles) {
  auto& shared = long_shared();
  const int window = static_cast<int>(min(static_cast<int64_t>(kLongWindow), batch - first));
  const int lane = lane_index();
  int tiles = 0, pairs = 0, taken = 0;
#pragma unroll 4
  for (int begin = 0; begin < kLongWindow; begin += kWarp) {
    const int at = begin + lane;
    const int2 tokens = at < window ? __ldcg(requests + first + at) : int2{};
    const int own = (tokens.x + kLongRows - 1) / kLongRows;
    shared.tokens[at] = tokens;
    int tiles_to = own, pairs_to = (own + 1) / 2;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int more = __shfl_up_sync(kAllLanes, tiles_to, distance);
      const int more_pairs = __shfl_up_sync(kAllLanes, pairs_to, distance);
      if (lane >= distance) tiles_to += more, pairs_to += more_pairs;
    }
    shared.tiles_before[at] = tiles + tiles_to - own;
    shared.pairs_before[at] = pairs + pairs_to - (own + 1) / 2;
    taken += at < window && tiles + tiles_to <= most_tiles;
    tiles += __shfl_sync(kAllLanes, tiles_to, kWarp - 1);
    pairs += __shfl_sync(kAllLanes, pairs_to, kWarp - 1);
  }
  taken = __reduce_add_sync(kAllLanes, taken);
  if (lane == 0) {
    shared.tiles_before[kLongWindow] = tiles, shared.pairs_before[kLongWindow] = pairs;
    shared.requests = taken;
  }
}
// What was chosen; the whole block meets before.
__device__ __forceinline__ LongSegment long_chosen(int64_t first) {
  const auto& shared = long_shared();
  const int taken = uniform(shared.requests);
  return {first, taken, uniform(shared.tiles_before[taken]), uniform(shared.pairs_before[taken])};
}

// ---- copies ----

template <int kDim>
struct LongCopies {
  using Sizes = LongSizes<kDim>;

  const EncodeT5Problem& problem;
  const LongShape& shape;
  const char* workspace;
  const Sizes sizes;
  LongRing ring;

  // A piece of `count` blocks, block i from from(i), once its stage is empty.
  template <class From>
  __device__ __forceinline__ void copy(int count, const From& from) {
    auto& shared = long_shared();
    while (!ptx::barrier_try(ptx::shared_address(&shared.empty[ring.stage]), ring.parity)) {
    }
    if (lane_index() == 0) {
      const uint32_t barrier = ptx::shared_address(&shared.full[ring.stage]);
      const uint32_t to = ptx::shared_address(shared.stages[ring.stage]);
      ptx::barrier_expect(barrier, count * kLongBlock);
      ptx::bulk_copy(to, from(0), kLongBlock, barrier);
      if (count == 2) ptx::bulk_copy(to + kLongBlock, from(1), kLongBlock, barrier);
    }
    __syncwarp();
    ring.step();
  }
  // A block of the weights of a layer.
  __device__ __forceinline__ const char* weights(int layer, int block) const {
    const int all = Sizes::kWide * 4 * (sizes.heads + sizes.chunks);
    return static_cast<const char*>(problem.model.tiles) +
           static_cast<int64_t>(layer * all + block) * kLongBlock;
  }
  // 128 columns of a matrix [64 * columns, D] that begins with block `from`, the last ones possibly
  // twice.
  __device__ __forceinline__ void copy_in(int layer, int from, int column, int columns) {
    for (int k = 0; k < Sizes::kWide; ++k)
      copy(2, [&](int i) {
        return weights(layer, from + min(column + i, columns - 1) * Sizes::kWide + k);
      });
  }
  // A block column of a matrix [D, 64 * columns].
  __device__ __forceinline__ void copy_out(int layer, int from, int column, int columns) {
    for (int half = 0; half < Sizes::kHalves; ++half)
      copy(2, [&](int i) { return weights(layer, from + (2 * half + i) * columns + column); });
  }

  __device__ __forceinline__ void dense(const LongSegment& segment, int layer) {
    const int heads = sizes.heads, chunks = sizes.chunks;
    for (int item = static_cast<int>(blockIdx.x); 2 * item < segment.tiles;
         item += static_cast<int>(gridDim.x)) {
      if (layer > 0) {
        const int tiles = min(2, segment.tiles - 2 * item);
        for (int head = 0; head < heads; ++head) {
          copy(tiles, [&](int i) {
            return workspace + shape.mixed +
                   (static_cast<int64_t>(2 * item + i) * heads + head) * kLongBlock;
          });
          copy_out(layer - 1, 3 * heads * Sizes::kWide, head, heads);
        }
        for (int chunk = 0; chunk < chunks; ++chunk) {
          copy_in(layer - 1, 4 * heads * Sizes::kWide, 2 * chunk, 2 * chunks);
          for (int k = 0; k < 2; ++k)
            copy_out(layer - 1, (4 * heads + 2 * chunks) * Sizes::kWide, 2 * chunk + k, 2 * chunks);
        }
      }
      if (layer < sizes.layers)
        for (int column = 0; column < 3 * heads; column += 2) copy_in(layer, 0, column, 3 * heads);
    }
  }
  __device__ __forceinline__ void attention(const LongSegment& segment) {
    const int heads = sizes.heads;
    for (int item = static_cast<int>(blockIdx.x); item < segment.pairs * heads;
         item += static_cast<int>(gridDim.x)) {
      const LongQueries queries(segment, heads, item);
      const auto block = [&](int tile, int part) {
        return workspace + shape.qkv +
               (static_cast<int64_t>(tile) * 3 * heads + part * heads + queries.head) * kLongBlock;
      };
      // In the order of use: the keys of the next before the values of those before.
      const auto copy_part = [&](int key, int part) {
        copy(2, [&](int i) {
          // A last tile without a partner: keys that weigh nothing, of finite values.
          return key + i < queries.keys ? block(queries.first_tile + key + i, part)
                                        : workspace + shape.zeros;
        });
      };
      copy_part(0, 1);
      for (int key = 0; key < queries.keys; key += 2) {
        if (key + 2 < queries.keys) copy_part(key + 2, 1);
        copy_part(key, 2);
      }
    }
  }
};

// ---- the kernel ----

template <class W, int kDim, bool kRelu>
__global__ void __launch_bounds__(kLongThreads, 1)
    encode_t5_long_kernel(const __grid_constant__ EncodeT5Problem problem,
                          const __grid_constant__ LongShape shape, char* workspace) {
  const T5View& model = problem.model;
  const TokensView& tokens = problem.tokens;
  auto& shared = long_shared();
  auto* requests = reinterpret_cast<int2*>(workspace + shape.requests);
  auto* reaches = reinterpret_cast<int*>(workspace + shape.reach);
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  {
    constexpr int kAll = kLongThreads / kWarp;
    const int warp = block + blocks * warp_index(), warps = blocks * kAll;
    long_count(tokens, requests, warp, warps);
    long_clear(tokens, problem.states, kDim, warp, warps);
    long_reach(model, reaches);
    if (block == 0 && threadIdx.x == 0) *reinterpret_cast<unsigned*>(workspace + shape.arrived) = 0;
    if (block == 0)
      for (int i = static_cast<int>(threadIdx.x); i < kLongBlock / 16; i += kLongThreads)
        reinterpret_cast<uint4*>(workspace + shape.zeros)[i] = uint4{0, 0, 0, 0};
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < kLongStages; ++i) {
      ptx::barrier_init(ptx::shared_address(&shared.full[i]), 1);
      ptx::barrier_init(ptx::shared_address(&shared.empty[i]), kLongWarps);
    }
    ptx::barrier_init_fence();
  }
  // The only one before warps part; what was written so far is for generic reads and for copies.
  asm volatile("fence.proxy.async;" ::: "memory");
  cooperative_groups::this_grid().sync();
  asm volatile("fence.proxy.async;" ::: "memory");
  LongBarrier barrier{reinterpret_cast<unsigned*>(workspace + shape.arrived), 0};
  const int warp = uniform(warp_index());
  if (warp >= kLongWarps) {
    ptx::give_registers<40>();
    LongCopies<kDim> copies{problem, shape, workspace, LongSizes<kDim>(model), {0, 1}};
    for (int64_t first = 0; first < tokens.batch;) {
      long_block_barrier();  // the last segment's places were read
      long_block_barrier();
      const LongSegment segment = long_chosen(first);
      for (int layer = 0; layer <= model.num_layers; ++layer) {
        if (warp == kLongWarps) copies.dense(segment, layer);
        if (layer == model.num_layers) break;
        barrier.sync();
        if (warp == kLongWarps) copies.attention(segment);
        barrier.sync();
      }
      first += segment.requests;
    }
  } else {
    ptx::take_registers<232>();
    int reach = 0;
    for (int i = lane_index(); i < blocks; i += kWarp) reach = max(reach, __ldcg(reaches + i));
    reach = __reduce_max_sync(kAllLanes, reach);
    const LongBias bias(uniform(reach), model.num_heads);
    LongRing ring{0, 0};
    for (int64_t first = 0; first < tokens.batch;) {
      long_block_barrier();
      if (warp == 0) long_choose(requests, tokens.batch, first, shape.tiles);
      long_block_barrier();
      const LongSegment segment = long_chosen(first);
      for (int layer = 0; layer <= model.num_layers; ++layer) {
        {
          LongDense<W, kDim, kRelu> dense{problem,  shape,        workspace, warp / 4,
                                          warp % 4, lane_index(), ring};
          dense.run(segment, layer);
          ring = dense.ring;
        }
        if (layer == model.num_layers) break;
        LongAttention<W> attention{problem,  shape,    workspace,    bias,
                                   warp / 4, warp % 4, lane_index(), ring};
        attention.load_table();
        barrier.sync();
        attention.run(segment);
        ring = attention.ring;
        barrier.sync();
      }
      first += segment.requests;
    }
  }
}

template <class W, int kDim>
const void* long_kernel_of(Activation activation) {
  return activation == Activation::kRelu
             ? reinterpret_cast<const void*>(&encode_t5_long_kernel<W, kDim, true>)
             : reinterpret_cast<const void*>(&encode_t5_long_kernel<W, kDim, false>);
}
template <class W>
const void* long_kernel_of(int dim, Activation activation) {
  return dim == 256 ? long_kernel_of<W, 256>(activation) : long_kernel_of<W, 128>(activation);
}

}  // namespace sidmlp::cuda::sm90
