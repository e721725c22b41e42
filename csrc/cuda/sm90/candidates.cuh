// What a candidate of a level is, and the beam that it becomes.
#pragma once

#include "cuda/sm90/items.cuh"
#include "cuda/sm90/topk.cuh"

namespace sidmlp::cuda::sm90 {

// The key of node `child` of the next level, the `ordinal`-th child of the beam with rank `rank`.
__device__ __forceinline__ BeamKey candidate_key(const TrieView& trie, const Exclusion& exclusion,
                                                 int level, float score, int rank, int child,
                                                 int ordinal) {
  if (!isfinite(score)) return kBroken;
  if (level + 1 == trie.num_levels && !leaf_allowed(trie, exclusion, child)) return kNoKey;
  return make_beam_key(score, static_cast<uint32_t>(rank), static_cast<uint32_t>(ordinal));
}

// to <- the beam of a key of `level`, whose parents are `from`.
__device__ __forceinline__ void become_beam(const TrieView& trie, int level, const Beam* from,
                                            BeamKey key, Beam& to) {
  const int next = level + 1, parent = static_cast<int>(key_parent_rank(key));
  const int32_t node = from[parent].first_child + static_cast<int32_t>(key_ordinal(key));
  Prefix prefix{from[parent].prefix};
  prefix.set(level, __ldg(trie.codes[level] + node));
  to.score = key_score(key);
  to.node = node;
  if (next < trie.num_levels) {
    const int32_t begin = __ldg(trie.child_begin[next] + node);
    to.first_child = begin;
    to.children = __ldg(trie.child_begin[next] + node + 1) - begin;
  }
  to.prefix = prefix.words;
}

}  // namespace sidmlp::cuda::sm90
