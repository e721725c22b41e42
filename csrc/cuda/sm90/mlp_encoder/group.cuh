// Which requests a cluster takes at once, and the rows of their valid tokens, gathered by role.
#pragma once

#include "cuda/sm90/encoder/requests.cuh"
#include "cuda/sm90/mlp_encoder/encode_mlp.h"

namespace sidmlp::cuda::sm90 {

// A valid token: its column and the request of the group.
struct MlpPlace {
  int position, request;
};

struct MlpState {
  static constexpr int kWarpCount = kMlpWarps, kThreadCount = kMlpThreads;

  EncodeMlpProblem problem;
  MlpShape shape;

  // Of this block.
  int rank;
  float* x;          // [most_rows, Dp]
  MlpPlace* places;  // [most_rows]
  float* partial;    // [2, slots, R, Dp], of the cluster: sums of x by request and role

  int begin, end, sums[kMlpWarps];          // of share_of_segment
  int counts[kMlpMaxRequests][kMaxLevels];  // valid tokens of a request and role
  int starts[kMlpMaxRequests][kMaxLevels];  // its first row among the role's
  int valid[kMlpMaxRequests];               // tokens of a request
  int last[kMlpMaxRequests];                // column of its last one
  int rows[kMaxLevels];                     // of a role
  int base[kMaxLevels];                     // its first row in this block; roles of others: none
  int64_t first;                            // request of the group
  int requests, own_rows;
  int request_of[kMlpTileRows * kMlpMaxTiles];  // of the rows that pass through a layer

  __device__ __forceinline__ static void barrier() { __syncthreads(); }
};
static_assert(sizeof(MlpState) <= kMlpStateBytes);

// Requests [begin, end) of a segment of `count` that cluster `index` of `clusters` takes, all about
// as many tiles of rows. `counts` is shared memory, int [kSegment].
__device__ __forceinline__ void share_of_segment(const TokensView& tokens, int64_t first, int count,
                                                 int index, int clusters, int* counts,
                                                 MlpState& state) {
  __syncthreads();          // the last segment's share was read
  if (count <= clusters) {  // one each
    if (threadIdx.x == 0) state.begin = min(index, count), state.end = min(index + 1, count);
    __syncthreads();
    return;
  }
  count_tokens<MlpState>(tokens, first, count, counts);
  const auto tiles_of = [&](int i) {
    return max((counts[i] + kMlpTileRows - 1) / kMlpTileRows, 1);
  };
  share_by_work(count, index, clusters, tiles_of, state);
}

__device__ __forceinline__ int role_of(int position, int last, int num_roles) {
  return position == last ? num_roles - 1 : (position + num_roles - 1) % num_roles;
}

// Of one request, by a warp.
__device__ __forceinline__ void count_roles(const TokensView& tokens, int64_t request,
                                            int num_roles, int slot, MlpState& state) {
  const int lane = lane_index();
  const uint8_t* mask = tokens.mask + request * tokens.tokens;
  int valid = 0, last = -1, own = 0;  // own: of the role that is this lane
  for (int begin = 0; begin < tokens.tokens; begin += kWarp) {
    const int t = begin + lane;
    const bool set = t < tokens.tokens && __ldg(mask + t) != 0;
    const unsigned all = __ballot_sync(kAllLanes, set);
    if (all == 0) continue;
    valid += __popc(all);
    last = begin + kWarp - 1 - __clz(all);
    const int role = role_of(t, -1, num_roles);
    for (int r = 0; r < num_roles; ++r) {
      const int count = __popc(__ballot_sync(kAllLanes, set && role == r));
      if (lane == r) own += count;
    }
  }
  if (last >= 0) own += (lane == num_roles - 1) - (lane == role_of(last, -1, num_roles));
  if (lane < num_roles) state.counts[slot][lane] = own;
  if (lane == 0) state.valid[slot] = valid, state.last[slot] = last;
}

// The longest group of requests first, first + 1, .. (before `end`) of which no role has more rows
// than pass at once, or one request. Rows of the roles rank, rank + cluster, .. go to state.places,
// role after role and there request after request. The same requests in every block of a cluster.
static __device__ __noinline__ void form_mlp_group(const TokensView& tokens, int num_roles,
                                                   const MlpShape& shape, int64_t first,
                                                   int64_t end, MlpState& state) {
  const int rank = state.rank;
  const int warp = warp_index(), lane = lane_index();
  const int most = static_cast<int>(min(static_cast<int64_t>(shape.slots), end - first));
  __syncthreads();  // the last group is done
  if (warp < most) count_roles(tokens, first + warp, num_roles, warp, state);
  __syncthreads();
  if (warp == 0) {
    int rows = 0, requests = 0;
    for (; requests < most; ++requests) {
      const int more = lane < num_roles ? state.counts[requests][lane] : 0;
      const bool fits = rows + more <= kMlpTileRows * shape.tiles;
      if (!__all_sync(kAllLanes, fits) && requests > 0) break;
      if (lane < num_roles) state.starts[requests][lane] = rows;
      rows += more;
    }
    int base = 0;
    for (int r = rank; r < num_roles; r += shape.cluster) {
      const int before = __shfl_sync(kAllLanes, rows, r);
      if (lane == r) state.base[r] = base;
      base += before;
    }
    if (lane < num_roles) state.rows[lane] = rows;
    if (lane == 0) state.first = first, state.requests = requests, state.own_rows = base;
  }
  __syncthreads();
  if (warp < state.requests) {
    const uint8_t* mask = tokens.mask + (first + warp) * tokens.tokens;
    const int last = state.last[warp];
    int done = 0;  // rows of the role that is this lane
    for (int begin = 0; begin < tokens.tokens; begin += kWarp) {
      const int t = begin + lane;
      const bool set = t < tokens.tokens && __ldg(mask + t) != 0;
      const int role = role_of(t, last, num_roles);
      for (int r = rank; r < num_roles; r += shape.cluster) {
        const unsigned all = __ballot_sync(kAllLanes, set && role == r);
        const int from = __shfl_sync(kAllLanes, done, r);
        if (set && role == r)
          state.places[state.base[r] + state.starts[warp][r] + from +
                       __popc(all & ((1u << lane) - 1))] = {t, warp};
        if (lane == r) done += __popc(all);
      }
    }
  }
  __syncthreads();
}

// States of the masked tokens of a group <- zeros, shared out among the warps of its blocks.
template <class W>
__device__ __forceinline__ void clear_masked(const TokensView& tokens, W* states, int dim,
                                             int64_t first, int requests, int warp, int warps) {
  const int64_t begin = first * tokens.tokens;
  const int64_t count = static_cast<int64_t>(requests) * tokens.tokens;
  const bool whole = dim * sizeof(W) % 16 == 0;
  for (int64_t i = begin + warp; i < begin + count; i += warps) {
    if (__ldg(tokens.mask + i) != 0) continue;
    W* to = states + i * dim;
    if (whole) {
      for (int piece = lane_index(); piece < static_cast<int>(dim * sizeof(W) / 16); piece += kWarp)
        reinterpret_cast<uint4*>(to)[piece] = uint4{0, 0, 0, 0};
    } else {
      for (int d = lane_index(); d < dim; d += kWarp) to[d] = static_cast<W>(0.0f);
    }
  }
}

}  // namespace sidmlp::cuda::sm90
