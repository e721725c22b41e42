// What the requests of a cluster compute together: context parts of every head's first layer and the
// logits of level 1. Each block computes some of the columns for all requests and stores them in the
// shared memory of the blocks that need them.
#pragma once

#include "cuda/ptx/cluster.cuh"
#include "cuda/sm90/hidden.cuh"
#include "cuda/sm90/products.cuh"

namespace sidmlp::cuda::sm90 {

constexpr int kUnit = 64;     // columns of a warp's part of an input-major product
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
    if (shape.team == 1) {
      body(static_cast<uint32_t>(request % shape.cluster), request / shape.cluster);
    } else {
      for (int i = 0; i < shape.team; ++i)
        body(static_cast<uint32_t>(request * shape.team + i), 0);
    }
  }
  // The request of the group that this block holds in `slot`; may be one that is not there.
  __device__ __forceinline__ int request_of(int slot) const {
    const int own = static_cast<int>(block);
    return shape.team == 1 ? own + slot * shape.cluster : own / shape.team;
  }
  __device__ float* first(int slot, int width) const {
    return reinterpret_cast<float*>(memory + shape.first) + static_cast<int64_t>(slot) * width;
  }
  __device__ float* root_logits(int slot) const {
    return reinterpret_cast<float*>(memory + shape.root_logits) + slot * shape.root_stride;
  }
};

// first [users][L * H] of every block <- contexts [group, D] of this block.
template <class W, int kTiles>
__device__ __forceinline__ void context_parts(const HeadsView& heads, const Group& group) {
  const Shape& shape = group.shape;
  const int width = heads.num_levels * heads.hidden_dim;
  const int g = lane_index() / 4, t = lane_index() % 4;
  const char* x = group.memory + shape.contexts;
  for (int unit = static_cast<int>(group.block) + shape.cluster * warp_index();
       unit * kUnit < width; unit += shape.cluster * kWarps) {
    float sum[4][kTiles][4];
    input_major_product<W, kTiles>(static_cast<const W*>(heads.context_weight), width, heads.dim,
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
template <class W, int kVectors>
__device__ __forceinline__ void root_rows(const HeadsView& heads, const Group& group) {
  const Shape& shape = group.shape;
  const int width = heads.num_levels * heads.hidden_dim;
  const int rank_in_team = static_cast<int>(group.block) % shape.team;
  for (int slot = warp_index(); slot < shape.users; slot += kWarps) {
    const int request = group.request_of(slot);
    if (request >= group.requests) continue;
    HiddenRow<kVectors> values;
    hidden_row<W>(heads, 0, group.first(slot, width), Prefix{}, values);
    char* place = group.memory + shape.hidden + request * shape.row_bytes;
    for_pieces<W>(values, heads.hidden_dim, [&](int at, const uint4& piece) {
      if (shape.group == 1) {  // the whole cluster is this request's team
        *reinterpret_cast<uint4*>(place + at) = piece;
        return;
      }
      // Each block of a team serves some of the others.
      for (int to = rank_in_team; to < shape.cluster; to += shape.team)
        ptx::store_peer(ptx::peer_address(place + at, static_cast<uint32_t>(to)), piece);
    });
  }
}

// Logits of level 1 of every request -> shared memory of the blocks that hold it.
template <class W, int kTiles>
__device__ __forceinline__ void root_logits(const HeadsView& heads, const Group& group) {
  const Shape& shape = group.shape;
  const HeadView& head = heads.heads[0];
  const int g = lane_index() / 4, t = lane_index() % 4, codes = head.num_codes;
  const int tiles = (codes + 15) / 16, own = static_cast<int>(group.block);
  const int own_tiles = (tiles - own + shape.cluster - 1) / shape.cluster;
  const int steps = heads.hidden_dim / 32, quarter = (steps + kQuarters - 1) / kQuarters;
  auto* partial = reinterpret_cast<float*>(group.memory + shape.partial);
  const char* x = group.memory + shape.hidden + g * shape.row_bytes + 16 * t;
  for (int task = warp_index(); task < kQuarters * own_tiles; task += kWarps) {
    const int tile = own + task / kQuarters * shape.cluster, part = task % kQuarters;
    const W* rows[2];
    code_rows(static_cast<const W*>(head.out_weight), heads.hidden_dim, 16 * tile, codes, rows);
    float sum[1][kTiles][4] = {};
    const int end = min((part + 1) * quarter, steps);
#pragma unroll 4
    for (int step = part * quarter; step < end; ++step) {
      RowPieces<2> pieces;
      pieces.load(rows, 32 * step);
      multiply_pieces<W, 1, kTiles>(pieces, x + 64 * step, shape.row_bytes, sum);
    }
    float* to = partial + task * 16 * kMaxGroup;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int column = 8 * n + 2 * t;
      *reinterpret_cast<float2*>(to + g * kMaxGroup + column) = {sum[0][n][0], sum[0][n][1]};
      *reinterpret_cast<float2*>(to + (g + 8) * kMaxGroup + column) = {sum[0][n][2],
                                                                      sum[0][n][3]};
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < own_tiles * 16 * kMaxGroup; i += kThreads) {
    const int request = i % kMaxGroup, row = i / kMaxGroup;
    const int code = (own + row / 16 * shape.cluster) * 16 + row % 16;
    if (request >= group.requests || code >= codes) continue;
    const float* parts = partial + (row / 16 * kQuarters * 16 + row % 16) * kMaxGroup + request;
    constexpr int kPart = 16 * kMaxGroup;
    const float logit = ((parts[0] + parts[kPart]) + parts[2 * kPart]) + parts[3 * kPart] +
                        __ldg(head.out_bias + code);
    group.for_owners(request, [&](uint32_t owner, int slot) {
      ptx::store_peer(ptx::peer_address(group.root_logits(slot) + code, owner), logit);
    });
  }
}

}  // namespace sidmlp::cuda::sm90
