// Seeded decode problems in plain C++, in the layout of csrc/sidmlp/views.h: rows padded with
// zeros, matrices input-major, prefix tables, a CSR trie of random codes. No torch.
//
// Scales are those of a trained student of unit logits: every code's logit has a standard deviation
// of about kLogitSpread, contexts about 1, attention scores about 1.
//
// Poison: states that the mask hides are NaN; exclude.ids goes on beyond the last offset with ids
// of items that must not be excluded.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "sidmlp/views.h"

namespace sidmlp::native {

constexpr double kLogitSpread = 1.0;

struct Case {
  std::string name;
  DType dtype = DType::kFloat32;  // of matrices and states
  std::vector<int> codes = {16, 16, 16};
  int dim = 32, num_heads = 4, head_dim = 8, ffn_dim = 64, hidden_dim = 64, num_blocks = 1;
  int num_items = 300;
  int batch = 3;
  int tokens = 0;              // 0: contexts are given, no readout
  bool factored = false;       // form of the attention
  int num_beams = 10, k = 10;  // k <= num_beams
  bool codebook = false;
  bool tuned = false;          // temperatures and level weights other than 1
  bool only_children = false;  // most nodes have one child
  int excluded = 0;            // ids a request
  double unavailable = 0.0;    // share of items
  bool broken = false;         // request batch / 2 is not finite
  uint64_t seed = 0;
};

// The bytes of one array that a view points to.
struct Array {
  std::vector<unsigned char> bytes;

  template <class T>
  static Array of(const std::vector<T>& values) {
    Array array;
    array.bytes.resize(values.size() * sizeof(T));
    if (!values.empty()) memcpy(array.bytes.data(), values.data(), array.bytes.size());
    return array;
  }
};

inline Array rounded(const std::vector<float>& values, DType dtype) {
  if (dtype == DType::kFloat32) return Array::of(values);
  std::vector<uint16_t> halves(values.size());
  for (size_t i = 0; i < values.size(); ++i)
    halves[i] = dtype == DType::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(values[i]))
                                          : __half_as_ushort(__float2half_rn(values[i]));
  return Array::of(halves);
}

struct Problem {
  Case sizes;
  // heads
  Array context_weight, context_bias;
  struct Head {
    Array vectors, prefix_table, block_weight, out_weight, out_bias;
  };
  std::vector<Head> heads;
  // readout
  Array query_weight, readout_vectors, score_in, score_out, value_in, value_out;
  Array ffn_in, ffn_in_bias, ffn_out;
  // catalogue; as numbers, too, for whoever judges
  struct Level {
    std::vector<int32_t> child_begin;
    std::vector<int16_t> codes;
  };
  std::vector<Level> levels;
  std::vector<int32_t> leaf_begin;
  std::vector<int64_t> leaf_item_ids;
  std::vector<uint8_t> leaf_available;
  std::vector<Array> child_begin, node_codes;
  Array leaf_begin_array, item_ids_array, available_array;
  // requests
  Array context, states, mask, exclude_ids, exclude_offsets;
  std::vector<std::vector<int64_t>> exclude;  // ids of each request, ascending
  int64_t num_excluded = 0;                   // length of exclude_ids
  DecodeConfig config{};

  bool from_states() const { return sizes.tokens > 0; }
  int num_levels() const { return static_cast<int>(sizes.codes.size()); }
  bool finite(int request) const { return !sizes.broken || request != sizes.batch / 2; }
  bool allowed(int request, int32_t slot) const {
    const std::vector<int64_t>& ids = exclude[request];
    return leaf_available[slot] && !std::binary_search(ids.begin(), ids.end(), leaf_item_ids[slot]);
  }
};

struct Views {
  ReadoutView readout;
  StatesView states;
  HeadsView heads;
  TrieView trie;
  ExcludeView exclude;
  const float* context;
};

// `at(array)` says where the bytes of an array lie; an empty one has no address.
template <class At>
Views views_of(const Problem& p, At&& at) {
  const Case& s = p.sizes;
  auto floats = [&](const Array& array) { return static_cast<const float*>(at(array)); };
  Views v{};
  v.heads.dtype = s.dtype;
  v.heads.num_levels = p.num_levels();
  v.heads.dim = s.dim;
  v.heads.hidden_dim = s.hidden_dim;
  v.heads.num_blocks = s.num_blocks;
  v.heads.layer_norm_eps = 1e-5f;
  v.heads.context_weight = at(p.context_weight);
  v.heads.context_bias = floats(p.context_bias);
  v.trie.num_levels = p.num_levels();
  for (int l = 0; l < p.num_levels(); ++l) {
    const Problem::Head& head = p.heads[l];
    v.heads.heads[l] = {
        s.codes[l],          floats(head.vectors), at(head.prefix_table), at(head.block_weight),
        at(head.out_weight), floats(head.out_bias)};
    v.trie.num_nodes[l] = static_cast<int32_t>(p.levels[l].codes.size());
    v.trie.child_begin[l] = static_cast<const int32_t*>(at(p.child_begin[l]));
    v.trie.codes[l] = static_cast<const int16_t*>(at(p.node_codes[l]));
  }
  v.trie.num_items = static_cast<int64_t>(p.leaf_item_ids.size());
  v.trie.leaf_begin = static_cast<const int32_t*>(at(p.leaf_begin_array));
  v.trie.leaf_item_ids = static_cast<const int64_t*>(at(p.item_ids_array));
  v.trie.leaf_available = static_cast<const uint8_t*>(at(p.available_array));
  if (p.num_excluded > 0) {
    v.exclude.ids = static_cast<const int64_t*>(at(p.exclude_ids));
    v.exclude.offsets = static_cast<const int64_t*>(at(p.exclude_offsets));
  }
  if (!p.from_states()) {
    v.context = floats(p.context);
    return v;
  }
  v.readout.dtype = s.dtype;
  v.readout.dim = s.dim;
  v.readout.num_heads = s.num_heads;
  v.readout.head_dim = s.head_dim;
  v.readout.ffn_dim = s.ffn_dim;
  v.readout.layer_norm_eps = 1e-5f;
  v.readout.query_weight = at(p.query_weight);
  v.readout.vectors = floats(p.readout_vectors);
  v.readout.score_in = at(p.score_in);
  v.readout.score_out = at(p.score_out);
  v.readout.value_in = at(p.value_in);
  v.readout.value_out = at(p.value_out);
  v.readout.ffn_in = at(p.ffn_in);
  v.readout.ffn_in_bias = floats(p.ffn_in_bias);
  v.readout.ffn_out = at(p.ffn_out);
  v.states = {at(p.states), s.dtype, static_cast<const uint8_t*>(at(p.mask)), s.tokens};
  return v;
}

class ProblemMaker {
 public:
  explicit ProblemMaker(const Case& sizes) : random_(sizes.seed) { problem_.sizes = sizes; }

  Problem make() {
    make_heads();
    make_catalogue();
    make_requests();
    if (problem_.from_states()) make_readout();
    make_config();
    return std::move(problem_);
  }

 private:
  float normal() { return static_cast<float>(normal_(random_)); }
  int below(int64_t n) { return static_cast<int>(random_() % static_cast<uint64_t>(n)); }
  double uniform() { return static_cast<double>(random_() >> 11) * 0x1p-53; }

  // [rows, groups * padded(columns)] of normal numbers around `mean`; the padding is zero.
  std::vector<float> block(int64_t rows, int64_t columns, double deviation, int64_t groups = 1,
                           double mean = 0.0) {
    const int64_t pad = padded(columns);
    std::vector<float> values(rows * groups * pad);
    for (int64_t g = 0; g < rows * groups; ++g)
      for (int64_t i = 0; i < columns; ++i)
        values[g * pad + i] = static_cast<float>(mean + deviation * normal());
    return values;
  }
  Array matrix(int64_t rows, int64_t columns, double deviation, int64_t groups = 1) {
    return rounded(block(rows, columns, deviation, groups), problem_.sizes.dtype);
  }
  // A row for each mean: 1 for the gain of a LayerNorm, 0 for shifts and biases.
  Array vectors(const std::vector<double>& means, int64_t columns) {
    std::vector<float> all;
    for (const double mean : means) {
      const std::vector<float> row = block(1, columns, 0.2, 1, mean);
      all.insert(all.end(), row.begin(), row.end());
    }
    return Array::of(all);
  }

  void make_heads() {
    const Case& s = problem_.sizes;
    const int levels = problem_.num_levels();
    problem_.context_weight = matrix(s.dim, s.hidden_dim, 1 / std::sqrt(s.dim), levels);
    problem_.context_bias = vectors(std::vector<double>(levels, 0.0), s.hidden_dim);
    int64_t prefix_rows = 0;
    for (int l = 0; l < levels; ++l) {
      Problem::Head head;
      std::vector<double> means = {1, 0};
      for (int b = 1; b < s.num_blocks; ++b) means.insert(means.end(), {0, 1, 0});
      head.vectors = vectors(means, s.hidden_dim);
      head.prefix_table = matrix(prefix_rows, s.hidden_dim, 0.7);
      head.block_weight = matrix(static_cast<int64_t>(s.num_blocks - 1) * s.hidden_dim,
                                 s.hidden_dim, 1.5 / std::sqrt(s.hidden_dim));
      // GELU of a standard normal number has a mean square of 0.43.
      head.out_weight = matrix((s.codes[l] + kCodeRows - 1) / kCodeRows * kCodeRows, s.hidden_dim,
                               kLogitSpread / std::sqrt(0.43 * s.hidden_dim));
      std::vector<float> bias(s.codes[l]);
      for (float& b : bias) b = 0.3f * normal();
      head.out_bias = Array::of(bias);
      problem_.heads.push_back(std::move(head));
      prefix_rows += s.codes[l];
    }
  }

  void make_readout() {
    const Case& s = problem_.sizes;
    const double dim = s.dim, heads = s.num_heads, head_dim = s.head_dim;
    problem_.query_weight = matrix(s.dim, s.dim, 1 / std::sqrt(dim));
    problem_.readout_vectors = vectors({0, 1, 0, 0, 1, 0}, s.dim);
    if (s.factored) {
      const int64_t attention = static_cast<int64_t>(s.num_heads) * s.head_dim;
      problem_.score_in = matrix(s.dim, s.head_dim, 1 / std::sqrt(dim), s.num_heads);
      problem_.score_out = matrix(attention, s.dim, 1.5 / std::sqrt(head_dim * dim));
      problem_.value_in = matrix(s.dim, s.head_dim, 1 / std::sqrt(dim), s.num_heads);
      problem_.value_out = matrix(attention, s.dim, 1 / std::sqrt(heads * head_dim));
    } else {
      problem_.score_out = matrix(s.dim, s.dim, 1.5 / dim, s.num_heads);
      problem_.value_in =
          matrix(static_cast<int64_t>(s.num_heads) * s.dim, s.dim, 1 / std::sqrt(heads * dim));
    }
    problem_.ffn_in = matrix(s.dim, s.ffn_dim, 1 / std::sqrt(dim));
    problem_.ffn_in_bias = vectors({0}, s.ffn_dim);
    problem_.ffn_out = matrix(s.ffn_dim, s.dim, 1 / std::sqrt(s.ffn_dim));
  }

  void make_catalogue() {
    const Case& s = problem_.sizes;
    const int levels = problem_.num_levels();
    struct Item {
      std::vector<int> codes;
      int64_t id;
      bool available;
    };
    std::vector<Item> items(s.num_items);
    for (int n = 0; n < s.num_items; ++n) {
      Item& item = items[n];
      item.id = 1000 + 3 * static_cast<int64_t>((n * int64_t{7919}) % 1000003);
      item.available = uniform() >= s.unavailable;
      for (const int size : s.codes) item.codes.push_back(below(size));
      // Half of the items continue another's prefix, a few are on the very same leaf.
      if (n > 0 && !s.only_children && uniform() < 0.5) {
        const int depth = below(levels + 1);
        const Item& donor = items[below(n)];
        std::copy_n(donor.codes.begin(), depth, item.codes.begin());
      }
    }
    std::stable_sort(items.begin(), items.end(),
                     [](const Item& a, const Item& b) { return a.codes < b.codes; });
    problem_.levels.resize(levels);
    problem_.levels[0].child_begin.push_back(0);
    for (int n = 0; n < s.num_items; ++n) {
      int changed = 0;  // first level at which this item leaves the previous one's path
      if (n > 0)
        while (changed < levels && items[n].codes[changed] == items[n - 1].codes[changed])
          ++changed;
      for (int l = changed; l < levels; ++l) {
        Problem::Level& level = problem_.levels[l];
        if (l > changed)  // a new parent: its children begin here
          level.child_begin.push_back(static_cast<int32_t>(level.codes.size()));
        level.codes.push_back(static_cast<int16_t>(items[n].codes[l]));
      }
      if (changed < levels) problem_.leaf_begin.push_back(n);
      problem_.leaf_item_ids.push_back(items[n].id);
      problem_.leaf_available.push_back(items[n].available);
    }
    problem_.leaf_begin.push_back(s.num_items);
    for (int l = 0; l < levels; ++l) {
      Problem::Level& level = problem_.levels[l];
      level.child_begin.push_back(static_cast<int32_t>(level.codes.size()));
      problem_.child_begin.push_back(Array::of(level.child_begin));
      problem_.node_codes.push_back(Array::of(level.codes));
    }
    problem_.leaf_begin_array = Array::of(problem_.leaf_begin);
    problem_.item_ids_array = Array::of(problem_.leaf_item_ids);
    problem_.available_array = Array::of(problem_.leaf_available);
  }

  void make_requests() {
    const Case& s = problem_.sizes;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const int bad = s.broken ? s.batch / 2 : -1;
    if (problem_.from_states()) {
      std::vector<float> states(static_cast<int64_t>(s.batch) * s.tokens * s.dim);
      std::vector<uint8_t> mask(static_cast<int64_t>(s.batch) * s.tokens);
      for (int b = 0; b < s.batch; ++b) {
        const int length = b == 1 ? 0 : b == 2 ? s.tokens : below(s.tokens + 1);
        for (int t = 0; t < s.tokens; ++t) {
          const int64_t row = static_cast<int64_t>(b) * s.tokens + t;
          mask[row] = t < length && (uniform() < 0.9 || length == s.tokens);
          if (b == bad) mask[row] = 1;
          for (int i = 0; i < s.dim; ++i)
            states[row * s.dim + i] = mask[row] ? normal() + 0.5f * static_cast<float>(i % 3) : nan;
        }
        if (b == bad) states[static_cast<int64_t>(b) * s.tokens * s.dim + s.dim - 1] = nan;
      }
      problem_.states = rounded(states, s.dtype);
      problem_.mask = Array::of(mask);
    } else {
      std::vector<float> context(static_cast<int64_t>(s.batch) * s.dim);
      for (float& value : context) value = normal();
      if (bad >= 0) context[static_cast<int64_t>(bad) * s.dim + s.dim / 2] = nan;
      problem_.context = Array::of(context);
    }
    problem_.exclude.resize(s.batch);
    if (s.excluded == 0) return;
    std::vector<int64_t> ids, offsets = {0};
    for (std::vector<int64_t>& own : problem_.exclude) {
      // Some are nobody's, some twice.
      for (int i = below(s.excluded + 1); i > 0; --i)
        own.push_back(uniform() < 0.8 ? problem_.leaf_item_ids[below(s.num_items)] : below(900));
      std::sort(own.begin(), own.end());
      ids.insert(ids.end(), own.begin(), own.end());
      offsets.push_back(static_cast<int64_t>(ids.size()));
    }
    std::vector<int64_t> unused = problem_.leaf_item_ids;
    std::sort(unused.begin(), unused.end());
    ids.insert(ids.end(), unused.begin(), unused.end());
    problem_.num_excluded = static_cast<int64_t>(ids.size());
    problem_.exclude_ids = Array::of(ids);
    problem_.exclude_offsets = Array::of(offsets);
  }

  void make_config() {
    const Case& s = problem_.sizes;
    DecodeConfig& config = problem_.config;
    config.k = s.k;
    config.num_beams = s.num_beams;
    config.codebook = s.codebook;
    const std::array<float, 4> temperatures = {0.5f, 1.7f, 1.0f, 3.0f};
    const std::array<float, 4> weights = {1.0f, -0.5f, 0.7f, 2.0f};
    for (int l = 0; l < problem_.num_levels(); ++l) {
      config.temperature[l] = s.tuned ? temperatures[l % 4] : 1.0f;
      config.level_weight[l] = s.tuned ? weights[l % 4] : 1.0f;
      const bool dense = l == 0 || s.codebook || below(2) == 0;
      config.level_mode[l] = dense ? LevelMode::kDense : LevelMode::kSparse;
    }
  }

  std::mt19937_64 random_;
  std::normal_distribution<double> normal_;
  Problem problem_;
};

inline Problem make_problem(const Case& sizes) { return ProblemMaker(sizes).make(); }

}  // namespace sidmlp::native
