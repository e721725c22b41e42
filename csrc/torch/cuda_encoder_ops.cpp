// torch.ops.sidmlp.encode_* and recommend on CUDA: checks, states and workspace from torch's
// caching allocator, one launch on the current stream (recommend: as many more as its decode).
// Never synchronises.
#include <torch/csrc/stable/library.h>

#include "cuda/sm90/encoder/encode_t5.h"
#include "cuda/sm90/mlp_encoder/encode_mlp.h"
#include "torch/cuda_call.h"
#include "torch/cuda_calls.h"
#include "torch/encoder_problem.h"

namespace sidmlp::torch_ops {

namespace {

using torch::stable::accelerator::DeviceGuard;

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

template <class Problem>
Tensor empty_states(const Problem& problem, const Place& place) {
  return empty_cuda({problem.tokens.batch, problem.tokens.tokens, problem.model.dim},
                    scalar_type_of(problem.model.dtype), place);
}

// Launches on the current stream; the guard has made the device current.
template <class Problem, class Form>
void run(const Problem& problem, Form form, int64_t workspace_bytes, const Place& place,
         const char* name) {
  std::optional<Tensor> workspace;  // freed on return: the allocator keeps the stream's order
  if (workspace_bytes > 0) workspace = empty_cuda({workspace_bytes}, ScalarType::Byte, place);
  check_cuda(cuda::sm90::launch(problem, form, workspace ? workspace->data_ptr() : nullptr,
                                current_stream(place)),
             name);
}

template <class Problem, class... Form>
void check_sizes(const Problem& problem, const char* name, Form... form) {
  const char* reason = cuda::sm90::why_not(problem, form...);
  STD_TORCH_CHECK(reason == nullptr, name, ": expected sizes that its CUDA kernel takes, got ",
                  reason);
}

Tensor encode_t5(Tensor ids, Tensor mask, Tensors encoder, Ints sizes, double layer_norm_eps,
                 int64_t form, int64_t /*isa*/) {
  const Place place = cuda_place(ids, "ids");
  const DeviceGuard guard(place.device_index);
  const T5Sizes s(sizes);
  cuda::sm90::EncodeT5Problem problem{};
  problem.tokens = tokens_view(ids, mask, place);
  problem.model = t5_view(s, encoder, layer_norm_eps, place);
  check_aligned(encoder, "encoder");
  check_form(form);
  Tensor states = empty_states(problem, place);
  if (problem.tokens.batch == 0 || problem.tokens.tokens == 0) return states;
  problem.states = states.data_ptr();
  const auto chosen = static_cast<cuda::sm90::EncodeForm>(form);
  check_sizes(problem, "encode_t5", chosen);
  run(problem, chosen, cuda::sm90::workspace_bytes(problem, chosen), place, "encode_t5");
  return states;
}

Tensor encode_mlp(Tensor ids, Tensor mask, Tensors encoder, Ints sizes, double layer_norm_eps,
                  int64_t form, int64_t /*isa*/) {
  const Place place = cuda_place(ids, "ids");
  const DeviceGuard guard(place.device_index);
  const MlpSizes s(sizes);
  cuda::sm90::EncodeMlpProblem problem{};
  problem.tokens = tokens_view(ids, mask, place);
  check_positions(s, problem.tokens);
  problem.model = mlp_view(s, encoder, layer_norm_eps, place);
  check_aligned(encoder, "encoder");
  check_form(form);
  STD_TORCH_CHECK(form != 32, "form: expected one of encode_mlp's, got 32 (long), of encode_t5");
  Tensor states = empty_states(problem, place);
  if (problem.tokens.batch == 0 || problem.tokens.tokens == 0) return states;
  problem.states = states.data_ptr();
  check_sizes(problem, "encode_mlp");
  const int chosen = form == 16 ? 1 : static_cast<int>(form);  // "cluster1": a block a request
  run(problem, chosen, cuda::sm90::mlp_shape(problem, chosen).workspace_bytes, place, "encode_mlp");
  return states;
}

// The states are scratch: the second launch reads them in the stream's order, and the allocator
// gives them away in the same order.
Results recommend(Tensor ids, Tensor mask, Tensors encoder, Ints encoder_sizes, double encoder_eps,
                  int64_t form, Tensors readout, Tensors heads, Tensors catalogue,
                  std::optional<Tensor> exclude_ids, std::optional<Tensor> exclude_offsets,
                  Ints sizes, double layer_norm_eps, int64_t k, int64_t num_beams, bool codebook,
                  std::vector<double> temperatures, std::vector<double> level_weights,
                  Ints level_modes, int64_t launches, int64_t isa) {
  check_kind(encoder_sizes);
  const Tensor states = encoder_sizes.size() == 8
                            ? encode_t5(ids, mask, encoder, encoder_sizes, encoder_eps, form, isa)
                            : encode_mlp(ids, mask, encoder, encoder_sizes, encoder_eps, form, isa);
  return decode_states_cuda(states, mask, readout, heads, catalogue, exclude_ids, exclude_offsets,
                            sizes, layer_norm_eps, k, num_beams, codebook, temperatures,
                            level_weights, level_modes, launches, isa);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sidmlp, CUDA, library) {
  library.impl("encode_t5", TORCH_BOX(&encode_t5));
  library.impl("encode_mlp", TORCH_BOX(&encode_mlp));
  library.impl("recommend", TORCH_BOX(&recommend));
}

}  // namespace sidmlp::torch_ops
