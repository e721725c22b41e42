// Levels of one request where beams or codes are too many for beam.cuh: up to kMaxBeams beams and
// kMaxCodes codes.
//
// Each block of a team lists the keys of its share of the beams in its own shared memory, cut to
// the best on the way wherever they would not fit, and hands its best to the whole team; after a
// cluster barrier each block makes the same cut. Logits of a dense level come in chunks of codes,
// and those of children wait where the children's keys go.
#pragma once

#include "cuda/ptx/cluster.cuh"
#include "cuda/sm90/hidden.cuh"
#include "cuda/sm90/products.cuh"
#include "cuda/sm90/wide_softmax.cuh"
#include "cuda/sm90/wide_topk.cuh"

namespace sidmlp::cuda::sm90 {

struct WideState {  // in shared memory
  int sums[kWarps];
  float parts[kWarps];
  int num_heads;  // of this block
  int broken;     // a score or a logit is not finite: no items
  WideTopKState top;
  Exclusion exclusion;
  Softmax of_row[kMaxRows];
};

// Heads of this block [begin, end) whose keys are listed at once, from `kept` on.
struct WidePass {
  int begin, end;
  int kept;
};

template <class W, int kVectors, bool kFull>
struct WideSearch {
  static constexpr int kFewLanes = 8;       // that share a beam with few children
  static constexpr int kManyChildren = 64;  // a whole warp takes such a beam

  const BeamDecodeProblem& problem;
  const Shape& shape;
  char* memory;  // dynamic shared memory
  WideState& state;
  uint32_t block;      // rank in the cluster
  const float* first;  // of the request: context parts of the first layers, [L * H]

  __device__ const TrieView& trie() const { return problem.trie; }
  __device__ int hidden() const { return kFull ? 8 * kWarp * kVectors : problem.heads.hidden_dim; }
  __device__ int row_bytes() const {
    return kFull ? hidden_row_bytes(8 * kWarp * kVectors) : shape.row_bytes;
  }
  __device__ int team() const { return 1 << shape.team_shift; }
  __device__ int team_rank() const { return static_cast<int>(block) & (team() - 1); }
  __device__ Beam* beams(int level) const {
    return reinterpret_cast<Beam*>(memory + shape.beam_state) + level % 2 * shape.beams;
  }
  __device__ BeamKey* keys() const { return reinterpret_cast<BeamKey*>(memory + shape.keys); }
  __device__ BeamKey* exchange() const {  // [team][num_beams]
    return reinterpret_cast<BeamKey*>(memory + shape.exchange);
  }
  __device__ int* heads() const {  // ranks of the beams of this block that need a head, ascending
    return reinterpret_cast<int*>(memory + shape.head_list);
  }
  __device__ int* first_key() const {  // of each head's children; at the end their sum
    return reinterpret_cast<int*>(memory + shape.first_key);
  }
  __device__ WideTopK top() const {
    return {reinterpret_cast<uint32_t*>(memory + shape.bins),
            reinterpret_cast<BeamKey*>(memory + shape.survivors), &state.top};
  }
  __device__ BeamKey* keys_of(const WidePass& pass, int head) const {
    return keys() + pass.kept + first_key()[head] - first_key()[pass.begin];
  }
  __device__ __forceinline__ BeamKey candidate(int level, float score, int rank, int child,
                                               int ordinal) const {
    return candidate_key(trie(), state.exclusion, level, score, rank, child, ordinal);
  }
  __device__ int keep_best(int count) const {
    const WideTopK best = top();
    return wide_keep_best(best.bins, best.survivors, best.state, keys(), count,
                          problem.config.num_beams);
  }

  // ---- cuts ----

  // Makes the best of `count` keys the beams of the next level; returns how many.
  __device__ __forceinline__ int advance(int level, const BeamKey* from, int count) const {
    const Beam* parents = beams(level);
    Beam* to = beams(level + 1);
    const int found =
        wide_best_keys(top(), from, count, problem.config.num_beams, [&](int rank, BeamKey key) {
          if (key == kBroken) {
            state.broken = 1;
          } else {
            become_beam(trie(), level, parents, key, to[rank]);
          }
        });
    return state.broken ? 0 : found;
  }

  // The best of this block's `count` keys -> every block of the team; returns how many lie there.
  __device__ __forceinline__ int share_best(int level, int count) const {
    const int most = problem.config.num_beams;
    const int kept = count > most ? keep_best(count) : count;
    if (level > 1) ptx::cluster_wait();  // the others have read what came before
    const uint32_t first_block = block - static_cast<uint32_t>(team_rank());
    for (int i = static_cast<int>(threadIdx.x); i < most; i += kThreads) {
      const BeamKey key = i < kept ? keys()[i] : kNoKey;
      const BeamKey* place = exchange() + team_rank() * most + i;
      for (uint32_t to = 0; to < static_cast<uint32_t>(team()); ++to)
        ptx::store_peer(ptx::peer_address(place, first_block + to), key);
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
    return team() * most;
  }

  // ---- levels ----

  // Keys of level 1 from the logits of every code, by every block of the team for itself; returns
  // how many. Ends with a barrier.
  __device__ __forceinline__ int root_keys(const float* logits) const {
    Beam& from = *beams(0);
    const int tid = static_cast<int>(threadIdx.x);
    const int width = problem.heads.heads[0].num_codes, count = trie().num_nodes[0];
    const float scale = shape.inverse_temperature[0];
    const float weight = problem.config.level_weight[0];
    if (tid == 0) {
      from.first_child = 0;
      from.prefix = uint4{0, 0, 0, 0};
    }
    bool finite = true;
    float largest = -INFINITY, total = 0.0f;
    for (int c = tid; c < width; c += kThreads) {
      const float logit = scale * logits[c];
      finite = finite && isfinite(logit);
      largest = fmaxf(largest, logit);
    }
    largest = warp_max(largest);
    if (lane_index() == 0) state.parts[warp_index()] = largest;
    finite = __syncthreads_and(finite) != 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, state.parts[w]);
    __syncthreads();
    for (int c = tid; c < width; c += kThreads) total += __expf(scale * logits[c] - largest);
    total = warp_sum(total);
    if (lane_index() == 0) state.parts[warp_index()] = total;
    __syncthreads();
    total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += state.parts[w];
    const float log_total = __logf(total);
    for (int j = tid; j < count; j += kThreads) {
      const float logit = scale * logits[__ldg(trie().codes[0] + j)];
      const float log_probability = fmaxf((logit - largest) - log_total, -kLargestFinite);
      keys()[j] = finite ? candidate(0, weight * log_probability, 0, j, j) : kBroken;
    }
    __syncthreads();
    return count;
  }

  // Lists this block's heads of `count` beams and where their keys go, and stores the keys of its
  // only children; returns how many these are. Ends with a barrier.
  __device__ __forceinline__ int look_up(int level, const Beam* from, int count) const {
    static_assert(kMaxBeams <= 2 * kThreads, "a thread has two beams");
    const bool codebook = problem.config.codebook;
    const int at = 2 * static_cast<int>(threadIdx.x), least = codebook ? 1 : 2;
    bool head[2], only[2];
    int flags = 0;  // heads of all blocks, and only children of this one
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int rank = at + i, children = rank < count ? from[rank].children : 0;
      head[i] = children >= least;
      only[i] = !codebook && children == 1 && (rank & (team() - 1)) == team_rank();
      flags += (head[i] ? 1 : 0) + (only[i] ? 1 << 16 : 0);
    }
    const Scan scan = scan_over_block(flags, state.sums);
    int index = scan.before & 0xffff, place = scan.before >> 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int rank = at + i;
      if (head[i]) {
        if ((index & (team() - 1)) == team_rank()) heads()[index >> shape.team_shift] = rank;
        ++index;
      }
      if (only[i])
        keys()[place++] = candidate(level, from[rank].score, rank, from[rank].first_child, 0);
    }
    const int num_heads = ((scan.total & 0xffff) + team() - 1 - team_rank()) >> shape.team_shift;
    __syncthreads();
    int children[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      children[i] = at + i < num_heads ? from[heads()[at + i]].children : 0;
    const Scan sums = scan_over_block(children[0] + children[1], state.sums);
    if (at < num_heads) first_key()[at] = sums.before;
    if (at + 1 < num_heads) first_key()[at + 1] = sums.before + children[0];
    if (threadIdx.x == 0) {
      first_key()[num_heads] = sums.total;
      state.num_heads = num_heads;
    }
    __syncthreads();
    return scan.total >> 16;
  }

  // Keys from the listed logits of heads [begin, end). With normalisation over all codes, their
  // softmax is in of_row[head - begin].
  __device__ __forceinline__ void offer_heads(int level, const WidePass& pass, int begin,
                                              int end) const {
    const Beam* from = beams(level);
#pragma unroll 1
    for (int base = begin + 4 * warp_index(); base < end; base += 4 * kWarps) {
      const int head = base + lane_index() / kFewLanes;
      const int rank = head < end ? heads()[head] : -1;
      const bool few = rank >= 0 && from[rank].children <= kManyChildren;
      offer_children<kFewLanes>(level, few ? rank : -1, keys_of(pass, min(head, end - 1)),
                                min(head, end - 1) - begin);
    }
#pragma unroll 1
    for (int head = begin + warp_index(); head < end; head += kWarps) {
      const int rank = heads()[head];
      if (from[rank].children > kManyChildren)
        offer_children<kWarp>(level, rank, keys_of(pass, head), head - begin);
    }
  }

  // Keys of the children of a beam by kLanes lanes; `rank` < 0: none.
  template <int kLanes>
  __device__ __forceinline__ void offer_children(int level, int rank, BeamKey* list,
                                                 int row) const {
    const Beam* beam = beams(level) + max(rank, 0);
    const int count = rank < 0 ? 0 : beam->children, first_child = beam->first_child;
    const float scale = shape.inverse_temperature[level], score = beam->score;
    const float weight = problem.config.level_weight[level];
    const Softmax softmax =
        problem.config.codebook ? state.of_row[row] : softmax_of_list<kLanes>(list, count, scale);
    const bool finite = !isnan(softmax.largest);
    for (int j = lane_index() % kLanes; j < count; j += kLanes) {
      const float logit = scale * listed_logit(list + j);
      const float log_probability =
          fmaxf((logit - softmax.largest) - softmax.log_total, -kLargestFinite);
      const float sum = fmaf(weight, log_probability, score);
      list[j] = finite ? candidate(level, sum, rank, first_child + j, j) : kBroken;
    }
    __syncwarp();
  }

  // Logits of kChunk codes from `chunk` on, of the hidden rows in shared memory -> logits there.
  template <int kRowTiles>
  __device__ __forceinline__ void chunk_logits(int level, int chunk, int count) const {
    constexpr int kCodeTiles = 4, kCodes = 8 * kCodeTiles, kUnroll = kFull ? 6 : 1;
    static_assert(kCodes * kWarps == kChunk, "a warp has its codes of a chunk at once");
    const HeadView& head = problem.heads.heads[level];
    const int g = lane_index() / 4, t = lane_index() % 4, codes = head.num_codes;
    const int code = chunk + kCodes * warp_index();
    if (code >= codes) return;
    const RowTiles<kRowTiles> rows(memory + shape.hidden, row_bytes(), shape.rows);
    const CodeTile<W, kCodeTiles> tile(static_cast<const W*>(head.out_weight), hidden(), code);
    float sum[kRowTiles][kCodeTiles][4] = {};
    // Weights come from the second-level cache: two products ahead of their use.
    constexpr int kPieces = 3;
    uint4 piece[kPieces][kCodeTiles];
    const int steps = hidden() / 32;
#pragma unroll
    for (int i = 0; i + 1 < kPieces; ++i) tile.load(piece[i], 32 * min(i, steps - 1));
#pragma unroll kUnroll
    for (int base = 0; base < steps; base += kPieces) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int step = base + i, ahead = (i + kPieces - 1) % kPieces;
        if (step >= steps) break;
        tile.load(piece[ahead], 32 * min(step + kPieces - 1, steps - 1));
        multiply_rows<W, kRowTiles, kCodeTiles>(rows, 32 * step, piece[i], sum);
      }
    }
    auto* to =
        reinterpret_cast<float*>(memory + shape.logits) + g * kChunkStride + code - chunk + 2 * t;
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
          for (int i = 0; i < kCodeTiles; ++i)
            *reinterpret_cast<float2*>(to + 8 * i) = {
                fmaf(gelu_unit<W>, sum[m][i][2 * half], bias[i].x),
                fmaf(gelu_unit<W>, sum[m][i][2 * half + 1], bias[i].y)};
        }
        to += 8 * kChunkStride;
      }
    }
  }

  // Hidden rows of heads [begin, begin + count), at most shape.rows -> shared memory.
  __device__ __forceinline__ void hidden_rows(int level, int begin, int count) const {
    const Beam* from = beams(level);
    auto prefix_of = [&](int row) { return Prefix{from[heads()[begin + row]].prefix}; };
    // Where a warp has several rows, the first codes' rows of each table wait where the hidden row
    // goes and, of a narrow head, where its logits go, so that all are on their way at once.
    const int room = 4 * kChunkStride >= 2 * hidden() ? 2 : 1;
    const int num_staged = count > kWarps ? min(room, level) : 0;
    const NormVectors<kVectors, kFull> norm(problem.heads, level);
    char* place = memory + shape.hidden + warp_index() * row_bytes();
    char* other = memory + shape.logits + warp_index() * 4 * kChunkStride;
    constexpr int kOtherStep = 4 * kChunkStride * kWarps;
    if (num_staged > 0) {
#pragma unroll 1
      for (int row = warp_index(), i = 0; row < count; row += kWarps, ++i) {
        char* staged = place + i * kWarps * row_bytes();
        stage_row<W, kVectors, kFull>(problem.heads, level, prefix_of(row), staged,
                                      static_cast<int>(other + i * kOtherStep - staged),
                                      num_staged);
      }
      ptx::wait_copies();
      __syncwarp();
    }
#pragma unroll 1
    for (int row = warp_index(); row < count; row += kWarps) {
      HiddenRow<kVectors, kFull> values;
      hidden_row<W>(problem.heads, level, norm, first + level * hidden(), prefix_of(row), place,
                    static_cast<int>(other - place), num_staged, values);
      __syncwarp();
      for_words<W>(values, hidden(),
                   [&](int at, uint32_t word) { *reinterpret_cast<uint32_t*>(place + at) = word; });
      place += kWarps * row_bytes();
      other += kOtherStep;
    }
    __syncthreads();
  }

  // Keys of the pass with products over every code.
  __device__ __forceinline__ void dense_keys(int level, const WidePass& pass) const {
    constexpr int kTurns = kMaxRows / (4 * kWarps);  // rows of eight lanes
    const Beam* from = beams(level);
    const int codes = problem.heads.heads[level].num_codes, lane = lane_index() % kFewLanes;
    const bool codebook = problem.config.codebook;
    const float scale = shape.inverse_temperature[level];
#pragma unroll 1
    for (int begin = pass.begin; begin < pass.end; begin += shape.rows) {
      const int count = min(shape.rows, pass.end - begin);
      hidden_rows(level, begin, count);
      int listed[kTurns] = {};  // children of the row whose logits are where their keys go
      RunningSoftmax softmax[kTurns];
#pragma unroll 1
      for (int chunk = 0; chunk < codes; chunk += kChunk) {
        if (count <= 16) {
          chunk_logits<1>(level, chunk, count);
        } else if (count <= 32) {
          chunk_logits<2>(level, chunk, count);
        } else {
          chunk_logits<4>(level, chunk, count);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
          const int row = 4 * (kWarps * i + warp_index()) + lane_index() / kFewLanes;
          if (4 * (kWarps * i + warp_index()) >= count) continue;
          const bool real = row < count;
          const int head = begin + min(row, count - 1);
          const auto* logits =
              reinterpret_cast<const float*>(memory + shape.logits) + row * kChunkStride;
          const int width = real ? min(kChunk, codes - chunk) : 0;
          if (codebook) {
            softmax[i].template add<kFewLanes>(logits, width, scale);
            __syncwarp();
          }
          listed[i] = list_logits(level, from[heads()[head]], listed[i], chunk, width, logits,
                                  keys_of(pass, head));
        }
        __syncthreads();
      }
      if (codebook) {
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
          const int row = 4 * (kWarps * i + warp_index()) + lane_index() / kFewLanes;
          const Softmax whole = softmax[i].template over_lanes<kFewLanes>();
          if (lane == 0 && row < count) state.of_row[row] = whole;
        }
        __syncthreads();
      }
      offer_heads(level, pass, begin, begin + count);
      __syncthreads();
    }
  }

  // Copies logits of the beam's children among `width` codes from `chunk` on to where their keys
  // go, by eight lanes; `listed` children have smaller codes. Returns how many have been copied.
  __device__ __forceinline__ int list_logits(int level, const Beam& beam, int listed, int chunk,
                                             int width, const float* logits, BeamKey* list) const {
    const int16_t* codes = trie().codes[level] + beam.first_child;
    const int lane = lane_index() % kFewLanes, count = beam.children;
    bool more = width > 0;
    while (__any_sync(kAllLanes, more)) {
      const int j = listed + lane;
      const int code = more && j < count ? __ldg(codes + j) - chunk : kMaxCodes;
      const bool inside = code < width;
      if (inside) *reinterpret_cast<float*>(list + j) = logits[code];
      const unsigned found =
          __ballot_sync(kAllLanes, inside) >> (lane_index() & ~(kFewLanes - 1)) & 0xffu;
      listed += __popc(found);
      more = found == 0xffu;
    }
    return listed;
  }

  // Keys of the pass with a dot product per child.
  __device__ __forceinline__ void sparse_keys(int level, const WidePass& pass) const {
    constexpr int kAtOnce = 4;  // heads of a warp
    const Beam* from = beams(level);
    const HeadView& head = problem.heads.heads[level];
    const W* weight = static_cast<const W*>(head.out_weight);
    const NormVectors<kVectors, kFull> norm(problem.heads, level);
    const int lane = lane_index();
    // Rows of tables of the next heads on their way at once, as far as there is room.
    const int num_staged = min(level, shape.staged_rows / kAtOnce);
    char* staged = memory + shape.hidden + warp_index() * shape.staged_rows * row_bytes();
    const int staged_step = num_staged * row_bytes();
#pragma unroll 1
    for (int base = pass.begin + warp_index(); base < pass.end; base += kAtOnce * kWarps) {
      const int end = min(base + kAtOnce * kWarps, pass.end);
      if (num_staged > 0) {
        char* to = staged;
#pragma unroll 1
        for (int i = base; i < end; i += kWarps, to += staged_step)
          stage_row<W, kVectors, kFull>(problem.heads, level, Prefix{from[heads()[i]].prefix}, to,
                                        row_bytes(), num_staged);
        ptx::wait_copies();
        __syncwarp();
      }
      const char* at = staged;
#pragma unroll 1
      for (int i = base; i < end; i += kWarps, at += staged_step) {
        const Beam& beam = from[heads()[i]];
        const int count = beam.children;
        const int16_t* codes = trie().codes[level] + beam.first_child;
        BeamKey* list = keys_of(pass, i);
        HiddenRow<kVectors, kFull> values;
        hidden_row<W>(problem.heads, level, norm, first + level * hidden(), Prefix{beam.prefix}, at,
                      row_bytes(), num_staged, values);
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
            *reinterpret_cast<float*>(list + mine) = fmaf(gelu_unit<W>, dot, bias);
        }
      }
      __syncwarp();
    }
    __syncthreads();
    offer_heads(level, pass, pass.begin, pass.end);
  }

  // Keys of the children of this block's share of `count` beams of `level` (1 ..); returns how
  // many. Ends with a barrier.
  __device__ __forceinline__ int child_keys(int level, int count) const {
    const bool dense =
        problem.config.codebook || problem.config.level_mode[level] == LevelMode::kDense;
    WidePass pass{0, 0, look_up(level, beams(level), count)};
    const int num_heads = state.num_heads;
    const int* starts = first_key();
    while (pass.end < num_heads) {
      pass.begin = pass.end;
      const int left = starts[num_heads] - starts[pass.begin];
      if (pass.kept > problem.config.num_beams && left > shape.key_capacity - pass.kept)
        pass.kept = keep_best(pass.kept);
      const int limit = starts[pass.begin] + shape.key_capacity - pass.kept;
      int low = pass.begin, high = num_heads;  // the last end whose keys fit
      while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (starts[middle] <= limit) {
          low = middle;
        } else {
          high = middle - 1;
        }
      }
      pass.end = low;
      if (pass.end == pass.begin) {  // a node with more children than codes
        if (threadIdx.x == 0) keys()[0] = kBroken;
        pass.kept = max(pass.kept, 1);
        break;
      }
      if (dense) {
        dense_keys(level, pass);
      } else {
        sparse_keys(level, pass);
      }
      __syncthreads();
      pass.kept += starts[pass.end] - starts[pass.begin];
    }
    __syncthreads();
    return pass.kept;
  }

  // All levels of one request; `request` < 0: none, but the cluster's barriers.
  __device__ __forceinline__ void run(int64_t request, const float* root_logits) const {
    if (threadIdx.x == 0) {
      state.broken = 0;
      if (request >= 0)
        state.exclusion = exclusion_of(problem.exclude, problem.num_excluded, request);
    }
    __syncthreads();
    int count = 0;
    if (request >= 0) count = advance(0, keys(), root_keys(root_logits));
#pragma unroll 1
    for (int level = 1; level < trie().num_levels; ++level) {
      int found = child_keys(level, count);
      const BeamKey* from = keys();
      if (shape.team_shift > 0) {
        found = share_best(level, found);
        from = exchange();
      }
      count = advance(level, from, found);
      if (shape.team_shift > 0 && level + 1 < trie().num_levels) ptx::cluster_arrive();
    }
    if (request >= 0 && team_rank() == 0 && warp_index() == 0)
      write_items(problem, state.exclusion, request, count, beams(trie().num_levels));
  }
};

}  // namespace sidmlp::cuda::sm90
