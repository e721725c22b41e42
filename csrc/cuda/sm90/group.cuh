// What the requests of a cluster compute together: context parts of every head's first layer and
// the logits of level 1. Each block computes some of the columns for all requests and stores them
// in the shared memory of the blocks that need them.
#pragma once

#include "cuda/ptx/cluster.cuh"
#include "cuda/sm90/hidden.cuh"
#include "cuda/sm90/products.cuh"
#include "cuda/sm90/readout_shape.h"

namespace sidmlp::cuda::sm90 {

constexpr int kQuarters = 4;  // parts of the inner sum of level 1's logits, added in order

// Of one block.
struct Group {
  const Shape& shape;
  char* memory;
  uint32_t block;  // rank in the cluster
  int requests;    // in the group, at most shape.group

  // body(rank of a block, slot) for every block that holds `request` of the group.
  template <class Body>
  __device__ __forceinline__ void for_owners(int request, const Body& body) const {
    if (shape.team_shift == 0) {
      body(static_cast<uint32_t>(request & ((1 << shape.cluster_shift) - 1)),
           request >> shape.cluster_shift);
    } else {
      for (int i = 0; i < 1 << shape.team_shift; ++i)
        body(static_cast<uint32_t>((request << shape.team_shift) + i), 0);
    }
  }
  // The request of the group that this block holds in `slot`; may be one that is not there.
  __device__ __forceinline__ int request_of(int slot) const {
    const int own = static_cast<int>(block);
    return shape.team_shift == 0 ? own + (slot << shape.cluster_shift) : own >> shape.team_shift;
  }
  __device__ float* first(int slot, int width) const {
    return reinterpret_cast<float*>(memory + shape.first) + static_cast<int64_t>(slot) * width;
  }
  __device__ float* root_logits(int slot) const {
    return reinterpret_cast<float*>(memory + shape.root_logits) + slot * shape.root_stride;
  }
};

// first [users][L * H] of every block <- contexts [group, D] of this block.
template <class W>
__device__ __forceinline__ void context_parts(const HeadsView& heads, const Group& group) {
  constexpr int kTiles = (kMaxGroup + 7) / 8;
  const Shape& shape = group.shape;
  const int width = heads.num_levels * heads.hidden_dim;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const char* x = group.memory + shape.contexts;
  for (int unit = static_cast<int>(group.block) + shape.cluster * warp_index();
       unit * kUnit < width; unit += shape.cluster * kWarps) {
    float sum[4][kTiles][4];
    input_major_product<W, kTiles, 4>(static_cast<const W*>(heads.context_weight), width, heads.dim,
                                      unit * kUnit, width, x, shape.context_bytes, sum);
    const int column = unit * kUnit + 8 * g;
    if (column >= width) continue;
    const float4 low = __ldg(reinterpret_cast<const float4*>(heads.context_bias + column));
    const float4 high = __ldg(reinterpret_cast<const float4*>(heads.context_bias + column) + 1);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int request = 8 * n + 2 * t + r;
        if (request >= group.requests) continue;
        const float4 a{sum[0][n][r] + low.x, sum[0][n][2 + r] + low.y, sum[1][n][r] + low.z,
                       sum[1][n][2 + r] + low.w};
        const float4 b{sum[2][n][r] + high.x, sum[2][n][2 + r] + high.y, sum[3][n][r] + high.z,
                       sum[3][n][2 + r] + high.w};
        group.for_owners(request, [&](uint32_t owner, int slot) {
          const uint32_t to = ptx::peer_address(group.first(slot, width) + column, owner);
          ptx::store_peer(to, a);
          ptx::store_peer(to + 16, b);
        });
      }
    }
  }
}

// Hidden rows of level 1 of every request -> shared memory of every block.
template <class W, int kVectors, bool kFull>
__device__ __forceinline__ void root_rows(const HeadsView& heads, const Group& group) {
  const Shape& shape = group.shape;
  const int width = heads.num_levels * heads.hidden_dim;
  const int rank_in_team = static_cast<int>(group.block) & ((1 << shape.team_shift) - 1);
  const NormVectors<kVectors, kFull> norm(heads, 0);
  for (int slot = warp_index(); slot < shape.users; slot += kWarps) {
    const int request = group.request_of(slot);
    if (request >= group.requests) continue;
    HiddenRow<kVectors, kFull> values;
    hidden_row<W>(heads, 0, norm, group.first(slot, width), Prefix{}, nullptr, 0, 0, values);
    char* place = group.memory + shape.hidden + request * shape.row_bytes;
    for_words<W>(values, heads.hidden_dim, [&](int at, uint32_t word) {
      if (shape.group == 1) {  // the whole cluster is this request's team
        *reinterpret_cast<uint32_t*>(place + at) = word;
        return;
      }
      // Each block of a team serves some of the others.
      for (int to = rank_in_team; to < shape.cluster; to += 1 << shape.team_shift)
        ptx::store_peer(ptx::peer_address(place + at, static_cast<uint32_t>(to)), word);
    });
  }
}

// Logits of level 1 of every request -> shared memory of the blocks that hold it.
template <class W>
__device__ __forceinline__ void root_logits(const HeadsView& heads, const Group& group) {
  constexpr int kCodes = 16;  // of a task
  const Shape& shape = group.shape;
  const HeadView& head = heads.heads[0];
  const int g = lane_index() / 4, t = lane_index() % 4, codes = head.num_codes;
  const int tiles = (codes + kCodes - 1) / kCodes, own = static_cast<int>(group.block);
  const int own_tiles = (tiles - own + shape.cluster - 1) >> shape.cluster_shift;
  const int steps = heads.hidden_dim / 32, quarter = (steps + kQuarters - 1) / kQuarters;
  auto* partial = reinterpret_cast<float*>(group.memory + shape.partial);
  const RowTiles<1> rows(group.memory + shape.hidden, shape.row_bytes, group.requests);
  for (int task = warp_index(); task < kQuarters * own_tiles; task += kWarps) {
    const int tile = own + (task / kQuarters << shape.cluster_shift), part = task % kQuarters;
    const CodeTile<W, 2> tile_codes(static_cast<const W*>(head.out_weight), heads.hidden_dim,
                                    kCodes * tile);
    float sum[1][2][4] = {};
    const int end = min((part + 1) * quarter, steps);
#pragma unroll 4
    for (int step = part * quarter; step < end; ++step) {
      uint4 piece[2];
      tile_codes.load(piece, 32 * step);
      multiply_rows<W, 1, 2>(rows, 32 * step, piece, sum);
    }
    static_assert(kMaxGroup == 8, "rows 8 .. 15 of the tile are nobody's");
    float* to = partial + task * kCodes * kMaxGroup + kCodes * g + 2 * t;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      *reinterpret_cast<float2*>(to + 8 * i) = {sum[0][i][0], sum[0][i][1]};
  }
  __syncthreads();
  constexpr int kPart = kCodes * kMaxGroup;  // [request][code]
  for (int i = static_cast<int>(threadIdx.x); i < own_tiles * kPart; i += kThreads) {
    const int request = i / kCodes % kMaxGroup, tile = i / kPart;
    const int code = (own + (tile << shape.cluster_shift)) * kCodes + i % kCodes;
    if (request >= group.requests || code >= codes) continue;
    const float* parts = partial + tile * kQuarters * kPart + i % kPart;
    const float sum = ((parts[0] + parts[kPart]) + parts[2 * kPart]) + parts[3 * kPart];
    const float logit = fmaf(gelu_unit<W>, sum, __ldg(head.out_bias + code));
    group.for_owners(request, [&](uint32_t owner, int slot) {
      ptx::store_peer(ptx::peer_address(group.root_logits(slot) + code, owner), logit);
    });
  }
}

}  // namespace sidmlp::cuda::sm90
