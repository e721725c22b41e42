// Beam search of one request by one thread block: context -> items, all levels.
//
// A level runs in three steps. Every beam's children are looked up; an only child (levels >= 2 of
// "children") becomes a candidate at once, with log-probability 0. The other beams are taken in
// chunks: first layers (a warp per beam), further blocks, logits of the children or of every code
// (a warp per four logits), softmax statistics (a warp per beam), candidates (a thread each). The
// selector keeps the num_beams best; their keys become the beams of the next level.
#pragma once

#include "cuda/exclusion.cuh"
#include "cuda/heads.cuh"
#include "cuda/launch.h"
#include "cuda/selection.cuh"
#include "sidmlp/beam_key.h"

namespace sidmlp::cuda {

// Beams whose heads are computed together. Prefix sums have one more entry than beams.
struct Chunk {
  int count;
  int rank[kMaxChunk];
  int logit_begin[kMaxChunk + 1];  // where each beam's logits lie; multiples of 4
  int child_begin[kMaxChunk + 1];  // number of children of earlier beams
  float largest[kMaxChunk];        // of the logits that are normalised
  float log_total[kMaxChunk];      // log of the sum of exp(. - largest)
};

// Beams of the current level and of the next, in turn.
struct Beams {
  float* score;    // [num_beams], best first
  int32_t* node;   // [num_beams], node of the level
  int16_t* codes;  // [num_beams, L]
};

// Where the arrays of BeamDecodeLayout lie. Kept in shared memory: in registers the pointers of all
// steps would live at once, and spill.
struct BeamArrays {
  Beams beams[2];
  int32_t* first_child;
  int32_t* children;
  int32_t* active;
  BeamKey* keys;
  float* logits;
  float* first;
  float* hidden;
  float* next;
  float4* partial;
};

struct BeamState {  // in shared memory
  BeamArrays arrays;
  SelectorState selector;
  Chunk chunk;
  int warp_counts[kWarps];
  int finite;
};

// Holds references into the kernel's parameters and shared memory; arrays are looked up where they
// are used, which keeps registers free.
template <class W>
struct BeamSearch {
  const BeamDecodeProblem& problem;
  const BeamDecodeLayout& layout;
  const Exclusion& excluded;
  BeamState& state;

  __device__ const TrieView& trie() const { return problem.trie; }
  __device__ const HeadView& head(int level) const { return problem.heads.heads[level]; }
  __device__ int hidden_pad() const { return static_cast<int>(padded(problem.heads.hidden_dim)); }

  __device__ Selector selector() const {
    return {&state.selector, state.arrays.keys, layout.key_capacity, problem.config.num_beams};
  }
  // Beams that a level expands; those of level L are the leaves.
  __device__ Beams arriving(int level) const { return state.arrays.beams[level % 2]; }
  // Of each beam at the current level; after the last level, what its leaf emits.
  __device__ int32_t* first_child() const { return state.arrays.first_child; }
  __device__ int32_t* children() const { return state.arrays.children; }

  __device__ bool over_all_codes(int level) const { return problem.config.codebook || level == 0; }
  // Logits of every code are computed, not of children alone.
  __device__ bool dense(int level) const {
    return over_all_codes(level) || problem.config.level_mode[level] == LevelMode::kDense;
  }

  // ---- items ----

  __device__ bool allowed(int32_t slot) const {
    return trie().leaf_available[slot] && !excluded.holds(trie().leaf_item_ids[slot]);
  }
  __device__ bool leaf_allowed(int32_t leaf) const {
    for (int32_t slot = trie().leaf_begin[leaf]; slot < trie().leaf_begin[leaf + 1]; ++slot) {
      if (allowed(slot)) return true;
    }
    return false;
  }

  // ---- candidates ----

  // Of one thread; needs room for one key.
  __device__ void offer(int level, float score, int rank, int ordinal) const {
    if (!isfinite(score)) {
      state.finite = 0;
      return;
    }
    const BeamKey key =
        make_beam_key(score, static_cast<uint32_t>(rank), static_cast<uint32_t>(ordinal));
    if (key <= selector().threshold()) return;
    if (level + 1 == trie().num_levels && !leaf_allowed(first_child()[rank] + ordinal)) return;
    selector().push(key);
  }

  // Looks up the children of `count` beams, offers only children and lists the beams that need a
  // head in `active`; returns how many those are.
  __device__ int look_up(int level, int count) const {
    const Beams beams = arriving(level);
    const int tid = static_cast<int>(threadIdx.x);
    for (int rank = tid; rank < count; rank += kThreads) {
      const int32_t* begin = trie().child_begin[level] + beams.node[rank];
      first_child()[rank] = begin[0];
      children()[rank] = begin[1] - begin[0];
    }
    __syncthreads();
    const bool all_need = over_all_codes(level);
    if (!all_need) {
      for (int base = 0; base < count; base += kThreads) {
        selector().make_room();
        const int rank = base + tid;
        if (rank < count && children()[rank] == 1) offer(level, beams.score[rank], rank, 0);
      }
    }
    return compact(
        count, [&](int rank) { return all_need || children()[rank] != 1; }, state.arrays.active,
        state.warp_counts);
  }

  // Takes beams from active[begin..end) into the chunk while their logits fit. One thread.
  __device__ void fill_chunk(int level, int begin, int end) const {
    Chunk& chunk = state.chunk;
    int count = 0;
    chunk.logit_begin[0] = chunk.child_begin[0] = 0;
    while (begin + count < end && count < layout.heads.chunk) {
      const int rank = state.arrays.active[begin + count];
      const int width = dense(level) ? head(level).num_codes : children()[rank];
      const int64_t logit_end =
          static_cast<int64_t>(chunk.logit_begin[count]) + (width + 3) / 4 * 4;
      if (logit_end > layout.logit_capacity) break;  // never the first: capacity holds every width
      chunk.rank[count] = rank;
      chunk.logit_begin[count + 1] = static_cast<int>(logit_end);
      chunk.child_begin[count + 1] = chunk.child_begin[count] + children()[rank];
      ++count;
    }
    chunk.count = count;
  }

  // Logits / temperature of the chunk's beams, a warp per four.
  __device__ void chunk_logits(int level, const float* hidden) const {
    const Chunk& chunk = state.chunk;
    const bool every_code = dense(level);
    const int end = chunk.logit_begin[chunk.count];
    float* logits = state.arrays.logits;
    int i = 0;
    for (int at = 4 * warp_index(); at < end; at += 4 * kWarps) {
      while (at >= chunk.logit_begin[i + 1]) ++i;
      const int rank = chunk.rank[i];
      const int16_t* codes = trie().codes[level] + first_child()[rank];
      warp_logits<W>(
          problem.heads, head(level), hidden + i * hidden_pad(), at - chunk.logit_begin[i],
          every_code ? head(level).num_codes : children()[rank],
          [=](int c) { return every_code ? c : static_cast<int>(codes[c]); }, logits + at);
    }
    __syncthreads();
    const float temperature = problem.config.temperature[level];
    if (temperature == 1.0f) return;
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x); at < end; at += kThreads)
      logits[at] /= temperature;  // gaps between beams hold anything and are not read
    __syncthreads();
  }

  // Softmax statistics of the chunk's beams, a warp each; a logit that a denominator reads and
  // that is not finite ends the request.
  __device__ void chunk_statistics(int level) const {
    Chunk& chunk = state.chunk;
    const int lane = lane_index();
    const bool gather = dense(level) && !over_all_codes(level);
    for (int i = warp_index(); i < chunk.count; i += kWarps) {
      const int rank = chunk.rank[i];
      const float* own = state.arrays.logits + chunk.logit_begin[i];
      const int16_t* codes = trie().codes[level] + first_child()[rank];
      const int width = over_all_codes(level) ? head(level).num_codes : children()[rank];
      bool finite = true;
      float largest = -INFINITY;
      for (int j = lane; j < width; j += kWarp) {
        const float logit = own[gather ? codes[j] : j];
        finite = finite && isfinite(logit);
        largest = fmaxf(largest, logit);
      }
      largest = warp_max(largest);
      float total = 0.0f;
      for (int j = lane; j < width; j += kWarp) total += expf(own[gather ? codes[j] : j] - largest);
      total = warp_sum(total);
      if (!finite) state.finite = 0;
      if (lane == 0) {
        chunk.largest[i] = largest;
        chunk.log_total[i] = logf(total);
      }
    }
    __syncthreads();
  }

  // Offers every child of the chunk's beams, a thread each.
  __device__ void chunk_candidates(int level) const {
    const float* parent_score = arriving(level).score;
    const Chunk& chunk = state.chunk;
    const float weight = problem.config.level_weight[level];
    const bool gather = dense(level);
    const int end = chunk.child_begin[chunk.count];
    int i = 0;
    for (int base = 0; base < end; base += kThreads) {
      selector().make_room();
      const int at = base + static_cast<int>(threadIdx.x);
      if (at >= end) continue;
      while (at >= chunk.child_begin[i + 1]) ++i;
      const int rank = chunk.rank[i], ordinal = at - chunk.child_begin[i];
      const int place =
          gather ? static_cast<int>(trie().codes[level][first_child()[rank] + ordinal]) : ordinal;
      const float logit = state.arrays.logits[chunk.logit_begin[i] + place];
      float log_probability = (logit - chunk.largest[i]) - chunk.log_total[i];
      if (log_probability < -kLargestFinite) log_probability = -kLargestFinite;
      offer(level, parent_score[rank] + weight * log_probability, rank, ordinal);
    }
    __syncthreads();
  }

  // ---- levels ----

  // The selector's keys become beams of the next level; returns how many.
  __device__ int advance(int level) const {
    const Beams from = arriving(level), to = arriving(level + 1);
    const int count = selector().finish(), levels = trie().num_levels;
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const BeamKey key = selector().keys[i];
      const int rank = static_cast<int>(key_parent_rank(key));
      const int32_t child = first_child()[rank] + static_cast<int32_t>(key_ordinal(key));
      const int16_t* prefix = from.codes + static_cast<int64_t>(rank) * levels;
      int16_t* codes = to.codes + static_cast<int64_t>(i) * levels;
      to.score[i] = key_score(key);
      to.node[i] = child;
      for (int j = 0; j < level; ++j) codes[j] = prefix[j];
      codes[level] = trie().codes[level][child];
    }
    __syncthreads();
    return count;
  }

  // One level: `count` beams -> beams of the next; returns how many.
  __device__ int expand(int level, int count) const {
    selector().clear();
    const int num_active = look_up(level, count);
    int taken;
    for (int begin = 0; begin < num_active; begin += taken) {
      if (threadIdx.x == 0) fill_chunk(level, begin, num_active);
      __syncthreads();
      taken = state.chunk.count;
      const int16_t* codes = arriving(level).codes;
      for (int i = warp_index(); i < taken; i += kWarps) {
        warp_first_layer<W>(problem.heads, level, state.arrays.first + level * hidden_pad(),
                            codes + static_cast<int64_t>(state.chunk.rank[i]) * trie().num_levels,
                            state.arrays.hidden + i * hidden_pad());
      }
      __syncthreads();
      const float* hidden =
          further_blocks<W>(problem.heads, head(level), taken, state.arrays.hidden,
                            state.arrays.next, state.arrays.partial);
      chunk_logits(level, hidden);
      chunk_statistics(level);
      chunk_candidates(level);
    }
    return advance(level);
  }

  // ---- result ----

  // Leaves become items, in catalogue order inside a leaf, cut at k; the rest of the request's row
  // is padding.
  __device__ void write_result(int num_leaves, int64_t request) const {
    const ResultView& result = problem.result;
    const Beams leaves = arriving(trie().num_levels);
    const int tid = static_cast<int>(threadIdx.x), k = problem.config.k, levels = trie().num_levels;
    int64_t* items = result.items + request * k;
    float* scores = result.scores + request * k;
    int32_t* codes = result.codes + request * k * levels;

    // children()[i] <- items that leaf i may emit, at most k
    for (int i = tid; i < num_leaves; i += kThreads) {
      const int32_t end = trie().leaf_begin[leaves.node[i] + 1];
      int count = 0;
      for (int32_t slot = trie().leaf_begin[leaves.node[i]]; slot < end && count < k; ++slot)
        count += allowed(slot);
      children()[i] = count;
    }
    __syncthreads();
    const int count = leaf_offsets(num_leaves);
    for (int i = tid; i < num_leaves; i += kThreads) {
      int at = children()[i];
      const int32_t end = trie().leaf_begin[leaves.node[i] + 1];
      for (int32_t slot = trie().leaf_begin[leaves.node[i]]; slot < end && at < k; ++slot) {
        if (!allowed(slot)) continue;
        items[at] = trie().leaf_item_ids[slot];
        scores[at] = leaves.score[i];
        for (int j = 0; j < levels; ++j)
          codes[static_cast<int64_t>(at) * levels + j] =
              leaves.codes[static_cast<int64_t>(i) * levels + j];
        ++at;
      }
    }
    for (int i = count + tid; i < k; i += kThreads) {
      items[i] = -1;
      scores[i] = -INFINITY;
      for (int j = 0; j < levels; ++j) codes[static_cast<int64_t>(i) * levels + j] = -1;
    }
    if (tid == 0) result.counts[request] = count;
    __syncthreads();
  }

  // children()[i] <- min(k, children()[0] + .. + children()[i-1]); returns min(k, their sum).
  __device__ int leaf_offsets(int num_leaves) const {
    if (warp_index() == 0) {
      const int lane = lane_index();
      int total = 0;
      for (int base = 0; base < num_leaves; base += kWarp) {
        const int own = base + lane < num_leaves ? children()[base + lane] : 0;
        int sum = own;  // of lanes 0..lane, at most 32 k
        for (int distance = 1; distance < kWarp; distance *= 2) {
          const int other = __shfl_up_sync(kAllLanes, sum, distance);
          if (lane >= distance) sum += other;
        }
        if (base + lane < num_leaves)
          children()[base + lane] = min(total + sum - own, problem.config.k);
        total = min(total + __shfl_sync(kAllLanes, sum, kWarp - 1), problem.config.k);
      }
      if (lane == 0) state.warp_counts[0] = total;
    }
    __syncthreads();
    return state.warp_counts[0];
  }
};

// Fills state.arrays. Called by all threads; the next barrier publishes it.
__device__ inline void place_arrays(const BeamDecodeLayout& layout, const Memory& memory,
                                    BeamState& state) {
  if (threadIdx.x != 0) return;
  BeamArrays& arrays = state.arrays;
  for (int i = 0; i < 2; ++i) {
    const BeamsLayout& slots = layout.beams[i];
    arrays.beams[i] = {memory.at<float>(slots.score), memory.at<int32_t>(slots.node),
                       memory.at<int16_t>(slots.codes)};
  }
  arrays.first_child = memory.at<int32_t>(layout.first_child);
  arrays.children = memory.at<int32_t>(layout.children);
  arrays.active = memory.at<int32_t>(layout.active);
  arrays.keys = memory.at<BeamKey>(layout.keys);
  arrays.logits = memory.at<float>(layout.logits);
  arrays.first = memory.at<float>(layout.first);
  arrays.hidden = memory.at<float>(layout.heads.hidden);
  arrays.next = memory.at<float>(layout.heads.next);
  arrays.partial = memory.at<float4>(layout.partial);
}

// All levels of one request from its context [D]. Called by all threads after a barrier that
// follows place_arrays; ends with a barrier.
template <class W>
__device__ void beam_decode_request(const BeamDecodeProblem& problem,
                                    const BeamDecodeLayout& layout, int64_t request,
                                    const float* context, BeamState& state) {
  const int tid = static_cast<int>(threadIdx.x), levels = problem.heads.num_levels;
  bool finite = true;
  for (int i = tid; i < problem.heads.dim; i += kThreads) finite = finite && isfinite(context[i]);
  finite = __syncthreads_and(finite);

  const Exclusion excluded = exclusion_of(problem.exclude, problem.num_excluded, request);
  const BeamSearch<W> search{problem, layout, excluded, state};
  int count = 1;
  if (tid == 0) {
    state.finite = 1;
    search.arriving(0).score[0] = 0.0f;
    search.arriving(0).node[0] = 0;
  }
  if (finite)
    context_part<W>(problem.heads, 0, levels, context, state.arrays.partial, state.arrays.first);
  __syncthreads();
  for (int level = 0; level < levels && finite; ++level) {
    count = search.expand(level, count);
    finite = state.finite != 0;
    __syncthreads();  // nobody reports a non-finite number before everybody has read
  }
  search.write_result(finite ? count : 0, request);
}

}  // namespace sidmlp::cuda
