// Operators on the CPU that another one is made of.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "torch/check.h"

namespace sidmlp::torch_ops {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // items, scores, codes, counts

Results decode_states_cpu(Tensor states, Tensor mask, std::vector<Tensor> readout,
                          std::vector<Tensor> heads, std::vector<Tensor> catalogue,
                          std::optional<Tensor> exclude_ids, std::optional<Tensor> exclude_offsets,
                          std::vector<int64_t> sizes, double layer_norm_eps, int64_t k,
                          int64_t num_beams, bool codebook, std::vector<double> temperatures,
                          std::vector<double> level_weights, std::vector<int64_t> level_modes,
                          int64_t launches, int64_t isa);

}  // namespace sidmlp::torch_ops
