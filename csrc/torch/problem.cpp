#include "torch/problem.h"

#include <cmath>

#include "sidmlp/beam_key.h"

namespace sidmlp::torch_ops {

namespace {

int checked_size(int64_t value, int64_t low, int64_t high, const char* name) {
  STD_TORCH_CHECK(value >= low && value <= high, name, ": expected ", low, "..", high, ", got ",
                  value);
  return static_cast<int>(value);
}

void check_count(const std::vector<Tensor>& tensors, size_t expected, const char* name) {
  STD_TORCH_CHECK(tensors.size() == expected, name, ": expected ", expected, " tensors, got ",
                  tensors.size());
}

constexpr int64_t kMaxWidth = 1 << 20;

}  // namespace

Sizes::Sizes(const std::vector<int64_t>& sizes) {
  STD_TORCH_CHECK(sizes.size() >= 8, "sizes: expected at least 8 numbers, got ", sizes.size());
  num_levels = checked_size(sizes[0], 1, kMaxLevels, "number of levels");
  STD_TORCH_CHECK(sizes.size() == static_cast<size_t>(7 + num_levels), "sizes: expected ",
                  7 + num_levels, " numbers for ", num_levels, " levels, got ", sizes.size());
  dim = checked_size(sizes[1], 1, kMaxWidth, "dim");
  num_heads = checked_size(sizes[2], 1, kMaxWidth, "num_heads");
  head_dim = checked_size(sizes[3], 1, kMaxWidth, "head_dim");
  ffn_dim = checked_size(sizes[4], 1, kMaxWidth, "ffn_dim");
  hidden_dim = checked_size(sizes[5], 1, kMaxWidth, "hidden_dim");
  num_blocks = checked_size(sizes[6], 1, 64, "blocks per head");
  for (int l = 0; l < num_levels; ++l)
    num_codes[l] = checked_size(sizes[7 + l], 1, kMaxCodesPerLevel, "codes of a level");
}

ReadoutView readout_view(const Sizes& s, const std::vector<Tensor>& tensors, double layer_norm_eps,
                         const Place& place) {
  check_count(tensors, 9, "readout");
  const int64_t dim_pad = padded(s.dim), head_pad = padded(s.head_dim), ffn_pad = padded(s.ffn_dim);
  const int64_t attention = static_cast<int64_t>(s.num_heads) * s.head_dim;
  const bool factored = tensors[2].numel() > 0;
  ReadoutView view{};
  view.dtype = weight_dtype(tensors[0], "readout.query_weight");
  const ScalarType weight = scalar_type_of(view.dtype);
  view.dim = s.dim, view.num_heads = s.num_heads, view.head_dim = s.head_dim,
  view.ffn_dim = s.ffn_dim;
  view.layer_norm_eps = static_cast<float>(layer_norm_eps);
  view.query_weight =
      check_tensor(tensors[0], "readout.query_weight", weight, {s.dim, dim_pad}, place);
  view.vectors =
      check_as<float>(tensors[1], "readout.vectors", ScalarType::Float, {6, dim_pad}, place);
  if (factored) {
    view.score_in = check_tensor(tensors[2], "readout.score_in", weight,
                                 {s.dim, s.num_heads * head_pad}, place);
    view.score_out =
        check_tensor(tensors[3], "readout.score_out", weight, {attention, dim_pad}, place);
    view.value_in = check_tensor(tensors[4], "readout.value_in", weight,
                                 {s.dim, s.num_heads * head_pad}, place);
    view.value_out =
        check_tensor(tensors[5], "readout.value_out", weight, {attention, dim_pad}, place);
  } else {
    view.score_out = check_tensor(tensors[3], "readout.score_out", weight,
                                  {s.dim, s.num_heads * dim_pad}, place);
    view.value_in = check_tensor(tensors[4], "readout.value_in", weight,
                                 {static_cast<int64_t>(s.num_heads) * s.dim, dim_pad}, place);
  }
  view.ffn_in = check_tensor(tensors[6], "readout.ffn_in", weight, {s.dim, ffn_pad}, place);
  view.ffn_in_bias =
      check_as<float>(tensors[7], "readout.ffn_in_bias", ScalarType::Float, {ffn_pad}, place);
  view.ffn_out = check_tensor(tensors[8], "readout.ffn_out", weight, {s.ffn_dim, dim_pad}, place);
  return view;
}

HeadsView heads_view(const Sizes& s, const std::vector<Tensor>& tensors, double layer_norm_eps,
                     const Place& place) {
  check_count(tensors, 2 + 5 * static_cast<size_t>(s.num_levels), "heads");
  const int64_t hidden_pad = padded(s.hidden_dim);
  HeadsView view{};
  view.dtype = weight_dtype(tensors[0], "heads.context_weight");
  const ScalarType weight = scalar_type_of(view.dtype);
  view.num_levels = s.num_levels, view.dim = s.dim, view.hidden_dim = s.hidden_dim,
  view.num_blocks = s.num_blocks;
  view.layer_norm_eps = static_cast<float>(layer_norm_eps);
  view.context_weight = check_tensor(tensors[0], "heads.context_weight", weight,
                                     {s.dim, s.num_levels * hidden_pad}, place);
  view.context_bias = check_as<float>(tensors[1], "heads.context_bias", ScalarType::Float,
                                      {s.num_levels * hidden_pad}, place);
  int64_t prefix_rows = 0;
  for (int l = 0; l < s.num_levels; ++l) {
    const Tensor* t = &tensors[2 + 5 * l];
    const std::string at = "heads." + std::to_string(l) + ".";
    HeadView& head = view.heads[l];
    head.num_codes = s.num_codes[l];
    head.vectors = check_as<float>(t[0], at + "vectors", ScalarType::Float,
                                   {3 * s.num_blocks - 1, hidden_pad}, place);
    head.prefix_table =
        check_tensor(t[1], at + "prefix_table", weight, {prefix_rows, hidden_pad}, place);
    head.block_weight = check_tensor(t[2], at + "block_weight", weight,
                                     {s.num_blocks - 1, s.hidden_dim, hidden_pad}, place);
    const int64_t code_rows = (s.num_codes[l] + kCodeRows - 1) / kCodeRows * kCodeRows;
    head.out_weight = check_tensor(t[3], at + "out_weight", weight, {code_rows, hidden_pad}, place);
    head.out_bias =
        check_as<float>(t[4], at + "out_bias", ScalarType::Float, {s.num_codes[l]}, place);
    prefix_rows += s.num_codes[l];
  }
  return view;
}

TrieView trie_view(const Sizes& s, const std::vector<Tensor>& tensors, const Place& place) {
  check_count(tensors, 2 * static_cast<size_t>(s.num_levels) + 3, "catalogue");
  TrieView view{};
  view.num_levels = s.num_levels;
  int64_t parents = 1;
  for (int l = 0; l < s.num_levels; ++l) {
    const std::string at = "catalogue level " + std::to_string(l + 1) + " ";
    const int64_t nodes = tensors[2 * l + 1].numel();
    STD_TORCH_CHECK(nodes >= 1 && nodes <= INT32_MAX, at,
                    "codes: expected 1..2147483647 nodes, got ", nodes);
    STD_TORCH_CHECK(l > 0 || nodes <= s.num_codes[0], at, "codes: expected at most ",
                    s.num_codes[0], " nodes, one a code, got ", nodes);
    view.child_begin[l] = check_as<int32_t>(tensors[2 * l], at + "child_begin", ScalarType::Int,
                                            {parents + 1}, place);
    view.codes[l] =
        check_as<int16_t>(tensors[2 * l + 1], at + "codes", ScalarType::Short, {nodes}, place);
    view.num_nodes[l] = static_cast<int32_t>(nodes);
    parents = nodes;
  }
  const Tensor* leaves = &tensors[2 * s.num_levels];
  view.num_items = leaves[1].numel();
  view.leaf_begin =
      check_as<int32_t>(leaves[0], "catalogue leaf_begin", ScalarType::Int, {parents + 1}, place);
  view.leaf_item_ids = check_as<int64_t>(leaves[1], "catalogue leaf_item_ids", ScalarType::Long,
                                         {view.num_items}, place);
  view.leaf_available = check_as<uint8_t>(leaves[2], "catalogue leaf_available", ScalarType::Byte,
                                          {view.num_items}, place);
  return view;
}

DecodeConfig decode_config(const Sizes& s, int64_t k, int64_t num_beams, bool codebook,
                           const std::vector<double>& temperatures,
                           const std::vector<double>& level_weights,
                           const std::vector<int64_t>& level_modes) {
  DecodeConfig config{};
  config.num_beams = checked_size(num_beams, 1, kMaxBeams, "num_beams");
  config.k = checked_size(k, 1, num_beams, "k (at most num_beams)");
  config.codebook = codebook;
  const size_t levels = s.num_levels;
  STD_TORCH_CHECK(temperatures.size() == levels, "temperatures: expected ", levels,
                  " numbers, got ", temperatures.size());
  STD_TORCH_CHECK(level_weights.size() == levels, "level_weights: expected ", levels,
                  " numbers, got ", level_weights.size());
  STD_TORCH_CHECK(level_modes.size() == levels, "level_modes: expected ", levels, " numbers, got ",
                  level_modes.size());
  for (size_t l = 0; l < levels; ++l) {
    config.temperature[l] = static_cast<float>(temperatures[l]);
    config.level_weight[l] = static_cast<float>(level_weights[l]);
    STD_TORCH_CHECK(std::isfinite(config.temperature[l]) && config.temperature[l] > 0,
                    "temperatures: expected finite numbers above 0 (in float32), got ",
                    temperatures[l]);
    STD_TORCH_CHECK(std::isfinite(config.level_weight[l]),
                    "level_weights: expected finite numbers, got ", level_weights[l]);
    STD_TORCH_CHECK(level_modes[l] == 0 || level_modes[l] == 1,
                    "level_modes: expected 0 (sparse) or 1 (dense), got ", level_modes[l]);
    config.level_mode[l] = static_cast<LevelMode>(level_modes[l]);
  }
  return config;
}

void check_launches(int64_t launches, const char* why_not_two) {
  STD_TORCH_CHECK(launches == 1 || launches == 2, "launches: expected 1 or 2, got ", launches);
  STD_TORCH_CHECK(launches == 1 || why_not_two == nullptr, "launches: expected 1, got 2 (",
                  why_not_two, ")");
}

ExcludeView exclude_view(const std::optional<Tensor>& ids, const std::optional<Tensor>& offsets,
                         int64_t batch, const Place& place) {
  STD_TORCH_CHECK(ids.has_value() == offsets.has_value(),
                  "exclude_ids and exclude_offsets: expected both or neither, got one of them");
  ExcludeView view{};
  if (!ids.has_value()) return view;
  const int64_t total = ids->numel();
  // An empty tensor has no data; kernels take a null pointer for "nothing is excluded".
  const auto* id_data = check_as<int64_t>(*ids, "exclude_ids", ScalarType::Long, {total}, place);
  view.offsets =
      check_as<int64_t>(*offsets, "exclude_offsets", ScalarType::Long, {batch + 1}, place);
  if (total > 0) view.ids = id_data;
  return view;
}

StatesView states_view(const Sizes& s, const Tensor& states, const Tensor& mask,
                       const Place& place) {
  STD_TORCH_CHECK(states.dim() == 3, "states: expected [batch, tokens, dim], got ",
                  shape_text(shape_of(states)));
  const int64_t batch = states.size(0), tokens = states.size(1);
  STD_TORCH_CHECK(tokens <= kMaxWidth, "states: expected at most ", kMaxWidth, " tokens, got ",
                  tokens);
  StatesView view{};
  view.dtype = weight_dtype(states, "states");
  view.tokens = static_cast<int>(tokens);
  view.states =
      check_tensor(states, "states", scalar_type_of(view.dtype), {batch, tokens, s.dim}, place);
  view.mask = check_as<uint8_t>(mask, "mask", ScalarType::Bool, {batch, tokens}, place);
  return view;
}

}  // namespace sidmlp::torch_ops
