// The first stage of every request in a launch of its own: what beam_decode and decode_states
// compute before their levels, for so many requests at once that weights are read rarely. The
// levels follow in a second launch, which may begin before this one ends (ptx/dependent.cuh).
//
// A cluster of blocks has a group of requests; each block has some of the columns for all of them:
//
//   states -> contexts (decode_states) -> context parts of the first layers -> global memory,
//   those of level 1 also -> hidden rows, each by one block for all -> logits -> global memory
//
// Sums have the order of group.cuh, so results have the same bits as with one launch.
#pragma once

#include "cuda/problem.h"
#include "cuda/ptx/dependent.cuh"
#include "cuda/sm90/first_stage_shape.h"
#include "cuda/sm90/group.cuh"
#include "cuda/sm90/readout.cuh"

namespace sidmlp::cuda::sm90 {

template <class W, int kVectors>
struct FirstStage {
  const HeadsView& heads;
  const FirstStageShape& shape;
  char* memory;
  int block;           // rank in the cluster
  int requests;        // in the group
  float* first;        // of the group's first request, [requests, L * H] in global memory
  float* root_logits;  // likewise [requests, root_stride]

  __device__ __forceinline__ int cluster() const { return 1 << shape.cluster_shift; }
  __device__ __forceinline__ float* level_1(int request) const {  // in its owner's memory
    return reinterpret_cast<float*>(memory + shape.first) +
           (request >> shape.cluster_shift) * heads.hidden_dim;
  }
  __device__ __forceinline__ uint32_t owner(int request) const {
    return static_cast<uint32_t>(request & (cluster() - 1));
  }

  // Contexts in shared memory -> context parts, of up to 8 * kTiles requests.
  template <int kTiles>
  __device__ __forceinline__ void parts() const {
    const int width = heads.num_levels * heads.hidden_dim;
    const int g = lane_index() / 4, t = lane_index() % 4;
    const char* x = memory + shape.contexts;
#pragma unroll 1
    for (int unit = block + (warp_index() << shape.cluster_shift); unit * kUnit < width;
         unit += kWarps << shape.cluster_shift) {
      float sum[4][kTiles][4];
      input_major_product<W, kTiles, 2>(static_cast<const W*>(heads.context_weight), width,
                                        heads.dim, unit * kUnit, width, x, shape.context_bytes,
                                        sum);
      const int column = unit * kUnit + 8 * g;
      if (column >= width) continue;
      const float4 low = __ldg(reinterpret_cast<const float4*>(heads.context_bias + column));
      const float4 high = __ldg(reinterpret_cast<const float4*>(heads.context_bias + column) + 1);
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int request = 8 * n + 2 * t + r;
          if (request >= requests) continue;
          const float4 a{sum[0][n][r] + low.x, sum[0][n][2 + r] + low.y, sum[1][n][r] + low.z,
                         sum[1][n][2 + r] + low.w};
          const float4 b{sum[2][n][r] + high.x, sum[2][n][2 + r] + high.y, sum[3][n][r] + high.z,
                         sum[3][n][2 + r] + high.w};
          auto* to =
              reinterpret_cast<float4*>(first + static_cast<int64_t>(request) * width + column);
          to[0] = a;
          to[1] = b;
          if (column >= heads.hidden_dim) continue;
          const uint32_t peer = ptx::peer_address(level_1(request) + column, owner(request));
          ptx::store_peer(peer, a);
          ptx::store_peer(peer + 16, b);
        }
      }
    }
  }

  // Hidden rows of level 1 -> shared memory of every block.
  __device__ __forceinline__ void rows() const {
    const NormVectors<kVectors, false> norm(heads, 0);
    for (int request = block + (warp_index() << shape.cluster_shift); request < requests;
         request += kWarps << shape.cluster_shift) {
      HiddenRow<kVectors, false> values;
      hidden_row<W>(heads, 0, norm, level_1(request), Prefix{}, nullptr, 0, 0, values);
      const char* place = memory + shape.hidden + request * shape.row_bytes;
      for_words<W>(values, heads.hidden_dim, [&](int at, uint32_t word) {
        for (int to = 0; to < cluster(); ++to)
          ptx::store_peer(ptx::peer_address(place + at, static_cast<uint32_t>(to)), word);
      });
    }
  }

  // Hidden rows -> logits of level 1.
  __device__ __forceinline__ void logits() const {
    constexpr int kCodes = 16;  // of a task
    const HeadView& head = heads.heads[0];
    const int g = lane_index() / 4, t = lane_index() % 4, codes = head.num_codes;
    const int tiles = (codes + kCodes - 1) / kCodes;
    const int own_tiles = (tiles - block + cluster() - 1) >> shape.cluster_shift;
    const int steps = heads.hidden_dim / 32, quarter = (steps + kQuarters - 1) / kQuarters;
    auto* partial = reinterpret_cast<float*>(memory + shape.partial);
    const int part_floats = kCodes * shape.group;  // [request][code]
    const RowTiles<1> hidden(memory + shape.hidden, shape.row_bytes, requests);
#pragma unroll 1
    for (int task = warp_index(); task < kQuarters * own_tiles; task += kWarps) {
      const int tile = block + (task / kQuarters << shape.cluster_shift), part = task % kQuarters;
      const CodeTile<W, 2> tile_codes(static_cast<const W*>(head.out_weight), heads.hidden_dim,
                                      kCodes * tile);
      float sum[1][2][4] = {};
      const int end = min((part + 1) * quarter, steps);
#pragma unroll 4
      for (int step = part * quarter; step < end; ++step) {
        uint4 piece[2];
        tile_codes.load(piece, 32 * step);
        multiply_rows<W, 1, 2>(hidden, 32 * step, piece, sum);
      }
      float* to = partial + task * part_floats + 2 * t;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int request = 8 * half + g;
        if (request >= requests) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i)
          *reinterpret_cast<float2*>(to + kCodes * request + 8 * i) = {sum[0][i][2 * half],
                                                                       sum[0][i][2 * half + 1]};
      }
    }
    __syncthreads();
    const int count = requests * kCodes;  // of a tile
    for (int i = static_cast<int>(threadIdx.x); i < own_tiles * count; i += kThreads) {
      const int tile = i / count, at = i - tile * count, request = at / kCodes;
      const int code = (block + (tile << shape.cluster_shift)) * kCodes + at % kCodes;
      if (code >= shape.root_stride) continue;
      const float* from = partial + tile * kQuarters * part_floats + at;
      const float sum =
          ((from[0] + from[part_floats]) + from[2 * part_floats]) + from[3 * part_floats];
      // The second launch copies whole rows, what pads them too.
      root_logits[static_cast<int64_t>(request) * shape.root_stride + code] =
          code < codes ? fmaf(gelu_unit<W>, sum, __ldg(head.out_bias + code)) : 0.0f;
    }
  }

  // kMany: the group may have more than 8 requests, as where contexts are given.
  template <bool kMany>
  __device__ __forceinline__ void run() const {
    if (kMany && shape.group > 8) {
      parts<2>();
    } else {
      parts<1>();
    }
    cluster_barrier();
    rows();
    cluster_barrier();
    logits();
  }
};

static_assert(kMaxGroup <= 8, "a readout's group is one tile of requests");

template <class W, int kVectors, bool kStates>
__global__ void __launch_bounds__(kThreads, 2)
    first_stage_sm90_kernel(const __grid_constant__ BeamDecodeProblem problem,
                            const __grid_constant__ FirstStageShape shape, float* result) {
  extern __shared__ __align__(128) char memory[];
  ptx::cluster_arrive();  // no block writes to another before that one has begun
  ptx::let_next_launch_begin();
  const HeadsView& heads = problem.heads;
  const int dim = heads.dim, width = heads.num_levels * heads.hidden_dim;
  const int64_t begin = static_cast<int64_t>(blockIdx.x >> shape.cluster_shift) * shape.group;
  const int requests =
      static_cast<int>(min(static_cast<int64_t>(shape.group), problem.batch - begin));
  const uint32_t block = ptx::cluster_rank();
  char* contexts = memory + shape.contexts;
  if constexpr (kStates) {
    Readout<W>{problem.readout, problem.states, shape.reads, memory + shape.readout,
               block,           begin,          requests}
        .run(contexts, shape.context_bytes, nullptr);
  } else {
    const float* context = problem.context + begin * dim;  // at any address
    for (int i = 2 * static_cast<int>(threadIdx.x); i < requests * dim; i += 2 * kThreads) {
      const int request = i / dim, column = i - request * dim;
      *reinterpret_cast<uint32_t*>(contexts + request * shape.context_bytes + 2 * column) =
          narrow_two<W>(__ldg(context + i), __ldg(context + i + 1));
    }
    __syncthreads();
    ptx::cluster_wait();
  }
  float* root_logits = result + problem.batch * width;
  FirstStage<W, kVectors>{heads,
                          shape,
                          memory,
                          static_cast<int>(block),
                          requests,
                          result + begin * width,
                          root_logits + begin * shape.root_stride}
      .template run<!kStates>();
}

template <class W, bool kStates>
const void* first_stage_kernel_of(int hidden) {
  const void* kernels[] = {reinterpret_cast<const void*>(&first_stage_sm90_kernel<W, 2, kStates>),
                           reinterpret_cast<const void*>(&first_stage_sm90_kernel<W, 4, kStates>),
                           reinterpret_cast<const void*>(&first_stage_sm90_kernel<W, 8, kStates>)};
  return kernels[hidden <= 512 ? 0 : hidden <= 1024 ? 1 : 2];
}

}  // namespace sidmlp::cuda::sm90
