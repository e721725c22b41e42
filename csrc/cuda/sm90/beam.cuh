// Levels of one request, from the logits of level 1 to its items, by a block or by a team of blocks
// of a cluster.
//
// Every block of a team holds all beams and all keys. It computes candidates of its own beams only
// and stores their keys in the shared memory of the whole team; after a cluster barrier each block
// makes the same cut.
#pragma once

#include "cuda/ptx/cluster.cuh"
#include "cuda/sm90/hidden.cuh"
#include "cuda/sm90/items.cuh"
#include "cuda/sm90/products.cuh"
#include "cuda/sm90/topk.cuh"

namespace sidmlp::cuda::sm90 {

// In shared memory, best beam first; those of even and odd levels apart.
struct Beams {
  float* score;
  int32_t* node;
  int32_t* first_child;
  int32_t* children;
  uint4* prefix;

  __device__ Beams(char* memory, int beams, int level) {
    memory += (level % 2) * beams * 32;
    prefix = reinterpret_cast<uint4*>(memory);
    score = reinterpret_cast<float*>(prefix + beams);
    node = reinterpret_cast<int32_t*>(score + beams);
    first_child = node + beams;
    children = first_child + beams;
  }
};

// A beam whose logits are a row of the dense product.
struct Row {
  int rank;
  int key;  // where its first child's key goes
};

struct BeamState {  // in shared memory
  Row rows[kMaxRows];
  Exclusion exclusion;
  int broken;         // a score or a logit is not finite: no items
  int num_survivors;  // of TopK
};

// Beams [begin, end) whose candidates are collected at once.
struct Pass {
  int end;
  int keys;  // of their children
  int rows;  // that the largest share of a team computes
};

template <class W, int kVectors>
struct Search {
  const BeamDecodeProblem& problem;
  const Shape& shape;
  char* memory;  // dynamic shared memory
  BeamState& state;
  uint32_t block;      // rank in the cluster
  const float* first;  // of the current request: context parts of the first layers, [L * H]

  __device__ const TrieView& trie() const { return problem.trie; }
  __device__ int hidden() const { return problem.heads.hidden_dim; }
  __device__ int team_rank() const { return static_cast<int>(block) % shape.team; }
  __device__ Beams beams(int level) const {
    return Beams(memory + shape.beam_state, shape.beams, level);
  }
  __device__ BeamKey* keys(int level) const {
    const int buffer = shape.team > 1 ? level % 2 : 0;
    return reinterpret_cast<BeamKey*>(memory + shape.keys) + buffer * shape.key_capacity;
  }
  __device__ TopK top() const {
    return {reinterpret_cast<uint32_t*>(memory + shape.bins),
            reinterpret_cast<BeamKey*>(memory + shape.survivors), &state.num_survivors};
  }

  // ---- candidates ----

  __device__ __forceinline__ void store_key(int level, int at, BeamKey key, bool shared) const {
    BeamKey* place = keys(level) + at;
    if (!shared) {
      *place = key;
      return;
    }
    const uint32_t first = block - static_cast<uint32_t>(team_rank());
    for (int i = 0; i < shape.team; ++i) ptx::store_peer(ptx::peer_address(place, first + i), key);
  }

  __device__ __forceinline__ BeamKey candidate(int level, float score,
                                               int rank, int child, int ordinal) const {
    if (!isfinite(score)) return kBroken;
    if (level + 1 == trie().num_levels && !leaf_allowed(trie(), state.exclusion, child)) return kNoKey;
    return make_beam_key(score, static_cast<uint32_t>(rank), static_cast<uint32_t>(ordinal));
  }

  // Keys of one beam's children by one warp. `logits`: of every code, or, with `listed`, of the
  // children in order.
  __device__ __forceinline__ void offer_children(int level, int rank,
                                                 int key, const float* logits, bool listed,
                                                 bool shared) const {
    const Beams from = beams(level);
    const int lane = lane_index(), count = from.children[rank];
    const int first_child = from.first_child[rank];
    const int16_t* codes = trie().codes[level] + first_child;
    const float temperature = problem.config.temperature[level];
    const bool over_codes = problem.config.codebook;
    auto tempered = [=](float logit) { return temperature == 1.0f ? logit : logit / temperature; };
    auto logit_of = [=](int j) {
      return tempered(logits[listed ? j : static_cast<int>(__ldg(codes + j))]);
    };
    float own = -INFINITY;  // of child `lane`, kept: most beams have at most 32 children
    if (lane < count) own = logit_of(lane);
    bool finite = true;
    float largest = -INFINITY, total = 0.0f;
    if (over_codes) {
      const int width = problem.heads.heads[level].num_codes;
      for (int c = lane; c < width; c += kWarp) {
        const float logit = tempered(logits[c]);
        finite = finite && isfinite(logit);
        largest = fmaxf(largest, logit);
      }
      largest = warp_max(largest);
      for (int c = lane; c < width; c += kWarp) total += __expf(tempered(logits[c]) - largest);
    } else {
      if (lane < count) finite = isfinite(own);
      largest = own;
      for (int j = lane + kWarp; j < count; j += kWarp) {
        const float logit = logit_of(j);
        finite = finite && isfinite(logit);
        largest = fmaxf(largest, logit);
      }
      largest = warp_max(largest);
      if (lane < count) total = __expf(own - largest);
      for (int j = lane + kWarp; j < count; j += kWarp) total += __expf(logit_of(j) - largest);
    }
    const float log_total = __logf(warp_sum(total));
    finite = __all_sync(kAllLanes, finite);
    const float score = from.score[rank], weight = problem.config.level_weight[level];
    for (int j = lane; j < count; j += kWarp) {
      const float logit = j < kWarp ? own : logit_of(j);
      const float log_probability = fmaxf((logit - largest) - log_total, -kLargestFinite);
      const float sum = fmaf(weight, log_probability, score);
      const BeamKey found =
          finite ? candidate(level, sum, rank, first_child + j, j) : kBroken;
      store_key(level, key + j, found, shared);
    }
  }

  // ---- cuts ----

  // Makes the best of `count` keys the beams of the next level; returns how many.
  __device__ __forceinline__ int advance(int level, int count) const {
    const Beams from = beams(level), to = beams(level + 1);
    const int next = level + 1;
    const bool leaves = next == trie().num_levels;
    const int found = best_keys(
        top(), keys(level), count, problem.config.num_beams, [&](int rank, BeamKey key) {
          if (key == kBroken) {
            state.broken = 1;
            return;
          }
          const int parent = static_cast<int>(key_parent_rank(key));
          const int32_t node = from.first_child[parent] + static_cast<int32_t>(key_ordinal(key));
          Prefix prefix{from.prefix[parent]};
          prefix.set(level, __ldg(trie().codes[level] + node));
          to.score[rank] = key_score(key);
          to.node[rank] = node;
          if (!leaves) {
            const int32_t begin = __ldg(trie().child_begin[next] + node);
            to.first_child[rank] = begin;
            to.children[rank] = __ldg(trie().child_begin[next] + node + 1) - begin;
          }
          to.prefix[rank] = prefix.words;
        });
    return state.broken ? 0 : found;
  }

  // Keeps the best of `count` keys in front; returns how many.
  __device__ __noinline__ int keep_best(int level, int count) const {
    BeamKey* list = keys(level);
    int place = -1;  // of a thread's key: the list is still read while places are found
    BeamKey own = kNoKey;
    const int found =
        best_keys(top(), list, count, problem.config.num_beams, [&](int rank, BeamKey key) {
          place = rank;
          own = key;
        });
    if (place >= 0) list[place] = own;
    __syncthreads();
    return found;
  }

  // ---- levels ----

  // Level 1 from the logits of every code.
  __device__ __forceinline__ int root(const float* logits) const {
    const Beams from = beams(0);
    const int tid = static_cast<int>(threadIdx.x), lane = lane_index();
    const int width = problem.heads.heads[0].num_codes, count = trie().num_nodes[0];
    const float temperature = problem.config.temperature[0];
    const float weight = problem.config.level_weight[0];
    auto tempered = [=](float logit) { return temperature == 1.0f ? logit : logit / temperature; };
    if (tid == 0) {
      from.first_child[0] = 0;
      from.prefix[0] = uint4{0, 0, 0, 0};
    }
    bool finite = true;  // every warp for itself: cheaper than a barrier
    float largest = -INFINITY, total = 0.0f;
    for (int c = lane; c < width; c += kWarp) {
      const float logit = tempered(logits[c]);
      finite = finite && isfinite(logit);
      largest = fmaxf(largest, logit);
    }
    largest = warp_max(largest);
    for (int c = lane; c < width; c += kWarp) total += __expf(tempered(logits[c]) - largest);
    const float log_total = __logf(warp_sum(total));
    finite = __all_sync(kAllLanes, finite);
    for (int j = tid; j < count; j += kThreads) {
      const float logit = tempered(logits[__ldg(trie().codes[0] + j)]);
      const float log_probability = fmaxf((logit - largest) - log_total, -kLargestFinite);
      store_key(0, j, finite ? candidate(0, weight * log_probability, 0, j, j) : kBroken,
                false);
    }
    __syncthreads();
    return advance(0, count);
  }

  __device__ bool needs_head(int children) const {
    return problem.config.codebook ? children > 0 : children > 1;
  }

  // How far a pass from `begin` on gets. By every warp, with the same result.
  __device__ __forceinline__ Pass plan_pass(const Beams& from, int begin, int count, int room,
                                            int team, int most_rows) const {
    const int lane = lane_index();
    int keys = 0, active = 0;
    for (int base = begin; base < count; base += kWarp) {
      const int rank = base + lane, children = rank < count ? from.children[rank] : 0;
      int sum = children;
#pragma unroll
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, distance);
        if (lane >= distance) sum += other;
      }
      const unsigned need = __ballot_sync(kAllLanes, needs_head(children));
      const int rows = active + __popc(need & (0xffffffffu >> (31 - lane)));
      const bool fits = rank < count && keys + sum <= room && rows <= most_rows * team;
      const int taken = __popc(__ballot_sync(kAllLanes, fits));
      if (taken > 0) {
        keys += __shfl_sync(kAllLanes, sum, taken - 1);
        active = __shfl_sync(kAllLanes, rows, taken - 1);
      }
      if (taken < min(kWarp, count - base)) return {base + taken, keys, (active + team - 1) / team};
    }
    return {count, keys, (active + team - 1) / team};
  }

  // body(rank, row, key) by one warp for each beam of [begin, end) that needs a head and is this
  // block's; keys of only children are stored on the way, by every block of a team for itself.
  // Returns how many rows are this block's.
  template <class Body>
  __device__ __forceinline__ int for_own_beams(int level,
                                               const Beams& from, int begin, int end, int kept,
                                               int team, int rank_in_team, const Body& body) const {
    const int lane = lane_index(), warp = warp_index();
    int keys = kept, active = 0;
    for (int base = begin; base < end; base += kWarp) {
      const int rank = base + lane, children = rank < end ? from.children[rank] : 0;
      int sum = children;
#pragma unroll
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, distance);
        if (lane >= distance) sum += other;
      }
      const bool needs = needs_head(children);
      const unsigned need = __ballot_sync(kAllLanes, needs);
      const int index = active + __popc(need & ((1u << lane) - 1));
      if (!needs && children == 1 && base / kWarp % kWarps == warp)
        store_key(level, keys + sum - 1,
                  candidate(level, from.score[rank], rank, from.first_child[rank], 0),
                  false);
      const bool own = needs && index % team == rank_in_team && index / team % kWarps == warp;
      unsigned mine = __ballot_sync(kAllLanes, own);
      while (mine != 0) {
        const int source = __ffs(static_cast<int>(mine)) - 1;
        mine &= mine - 1;
        const int first_key = keys + __shfl_sync(kAllLanes, sum - children, source);
        body(base + source, __shfl_sync(kAllLanes, index, source) / team, first_key);
      }
      keys += __shfl_sync(kAllLanes, sum, kWarp - 1);
      active += __popc(need);
    }
    return (active - rank_in_team + team - 1) / team;
  }

  __device__ __forceinline__ const float* first_part(int level) const {
    return first + level * hidden();
  }

  // Logits of every code for `count` rows: hidden rows in shared memory -> logits there.
  template <int kTiles>
  __device__ __forceinline__ void row_logits(int level, int count) const {
    constexpr int kCodeTiles = 2;
    const HeadView& head = problem.heads.heads[level];
    const W* weight = static_cast<const W*>(head.out_weight);
    const char* x = memory + shape.hidden + (lane_index() / 4) * shape.row_bytes +
                    16 * (lane_index() % 4);
    auto* logits = reinterpret_cast<float*>(memory + shape.logits);
    const int g = lane_index() / 4, t = lane_index() % 4, codes = head.num_codes;
    for (int code = 16 * kCodeTiles * warp_index(); code < codes;
         code += 16 * kCodeTiles * kWarps) {
      const W* rows[2 * kCodeTiles];
      code_rows(weight, hidden(), code, codes, rows);
      float sum[kCodeTiles][kTiles][4] = {};
      RowPieces<2 * kCodeTiles> now, next;  // the next weights are on their way meanwhile
      now.load(rows, 0);
      for (int k = 0; k < hidden(); k += 64) {
        next.load(rows, min(k + 32, hidden() - 32));
        multiply_pieces<W, kCodeTiles, kTiles>(now, x + 2 * k, shape.row_bytes, sum);
        if (k + 32 >= hidden()) break;
        now.load(rows, min(k + 64, hidden() - 32));
        multiply_pieces<W, kCodeTiles, kTiles>(next, x + 2 * k + 64, shape.row_bytes, sum);
      }
      if (shape.logits_over_hidden) __syncthreads();  // one turn of this loop for every warp
      float bias[2 * kCodeTiles];
#pragma unroll
      for (int i = 0; i < 2 * kCodeTiles; ++i)
        bias[i] = __ldg(head.out_bias + min(code + 8 * i + g, codes - 1));
      float* to = logits + 2 * t * shape.logit_stride + code + g;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (8 * n + 2 * t + r < count) {
#pragma unroll
            for (int i = 0; i < 2 * kCodeTiles; ++i) {
              if (code + 8 * i + g < codes) to[8 * i] = sum[i / 2][n][i % 2 * 2 + r] + bias[i];
            }
          }
          to += shape.logit_stride;
        }
        to += 6 * shape.logit_stride;
      }
    }
  }

  // Candidates of beams [begin, pass.end) with a product over every code.
  __device__ __forceinline__ void dense_pass(int level, int begin,
                                             const Pass& pass, int kept, int team,
                                             int rank_in_team) const {
    const Beams from = beams(level);
    const int own = for_own_beams(
        level, from, begin, pass.end, kept, team, rank_in_team,
        [&](int rank, int row, int key) {
          HiddenRow<kVectors> values;
          hidden_row<W>(problem.heads, level, first_part(level), Prefix{from.prefix[rank]}, values);
          char* place = memory + shape.hidden + row * shape.row_bytes;
          for_pieces<W>(values, hidden(), [&](int at, const uint4& piece) {
            *reinterpret_cast<uint4*>(place + at) = piece;
          });
          if (lane_index() == 0) state.rows[row] = {rank, key};
        });
    __syncthreads();
    if (pass.rows <= 8) {
      row_logits<1>(level, own);
    } else if (pass.rows <= 16) {
      row_logits<2>(level, own);
    } else if (pass.rows <= 32) {
      row_logits<4>(level, own);
    } else {
      row_logits<kMaxRows / 8>(level, own);
    }
    // Warps without codes still meet the barrier inside row_logits.
    if (shape.logits_over_hidden && 32 * warp_index() >= problem.heads.heads[level].num_codes)
      __syncthreads();
    __syncthreads();
    const auto* logits = reinterpret_cast<const float*>(memory + shape.logits);
    for (int row = warp_index(); row < own; row += kWarps)
      offer_children(level, state.rows[row].rank, state.rows[row].key,
                     logits + row * shape.logit_stride, false, team > 1);
  }

  // Candidates of beams [begin, pass.end) with a dot product per child.
  __device__ __forceinline__ void sparse_pass(int level, int begin,
                                              const Pass& pass, int kept, int team,
                                              int rank_in_team) const {
    const Beams from = beams(level);
    const HeadView& head = problem.heads.heads[level];
    const W* weight = static_cast<const W*>(head.out_weight);
    float* logits = reinterpret_cast<float*>(memory + shape.hidden) + warp_index() * shape.scratch;
    for_own_beams(level, from, begin, pass.end, kept, team, rank_in_team,
                  [&](int rank, int, int key) {
                    HiddenRow<kVectors> values;
                    hidden_row<W>(problem.heads, level, first_part(level),
                                  Prefix{from.prefix[rank]}, values);
                    const int count = from.children[rank], lane = lane_index();
                    const int16_t* codes = trie().codes[level] + from.first_child[rank];
                    __syncwarp();  // the last beam's logits have been read
                    for (int j = 0; j < count; j += 4) {
                      const int mine = j + lane / 8;
                      const int code = __ldg(codes + min(mine, count - 1));
                      const float bias = __ldg(head.out_bias + code);
                      const W* rows[4];
#pragma unroll
                      for (int i = 0; i < 4; ++i)
                        rows[i] = weight + static_cast<int64_t>(
                                               __shfl_sync(kAllLanes, code, 8 * i)) *
                                               hidden();
                      const float dot = four_dots<W>(values, hidden(), rows);
                      if (lane % 8 == 0 && mine < count) logits[mine] = dot + bias;
                    }
                    __syncwarp();
                    offer_children(level, rank, key, logits, true, team > 1);
                  });
  }

  // Beams of `level` (1 ..) -> those of the next; returns how many.
  __device__ __forceinline__ int expand(int level, int count) const {
    const Beams from = beams(level);
    const bool dense =
        problem.config.codebook || problem.config.level_mode[level] == LevelMode::kDense;
    const int most_rows = dense ? shape.rows : shape.beams;
    int team = shape.team, rank_in_team = team_rank();
    Pass pass = plan_pass(from, 0, count, shape.key_capacity, team, most_rows);
    if (team > 1 && pass.end < count) {
      // Too many for one pass: each block does it all, since others of the cluster do not wait.
      team = 1;
      rank_in_team = 0;
      pass = plan_pass(from, 0, count, shape.key_capacity, team, most_rows);
    }
    int begin = 0, kept = 0;
    while (true) {
      if (dense) {
        dense_pass(level, begin, pass, kept, team, rank_in_team);
      } else {
        sparse_pass(level, begin, pass, kept, team, rank_in_team);
      }
      if (pass.end >= count) break;
      __syncthreads();
      begin = pass.end;
      kept = keep_best(level, kept + pass.keys);
      pass = plan_pass(from, begin, count, shape.key_capacity - kept, team, most_rows);
    }
    if (shape.team > 1) {
      ptx::cluster_arrive();
      ptx::cluster_wait();
    } else {
      __syncthreads();
    }
    return advance(level, kept + pass.keys);
  }

  // All levels of one request; `request` < 0: none, but the cluster's barriers.
  __device__ __forceinline__ void run(int64_t request, const float* root_logits) {
    if (threadIdx.x == 0) {
      state.broken = 0;
      if (request >= 0) state.exclusion = exclusion_of(problem, request);
    }
    __syncthreads();
    int count = request < 0 ? 0 : root(root_logits);
    for (int level = 1; level < trie().num_levels; ++level) count = expand(level, count);
    if (request >= 0 && team_rank() == 0 && warp_index() == 0) {
      const Beams leaves = beams(trie().num_levels);
      write_items(problem, state.exclusion, request, count, leaves.score, leaves.node, leaves.prefix);
    }
  }
};

}  // namespace sidmlp::cuda::sm90
