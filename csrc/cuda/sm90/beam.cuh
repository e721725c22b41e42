// Levels of one request, from the logits of level 1 to its items, by a block or by a team of blocks
// of a cluster.
//
// Every block of a team holds all beams and all keys. It computes candidates of its own beams only
// and stores their keys in the shared memory of the whole team; after a cluster barrier each block
// makes the same cut.
#pragma once

#include "cuda/ptx/cluster.cuh"
#include "cuda/sm90/candidates.cuh"
#include "cuda/sm90/hidden.cuh"
#include "cuda/sm90/products.cuh"
#include "cuda/sm90/topk.cuh"

namespace sidmlp::cuda::sm90 {

struct BeamState {               // in shared memory
  int first_key[kFewBeams + 1];  // where the keys of each beam's children go; at the end their sum
  int heads[kFewBeams];          // ranks of the beams that need a head, ascending
  int num_heads;
  int num_survivors;  // of TopK
  Exclusion exclusion;
  // A score or a logit is not finite: no items. Of requests in even and odd slots, since some warps
  // may still read the last one's when the next begins.
  int broken[2];
};

// Beams whose keys are collected at once: ranks [begin, end), of which [first_head, last_head) of
// `heads` need one. Their keys are stored from `kept` on.
struct Pass {
  int begin, end;
  int first_head, last_head;
  int kept;
};

// Where a pass ends that cannot take all beams from `begin` on: the rank after its last beam, and
// the index after its last head. Rare, and out of line so that it costs no registers elsewhere.
__device__ __noinline__ inline int2 pass_ends(const int* first_key, const int* heads, int begin,
                                              int count, int first_head, int num_heads, int limit,
                                              int most_heads) {
  int2 ends{begin, first_head};
  while (ends.x < count && first_key[ends.x + 1] <= limit) {
    const bool head = ends.y < num_heads && heads[ends.y] == ends.x;
    if (head && ends.y - first_head == most_heads) break;
    ends.y += head;
    ++ends.x;
  }
  return ends;
}

template <class W, int kVectors, bool kFull>
struct Search {
  const BeamDecodeProblem& problem;
  const Shape& shape;
  char* memory;  // dynamic shared memory
  BeamState& state;
  uint32_t block;      // rank in the cluster
  const float* first;  // of the current request: context parts of the first layers, [L * H]

  __device__ const TrieView& trie() const { return problem.trie; }
  __device__ int hidden() const { return kFull ? 8 * kWarp * kVectors : problem.heads.hidden_dim; }
  __device__ int team() const { return 1 << shape.team_shift; }
  __device__ int team_rank() const { return static_cast<int>(block) & (team() - 1); }
  __device__ Beam* beams(int level) const {
    return reinterpret_cast<Beam*>(memory + shape.beam_state) + level % 2 * shape.beams;
  }
  __device__ BeamKey* keys(int level) const {
    const int buffer = shape.team_shift > 0 ? level % 2 : 0;
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
    for (int i = 0; i < team(); ++i) ptx::store_peer(ptx::peer_address(place, first + i), key);
  }

  __device__ __forceinline__ BeamKey candidate(int level, float score, int rank, int child,
                                               int ordinal) const {
    return candidate_key(trie(), state.exclusion, level, score, rank, child, ordinal);
  }

  // Keys of the children of up to four beams by one warp, eight lanes a beam; `rank` < 0: none.
  // logits[code] are of every code; with `listed`, the child's logit lies where its key goes.
  __device__ __forceinline__ void offer_children(int level, int rank, int key, const float* logits,
                                                 bool listed, bool shared) const {
    constexpr int kLanes = 8, kOwn = 4;  // children that a lane keeps
    const int lane = lane_index() % kLanes;
    const Beam* beam = beams(level) + max(rank, 0);
    const int count = rank < 0 ? 0 : beam->children, first_child = beam->first_child;
    const int16_t* codes = trie().codes[level] + first_child;
    const float temperature = problem.config.temperature[level];
    const BeamKey* own_keys = keys(level) + key;
    auto tempered = [=](float logit) { return temperature == 1.0f ? logit : logit / temperature; };
    auto logit_of = [=](int j) {
      return tempered(listed ? *reinterpret_cast<const float*>(own_keys + j)
                             : logits[__ldg(codes + j)]);
    };
    float own[kOwn];
    bool finite = true;
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      own[i] = -INFINITY;
      if (lane + kLanes * i < count) {
        own[i] = logit_of(lane + kLanes * i);
        finite = finite && isfinite(own[i]);
        largest = fmaxf(largest, own[i]);
      }
    }
    const bool over_codes = problem.config.codebook;
    const int width = rank < 0 ? 0 : problem.heads.heads[level].num_codes;
    if (over_codes) {
      for (int c = lane; c < width; c += kLanes) {
        const float logit = tempered(logits[c]);
        finite = finite && isfinite(logit);
        largest = fmaxf(largest, logit);
      }
    } else {
      for (int j = lane + kLanes * kOwn; j < count; j += kLanes) {
        const float logit = logit_of(j);
        finite = finite && isfinite(logit);
        largest = fmaxf(largest, logit);
      }
    }
    __syncwarp();
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
    float total = 0.0f;
    if (over_codes) {
      for (int c = lane; c < width; c += kLanes) total += __expf(tempered(logits[c]) - largest);
    } else {
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        if (lane + kLanes * i < count) total += __expf(own[i] - largest);
      for (int j = lane + kLanes * kOwn; j < count; j += kLanes)
        total += __expf(logit_of(j) - largest);
    }
    __syncwarp();
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      total += __shfl_xor_sync(kAllLanes, total, distance);
    const unsigned wrong = __ballot_sync(kAllLanes, !finite) >> (lane_index() & ~(kLanes - 1));
    finite = (wrong & ((1u << kLanes) - 1)) == 0;
    const float log_total = __logf(total), score = beam->score;
    const float weight = problem.config.level_weight[level];
    auto offer = [&](int j, float logit) {
      const float log_probability = fmaxf((logit - largest) - log_total, -kLargestFinite);
      const float sum = fmaf(weight, log_probability, score);
      store_key(level, key + j, finite ? candidate(level, sum, rank, first_child + j, j) : kBroken,
                shared);
    };
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (lane + kLanes * i < count) offer(lane + kLanes * i, own[i]);
    for (int j = lane + kLanes * kOwn; j < count; j += kLanes) offer(j, logit_of(j));
    __syncwarp();
  }

  // ---- cuts ----

  // Makes the best of `count` keys the beams of the next level; returns how many.
  __device__ __forceinline__ int advance(int level, int count, int slot) const {
    const Beam* from = beams(level);
    Beam* to = beams(level + 1);
    const int found =
        best_keys(top(), keys(level), count, problem.config.num_beams, [&](int rank, BeamKey key) {
          if (key == kBroken) {
            state.broken[slot % 2] = 1;
            return;
          }
          become_beam(trie(), level, from, key, to[rank]);
        });
    return state.broken[slot % 2] ? 0 : found;
  }

  // ---- levels ----

  // Keys of level 1 from the logits of every code; returns how many.
  __device__ __forceinline__ int root_keys(const float* logits) const {
    Beam& from = *beams(0);
    const int tid = static_cast<int>(threadIdx.x), lane = lane_index();
    const int width = problem.heads.heads[0].num_codes, count = trie().num_nodes[0];
    const float temperature = problem.config.temperature[0];
    const float weight = problem.config.level_weight[0];
    auto tempered = [=](float logit) { return temperature == 1.0f ? logit : logit / temperature; };
    if (tid == 0) {
      from.first_child = 0;
      from.prefix = uint4{0, 0, 0, 0};
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
      store_key(0, j, finite ? candidate(0, weight * log_probability, 0, j, j) : kBroken, false);
    }
    return count;
  }

  // Fills first_key, heads and num_heads for `count` beams; ends with a barrier. A warp takes 32
  // beams, and counts the earlier ones again for itself.
  __device__ __forceinline__ void look_up(const Beam* from, int count) const {
    const int lane = lane_index(), warp = warp_index(), least = problem.config.codebook ? 1 : 2;
    if (kWarp * warp < count) {
      int keys = 0, heads = 0;
      for (int c = 0; c < warp; ++c) {
        const int children = from[kWarp * c + lane].children;
        keys += static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(children)));
        heads += __popc(__ballot_sync(kAllLanes, children >= least));
      }
      const int rank = kWarp * warp + lane, children = rank < count ? from[rank].children : 0;
      int sum = keys + children;
#pragma unroll
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, distance);
        if (lane >= distance) sum += other - keys;
      }
      const unsigned need = __ballot_sync(kAllLanes, children >= least);
      if (rank < count) {
        state.first_key[rank] = sum - children;
        if (children >= least) state.heads[heads + __popc(need & ((1u << lane) - 1))] = rank;
        if (rank == count - 1) {
          state.first_key[count] = sum;
          state.num_heads = heads + __popc(need);
        }
      }
    } else if (count == 0 && threadIdx.x == 0) {
      state.first_key[0] = state.num_heads = 0;
    }
    __syncthreads();
  }

  // How far a pass gets that begins where `last` ended. Every thread comes to the same result.
  __device__ __forceinline__ Pass next_pass(const Pass& last, int kept, int count,
                                            int most_heads) const {
    Pass pass{last.end, count, last.last_head, state.num_heads, kept};
    const int limit = state.first_key[pass.begin] + shape.key_capacity - kept;
    if (state.first_key[count] <= limit && pass.last_head - pass.first_head <= most_heads)
      return pass;
    const int2 ends = pass_ends(state.first_key, state.heads, pass.begin, count, pass.first_head,
                                state.num_heads, limit, most_heads);
    pass.end = ends.x;
    pass.last_head = ends.y;
    return pass;
  }

  __device__ __forceinline__ int key_of(const Pass& pass, int rank) const {
    return state.first_key[rank] - state.first_key[pass.begin] + pass.kept;
  }

  // Only children, by every block of a team for itself.
  __device__ __forceinline__ void only_keys(int level, const Beam* from, const Pass& pass) const {
    const int rank = pass.begin + static_cast<int>(threadIdx.x);
    if (problem.config.codebook || rank >= pass.end || from[rank].children != 1) return;
    store_key(level, key_of(pass, rank),
              candidate(level, from[rank].score, rank, from[rank].first_child, 0), false);
  }

  __device__ __forceinline__ const float* first_part(int level) const {
    return first + level * hidden();
  }

  // Logits of every code for `count` rows: hidden rows in shared memory -> logits there.
  template <int kRowTiles>
  __device__ __forceinline__ void row_logits(int level, int count) const {
    constexpr int kCodeTiles = 4, kCodes = 8 * kCodeTiles, kUnroll = kFull ? 4 : 1;
    const HeadView& head = problem.heads.heads[level];
    const int g = lane_index() / 4, t = lane_index() % 4, codes = head.num_codes;
    const int row_bytes = kFull ? hidden_row_bytes(hidden()) : shape.row_bytes;
    const RowTiles<kRowTiles> rows(memory + shape.hidden, row_bytes, shape.rows);
    const int turns = (codes + kCodes * kWarps - 1) / (kCodes * kWarps);
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
      const int code = kCodes * (kWarps * turn + warp_index());
      const bool active = code < codes;
      float sum[kRowTiles][kCodeTiles][4] = {};
      if (active) {
        const CodeTile<W, kCodeTiles> tile(static_cast<const W*>(head.out_weight), hidden(), code);
        uint4 now[kCodeTiles], next[kCodeTiles];  // the next weights are on their way meanwhile
        tile.load(now, 0);
#pragma unroll kUnroll
        for (int k = 0; k < hidden(); k += 64) {
          tile.load(next, min(k + 32, hidden() - 32));
          multiply_rows<W, kRowTiles, kCodeTiles>(rows, k, now, sum);
          if (k + 32 >= hidden()) break;
          tile.load(now, min(k + 64, hidden() - 32));
          multiply_rows<W, kRowTiles, kCodeTiles>(rows, k + 32, next, sum);
        }
      }
      if (shape.logits_over_hidden) __syncthreads();  // the only turn; rows have been read
      if (!active) continue;
      auto* to =
          reinterpret_cast<float*>(memory + shape.logits) + g * shape.logit_stride + code + 2 * t;
      float2 bias[kCodeTiles];
#pragma unroll
      for (int i = 0; i < kCodeTiles; ++i) {
        const int c = code + 8 * i + 2 * t;
        bias[i] = {__ldg(head.out_bias + min(c, codes - 1)),
                   __ldg(head.out_bias + min(c + 1, codes - 1))};
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (16 * m + 8 * half + g < count) {
#pragma unroll
            for (int i = 0; i < kCodeTiles; ++i) {
              const float2 logits{fmaf(gelu_unit<W>, sum[m][i][2 * half], bias[i].x),
                                  fmaf(gelu_unit<W>, sum[m][i][2 * half + 1], bias[i].y)};
              // The stride leaves room for codes up to a multiple of 32.
              *reinterpret_cast<float2*>(to + 8 * i) = logits;
            }
          }
          to += 8 * shape.logit_stride;
        }
      }
    }
  }

  // Keys of the pass with a product over every code. Row r is of head r * team + rank_in_team.
  __device__ __forceinline__ void dense_keys(int level, const Pass& pass, int team_shift,
                                             int rank_in_team) const {
    const Beam* from = beams(level);
    const int* heads = state.heads + pass.first_head + rank_in_team;
    const int num_heads = pass.last_head - pass.first_head, team = 1 << team_shift;
    const int own = (num_heads - rank_in_team + team - 1) >> team_shift;
    const int most = (num_heads + team - 1) >> team_shift;
    // Where a warp has several rows, the first code's row of each table waits where the hidden row
    // goes, so that all of them are on their way at once.
    char* place = memory + shape.hidden + warp_index() * shape.row_bytes;
    const int num_staged = own > kWarps ? 1 : 0;
    if (num_staged > 0) {
#pragma unroll 1
      for (int row = warp_index(); row < own; row += kWarps)
        stage_row<W, kVectors, kFull>(problem.heads, level,
                                      Prefix{from[heads[row << team_shift]].prefix},
                                      memory + shape.hidden + row * shape.row_bytes, 0, 1);
      ptx::wait_copies();
      __syncwarp();
    }
#pragma unroll 1
    for (int row = warp_index(); row < own; row += kWarps) {
      HiddenRow<kVectors, kFull> values;
      hidden_row<W>(problem.heads, level, first_part(level),
                    Prefix{from[heads[row << team_shift]].prefix}, place, 0, num_staged, values);
      __syncwarp();
      for_words<W>(values, hidden(),
                   [&](int at, uint32_t word) { *reinterpret_cast<uint32_t*>(place + at) = word; });
      place += kWarps * shape.row_bytes;
    }
    __syncthreads();
    if (most <= 16) {
      row_logits<1>(level, own);
    } else if (most <= 32) {
      row_logits<2>(level, own);
    } else {
      row_logits<4>(level, own);
    }
    __syncthreads();
    const auto* logits = reinterpret_cast<const float*>(memory + shape.logits);
#pragma unroll 1
    for (int base = 4 * warp_index(); base < own; base += 4 * kWarps) {
      const int row = base + lane_index() / 8;
      const int rank = row < own ? heads[row << team_shift] : -1;
      offer_children(level, rank, key_of(pass, max(rank, pass.begin)),
                     logits + row * shape.logit_stride, false, team_shift > 0);
    }
  }

  // Keys of the pass with a dot product per child.
  __device__ __forceinline__ void sparse_keys(int level, const Pass& pass, int team_shift,
                                              int rank_in_team) const {
    const Beam* from = beams(level);
    const HeadView& head = problem.heads.heads[level];
    const W* weight = static_cast<const W*>(head.out_weight);
    const int lane = lane_index(), step = kWarps << team_shift;
    const int begin = pass.first_head + rank_in_team + (warp_index() << team_shift);
    // All heads' rows of tables on their way at once, where there are several and room for them.
    const int own_heads = (pass.last_head - pass.first_head + (1 << team_shift) - 1) >> team_shift;
    const int turns = (own_heads + kWarps - 1) / kWarps;
    const int num_staged = turns > 1 && turns * kWarps * level <= shape.rows ? level : 0;
    char* staged = memory + shape.hidden + warp_index() * level * shape.row_bytes;
    const int staged_step = kWarps * level * shape.row_bytes;
    if (num_staged > 0) {
      char* to = staged;
#pragma unroll 1
      for (int i = begin; i < pass.last_head; i += step, to += staged_step)
        stage_row<W, kVectors, kFull>(problem.heads, level, Prefix{from[state.heads[i]].prefix}, to,
                                      shape.row_bytes, level);
      ptx::wait_copies();
      __syncwarp();
    }
#pragma unroll 1
    for (int base = begin; base < pass.last_head; base += 4 * step) {
      const int end = min(base + 4 * step, pass.last_head);
#pragma unroll 1
      for (int i = base; i < end; i += step) {
        const int rank = state.heads[i], count = from[rank].children;
        const int16_t* codes = trie().codes[level] + from[rank].first_child;
        BeamKey* logits = keys(level) + key_of(pass, rank);
        HiddenRow<kVectors, kFull> values;
        hidden_row<W>(problem.heads, level, first_part(level), Prefix{from[rank].prefix}, staged,
                      shape.row_bytes, num_staged, values);
        staged += staged_step;
#pragma unroll 1
        for (int j = 0; j < count; j += 4) {
          const int mine = j + lane / 8;
          const int code = __ldg(codes + min(mine, count - 1));
          const float bias = __ldg(head.out_bias + code);
          const W* rows[4];
#pragma unroll
          for (int n = 0; n < 4; ++n)
            rows[n] =
                weight + static_cast<uint32_t>(__shfl_sync(kAllLanes, code, 8 * n) * hidden());
          const float dot = four_dots<W>(values, hidden(), rows);
          if (lane % 8 == 0 && mine < count)
            *reinterpret_cast<float*>(logits + mine) = fmaf(gelu_unit<W>, dot, bias);
        }
      }
      __syncwarp();
      const int mine = base + lane / 8 * step;
      const int rank = mine < end ? state.heads[mine] : -1;
      offer_children(level, rank, key_of(pass, max(rank, pass.begin)), nullptr, true,
                     team_shift > 0);
    }
  }

  // Keys of the children of `count` beams of `level` (1 ..); returns how many.
  __device__ __forceinline__ int child_keys(int level, int count, int slot) const {
    const bool dense =
        problem.config.codebook || problem.config.level_mode[level] == LevelMode::kDense;
    const Beam* from = beams(level);
    look_up(from, count);
    const int most = dense ? shape.rows : kFewBeams;
    int team_shift = shape.team_shift, rank_in_team = team_rank();
    Pass pass = next_pass(Pass{}, 0, count, most << team_shift);
    if (team_shift > 0 && pass.end < count) {
      // Too many for one pass: each block does it all, since others of the cluster do not wait.
      team_shift = rank_in_team = 0;
      pass = next_pass(Pass{}, 0, count, most);
    }
    while (true) {
      if (pass.end == pass.begin && count > 0) {  // a node with more children than codes
        if (threadIdx.x == 0) state.broken[slot % 2] = 1;
        return 0;
      }
      only_keys(level, from, pass);
      if (dense) {
        dense_keys(level, pass, team_shift, rank_in_team);
      } else {
        sparse_keys(level, pass, team_shift, rank_in_team);
      }
      const int found = key_of(pass, pass.end);
      if (pass.end >= count) return found;
      __syncthreads();
      const TopK best = top();
      const int kept = keep_best(best.bins, best.survivors, best.num_survivors, keys(level), found,
                                 problem.config.num_beams);
      pass = next_pass(pass, kept, count, most);
    }
  }

  // All levels of one request; `request` < 0: none, but the cluster's barriers.
  __device__ __forceinline__ void run(int64_t request, const float* root_logits, int slot) const {
    if (threadIdx.x == 0) {
      state.broken[slot % 2] = 0;
      if (request >= 0)
        state.exclusion = exclusion_of(problem.exclude, problem.num_excluded, request);
    }
    __syncthreads();
    int count = request < 0 ? 0 : 1;
    for (int level = 0; level < trie().num_levels; ++level) {
      int found = 0;
      if (level > 0) {
        found = child_keys(level, count, slot);
      } else if (count > 0) {
        found = root_keys(root_logits);
      }
      if (shape.team_shift > 0) {
        ptx::cluster_arrive();
        ptx::cluster_wait();
      } else {
        __syncthreads();
      }
      count = advance(level, found, slot);
    }
    if (request >= 0 && team_rank() == 0 && warp_index() == 0) {
      const Beam* leaves = beams(trie().num_levels);
      write_items(problem, state.exclusion, request, count, leaves);
    }
  }
};

}  // namespace sidmlp::cuda::sm90
