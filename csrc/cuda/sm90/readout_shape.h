// Which readouts the tensor cores compute, how a cluster shares one, and where its arrays lie in
// shared memory. Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/layout.h"
#include "cuda/sm90/cuts.h"

namespace sidmlp::cuda::sm90 {

constexpr int kUnit = 64;           // columns of a warp's part of an input-major product
constexpr int kInnerPart = 32;      // inner elements whose sum starts from zero
constexpr int kReadStates = 2;      // requests whose states a block holds at once, at most
constexpr int kMostStateRows = 96;  // of a chunk: the published 82 tokens are one

constexpr int kMostProducts = 11;   // of a readout
constexpr int kProductBytes = 128;  // of what describes one

// Whether a product of so many tasks (units of columns) has its parts computed by different warps.
// Neither form changes the order of the sum.
constexpr bool splits(int tasks, int inner) { return tasks < kThreads / 32 && inner > kInnerPart; }

// The cluster of a cut reads the requests of a group. 2^head_shift neighbouring blocks share the
// heads of the same `own` requests; then all blocks share the FFN of the whole group, in units of
// kUnit hidden columns. Arrays by their byte offsets; W is the dtype of the weights.
struct ReadoutShape {
  int group, cluster_shift, head_shift;
  int own;         // requests whose states a block reads
  int most_heads;  // of a block
  int chunk;       // states at once, a multiple of 16
  int chunked;     // the tokens may be more than a chunk
  // Bytes of a row: of states, of scores, of folded heads, of hidden columns.
  int state_bytes, score_bytes, folded_bytes, hidden_bytes;
  int attended;      // float [group][heads][D]: each head's part of the attention
  int queries;       // float [group][D]
  int residuals;     // float [group][D]: u
  int inputs;        // W [group] rows: u
  int parts;         // float: sums that are still to be added
  int products;      // WeightProduct of each step
  int ffn_sums;      // float [group][units][D]; when the states are no longer needed
  int hidden;        // W [group] rows: hidden columns of this block; likewise
  int states;        // W [own][chunk] rows
  int tokens;        // int32 [own][chunk]: which
  int cursors;       // Cursor [own]
  int scores;        // float, then W [own][heads] rows
  int totals;        // float [own][heads][3]: of the softmax
  int head_rows;     // W [own][heads] rows: r, then y
  int means;         // W [own] rows: p
  int query_rows;    // W [own] rows: q
  int folded;        // W [own][heads] rows
  int accumulators;  // float [own][heads][D], if chunked
  int bytes;
};

// What the arrays depend on, apart from the cut.
struct ReadoutSizes {
  bool half, factored;
  int dim, num_heads, head_dim, ffn_dim;
};

inline ReadoutSizes sizes_of(const ReadoutView& view) {
  return {view.dtype != DType::kFloat32,
          view.score_in != nullptr,
          view.dim,
          view.num_heads,
          view.head_dim,
          view.ffn_dim};
}

constexpr int state_rows(int dim) {
  return dim <= 128 ? kMostStateRows : dim <= 256 ? 48 : dim <= 512 ? 32 : 16;
}

// Rows so far apart that eight lie in different banks.
constexpr int64_t row_bytes(int64_t elements) { return (2 * elements + 127) / 128 * 128 + 16; }

inline ReadoutShape readout_shape(const ReadoutSizes& sizes, int64_t tokens, const Cut& cut) {
  constexpr int kWarps = kThreads / 32;
  ReadoutShape s{};
  s.group = cut.group;
  while (1 << s.cluster_shift < cut.cluster) ++s.cluster_shift;
  s.head_shift = s.cluster_shift;
  while (s.head_shift > 0 && (cut.group << s.head_shift >> s.cluster_shift) > kReadStates)
    --s.head_shift;
  s.own = std::max(1, cut.group << s.head_shift >> s.cluster_shift);
  const int share = 1 << s.head_shift;
  s.most_heads = (sizes.num_heads + share - 1) / share;
  s.chunk = state_rows(sizes.dim);
  s.chunked = tokens > s.chunk;
  const int64_t dim = sizes.dim, rows = int64_t{s.own} * s.most_heads;
  const int64_t units = (sizes.ffn_dim + kUnit - 1) / kUnit;
  const int most_units = static_cast<int>((units + cut.cluster - 1) / cut.cluster);
  const int64_t state_bytes = row_bytes(dim), folded_bytes = row_bytes(padded(sizes.head_dim));
  const int64_t hidden_bytes = row_bytes(int64_t{kUnit} * most_units);
  s.score_bytes = 4 * s.chunk + 16;

  int64_t floats = 0;  // of the parts of the widest product that is split
  auto split = [&](int jobs, int64_t columns, int inner, int requests) {
    const int64_t tasks = jobs * ((columns + kUnit - 1) / kUnit);
    if (jobs > 0 && splits(static_cast<int>(std::min<int64_t>(tasks, kWarps)), inner))
      floats = std::max(floats, (inner + kInnerPart - 1) / kInnerPart * jobs * requests * columns);
  };
  const int head_pad = static_cast<int>(padded(sizes.head_dim));
  split(1, dim, sizes.dim, s.own);
  for (const int heads : {sizes.num_heads / share, s.most_heads}) {  // of one block and another
    split(heads, dim, sizes.factored ? sizes.head_dim : sizes.dim, s.own);
    if (sizes.factored) split(heads, head_pad, sizes.dim, s.own);
  }
  const int whole = sizes.ffn_dim / kUnit;
  for (const int jobs : {1, whole / cut.cluster, (whole + cut.cluster - 1) / cut.cluster}) {
    split(jobs, kUnit, sizes.dim, cut.group);
    split(jobs, dim, kUnit, cut.group);
  }

  int64_t at = 0;
  auto take = [&](int64_t bytes) {
    const int64_t from = at;
    at = std::min<int64_t>(at + (bytes + 15) / 16 * 16, 1 << 30);
    return static_cast<int>(from);
  };
  s.attended = take(4 * cut.group * sizes.num_heads * dim);
  s.queries = take(4 * cut.group * dim);
  s.residuals = take(4 * cut.group * dim);
  s.inputs = take(cut.group * state_bytes);
  s.products = take(kMostProducts * kProductBytes);
  s.parts = take(4 * floats);
  const int64_t begin = at;
  s.states = take(s.own * s.chunk * state_bytes);
  s.tokens = take(4 * s.own * s.chunk);
  s.cursors = take(16 * s.own);
  s.scores = take(rows * s.score_bytes);
  s.totals = take(12 * rows);
  s.head_rows = take(rows * state_bytes);
  s.means = take(s.own * state_bytes);
  s.query_rows = take(s.own * state_bytes);
  s.folded = take(sizes.factored ? rows * folded_bytes : 0);
  s.accumulators = take(s.chunked ? 4 * rows * dim : 0);
  const int64_t end = at;
  at = begin;
  s.ffn_sums = take(4 * cut.group * units * dim);
  s.hidden = take(cut.group * hidden_bytes);
  s.bytes = static_cast<int>(std::max(at, end));
  s.state_bytes = static_cast<int>(state_bytes);
  s.folded_bytes = static_cast<int>(folded_bytes);
  s.hidden_bytes = static_cast<int>(hidden_bytes);
  return s;
}

// However many tokens there are.
inline bool readout_fits(const ReadoutSizes& sizes, const Cut& cut) {
  return readout_shape(sizes, int64_t{1} << 31, cut).bytes <= kSharedBytes;
}

// Whether tensor cores read out: a matter of the model alone, as they round otherwise.
inline bool reads_on_tensor_cores(const ReadoutSizes& sizes) {
  if (!sizes.half || sizes.num_heads < 1 || sizes.dim < 16 || sizes.dim > kMaxDim) return false;
  if (sizes.dim % 16 != 0 || sizes.head_dim % 16 != 0 || sizes.ffn_dim % 16 != 0) return false;
  for (const Cut& cut : kCuts)
    if (!readout_fits(sizes, cut)) return false;
  return true;
}

}  // namespace sidmlp::cuda::sm90
