// The kernels of split.cuh: requests to blocks or clusters, one at a time.
#pragma once

#include <type_traits>

#include "cuda/sm90/encoder/split_alone.cuh"
#include "cuda/sm90/encoder/split_cluster.cuh"

namespace sidmlp::cuda::sm90 {

// Valid tokens of `request`: their positions -> shared memory. Every thread gets their number.
template <class Shared>
__device__ __forceinline__ int take_request(const TokensView& tokens, int64_t request,
                                            Shared& shared) {
  constexpr int kParts = kSplitRows / kWarp;
  const uint8_t* mask = tokens.mask + request * tokens.tokens;
  const int lane = lane_index();
  bool valid[kParts];
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const int t = kWarp * i + lane;
    valid[i] = t < tokens.tokens && __ldg(mask + t) != 0;
  }
  ptx::named_barrier(2, kSplitWarps * kWarp);  // the last request is done
  int count = 0;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const unsigned set = __ballot_sync(kAllLanes, valid[i]);
    if (warp_index() == 0 && valid[i])
      shared.position[count + __popc(set & ((1u << lane) - 1))] = kWarp * i + lane;
    count += __popc(set);
  }
  if (warp_index() == 0)
    for (int i = count + lane; i < kSplitRows; i += kWarp) shared.position[i] = 0;
  ptx::named_barrier(2, kSplitWarps * kWarp);
  return count;
}

// Weights for every request with tokens, layer by layer -> the ring; one warp.
template <int kBlocks>
__device__ __forceinline__ void copy_weights(const EncodeT5Problem& problem,
                                             const SplitPart& part) {
  auto& shared = split_shared<kBlocks>();
  const TokensView& tokens = problem.tokens;
  SplitRing<kBlocks> ring{0, 1};
  const int64_t clusters = gridDim.x / kBlocks;
  for (int64_t request = blockIdx.x / kBlocks; request < tokens.batch; request += clusters) {
    bool any = false;
    for (int t = lane_index(); t < tokens.tokens; t += kWarp)
      any |= __ldg(tokens.mask + request * tokens.tokens + t) != 0;
    if (!__any_sync(kAllLanes, any)) continue;
    for (int l = 0; l < problem.model.num_layers; ++l)
      for (int i = 0; i < part.pieces(); ++i) {
        while (!ptx::barrier_try(ptx::shared_address(&shared.empty[ring.stage]), ring.parity)) {
        }
        if (lane_index() == 0) fetch_piece(problem.model, part, l, i, ring.stage, shared);
        __syncwarp();
        ring.step();
      }
  }
}

template <class W, bool kRelu, int kBlocks>
__device__ __forceinline__ void compute_states(const EncodeT5Problem& problem,
                                               const SplitPart& part, int rank) {
  using Encoder =
      std::conditional_t<kBlocks == 1, AloneEncoder<W, kRelu>, ClusterEncoder<W, kRelu, kBlocks>>;
  const TokensView& tokens = problem.tokens;
  const int lane = lane_index(), warp = uniform(warp_index());
  Encoder encoder{{problem, part, {0, 0}, rank, warp / 4, warp, lane}};
  const int64_t clusters = gridDim.x / kBlocks;
  for (int64_t request = blockIdx.x / kBlocks; request < tokens.batch; request += clusters) {
    encoder.request = request;
    encoder.buffer = 0;
    encoder.count = uniform(take_request(tokens, request, split_shared<kBlocks>()));
    encoder.tiles = (encoder.count + kTileRows - 1) / kTileRows;
    encoder.active = encoder.tiles > 4 ? 2 : 1;
    for (int t = rank * kSplitWarps + warp; t < tokens.tokens; t += kBlocks * kSplitWarps) {
      if (__ldg(tokens.mask + request * tokens.tokens + t) != 0 || lane >= kWideDim / 8) continue;
      static_cast<uint4*>(problem.states)[(request * tokens.tokens + t) * (kWideDim / 8) + lane] =
          uint4{0, 0, 0, 0};
    }
    if (encoder.count == 0) continue;
    if (encoder.group < encoder.active) {
      encoder.encode();
    } else {
      encoder.ring.pass(part.pieces() * problem.model.num_layers);
    }
  }
}

template <class W, bool kRelu, int kBlocks>
__global__ void __launch_bounds__(kSplitThreads, 1)
    encode_t5_split_kernel(const __grid_constant__ EncodeT5Problem problem) {
  using Shared = SplitShared<kBlocks>;
  const int tid = static_cast<int>(threadIdx.x);
  const T5View& model = problem.model;
  const TokensView& tokens = problem.tokens;
  auto& shared = split_shared<kBlocks>();
  const int rank = kBlocks == 1 ? 0 : uniform(static_cast<int>(ptx::cluster_rank()));
  const SplitPart part(model, rank, kBlocks);
  if (tid == 0) {
    for (int i = 0; i < Shared::kStages; ++i) {
      ptx::barrier_init(ptx::shared_address(&shared.full[i]), 1);
      ptx::barrier_init(ptx::shared_address(&shared.empty[i]), kSplitWarps);
    }
    ptx::barrier_init(ptx::shared_address(&shared.reduced), 1);
    ptx::barrier_init(ptx::shared_address(&shared.gathered), 1);
    ptx::barrier_init_fence();
  }
  __syncthreads();
  if constexpr (kBlocks > 1) ptx::cluster_arrive();
  if (uniform(tid / 128) == 2) {
    ptx::give_registers<24>();
    if (uniform(warp_index()) == kSplitWarps) copy_weights<kBlocks>(problem, part);
    __syncwarp();
    if constexpr (kBlocks > 1) ptx::cluster_wait();
  } else {
    ptx::take_registers<240>();
    const int span = 2 * tokens.tokens - 1;
    const float* from = model.position_bias +
                        static_cast<int64_t>(part.first_head) * (2 * model.bias_tokens - 1) +
                        model.bias_tokens - tokens.tokens;
#pragma unroll 4
    for (int i = tid; i < part.heads * span; i += kSplitWarps * kWarp)
      shared.bias[i] = __ldg(from + i / span * (2 * model.bias_tokens - 1) + i % span);
    if constexpr (kBlocks == 1) {
      float* to = shared.bias + (part.heads * span + 3) / 4 * 4;
      for (int i = tid; i < (2 * model.num_layers + 1) * kWideDim; i += kSplitWarps * kWarp) {
        const int of = i / kWideDim;
        const float* gain = of == 2 * model.num_layers ? model.final_gain
                            : of % 2 == 0              ? model.layers[of / 2].attention_gain
                                                       : model.layers[of / 2].ffn_gain;
        to[i] = __ldg(gain + i % kWideDim);
      }
    }
    if constexpr (kBlocks > 1) ptx::cluster_wait();  // peers' barriers are there
    compute_states<W, kRelu, kBlocks>(problem, part, rank);
  }
  if constexpr (kBlocks > 1) {  // a peer may still take this block's rows
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

template <int kBlocks>
int split_shared_bytes_of(const EncodeT5Problem& problem) {
  const T5View& m = problem.model;
  const int heads = (m.num_heads + kBlocks - 1) / kBlocks;
  return static_cast<int>(sizeof(SplitShared<kBlocks>)) +
         4 * heads * (2 * problem.tokens.tokens - 1) +
         (kBlocks == 1 ? 4 * kWideDim * (2 * m.num_layers + 1) : 0);
}

template <class W, bool kRelu>
const void* split_kernel_of(int blocks) {
  switch (blocks) {
    case 8:
      return reinterpret_cast<const void*>(&encode_t5_split_kernel<W, kRelu, 8>);
    case 4:
      return reinterpret_cast<const void*>(&encode_t5_split_kernel<W, kRelu, 4>);
    case 2:
      return reinterpret_cast<const void*>(&encode_t5_split_kernel<W, kRelu, 2>);
    default:
      return reinterpret_cast<const void*>(&encode_t5_split_kernel<W, kRelu, 1>);
  }
}
template <class W>
const void* split_kernel_of(Activation activation, int blocks) {
  return activation == Activation::kRelu ? split_kernel_of<W, true>(blocks)
                                         : split_kernel_of<W, false>(blocks);
}

}  // namespace sidmlp::cuda::sm90
