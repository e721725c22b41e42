// Which requests a block takes, and their valid tokens as rows.
#pragma once

#include "cuda/ptx/bulk.cuh"
#include "cuda/sm90/encoder/shape.h"
#include "cuda/warp.cuh"

namespace sidmlp::cuda::sm90 {

constexpr int kSegment = 4096;  // requests that are shared out among blocks at once

// Some requests that a block computes at once: each begins a new tile of rows. Or one request of
// more rows than fit.
struct Group {
  int64_t first;  // request
  int requests;
  int tiles;  // of rows, in all
  bool is_long;
};

// kTiles: of rows at once; kBlockWarps: of the block, which look at as many requests for one group.
template <int kTiles, int kBlockWarps>
struct EncodeState {
  static constexpr int kWarpCount = kBlockWarps, kThreadCount = kWarp * kBlockWarps;

  alignas(
      16) int position[kTileRows * kTiles];  // of the token in its request; 0 where there is none
  alignas(16) int key_position[kKeyBlock];   // of a long request's keys
  int owner[kTileRows * kTiles];             // request of the group, -1: no token
  int tile_first[kTiles];                    // the first row of the tile's request
  int tile_count[kTiles];                    // and its number of tokens
  int counts[kBlockWarps];
  int sums[kBlockWarps];
  int begin, end;

  // Of the warps that compute; there may be others.
  __device__ __forceinline__ static void barrier() { ptx::named_barrier(15, kThreadCount); }
};

__device__ __forceinline__ int valid_tokens(const TokensView& tokens, int64_t request) {
  const uint8_t* mask = tokens.mask + request * tokens.tokens;
  int count = 0;
#pragma unroll 4
  for (int t = lane_index(); t < tokens.tokens; t += kWarp) count += __ldg(mask + t) != 0;
  return __reduce_add_sync(kAllLanes, count);
}

// Valid tokens of each request of a segment of `count` -> counts [count], in shared memory. Ends
// with a barrier.
template <class State>
__device__ __forceinline__ void count_tokens(const TokensView& tokens, int64_t first, int count,
                                             int* counts) {
  const int tid = static_cast<int>(threadIdx.x);
  for (int i = tid; i < count; i += State::kThreadCount) counts[i] = 0;
  State::barrier();
  const uint8_t* mask = tokens.mask + first * tokens.tokens;
  const int64_t bytes = static_cast<int64_t>(count) * tokens.tokens;
  const int head =
      static_cast<int>(min(static_cast<int64_t>(-reinterpret_cast<uintptr_t>(mask) & 15), bytes));
  const int64_t pieces = (bytes - head) / 16;
  auto count_byte = [&](int64_t i) {
    if (mask[i] != 0) atomicAdd(counts + i / tokens.tokens, 1);
  };
  if (tid < head) count_byte(tid);
  for (int64_t i = head + 16 * pieces + tid; i < bytes; i += State::kThreadCount) count_byte(i);
#pragma unroll 4
  for (int64_t i = tid; i < pieces; i += State::kThreadCount) {
    const int64_t at = head + 16 * i;
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(mask + at));
    // A bit a byte that is not 0.
    auto bits = [](uint32_t x) { return (__vcmpne4(x, 0) & 0x08040201u) * 0x01010101u >> 24; };
    const uint32_t set = bits(raw.x) | bits(raw.y) << 4 | bits(raw.z) << 8 | bits(raw.w) << 12;
    int request = static_cast<int>(static_cast<uint32_t>(at) / tokens.tokens);
    int left = tokens.tokens - static_cast<int>(at - static_cast<int64_t>(request) * tokens.tokens);
    for (int done = 0; done < 16; ++request, left = tokens.tokens) {
      const int width = min(left, 16 - done);
      const int found = __popc(set >> done & ((1u << width) - 1));
      if (found > 0) atomicAdd(counts + request, found);
      done += width;
    }
  }
  State::barrier();
}

// Requests [begin, end) of a segment of `count` that cluster `index` of `clusters` takes:
// contiguous, with about the same sum of work_of(request) each. The first has work, and so has each
// before which the segment is cut. Every thread gets the result; ends with a barrier.
template <class State, class WorkOf>
__device__ __forceinline__ void share_by_work(int count, int index, int clusters,
                                              const WorkOf& work_of, State& state) {
  const int tid = static_cast<int>(threadIdx.x);
  if (tid == 0) state.begin = state.end = count;
  constexpr int kOwn = (kSegment + State::kThreadCount - 1) / State::kThreadCount;
  int own = 0, sum = 0, all = 0;
#pragma unroll 4
  for (int i = 0; i < kOwn; ++i) {
    const int request = kOwn * tid + i;
    if (request < count) own += work_of(request);
  }
  int before = own;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, distance);
    if (lane_index() >= distance) before += other;
  }
  if (lane_index() == kWarp - 1) state.sums[warp_index()] = before;
  State::barrier();
  for (int w = 0; w < State::kWarpCount; ++w) {
    if (w < warp_index()) sum += state.sums[w];
    all += state.sums[w];
  }
  sum += before - own;
  const int low = static_cast<int>(static_cast<int64_t>(all) * index / clusters);
  const int high = static_cast<int>(static_cast<int64_t>(all) * (index + 1) / clusters);
  for (int i = 0; i < kOwn; ++i) {
    const int request = kOwn * tid + i;
    if (request >= count) break;
    const int work = work_of(request);
    if (work > 0 && sum >= low) atomicMin(&state.begin, request);
    if (work > 0 && sum >= high) atomicMin(&state.end, request);
    sum += work;
  }
  State::barrier();
}

// Requests [begin, end) of a segment of `count` that cluster `index` of `clusters` takes. Time goes
// by passes, the groups that form_group makes of `capacity` tiles, and those follow from the
// requests' sizes alone: passes are shared out, as many to each cluster. `scratch` is shared
// memory, 8 bytes for each of kSegment requests. Every thread gets the result.
template <class State>
__device__ __forceinline__ void share_of_segment(const TokensView& tokens, int64_t first, int count,
                                                 int index, int clusters, int capacity,
                                                 void* scratch, State& state) {
  constexpr int kBegins = 1 << 30;  // a pass begins with this request
  auto* const tiles = static_cast<int*>(scratch);
  const int tid = static_cast<int>(threadIdx.x);
  State::barrier();         // the last segment's share was read
  if (count <= clusters) {  // one each
    if (tid == 0) state.begin = min(index, count), state.end = min(index + 1, count);
    State::barrier();
    return;
  }
  count_tokens<State>(tokens, first, count, tiles);
  for (int i = tid; i < count; i += State::kThreadCount)
    tiles[i] = (tiles[i] + kTileRows - 1) / kTileRows;
  State::barrier();
  // The pass after one that begins with request i begins with next[i]; then two, four .. passes
  // on, and each time as many more are known to begin one.
  auto* next = reinterpret_cast<uint16_t*>(tiles + kSegment);
  auto* further = next + kSegment;
  for (int i = tid; i < count; i += State::kThreadCount) {
    int to = i + 1, sum = tiles[i];
    while (to < count && to < i + State::kWarpCount && sum + tiles[to] <= capacity)
      sum += tiles[to++];
    next[i] = static_cast<uint16_t>(to);
  }
  State::barrier();
  if (tid == 0) tiles[0] |= kBegins;
  for (int passes = 1; passes < count; passes *= 2) {
    State::barrier();
    for (int i = tid; i < count; i += State::kThreadCount) {
      const int to = next[i];
      if (to < count && (tiles[i] & kBegins) != 0) atomicOr(tiles + to, kBegins);
      further[i] = to < count ? next[to] : static_cast<uint16_t>(count);
    }
    auto* const swap = next;
    next = further, further = swap;
  }
  State::barrier();
  // A request of more tiles than a pass has counts as often as it fills one.
  const auto passes_at = [&](int i) {
    return (tiles[i] & kBegins) == 0 ? 0
                                     : max(((tiles[i] & ~kBegins) + capacity - 1) / capacity, 1);
  };
  share_by_work(count, index, clusters, passes_at, state);
}

// The longest group of requests first, first + 1, .. (before `end`) that fits in `tiles` tiles, and
// where their rows are. A long request's positions go to `long_position`.
template <class State>
__device__ __forceinline__ Group form_group(const TokensView& tokens, int64_t first, int64_t end,
                                            int tiles, int* long_position, State& state) {
  const int warp = warp_index(), lane = lane_index();
  State::barrier();  // the last group is done
  if (first + warp < end) {
    const int count = valid_tokens(tokens, first + warp);
    if (lane == 0) state.counts[warp] = count;
  }
  State::barrier();
  Group group{first, 0, 0, false};
  int own_first = -1;  // row of this warp's request
  for (int i = 0; i < State::kWarpCount && first + i < end; ++i) {
    const int need = (state.counts[i] + kTileRows - 1) / kTileRows;
    if (need > tiles && i == 0) {
      group = {first, 1, need, true};
      if (warp == 0) own_first = 0;
      break;
    }
    if (group.tiles + need > tiles) break;
    if (i == warp) own_first = kTileRows * group.tiles;
    group.tiles += need;
    ++group.requests;
  }
  if (own_first < 0) return group;
  int* position = (group.is_long ? long_position : state.position) + own_first;
  const uint8_t* mask = tokens.mask + (first + warp) * tokens.tokens;
  const int count = state.counts[warp];
  int row = 0;
  for (int begin = 0; begin < tokens.tokens; begin += kWarp) {
    const int t = begin + lane;
    const bool valid = t < tokens.tokens && __ldg(mask + t) != 0;
    const unsigned set = __ballot_sync(kAllLanes, valid);
    if (valid) position[row + __popc(set & ((1u << lane) - 1))] = t;
    row += __popc(set);
  }
  const int rows = (count + kTileRows - 1) / kTileRows * kTileRows;
  if (row + lane < rows) position[row + lane] = 0;
  if (!group.is_long) {
    for (int i = lane; i < rows; i += kWarp) {
      state.owner[own_first + i] = i < count ? warp : -1;
      if (i % kTileRows == 0) {
        state.tile_first[(own_first + i) / kTileRows] = own_first;
        state.tile_count[(own_first + i) / kTileRows] = count;
      }
    }
  }
  return group;
}

// States of the masked tokens of a group <- zeros, by warp `warp` of `warps`.
__device__ __forceinline__ void clear_masked(const TokensView& tokens, void* states, int dim,
                                             const Group& group, int warp, int warps) {
  const int64_t begin = group.first * tokens.tokens;
  const int64_t count = static_cast<int64_t>(group.requests) * tokens.tokens;
  const int pieces = dim / 8;
  auto* to = static_cast<uint4*>(states);
  for (int64_t i = warp; i < count; i += warps) {
    if (__ldg(tokens.mask + begin + i) != 0) continue;
    for (int piece = lane_index(); piece < pieces; piece += kWarp)
      to[(begin + i) * pieces + piece] = uint4{0, 0, 0, 0};
  }
}

}  // namespace sidmlp::cuda::sm90
