// Operator arguments (tensors, ints, floats) -> the plain views that kernels take, every size and
// dtype checked. The order of the lists is fixed by sidmlp_kernels/packing.py and
// sidmlp_kernels/trie.py.
#pragma once

#include <optional>
#include <vector>

#include "sidmlp/views.h"
#include "torch/check.h"

namespace sidmlp::torch_ops {

// `sizes`: [L, D, heads, head_dim, F, H, blocks, C_1 .. C_L]
struct Sizes {
  int num_levels, dim, num_heads, head_dim, ffn_dim, hidden_dim, num_blocks;
  int num_codes[kMaxLevels];

  explicit Sizes(const std::vector<int64_t>& sizes);
};

ReadoutView readout_view(const Sizes&, const std::vector<Tensor>& readout, double layer_norm_eps,
                         const Place&);
HeadsView heads_view(const Sizes&, const std::vector<Tensor>& heads, double layer_norm_eps,
                     const Place&);
TrieView trie_view(const Sizes&, const std::vector<Tensor>& catalogue, const Place&);
// `level_modes`: a LevelMode per level.
DecodeConfig decode_config(const Sizes&, int64_t k, int64_t num_beams, bool codebook,
                           const std::vector<double>& temperatures,
                           const std::vector<double>& level_weights,
                           const std::vector<int64_t>& level_modes);
// Of a decode, 1 or 2; `why_not_two`: why not 2, or nullptr.
void check_launches(int64_t launches, const char* why_not_two);
ExcludeView exclude_view(const std::optional<Tensor>& ids, const std::optional<Tensor>& offsets,
                         int64_t batch, const Place&);
StatesView states_view(const Sizes&, const Tensor& states, const Tensor& mask, const Place&);

}  // namespace sidmlp::torch_ops
