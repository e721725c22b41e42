// Logits of level 1 where all of them at once would not fit: the codes of a block come in chunks.
#pragma once

#include "cuda/sm90/group.cuh"

namespace sidmlp::cuda::sm90 {

// As root_logits of group.cuh, with at most shape.root_tiles of this block's tiles at once.
template <class W>
__device__ __forceinline__ void wide_root_logits(const HeadsView& heads, const Group& group) {
  constexpr int kCodes = 16, kPart = kCodes * kMaxGroup;  // [request][code] of a task
  const Shape& shape = group.shape;
  const HeadView& head = heads.heads[0];
  const int g = lane_index() / 4, t = lane_index() % 4, codes = head.num_codes;
  const int tiles = (codes + kCodes - 1) / kCodes, own = static_cast<int>(group.block);
  const int own_tiles = (tiles - own + shape.cluster - 1) >> shape.cluster_shift;
  const int steps = heads.hidden_dim / 32, quarter = (steps + kQuarters - 1) / kQuarters;
  auto* partial = reinterpret_cast<float*>(group.memory + shape.partial);
  const RowTiles<1> rows(group.memory + shape.hidden, shape.row_bytes, group.requests);
#pragma unroll 1
  for (int base = 0; base < own_tiles; base += shape.root_tiles) {
    const int here = min(shape.root_tiles, own_tiles - base);
    for (int task = warp_index(); task < kQuarters * here; task += kWarps) {
      const int tile = own + ((base + task / kQuarters) << shape.cluster_shift);
      const int part = task % kQuarters, end = min((part + 1) * quarter, steps);
      const CodeTile<W, 2> tile_codes(static_cast<const W*>(head.out_weight), heads.hidden_dim,
                                      kCodes * tile);
      float sum[1][2][4] = {};
#pragma unroll 4
      for (int step = part * quarter; step < end; ++step) {
        uint4 piece[2];
        tile_codes.load(piece, 32 * step);
        multiply_rows<W, 1, 2>(rows, 32 * step, piece, sum);
      }
      static_assert(kMaxGroup == 8, "rows 8 .. 15 of the tile are nobody's");
      float* to = partial + task * kPart + kCodes * g + 2 * t;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        *reinterpret_cast<float2*>(to + 8 * i) = {sum[0][i][0], sum[0][i][1]};
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < here * kPart; i += kThreads) {
      const int request = i / kCodes % kMaxGroup, tile = i / kPart;
      const int code = (own + ((base + tile) << shape.cluster_shift)) * kCodes + i % kCodes;
      if (request >= group.requests || code >= codes) continue;
      const float* parts = partial + tile * kQuarters * kPart + i % kPart;
      const float sum = ((parts[0] + parts[kPart]) + parts[2 * kPart]) + parts[3 * kPart];
      const float logit = fmaf(gelu_unit<W>, sum, __ldg(head.out_bias + code));
      group.for_owners(request, [&](uint32_t owner, int slot) {
        ptx::store_peer(ptx::peer_address(group.root_logits(slot) + code, owner), logit);
      });
    }
    __syncthreads();
  }
}

}  // namespace sidmlp::cuda::sm90
