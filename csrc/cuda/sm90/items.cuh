// Leaves become items: availability, exclusion, several items on one leaf.
#pragma once

#include "cuda/exclusion.cuh"
#include "cuda/launch.h"
#include "cuda/sm90/hidden.cuh"

namespace sidmlp::cuda::sm90 {

// In shared memory, best first; those of even and odd levels apart.
struct Beam {
  uint4 prefix;  // see Prefix
  float score;
  int32_t node;
  int32_t first_child;
  int32_t children;  // how many
};

__device__ __forceinline__ bool item_allowed(const TrieView& trie, const Exclusion& exclusion,
                                             int32_t slot) {
  if (!__ldg(trie.leaf_available + slot)) return false;
  return exclusion.begin == exclusion.end || !exclusion.holds(__ldg(trie.leaf_item_ids + slot));
}

__device__ __forceinline__ bool leaf_allowed(const TrieView& trie, const Exclusion& exclusion,
                                             int32_t leaf) {
  // With an item a leaf, leaves and items have the same numbers.
  const bool one_item = trie.num_items == trie.num_nodes[trie.num_levels - 1];
  if (one_item) return item_allowed(trie, exclusion, leaf);
  const int32_t end = __ldg(trie.leaf_begin + leaf + 1);
  for (int32_t slot = __ldg(trie.leaf_begin + leaf); slot < end; ++slot) {
    if (item_allowed(trie, exclusion, slot)) return true;
  }
  return false;
}

// One request's row of the result by one warp: items of `count` leaves, best leaf first and in
// catalogue order inside a leaf, cut at k; the rest is padding.
__device__ __forceinline__ void write_items(const BeamDecodeProblem& problem,
                                            const Exclusion& exclusion, int64_t request, int count,
                                            const Beam* leaves) {
  const TrieView& trie = problem.trie;
  const int k = problem.config.k, levels = trie.num_levels, lane = lane_index();
  int64_t* items = problem.result.items + request * k;
  float* scores = problem.result.scores + request * k;
  int32_t* codes = problem.result.codes + request * k * levels;
  int total = 0;
  for (int base = 0; base < count && total < k; base += kWarp) {
    const int i = base + lane;
    int32_t slot = 0, end = 0;
    if (i < count) {
      slot = __ldg(trie.leaf_begin + leaves[i].node);
      end = __ldg(trie.leaf_begin + leaves[i].node + 1);
    }
    int own = 0;  // items that this leaf may emit, at most k
    for (int32_t s = slot; s < end && own < k; ++s) own += item_allowed(trie, exclusion, s);
    int sum = own;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += other;
    }
    int at = total + sum - own;
    for (int32_t s = slot; s < end && at < k; ++s) {
      if (!item_allowed(trie, exclusion, s)) continue;
      items[at] = __ldg(trie.leaf_item_ids + s);
      scores[at] = leaves[i].score;
      const Prefix own_codes{leaves[i].prefix};
      for (int j = 0; j < levels; ++j)
        codes[static_cast<int64_t>(at) * levels + j] = own_codes.code(j);
      ++at;
    }
    total = min(total + __shfl_sync(kAllLanes, sum, kWarp - 1), k);
  }
  for (int i = total + lane; i < k; i += kWarp) {
    items[i] = -1;
    scores[i] = -INFINITY;
    for (int j = 0; j < levels; ++j) codes[static_cast<int64_t>(i) * levels + j] = -1;
  }
  if (lane == 0) problem.result.counts[request] = total;
}

}  // namespace sidmlp::cuda::sm90
