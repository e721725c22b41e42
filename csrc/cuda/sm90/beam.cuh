// Levels of one request, from the logits of level 1 to its items, by a block or by a team of blocks
// of a cluster.
//
// Every block of a team holds all beams and all keys. It computes candidates of its own beams only
// and stores their keys in the shared memory of the whole team; after a cluster barrier each block
// makes the same cut.
#pragma once

#include <type_traits>

#include "cuda/ptx/cluster.cuh"
#include "cuda/sm90/hidden.cuh"
#include "cuda/sm90/items.cuh"
#include "cuda/sm90/products.cuh"
#include "cuda/sm90/topk.cuh"

namespace sidmlp::cuda::sm90 {

struct BeamState {               // in shared memory
  int first_key[kFewBeams + 1];  // where the keys of each beam's children go; at the end their sum
  int heads[kFewBeams];          // ranks of the beams that need a head, ascending
  int num_heads;
  int num_survivors;  // of TopK
  Exclusion exclusion;
  int64_t request;  // -1: none
  // A score or a logit is not finite: no items. Of requests in even and odd slots, since some warps
  // may still read the last one's when the next begins.
  int broken[2];
};

// Beams whose keys are collected at once: ranks [begin, end), of which [first_head, last_head) of
// `heads` need one. A key's place is its number among all keys of the level, plus `offset`.
struct Pass {
  int begin, end;
  int first_head, last_head;
  int offset;
};

// The pass after `last`, whose keys follow `kept` others: as many beams as have room for their
// keys, with at most `most_heads` heads. Every thread comes to the same result. Rare, and out of
// line so that it costs no registers elsewhere.
__device__ __noinline__ inline Pass next_pass(const BeamState& state, const Shape& shape, Pass last,
                                              int kept, int count, int most_heads) {
  Pass pass{last.end, last.end, last.last_head, last.last_head, kept - state.first_key[last.end]};
  while (pass.end < count && state.first_key[pass.end + 1] + pass.offset <= shape.key_capacity) {
    const bool head = pass.last_head < state.num_heads && state.heads[pass.last_head] == pass.end;
    if (head && pass.last_head - pass.first_head == most_heads) break;
    pass.last_head += head;
    ++pass.end;
  }
  return pass;
}

template <class AnySearch>
__device__ __noinline__ int child_keys_in_passes(AnySearch search, int level, int count);

// kAlone: the block has a multiprocessor to itself, so a thread twice the registers, and the width
// is the published one: each form costs half a minute of compilation.
template <class W, int kVectors, bool kFull, bool kAlone>
struct Search {
  const BeamDecodeProblem& problem;
  const Shape& shape;
  char* memory;  // dynamic shared memory
  BeamState& state;
  uint32_t block;  // rank in the cluster
  int slot;        // of the request in this block

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

  __device__ __forceinline__ static BeamKey candidate(float score, int rank, int ordinal) {
    return isfinite(score)
               ? make_beam_key(score, static_cast<uint32_t>(rank), static_cast<uint32_t>(ordinal))
               : kBroken;
  }

  // Keys of the children of a beam by kLanes lanes, 8 or 32, so of up to four beams by one warp;
  // `rank` < 0: none. logits[code] are of every code; with `listed`, the child's logit lies where
  // its key goes. Exponentials are added in the same order whatever kLanes is: child j belongs to
  // sum j % 32.
  template <int kLanes>
  __device__ __forceinline__ void offer_children(int level, int rank, int key, const float* logits,
                                                 bool listed, bool shared) const {
    constexpr int kOwn = 64 / kLanes;  // children that a lane keeps
    constexpr int kSums = kWarp / kLanes;
    const int lane = lane_index() % kLanes;
    const Beam* beam = beams(level) + max(rank, 0);
    const int count = rank < 0 ? 0 : beam->children, first_child = beam->first_child;
    const int16_t* codes = trie().codes[level] + first_child;
    const float scale = shape.inverse_temperature[level];
    const BeamKey* own_keys = keys(level) + key;
    auto logit_of = [=](int j) {
      return scale *
             (listed ? *reinterpret_cast<const float*>(own_keys + j) : logits[__ldg(codes + j)]);
    };
    float own[kOwn];
    float largest = -INFINITY, smallest = INFINITY;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      own[i] = -INFINITY;
      if (lane + kLanes * i < count) {
        own[i] = logit_of(lane + kLanes * i);
        largest = fmaxf(largest, own[i]);
        smallest = fminf(smallest, own[i]);
      }
    }
    const bool over_codes = problem.config.codebook;
    const int width = rank < 0 ? 0 : problem.heads.heads[level].num_codes;
    const int most = over_codes ? width : count;
    auto value_of = [=](int j) { return over_codes ? scale * logits[j] : logit_of(j); };
    const int rest = over_codes ? lane : lane + kLanes * kOwn;
    for (int j = rest; j < most; j += kLanes) {
      const float logit = value_of(j);
      largest = fmaxf(largest, logit);
      smallest = fminf(smallest, logit);
    }
    __syncwarp();
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
    float sums[kSums] = {};
    if (!over_codes) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        if (lane + kLanes * i < count) sums[i % kSums] += __expf(own[i] - largest);
    }
    for (int begin = rest; begin < most; begin += kWarp) {
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        if (begin + kLanes * i < most) sums[i] += __expf(value_of(begin + kLanes * i) - largest);
    }
    float total = sums[0];
    if constexpr (kSums == 4) total = (sums[0] + sums[2]) + (sums[1] + sums[3]);
    __syncwarp();
    // A logit of -inf is lost in the sum, any other that is not finite makes it NaN.
    if (smallest == -INFINITY) total = NAN;
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      total += __shfl_xor_sync(kAllLanes, total, distance);
    const float log_total = __logf(total), score = beam->score;
    const float weight = problem.config.level_weight[level];
    auto offer = [&](int j, float logit) {
      const float log_probability = fmaxf((logit - largest) - log_total, -kLargestFinite);
      const float sum = fmaf(weight, log_probability, score);
      store_key(level, key + j, total > 0.0f ? candidate(sum, rank, j) : kBroken, shared);
    };
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (lane + kLanes * i < count) offer(lane + kLanes * i, own[i]);
    for (int j = lane + kLanes * kOwn; j < count; j += kLanes) offer(j, logit_of(j));
    __syncwarp();
  }

  // ---- cuts ----

  // Takes leaves without an item that may be recommended off the `count` keys of the last level.
  // Between barriers.
  __device__ __forceinline__ void bar_leaves(int level, int count) const {
    const Beam* from = beams(level);
    BeamKey* list = keys(level);
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const BeamKey key = list[i];
      if (key == kNoKey || key == kBroken) continue;
      const int parent = static_cast<int>(key_parent_rank(key));
      const int leaf = from[parent].first_child + static_cast<int>(key_ordinal(key));
      if (!leaf_allowed(trie(), state.exclusion, leaf)) list[i] = kNoKey;
    }
  }

  // Makes the best of `count` keys the beams of the next level; returns how many.
  __device__ __forceinline__ int advance(int level, int count) const {
    const Beam* from = beams(level);
    Beam* to = beams(level + 1);
    const int next = level + 1;
    const bool leaves = next == trie().num_levels;
    const int found =
        best_keys(top(), keys(level), count, problem.config.num_beams, [&](int rank, BeamKey key) {
          if (key == kBroken) {
            state.broken[slot % 2] = 1;
            return;
          }
          const int parent = static_cast<int>(key_parent_rank(key));
          const int32_t node = from[parent].first_child + static_cast<int32_t>(key_ordinal(key));
          Prefix prefix{from[parent].prefix};
          prefix.set(level, __ldg(trie().codes[level] + node));
          to[rank].score = key_score(key);
          to[rank].node = node;
          if (!leaves) {
            const int32_t begin = __ldg(trie().child_begin[next] + node);
            to[rank].first_child = begin;
            to[rank].children = __ldg(trie().child_begin[next] + node + 1) - begin;
          }
          to[rank].prefix = prefix.words;
        });
    return state.broken[slot % 2] ? 0 : found;
  }

  // ---- levels ----

  // Keys of level 1 from the logits of every code; returns how many.
  __device__ __forceinline__ int root_keys(const float* logits) const {
    Beam& from = *beams(0);
    const int tid = static_cast<int>(threadIdx.x), lane = lane_index();
    const int width = problem.heads.heads[0].num_codes, count = trie().num_nodes[0];
    const int16_t* codes = trie().codes[0];
    const int first_code = tid < count ? __ldg(codes + tid) : 0;  // on its way meanwhile
    const float scale = shape.inverse_temperature[0], weight = problem.config.level_weight[0];
    if (tid == 0) {
      from.first_child = 0;
      from.prefix = uint4{0, 0, 0, 0};
    }
    // Every warp for itself: cheaper than a barrier.
    float largest = -INFINITY, smallest = INFINITY, total = 0.0f;
    for (int c = lane; c < width; c += kWarp) {
      const float logit = scale * logits[c];
      largest = fmaxf(largest, logit);
      smallest = fminf(smallest, logit);
    }
    largest = warp_max(largest);
    for (int c = lane; c < width; c += kWarp) total += __expf(scale * logits[c] - largest);
    if (smallest == -INFINITY) total = NAN;  // any other that is not finite makes it NaN anyway
    total = warp_sum(total);
    const float log_total = __logf(total);
    for (int j = tid; j < count; j += kThreads) {
      const int code = j == tid ? first_code : __ldg(codes + j);
      const float log_probability =
          fmaxf((scale * logits[code] - largest) - log_total, -kLargestFinite);
      store_key(0, j, total > 0.0f ? candidate(weight * log_probability, 0, j) : kBroken, false);
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

  __device__ __forceinline__ int key_of(const Pass& pass, int rank) const {
    return state.first_key[rank] + pass.offset;
  }

  // Only children, by every block of a team for itself and by its last warps, which have the
  // fewest rows.
  __device__ __forceinline__ void only_keys(int level, const Beam* from, const Pass& pass) const {
    const int rank = pass.begin + kThreads - 1 - static_cast<int>(threadIdx.x);
    if (problem.config.codebook || rank >= pass.end || from[rank].children != 1) return;
    store_key(level, key_of(pass, rank), candidate(from[rank].score, rank, 0), false);
  }

  __device__ __forceinline__ const float* first_part(int level) const {
    return reinterpret_cast<const float*>(memory + shape.first) +
           (slot * trie().num_levels + level) * hidden();
  }

  // Logits of every code for `count` rows: hidden rows in shared memory -> logits there. Begins
  // with the barrier that publishes the rows, behind the first loads of weights.
  template <int kRowTiles>
  __device__ __forceinline__ void row_logits(int level, int count) const {
    constexpr int kCodeTiles = 4, kCodes = 8 * kCodeTiles;
    constexpr int kAhead = 2;  // steps whose weights are on their way
    // Without a loop at the published width, which costs fewer registers than a short one.
    constexpr int kUnroll = kFull ? 16 / kAhead : 1;
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
      const CodeTile<W, kCodeTiles> tile(static_cast<const W*>(head.out_weight), hidden(),
                                         active ? code : 0);
      uint4 piece[kAhead][kCodeTiles];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) tile.load(piece[i], min(32 * i, hidden() - 32));
      if (turn == 0) __syncthreads();
      if (active) {
#pragma unroll kUnroll
        for (int k = 0; k < hidden(); k += 32 * kAhead) {
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            if (k + 32 * i >= hidden()) break;
            multiply_rows<W, kRowTiles, kCodeTiles>(rows, k + 32 * i, piece[i], sum);
            tile.load(piece[i], min(k + 32 * (i + kAhead), hidden() - 32));
          }
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
    const NormVectors<kVectors, kFull> norm(problem.heads, level);
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
      hidden_row<W>(problem.heads, level, norm, first_part(level),
                    Prefix{from[heads[row << team_shift]].prefix}, place, 0, num_staged, values);
      __syncwarp();
      for_words<W>(values, hidden(),
                   [&](int at, uint32_t word) { *reinterpret_cast<uint32_t*>(place + at) = word; });
      place += kWarps * shape.row_bytes;
    }
    if (most <= 16) {
      row_logits<1>(level, own);
    } else if (most <= 32) {
      row_logits<2>(level, own);
    } else {
      row_logits<kMaxRows / 16>(level, own);
    }
    __syncthreads();
    const auto* logits = reinterpret_cast<const float*>(memory + shape.logits);
    const auto offer = [&](auto lanes, int row) {
      const int rank = row < own ? heads[row << team_shift] : -1;
      offer_children<decltype(lanes)::value>(level, rank, key_of(pass, max(rank, pass.begin)),
                                             logits + row * shape.logit_stride, false,
                                             team_shift > 0);
    };
    if (kAlone && own <= kWarps) {
      offer(std::integral_constant<int, 32>{}, warp_index());
      return;
    }
#pragma unroll 1
    for (int base = 4 * warp_index(); base < own; base += 4 * kWarps)
      offer(std::integral_constant<int, 8>{}, base + lane_index() / 8);
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
    const int num_staged = turns + level > 2 && turns * kWarps * level <= shape.rows ? level : 0;
    const NormVectors<kVectors, kFull> norm(problem.heads, level);
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
        int next_code = __ldg(codes + min(lane / 8, count - 1));  // on its way meanwhile
        HiddenRow<kVectors, kFull> values;
        hidden_row<W>(problem.heads, level, norm, first_part(level), Prefix{from[rank].prefix},
                      staged, shape.row_bytes, num_staged, values);
        staged += staged_step;
#pragma unroll 1
        for (int j = 0; j < count; j += 4) {
          const int mine = j + lane / 8, code = next_code;
          next_code = __ldg(codes + min(mine + 4, count - 1));
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
      const auto offer = [&](auto lanes, int mine) {
        const int rank = mine < end ? state.heads[mine] : -1;
        offer_children<decltype(lanes)::value>(level, rank, key_of(pass, max(rank, pass.begin)),
                                               nullptr, true, team_shift > 0);
      };
      if (kAlone && turns == 1) {
        offer(std::integral_constant<int, 32>{}, base);
      } else {
        offer(std::integral_constant<int, 8>{}, base + lane / 8 * step);
      }
    }
  }

  __device__ __forceinline__ bool dense(int level) const {
    return problem.config.codebook || problem.config.level_mode[level] == LevelMode::kDense;
  }

  __device__ __forceinline__ void pass_keys(int level, const Pass& pass, int team_shift,
                                            int rank_in_team) const {
    only_keys(level, beams(level), pass);
    if (dense(level)) {
      dense_keys(level, pass, team_shift, rank_in_team);
    } else {
      sparse_keys(level, pass, team_shift, rank_in_team);
    }
  }

  // Keys of the children of `count` beams of `level` (1 ..); returns how many.
  __device__ __forceinline__ int child_keys(int level, int count) const {
    look_up(beams(level), count);
    const int found = state.first_key[count];
    const int most_heads = dense(level) ? shape.rows << shape.team_shift : kFewBeams;
    Pass pass{0, count, 0, state.num_heads, 0};
    const bool one_pass = found <= shape.key_capacity && pass.last_head <= most_heads;
    // The rest is rare. Out of line it costs a block that is alone nothing, another one registers
    // around the call (batch 512: 130 us, so 135; batch 1: 36, so 34; H200, 2026-11-22).
    if constexpr (kAlone) {
      if (!one_pass) return child_keys_in_passes(*this, level, count);
      pass_keys(level, pass, shape.team_shift, team_rank());
      return found;
    } else {
      return keys_by_pass(level, count, pass, one_pass);
    }
  }

  // The same in as many passes as it takes. Where one does not take all beams, each block of a team
  // does it all, since others of the cluster do not wait.
  __device__ __forceinline__ int keys_by_pass(int level, int count, Pass pass,
                                              bool one_pass) const {
    int team_shift = shape.team_shift, rank_in_team = team_rank();
    const int most_heads = dense(level) ? shape.rows : kFewBeams;
    if (!one_pass) {
      team_shift = rank_in_team = 0;
      pass = next_pass(state, shape, Pass{}, 0, count, most_heads);
    }
    while (true) {
      if (pass.end == pass.begin && count > 0) {  // a node with more children than codes
        if (threadIdx.x == 0) state.broken[slot % 2] = 1;
        return 0;
      }
      pass_keys(level, pass, team_shift, rank_in_team);
      const int found = key_of(pass, pass.end);
      if (pass.end >= count) return found;
      __syncthreads();
      if (level + 1 == trie().num_levels) {
        bar_leaves(level, found);
        __syncthreads();
      }
      const TopK best = top();
      const int kept = keep_best(best.bins, best.survivors, best.num_survivors, keys(level), found,
                                 problem.config.num_beams);
      pass = next_pass(state, shape, pass, kept, count, most_heads);
    }
  }

  // All levels of one request; `request` < 0: none, but the cluster's barriers.
  // The request is kept in shared memory: only its end asks for it again.
  __device__ __forceinline__ void run(int64_t request, const float* root_logits) const {
    if (threadIdx.x == 0) {
      state.request = request;
      state.broken[slot % 2] = 0;
      if (request >= 0)
        state.exclusion = exclusion_of(problem.exclude, problem.num_excluded, request);
    }
    __syncthreads();
    int count = request < 0 ? 0 : 1;
    for (int level = 0; level < trie().num_levels; ++level) {
      int found = 0;
      if (level > 0) {
        found = child_keys(level, count);
      } else if (count > 0) {
        found = root_keys(root_logits);
      }
      if (shape.team_shift > 0) {
        ptx::cluster_arrive();
        ptx::cluster_wait();
      } else {
        __syncthreads();
      }
      if (level + 1 == trie().num_levels) {
        bar_leaves(level, found);
        __syncthreads();
      }
      count = advance(level, found);
    }
    if (team_rank() != 0 || warp_index() != 0) return;
    const int64_t own = state.request;
    __syncwarp();  // one lane writes the next one's
    if (own >= 0) write_items(problem, state.exclusion, own, count, beams(trie().num_levels));
  }
};

// A search by value, so that nobody else's has an address.
template <class AnySearch>
__device__ __noinline__ int child_keys_in_passes(AnySearch search, int level, int count) {
  return search.keys_by_pass(level, count, Pass{}, false);
}

}  // namespace sidmlp::cuda::sm90
